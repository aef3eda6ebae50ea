import json
import os

import pytest

from jax_instructblip import checkpoint
from jax_instructblip.checkpoint.file_hashes import FILES, verify_hashes, write_hashes
from jax_instructblip.checkpoint.manifest import CheckpointError
from jax_instructblip.inference.loading import EMBEDDED
from tests.helpers.tiny import write_base


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("hashes") / "base")


def test_every_file_but_the_leaves_is_listed(base):
    listed = set(json.loads((base / FILES).read_text())["sha256"])
    found = {path.relative_to(base).as_posix() for path in base.rglob("*") if path.is_file()}
    leaves = {
        f"params/state/{path.replace('/', '.')}/{'.'.join('0' * len(entry['shape']))}"
        for path, entry in checkpoint.read_manifest(base).items()
    }
    assert leaves < found
    assert listed == found - leaves - {FILES, checkpoint.MANIFEST}
    assert {"config.json", "tokenizer/tokenizer.json"} < listed


@pytest.mark.parametrize("name", ["config.json", "tokenizer/tokenizer.json"])
def test_a_changed_or_missing_file_is_named(base, name):
    path = base / name
    before = path.read_bytes()
    try:
        path.write_bytes(before.replace(b" ", b"  ", 1))  # the same JSON
        for read in (checkpoint.read_config, checkpoint.read_tree):
            with pytest.raises(CheckpointError, match=rf"changed.*\n  {name}: its bytes have"):
                read(base)
        path.unlink()
        with pytest.raises(CheckpointError, match=rf"{name}: cannot be read"):
            verify_hashes(base)
    finally:
        path.write_bytes(before)
    verify_hashes(base)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text[:-5], "files.json is damaged"),
        (lambda text: text.replace("format", "formas"), "fields .'formas', 'sha256'."),
        (lambda text: text.replace("1", "2", 1), "format is 2, this version reads 1"),
        (lambda text: "[]", "expected an object"),
    ],
)
def test_a_damaged_list_is_refused(tmp_path, change, message):
    (tmp_path / "a").write_text("a")
    write_hashes(tmp_path)
    verify_hashes(tmp_path)
    (tmp_path / FILES).write_text(change((tmp_path / FILES).read_text()))
    with pytest.raises(CheckpointError, match=message):
        verify_hashes(tmp_path)


def test_a_folder_from_before_there_was_a_list_is_read(tmp_path, base):
    checkpoint.write_tree(tmp_path / "old", checkpoint.read_leaves(base))
    os.unlink(tmp_path / "old" / FILES)
    checkpoint.read_tree(tmp_path / "old")


@pytest.mark.parametrize("name", ["shapes_t5", "shapes_llama"])
def test_the_embedded_checkpoints_have_it(name):
    assert (EMBEDDED / name / FILES).is_file()
    verify_hashes(EMBEDDED / name)

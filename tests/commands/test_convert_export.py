import json
import re
import subprocess
import sys

import pytest

import jax_instructblip
from jax_instructblip import atomic, checkpoint
from jax_instructblip.__main__ import main
from jax_instructblip.models.released import VARIANTS
from jax_instructblip.models.variants import Variant
from tests.helpers.hf_folders import bits, copy, tensors

torch = pytest.importorskip("torch", reason="needs torch: pip install -e .[torch]")

FLAN = "instructblip-flan-t5-xl"


def test_convert_and_export(forge, tmp_path, capsys):
    source, ours, back = forge(FLAN, "bfloat16"), tmp_path / "ours", tmp_path / "back"
    assert main(["convert", str(source), "--out", str(ours), "--variant", "tiny-t5"]) == 0
    out = capsys.readouterr().out
    assert f"{ours}: tiny-t5, 230 tensors bfloat16 -> 111 leaves, 0.01 GB" in out
    assert sorted(path.name for path in ours.iterdir()) == [
        "config.json",
        "files.json",
        "manifest.json",
        "params",
        "qformer_tokenizer",
        "tokenizer",
    ]
    config = checkpoint.read_config(ours)
    assert Variant.from_dict(config["variant"]).qformer.image_norm_eps == 1e-6
    assert config["source"]["dtypes"] == {"bfloat16": 230}
    assert config["source"]["config"] == json.loads((source / "config.json").read_text())

    words = ["export", str(ours), "--format", "hf", "--out", str(back), "--shard_bytes", "2000000"]
    assert main(words) == 0
    assert "Hugging Face's layout" in capsys.readouterr().out
    found, wanted = tensors(back), tensors(source)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(bits(found[key]), bits(wanted[key])) for key in wanted)


def test_existing_folder_is_refused_before_anything_is_read(tmp_path, capsys):
    (tmp_path / "file").write_text("kept")
    for verb in ("convert", "export"):
        assert main([verb, str(tmp_path / "nowhere"), "--out", str(tmp_path)]) == 1
        assert "exists and is not overwritten" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_wrong_variant_and_wrong_folder_are_one_error(forge, tmp_path, capsys):
    out = tmp_path / "out"
    words = ["convert", str(forge(FLAN, "bfloat16")), "--out", str(out), "--variant", "tiny-vicuna"]
    assert main(words) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "is not tiny-vicuna; it fits tiny-t5" in error
    wider = VARIANTS["tiny-t5"].replace(**{"qformer.mlp": 64})
    with pytest.raises(
        ValueError, match=r"not of the variant that was asked for(.|\n)*qformer\.mlp"
    ):
        jax_instructblip.convert(forge(FLAN, "bfloat16"), out, variant=wider)
    assert main(["convert", str(tmp_path), "--out", str(out)]) == 1
    assert "config.json cannot be read" in capsys.readouterr().err
    assert main(["export", str(tmp_path), "--out", str(out)]) == 1
    assert f"{tmp_path} is of no known kind" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_another_kind_is_named(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "ours").mkdir()
    checkpoint.write_config(tmp_path / "ours", {"variant": {}})
    for name, message in (
        ("nowhere", "does not exist"),
        ("file", "is a file"),
        ("ours", "is converted already"),
    ):
        folder = tmp_path / name
        assert main(["convert", str(folder), "--out", str(tmp_path / "out")]) == 1
        error = capsys.readouterr().err
        assert f"error: {folder} {message}" in error and "a Hugging Face folder" in error


def test_too_little_room_is_said_before_anything_is_written(forge, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(atomic, "free_bytes", lambda folder: 1_000_000)
    assert main(["convert", str(forge(FLAN, "bfloat16")), "--out", str(tmp_path / "out")]) == 1
    assert "needs 0.01 GB, 0.00 GB are free there" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_disk_that_fills_up_leaves_nothing(forge, tmp_path):
    """The system refuses to write past a limit, as in `tests/checkpoint/test_folder.py`."""
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))\n"
        "from jax_instructblip.__main__ import main; sys.exit(main(sys.argv[1:]))"
    )
    (tmp_path / "old").mkdir()
    for verb, folder in (("convert", forge(FLAN, "bfloat16")), ("export", None)):
        if folder is None:
            folder = tmp_path / "old" / "ours"
            assert main(["convert", str(forge(FLAN, "bfloat16")), "--out", str(folder)]) == 0
        words = [verb, str(folder), "--out", str(tmp_path / "new")]
        process = subprocess.run(
            [sys.executable, "-c", code, *words], capture_output=True, text=True
        )
        assert process.returncode == 1
        *progress, line = process.stderr.splitlines()  # and not a word of Orbax
        labels = ("converting: ", "exporting: ")
        assert [each for each in progress if not each.startswith(labels)] == []
        assert line.startswith("error: ")
        assert "File too large" in line and len(line) < 1000  # not the name of every leaf
        assert str(tmp_path) in line and " GB " in line
        assert verb == "convert" or line.endswith("make room there, or choose another folder")
        assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_folder_without_tokenizers_is_converted_with_a_warning(forge, tmp_path, capsys):
    folder = copy(forge(FLAN, "bfloat16"), tmp_path / "bare")
    for path in [*folder.glob("tokenizer*"), *folder.glob("spiece*")]:
        path.unlink()
    for path in folder.glob("qformer_tokenizer/*"):
        path.unlink()
    assert main(["convert", str(folder), "--out", str(tmp_path / "ours")]) == 0
    error = capsys.readouterr().err
    assert "no tokenizer in" in error and "no qformer_tokenizer in" in error


def test_tied_head_and_dropped_tensors_are_reported(forge, tmp_path, capsys):
    def change(state):
        del state["language_model.lm_head.weight"]
        state["qformer.embeddings.position_ids"] = torch.arange(512)[None]

    folder = copy(forge(FLAN, "bfloat16"), tmp_path / "tied", change=change)
    assert main(["convert", str(folder), "--out", str(tmp_path / "ours")]) == 0
    out = capsys.readouterr().out
    assert "left out qformer.embeddings.position_ids: a buffer" in out
    assert "the head is the token embedding" in out


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("tokenizer.json", "{", "tokenizer in .* cannot be read"),
        ("qformer_tokenizer/tokenizer.json", "", "Q-Former's tokenizer in .* cannot be read"),
        ("tokenizer_config.json", '{"eos_token": "x"}', "eos: the model expects id 1, the token"),
    ],
)
def test_a_damaged_tokenizer_is_told_before_weights_are_read(
    forge, tmp_path, capsys, name, content, said
):
    folder = copy(forge(FLAN, "bfloat16"), tmp_path / "folder")
    (folder / name).unlink()
    (folder / name).write_text(content)
    assert main(["convert", str(folder), "--out", str(tmp_path / "ours")]) == 1
    assert re.search(said, capsys.readouterr().err)
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_tokenizer_without_vocabulary_is_a_warning(forge, tmp_path, capsys):
    folder = copy(forge(FLAN, "bfloat16"), tmp_path / "folder")
    (folder / "qformer_tokenizer" / "tokenizer.json").unlink()
    assert main(["convert", str(folder), "--out", str(tmp_path / "ours")]) == 0
    assert "warning: the Q-Former's tokenizer is missing" in capsys.readouterr().err


def test_weights_that_are_not_finite_are_a_warning(forge, tmp_path, capsys):
    def change(state):
        state["language_model.lm_head.weight"][3, 4] = float("inf")

    folder = copy(forge(FLAN, "bfloat16"), tmp_path / "folder", change=change)
    assert main(["convert", str(folder), "--out", str(tmp_path / "ours")]) == 0
    assert "warning: NaN or infinity in llm/head/kernel: is a file" in capsys.readouterr().err

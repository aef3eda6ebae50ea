"""Object-store addresses given to every verb: they are read and written, or refused."""

import ast

import pytest

import jax_instructblip
from jax_instructblip.__main__ import find_verbs, main
from jax_instructblip.atomic import atomic_folder
from jax_instructblip.data import images
from jax_instructblip.data.records import read_jsonl
from jax_instructblip.data.sources import open_records
from tests.helpers.bucket import bucket

ADDRESS = "s3://bucket/x"
STORE = "memory://bucket/x"
ASK = ["--image", "a.png", "--prompt", "what?"]
JUDGE = ["judge", "--contexts", "a", "--reference", "a", "--answers", "a", "--rules", "a"]
JUDGE += ["--model", "m", "--questions"]
REFUSED = [  # read from a disk, or written to one
    ["backbones", "towers", ADDRESS],
    ["backbones", "embed", ADDRESS, "b"],
    ["backbones", "embed", "a", ADDRESS],
    ["features", "--checkpoint", "a", "--images", ADDRESS, "--out", "a"],
    ["features", "--checkpoint", "a", "--images", "a", "--out", ADDRESS],
    ["instruct-data", "a.jsonl", "--model", "m", "--out", ADDRESS],
    [*JUDGE, "a", "--out", ADDRESS],
    ["plan", "--config", "a.py", "--topology", "cpu:1", "--json", ADDRESS],
    ["prepare", "vsr", "--raw", ADDRESS, "--out", "a"],
    ["train", "--config", "a.py", "--profile", ADDRESS],
    ["verify", "--checkpoint", "a", "--image", "a=a.png", "--facts", ADDRESS],
]
READ = [
    ["check", ADDRESS],
    ["check", "a.jsonl", "--checkpoint", ADDRESS],
    ["convert", ADDRESS, "--out", "a"],
    ["evaluate", "--checkpoint", ADDRESS, "--data", "shapes", "--out", "a"],
    ["evaluate", "--checkpoint", "shapes_t5", "--data", ADDRESS, "--out", "a"],
    ["evaluate", "--compare", "a", ADDRESS],
    ["evaluate", "--datasets", "vsr", "--data", "a", "--out", "a", "--predictions", ADDRESS],
    ["export", ADDRESS, "--format", "hf", "--out", "a"],
    ["features", "--checkpoint", ADDRESS, "--images", "a", "--out", "a"],
    ["generate", "--checkpoint", ADDRESS, *ASK],
    ["generate", "--checkpoint", "shapes_t5", "--image", ADDRESS, "--prompt", "what?"],
    ["instruct-data", ADDRESS, "--model", "m", "--out", "a"],
    [*JUDGE, ADDRESS, "--out", "a"],
    ["judge", "--reviews", ADDRESS],
    ["merge", ADDRESS, "--out", "a"],
    ["plan", "--config", ADDRESS, "--topology", "cpu:1"],
    ["rank", "--checkpoint", ADDRESS, *ASK, "--candidates", "a,b"],
    ["rank", "--checkpoint", "shapes_t5", *ASK, "--candidates", f"@{ADDRESS}"],
    ["train", "--config", ADDRESS],
    ["verify", "--checkpoint", "a", "--image", f"confusing-pictures={ADDRESS}"],
]
WRITTEN = [
    ["convert", "a", "--out", ADDRESS],
    ["evaluate", "--checkpoint", "shapes_t5", "--data", "shapes", "--out", ADDRESS],
    ["export", "shapes_t5", "--format", "hf", "--out", ADDRESS],
    ["merge", "a", "--out", ADDRESS],
    ["prepare", "vsr", "--raw", "a", "--out", ADDRESS],
]


@pytest.mark.parametrize("words", REFUSED, ids=" ".join)
@pytest.mark.parametrize("address", [ADDRESS, "./s3:/bucket/x"])
def test_an_address_is_refused_by_name_and_nothing_is_written(
    words, address, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert main([word.replace(ADDRESS, address) for word in words]) == 1
    error = capsys.readouterr().err
    assert " is s3://bucket/x: this is read from a disk, or written to one" in error
    assert error.count("\n") == 1 and list(tmp_path.iterdir()) == []


def test_every_verb_is_tried_and_looks_at_its_flags():
    verbs = find_verbs()
    assert {words[0] for words in [*REFUSED, *READ, *WRITTEN]} == set(verbs)
    for path in verbs.values():
        nodes = ast.walk(ast.parse(path.read_text()))
        calls = {getattr(node.func, "id", "") for node in nodes if isinstance(node, ast.Call)}
        assert "check_flags" in calls, path.name


@pytest.mark.parametrize("words", READ, ids=" ".join)
@pytest.mark.parametrize("address", [STORE, STORE.replace("//", "/")])
def test_what_is_not_in_a_store_is_named_and_nothing_is_written(
    words, address, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert main([word.replace(ADDRESS, address) for word in words]) == 1
    error = capsys.readouterr().err
    assert STORE in error and error.count("\n") == 1
    assert list(tmp_path.rglob("*:*")) == []


@pytest.mark.parametrize("words", WRITTEN, ids=" ".join)
def test_a_store_that_cannot_be_written_is_told_before_the_work(
    words, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    with bucket() as store:
        store.before = refuse
        assert main([word.replace(ADDRESS, "gs://bucket/x") for word in words]) == 1
    error = capsys.readouterr().err
    assert "gs://bucket/x cannot be written to: 403 no access" in error
    assert error.count("\n") == 1 and list(tmp_path.iterdir()) == []


def refuse(path):
    raise PermissionError("403 no access")


@pytest.mark.parametrize(
    "call",
    [
        lambda: jax_instructblip.load(STORE),
        lambda: open_records(STORE, "train"),
        lambda: images.decode(STORE),
    ],
)
def test_the_library_looks_in_the_store(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((OSError, ValueError), match=STORE):
        call()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("call", [lambda: read_jsonl(ADDRESS), lambda: atomic_folder(ADDRESS)])
def test_what_knows_no_stores_refuses_an_address(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"is {ADDRESS}: this is read from a disk"), call():
        pass
    assert list(tmp_path.iterdir()) == []

"""No verb takes an address for a folder."""

import ast

import pytest

import jax_instructblip
from jax_instructblip.__main__ import find_verbs, main
from jax_instructblip.data import images
from jax_instructblip.data.records import read_jsonl
from jax_instructblip.data.sources import open_records

ADDRESS = "s3://bucket/x"
ASK = ["--image", "a.png", "--prompt", "what?"]
WORDS = [
    ["backbones", "towers", ADDRESS],
    ["backbones", "merge", "a", ADDRESS, "c"],
    ["backbones", "merge", "a", "b", ADDRESS],
    ["check", ADDRESS],
    ["check", "a.jsonl", "--checkpoint", ADDRESS],
    ["convert", ADDRESS, "--out", "a"],
    ["convert", "a", "--out", ADDRESS],
    ["evaluate", "--checkpoint", ADDRESS, "--data", "shapes"],
    ["evaluate", "--checkpoint", "shapes_t5", "--data", ADDRESS],
    ["evaluate", "--checkpoint", "shapes_t5", "--data", "shapes", "--out", ADDRESS],
    ["evaluate", "--compare", "a", ADDRESS],
    ["evaluate", "--datasets", "vsr", "--data", "a", "--predictions", ADDRESS],
    ["evaluate", "--datasets", "visual_dialog", "--data", "a", "--relevance", ADDRESS],
    ["evaluate", "--datasets", "msvd_qa", "--data", "a", "--candidates", ADDRESS],
    ["export", ADDRESS, "--format", "hf", "--out", "a"],
    ["export", "shapes_t5", "--format", "hf", "--out", ADDRESS],
    ["generate", "--checkpoint", ADDRESS, *ASK],
    ["generate", "--checkpoint", "shapes_t5", "--image", ADDRESS, "--prompt", "what?"],
    ["merge", ADDRESS, "--out", "a"],
    ["merge", "a", "--out", ADDRESS],
    ["plan", "--config", ADDRESS, "--topology", "cpu:1"],
    ["plan", "--config", "a.py", "--topology", "cpu:1", "--json", ADDRESS],
    ["prepare", "vsr", "--raw", ADDRESS, "--out", "a"],
    ["prepare", "vsr", "--raw", "a", "--out", ADDRESS],
    ["rank", "--checkpoint", ADDRESS, *ASK, "--candidates", "a,b"],
    ["rank", "--checkpoint", "shapes_t5", *ASK, "--candidates", f"@{ADDRESS}"],
    ["train", "--config", ADDRESS],
    ["train", "--config", "a.py", "--profile", ADDRESS],
    ["verify", "--checkpoint", ADDRESS, "--image", "a=a.png"],
    ["verify", "--checkpoint", "a", "--image", f"a={ADDRESS}"],
    ["verify", "--checkpoint", "a", "--image", "a=a.png", "--facts", ADDRESS],
]


@pytest.mark.parametrize("words", WORDS, ids=" ".join)
@pytest.mark.parametrize("address", [ADDRESS, "./s3:/bucket/x"])
def test_an_address_is_refused_by_name_and_nothing_is_written(
    words, address, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert main([word.replace(ADDRESS, address) for word in words]) == 1
    error = capsys.readouterr().err
    assert " is s3://bucket/x: weights and data are read from a disk" in error
    assert error.count("\n") == 1 and list(tmp_path.iterdir()) == []


def test_every_verb_is_tried_and_looks_at_its_flags():
    verbs = find_verbs()
    assert {words[0] for words in WORDS} == set(verbs)
    for path in verbs.values():
        nodes = ast.walk(ast.parse(path.read_text()))
        calls = {getattr(node.func, "id", "") for node in nodes if isinstance(node, ast.Call)}
        assert "check_flags" in calls, path.name


@pytest.mark.parametrize(
    "call",
    [
        lambda: jax_instructblip.load(ADDRESS),
        lambda: open_records(ADDRESS, "train"),
        lambda: read_jsonl(ADDRESS),
        lambda: images.decode(ADDRESS),
    ],
)
def test_the_library_refuses_an_address(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"is {ADDRESS}: weights and data are read from a disk"):
        call()
    assert list(tmp_path.iterdir()) == []

import json
import re
import types

import numpy as np
import pytest
from PIL import Image

import jax_instructblip
from jax_instructblip.__main__ import main
from jax_instructblip.inference import asking
from tests.helpers.tiny import COLORS, QUESTION, write_base

CANDIDATES = [*COLORS, "red green"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base") / "t5", "t5")


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    paths = [str(tmp_path_factory.mktemp("photographs") / f"{name}.png") for name in COLORS][:2]
    for path, color in zip(paths, COLORS.values(), strict=False):
        Image.new("RGB", (40, 30), color).save(path)
    return paths


def words(folder, images, candidates, *more):
    given = ["rank", "--checkpoint", str(folder), "--image", *images, "--prompt", QUESTION]
    return [*given, "--candidates", candidates, *more]


@pytest.mark.parametrize("normalise", [False, True])
def test_json_has_what_the_library_scores(folder, photographs, normalise, capsys):
    more = ["--json", "--top", "3"] + ["--length_normalise"] * normalise
    assert main(words(folder, photographs, ",".join(CANDIDATES), *more)) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    blip = jax_instructblip.load(folder)
    scores = blip.rank(photographs, [QUESTION], CANDIDATES, length_normalise=normalise)
    assert len(found) == 2
    for image, row, line in zip(photographs, scores, found, strict=True):
        assert (line["image"], line["prompt"]) == (image, QUESTION)
        order = np.argsort(-row)[:3]
        assert [each["candidate"] for each in line["candidates"]] == [CANDIDATES[i] for i in order]
        assert [each["score"] for each in line["candidates"]] == row[order].tolist()
        chances = np.exp(row[order] - np.logaddexp.reduce(row.astype(np.float64)))
        given = [each["probability"] for each in line["candidates"]]
        np.testing.assert_allclose(given, chances, rtol=1e-5)


def test_text_and_a_file_of_candidates(folder, photographs, tmp_path, capsys):
    path = tmp_path / "answers.txt"
    path.write_text("red\n\n  red green \nblue, or white\n", encoding="utf-8")
    assert main(words(folder, photographs[:1], f"@{path}")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[2].strip() for line in lines[:2]] == [photographs[0], QUESTION]
    rows = [line.split(maxsplit=2) for line in lines[3:6]]
    assert {row[2] for row in rows} == {"red", "red green", "blue, or white"}
    scores = [float(row[0]) for row in rows]
    assert scores == sorted(scores, reverse=True) and lines[6:] == [""]
    assert abs(sum(float(row[1].rstrip("%")) for row in rows) - 100) < 0.1


@pytest.mark.parametrize(
    ("candidates", "more", "message"),
    [
        ("red,,blue", [], "candidate 1 is empty"),
        ("@nowhere.txt", [], "nowhere.txt"),
        ("@empty.txt", [], "candidates is empty: there is nothing to rank"),
        ("@latin.txt", [], "latin.txt is not UTF-8"),
        ("red", ["--top", "0"], "--top is 0, expected at least 1"),
        ("red", ["--image", "gone.jpg"], "gone.jpg: no such file"),
        ("red", ["--checkpoint", "nowhere"], "no checkpoint 'nowhere'"),
    ],
)
def test_errors_are_one_line(candidates, more, message, photographs, tmp_path, monkeypatch, capsys):
    """None waits for the weights."""
    monkeypatch.setattr(asking, "load", lambda *_, **__: pytest.fail("the weights are read"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9\n")
    assert main(words("shapes_t5", photographs, candidates, *more)) == 1
    printed = capsys.readouterr()
    assert printed.out == "" and message in printed.err and printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1


@pytest.mark.parametrize(
    ("prompt", "candidates", "message"),
    [
        ("what\ud800", "red,blue", "--prompt cannot be written as UTF-8: '.ud800' at character 4"),
        ("what?", "red,bl\udce4u", "candidate 1 cannot be written as UTF-8: .* the byte 0xE4 of"),
        ("x" * 100_001, "red,blue", "--prompt has 100,001 characters, at most 100,000 are read"),
    ],
)
def test_texts_that_cannot_be_read_are_refused_before_weights(
    photographs, prompt, candidates, message, capsys
):
    given = ["rank", "--checkpoint", "none", "--image", *photographs, "--prompt", prompt]
    assert main([*given, "--candidates", candidates]) == 1
    error = capsys.readouterr().err
    assert re.match(f"error: {message}", error) and error.count("\n") == 1


def test_several_images_stand_in_one_question(photographs, monkeypatch, capsys):
    asked = []

    def rank(self, images, prompts, candidates, **settings):
        asked.append((images, prompts))
        return np.zeros((1, 2))

    form = types.SimpleNamespace(
        with_template=lambda template: types.SimpleNamespace(template="v1")
    )
    source = types.SimpleNamespace(input_format=form)
    monkeypatch.setattr(asking, "read_source", lambda checkpoint: source)
    monkeypatch.setattr(
        asking, "load", lambda *_, **__: types.SimpleNamespace(rank=rank.__get__(0))
    )
    given = ["rank", "--checkpoint", "any", "--image", *photographs, "--candidates", "yes,no"]
    assert main([*given, "--prompt", "Is <image> as <image>?", "--json"]) == 0
    assert asked == [([photographs], ["Is <image> as <image>?"])]
    assert json.loads(capsys.readouterr().out)["images"] == photographs

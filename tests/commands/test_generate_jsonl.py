"""`generate --jsonl`: answers to a file of questions, with the engine, also after a kill."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest

from jax_instructblip.__main__ import main
from jax_instructblip.evaluation.predictions import read_rows
from jax_instructblip.evaluation.question_file import read_questions
from jax_instructblip.inference.generation_config import GenerationConfig
from jax_instructblip.inference.pipeline import load_pipeline
from tests.helpers.interpreter import ROOT
from tests.helpers.tiny import QUESTION, compile_cache, write_base, write_data

LINES = (
    {"image": "0.png", "prompt": QUESTION},
    {"image": "1.png", "prompt": "one two three", "id": "second", "max_new_tokens": 2},
    {"image": "0.png", "prompt": QUESTION, "temperature": 1.5, "seed": 7},
    {"image": "damaged.png", "prompt": QUESTION},
    {"image": "2.png", "prompt": QUESTION, "do_sample": True},
    {"image": "2.png", "prompt": QUESTION, "do_sample": True},
)


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory):
    with compile_cache(tmp_path_factory.mktemp("compiled")):
        yield


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("base") / "llama", "llama")


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_data(folder, count=3)
    (folder / "damaged.png").write_bytes((folder / "0.png").read_bytes()[:60])
    return write(folder / "q.jsonl", LINES)


def write(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def words(base, questions, out, *more):
    given = ["generate", "--checkpoint", base, "--jsonl", questions, "--out", out]
    return [*map(str, given), "--max_new_tokens", "6", "--batch_size", "3", *more]


@pytest.fixture(scope="module")
def whole(base, questions, tmp_path_factory):
    """The answers of a run that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole") / "answers.jsonl"
    assert main(words(base, questions, out)) == 0
    return out


def test_each_line_is_answered_as_the_library_answers(base, questions, whole, capsys):
    rows = read_rows(whole)
    assert [row.id for row in rows] == ["q:1", "second", *(f"q:{line}" for line in range(3, 7))]
    assert sorted(path.name for path in whole.parent.iterdir()) == ["answers.json", "answers.jsonl"]
    blip = load_pipeline(base)
    blip.silent = True
    image = lambda line: str(questions.parent / line["image"])
    own = [
        blip.generate(
            [image(line)], [line["prompt"]], max_new_tokens=line.get("max_new_tokens", 6)
        )[0]
        for line in LINES[:2]
    ]
    own += blip.generate([image(LINES[2])], [QUESTION], max_new_tokens=6, temperature=1.5, seed=7)
    together = [*LINES[:3], LINES[4], *LINES[4:]]  # an image in place of the damaged one
    own += blip.generate(
        [image(line) for line in together],
        [line["prompt"] for line in together],
        max_new_tokens=6,
        do_sample=True,
    )[4:]
    answered = [row for row in rows if not row.problem]
    assert [row.text for row in answered] == [answer.text for answer in own]
    assert [row.logprob for row in answered] == pytest.approx([each.logprob for each in own])
    assert answered[-1].text != answered[-2].text  # drawn twice
    assert "damaged.png" in rows[3].problem and not rows[3].text and rows[3].logprob is None


def test_a_killed_run_goes_on_and_writes_the_same(base, questions, whole, tmp_path, capsys):
    out = tmp_path / "answers.jsonl"
    code = f"""
import os, signal
from jax_instructblip.__main__ import main
from jax_instructblip.evaluation.predictions import Store
append = Store.append
def dying(self, rows):
    append(self, rows)
    if len(self.rows()) == 3:
        with self._own.open("a") as file:
            file.write('{{"id": "q:6", "pro')
        os.kill(os.getpid(), signal.SIGKILL)
Store.append = dying
main({words(base, questions, out)!r})
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=600)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert not out.exists() and (tmp_path / "answers.partial").is_dir()
    assert main(words(base, questions, out)) == 0
    assert out.read_bytes() == whole.read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["answers.json", "answers.jsonl"]
    assert main(words(base, questions, out)) == 0  # nothing is left to do
    assert "(6 questions, 1 with a problem)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "more", "message"),
    [
        ({"prompt": "what?"}, [], "questions was"),
        ({"seed": 8}, [], "settings was"),
        ({}, ["--top_k", "3"], "settings was"),
        ({}, ["--dtype", "bfloat16"], "dtype was 'float32', now 'bfloat16'"),
    ],
)
def test_other_questions_or_settings_are_refused(
    base, questions, whole, change, more, message, capsys
):
    before = whole.read_bytes()
    other = write(questions.with_name("q.jsonl"), [LINES[0] | change, *LINES[1:]])
    try:
        assert main(words(base, other, whole, *more)) == 1
    finally:
        write(questions, LINES)
    assert message in capsys.readouterr().err
    assert whole.read_bytes() == before and not (whole.parent / "answers.partial").exists()


def test_another_preparation_of_images_is_refused(base, questions, whole, tmp_path, capsys):
    """It is said beside the weights, whose digest stays."""
    shutil.copytree(base, tmp_path / "base")
    shutil.copytree(whole.parent, tmp_path / "out")
    path = tmp_path / "base" / "config.json"
    config = json.loads(path.read_text()) | {"input_format": {"image_crop": "pad"}}
    path.write_text(json.dumps(config))
    (tmp_path / "base" / "files.json").unlink()  # its digest of the file before
    assert main(words(tmp_path / "base", questions, tmp_path / "out" / whole.name)) == 1
    assert "input_format was " in capsys.readouterr().err


def test_rows_taken_out_are_answered_again(base, questions, whole, tmp_path):
    shutil.copytree(whole.parent, tmp_path / "out")
    out = tmp_path / "out" / whole.name
    lines = whole.read_text().splitlines(keepends=True)
    out.write_text("".join(line for line in lines if "second" not in line))
    assert main(words(base, questions, out)) == 0
    for row, before in zip(read_rows(out), read_rows(whole), strict=True):
        # Alone it is answered by a program of another size, which rounds otherwise.
        assert row.logprob == pytest.approx(before.logprob)
        assert dataclasses.replace(row, logprob=before.logprob) == before
    assert sorted(os.listdir(out.parent)) == ["answers.json", "answers.jsonl"]


def test_scores_that_are_not_finite_are_the_problem_of_their_question(
    base, questions, whole, tmp_path, monkeypatch
):
    from jax_instructblip.inference import engine

    out, calls = tmp_path / "answers.jsonl", []

    def first_alone(wrong, dtype, check=engine.check_finite):
        calls.append(wrong)
        check([0] if len(calls) == 1 else wrong, dtype)

    monkeypatch.setattr(engine, "check_finite", first_alone)
    assert main(words(base, questions, out)) == 0
    rows, expected = read_rows(out), read_rows(whole)
    bad = [row for row in rows if "not finite" in row.problem]
    assert len(bad) == 1 and bad[0].logprob is None
    left = [pair for pair in zip(rows, expected, strict=True) if pair[0] is not bad[0]]
    assert [row for row, _ in left] == [row for _, row in left]


def test_fields_that_no_prompt_has_are_named(base, questions, caplog):
    path = write(questions.with_name("more.jsonl"), [LINES[0], LINES[1] | {"ocr": ["stop"]}])
    assert len(read_questions(path, GenerationConfig())) == 2
    assert "1 of 2 lines have choices or context or ocr" in caplog.text
    assert "(line 2, for one)" in caplog.text


def test_a_run_taken_up_before_a_question_without_finite_scores_ends(
    base, questions, whole, tmp_path, monkeypatch
):
    from jax_instructblip.inference import engine

    check = engine.check_finite
    monkeypatch.setattr(engine, "check_finite", lambda wrong, dtype: check([0], dtype))
    shutil.copytree(whole.parent, tmp_path / "out")
    out = tmp_path / "out" / whole.name
    lines = whole.read_text().splitlines(keepends=True)
    out.write_text("".join(line for line in lines if "second" not in line))
    assert main(words(base, questions, out)) == 0
    rows = {row.id: row for row in read_rows(out)}
    assert "not finite" in rows.pop("second").problem
    assert rows == {row.id: row for row in read_rows(whole) if row.id != "second"}


@pytest.mark.parametrize("count", [1, 2, 6])
def test_a_model_without_a_usable_answer_is_refused(
    base, questions, tmp_path, monkeypatch, count, capsys
):
    from jax_instructblip.inference import engine

    check = engine.check_finite
    monkeypatch.setattr(engine, "check_finite", lambda wrong, dtype: check([0], dtype))
    some = write(questions.with_name("some.jsonl"), LINES[-count:])
    assert main(words(base, some, tmp_path / "answers.jsonl")) == 1
    assert "not finite" in capsys.readouterr().err
    assert not (tmp_path / "answers.jsonl").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"temprature": 1}, "unknown field 'temprature'; did you mean 'temperature'?"),
        ({"temperature": -1}, "temperature is -1"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"num_beams": 5}, "unknown field 'num_beams'"),
        ({"image": "none.png"}, "image 'none.png' does not exist"),
        ({"prompt": "one " * 3000}, "the prompt has .* tokens, the model holds"),
        ({"max_new_tokens": 5000}, "5000 new tokens are asked for"),
    ],
)
def test_bad_lines_are_named_before_any_work(base, questions, tmp_path, line, message):
    path = write(questions.with_name("bad.jsonl"), [LINES[0], LINES[1] | line])
    with pytest.raises(ValueError, match=rf"bad\.jsonl:2: .*{message}"):
        from jax_instructblip.commands import generate

        generate.main(words(base, path, tmp_path / "answers.jsonl")[1:])
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--image", "a.jpg"], "--image: not used with --jsonl"),
        (["--num_beams", "2"], "num_beams is 2, but a slot has no beams"),
        (["--out", "answers.txt"], "expected another file than the questions, in .jsonl"),
    ],
)
def test_flags_that_do_not_fit_are_refused(base, questions, tmp_path, more, message, capsys):
    assert main(words(base, questions, tmp_path / "answers.jsonl", *more)) == 1
    assert message in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_two_runs_do_not_write_to_one_file(base, questions, whole, tmp_path, capsys):
    import fcntl

    out = tmp_path / "answers.jsonl"
    (tmp_path / "answers.partial").mkdir()
    lock = os.open(tmp_path / "answers.partial", os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        assert main(words(base, questions, out)) == 1
    finally:
        os.close(lock)
    assert "another process writes to" in capsys.readouterr().err

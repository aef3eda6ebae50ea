"""`evaluate --datasets`: held-out datasets, on one device, on processes, killed, compared."""

import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from jax_instructblip.commands import evaluate
from jax_instructblip.data.datasets import DATASETS
from jax_instructblip.data.prepare import shards
from jax_instructblip.evaluation import benchmarks
from jax_instructblip.evaluation.metrics import caption_scores
from jax_instructblip.evaluation.predictions import read_rows
from jax_instructblip.evaluation.protocol import BENCHMARKS, HELD_OUT
from tests.evaluation.test_suite import files
from tests.helpers.fake_pipeline import FakePipeline
from tests.helpers.raw_layouts import write_all
from tests.helpers.tiny import compile_cache, write_base
from tests.parallel.test_processes import LIMIT, ROOT, ended, start

ANSWERS = {"cook": 0, "man": 1, "a dog": 2, "two men": 3}
FEW = ("--limit", "4", "--batch_size", "4")
SHARED = ("gqa", "iconqa")  # answered by several processes: one is generated, one is ranked


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("evaluated") / "base", "t5")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """All held-out datasets, prepared."""
    folder = tmp_path_factory.mktemp("datasets")
    raws = write_all(folder / "raw", HELD_OUT)
    for name in ("msvd_qa", "msrvtt_qa"):
        (raws[name] / "qa_ans2label.json").write_text(json.dumps(ANSWERS))
    for name in HELD_OUT:
        shards.prepare(DATASETS[name], raws[name], folder / "data")
    return folder / "data"


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with compile_cache(tmp_path_factory.mktemp("compiled")):
        yield


def words(base, data, out, datasets, *more):
    given = {"checkpoint": base, "data": data, "out": out, "datasets": ",".join(datasets)}
    return [*(f"--{name}={value}" for name, value in given.items()), *more]


@pytest.mark.parametrize("model", ["fake", pytest.param("tiny", marks=pytest.mark.full)])
def test_every_held_out_dataset_from_folder_to_report(
    base, data, tmp_path, capsys, monkeypatch, model
):
    """The tiny model compiles a program for every shape, which takes a minute or two."""
    if model == "fake":
        monkeypatch.setattr(benchmarks, "load", lambda *args, **fields: FakePipeline())
    monkeypatch.setenv("PATH", "")  # without Java, whose scorers would take long to start
    code = evaluate.main(words(base, data, tmp_path, ["held_out"], *FEW))
    results = json.loads((tmp_path / "results.json").read_text())["datasets"]
    assert list(results) == list(HELD_OUT)
    captions = {"nocaps", "flickr30k"}
    try:
        caption_scores.score_captions([], [])
    except ValueError as error:
        tools = "not installed" not in str(error)
    for name, result in results.items():
        rows = read_rows(tmp_path / "predictions" / f"{name}.jsonl")
        assert len(rows) == result["count"] == (3 if name == "ivqa" else 4)
        assert not result["problems"], result["problems"]
        if name in captions and not tools:
            assert "pip install" in result["unscored"]
            continue
        assert result["value"] is not None and not result["unscored"], result
        assert all(row.score is not None and row.text for row in rows), rows
        ranked = BENCHMARKS[name].ranking
        assert all(bool(row.candidates) == ranked == bool(row.scores) for row in rows)
        if name in captions:
            assert result["left_out"] == dict.fromkeys(("meteor", "spice"), "it needs Java")
    assert code == int(not tools)
    said = capsys.readouterr().out
    page = (tmp_path / "report.html").read_text() + (tmp_path / "report.md").read_text()
    for name in HELD_OUT:
        assert f"{name}: " in said and page.count(f">{name}<") >= 2 and f"## {name}" in page
    assert "meteor is left out" in page or not tools
    assert "123.1" in page  # of Vicuna-7B on NoCaps, in the paper


@pytest.fixture(scope="module", params=["greedy", pytest.param("preset", marks=pytest.mark.full)])
def settings(request):
    """Beams take longer to compile."""
    return ("--batch_size", "2", *(("--num_beams", "1") if request.param == "greedy" else ()))


@pytest.fixture(scope="module")
def whole(base, data, tmp_path_factory, settings):
    """The files of one device, in a process of its own as all runs that are compared to the bit."""
    out = tmp_path_factory.mktemp("whole")
    alone(words(base, data, out, SHARED, *settings))
    return out


def alone(arguments):
    """The output of `evaluate` in one process on one device."""
    ((said, code),) = ended(start(1, 1, ["evaluate", *arguments]))
    assert code == 0, said
    return said


@pytest.mark.full
def test_two_processes_with_four_devices_each_write_the_same(base, data, whole, settings, tmp_path):
    arguments = ["evaluate", *words(base, data, tmp_path / "out", SHARED, *settings)]
    found = ended(start(2, 4, arguments))
    assert [code for _, code in found] == [0, 0], "\n".join(said for said, _ in found)
    assert "4 of 8 devices" in found[1][0]
    assert files(tmp_path / "out") == files(whole)


KILLED = """
    import os, signal, sys
    from jax_instructblip.__main__ import main
    from jax_instructblip.evaluation.predictions import Store

    append, calls = Store.append, []

    def torn(store, rows):
        if len(calls) == 2:
            with store._own.open("ab") as file:
                file.write(rows[0].line().encode()[:40])
            os.kill(os.getpid(), signal.SIGKILL)
        calls.append(append(store, rows))

    Store.append = torn
    main(sys.argv[1:])
"""


def test_a_killed_run_goes_on_and_writes_the_same(base, data, whole, settings, tmp_path):
    arguments = words(base, data, tmp_path / "out", SHARED, *settings)
    command = [sys.executable, "-c", textwrap.dedent(KILLED), "evaluate", *arguments]
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment, timeout=LIMIT, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert not (tmp_path / "out" / "results.json").exists()
    assert "gqa (testdev): 31 records, 16 answered already" in alone(arguments)
    assert files(tmp_path / "out") == files(whole)


@pytest.mark.full
def test_weights_split_over_two_processes_answer_the_same(base, data, whole, settings, tmp_path):
    more = (*settings, "--fsdp", "2", "--limit", "3")
    found = ended(start(2, 1, ["evaluate", *words(base, data, tmp_path / "out", SHARED, *more)]))
    assert [code for _, code in found] == [0, 0], "\n".join(said for said, _ in found)
    for name in SHARED:
        path = f"predictions/{name}.jsonl"
        expected = {row.id: row for row in read_rows(whole / path)}
        rows = read_rows(tmp_path / "out" / path)
        assert len(rows) == 3
        for row in rows:
            assert row.text == expected[row.id].text
            assert row.logprob == pytest.approx(expected[row.id].logprob, abs=1e-4)
            assert row.scores == pytest.approx(expected[row.id].scores, abs=1e-4)


def test_two_runs_are_compared(whole, tmp_path, capsys):
    folder = tmp_path / "predictions"
    folder.mkdir()
    lines = (whole / "predictions" / "iconqa.jsonl").read_text().splitlines(keepends=True)
    row = json.loads(lines[3])
    lines[3] = json.dumps(row | {"text": "another"}) + "\n"
    (folder / "iconqa.jsonl").write_text("".join(lines))
    assert evaluate.main(["--compare", str(whole), str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "iconqa: 1 of 15 samples differ" in said and "'another'" in said
    assert f"{row['id']}: " in said and repr(row["text"]) in said


def test_answers_made_elsewhere_are_scored(data, whole, tmp_path, capsys):
    given = f"--predictions={whole / 'predictions' / 'iconqa.jsonl'}"
    common = ["--datasets=iconqa", f"--data={data}", f"--out={tmp_path}"]
    assert evaluate.main([*common, given]) == 0
    ours, theirs = (
        json.loads((folder / "results.json").read_text())["datasets"]["iconqa"]["values"]
        for folder in (whole, tmp_path)
    )
    assert ours == theirs
    with pytest.raises(ValueError, match="none of the 31 records of gqa: it is of another dataset"):
        evaluate.main(["--datasets=gqa", *common[1:], given])


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"datasets": "gqu"}, "unknown dataset 'gqu'; did you mean gqa"),
        ({"data": "/nowhere"}, "1 datasets cannot be evaluated:\n  no records of gqa"),
        ({"fsdp": 3}, "does not use the 1 devices there are"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"split": "tset"}, "has no split 'tset'; its splits: testdev"),
        ({"length_normalise": None}, "--length_normalise: not used by gqa"),
        ({"relevance": ""}, "--relevance: not used by gqa"),
        ({"candidates": Path(__file__)}, "--candidates: not used by gqa"),
        ({"checkpoint": "/nowhere"}, "no checkpoint '/nowhere'"),
    ],
)
def test_mistakes_are_told(base, data, tmp_path, changed, message):
    given = {"checkpoint": base, "data": data, "out": tmp_path, "datasets": "gqa"} | changed
    if "relevance" in changed:
        (tmp_path / "judged.json").write_text('[{"image_id": 1, "round_id": 1, "relevance": [1]}]')
        given["relevance"] = tmp_path / "judged.json"
    with pytest.raises((ValueError, OSError), match=message):
        evaluate.main([f"--{n}={v}" if v is not None else f"--{n}" for n, v in given.items()])


def test_datasets_are_listed(capsys):
    assert evaluate.main(["--list"]) == 0
    said = capsys.readouterr().out
    assert "nocaps: val, generated, scored by cider" in said
    assert "with a LLaMA: num_beams 5, length_penalty 0.0" in said
    assert "instructblip-vicuna-7b 123.1" in said


@pytest.mark.parametrize("name", ["data", "out", "checkpoint"])
def test_what_is_needed_is_said(base, data, tmp_path, name):
    given = {"checkpoint": base, "data": data, "out": tmp_path, "datasets": "gqa"}
    del given[name]
    with pytest.raises(ValueError, match=f"--{name}.*needed"):
        evaluate.main([f"--{name}={value}" for name, value in given.items()])

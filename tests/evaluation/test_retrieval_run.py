"""`evaluate --datasets coco_retrieval,...` of a first stage: scores, files, going on, refusals."""

import dataclasses
import json
import signal
import subprocess
import sys

import numpy as np
import pytest

import jax_instructblip
from jax_instructblip.__main__ import main
from jax_instructblip.backbones.stage1 import write_stage1
from jax_instructblip.evaluation import retrieval_run
from jax_instructblip.evaluation.blip2_protocols import RETRIEVAL
from jax_instructblip.evaluation.gallery import Pictures, read_gallery
from jax_instructblip.evaluation.match_store import MatchStore
from jax_instructblip.evaluation.metrics.metric import MetricError
from jax_instructblip.evaluation.metrics.retrieval import recalls
from jax_instructblip.evaluation.predictions import read_rows
from jax_instructblip.evaluation.task import open_task
from jax_instructblip.inference.loading import read_source
from jax_instructblip.inference.retrieval import Retriever
from tests.helpers.interpreter import run_python
from tests.helpers.raw_layouts import write_all
from tests.helpers.tiny import compile_cache, write_base
from tests.parallel.test_processes import ROOT, ended, start

NAME = "flickr30k_retrieval"


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with compile_cache(tmp_path_factory.mktemp("compiled")):
        yield


@pytest.fixture(scope="module")
def stage1(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return write_stage1(write_base(folder / "base", "llama"), folder / "stage1", features=12)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_all(folder, ["flickr30k", "coco_caption", "gqa"])
    return folder


def words(stage1, data, out, *more, datasets=NAME):
    given = {"checkpoint": stage1, "data": data, "out": out, "datasets": datasets}
    return ["evaluate", *(f"--{name}={value}" for name, value in given.items()), *more]


@pytest.fixture(scope="module")
def whole(stage1, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole")
    assert main(words(stage1, data, out, "--k=3", "--batch_size=8")) == 0
    return out


def result_of(out, name=NAME):
    return json.loads((out / "results.json").read_text())["datasets"][name]


def assert_same_rows(out, whole):
    """Batches of other sizes round a score otherwise; all else is equal."""
    found, wanted = (read_rows(each / "predictions" / f"{NAME}.jsonl") for each in (out, whole))
    for row, one in zip(found, wanted, strict=True):
        assert dataclasses.replace(row, scores=()) == dataclasses.replace(one, scores=())
        assert row.scores == pytest.approx(one.scores, abs=1e-6)


def test_recalls_are_those_of_the_whole_matrix(stage1, data, whole):
    task = open_task(RETRIEVAL[NAME], data, "")
    gallery, blip = read_gallery(task), jax_instructblip.load(stage1)
    images = Pictures(task, blip.variant.vision.image_size)
    near = blip.itc(images, gallery.captions)
    ranking = blip.rank(images, gallery.captions, k=3)
    right = gallery.owner[None] == np.arange(len(images))[:, None]
    result = result_of(whole)
    assert (result["count"], result["captions"]) == right.shape == (7, 35)
    # Of what was not among three a tie decides in a matrix; here it counts as not found.
    for way, scores, truth in (
        ("image_to_text", ranking.image_to_text, right),
        ("text_to_image", ranking.text_to_image, right.T),
    ):
        assert result["values"][f"{way}/r1"] == pytest.approx(100 * recalls(scores, truth)["r1"])
        first = np.argsort(-scores, axis=1, kind="stable")[:, :3]
        found = np.take_along_axis(truth, first, axis=1).any(axis=1).mean()
        assert result["values"][f"{way}/r10"] == pytest.approx(100 * found)
    itc = recalls(near, right)["r1"], recalls(near.T, right.T)["r1"]
    of_itc = [result["values"][f"itc/{way}/r1"] for way in ("image_to_text", "text_to_image")]
    assert of_itc == pytest.approx([100 * each for each in itc])
    both = result["values"]["image_to_text/r1"] + result["values"]["text_to_image/r1"]
    assert result["values"]["recall"] == pytest.approx(both / 2)
    assert result["metric"] == "image_to_text/r1" and result["mode"] == "retrieved"


def test_predictions_name_the_best_of_each_query(whole):
    rows = read_rows(whole / "predictions" / f"{NAME}.jsonl")
    assert len(rows) == 7 + 35 and rows[0].task == "image_to_text" and rows[7].id.endswith(":0")
    assert all(len(row.candidates) == len(row.scores) == 3 for row in rows)
    assert all(list(row.scores) == sorted(row.scores, reverse=True) for row in rows)
    for row in rows[7:]:
        assert row.text == row.candidates[0] and row.prompt.startswith("A dog runs")
        assert row.score == float(row.text == row.answers[0]) == float(row.id.startswith(row.text))
    for row in rows[:7]:
        assert row.score == float(row.text in row.answers)


def test_the_report_has_the_papers_numbers_and_every_query(whole):
    page, text = ((whole / name).read_text() for name in ("report.html", "report.md"))
    assert "BLIP-2 ViT-g, COCO" in text and "97.6" in text
    assert "itc/text_to_image/r10" in text and "8 pairs a device" in text
    assert "A dog runs" in page and "prompt: ''" not in text


def test_the_papers_numbers_stand_beside_each(stage1, data, tmp_path, monkeypatch):
    monkeypatch.setattr(retrieval_run, "paper_model", lambda variant: "blip2-stage1-coco")
    assert main(words(stage1, data, tmp_path, "--limit=3")) == 0
    result = result_of(tmp_path)
    assert result["gap"] == pytest.approx(result["value"] - 97.6)
    report = (tmp_path / "report.md").read_text()
    assert "| metric | value | standard error | paper |" in report
    assert "98.90 |" in report  # text_to_image/r10


def test_the_match_alone_and_other_k_are_other_results(stage1, data, whole, tmp_path, capsys):
    assert main(words(stage1, data, tmp_path, "--k=3", "--itm_only", "--batch_size=8")) == 0
    assert "the match alone" in capsys.readouterr().out
    assert result_of(tmp_path)["settings"] == {"k": 3, "itm_only": True}
    first, second = (read_rows(out / "predictions" / f"{NAME}.jsonl") for out in (whole, tmp_path))
    assert [row.scores for row in first] != [row.scores for row in second]
    assert main(words(stage1, data, whole, "--k=4", "--batch_size=8")) == 1
    assert "holds answers to something else" in capsys.readouterr().err


def test_a_finished_one_is_not_compared_again(stage1, data, whole, monkeypatch):
    before = result_of(whole)
    monkeypatch.setattr(Retriever, "similarities", lambda *each: pytest.fail("compared again"))
    assert main(words(stage1, data, whole, "--k=3", "--batch_size=8")) == 0
    assert result_of(whole) == before


def test_a_killed_run_goes_on_where_it_stopped(stage1, data, whole, tmp_path, monkeypatch):
    monkeypatch.setattr("jax_instructblip.evaluation.match_store.KEPT_PAIRS", 1)
    add, run, matched = MatchStore.add, Retriever.match, []

    def fail(store, number, columns, logits):
        add(store, number, columns, logits)
        if number == 2:
            raise OSError("the disk is full")

    arguments = words(stage1, data, tmp_path, "--k=3", "--batch_size=8")
    with monkeypatch.context() as patch:
        patch.setattr(MatchStore, "add", fail)
        assert main(arguments) == 1
    kept = sorted((tmp_path / "predictions" / f"{NAME}.partial").glob("*.npz"))
    assert len(kept) == 3
    kept[0].write_bytes(kept[0].read_bytes()[:100])  # cut off
    assert not (tmp_path / "results.json").exists()

    def spy(blip, *each, numbers, **more):
        matched.extend(numbers)
        return run(blip, *each, numbers=numbers, **more)

    monkeypatch.setattr(Retriever, "match", spy)
    assert main(arguments) == 0
    assert matched == [0, 3, 4, 5, 6]
    name = f"predictions/{NAME}.jsonl"
    assert (tmp_path / name).read_bytes() == (whole / name).read_bytes()
    assert not list((tmp_path / "predictions").glob("*.partial"))


@pytest.mark.full
def test_several_devices_find_the_same(stage1, data, whole, tmp_path):
    arguments = words(stage1, data, tmp_path, "--k=3", "--batch_size=8", "--fsdp=2")
    code = f"from jax_instructblip.__main__ import main\nassert main({arguments!r}) == 0"
    run_python(code, devices=4)
    assert result_of(tmp_path)["values"] == pytest.approx(result_of(whole)["values"])


def test_two_processes_share_features_and_pairs(stage1, data, whole, tmp_path):
    arguments = words(stage1, data, tmp_path, "--k=3", "--batch_size=8")
    found = ended(start(2, 1, arguments))
    assert [code for _, code in found] == [0, 0], "\n".join(said for said, _ in found)
    assert_same_rows(tmp_path, whole)


def test_each_process_computes_the_features_of_its_part(stage1, data, monkeypatch):
    task = open_task(RETRIEVAL[NAME], data, "")
    gallery, blip = read_gallery(task), Retriever.of(read_source(stage1), "float32")
    whole, opened, parts = retrieval_run._similarities(blip, task, gallery), [], []
    of_one = Pictures._open
    monkeypatch.setattr(Pictures, "_open", lambda *each: opened.append(each[1]) or of_one(*each))
    monkeypatch.setattr(retrieval_run, "gather_rows", lambda rows, _: parts.append(rows) or rows)
    monkeypatch.setattr(retrieval_run.suite, "agree", lambda problem: None)
    monkeypatch.setattr("jax.process_count", lambda: 2)
    for process in (0, 1):
        monkeypatch.setattr("jax.process_index", lambda process=process: process)
        retrieval_run._similarities(blip, task, gallery)
    assert sorted(opened) == [0, 1, 2, 3, 4, 5, 6, 6]
    assert [len(part) for part in parts] == [4, 18, 4, 18]  # of 7 images and 35 captions
    images, texts = (np.concatenate(parts[place::2])[:count] for place, count in ((0, 7), (1, 35)))
    np.testing.assert_allclose(blip.similarities(images, texts), whole, rtol=0, atol=1e-6)


KILLED = """
import os, pathlib, signal, sys
from jax_instructblip.__main__ import main
from jax_instructblip.evaluation import match_store

match_store.KEPT_PAIRS = 1  # each image's logits are a file
left, replace = int(sys.argv[1]), pathlib.Path.replace

def strike(path, target):
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
    return replace(path, target)

pathlib.Path.replace = strike
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.full
def test_kills_before_any_file_appears_leave_nothing_behind(stage1, data, whole, tmp_path):
    arguments = words(stage1, data, tmp_path, "--k=3", "--batch_size=8")
    # Two files are written anew by each run; what is there in the end took several.
    for count in range(4, 20):
        run = subprocess.run([sys.executable, "-c", KILLED, str(count), *arguments], cwd=ROOT)
        if run.returncode == 0:
            break
        assert run.returncode == -signal.SIGKILL
    assert 6 < count < 19
    assert_same_rows(tmp_path, whole)
    assert result_of(tmp_path)["values"] == result_of(whole)["values"]
    both = ({str(path.relative_to(out)) for path in out.rglob("*")} for out in (tmp_path, whole))
    assert next(both) == next(both)


@pytest.mark.parametrize("datasets", ["coco_retrieval", "flickr30k_retrieval"])
def test_karpathys_test_split_of_either(stage1, data, tmp_path, datasets):
    assert main(words(stage1, data, tmp_path, "--limit=2", datasets=datasets)) == 0
    assert result_of(tmp_path, datasets)["split"] == "test"


def test_lavis_files_are_read_as_well(stage1, data, tmp_path):
    rows = [
        {"image": f"flickr30k-images/{1007129816 + n}.jpg", "caption": [f"dog {n}", f"it {n}"]}
        for n in range(3)
    ]
    folder = tmp_path / "flickr30k"
    folder.mkdir()
    (folder / "flickr30k_test.json").write_text(json.dumps(rows))
    (folder / "flickr30k-images").symlink_to(data / "flickr30k" / "flickr30k-images")
    assert main(words(stage1, tmp_path, tmp_path / "out")) == 0
    assert result_of(tmp_path / "out")["captions"] == 6


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--datasets=gqa",), "gqa asks about images, and the checkpoint is a first stage of"),
        (("--num_beams=2",), "--num_beams: not used by flickr30k_retrieval"),
        (("--k=0",), "k is 0, expected at least 1"),
        (("--datasets=flickr30k_retrievel",), "did you mean flickr30k_retrieval"),
    ],
)
def test_what_does_not_belong_to_a_retrieval_is_refused(
    stage1, data, tmp_path, capsys, more, message
):
    assert main(words(stage1, data, tmp_path / "out", *more)) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_model_that_answers_is_refused_by_name(data, stage1, tmp_path, capsys):
    base = stage1.parent / "base"
    assert main(words(base, data, tmp_path)) == 1
    error = capsys.readouterr().err
    assert f"{NAME} compares images with captions" in error and "kind instructblip" in error
    assert "give a first stage of BLIP-2" in error
    assert main(words(base, data, tmp_path, "--k=3", datasets="gqa")) == 1
    assert "--k: not used by gqa" in capsys.readouterr().err
    answers = tmp_path / "answers.jsonl"
    answers.write_text('{"id": "1", "text": "a"}\n')
    given = [f"--predictions={answers}", f"--data={data}", f"--out={tmp_path}"]
    assert main(["evaluate", f"--datasets={NAME}", *given]) == 1
    assert "is scored from the similarities of all pairs" in capsys.readouterr().err


def test_records_that_cannot_be_compared_are_named(data):
    task = open_task(RETRIEVAL[NAME], data, "")
    records = [dataclasses.replace(task.records[0], answers=()), task.records[1]]
    with pytest.raises(MetricError, match="1 images have no caption: '1007129816'"):
        read_gallery(dataclasses.replace(task, records=records))
    records = [dataclasses.replace(task.records[0], images=("no.jpg",))]
    task = dataclasses.replace(task, records=records)
    with pytest.raises(ValueError, match="the image of 1007129816 cannot be used"):
        Pictures(task, 28)[0]

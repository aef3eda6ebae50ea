import dataclasses
import json

import pytest

from jax_instructblip.data.datasets import DATASETS
from jax_instructblip.data.input_format import InputFormat
from jax_instructblip.data.prepare import shards
from jax_instructblip.data.templates import TextStyle
from jax_instructblip.evaluation.metrics.metric import MetricError
from jax_instructblip.evaluation.protocol import BENCHMARKS
from jax_instructblip.evaluation.task import VIDEO_FRAMES, check_choices, open_task
from tests.helpers.fake_pipeline import make_task, record
from tests.helpers.raw_layouts import LAYOUTS, write_all

LABELS = {"cook": 1, "man": 0}


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    folder = tmp_path_factory.mktemp("raw")
    write_all(folder, ["gqa", "msvd_qa", "iconqa"])
    return folder


def test_a_prepared_folder_and_the_files_it_was_made_of_are_asked_alike(raw, tmp_path):
    folder = shards.prepare(DATASETS["gqa"], raw / "gqa", tmp_path)
    places = [tmp_path, tmp_path / "gqa", folder, raw, raw / "gqa"]
    tasks = [open_task(BENCHMARKS["gqa"], place, "t5") for place in places]
    assert len({task.digest for task in tasks}) == 2  # of files as downloaded there is none
    for task in tasks:
        records = [task.without_images(number) for number in range(len(task.records))]
        assert len(records) == LAYOUTS["gqa"].count
        assert task.prompt(records[0]) == "Question: What kind of furniture is brown? Short answer:"
        assert records == [tasks[0].without_images(number) for number in range(len(records))]
        assert task.settings["num_beams"] == 5 and task.split == "testdev"


def test_what_is_scored_by_ranks_is_not_generated(tmp_path):
    write_all(tmp_path, ["visual_dialog", "hateful_memes"])
    generated = {"ranking": False}
    for name, metric in (("visual_dialog", "mrr"), ("hateful_memes", "auroc")):
        with pytest.raises(ValueError, match=f"{name} is scored by {metric}, .*--mode generate"):
            open_task(BENCHMARKS[name], tmp_path, "t5", overrides=generated)
        assert open_task(BENCHMARKS[name], tmp_path, "t5").protocol.ranking
    bare = make_task("visual_dialog", [dataclasses.replace(record(0), choices=())])
    with pytest.raises(MetricError, match="have no candidates") as error:
        check_choices(bare, bare.records)
    assert "generate" not in str(error.value)


def test_a_limit_takes_the_same_records_every_time(raw):
    some = open_task(BENCHMARKS["gqa"], raw, "t5", limit=5)
    again = open_task(BENCHMARKS["gqa"], raw, "t5", limit=5)
    ids = [some.without_images(number).id for number in range(len(some.records))]
    assert len(ids) == 5 and ids == sorted(ids)
    assert ids == [again.without_images(number).id for number in range(5)]


def test_videos_are_ranked_over_the_candidates_that_were_found(raw, tmp_path):
    with pytest.raises(ValueError, match="msvd_qa is ranked over one list.*put\nqa_ans2label|qa_"):
        open_task(BENCHMARKS["msvd_qa"], raw, "t5")
    given = open_task(BENCHMARKS["msvd_qa"], raw, "t5", candidates=("a", "b"))
    assert given.choices(given.without_images(0)) == ("a", "b")
    assert open_task(BENCHMARKS["msvd_qa"], raw, "t5", overrides={"ranking": False}).settings
    (raw / "msvd_qa" / "qa_ans2label.json").write_text(json.dumps(LABELS))
    shards.prepare(DATASETS["msvd_qa"], raw / "msvd_qa", tmp_path)
    for place in (raw, tmp_path):
        task = open_task(BENCHMARKS["msvd_qa"], place, "t5")
        assert task.candidates == ("man", "cook")
        assert task.facts()["candidates"]["count"] == 2
        assert len(task.without_images(0).images) == len(task.with_images(0).images) == VIDEO_FRAMES


def test_what_is_overridden_is_what_is_asked(raw):
    fields = {"prompt": "{question}?", "num_beams": 1, "length_normalise": True}
    task = open_task(BENCHMARKS["gqa"], raw, "llama", overrides=fields)
    facts = task.facts()
    assert facts["prompt"] == "{question}?" and task.prompt(task.without_images(1)).endswith(
        "chair??"
    )
    assert facts["settings"]["num_beams"] == 1 and "length_normalise" not in facts["settings"]
    assert facts["settings"]["length_penalty"] == 0.0  # of the preset, with a LLaMA
    ranked = open_task(BENCHMARKS["iconqa"], raw, "llama", overrides=fields)
    assert ranked.settings == {"length_normalise": True}


def test_how_records_are_shown_is_what_is_asked_and_noted_where_it_is_not_usual():
    task = make_task("gqa", [record(1)])
    assert not {"style", "crop", "exif"} & task.facts().keys()
    shown = dataclasses.replace(task, style=TextStyle("lavis", "q_a"), crop="center", upright=False)
    facts = shown.facts()
    assert facts["style"] == {"processor": "lavis", "dialogue": "q_a"}
    assert facts["crop"] == "center" and facts["exif"] == "ignored"
    usual = task.for_input_format(InputFormat())
    assert usual.crop == "squash" and usual.facts() == task.facts()
    padded = InputFormat("v1", image_crop="pad")
    assert shown.for_input_format(padded).facts() == {**facts, "chat": padded.to_dict()}
    assert task.for_input_format(padded).crop == "pad"
    told = record(1, prompt='Is "IT" so?')
    assert shown.prompt(told) == "is it so?" and task.prompt(told) == 'Is "IT" so?'


def test_what_is_not_there_is_said(raw, tmp_path):
    with pytest.raises(ValueError, match=r"no records of vsr \(test\) in .*: found gqa, iconqa"):
        open_task(BENCHMARKS["vsr"], raw, "t5")
    shards.prepare(DATASETS["gqa"], raw / "gqa", tmp_path)
    with pytest.raises(ValueError, match="has no split 'val'; its splits: testdev"):
        open_task(BENCHMARKS["gqa"], tmp_path, "t5", split="val")


def test_a_ranking_needs_candidates():
    task = make_task("iconqa", [])
    records = [record(1, choices=("a", "b"), correct=0), record(2), record(3)]
    check_choices(task, records[:1])
    with pytest.raises(MetricError, match="iconqa is ranked, but 2 records have no .*'r2', 'r3'"):
        check_choices(task, records)
    check_choices(make_task("iconqa", [], ranking=False), records)

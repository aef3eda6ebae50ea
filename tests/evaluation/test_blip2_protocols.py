"""Protocols by the kind of the checkpoint: BLIP-2's prompts, settings and published numbers."""

import json

import pytest

from jax_instructblip.commands import evaluate
from jax_instructblip.data.datasets import DATASETS
from jax_instructblip.evaluation import benchmarks
from jax_instructblip.evaluation.blip2_protocols import RETRIEVAL
from jax_instructblip.evaluation.by_kind import (
    BY_KIND,
    INSTRUCTBLIP,
    NAMES,
    full_table,
    get_benchmark,
)
from jax_instructblip.evaluation.protocol import BENCHMARKS, HELD_OUT, SHORT, paper_model
from jax_instructblip.models.released import VARIANTS
from tests.helpers.fake_pipeline import FakePipeline
from tests.helpers.raw_layouts import write_all
from tests.helpers.tiny import write_base

SECOND_STAGE = BY_KIND["blip2"]
SHORT_ANSWER = "Question: {question} Short answer:"


@pytest.mark.parametrize("name", ["vqav2", "okvqa", "gqa"])
def test_questions_are_asked_as_the_paper_asks_each_language_model(name):
    row = get_benchmark(name, "blip2")
    asked = {llm: row.override({}, llm) for llm in ("t5", "llama", "opt")}
    assert asked["opt"].prompt == "Question: {question} Answer:"
    assert asked["t5"].prompt == asked["llama"].prompt == SHORT_ANSWER
    for protocol in asked.values():
        settings = protocol.settings()
        assert (settings["num_beams"], settings["length_penalty"]) == (5, -1.0)
        assert (settings["repetition_penalty"], settings["max_new_tokens"]) == (1.0, 10)
    own = row.override({"prompt": "{question}?"}, "opt")
    assert own.prompt == "{question}?"


@pytest.mark.parametrize("name", ["nocaps", "coco_caption", "flickr30k"])
def test_captions_are_asked_for_as_a_photo(name):
    settings = get_benchmark(name, "blip2").settings("t5")
    assert get_benchmark(name, "blip2").prompt == "a photo of"
    assert (settings["max_new_tokens"], settings["min_new_tokens"]) == (30, 7)
    assert settings["repetition_penalty"] == 1.0


def test_instructblip_is_asked_as_before():
    assert all(get_benchmark(name) is BENCHMARKS[name] for name in BENCHMARKS)
    assert list(SECOND_STAGE) == list(INSTRUCTBLIP)
    vsr = SECOND_STAGE["vsr"]  # what BLIP-2's paper does not ask stays
    assert (vsr.prompt, vsr.decoding) == (BENCHMARKS["vsr"].prompt, BENCHMARKS["vsr"].decoding)


def test_published_numbers_are_those_of_the_papers():
    paper = {name: row.paper for name, row in SECOND_STAGE.items()}
    assert paper["vqav2"]["blip2-opt-6.7b"] == 54.3 and paper["okvqa"]["blip2-flan-t5-xxl"] == 45.9
    assert paper["gqa"]["blip2-flan-t5-xl"] == 44.2 and paper["gqa"]["blip2-vicuna-7b"] == 38.6
    assert paper["nocaps"]["blip2-flan-t5-xl"] == 104.5
    assert paper["nocaps"]["blip2-flan-t5-xl-coco"] == 121.6
    assert paper["ivqa"]["blip2-vicuna-13b"] == 23.5
    assert SECOND_STAGE["nocaps"].paper_values["blip2-opt-2.7b-coco"]["cider/out-domain"] == 123.4
    assert RETRIEVAL["coco_retrieval"].paper_values["blip2-stage1-coco"]["text_to_image/r5"] == 87.7
    assert RETRIEVAL["flickr30k_retrieval"].paper == {"blip2-stage1-coco": 97.6}
    for name in HELD_OUT:
        four = [model for model in paper[name] if model in VARIANTS and "opt" not in model]
        assert len([model for model in four if not model.endswith(("coco", "vit-l"))]) == 4
    rows = [*SECOND_STAGE.values(), *RETRIEVAL.values(), *INSTRUCTBLIP.values()]
    named = {model for row in rows for model in (*row.paper, *row.paper_values)}
    assert named == set(SHORT) <= set(VARIANTS)
    assert all(paper_model(VARIANTS[name]) == name for name in SHORT)


@pytest.mark.parametrize("name", RETRIEVAL)
def test_a_retrieval_reranks_128_of_a_test_split(name):
    row = get_benchmark(name, "blip2_stage1")
    assert row.settings("") == {"k": 128, "itm_only": False} and row.mode == "retrieved"
    assert row.split in DATASETS[row.dataset].files and name in NAMES
    changed = row.override({"k": 7, "itm_only": True, "num_beams": 3}, "")
    assert changed.settings() == {"k": 7, "itm_only": True}


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("coco_retrieval", "blip2", "compares images with captions, and the checkpoint is of kind"),
        ("gqa", "blip2_stage1", "gqa asks about images, and the checkpoint is a first stage"),
        ("gqq", "blip2", "unknown dataset 'gqq'; did you mean gqa"),
    ],
)
def test_a_benchmark_of_another_kind_is_refused(name, kind, message):
    with pytest.raises(ValueError, match=message):
        get_benchmark(name, kind)


def test_the_list_has_the_protocols_of_each_kind():
    text = full_table()
    first, second = (text.index(f"of a {stage} stage of BLIP-2") for stage in ("first", "second"))
    assert "coco_retrieval: test, retrieved" in text[first:second]
    assert "  settings: k 128, itm_only False" in text[first:second]
    assert "  prompt: 'a photo of'" in text[second:]
    assert "  of opt: 'Question: {question} Answer:'" in text[second:]


def test_a_checkpoint_of_blip2_is_asked_so(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmarks, "load", lambda *args, **fields: FakePipeline("opt"))
    base = write_base(tmp_path / "base", "opt")
    write_all(tmp_path / "raw", ["gqa", "nocaps"])
    given = {"checkpoint": base, "data": tmp_path / "raw", "out": tmp_path / "out"}
    words = [f"--{name}={value}" for name, value in given.items()]
    evaluate.main([*words, "--datasets=gqa,nocaps", "--limit=4"])
    results = json.loads((tmp_path / "out" / "results.json").read_text())["datasets"]
    assert results["gqa"]["prompt"] == "Question: {question} Answer:"
    assert results["nocaps"]["prompt"] == "a photo of"
    assert results["gqa"]["settings"]["length_penalty"] == -1.0
    assert "blip2-flan-t5-xl" in results["gqa"]["paper"]
    report = (tmp_path / "out" / "report.md").read_text()
    assert "BLIP-2 OPT-2.7B" in report and "| Vicuna-7B |" not in report

import inspect

import pytest

from jax_instructblip.data.datasets import DATASETS
from jax_instructblip.data.templates import placeholders
from jax_instructblip.evaluation.by_kind import get_benchmark
from jax_instructblip.evaluation.metrics.table import METRICS
from jax_instructblip.evaluation.protocol import (
    BENCHMARKS,
    HELD_OUT,
    MODELS,
    PROTOCOLS,
    get_protocol,
    paper_model,
    table,
)
from jax_instructblip.inference.generation_config import GenerationConfig
from jax_instructblip.inference.pipeline import InstructBlipPipeline
from jax_instructblip.models.released import VARIANTS

EVERY_DAY = ("caption", "vqa_short", "describe", "rank")


def test_every_dataset_has_a_protocol_and_there_are_general_ones():
    assert list(PROTOCOLS) == [*EVERY_DAY, *DATASETS, "aokvqa_choices"]
    assert all(row.name == name for name, row in PROTOCOLS.items())


def test_every_benchmark_has_a_dataset_a_metric_and_a_split_that_there_is():
    assert set(BENCHMARKS) == {*DATASETS, "aokvqa_choices"}
    for row in BENCHMARKS.values():
        files = DATASETS[row.dataset].files
        assert row.split in files if row.metric else not row.split
        assert row.metric in {*METRICS, ""}


def test_the_paper_has_numbers_of_what_is_held_out():
    assert set(HELD_OUT) == {name for name, dataset in DATASETS.items() if not dataset.held_in}
    assert all(list(BENCHMARKS[name].paper) == list(MODELS) for name in HELD_OUT)
    assert BENCHMARKS["nocaps"].paper["instructblip-vicuna-7b"] == 123.1
    assert BENCHMARKS["ivqa"].paper["instructblip-flan-t5-xl"] == 53.1
    assert BENCHMARKS["scienceqa"].paper["instructblip-vicuna-13b"] == 63.1


@pytest.mark.parametrize(
    ("name", "llm", "expected"),
    [
        ("nocaps", "t5", (5, 1.0, 1.15, 80, 9)),
        ("nocaps", "llama", (5, 1.0, 1.15, 79, 9)),
        ("gqa", "t5", (5, -1.0, 1.5, 10, 0)),
        ("gqa", "llama", (5, 0.0, 1.5, 9, 0)),
        ("describe", "t5", (5, 1.0, 1.5, 256, 0)),
        ("describe", "llama", (5, 1.0, 1.5, 255, 0)),
    ],
)
def test_settings_are_those_that_reach_the_released_model(name, llm, expected):
    beams, length, repetition, most, least = expected
    assert get_protocol(name).settings(llm) == {
        **{"num_beams": beams, "length_penalty": length, "repetition_penalty": repetition},
        **{"max_new_tokens": most, "min_new_tokens": least, "length_rule": "released"},
    }


@pytest.mark.parametrize("name", ["rank", "scienceqa", "visual_dialog", "msvd_qa"])
def test_rankings_take_no_settings_of_generation(name):
    assert get_protocol(name).settings("llama") == {"length_normalise": False}


@pytest.mark.parametrize("name", PROTOCOLS)
@pytest.mark.parametrize("llm", ["t5", "llama"])
def test_the_pipeline_takes_them(name, llm):
    row = get_protocol(name)
    settings = row.settings(llm)
    if row.ranking:
        assert settings.keys() <= inspect.signature(InstructBlipPipeline.rank).parameters.keys()
    else:
        assert GenerationConfig.of(**settings) == row.config(llm)
    assert placeholders(row.prompt) <= {
        *("question", "answer", "options", "context", "ocr", "history")
    }


def test_what_is_overridden_counts_for_either_model():
    row = get_protocol("gqa").override({"num_beams": 1, "prompt": "{question}?"}, "llama")
    assert row.prompt == "{question}?" and row.settings("t5") == row.settings("llama")
    assert (row.settings()["num_beams"], row.settings()["max_new_tokens"]) == (1, 9)
    assert get_protocol("iconqa").override({"ranking": False}).settings()["num_beams"] == 5
    with pytest.raises(ValueError, match="num_beams is 0"):
        row.override({"num_beams": 0})


def test_words_stand_for_the_choices_of_the_records():
    words = get_protocol("hateful_memes").words
    assert [group[0] for group in words] == ["yes", "no"]
    assert len({word for group in words for word in group}) == 4


def test_the_table_has_them_all():
    lines = table().splitlines()
    assert [line.partition(":")[0] for line in lines if line[0] != " "] == list(PROTOCOLS)
    assert "  prompt: 'Question: {question} Short answer:'" in lines
    assert "  ranked: yes or true; no or false" in lines
    assert "  settings: length_normalise False" in lines


@pytest.mark.parametrize("name", MODELS)
def test_the_papers_models_are_known_by_their_sizes(name):
    assert paper_model(VARIANTS[name]) == name
    assert paper_model(VARIANTS[name].replace(**{"qformer.dropout": 0.0})) == name
    assert paper_model(VARIANTS[name].replace(**{"qformer.instruction_aware": False})) == ""


def test_another_model_is_none_of_them():
    assert paper_model(VARIANTS["tiny-t5"]) == ""


def test_the_nearest_names_are_suggested():
    with pytest.raises(ValueError, match="unknown dataset 'nocap'; did you mean nocaps"):
        get_benchmark("nocap")
    with pytest.raises(ValueError, match="unknown protocol 'captoin'; did you mean caption"):
        get_protocol("captoin")

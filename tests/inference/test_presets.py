import dataclasses
import inspect

import pytest

from jax_instructblip.data.datasets import DATASETS
from jax_instructblip.data.templates import placeholders
from jax_instructblip.inference.generation_config import GenerationConfig
from jax_instructblip.inference.pipeline import InstructBlipPipeline
from jax_instructblip.inference.presets import PRESETS, get_preset, table

EVERY_DAY = ("caption", "vqa_short", "describe", "rank")


def test_there_is_one_for_every_dataset_and_for_every_day():
    assert list(PRESETS) == [*EVERY_DAY, *DATASETS, "aokvqa_choices"]
    assert all(preset.name == name for name, preset in PRESETS.items())


@pytest.mark.parametrize("name", DATASETS)
def test_datasets_are_asked_and_answered_as_their_table_says(name):
    assert get_preset(name).prompt == DATASETS[name].prompt
    assert get_preset(name).ranking == DATASETS[name].ranking


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
    assert get_preset(name).settings(llm) == {
        **{"num_beams": beams, "length_penalty": length, "repetition_penalty": repetition},
        **{"max_new_tokens": most, "min_new_tokens": least, "length_rule": "released"},
    }


@pytest.mark.parametrize("name", ["rank", "scienceqa", "visual_dialog", "msvd_qa"])
def test_rankings_take_no_settings_of_generation(name):
    assert get_preset(name).settings("llama") == {"length_normalise": False}


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("llm", ["t5", "llama"])
def test_the_pipeline_takes_them(name, llm):
    preset = get_preset(name)
    settings = preset.settings(llm)
    if preset.ranking:
        assert settings.keys() <= inspect.signature(InstructBlipPipeline.rank).parameters.keys()
    else:
        assert dataclasses.asdict(GenerationConfig.of(**settings)).items() >= settings.items()
    assert bool(preset.dataset) != bool(preset.template)
    assert placeholders(preset.prompt) <= {
        *("question", "answer", "options", "context", "ocr", "history")
    }


def test_words_stand_for_the_choices_of_the_records():
    words = get_preset("hateful_memes").words
    assert [group[0] for group in words] == ["yes", "no"]
    assert len({word for group in words for word in group}) == 4


def test_the_nearest_names_are_suggested():
    with pytest.raises(ValueError, match="unknown preset 'captoin'; did you mean caption"):
        get_preset("captoin")
    with pytest.raises(ValueError, match="unknown preset '#'; known: caption, vqa_short, "):
        get_preset("#")


def test_the_table_has_them_all():
    lines = table().splitlines()
    assert [line.partition(":")[0] for line in lines if not line.startswith(" ")] == list(PRESETS)
    assert "  prompt: 'Question: {question} Short answer:'" in lines
    assert "  with a LLaMA: length_penalty 0.0, max_new_tokens 9" in lines
    assert "  ranked: yes or true; no or false" in lines
    assert "  settings: length_normalise False" in lines

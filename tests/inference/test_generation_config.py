import argparse
import dataclasses
import json

import numpy as np
import pytest

from jax_instructblip.inference.generation_config import (
    FIELDS,
    HELP,
    NAMES,
    GenerationConfig,
    add_flags,
    read_flags,
)
from jax_instructblip.inference.sampling import TracedSettings

WHOLE = ("max_new_tokens", "min_new_tokens", "num_beams", "num_return_sequences", "top_k", "seed")
NUMBERS = ("length_penalty", "repetition_penalty", "temperature", "top_p")


def test_the_default_is_greedy():
    config = GenerationConfig()
    assert not config.sample and config.num_beams == 1 and config.max_new_tokens == 30
    assert config.changed() == {}
    assert [float(each) for each in TracedSettings.of(config)] == [0, 1, 0, 1, 0, 1, 1]


def test_every_setting_has_a_type_and_a_flag():
    assert set(FIELDS) == {*WHOLE, *NUMBERS, "length_rule"}
    assert set(NAMES) - set(FIELDS) == {"do_sample", "early_stopping"}
    assert set(NAMES) - set(HELP) == {"early_stopping"}


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("value", [2.5, 2.0, "2", True, float("nan"), [2], 2**31 + 2**32, -1])
def test_whole_numbers_are_demanded(name, value):
    with pytest.raises(ValueError, match=f"{name} is .*, expected "):
        GenerationConfig.of(**{name: value})


@pytest.mark.parametrize("name", [each for each in WHOLE if not FIELDS[each].optional])
def test_none_is_no_number(name):
    with pytest.raises(ValueError, match=f"{name} is None, expected a whole number"):
        GenerationConfig.of(**{name: None})


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), -1e30, 1e30, 10**400, "1", True, 1j, np.ones(2)]
)
def test_numbers_are_finite_and_in_their_range(name, value):
    with pytest.raises(ValueError, match=f"{name} is .*, expected "):
        GenerationConfig.of(**{name: value})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seed": 2**32}, "seed is 4294967296, expected at least 0 and at most 4,294,967,295"),
        ({"num_beams": 1_000_000}, "num_beams is 1000000, expected at least 1 and at most 1,024"),
        ({"top_p": 0.0}, "top_p is 0.0, expected above 0.0 and at most 1.0"),
        ({"do_sample": 1}, "do_sample is 1, expected True, False or None"),
        ({"do_sample": False, "top_k": 3}, "do_sample is False, but top_k would draw tokens"),
        ({"do_sample": True, "num_beams": 2}, "a beam search does not draw: leave out do_sample"),
        ({"early_stopping": 1}, "early_stopping is 1, expected one of"),
        ({"num_return_sequences": 3, "top_k": 5}, "to draw several answers ask as often"),
        ({"num_return_sequences": 3, "num_beams": 2}, r"1 to num_beams \(2\); raise num_beams"),
        ({"min_new_tokens": 5, "max_new_tokens": 4}, r"expected 0 to max_new_tokens \(4\)"),
        (
            {"length_rule": 5},
            r"length_rule is 5, expected one of released, .*4\.26, transformers5",
        ),
        ({"max_length": 3}, "unknown setting 'max_length': it is max_new_tokens, which does not"),
        ({"min_length": 3}, "unknown setting 'min_length': it is min_new_tokens"),
        ({"num_beam": 3}, "unknown setting 'num_beam'; did you mean 'num_beams'"),
        ({"eos_token_id": 3}, "unknown setting 'eos_token_id'; known: max_new_tokens, "),
    ],
)
def test_what_cannot_be_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        GenerationConfig.of(**settings)


def test_all_faults_are_told_at_once():
    with pytest.raises(ValueError) as error:
        GenerationConfig.of(top_k=2.5, seed=-1, max_length=3, length_penalty=float("nan"), n=2)
    for part in ("top_k is 2.5", "seed is -1", "'max_length'", "length_penalty is nan", "'n'"):
        assert part in str(error.value)


def test_drawing_is_asked_for_by_name_or_by_what_shapes_it():
    for settings in ({"do_sample": True}, {"temperature": 0.5}, {"top_k": 1}, {"top_p": 1.0}):
        assert GenerationConfig.of(**settings).sample
    assert not GenerationConfig(do_sample=False).sample
    drawn = TracedSettings.of(GenerationConfig(temperature=0.5, top_k=3, top_p=0.25))
    assert [float(each) for each in drawn[3:]] == [0.5, 3, 0.25, 0]


def test_numbers_of_numpy_become_plain_ones():
    config = GenerationConfig(
        max_new_tokens=np.int64(4), temperature=np.float32(0.5), do_sample=np.bool_(True)
    )
    assert json.loads(json.dumps(dataclasses.asdict(config)))["max_new_tokens"] == 4
    assert config == GenerationConfig(max_new_tokens=4, temperature=0.5, do_sample=True)
    assert config.changed() == {"max_new_tokens": 4, "temperature": 0.5, "do_sample": True}


def test_flags_give_what_they_are_called():
    parser = argparse.ArgumentParser()
    add_flags(parser)
    assert read_flags(parser.parse_args([])) == GenerationConfig()
    words = "--num_beams 3 --length_penalty -1 --length_rule transformers5 --min_new_tokens 2"
    expected = GenerationConfig(
        num_beams=3, length_penalty=-1.0, length_rule="transformers5", min_new_tokens=2
    )
    assert read_flags(parser.parse_args(words.split())) == expected
    assert read_flags(parser.parse_args(["--do_sample"])).sample
    with pytest.raises(ValueError, match="length_penalty is nan"):
        read_flags(parser.parse_args(["--length_penalty", "nan"]))
    bare = argparse.ArgumentParser()
    add_flags(bare, "num_beams", unset=True)
    assert vars(bare.parse_args([])) == {"num_beams": None}
    assert "the dataset's protocol says; 1 is greedy)" in " ".join(bare.format_help().split())

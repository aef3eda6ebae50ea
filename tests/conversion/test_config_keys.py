import dataclasses

import pytest

from jax_instructblip.conversion.config_keys import (
    AXIS,
    COUNT,
    EPS,
    ID,
    RATE,
    Fixed,
    Key,
    Pair,
    Same,
    Section,
)


@dataclasses.dataclass(frozen=True)
class Tower:
    width: int
    layers: int
    more: int
    rate: float
    eps: float
    vocab: int
    eos: int
    scaled: bool


SECTION = Section(
    "tower_config",
    (
        Key("hidden", "width", AXIS, 8),
        Key("depth", "layers", COUNT, 2),
        Key("other_depth", "more", COUNT, else_as="depth"),
        Key("dropout", "rate", RATE, 0.1),
        Same("attention_dropout", "dropout", 0.1),
        Key("eps", "eps", EPS, 1e-6),
        Key("vocab_size", "vocab", AXIS, 30),
        Key("eos_token_id", "eos", ID, 1),
        Fixed("act", "gelu"),
        Pair(
            lambda values: {"scaled": values["scale"] == "yes"},
            lambda tower: {"scale": "yes" if tower.scaled else "no"},
            {"scale": "no"},
        ),
    ),
)


def read(**keys):
    return SECTION.read({"tower_config": keys})


def test_what_is_written_is_read_again():
    tower = Tower(16, 3, 5, 0.25, 1e-12, 300, 7, True)
    fields, failures = read(**SECTION.write(tower))
    assert (Tower(**fields), failures) == (tower, [])
    assert SECTION.write(tower)["attention_dropout"] == 0.25
    assert SECTION.sizes(tower) == [
        ("tower_config.hidden", 16, False),
        ("tower_config.depth", 3, True),
        ("tower_config.other_depth", 5, True),
        ("tower_config.vocab_size", 300, False),
    ]


def test_what_is_left_out_has_the_default_or_another_keys_value():
    wanted = Tower(8, 2, 2, 0.1, 1e-6, 30, 1, False)
    assert Tower(**read()[0]) == Tower(**SECTION.read({})[0]) == wanted
    assert Tower(**SECTION.read({"tower_config": None})[0]) == wanted
    assert Tower(**read(depth=4, other_depth=None)[0]).more == 4
    assert read(dropout=0.2)[1] == ["tower_config.attention_dropout is 0.1; supported: 0.2"]
    assert Section("", (Key("hidden", "width", AXIS, 8),)).read({"hidden": 5}) == ({"width": 5}, [])


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"hidden": "8"}, "tower_config.hidden is '8', expected a whole number, at least 1"),
        ({"hidden": True}, "tower_config.hidden is True, expected a whole number"),
        ({"hidden": 8.0}, "tower_config.hidden is 8.0, expected a whole number"),
        ({"hidden": None}, "tower_config.hidden is None, expected a whole number"),
        ({"hidden": 0}, "tower_config.hidden is 0, expected at least 1"),
        ({"depth": 2**40}, "tower_config.depth is 1099511627776, expected at least 1 and at most"),
        ({"eps": 0}, "tower_config.eps is 0, expected at least 1e-20"),
        ({"eps": float("nan")}, "tower_config.eps is nan, expected a finite"),
        ({"eps": 1.0}, "tower_config.eps is 1.0, expected at least 1e-20 and at most 0.1"),
        ({"dropout": 1, "attention_dropout": 1}, "tower_config.dropout is 1, expected at least 0"),
        ({"eos_token_id": 1.5}, "tower_config.eos_token_id is 1.5, expected a whole number"),
        ({"eos_token_id": [1, 2]}, "tower_config.eos_token_id is [1, 2], expected a whole number"),
        ({"eos_token_id": 30}, "eos_token_id is 30; expected an id below the vocab_size 30"),
        ({"act": "relu"}, "tower_config.act is 'relu'; supported: 'gelu'"),
        ({"act": {"a": []}}, "tower_config.act is {'a': []}; supported: 'gelu'"),
    ],
)
def test_each_wrong_value_is_one_sentence(keys, said):
    (line,) = read(**keys)[1]
    assert said in line


def test_all_that_is_wrong_is_told_together():
    assert len(read(hidden=-1, depth="x", eps=[], act=3, eos_token_id=-5)[1]) == 5
    assert SECTION.read({"tower_config": [3]})[1] == ["tower_config is a list, expected an object"]


def test_true_is_not_one():
    assert Section("", (Fixed("bias", True),)).read({"bias": 1})[1] == [
        "bias is 1; supported: True"
    ]

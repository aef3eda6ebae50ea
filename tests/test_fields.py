"""Tables of fields: values that pass, and the messages about values that do not."""

import dataclasses
import fractions

import numpy as np
import pytest

from jax_instructblip.fields import (
    INT32,
    TEXT_LIMIT,
    check,
    find_problems,
    flag,
    number,
    one_of,
    several,
    text,
    text_problem,
    whole,
)

NO_UTF8 = "cannot be written as UTF-8: "
STEPS = whole(1, unit="steps")
DROPOUT = number(0, at_most=1, special=(-1.0,))
TOP_P = number(above=0, at_most=1, optional=True)


@pytest.mark.parametrize(
    "field, value",
    [
        (STEPS, 1),
        (STEPS, np.int64(7)),
        (STEPS, INT32),
        (DROPOUT, 0),
        (DROPOUT, 0.5),
        (DROPOUT, -1),
        (DROPOUT, np.float32(0.1)),
        (TOP_P, None),
        (TOP_P, 1),
        (number(), -3.5),
        (flag(), np.bool_(True)),
        (flag(), False),
        (text(), ""),
        (one_of("a", "b"), "b"),
        (several(whole(1)), ()),
        (several(whole(1)), [1, 2]),
    ],
)
def test_good_values(field, value):
    assert field.problems("x", value) == []


@pytest.mark.parametrize(
    "field, value, problem",
    [
        (STEPS, 0, "x is 0, expected at least 1 and at most 2,147,483,647 (steps)"),
        (STEPS, 2**31, "x is 2147483648, expected at least 1 and at most 2,147,483,647 (steps)"),
        (STEPS, 2.5, "x is 2.5, expected a whole number, at least 1"),
        (STEPS, 2.0, "x is 2.0, expected a whole number, at least 1"),
        (STEPS, True, "x is True, expected a whole number"),
        (STEPS, np.bool_(True), "x is True, expected a whole number"),
        (STEPS, "3", "x is '3', expected a whole number"),
        (STEPS, None, "x is None, expected a whole number"),
        (STEPS, [1], "x is [1], expected a whole number"),
        (STEPS, float("nan"), "x is nan, expected a whole number"),
        (STEPS, np.float32(3), "x is 3.0, expected a whole number"),
        (STEPS, fractions.Fraction(3, 2), "x is Fraction(3, 2), expected a whole number"),
        (STEPS, "y" * 99, f"x is '{'y' * 56}..., expected a whole number"),
        (DROPOUT, 1.5, "x is 1.5, expected at least 0 and at most 1 or -1.0"),
        (DROPOUT, -0.5, "x is -0.5, expected at least 0 and at most 1 or -1.0"),
        (DROPOUT, float("nan"), "x is nan, expected a finite float32, at least 0"),
        (DROPOUT, float("inf"), "x is inf, expected a finite float32, at least 0"),
        (DROPOUT, np.float32("nan"), "x is nan, expected a finite float32"),
        (DROPOUT, False, "x is False, expected a number, at least 0 and at most 1 or -1.0"),
        (DROPOUT, 1j, "x is 1j, expected a number"),
        (TOP_P, 0, "x is 0, expected above 0 and at most 1 or None"),
        (TOP_P, 1e-300, "x is 1e-300, expected above 0"),
        (number(), 1e300, "x is 1e+300, expected a finite float32"),
        (number(), -1e300, "x is -1e+300, expected a finite float32"),
        (number(), 10**400, "x is 1000"),
        (STEPS, 10**400, "x is 1000"),
        (whole(), -(10**20), "x is -100000000000000000000, expected at least -2,147,483,647"),
        (number(), -float("inf"), "x is -inf, expected a finite float32"),
        (flag(), 1, "x is 1, expected True or False"),
        (flag(), "false", "x is 'false', expected True or False"),
        (text(), None, "x is None, expected text"),
        (text(), b"a", "x is b'a', expected text"),
        (one_of("a", "b"), "c", "x is 'c', expected one of a, b"),
        (one_of("a", "b"), 1, "x is 1, expected one of a, b"),
        (one_of("", "b"), "c", "x is 'c', expected one of '', b"),
        (several(whole(1)), [1, -5], "x[1] is -5, expected at least 1"),
        (several(whole(1)), 64, "x is 64, expected a tuple, each of it a whole number"),
        (text(), "a\ud800", "x cannot be written as UTF-8"),
        (several(text()), "ab", "x is 'ab', expected a tuple, each of it text"),
    ],
)
def test_bad_values(field, value, problem):
    (found,) = field.problems("x", value)
    assert found.startswith(problem)


def test_all_bad_values_are_reported_together():
    @dataclasses.dataclass
    class Settings:
        steps: int = 0
        dropout: float = 2.0
        free: object = None

    table = {"steps": STEPS, "dropout": DROPOUT}
    for values in (Settings(), {"steps": 0, "dropout": 2.0, "free": None}):
        assert len(find_problems(values, table)) == 2
        with pytest.raises(ValueError, match="^a.steps is 0, .*; a.dropout is 2.0, expected"):
            check(values, table, prefix="a.")
        with pytest.raises(ValueError, match="^no run:\n  steps is 0, .*\n  dropout is 2.0"):
            check(values, table, title="no run:")
    check(Settings(steps=1, dropout=0), table)


@pytest.mark.parametrize(
    "given, problem",
    [
        ("", ""),
        ("f\u00fcr \u7ea2 \U0001f534 \0 \u2028", ""),
        ("x" * TEXT_LIMIT, ""),
        ("x" * (TEXT_LIMIT + 1), "has 100,001 characters, at most 100,000 are read"),
        (
            "is\ud800?",
            f"{NO_UTF8}'\\ud800' at character 2 is half of a surrogate pair",
        ),
        (
            "\udfff",
            f"{NO_UTF8}'\\udfff' at character 0 is half of a surrogate pair",
        ),
        (
            b"f\xfcr".decode(errors="surrogateescape"),
            f"{NO_UTF8}'\\udcfc' at character 1 is the byte 0xFC of another encoding than UTF-8",
        ),
    ],
)
def test_texts_that_can_be_neither_read_nor_written(given, problem):
    assert text_problem(given) == problem

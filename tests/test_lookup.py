"""Rows by name, and the message for an unknown name."""

import pytest

from jax_instructblip.lookup import find

TABLE = {"gqa": 1, "vqav2": 2, "okvqa": 3, "textvqa": 4}


def test_a_row_by_its_name():
    assert find(TABLE, "gqa", "dataset") == 1


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vqa2", r"unknown dataset 'vqa2'; did you mean vqav2 or okvqa( or \w+)?\?"),
        ("GQAs", "unknown dataset 'GQAs'; known: gqa, vqav2, okvqa, textvqa"),
        ("", "unknown dataset ''; known: gqa"),
    ],
)
def test_a_name_that_there_is_not(name, message):
    with pytest.raises(ValueError, match=message):
        find(TABLE, name, "dataset")

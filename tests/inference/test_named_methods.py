"""The error for a missing method, which must not hide another error."""

import pytest

from jax_instructblip.inference.named_methods import NamedMethods


class Model(NamedMethods):
    elsewhere = "Another class ranks."

    def answer(self):
        return "red"

    @property
    def broken(self):
        return [].nothing  # pyright: ignore[reportAttributeAccessIssue]


def test_a_missing_method_is_answered_with_those_there_are():
    with pytest.raises(AttributeError, match="Model has no 'rank': it has answer. Another class"):
        Model().rank()  # pyright: ignore[reportAttributeAccessIssue]


def test_the_error_in_a_property_stays_what_it_is():
    with pytest.raises(AttributeError, match="'list' object has no attribute 'nothing'"):
        _ = Model().broken

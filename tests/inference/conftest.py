"""Settings of these tests."""

import pytest

import jax_instructblip
from tests.helpers.tiny import write_base


@pytest.fixture(scope="module", params=["t5", "llama", "opt"])
def folder(request, tmp_path_factory):
    """A tiny checkpoint of each kind."""
    return write_base(tmp_path_factory.mktemp("base") / request.param, request.param)


@pytest.fixture(scope="module")
def blip(folder):
    """It, loaded."""
    return jax_instructblip.load(folder)

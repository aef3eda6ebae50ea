"""Settings of these tests."""

import jax
import pytest

import jax_instructblip
from jax_instructblip.inference import decode
from tests.micro import write_base


@pytest.fixture(scope="session", autouse=True)
def quick_compile():
    """Decoding compiles in half the time, and runs slower; the programs' results are the same."""
    with pytest.MonkeyPatch.context() as patch:
        whole = decode._decode.__wrapped__
        options = {"xla_backend_optimization_level": 0}
        quick = jax.jit(whole, static_argnums=(0, 1, 2), compiler_options=options)
        patch.setattr(decode, "_decode", quick)
        yield


@pytest.fixture(scope="module", params=["t5", "llama"])
def folder(request, tmp_path_factory):
    """A micro checkpoint of each kind."""
    return write_base(tmp_path_factory.mktemp("base") / request.param, request.param)


@pytest.fixture(scope="module")
def blip(folder):
    """It, loaded."""
    return jax_instructblip.load(folder)

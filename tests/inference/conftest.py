"""Settings of these tests."""

import jax
import pytest

from jax_instructblip.inference import decode


@pytest.fixture(scope="session", autouse=True)
def quick_compile():
    """Decoding compiles in half the time, and runs slower; the programs' results are the same."""
    with pytest.MonkeyPatch.context() as patch:
        whole = decode._decode.__wrapped__
        options = {"xla_backend_optimization_level": 0}
        quick = jax.jit(whole, static_argnums=(0, 1, 2), compiler_options=options)
        patch.setattr(decode, "_decode", quick)
        yield

"""Settings and fixtures of all tests."""

import gc
import os
import runpy
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

# Tolerances are of float32 on the CPU; a GPU or TPU would round differently.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Programs that tests start leave the cache of the user who runs them alone.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", "")

import jax
import jaxtyping
import pytest

from jax_instructblip import stores
from tests.helpers.interpreter import QUICK

gc.set_threshold(50_000, 20, 50)  # as the command line sets it, for the same reason

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_enable_x64", False)

# Shapes are checked in models/ alone: elsewhere dataclasses are pytrees, and tree_map rebuilds them
# with leaves that are no arrays.
jaxtyping.install_import_hook("jax_instructblip.models", "beartype.beartype")

ROOT = Path(__file__).resolve().parents[1]


def pytest_configure(config: pytest.Config) -> None:
    """Full-size models alone are compiled as those of users."""
    if config.getoption("markexpr") == "not full":
        given = os.environ.get("XLA_FLAGS", "").removeprefix(QUICK)  # a worker of xdist has them
        os.environ["XLA_FLAGS"] = f"{QUICK} {given}".strip()


@pytest.fixture(scope="module", autouse=True)
def compiled_programs() -> Iterator[None]:
    """The programs of a file end with it: those of all would take 8 GB a worker."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture(scope="session", autouse=True)
def copies_of_stores(tmp_path_factory) -> None:
    """Copies of what lies in stores leave the user's own alone."""
    os.environ[stores.VARIABLE] = str(tmp_path_factory.mktemp("stores"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder `shared` beside the checkout: real tokenizers, photographs, recorded values."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"no folder {folder}")
    return folder


@pytest.fixture(scope="session")
def forge(shared, tmp_path_factory) -> Callable[..., Path]:
    """`forge("instructblip-flan-t5-xl")` is a tiny Hugging Face folder of that variant.

    Its keys are the released ones, its weights random and the same in each call; `dtype` is
    "float32", "bfloat16" or "float16". A folder is made once a session: tests copy it before they
    change it.
    """
    pytest.importorskip("torch", reason="needs torch: pip install -e .[torch]")
    made: dict[tuple[str, str], Path] = {}

    def forge(variant: str, dtype: str = "float32") -> Path:
        if (variant, dtype) not in made:
            out = tmp_path_factory.mktemp("forged") / f"{variant}-{dtype}"
            _run_script(
                shared / "tools" / "forge_checkpoint.py",
                *("--scale", "tiny", "--variant", variant, "--dtype", dtype, "--out", str(out)),
            )
            made[variant, dtype] = out
        return made[variant, dtype]

    return forge


def _run_script(script: Path, *words: str) -> None:
    """Runs it in this process, which saves importing torch and transformers again."""
    argv, sys.argv = sys.argv, [str(script), *words]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the script is not what is under test
            runpy.run_path(str(script), run_name="__main__")
    finally:
        sys.argv = argv

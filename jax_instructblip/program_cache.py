"""A folder for compiled programs, so that the same command in a new process compiles nothing."""

import hashlib
import os
import platform
from pathlib import Path

MOST_BYTES = 4 * 2**30  # of the programs that are kept; the least used ones go first

_DEFAULTS = {
    "JAX_COMPILATION_CACHE_MAX_SIZE": str(MOST_BYTES),
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",  # hundreds of small programs take a while
}


def set_default() -> None:
    """Names JAX's compilation cache in the environment, before JAX is loaded.

    A user's own `JAX_COMPILATION_CACHE_DIR` stays, and an empty one turns the cache off. A home
    that cannot be written to has none.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "jax_instructblip" / f"programs-{_processor()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return
    if os.access(folder, os.W_OK):
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
        for name, value in _DEFAULTS.items():
            os.environ.setdefault(name, value)


def _processor() -> str:
    """A name for this kind of processor: programs of a CPU run on others that have its features.

    Machines of several kinds may share a home.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        features = next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        features = platform.processor()
    return hashlib.sha256(features.encode()).hexdigest()[:12]

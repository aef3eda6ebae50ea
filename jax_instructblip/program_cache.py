"""Turns on JAX's persistent compilation cache, so that a repeated command need not recompile."""

import hashlib
import os
import platform
from pathlib import Path

# Programs are cached however quickly they compile: hundreds of small ones add up. No size limit is
# set, because JAX would then lock the folder at each access, and all who share it would wait.
_MIN_SECONDS = ("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


def set_default() -> None:
    """Sets JAX's compilation cache folder in the environment; must run before JAX is imported.

    A `JAX_COMPILATION_CACHE_DIR` of the user is kept; an empty one turns the cache off. Without a
    writable home folder there is no cache.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(base) / "jax_instructblip" / f"programs-{_processor()}"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # RuntimeError: the user has no home, as in some containers
        return
    if os.access(folder, os.W_OK):
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
        os.environ.setdefault(*_MIN_SECONDS)


def _processor() -> str:
    """Returns a short hash of this CPU's features, since compiled CPU programs depend on them.

    Machines with different CPUs may share a home folder.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        features = next(line for line in lines if line.startswith(("flags", "Features")))
    except (OSError, StopIteration):
        features = platform.processor()
    return hashlib.sha256(features.encode()).hexdigest()[:12]

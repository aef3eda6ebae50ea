"""A folder for compiled programs, so that the same command in a new process compiles nothing."""

import hashlib
import os
import platform
from pathlib import Path

# Hundreds of small programs take a while, too. There is no limit of size: JAX would take a lock on
# the folder at each access, for which the processes of a pod with one home would wait.
_MIN_SECONDS = ("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


def set_default() -> None:
    """Names JAX's compilation cache in the environment, before JAX is loaded.

    A user's own `JAX_COMPILATION_CACHE_DIR` stays, and an empty one turns the cache off. Without a
    home, or with one that cannot be written to, there is no cache.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        folder = Path(base) / "jax_instructblip" / f"programs-{_processor()}"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # RuntimeError: of a user without a home, as in containers
        return
    if os.access(folder, os.W_OK):
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(folder)
        os.environ.setdefault(*_MIN_SECONDS)


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

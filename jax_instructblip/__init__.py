"""InstructBLIP in JAX.

    import jax_instructblip

    blip = jax_instructblip.load("shapes_t5")
    answers = blip.generate(["photo.jpg"], ["What is in the picture?"])

The names load on first use, so that importing the package costs nothing.
"""

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jax_instructblip.inference.pipeline import Answer as Answer
    from jax_instructblip.inference.pipeline import load as load

_HOMES = {
    "Answer": "jax_instructblip.inference.pipeline",
    "load": "jax_instructblip.inference.pipeline",
}


__all__ = ["Answer", "load"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.metadata.version(__name__)
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES, "__version__"])

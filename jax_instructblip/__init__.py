"""InstructBLIP in JAX.

    import jax_instructblip

    blip = jax_instructblip.load("shapes_t5")
    answers = blip.generate(["photo.jpg"], ["What is in the picture?"])

    load(path)                              a model, ready to answer: its answers are of `Answer`
    convert(folder, out)                    a Hugging Face folder -> a checkpoint folder
    train("configs/quickstart.py", {...})   tunes as a config says; returns the run directory
    evaluate(run, datasets="gqa", ...)      measures; returns what is in results.json
    export(run, out)                        a run or a checkpoint folder -> a Hugging Face folder
    merge(run, out)                         a run and its base -> one checkpoint folder

The names load on first use, so that importing the package costs nothing.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jax_instructblip.api import evaluate as evaluate
    from jax_instructblip.api import train as train
    from jax_instructblip.conversion.convert import convert as convert
    from jax_instructblip.inference.pipeline import Answer as Answer
    from jax_instructblip.inference.pipeline import load as load
    from jax_instructblip.training.exporting import export as export
    from jax_instructblip.training.exporting import merge as merge

_HOMES = {
    "Answer": "jax_instructblip.inference.pipeline",
    "convert": "jax_instructblip.conversion.convert",
    "evaluate": "jax_instructblip.api",
    "export": "jax_instructblip.training.exporting",
    "load": "jax_instructblip.inference.pipeline",
    "merge": "jax_instructblip.training.exporting",
    "train": "jax_instructblip.api",
}


__all__ = ["Answer", "convert", "evaluate", "export", "load", "merge", "train"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib import metadata  # takes as long as all else of this import

        try:
            return metadata.version(__name__)
        except metadata.PackageNotFoundError:  # a checkout on the path, which nobody installed
            return "unknown"
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES, "__version__"])

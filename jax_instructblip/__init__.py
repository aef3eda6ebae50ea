"""InstructBLIP in JAX.

    import jax_instructblip

    blip = jax_instructblip.load("shapes_t5")
    answers = blip.generate(["photo.jpg"], ["What is in the picture?"])

    load(path)                              a model whose `generate` returns `Answer` objects
    convert(folder, out)                    a Hugging Face folder -> a checkpoint folder
    train("configs/quickstart.py", {...})   trains as a config says; returns the run directory
    evaluate(run, datasets="gqa", ...)      scores a model; returns the content of results.json
    export(run, out)                        a run or a checkpoint folder -> a Hugging Face folder
    merge(run, out)                         a run and its frozen base -> one checkpoint folder

Each name is imported on first use, so that `import jax_instructblip` is fast.
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
        from importlib import metadata  # slow: would double the time of this import

        try:
            return metadata.version(__name__)
        except metadata.PackageNotFoundError:  # a checkout on sys.path that is not installed
            return "unknown"
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES, "__version__"])

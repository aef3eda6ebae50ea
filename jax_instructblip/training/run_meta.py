"""`meta.json` of a run's checkpoint against the run: model, parts that are trained, base."""

from typing import Any

from jax_instructblip import checkpoint
from jax_instructblip.fields import dotted
from jax_instructblip.models.variants import Variant

Meta = dict[str, Any]


def compare_meta(folder: str, stored: Meta, wanted: Meta) -> None:
    """Raises a CheckpointError where a checkpoint is of another model, parts or base than wanted.

    `folder` is what the message calls it.
    """
    wrong = []
    variant, expected = (_sizes(meta["variant"]) for meta in (stored, wanted))
    for name in sorted(variant.keys() | expected.keys()):
        if variant.get(name) != expected.get(name):
            wrong.append(
                f"variant: {name} is {variant.get(name)}, the run has {expected.get(name)}"
            )
    if list(stored["trainable"]) != list(wanted["trainable"]):
        wrong.append(f"it trains {stored['trainable']}, the run trains {wanted['trainable']}")
    if stored["base"]["sha256"] != wanted["base"]["sha256"]:
        wrong.append(
            f"it was tuned on the frozen base {stored['base']['path']} "
            f"(sha256 {stored['base']['sha256'][:12]}...), the run has {wanted['base']['path']} "
            f"({wanted['base']['sha256'][:12]}...)"
        )
    if wrong:
        raise checkpoint.CheckpointError(
            "\n  ".join(
                [f"{folder} does not continue this run; choose another workdir, or undo:", *wrong]
            )
        )


def _sizes(variant: Any) -> dict[str, Any]:
    """The fields of a variant by dotted names; those that are newer than it have their defaults."""
    try:
        return dotted(Variant.from_dict(variant).to_dict())
    except ValueError:
        return dotted(variant)

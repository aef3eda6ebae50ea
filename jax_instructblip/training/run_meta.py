"""The fields of a checkpoint's `meta.json`: those about texts, and how they differ from a run."""

from typing import Any

from jax_instructblip import checkpoint
from jax_instructblip.data.captions import CaptionTokenizer
from jax_instructblip.data.input_format import KEY
from jax_instructblip.data.text import TextProcessor
from jax_instructblip.fields import dotted
from jax_instructblip.inference.loading import LIMITS
from jax_instructblip.models.variants import Variant

Meta = dict[str, Any]


def text_facts(text: TextProcessor | CaptionTokenizer) -> Meta:
    """Returns the fields of `meta.json` about texts.

    `text` has the limits of token lengths by name (`prompt_limit` ...), and for a `TextProcessor`
    `input_format` says how prompts and images are put to the model.
    """
    facts: Meta = {"text": {name: getattr(text, name) for name in LIMITS if hasattr(text, name)}}
    if isinstance(text, TextProcessor):
        facts[KEY] = text.input_format.to_dict()
    return facts


def compare_meta(folder: str, stored: Meta, wanted: Meta) -> None:
    """Raises a CheckpointError if `stored` differs from `wanted` in model, trained parts or base.

    `stored` is the checkpoint's `meta.json`, `wanted` what the run would save. All differences are
    listed; `folder` is the checkpoint's name in the message.
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
    """Returns a variant's fields by dotted name; fields added since have their defaults."""
    try:
        return dotted(Variant.from_dict(variant).to_dict())
    except ValueError:
        return dotted(variant)

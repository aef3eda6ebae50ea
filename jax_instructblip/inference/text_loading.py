"""Loading of a model's tokenizers and limits of text length, without its weights."""

import os

from jax_instructblip.data.text import TextProcessor
from jax_instructblip.inference.loading import read_source, require_kind


def load_text(path: str | os.PathLike) -> TextProcessor:
    """Loads the tokenizers and length limits of a model, but not its weights.

    `path` is a Hugging Face folder, a checkpoint folder, a training run or an embedded name. A
    ValueError for BLIP-2's first stage, which answers no questions.
    """
    source = read_source(path)
    require_kind(source, {source.variant.kind: TextProcessor})
    return TextProcessor.load(source.folder, source.variant, **source.limits)

"""Loading of a model's tokenizers, limits of text length and input format, without its weights."""

import os

from jax_instructblip.data.captions import CaptionTokenizer
from jax_instructblip.data.chat_text import load_text_processor
from jax_instructblip.data.text import TextProcessor
from jax_instructblip.inference.loading import Source, read_source, require_kind


def load_text(path: str | os.PathLike, template: str | None = None) -> TextProcessor:
    """Loads the text processor of a model, but not its weights.

    `path` is a Hugging Face folder, a checkpoint folder, a training run or an embedded name;
    `template` is as in `text_of`. A ValueError for BLIP-2's first stage, which answers no
    questions.
    """
    source = read_source(path)
    require_kind(source, {source.variant.kind: TextProcessor})
    return text_of(source, template)


def load_training_text(
    path: str | os.PathLike, template: str | None = None
) -> TextProcessor | CaptionTokenizer:
    """Loads what `load_text` does, or for a first stage the tokenizer of its captions.

    A ValueError if a `template` is given for a first stage.
    """
    source = read_source(path)
    if source.variant.llm is not None:
        return text_of(source, template)
    if template is not None:
        raise ValueError(
            f"template is {template!r}, but {path} is a first stage of BLIP-2, which is trained on "
            "captions: leave it out"
        )
    return CaptionTokenizer.load(source.folder, source.variant)


def text_of(source: Source, template: str | None = None) -> TextProcessor:
    """Loads the text processor of a `Source`.

    Args:
      source: the model.
      template: the chat template to ask it by, a key of `CHAT_TEMPLATES`; None for its own.

    Raises:
      ValueError: the template is unknown, of another tokenizer or of another kind of model.
    """
    asked = source.input_format.with_template(template)
    return load_text_processor(source.folder, source.variant, asked, **source.limits)

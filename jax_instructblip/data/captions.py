"""Captions as the first stage of BLIP-2 reads them: BERT ids, `[CLS] ... [SEP]`, of one length."""

import dataclasses
import os
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jax_instructblip.data.tokenizer_files import load_qformer_tokenizer
from jax_instructblip.fields import text_problem
from jax_instructblip.models.variants import Variant

LIMIT = 32  # ids of a caption in training, [CLS] and [SEP] included
RETRIEVAL_LIMIT = 35  # and in retrieval, as released


class Captions(NamedTuple):
    """Captions in ids, `[N, L]` each: the ids, and True where they are no padding."""

    ids: np.ndarray  # int32
    valid: np.ndarray  # bool
    cut: np.ndarray  # [N] bool: those that were longer


@dataclasses.dataclass(frozen=True, eq=False)
class CaptionTokenizer:
    """Turns captions into the ids of one variant, and ids back into text.

    Attributes:
      variant: whose vocabulary the ids are of.
      tokenizer: BERT's, with `[DEC]` as its beginning of a text that is written.
      limit: ids of each caption; longer ones are cut on the right, shorter ones padded.
    """

    variant: Variant
    tokenizer: Any
    limit: int = LIMIT

    def __post_init__(self):
        config, wrong = self.variant.qformer, []
        if not 3 <= self.limit <= config.max_positions:
            wrong.append(f"limit is {self.limit}, expected 3 to {config.max_positions}")
        if (highest := max(self.tokenizer.get_vocab().values())) >= config.vocab:
            wrong.append(f"it has ids up to {highest}, the model {config.vocab} embeddings")
        dec = self.tokenizer.bos_token_id
        if config.caption_head and dec != config.vocab - 1:
            wrong.append(f"[DEC] is {dec}, the model expects its last id, {config.vocab - 1}")
        if wrong:
            raise ValueError("the tokenizer does not belong to this model: " + "; ".join(wrong))

    @classmethod
    def load(
        cls, folder: str | os.PathLike[str], variant: Variant, limit: int = LIMIT
    ) -> "CaptionTokenizer":
        """The tokenizer of a checkpoint folder, ours or Hugging Face's, which has it at its root.

        Raises:
            FileNotFoundError: there is none.
            ValueError: it is damaged, or of another model.
        """
        own = pathlib.Path(folder, "qformer_tokenizer")
        tokenizer = load_qformer_tokenizer(own if own.is_dir() else folder)
        return cls(variant, tokenizer, limit)

    def encode(self, captions: Sequence[str]) -> Captions:
        """The captions in ids, all padded to `limit`.

        Raises:
            ValueError: there is none, or one is no text.
        """
        if not isinstance(captions, list | tuple) or not captions:
            raise ValueError(f"captions is {captions!r:.60}, expected a list of at least one text")
        wrong = [
            f"caption {number} {text_problem(each) if isinstance(each, str) else 'is no text'}"
            for number, each in enumerate(captions)
            if not isinstance(each, str) or text_problem(each)
        ]
        if wrong:
            raise ValueError("; ".join(wrong[:5]))
        made = self.tokenizer(
            list(captions), padding="max_length", truncation=True, max_length=self.limit
        )
        cut = np.array([bool(each.overflowing) for each in made.encodings])
        return Captions(
            np.array(made["input_ids"], np.int32), np.array(made["attention_mask"]) > 0, cut
        )

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special ones left out."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True).strip()

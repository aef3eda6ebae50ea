"""Tokenizes captions for the first stage of BLIP-2: BERT ids, `[CLS] ... [SEP]`, of one length."""

import dataclasses
import os
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from jax_instructblip.data.tokenizer_files import has_unknown, load_qformer_tokenizer
from jax_instructblip.fields import text_problem
from jax_instructblip.models.variants import Variant

LIMIT = 32  # ids of a caption in training, [CLS] and [SEP] included
RETRIEVAL_LIMIT = 35  # ids of a caption in retrieval, as in LAVIS


class Captions(NamedTuple):
    """N captions of L ids each.

    Attributes:
      ids: `[N, L]` int32, padded on the right.
      valid: `[N, L]` bool, True on tokens.
      cut: `[N]` bool, True for captions that were too long.
    """

    ids: np.ndarray  # [N, L] int32
    valid: np.ndarray  # [N, L] bool
    cut: np.ndarray  # [N] bool


@dataclasses.dataclass(frozen=True, eq=False)
class CaptionTokenizer:
    """Turns captions into token ids for one model variant, and ids back into text.

    Attributes:
      variant: the model whose vocabulary is used; the tokenizer is checked against it.
      tokenizer: BERT's tokenizer, with `[DEC]` as its start token for generated captions.
      limit: number of ids of each caption; longer ones are cut on the right, shorter ones padded.
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
        """Returns the tokenizer of a checkpoint folder, either of this package or of Hugging Face.

        It is in the subfolder `qformer_tokenizer`, or else at the root of the folder.

        Raises:
            FileNotFoundError: the folder has no tokenizer.
            ValueError: the tokenizer is damaged, or belongs to another model.
        """
        own = pathlib.Path(folder, "qformer_tokenizer")
        tokenizer = load_qformer_tokenizer(own if own.is_dir() else folder)
        return cls(variant, tokenizer, limit)

    def encode(self, captions: Sequence[str]) -> Captions:
        """Returns the captions as ids, all padded or cut to `limit`.

        Raises:
            ValueError: there is no caption, or one of them is no text or blank.
        """
        if not isinstance(captions, list | tuple) or not captions:
            raise ValueError(f"captions is {captions!r:.60}, expected a list of at least one text")
        problems = [(number, _problem(each)) for number, each in enumerate(captions)]
        wrong = [f"caption {number} {problem}" for number, problem in problems if problem]
        if wrong:
            raise ValueError("; ".join(wrong[:5]))
        made = self.tokenizer(
            list(captions), padding="max_length", truncation=True, max_length=self.limit
        )
        cut = np.array([bool(each.overflowing) for each in made.encodings])
        return Captions(
            np.array(made["input_ids"], np.int32), np.array(made["attention_mask"]) > 0, cut
        )

    def example(self, caption: str) -> dict[str, np.ndarray]:
        """Returns a dict of `caption`, its ids [L] int32 without padding, and `truncated`.

        `truncated` is [0, 0, 1] int32 if the caption was cut, else zeros.

        Raises:
            ValueError: the caption cannot be encoded.
        """
        made = self.encode([caption])
        truncated = np.array([0, 0, made.cut[0]], np.int32)
        return {"caption": made.ids[0][made.valid[0]], "truncated": truncated}

    def has_unknown(self, caption: str) -> bool:
        """Tells whether a caption has characters that the tokenizer does not know."""
        return has_unknown(self.tokenizer, caption)

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of token ids, without special tokens."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=True).strip()


def _problem(caption: Any) -> str:
    """Returns the reason why a value is no caption; "" if it is one."""
    if not isinstance(caption, str):
        return "is no text"
    return text_problem(caption) if caption.strip() else "is blank"

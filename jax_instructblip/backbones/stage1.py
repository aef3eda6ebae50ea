"""Writes an initial checkpoint for BLIP-2's first stage: a vision tower and an untrained Q-Former.

    BASE --vision tower, BERT tokenizer--> OUT     Q-Former random or from BERT, heads random

With BERT, the Q-Former gets its word and position embeddings, self-attention and feed-forwards. The
feed-forwards of the queries are copies of those of the text, and cross-attention is random (as in
the released code).
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jax_instructblip import checkpoint, stores
from jax_instructblip.backbones.joining import part_of, part_of_arrays, write_joined
from jax_instructblip.conversion.engine import Drop, Rule
from jax_instructblip.conversion.safetensors import ConversionError, Tensor, open_folder
from jax_instructblip.conversion.stored_model import copy_tokenizers
from jax_instructblip.conversion.tables import qformer
from jax_instructblip.inference.loading import read_source
from jax_instructblip.models.blip2 import init_params
from jax_instructblip.models.variants import QFormerConfig, Variant

WORD_STD = 0.02  # of word embeddings as `init_params` draws them
FEATURES = 256  # width of the space in which images and texts are compared, as released
BERT_PREFIXES = ("", "bert.")  # tensor name prefixes of BertModel and BertForPreTraining


def write_stage1(
    base: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    bert: str | os.PathLike[str] | None = None,
    features: int = FEATURES,
    word_std: float | None = None,
    seed: int = 0,
) -> Path | str:
    """Writes an untrained checkpoint of BLIP-2's first stage.

    Args:
      base: any checkpoint; supplies vision tower, Q-Former sizes and BERT tokenizer.
      out: the new folder, or its address in an object store (`gs://...`); it must not exist.
      bert: a Hugging Face folder of BERT with the Q-Former's sizes, to initialise the Q-Former.
      features: width of the space in which images and texts are compared.
      word_std: standard deviation of random word embeddings; None is BERT's, 0.02. The loss of
        captions pushes all words that no caption has in one direction. The larger they are at
        first, the better they can still be told apart.
      seed: of the random weights.

    Returns:
      The folder `out`, or its address.

    Raises:
      ValueError: `base` has no Q-Former, `bert` has other sizes, or `word_std` is given with it.
      OSError: `out` exists, or the disk has too little room.
    """
    if bert is not None and word_std is not None:
        raise ValueError(
            "--word_std is for random word embeddings, and --bert has trained ones: leave out one "
            "of the two"
        )
    source = read_source(base)
    changes = dict(llm_width=0, instruction_aware=True, feature_width=features)
    sizes = {**vars(source.variant.qformer), **changes, "caption_head": True}
    none: Any = None
    variant = Variant("blip2_stage1", source.variant.vision, QFormerConfig(**sizes), none)
    fresh = {
        path: np.asarray(leaf)
        for path, leaf in checkpoint.flatten(init_params(variant, jax.random.key(seed))).items()
        if not path.startswith("vision/")
    }
    if word_std is not None:
        fresh[_TABLE] = fresh[_TABLE] * np.float32(word_std / WORD_STD)
    parts = {"vision tower": part_of(source, lambda path: path.startswith("vision/"), base)}
    if bert is not None:
        folder = stores.input_path(bert, "bert")
        of_bert = bert_leaves(open_folder(folder), variant.qformer, str(folder))
        fresh = {path: leaf for path, leaf in fresh.items() if path not in of_bert}
        parts["Q-Former"] = part_of_arrays(f"BERT: {folder.name}", of_bert)
        parts["cross-attention, queries and heads"] = part_of_arrays("random", fresh)
    else:
        parts["Q-Former and heads"] = part_of_arrays("random", fresh)
    copy = lambda out: copy_tokenizers(source.folder, out, variant)
    return write_joined(out, variant, parts, copy)


def bert_leaves(
    tensors: Mapping[str, Tensor], config: QFormerConfig, title: str
) -> dict[str, np.ndarray]:
    """Returns the Q-Former leaves (float32) that BERT's tensors fill, by path (`qformer/...`).

    `tensors` are BERT's by name, `config` has the Q-Former's sizes. The word `[DEC]`, which BERT
    lacks, gets the mean of all word embeddings.

    Raises:
      ConversionError: lists all tensors that are missing or of other shapes; `title`, the name of
        their folder, is in the message.
    """
    prefix = next((p for p in BERT_PREFIXES if f"{p}{_WORDS}" in tensors), "")
    made: dict[str, np.ndarray] = {}
    wrong: list[str] = []
    for entry in qformer.rules(config):
        if isinstance(entry, Drop) or not isinstance(entry, Rule):
            continue
        names = [_bert_name(key) for key in entry.keys]
        if any(name is None for name in names):
            continue
        pieces = []
        for name in names:
            tensor = tensors.get(f"{prefix}{name}")
            if tensor is None:
                wrong.append(f"{prefix}{name} is missing, for {entry.target}")
            else:
                pieces.append(entry.transform.forward(tensor.read().astype(np.float32)))
        if len(pieces) == len(names):
            made[entry.target] = pieces[0] if entry.layers is None else np.stack(pieces)
    words = made.pop(_TABLE, None)
    if wrong:
        raise ConversionError(f"{title} is no BERT of these sizes", wrong)
    if words is not None:
        table = np.zeros((config.vocab, config.width), np.float32)
        if words.shape[1:] != table.shape[1:] or len(words) > len(table):
            raise ConversionError(
                f"{title} is no BERT of these sizes",
                [f"words {list(words.shape)}, the Q-Former has {list(table.shape)}"],
            )
        table[: len(words)] = words
        table[len(words) :] = words.mean(axis=0)  # [DEC], which BERT does not know
        made[_TABLE] = table
    return made


_TABLE = "qformer/text_embed/embedding"
_WORDS = "embeddings.word_embeddings.weight"


def _bert_name(key: str) -> str | None:
    """Returns BERT's name of a tensor of the Q-Former; None if BERT has no such tensor."""
    if not key.startswith("qformer.") or "crossattention" in key:
        return None
    name = key.removeprefix("qformer.").replace("embeddings.layernorm.", "embeddings.LayerNorm.")
    name = name.replace(".attention.attention.", ".attention.self.")
    return name.replace("intermediate_query", "intermediate").replace("output_query", "output")

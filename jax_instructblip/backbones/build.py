"""Assembles the embedded checkpoints `shapes_llama` and `shapes_t5` from their trained parts.

    tokenizers, vision tower, language model --write_checkpoint--> BASE     random Q-Former
    BASE --an ordinary training run on `shapes-captions`--> RUN             trained queries
    BASE, RUN --merge_captioned--> embedded/shapes_llama, shapes_t5         with text branch

The caption run uses no instructions, as in BLIP-2's second stage. So the text branch, which reads
the instruction, is initialised: its feed-forwards and norms are copies of the trained query ones
(BLIP-2's first stage copies in the other direction), word and position embeddings are random.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from jax_instructblip import checkpoint
from jax_instructblip.backbones.sizes import LANGUAGE, QFORMER, VISION
from jax_instructblip.backbones.tokenizers import make_tokenizers
from jax_instructblip.data.text import TextProcessor
from jax_instructblip.inference.loading import read_params, read_source
from jax_instructblip.models.variants import (
    LlamaConfig,
    QFormerConfig,
    T5Config,
    Variant,
)
from jax_instructblip.models.vlm import init_params

# A norm follows the embeddings, so their scale only sets how fast Adam can change their direction.
WORD_STD, POSITION_STD = 0.5, 0.1


def text_processor(kind: str) -> TextProcessor:
    """Returns tokenizers and variant of the embedded model with LLM `kind` 'llama' or 't5'."""
    llm, qformer = make_tokenizers(kind)
    sizes: dict[str, Any] = {**LANGUAGE[kind], "vocab": len(llm)}
    if kind == "llama":
        sizes["pad_id"] = llm.pad_token_id
    config = LlamaConfig(**sizes) if kind == "llama" else T5Config(**sizes)
    queries = QFormerConfig(
        vision_width=VISION.width, llm_width=config.width, vocab=len(qformer), **QFORMER
    )
    return TextProcessor(Variant("instructblip", VISION, queries, config), llm, qformer)


def write_checkpoint(
    folder: str | os.PathLike[str],
    params: dict[str, Any],
    history: dict[str, Any],
    *,
    kind: str,
    seed: int = 0,
) -> None:
    """Writes the checkpoint folder of an embedded model in bfloat16, with its tokenizers.

    `params` are the trained towers; a tower that is missing gets random weights. `history` is
    stored in `config.json` and says where each tower comes from.
    """
    processor = text_processor(kind)
    variant = processor.variant
    start = init_params(variant, jax.random.key(seed))
    queries = start["qformer"]
    queries["text_embed"]["embedding"] *= WORD_STD / 0.02
    queries["position_embed"]["embedding"] *= POSITION_STD / 0.02
    leaves = checkpoint.flatten({**start, **params})

    def add(temporary: Path) -> None:
        checkpoint.write_config(temporary, {"variant": variant.to_dict(), "source": history})
        processor.llm.save_pretrained(temporary / "tokenizer")
        processor.qformer.save_pretrained(temporary / "qformer_tokenizer")

    narrow = ((path, np.asarray(leaf).astype(ml_dtypes.bfloat16)) for path, leaf in leaves.items())
    checkpoint.write_tree(folder, narrow, extra=add)


def _keep(path: str, array: np.ndarray) -> np.ndarray:
    return array


def merge_captioned(
    base: str | os.PathLike[str], run: str | os.PathLike[str], out: str | os.PathLike[str]
) -> None:
    """Writes a checkpoint `out`: the towers of `base`, and the Q-Former trained by `run`."""
    source = read_source(base)
    params = read_params(source, _keep)
    learned = checkpoint.flatten(read_params(read_source(run), _keep)["qformer"])
    merged = {**checkpoint.flatten(params["qformer"]), **learned}
    for path, leaf in learned.items():
        if "query_mlp" in path:
            merged[path.replace("query_mlp", "text_mlp")] = leaf
    params["qformer"] = checkpoint.unflatten(merged)
    history = {**checkpoint.read_config(source.folder)["source"], "qformer": "captioned on shapes"}
    write_checkpoint(out, params, history, kind=source.variant.llm.kind)


def replace_captioned(base: Path, run: Path, out: Path) -> None:
    """Writes the folder of `merge_captioned`, replacing an existing checkpoint folder `out`.

    The old folder stays until the new one is complete.

    Raises:
      ValueError: `out` exists and is no checkpoint folder.
    """
    if out.exists() and not (out / checkpoint.MANIFEST).is_file():
        raise ValueError(
            f"{out.absolute()} is no checkpoint folder (no {checkpoint.MANIFEST}) and is not "
            "replaced: give the name of a new folder"
        )
    draft = out.with_name(f".{out.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    merge_captioned(base, run, draft)
    shutil.rmtree(out, ignore_errors=True)
    draft.rename(out)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    print(f"written: {out}, {size / 1e6:.1f} MB")

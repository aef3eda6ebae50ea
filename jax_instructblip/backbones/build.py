"""The embedded checkpoints: their files, and the way from three trainings to one folder.

    tokenizers, vision tower, language model --write_checkpoint--> BASE     Q-Former random
    BASE --caption phase: an ordinary run on `shapes-captions`--> RUN       queries alone
    BASE, RUN --merge_captioned--> embedded/shapes_llama, shapes_t5         text branch added

The caption phase knows no instruction, as in BLIP-2's second stage. What reads the instruction
starts so: the text feed-forwards and norms are copies of the query ones (the rule of the first
stage, the other way round), words and positions are random.
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

# Embeddings are normed before use, so their size only says how fast Adam may turn them.
WORD_STD, POSITION_STD = 0.5, 0.1


def text_processor(kind: str) -> TextProcessor:
    """Tokenizers and sizes of the embedded model whose LLM is of `kind` 'llama' or 't5'."""
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
    """Writes the checkpoint folder of an embedded model, bfloat16, with its tokenizers.

    `params` are the towers that are trained; a tower that is missing stays random. `history` says
    in `config.json` where they come from.
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
    """Writes `out`: the towers of `base` with the Q-Former that `run` captioned."""
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
    """Writes the folder of `merge_captioned` in the place of `out`, when it is whole.

    Raises:
      ValueError: there is something else than a checkpoint folder, which would be lost.
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

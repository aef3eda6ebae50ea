"""Assembles the embedded checkpoints `shapes_llama` and `shapes_t5` from their trained parts.

    tokenizers, vision tower, language model --write_checkpoint--> BASE     random Q-Former
    BASE --stage 1, stage 2, instruct (`stage1.py`, `stage2.py`)--> INSTRUCT
    INSTRUCT --replace_embedded--> embedded/shapes_llama, shapes_t5         bfloat16

Stages 1 and 2 are ordinary training runs on captions; `launch/backbones.sh` has all commands.
"""

import dataclasses
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from jax_instructblip import checkpoint
from jax_instructblip.backbones.sizes import LANGUAGE, QFORMER, VISION
from jax_instructblip.backbones.tokenizers import make_tokenizers
from jax_instructblip.conversion.stored_model import write_checkpoint as write_stored
from jax_instructblip.data.text import TextProcessor
from jax_instructblip.inference.loading import read_source, stored_model
from jax_instructblip.models.variants import (
    LlamaConfig,
    QFormerConfig,
    T5Config,
    Variant,
)
from jax_instructblip.models.vlm import init_params

# A norm follows the embeddings, so their scale only sets how fast Adam can change their direction.
WORD_STD, POSITION_STD = 0.5, 0.1

TOWERS = {"vision": "trained on shapes", "llm": "trained on text"}
HISTORY = {**TOWERS, "qformer": "stages 1 and 2 of BLIP-2 on captions of shapes"}


def text_processor(kind: str) -> TextProcessor:
    """Returns new tokenizers and the variant of the embedded model with LLM `kind`: llama or t5."""
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
    processor: TextProcessor,
    tokenizer: Path | None = None,
    seed: int = 0,
) -> None:
    """Writes the checkpoint folder of an embedded model in bfloat16.

    `params` has the nested parameters of trained towers by name (`vision`, `qformer`, `llm`); a
    tower that is missing gets random weights (`seed`). `history` is stored in `config.json` and
    says by the same names where each tower comes from, as `HISTORY` does. `processor` has the
    variant and the tokenizers; `tokenizer` is a folder that is copied in place of the language
    model's.
    """
    variant = processor.variant
    start = init_params(variant, jax.random.key(seed))
    queries = start["qformer"]
    queries["text_embed"]["embedding"] *= WORD_STD / 0.02
    queries["position_embed"]["embedding"] *= POSITION_STD / 0.02
    leaves = checkpoint.flatten({**start, **params})

    def add(temporary: Path) -> None:
        checkpoint.write_config(temporary, {"variant": variant.to_dict(), "source": history})
        if tokenizer is None:
            processor.llm.save_pretrained(temporary / "tokenizer")
        else:
            shutil.copytree(tokenizer, temporary / "tokenizer")
        processor.qformer.save_pretrained(temporary / "qformer_tokenizer")

    narrow = ((path, np.asarray(leaf).astype(ml_dtypes.bfloat16)) for path, leaf in leaves.items())
    checkpoint.write_tree(folder, narrow, extra=add)


def replace_embedded(source: str | os.PathLike[str], out: Path) -> None:
    """Writes `source` in bfloat16 as the checkpoint folder `out`, replacing an existing one.

    `source` is a checkpoint or a run. The old folder stays until the new one is complete.
    `config.json` says how each part was trained, in place of the folders that `source` was joined
    from.

    Raises:
      ValueError: `out` exists and is no checkpoint folder.
    """
    if out.exists() and not (out / checkpoint.MANIFEST).is_file():
        raise ValueError(
            f"{out.absolute()} is no checkpoint folder (no {checkpoint.MANIFEST}) and is not "
            "replaced: give the name of a new folder"
        )
    model = stored_model(read_source(source))

    def read(paths: Iterable[str]) -> Iterator[tuple[str, np.ndarray]]:
        for path, leaf in model.read(paths):
            yield path, leaf.astype(ml_dtypes.bfloat16)

    draft = out.with_name(f".{out.name}.draft")
    shutil.rmtree(draft, ignore_errors=True)
    narrow = dataclasses.replace(model, facts=HISTORY, read=read)
    write_stored(narrow, draft)
    shutil.rmtree(out, ignore_errors=True)
    draft.rename(out)
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    print(f"written: {out}, {size / 1e6:.1f} MB")

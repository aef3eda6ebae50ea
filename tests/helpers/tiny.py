"""The smallest models that have every part, with batches, a checkpoint folder, a little data."""

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
import tokenizers
from PIL import Image
from tokenizers import models, pre_tokenizers, trainers
from transformers import GPT2Tokenizer

from jax_instructblip import checkpoint
from jax_instructblip.backbones.tokenizers import make_bert, make_llama, make_t5
from jax_instructblip.data.batch import IGNORE
from jax_instructblip.models.variants import (
    LlamaConfig,
    OptConfig,
    ProjectorConfig,
    QFormerConfig,
    T5Config,
    Variant,
    VisionConfig,
)
from tests.helpers.numerics import random_params
from tests.helpers.rows import lay_out

# Sizes differ from each other, so that a shape tells what it belongs to.
LANGUAGE = {
    "llama": LlamaConfig(width=24, heads=3, mlp=40, layers=2, vocab=61, pad_id=60),
    "t5": T5Config(
        width=24, head_width=5, heads=3, mlp=40, encoder_layers=2, decoder_layers=2, vocab=61
    ),
    "opt": OptConfig(width=24, heads=3, mlp=40, layers=2, vocab=61, max_positions=2048, eos_id=4),
}
COLORS = {"red": (220, 30, 30), "green": (20, 160, 40), "blue": (40, 60, 220), "white": (250,) * 3}
QUESTION = "what color is it?"
TEXT = [QUESTION, " ".join(COLORS), "which image is this? number one two three four"]


def tiny_variant(kind: str, **fields: Any) -> Variant:
    vision = VisionConfig(image_size=28, width=22, layers=2, heads=2, mlp=36)
    qformer = QFormerConfig(
        22, 24, width=16, layers=2, heads=4, mlp=28, vocab=50, max_positions=128, queries=7
    )
    if kind == "llava":
        bridge = ProjectorConfig(vision.width, LANGUAGE["llama"].width)
        return Variant("llava", vision, bridge, LANGUAGE["llama"]).replace(**fields)
    if kind == "opt":
        qformer = dataclasses.replace(qformer, instruction_aware=False)
        return Variant("blip2", vision, qformer, LANGUAGE[kind]).replace(**fields)
    return Variant("instructblip", vision, qformer, LANGUAGE[kind]).replace(**fields)


def make_opt(text: list[str]) -> GPT2Tokenizer:
    """A BPE tokenizer of bytes that knows the words of these texts: `<pad>` 1, `</s>` 2."""
    draft = tokenizers.Tokenizer(models.BPE())
    draft.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        special_tokens=["<s>", "<pad>", "</s>", "<unk>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=1,
        show_progress=False,
    )
    draft.train_from_iterator([*text, *(f" {each}" for each in text)], trainer)
    model = json.loads(draft.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    end = dict(bos_token="</s>", eos_token="</s>", unk_token="</s>", pad_token="<pad>")
    return GPT2Tokenizer(vocab=model["vocab"], merges=merges, **end)


def spoil_logits(llm: dict[str, Any], factor: float) -> None:
    """Multiplies the head in these parameters, which may be the token embedding."""
    if "head" in llm:
        llm["head"]["kernel"] *= factor
    else:
        llm["embed"]["embedding"] *= factor


def make_batch(variant: Variant, rows: int = 4, text: int = 9, answer: int = 6, seed: int = 0):
    """Random ids and pixels, of several lengths."""
    rng = np.random.default_rng(seed)
    size = variant.vision.image_size
    ids = lambda vocab, *shape: rng.integers(3, vocab - 1, shape).astype(np.int32)
    mask = np.arange(text) < rng.integers(answer, text + 1, (rows, 1))
    batch = {
        "images": rng.integers(0, 256, (rows, 1, size, size, 3)).astype(np.uint8),
        "qformer_tokens": ids(variant.qformer.vocab, rows, text),
        "qformer_mask": mask,
        "tokens": ids(variant.llm.vocab, rows, text),
        "mask": mask,
    }
    if not variant.reads_instruction and variant.kind == "blip2":
        del batch["qformer_tokens"], batch["qformer_mask"]
    if variant.llm.kind == "t5":
        lengths = rng.integers(1, answer + 1, (rows, 1))
        targets = ids(variant.llm.vocab, rows, answer)
        batch["decoder_tokens"] = np.pad(targets[:, :-1], ((0, 0), (1, 0)))
        batch["targets"] = np.where(np.arange(answer) < lengths, targets, IGNORE).astype(np.int32)
        return lay_out(variant, batch)
    asked = mask & (np.arange(text) >= answer - 2)
    batch["targets"] = np.where(asked, ids(variant.llm.vocab, rows, text), IGNORE).astype(np.int32)
    return lay_out(variant, batch)


def write_base(folder: Path, kind: str = "llama", **fields: Any) -> Path:
    """A checkpoint folder of a tiny variant, with tokenizers that know `TEXT`."""
    llm = {"t5": make_t5, "opt": make_opt}.get(kind, make_llama)(TEXT)
    bert = make_bert(TEXT)
    sizes = {"llm.vocab": len(llm)}
    if kind != "llava":
        sizes["qformer.vocab"] = len(bert)
    if kind in ("llama", "llava"):
        sizes["llm.pad_id"] = llm.pad_token_id
    if kind == "opt":
        sizes["llm.eos_id"] = llm.convert_tokens_to_ids("Ċ")
    variant = tiny_variant(kind, **sizes, **fields)

    def add(partial: Path) -> None:
        checkpoint.write_config(partial, {"variant": variant.to_dict(), "source": {}})
        llm.save_pretrained(partial / "tokenizer")
        if variant.reads_instruction:
            bert.save_pretrained(partial / "qformer_tokenizer")

    leaves = checkpoint.flatten(random_params(variant)).items()
    checkpoint.write_tree(folder, ((k, leaf.astype(np.float32)) for k, leaf in leaves), extra=add)
    return folder


def write_data(folder: Path, name: str = "train.jsonl", count: int = 12) -> Path:
    """JSON lines about plain images of the four colors, slightly different ones."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    lines = []
    for index in range(count):
        color = list(COLORS)[index % len(COLORS)]
        pixels = np.clip(np.array(COLORS[color]) + rng.integers(-15, 16, (20, 30, 3)), 0, 255)
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index}.png")
        lines.append(
            {"image": f"{index}.png", "prompt": QUESTION, "answer": color, "task": "color"}
        )
    path = folder / name
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@contextlib.contextmanager
def compile_cache(folder: Path) -> Iterator[None]:
    """Programs compiled meanwhile are kept in `folder`: runs compile the same step again and again.

    Processes that are started meanwhile share them.
    """
    settings = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": 0,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    names = {name.upper(): str(value) for name, value in settings.items()}
    with mock.patch.dict(os.environ, names):
        for name, value in settings.items():
            jax.config.update(name, value)
        yield
        for name, value in before.items():
            jax.config.update(name, value)

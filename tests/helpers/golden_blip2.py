"""The golden files of BLIP-2's original stages, read by the package's own converter."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_instructblip import checkpoint
from jax_instructblip.conversion.engine import Rule
from jax_instructblip.conversion.lavis import convert_lavis, lavis_entries
from jax_instructblip.conversion.safetensors import open_folder
from jax_instructblip.data.text import TextProcessor
from jax_instructblip.data.tokenizer_files import load_tokenizers
from jax_instructblip.models.variants import (
    IMAGE_MEAN,
    IMAGE_STD,
    OptConfig,
    QFormerConfig,
    T5Config,
    Variant,
    VisionConfig,
)
from tests.helpers.golden import GOLDEN

CASE = "blip2_stage1"
SECOND = ("blip2_opt", "blip2_t5")


def variant(case: str = CASE) -> Variant:
    document = json.loads((GOLDEN / case / "config.json").read_text())
    dims, second = document["dims"], case in SECOND
    llm: Any = _language(document) if second else None
    qformer = QFormerConfig(
        vision_width=dims["vit_w"],
        llm_width=llm.width if second else 0,
        width=dims["q_hidden"],
        layers=dims["q_layers"],
        heads=dims["q_heads"],
        mlp=dims["q_ffn"],
        vocab=document.get("bert_vocab_with_DEC", 30523),
        max_positions=dims["q_max_pos"],
        queries=dims["nq"],
        feature_width=0 if second else dims["embed_dim"],
        instruction_aware=not second,
    )
    vision = VisionConfig(
        image_size=dims["img"],
        patch_size=dims["patch"],
        width=dims["vit_w"],
        layers=dims["vit_d"],
        heads=dims["vit_h"],
        mlp=int(dims["vit_w"] * dims["mlp_ratio"]),
    )
    return Variant("blip2" if second else "blip2_stage1", vision, qformer, llm)


def _language(document) -> OptConfig | T5Config:
    llm = document["llm"]
    if "d_model" in llm:
        return T5Config(
            width=llm["d_model"],
            head_width=llm["d_kv"],
            heads=llm["num_heads"],
            mlp=llm["d_ff"],
            encoder_layers=llm["num_layers"],
            decoder_layers=llm["num_decoder_layers"],
            vocab=document["shapes"]["t5_model.lm_head.weight"][0],
            activation=llm["dense_act_fn"],
        )
    return OptConfig(
        width=llm["hidden_size"],
        heads=llm["num_attention_heads"],
        mlp=llm["ffn_dim"],
        layers=llm["num_hidden_layers"],
        vocab=llm["vocab_size"],
        max_positions=llm["max_position_embeddings"],
        eos_id=document["eos_token_id_generate"],
    )


def tensors(folder, case: str = CASE) -> dict:
    """The tensors of the original by name; `folder` is an empty one."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "model.safetensors").symlink_to(GOLDEN / case / "weights.safetensors")
    return dict(open_folder(folder))


def params(folder, case: str = CASE) -> dict:
    leaves = convert_lavis(tensors(folder, case), variant(case), case)
    return checkpoint.unflatten({path: jnp.asarray(leaf) for path, leaf in leaves})


def text_processor(case: str, **limits: int) -> TextProcessor:
    """Texts of a second stage, by the tokenizer that the original was given."""
    sizes = variant(case)
    folder = GOLDEN / "tokenizers" / sizes.llm.kind
    return TextProcessor(sizes, *load_tokenizers(folder, None, sizes.llm.kind), **limits)


def gradients_like(
    found: dict[str, np.ndarray], tag: str, expected: dict, case: str = CASE
) -> dict:
    """The recorded gradients `tag/NAME` by our paths, moved as the weights are."""
    fake = {name.removeprefix(tag): Recorded(each) for name, each in found.items()}
    made = {}
    for entry in lavis_entries(variant(case)):
        if isinstance(entry, Rule) and all(key in fake for key in entry.keys):
            pieces = [entry.transform.forward(fake[k].read(*entry.part)) for k in entry.keys]
            made[entry.target] = np.stack(pieces) if entry.layers is not None else pieces[0]
    return {path: made[path] for path in made if path in expected}


class Recorded:
    """An array as a tensor of a file."""

    def __init__(self, array):
        self.array, self.shape, self.dtype = array, array.shape, array.dtype

    def read(self, part=0, parts=1):
        return self.array if parts == 1 else np.split(self.array, parts)[part]


def assert_close(found, wanted, limit):
    found, wanted = np.asarray(jax.device_get(found)), np.asarray(wanted)
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() <= limit, np.abs(found - wanted).max()


def normalised(pixels):
    """Pixels [N, 1, H, W, 3] uint8 as transformers takes them: [N, 3, H, W], normalised."""
    mean, std = np.array(IMAGE_MEAN, np.float32), np.array(IMAGE_STD, np.float32)
    return (
        ((pixels.astype(np.float32) / 255 - mean) / std)
        .reshape(-1, *pixels.shape[-3:])
        .transpose(0, 3, 1, 2)
    )

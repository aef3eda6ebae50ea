"""Tiny Hugging Face folders of LLaVA, as transformers saves them, with weights that all count."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers

from tests.helpers.language_folders import MODELS, SIZES, enliven, tokenizer_of

IMAGE, PATCH = 28, 7
PATCHES = (IMAGE // PATCH) ** 2
VISION: dict[str, Any] = dict(
    hidden_size=24,
    intermediate_size=36,
    num_hidden_layers=4,
    num_attention_heads=3,
    image_size=IMAGE,
    patch_size=PATCH,
)
SPARE = 5  # rows of the vocabulary behind those of the tokenizer


def write_llava(
    folder: Path, kind: str, linear: bool, tokenizer: Any = None, positions: int = 128
) -> Any:
    """Writes the folder of a LLaVA with a language model of this kind; returns the torch model.

    `linear` is LLaVA v1's projector: two layers, of which the second changes nothing. `tokenizer`
    is by default that of the kind; the language model has that many `positions`.
    """
    torch = pytest.importorskip("torch", reason="needs torch: pip install -e .[torch]")
    tokenizer = tokenizer or tokenizer_of(kind)
    tokenizer.add_tokens(["<image>", "<pad>"], special_tokens=True)
    tokenizer.pad_token = "<pad>"
    image = tokenizer.convert_tokens_to_ids("<image>")
    text, _ = MODELS[kind]
    sizes = SIZES[kind] | {"max_position_embeddings": positions}
    torch.manual_seed(1)
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**VISION),
        text_config=text(vocab_size=len(tokenizer) + SPARE, **sizes),
        image_token_index=image,
        image_seq_length=PATCHES,
        projector_hidden_act="linear" if linear else "gelu",
    )
    model = transformers.LlavaForConditionalGeneration(config).eval()
    enliven(model, folder)
    if linear:
        second = model.model.multi_modal_projector.linear_2
        second.weight.data = torch.eye(len(second.weight))
        second.bias.data = torch.zeros_like(second.bias)
        model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    side = {"height": IMAGE, "width": IMAGE}
    processor = {
        "image_processor_type": "CLIPImageProcessor",
        "do_center_crop": True,
        "crop_size": side,
        "size": {"shortest_edge": IMAGE},
        "resample": 3,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return model


def draw_conversations(
    rows: int, vocab: int, image: int, width: int = 12, seed: int = 0
) -> tuple[list[list[int]], np.ndarray]:
    """Rows of ids of several lengths, each with one image somewhere between, and their images."""
    rng = np.random.default_rng(seed)
    conversations = []
    for _ in range(rows):
        ids = rng.integers(3, vocab - 10, rng.integers(3, width)).tolist()
        at = int(rng.integers(1, len(ids)))
        conversations.append([*ids[:at], *[image] * PATCHES, *ids[at:]])
    pixels = rng.integers(0, 256, (rows, 1, IMAGE, IMAGE, 3), np.uint8)
    return conversations, pixels


def batch_of(conversations: list[list[int]], images: np.ndarray, image: int) -> dict[str, Any]:
    """Our batch of these rows: slots of the image where its placeholders are, padding behind."""
    longest = max(map(len, conversations))
    ids = np.array([[*row, *[-1] * (longest - len(row))] for row in conversations])
    index = np.broadcast_to(np.arange(longest, dtype=np.int32), ids.shape)
    visual = ids == image
    slots = np.where(visual, np.cumsum(visual, axis=1) - 1, -1).astype(np.int32)
    return {
        "images": images,
        "image_sample": np.ones((len(ids), 1), np.int32),
        "tokens": np.where(ids < 0, 0, ids).astype(np.int32),
        "slots": slots,
        "segments": (ids >= 0).astype(np.int32),
        "positions": index,
        "places": np.stack([np.flatnonzero(row) for row in visual]).astype(np.int32),
        "asked": index,
    }

"""Tiny folders of original LLaVA, of CLIP and of LLaMA, made of a Hugging Face folder of LLaVA."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import hf_folders
from tests.helpers.llava_folders import IMAGE, VISION

CLASSES = {"llama": "LlavaLlamaForCausalLM", "mistral": "LlavaMistralForCausalLM"}
STORED = "model.vision_tower.vision_tower.vision_model."
NAMES = (  # the beginnings of transformers' names of LLaVA's tensors, and the original's
    ("language_model.model.", "model."),
    ("language_model.", ""),
    ("multi_modal_projector.linear_1.", "model.mm_projector.0."),
    ("multi_modal_projector.linear_2.", "model.mm_projector.2."),
    ("vision_tower.", STORED),
)
CROP = {
    "do_center_crop": True,
    "crop_size": {"height": IMAGE, "width": IMAGE},
    "size": {"shortest_edge": IMAGE},
    "resample": 3,
}
NO_WEIGHTS = shutil.ignore_patterns("*.safetensors*", "config.json", "generation_config.json")


def original_tensors(hf: Path) -> dict[str, Any]:
    """The tensors of a Hugging Face folder of LLaVA by the original's names."""
    found, linear = {}, json.loads((hf / "config.json").read_text())["projector_hidden_act"]
    for name, tensor in hf_folders.tensors(hf).items():
        old, new = next(pair for pair in NAMES if name.startswith(pair[0]))
        found[new + name.removeprefix(old)] = tensor.clone()
    if linear == "linear":
        for kind in ("weight", "bias"):
            del found[f"model.mm_projector.2.{kind}"]
            found[f"model.mm_projector.{kind}"] = found.pop(f"model.mm_projector.0.{kind}")
    return found


def write_bins(folder: Path, tensors: dict[str, Any], shards: int = 2) -> None:
    """Writes the shards of `pytorch_model.bin` and their index."""
    torch = pytest.importorskip("torch")
    names = sorted(tensors)
    index = {}
    for number in range(shards):
        name = f"pytorch_model-{number + 1:05}-of-{shards:05}.bin"
        own = names[number::shards]
        torch.save({each: tensors[each] for each in own}, folder / name)
        index |= dict.fromkeys(own, name)
    document = {"metadata": {}, "weight_map": index}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(document))


def write_original(hf: Path, folder: Path, *, stored: bool = False, **changes: Any) -> Path:
    """Writes the original folder of the LLaVA in `hf`; with `stored`, its image tower as well.

    `changes` are of config.json.
    """
    document = json.loads((hf / "config.json").read_text())
    text = document["text_config"]
    config = {
        **{k: v for k, v in text.items() if k not in ("model_type", "architectures")},
        "architectures": [CLASSES[text["model_type"]]],
        "model_type": "llava",
        "mm_vision_tower": "somebody/clip-tiny",
        "mm_hidden_size": VISION["hidden_size"],
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": False,
        "image_aspect_ratio": "pad",
    }
    if document["projector_hidden_act"] == "gelu":
        config["mm_projector_type"] = "mlp2x_gelu"
    shutil.copytree(hf, folder, ignore=NO_WEIGHTS)
    (folder / "preprocessor_config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config | changes))
    tensors = original_tensors(hf)
    write_bins(folder, {n: tensors[n] for n in tensors if stored or not n.startswith(STORED)})
    return folder


def write_clip(hf: Path, folder: Path) -> Path:
    """Writes the folder of CLIP whose image tower is that of the LLaVA in `hf`."""
    torch = pytest.importorskip("torch")
    folder.mkdir()
    tensors = {
        f"vision_model.{name.removeprefix(STORED)}": tensor
        for name, tensor in original_tensors(hf).items()
        if name.startswith(STORED)
    }
    others = {"text_model.embeddings.a": torch.ones(3), "logit_scale": torch.ones(())}
    others |= {"visual_projection.weight": torch.ones(2, 3)}
    hf_folders.save_file(tensors | others, folder / "model.safetensors", {"format": "pt"})
    document = {"model_type": "clip", "vision_config": VISION, "text_config": {}}
    (folder / "config.json").write_text(json.dumps(document))
    (folder / "preprocessor_config.json").write_text(json.dumps(CROP))
    return folder


def write_llama(hf: Path, folder: Path, tensors: dict[str, Any], **changes: Any) -> Path:
    """Writes the folder of the language model of the LLaVA in `hf` with other weights."""
    text = json.loads((hf / "config.json").read_text())["text_config"]
    shutil.copytree(hf, folder, ignore=NO_WEIGHTS)
    rows = len(tensors["model.embed_tokens.weight"])
    config = text | {"architectures": ["LlamaForCausalLM"], "vocab_size": rows} | changes
    (folder / "config.json").write_text(json.dumps(config))
    write_bins(folder, tensors, 1)
    return folder

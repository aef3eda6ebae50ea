"""Original checkpoints of LAVIS (`.pth`) -> our leaves, by the tables of Hugging Face's names.

    visual_encoder.blocks.3.attn.proj.weight        the original
    vision_model.encoder.layers.3.self_attn.projection.weight     the name in our tables

The original's names follow from those of the tables; where it stores a tensor otherwise (two
biases instead of one of three parts) the entry is changed. A file never holds code: it is read
with `weights_only=True`.
"""

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jax_instructblip import checkpoint
from jax_instructblip.conversion.engine import Drop, Entry, Plan, Rule, Zeros, make_plan
from jax_instructblip.conversion.families import LANGUAGES
from jax_instructblip.conversion.safetensors import ConversionError
from jax_instructblip.conversion.tables import heads, qformer, vision
from jax_instructblip.conversion.torch_files import TorchTensor, open_pth
from jax_instructblip.models.variants import Variant
from jax_instructblip.models.vlm import param_shapes

# Where a name of the tables begins so, the original's begins otherwise; the first match counts.
_NAMES = (
    (r"vision_model\.post_layernorm\.", "ln_vision."),
    (r"vision_model\.embeddings\.class_embedding", "visual_encoder.cls_token"),
    (r"vision_model\.embeddings\.position_embedding", "visual_encoder.pos_embed"),
    (r"vision_model\.embeddings\.patch_embedding\.", "visual_encoder.patch_embed.proj."),
    (
        r"vision_model\.encoder\.layers\.(\{i\})\.self_attn\.projection",
        r"visual_encoder.blocks.\1.attn.proj",
    ),
    (r"vision_model\.encoder\.layers\.(\{i\})\.self_attn", r"visual_encoder.blocks.\1.attn"),
    (r"vision_model\.encoder\.layers\.(\{i\})\.layer_norm", r"visual_encoder.blocks.\1.norm"),
    (r"vision_model\.encoder\.layers\.", "visual_encoder.blocks."),
    (r"qformer\.embeddings\.layernorm\.", "Qformer.bert.embeddings.LayerNorm."),
    (
        r"qformer\.encoder\.layer\.(\{i\})\.(attention|crossattention)\.attention\.",
        r"Qformer.bert.encoder.layer.\1.\2.self.",
    ),
    (r"qformer\.", "Qformer.bert."),
    (r"cls\.", "Qformer.cls."),
    (r"(vision|text)_projection\.", r"\1_proj."),
)
_LANGUAGE_MODELS = {"t5": "t5", "llama": "llm", "opt": "opt"}  # `t5_model.`, `t5_proj.`
# Where the layers of a language model begin. A file without them may still hold other names of its
# embedding: the original leaves out the parameters that are frozen, not their second names.
_LANGUAGE_LAYERS = {
    "t5": "encoder.block.",
    "llama": "model.layers.",
    "opt": "model.decoder.layers.",
}
_QKV_BIASES = {0: "q_bias", 2: "v_bias"}  # by the part of the tables' one tensor


@dataclasses.dataclass(frozen=True)
class _ImageTower:
    """An image tower of the original.

    Attributes:
      name: what people call it.
      file: has the tower alone, its names without `visual_encoder.`.
      blocks: begins the names of its blocks.
      attention: of a block, by which a file is known.
      block: all tensors of a block.
      after: tensors behind the blocks, which no model here has, nor the last block.
    """

    name: str
    file: str
    blocks: str
    attention: str
    block: tuple[str, ...]
    after: tuple[str, ...]

    @property
    def first(self) -> str:
        """The tensor by which the file is known."""
        return f"{self.blocks}0.{self.attention}"

    def dropped(self, layers: int) -> list[Entry]:
        """The entries of what follows so many blocks."""
        last = [f"{self.blocks}{layers}.{part}" for part in self.block]
        reason = f"of the whole {self.name}: the features are taken before it"
        return [Drop(VISION + name, reason) for name in (*last, *self.after)]


VISION = "visual_encoder."
_VIT_G = _ImageTower(
    "ViT-g",
    "eva_vit_g.pth",
    "blocks.",
    "attn.qkv.weight",
    (
        *("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"),
        *("attn.q_bias", "attn.v_bias", "attn.qkv.weight", "attn.proj.weight", "attn.proj.bias"),
        *("mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias"),
    ),
    (
        *("norm.weight", "norm.bias", "head.weight", "head.bias"),
        *("fc_norm.weight", "fc_norm.bias"),
    ),
)
_VIT_L = _ImageTower(
    "ViT-L",
    "clip_vit_L.pth",
    "transformer.resblocks.",
    "attn.in_proj_weight",
    (
        *("ln_1.weight", "ln_1.bias", "ln_2.weight", "ln_2.bias"),
        *("attn.in_proj_weight", "attn.in_proj_bias"),
        *("attn.out_proj.weight", "attn.out_proj.bias"),
        *("mlp.c_fc.weight", "mlp.c_fc.bias", "mlp.c_proj.weight", "mlp.c_proj.bias"),
    ),
    ("ln_post.weight", "ln_post.bias", "proj"),
)
_IMAGE_TOWERS = (_VIT_G, _VIT_L)


def lavis_entries(variant: Variant) -> list[Entry]:
    """The entries of all tensors of a variant, under the original's names."""
    tower = _image_tower(variant)
    rules = vision.openai_rules if tower is _VIT_L else vision.rules
    entries = [*rules(variant.vision), *qformer.rules(variant.qformer)]
    if variant.llm is None:
        entries += heads.rules(variant.qformer)
    else:
        entries += LANGUAGES[variant.llm.kind].rules(variant.llm, False)
    kind = "" if variant.llm is None else _LANGUAGE_MODELS[variant.llm.kind]
    named = [each for entry in entries for each in _renamed(entry, kind)]
    return named + tower.dropped(variant.vision.layers)


def convert_lavis(tensors: Mapping[str, Any], variant: Variant, title: str) -> Plan:
    """The leaves of a variant from tensors under the original's names, one at a time.

    `title` names where they are from. Raises ConversionError with all that is missing, left over
    or of another shape; where a whole tower is missing, it says which file has it.
    """
    _refuse_other_tower(tensors, variant, title)
    _refuse_trimmed(tensors, variant, title)
    expected = checkpoint.flatten(param_shapes(variant))
    wrong = f"the tensors of {title} do not fit this model"
    return make_plan(lavis_entries(variant), tensors, expected, wrong)


def open_lavis(path: Path) -> dict[str, TorchTensor]:
    """The tensors of an original file by name.

    `eva_vit_g.pth` and `clip_vit_L.pth` are the image tower alone, with bare names: these get
    `visual_encoder.` in front.

    Raises:
        ConversionError: the file holds more than tensors, or torch is not installed.
    """
    tensors = open_pth(path)
    if any(tower.first in tensors for tower in _IMAGE_TOWERS):
        return {VISION + name: tensor for name, tensor in tensors.items()}
    return tensors


def read_files(paths: Sequence[Path]) -> dict[str, TorchTensor]:
    """The tensors of several original files by name; of two with one name the later file's."""
    tensors: dict[str, TorchTensor] = {}
    for path in paths:
        tensors |= open_lavis(path)
    return tensors


def _refuse_trimmed(tensors: Iterable[str], variant: Variant, title: str) -> None:
    """Raises where a tower is not in a file at all: those are stored apart."""
    begins = lambda word: any(name.startswith(word) for name in tensors)
    lacking, tower = [], _image_tower(variant)
    if not begins(VISION + tower.blocks):
        lacking.append(f"{VISION}*, the image tower: give {tower.file}, too")
    if variant.llm is not None:
        name = f"{_LANGUAGE_MODELS[variant.llm.kind]}_model."
        if not begins(name + _LANGUAGE_LAYERS[variant.llm.kind]):
            lacking.append(f"{name}*, the language model, which is stored apart: give it, too")
    if lacking:
        raise ConversionError(f"{title} was saved without its frozen towers", lacking)


def _refuse_other_tower(tensors: Mapping[str, Any], variant: Variant, title: str) -> None:
    """Raises where a file has the other image tower, or was trained behind it."""
    tower = _image_tower(variant)
    wrong = [
        f"it has the image tower {other.name} ({VISION}{other.blocks}*, as {other.file})"
        for other in _IMAGE_TOWERS
        if other is not tower and VISION + other.first in tensors
    ]
    norm, width = tensors.get("ln_vision.weight"), variant.vision.width
    if norm is not None and norm.shape != (width,):
        wrong.append(
            f"ln_vision.weight is of features of width {norm.shape[0]}: its Q-Former was trained "
            "behind another tower"
        )
    if wrong:
        raise ConversionError(
            f"{title} does not belong to this model, whose image tower is {tower.name} of width "
            f"{width} ({tower.file}): choose the variant that the file is of, or the files of "
            "this one",
            wrong,
        )


def _image_tower(variant: Variant) -> _ImageTower:
    """The tower of a variant: of the two CLIP's alone has a norm before its blocks."""
    return _VIT_L if variant.vision.pre_norm else _VIT_G


def _renamed(entry: Entry, kind: str) -> list[Entry]:
    if entry.source.endswith("self_attn.qkv.bias"):
        if isinstance(entry, Zeros) or not isinstance(entry, Rule):
            return []
        source = _original(entry.source, kind).replace("qkv.bias", _QKV_BIASES[entry.part[0]])
        return [dataclasses.replace(entry, source=source, part=(0, 1))]
    changes: dict[str, Any] = {"source": _original(entry.source, kind)}
    if isinstance(entry, Drop) and entry.same_as:
        changes["same_as"] = _original(entry.same_as, kind)
    return [dataclasses.replace(entry, **changes)]


def _original(name: str, kind: str) -> str:
    """The original's name for one of the tables."""
    name = name.replace("language_model.", f"{kind}_model.", 1)
    name = name.replace("language_projection.", f"{kind}_proj.", 1)
    for pattern, other in _NAMES:
        if found := re.match(pattern, name):
            return found.expand(other) + name[found.end() :]
    return name

"""Converts original checkpoints of LAVIS (`.pth`) with the same tables as Hugging Face folders.

    visual_encoder.blocks.3.attn.proj.weight                      LAVIS's name
    vision_model.encoder.layers.3.self_attn.projection.weight     Hugging Face's, as in our tables

LAVIS's names are derived from those in the tables. Where LAVIS stores a tensor in another way (the
biases of query and value alone instead of one tensor of three parts), the rule is changed. Files
are read with `weights_only=True`, so code in a file is never run.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jax_instructblip import checkpoint
from jax_instructblip.conversion.engine import Drop, Entry, Plan, Rule, Zeros, make_plan
from jax_instructblip.conversion.families import LANGUAGES
from jax_instructblip.conversion.safetensors import ConversionError
from jax_instructblip.conversion.tables import heads, qformer, vision
from jax_instructblip.conversion.torch_files import TorchTensor, merge_files, open_pth
from jax_instructblip.models.variants import Variant
from jax_instructblip.models.vlm import param_shapes

# Start of a name in our tables -> start of LAVIS's name. The first match counts.
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
_LANGUAGE_MODELS = {"t5": "t5", "llama": "llm", "opt": "opt"}  # prefix of `_model.`, `_proj.`
# Start of the names of a language model's layers, by which a file with the model is recognised.
# Other names do not show it: LAVIS leaves frozen parameters out, but not aliases of the embedding.
_LANGUAGE_LAYERS = {
    "t5": "encoder.block.",
    "llama": "model.layers.",
    "opt": "model.decoder.layers.",
}
_QKV_BIASES = {0: "q_bias", 2: "v_bias"}  # part of the tables' qkv tensor -> LAVIS's name


@dataclasses.dataclass(frozen=True)
class _ImageTower:
    """A vision tower as LAVIS's files have it.

    Attributes:
      name: its usual name.
      file: the file with the tower alone, whose tensors lack the prefix `visual_encoder.`.
      blocks: the prefix of the names of its blocks.
      attention: a tensor of a block that the other tower does not have.
      block: the names of all tensors of a block.
      after: the names of the tensors after the blocks; like the last block, not converted.
    """

    name: str
    file: str
    blocks: str
    attention: str
    block: tuple[str, ...]
    after: tuple[str, ...]

    @property
    def first(self) -> str:
        """The name of a tensor that only this tower has."""
        return f"{self.blocks}0.{self.attention}"

    def dropped(self, layers: int) -> list[Entry]:
        """Returns the rules that leave out what follows the first `layers` blocks."""
        last = [f"{self.blocks}{layers}.{part}" for part in self.block]
        reason = f"of the whole {self.name}: the features are taken before it"
        return [Drop(VISION + name, reason) for name in (*last, *self.after)]


VISION, MODEL = "visual_encoder.", "Qformer."
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


def lavis_entries(variant: Variant, *, apart: bool = False) -> list[Entry]:
    """Returns the conversion rules of all tensors of a variant, under LAVIS's names.

    With `apart`, the rules of the language model are left out.
    """
    tower = _image_tower(variant)
    rules = vision.openai_rules if tower is _VIT_L else vision.rules
    entries = [*rules(variant.vision), *qformer.rules(variant.qformer)]
    if variant.llm is None:
        entries += heads.rules(variant.qformer)
    elif not apart:
        entries += LANGUAGES[variant.llm.kind].rules(variant.llm, False)
    kind = "" if variant.llm is None else _LANGUAGE_MODELS[variant.llm.kind]
    named = [each for entry in entries for each in _renamed(entry, kind)]
    return named + tower.dropped(variant.vision.layers)


def convert_lavis(
    tensors: Mapping[str, Any], variant: Variant, title: str, *, apart: bool = False
) -> Plan:
    """Returns a plan that makes a variant's parameters from tensors under LAVIS's names.

    Args:
        tensors: the tensors by LAVIS's names.
        variant: the sizes of the model.
        title: names the files in errors.
        apart: whether the language model comes from elsewhere. The plan then makes no parameters of
            it, and drops its tensors.

    Raises:
        ConversionError: tensors are missing, left over or of another shape. If a whole tower is
            missing, the message says which file has it.
    """
    _refuse_other_tower(tensors, variant, title)
    _refuse_other_size(tensors, variant, title)
    _refuse_trimmed(tensors, variant, title, apart)
    expected = checkpoint.flatten(param_shapes(variant))
    begin = f"{_LANGUAGE_MODELS[variant.llm.kind]}_model." if apart else None
    surplus = [] if begin is None else [name for name in tensors if name.startswith(begin)]
    if apart:
        expected = {path: leaf for path, leaf in expected.items() if not path.startswith("llm/")}
        tensors = {name: tensors[name] for name in tensors.keys() - set(surplus)}
    wrong = f"the tensors of {title} do not fit this model"
    plan = make_plan(lavis_entries(variant, apart=apart), tensors, expected, wrong)
    dropped = plan.dropped | dict.fromkeys(surplus, "the language model has a folder of its own")
    return dataclasses.replace(plan, dropped=dropped)


def open_lavis(path: Path) -> dict[str, TorchTensor]:
    """Returns the tensors of a LAVIS file by name.

    The names in `eva_vit_g.pth` and `clip_vit_L.pth`, which are the vision tower alone, get the
    prefix `visual_encoder.` that they have in a whole model.

    Raises:
        ConversionError: the file cannot be read, holds more than tensors, or torch is not
            installed.
    """
    tensors = open_pth(path)
    if any(tower.first in tensors for tower in _IMAGE_TOWERS):
        return {VISION + name: tensor for name, tensor in tensors.items()}
    return tensors


def read_files(paths: Sequence[Path]) -> dict[str, TorchTensor]:
    """Returns the tensors of several files by name, in any order of the files.

    Together they can make a model of a checkpoint that was saved without its frozen towers.

    Raises:
        ConversionError: a file cannot be read, or two have different values for one tensor: a
            checkpoint that was trained with its image tower has the tower's own weights.
    """
    return merge_files(map(open_lavis, paths))


def _refuse_trimmed(tensors: Iterable[str], variant: Variant, title: str, apart: bool) -> None:
    """Raises a ConversionError if a whole part is missing, since LAVIS saves frozen towers apart.

    With `apart`, the language model may be missing.
    """
    begins = lambda word: any(name.startswith(word) for name in tensors)
    lacking, tower = [], _image_tower(variant)
    if not begins(MODEL):
        raise ConversionError(
            f"{title} has no Q-Former",
            [f"{MODEL}*, which the model's own file has, such as blip2_pretrained.pth: give it"],
        )
    if not begins(VISION + tower.blocks):
        lacking.append(f"{VISION}*, the image tower: give {tower.file}, too")
    if variant.llm is not None and not apart:
        name = f"{_LANGUAGE_MODELS[variant.llm.kind]}_model."
        if not begins(name + _LANGUAGE_LAYERS[variant.llm.kind]):
            lacking.append(f"{name}*, the language model: give its Hugging Face folder (--llm)")
    if lacking:
        raise ConversionError(f"{title} was saved without its frozen towers", lacking)


def _refuse_other_tower(tensors: Mapping[str, Any], variant: Variant, title: str) -> None:
    """Raises a ConversionError if a file has the other vision tower, or was trained with it."""
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


def _refuse_other_size(tensors: Mapping[str, Any], variant: Variant, title: str) -> None:
    """Raises a ConversionError if the table of positions is of images of another size."""
    vision = variant.vision
    for name in ("pos_embed", "positional_embedding"):
        table = tensors.get(VISION + name)
        if table is None or len(table.shape) < 2 or table.shape[-2] == vision.tokens:
            continue
        count, side = table.shape[-2], math.isqrt(max(table.shape[-2] - 1, 0))
        if side**2 + 1 == count:
            raise ConversionError(
                f"{title} is of images of {side * vision.patch_size} pixels a side, the variant of "
                f"{vision.image_size}: choose the variant of that size",
                [f"{VISION}{name} has {count} positions, expected {vision.tokens}"],
            )


def _image_tower(variant: Variant) -> _ImageTower:
    """Returns the tower of a variant: only CLIP's has a norm before its blocks."""
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
    """Returns LAVIS's name of a tensor for its name in the tables."""
    name = name.replace("language_model.", f"{kind}_model.", 1)
    name = name.replace("language_projection.", f"{kind}_proj.", 1)
    for pattern, other in _NAMES:
        if found := re.match(pattern, name):
            return found.expand(other) + name[found.end() :]
    return name

"""The input format of a model without a record of it, by its kind, tokenizer and files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax_instructblip.conversion.hf_config import control_tokens, preprocessor
from jax_instructblip.conversion.llava_config import MARKS, RATIOS
from jax_instructblip.data.chat_templates import CHAT_TEMPLATES
from jax_instructblip.data.input_format import InputFormat
from jax_instructblip.models.variants import Variant

# Templates whose control tokens no other family of language models has, tried in this order.
_BY_TOKENS = ("llama3", "chatml", "mistral_v3")
_BY_FAMILY = {"mistral": "mistral"}  # by `model_type` of the language model
_USUAL = "v1"  # Vicuna and other relatives of LLaMA


def usual_input_format(variant: Variant, tokenizer: Path, facts: Mapping[str, Any]) -> InputFormat:
    """Returns the input format of a model without a record of it.

    Only LLaVA has a chat template: that of its language model. Its images are prepared as the
    folder says from which it comes, else as released: v1 (a linear projector) takes the middle of
    an image, v1.5 pads it to a square.

    Args:
      variant: the model.
      tokenizer: the folder of the language model's tokenizer.
      facts: the origin of the weights, `source` of config.json.
    """
    if variant.kind != "llava":
        return InputFormat()
    return InputFormat(
        _template(tokenizer, facts.get("config", {})),
        image_marks=MARKS if facts.get("mm_use_im_start_end") else None,
        image_crop=_image_crop(variant, facts),
    )


def changed_image_settings(
    variant: Variant, input_format: InputFormat, sides: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns the small files with which a Hugging Face folder says what `image_crop` says.

    `sides` has the content of its present files by name, such as `preprocessor_config`; so has the
    result, which is {} if these prepare images in the same way, or the model is no LLaVA.
    """
    crop = input_format.image_crop
    if variant.kind != "llava" or _image_crop(variant, sides) == crop:
        return {}
    crops = {"do_center_crop": crop != "squash", "do_pad": crop == "pad"}
    settings = preprocessor(variant, crop) | crops
    changed: dict[str, Any] = {"preprocessor_config": sides["preprocessor_config"] | settings}
    processor = sides.get("processor_config", {})
    if inner := processor.get("image_processor"):
        changed["processor_config"] = processor | {"image_processor": inner | settings}
    return changed


def lost_input_format(
    variant: Variant, input_format: InputFormat, tokenizer: Path, facts: Mapping[str, Any]
) -> list[str]:
    """Returns [a sentence about fields of the input format that a folder loses], or [].

    It is a Hugging Face folder, which has no record of them. `tokenizer` is the folder of its
    tokenizer; `facts` has the content of its small files by name: `config`,
    `preprocessor_config` and, if there is one, `processor_config`.
    """
    before = input_format.to_dict()
    after = usual_input_format(variant, tokenizer, facts).to_dict()
    lost = [f"{name} {value!r}" for name, value in before.items() if value != after[name]]
    if not lost:
        return []
    return [
        f"the format does not hold how the model is asked ({', '.join(lost)}): say it again "
        "(--template) when the folder is used or converted"
    ]


def _template(tokenizer: Path, config: Mapping[str, Any]) -> str:
    tokens = control_tokens(tokenizer)
    for name in _BY_TOKENS:
        if tokens.keys() >= set(CHAT_TEMPLATES[name].tokens):
            return name
    section = config.get("text_config") or {}
    return _BY_FAMILY.get(str(section.get("model_type")), _USUAL)


def _image_crop(variant: Variant, facts: Mapping[str, Any]) -> str:
    if crop := RATIOS.get(facts.get("image_aspect_ratio", "")):  # of original LLaVA
        return crop
    stated = dict(facts.get("preprocessor_config", {}))
    stated |= facts.get("processor_config", {}).get("image_processor") or {}
    if stated.get("do_pad"):
        return "pad"
    if stated.get("do_center_crop"):
        return "clip"
    return "clip" if getattr(variant.bridge, "layers", 0) == 1 else "pad"

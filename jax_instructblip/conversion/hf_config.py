"""Turns the config.json of a Hugging Face folder into our model sizes (`Variant`), and checks it.

Sizes are taken as the file has them, and so are values on which releases differ: the eps of the
image norm, T5's activation, the scaling of decoder outputs. Only LLaMA's special ids are taken from
the tokenizer's files instead.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jax_instructblip import files
from jax_instructblip.conversion.config_keys import equal
from jax_instructblip.conversion.families import FAMILIES, Family
from jax_instructblip.conversion.llava_config import is_original, later_version
from jax_instructblip.conversion.safetensors import DEQUANTISE, ConversionError
from jax_instructblip.data.byte_tokenizers import splits_bytes, unnamed_special
from jax_instructblip.data.special_tokens import RELEASED_SPECIAL
from jax_instructblip.files import kind_of
from jax_instructblip.models.released import get_variant, released_name, size_differences
from jax_instructblip.models.variants import IMAGE_MEAN, IMAGE_STD, LlamaConfig, Variant

TOKENIZER_FILES = (
    "tokenizer.json tokenizer_config.json special_tokens_map.json added_tokens.json "
    "spiece.model tokenizer.model vocab.txt vocab.json merges.txt"
).split()
SUPPORTED = ", ".join(family.architecture for family in FAMILIES)
SENTENCEPIECE_IDS = {"<unk>": 0, "<s>": 1, "</s>": 2}  # LLaMA's, where no file lists them


def read_config(folder: Path) -> dict[str, Any]:
    """Returns the config.json of a folder, which names a supported architecture.

    Raises:
        ConversionError: the folder is missing or has no such config.json, or it is a checkpoint of
            this package or original LLaVA.
    """
    wanted = "a Hugging Face folder: config.json, *.safetensors and tokenizers"
    if not folder.is_dir():
        there = "is a file" if folder.exists() else "does not exist"
        raise ConversionError(f"{folder} {there}", [f"expected {wanted}"])
    config = read_json(folder / "config.json")
    if "format" in config and "variant" in config:
        raise ConversionError(
            f"{folder} is converted already", [f"found a checkpoint folder, expected {wanted}"]
        )
    if later := later_version(config):
        raise ConversionError(f"{folder} holds a model that is not supported", later)
    if is_original(config):
        raise ConversionError(
            f"{folder} holds original LLaVA, whose image tower is not in it",
            ["`jax-instructblip convert FOLDER --vision CLIP_FOLDER` makes a checkpoint of both"],
        )
    if find_family(config) is None:
        named = config.get("architectures") or config.get("model_type")
        named = ", ".join(map(str, named)) if isinstance(named, list) else str(named)
        raise ConversionError(
            f"{folder} holds a model whose architecture is not supported",
            [f"found {named:.200}; supported: {SUPPORTED}"],
        )
    return config


def find_family(config: Mapping[str, Any]) -> Family | None:
    """Returns the supported architecture that a config.json names; None if there is none."""
    named = config.get("architectures") or [config.get("model_type")]
    fitting = [f for f in FAMILIES if named in ([f.architecture], [f.model_type])]
    bridge = config.get("qformer_config")
    reads = isinstance(bridge, Mapping) and bridge.get("use_qformer_text_input") is True
    # Two architectures have the model_type "blip-2": the Q-Former reads texts only in the one
    # without a language model.
    told = [f for f in fitting if len(fitting) == 1 or bool(f.languages) != reads]
    return told[0] if told else None


def variant_of(folder: Path, config: Mapping[str, Any]) -> Variant:
    """Returns the variant (model sizes) that `config`, the config.json of `folder`, describes.

    The special ids of LLaMA are read from the tokenizer's files in the folder.

    Raises:
        ConversionError: the config has values that this package does not support; all are listed.
    """
    failures: list[str] = []
    variant = _variant(folder, config, failures)
    if failures or variant is None:
        raise ConversionError(f"{folder}/config.json cannot be held", failures)
    return variant


def _variant(folder: Path, config: Mapping[str, Any], failures: list[str]) -> Variant | None:
    family = find_family(config)
    if family is None:
        named = config.get("architectures")
        failures.append(f"architectures is {named!r:.60}; supported: {SUPPORTED}")
        return None
    failures += quantisation_problems(config)
    kind = _language(family, config, failures) if family.languages else ""
    parts = {"top": family.top, "vision": family.vision.section, "bridge": family.bridge.section}
    if kind:
        parts["llm"] = family.languages[kind].section
    fields: dict[str, dict[str, Any]] = {}
    for name, section in parts.items():
        fields[name], wrong = section.read(config)
        failures += wrong
    llama = bool(kind) and family.languages[kind].config is LlamaConfig
    ids = tokenizer_ids(folder, failures, family.kind) if llama else {}
    if failures or kind is None:
        return None
    for name, id_ in ids.items():
        if id_ >= (vocab := fields["llm"]["vocab"]):
            failures.append(f"the tokenizer's {name} is {id_}, the vocabulary has {vocab}")
    image = config.get("image_token_index") if kind else None
    if image is not None and not (type(image) is int and 0 <= image < fields["llm"]["vocab"]):
        failures.append(
            f"image_token_index is {image!r:.60}, expected an id below the vocab_size "
            f"{fields['llm']['vocab']}"
        )
    try:
        vision = family.vision.config(**fields["vision"])
        llm: Any = family.languages[kind].config(**fields["llm"], **ids) if kind else None
        linked = family.link(vision, llm)
        bridge = family.bridge.config(**fields["bridge"], **fields["top"], **linked)
        variant = Variant(family.kind, vision, bridge, llm)
    except ValueError as error:
        failures.append(str(error))
        return None
    for name, value in family.constant(variant).items():
        if not equal(config.get(name, value), value):
            failures.append(f"{name} is {config[name]!r:.60}; expected {value!r}")
    return variant


def quantisation_problems(config: Mapping[str, Any]) -> list[str]:
    """Returns a list with an error text if a config.json is of quantised weights; else [].

    This package does not read quantised weights.
    """
    quantised = config.get("quantization_config")
    return [] if quantised is None else [f"quantization_config is {quantised!r:.80}: {DEQUANTISE}"]


def _language(family: Family, config: Mapping[str, Any], failures: list[str]) -> str | None:
    """Returns the language model's `model_type`; None, and a failure, if it is not supported."""
    section = config.get("text_config") or {}
    if not isinstance(section, Mapping):
        failures.append(f"text_config is {kind_of(section)}, expected an object")
        return None
    kind = section.get("model_type")
    if not isinstance(kind, str) or kind not in family.languages:
        failures.append(
            f"text_config.model_type is {kind!r:.60}; supported language models: "
            f"{', '.join(sorted(family.languages))}"
        )
        return None
    return kind


def has_tied_embeddings(config: Mapping[str, Any]) -> bool:
    """Tells whether the config lets the language model's head share the token embedding.

    `config` comes from `read_config`, and its model has a language model.
    """
    family, section = find_family(config), config["text_config"]
    assert family is not None  # read_config has checked it
    defaults = family.languages[section["model_type"]].section.defaults
    return {**defaults, **section}["tie_word_embeddings"] is not False


def preprocessor(variant: Variant, image_crop: str = "") -> dict[str, Any]:
    """Returns the content of a preprocessor_config.json that describes our image preparation.

    `image_crop` is a name in `images.CROPS`; with "" InstructBLIP and BLIP-2 squeeze the image
    into a square, and LLaVA crops its middle.
    """
    size = variant.vision.image_size
    square = {"height": size, "width": size}
    image_crop = image_crop or ("clip" if variant.kind == "llava" else "squash")
    how: dict[str, Any] = {"image_processor_type": "BlipImageProcessor", "size": square}
    if image_crop != "squash":
        how = {
            "image_processor_type": "CLIPImageProcessor",
            "size": {"shortest_edge": size},
            "crop_size": square,
            "do_center_crop": True,
        }
    if image_crop == "pad":
        how |= {"image_processor_type": "LlavaImageProcessor", "do_pad": True}
    return {
        **how,
        "do_resize": True,
        "resample": 3,  # PIL's bicubic
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "do_convert_rgb": True,
        "image_mean": list(IMAGE_MEAN),
        "image_std": list(IMAGE_STD),
    }


def check_preprocessor(folder: Path, variant: Variant) -> None:
    """Raises a ConversionError if a folder prepares images in another way than this package.

    The keys are in preprocessor_config.json, or (transformers 5) in an object of
    processor_config.json. LLaVA's may ask for padding (`do_pad`) or not.
    """
    wanted = {"do_center_crop": False, "do_pad": False} | preprocessor(variant)
    del wanted["image_processor_type"]  # several image processors do the same
    failures = []
    for name in ("preprocessor_config.json", "processor_config.json"):
        document = read_json(folder / name) if (folder / name).is_file() else {}
        if name == "processor_config.json":
            document = document.get("image_processor") or {}
        if not isinstance(document, Mapping):
            failures.append(f"{name}: image_processor is {kind_of(document)}, expected an object")
            continue
        pads = variant.kind == "llava" and document.get("do_pad") is True
        failures += [
            f"{name}: {key} is {document[key]!r:.60}; supported: {value!r}"
            for key, value in (wanted | {"do_pad": pads}).items()
            if document.get(key) is not None and not _is_near(document[key], value)
        ]
    if failures:
        raise ConversionError(f"the images of {folder} are prepared otherwise than here", failures)


def _is_near(found: Any, wanted: Any) -> bool:
    """Tells whether values are equal but for rounding; a number counts as height and width."""
    if isinstance(wanted, Mapping):
        sides = found if isinstance(found, Mapping) else dict.fromkeys(wanted, found)
        return sides.keys() == wanted.keys() and all(_is_near(sides[k], wanted[k]) for k in wanted)
    if isinstance(wanted, list):
        alike = isinstance(found, list) and len(found) == len(wanted)
        return alike and all(map(_is_near, found, wanted))
    if isinstance(wanted, bool) or isinstance(found, bool) or not isinstance(found, int | float):
        return equal(found, wanted)
    return math.isclose(found, wanted, rel_tol=1e-4)


def check_variant(folder: Path, variant: Variant, expected: str | Variant) -> None:
    """Raises a ConversionError if `variant`, that of `folder`, has other sizes than `expected`.

    `expected` is a variant or the name of a released model.
    """
    named = isinstance(expected, str)
    differences = size_differences(variant, get_variant(expected) if named else expected)
    if differences:
        fits = released_name(variant)
        hint = f"it fits {fits}" if fits else "no released variant has its sizes"
        other = expected if named else "of the variant that was asked for"
        raise ConversionError(f"{folder} is not {other}; {hint}", differences)


def read_json(path: Path) -> Any:
    """Returns the object in a JSON file; a ConversionError if the file is missing or no JSON."""
    try:
        return files.read_json(path, dict, limit=files.TOKENIZER_LIMIT)
    except (OSError, ValueError) as error:
        raise ConversionError(f"{path} cannot be read", [str(error)]) from error


def tokenizer_ids(
    folder: Path,
    failures: list[str],
    released: str = "",
    settings: Mapping[str, Any] | None = None,
) -> dict[str, int]:
    """Returns `bos_id`, `eos_id` and `pad_id` from the tokenizer's files in a folder.

    The text_config of released folders has 0, 1 and -1, from LLaMA's first port, which are wrong
    here. An id that the files do not tell is left out, so that the default of `LlamaConfig` (the
    released id) applies. If `released`, the model's kind (one of `KINDS`, or ""), is "llava", it is
    that of the token in `RELEASED_SPECIAL`. If `settings` are given, they are used in place of
    tokenizer_config.json. Complaints are appended to `failures`.
    """
    bytewise = splits_bytes(folder)
    documents = _tokenizer_documents(folder)
    if settings is not None:
        documents["tokenizer_config.json"] = dict(settings)
    stated, special = documents["tokenizer_config.json"], documents["special_tokens_map.json"]
    usual = RELEASED_SPECIAL["llava"] if released == "llava" and not bytewise else {}
    wrong: list[str] = []
    known = ({} if bytewise else SENTENCEPIECE_IDS) | _listed_tokens(documents, wrong)
    named: dict[str, str | None] = {}
    for name in ("bos", "eos", "pad"):
        key = f"{name}_token"
        token = stated.get(key) or special.get(key) or usual.get(key)
        content = token.get("content") if isinstance(token, Mapping) else token
        if content is not None and not isinstance(content, str):
            wrong.append(f"{name}_token is {token!r:.60}, expected a token's text")
        else:
            named[name] = content
    if bytewise:
        named |= unnamed_special(named, known)
    failures += wrong
    return {f"{name}_id": known[text] for name, text in named.items() if text in known}


def control_tokens(folder: Path) -> dict[str, int]:
    """Returns {token: id} of the added tokens, special ones too, in a tokenizer's JSON files."""
    return _listed_tokens(_tokenizer_documents(folder), [])


def _tokenizer_documents(folder: Path) -> dict[str, dict[str, Any]]:
    """Returns the objects in a tokenizer's JSON files, by their names; {} for a missing file."""
    return {
        name: read_json(folder / name) if (folder / name).is_file() else {}
        for name in TOKENIZER_FILES
        if name.endswith(".json")
    }


def _listed_tokens(documents: Mapping[str, Any], wrong: list[str]) -> dict[str, int]:
    """Returns the tokens that a tokenizer's files list, with their ids; complains to `wrong`."""
    known: dict[str, int] = {}

    def add(file: str, token: Any, id_: Any) -> None:
        """Notes a token and its id, which is a number or (as a key of an object) its digits."""
        content = token.get("content") if isinstance(token, Mapping) else token
        number = int(id_) if isinstance(id_, str) and id_.isdecimal() else id_
        if isinstance(content, str) and type(number) is int and number >= 0:
            known[content] = number
        else:
            wrong.append(f"{file}: the token {token!r:.60} has the id {id_!r:.30}")

    listed = documents["tokenizer.json"].get("added_tokens") or []
    if isinstance(listed, list):
        for token in listed:
            add("tokenizer.json", token, token.get("id") if isinstance(token, Mapping) else None)
    else:
        wrong.append(f"tokenizer.json: added_tokens is {kind_of(listed)}, expected a list")
    decoder = documents["tokenizer_config.json"].get("added_tokens_decoder") or {}
    if isinstance(decoder, Mapping):
        for id_, token in decoder.items():
            add("tokenizer_config.json", token, id_)
    else:
        wrong.append(
            f"tokenizer_config.json: added_tokens_decoder is {kind_of(decoder)}, expected an object"
        )
    for content, id_ in documents["added_tokens.json"].items():
        add("added_tokens.json", content, id_)
    return known

"""A language model in a Hugging Face folder of its own -> our leaves below `llm/`.

    FOLDER of FlanT5, OPT, LLaMA or Vicuna      config.json, *.safetensors or *.bin, tokenizer
       --the table of the tower, names without `language_model.`-->      leaves, one at a time

BLIP-2 and InstructBLIP change three things of a language model before they freeze it: the special
tokens of its tokenizer (`RELEASED_SPECIAL`), the row of the embedding that a new padding token
takes, and the activation of FlanT5 (GELU by erf, whatever its config.json says).
"""

import dataclasses
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jax_instructblip import checkpoint
from jax_instructblip.conversion.engine import Plan, make_plan
from jax_instructblip.conversion.families import LANGUAGES, Language
from jax_instructblip.conversion.hf_config import TOKENIZER_FILES, read_json
from jax_instructblip.conversion.safetensors import (
    INDEX,
    SINGLE,
    ConversionError,
    Tensor,
    open_folder,
)
from jax_instructblip.conversion.torch_files import open_pth
from jax_instructblip.data.tokenizer_files import (
    RELEASED_SPECIAL,
    SETTINGS,
    load_tokenizers,
)
from jax_instructblip.models.variants import (
    LanguageConfig,
    OptConfig,
    QFormerConfig,
    T5Config,
    Variant,
    VisionConfig,
)
from jax_instructblip.models.vlm import param_shapes

PREFIX = "language_model."  # of the tables' names, which are those of a whole model
BIN, BIN_INDEX = "pytorch_model*.bin", "pytorch_model.bin.index.json"
EMBED, HEAD = "llm/embed/embedding", "llm/head/kernel"  # the leaves with a row for each token
_WORD = "model."  # before the names of a decoder that has its head
END_OF_CAPTION = "\n"  # that BLIP-2 ends an OPT's texts with


@dataclasses.dataclass(frozen=True)
class LanguageFolder:
    """A language model ready to be read; nothing of its weights is in memory yet.

    Attributes:
      folder: where its files are.
      config: its sizes, with the ids and the vocabulary that BLIP-2 gives it.
      plan: its tensors, checked against its config.json.
      notes: how `config` differs from config.json, one sentence each.
    """

    folder: Path
    config: LanguageConfig
    plan: Plan
    notes: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of all leaves, but for the rows that are added."""
        return self.plan.nbytes

    def __iter__(self) -> Iterator[tuple[str, np.ndarray]]:
        """The leaves (path, array), one at a time; added rows are the mean of those that are there.

        An output of the mean is never the largest one, so a padding token is not answered.
        """
        for path, array in self.plan:
            axis = {EMBED: 0, HEAD: 1}.get(path)
            lacking = 0 if axis is None else self.config.vocab - array.shape[axis]
            if axis is not None and lacking > 0:
                mean = array.mean(axis=axis, keepdims=True, dtype=np.float32).astype(array.dtype)
                array = np.concatenate([array, *[mean] * lacking], axis=axis)
            yield path, array
            del array  # the next leaf is made while no name holds this one

    def copy_tokenizer(self, out: Path) -> None:
        """Copies the tokenizer to the folder `out`, which it makes.

        Only the vocabulary of a kind in `RELEASED_SPECIAL`: without settings of its own it is
        loaded with the released special tokens.
        """
        out.mkdir()
        for path in _tokenizer_files(self.folder, self.config.kind):
            shutil.copyfile(path, out / path.name)


def is_language_folder(folder: Path) -> bool:
    """True for a Hugging Face folder of a language model alone."""
    path = folder / "config.json"
    return path.is_file() and read_json(path).get("model_type") in LANGUAGES


def open_language(folder: str | Path) -> LanguageFolder:
    """The language model of a Hugging Face folder, checked but for the values of its weights.

    Raises:
      ConversionError: the folder is of another architecture, or its tensors do not fit its
        config.json, with every reason.
      FileNotFoundError: its tokenizer is missing.
    """
    folder = Path(folder)
    document = read_json(folder / "config.json")
    kind = document.get("model_type")
    if not isinstance(kind, str) or kind not in LANGUAGES:
        raise ConversionError(
            f"{folder} is no language model that is known here",
            [f"model_type is {kind!r:.60}; supported: {', '.join(sorted(LANGUAGES))}"],
        )
    language = LANGUAGES[kind]
    fields, failures = language.section.read({language.section.name: document})
    if failures:
        raise ConversionError(f"{folder}/config.json cannot be held", failures)
    config = language.config(**fields)
    tensors = _tensors(folder, language)
    tied = {**language.section.defaults, **document}["tie_word_embeddings"] is not False
    plan = make_plan(
        language.rules(config, tied and language.head not in tensors),
        tensors,
        _leaf_shapes(config),
        f"the tensors of {folder} do not fit its config.json",
    )
    changed, notes = _as_released(folder, config)
    return LanguageFolder(folder, changed, plan, tuple(notes))


def _tensors(folder: Path, language: Language) -> dict[str, Tensor]:
    """The tensors under the tables' names, which begin with `language_model.`."""
    if (folder / SINGLE).is_file() or (folder / INDEX).is_file():
        tensors: dict[str, Any] = dict(open_folder(folder))
    else:
        tensors = _bin_tensors(folder)
    # Saved without its head, a model's names lack their first word.
    bare = bool(tensors) and not any(name.startswith(_WORD) for name in tensors)
    word = _WORD if bare and language.model_type in ("llama", "opt") else ""
    return {f"{PREFIX}{word}{name}": tensor for name, tensor in tensors.items()}


def _bin_tensors(folder: Path) -> dict[str, Any]:
    """The tensors of `pytorch_model.bin`, or of all shards that its index names."""
    paths = sorted(folder.glob(BIN))
    if (folder / BIN_INDEX).is_file():
        listed = read_json(folder / BIN_INDEX).get("weight_map")
        names = set(listed.values()) if isinstance(listed, Mapping) else set()
        lacking = sorted(str(name) for name in names - {path.name for path in paths})
        if lacking:
            raise ConversionError(f"{folder} lacks files of its index", lacking)
    if not paths:
        raise ConversionError(
            f"{folder} holds no weights", [f"expected {SINGLE}, {INDEX} or {BIN}"]
        )
    tensors: dict[str, Any] = {}
    for path in paths:
        tensors |= open_pth(path)
    return tensors


def _leaf_shapes(config: LanguageConfig) -> dict[str, Any]:
    """The leaves below `llm/` with their shapes; the image side of the model does not matter."""
    vision = VisionConfig(layers=1)
    qformer = QFormerConfig(vision.width, config.width, layers=2, instruction_aware=False)
    shapes = checkpoint.flatten(param_shapes(Variant("blip2", vision, qformer, config)))
    return {path: leaf for path, leaf in shapes.items() if path.startswith("llm/")}


def _tokenizer_files(folder: Path, kind: str) -> list[Path]:
    names = [name for name in TOKENIZER_FILES if not (RELEASED_SPECIAL[kind] and name in SETTINGS)]
    return [folder / name for name in names if (folder / name).is_file()]


def _as_released(folder: Path, config: LanguageConfig) -> tuple[LanguageConfig, list[str]]:
    """The sizes as BLIP-2 changes them, and a sentence about each change."""
    special = RELEASED_SPECIAL[config.kind]
    tokenizer, _ = load_tokenizers(folder, None, config.kind, special=special)
    changes: dict[str, Any] = {}
    notes = []
    if isinstance(config, T5Config):
        if config.activation == "gelu_new":
            changes["activation"] = "gelu"
            notes.append(
                "activation: gelu by erf, as BLIP-2 sets it; config.json means its tanh form"
            )
        return dataclasses.replace(config, **changes), notes
    for name in ("bos", "eos", "pad"):
        changes[f"{name}_id"] = getattr(tokenizer, f"{name}_token_id")
    if isinstance(config, OptConfig):
        end = tokenizer.encode(END_OF_CAPTION, add_special_tokens=False)
        if len(end) != 1:
            raise ConversionError(
                f"the tokenizer of {folder} cannot end a caption",
                [f"a line break has the ids {end}, expected one id"],
            )
        changes["eos_id"] = end[0]
    own = {name: getattr(config, name) for name in changes}
    if own != changes:
        shown = ", ".join(f"{name} {value}" for name, value in changes.items())
        notes.append(f"special tokens as BLIP-2 sets them: {shown}")
    lacking = max(changes.values()) + 1 - config.vocab
    if lacking > 0:
        changes["vocab"] = config.vocab + lacking
        notes.append(f"vocabulary: {lacking} row(s) added to {config.vocab} for special tokens")
    return dataclasses.replace(config, **changes), notes

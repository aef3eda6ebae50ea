"""Reads the Hugging Face folder of a language model alone: FlanT5, OPT, LLaMA or a relative of it.

    config.json, *.safetensors or *.bin, tokenizer  -->  our parameters below `llm/`, one at a time

The conversion tables are those of whole models, where every name begins with `language_model.`.
BLIP-2 and InstructBLIP change three things of a language model before they freeze it: the special
tokens of its tokenizer (`released_special`), the size of its vocabulary if a new padding token
needs an embedding, and the activation of FlanT5 (GELU by erf in place of its tanh form). LLaVA
keeps the model as it is, and names the special tokens that the tokenizer's files do not name.
"""

import dataclasses
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jax_instructblip import checkpoint
from jax_instructblip.conversion.engine import Plan, make_plan
from jax_instructblip.conversion.families import LANGUAGES, Language, with_own_head
from jax_instructblip.conversion.hf_config import (
    TOKENIZER_FILES,
    find_family,
    quantisation_problems,
    read_json,
)
from jax_instructblip.conversion.safetensors import ConversionError, Tensor
from jax_instructblip.conversion.token_rows import with_mean_rows
from jax_instructblip.conversion.tokenizer_settings import complete_settings, write_settings
from jax_instructblip.conversion.weight_files import open_weights
from jax_instructblip.data.tokenizer_files import (
    SETTINGS,
    Tokenizer,
    load_tokenizers,
    released_special,
)
from jax_instructblip.models.variants import (
    LanguageConfig,
    LlamaConfig,
    OptConfig,
    QFormerConfig,
    T5Config,
    Variant,
    VisionConfig,
)
from jax_instructblip.models.vlm import param_shapes

PREFIX = "language_model."  # of the tables' names, which are those of a whole model
EMBED, HEAD = "llm/embed/embedding", "llm/head/kernel"  # the leaves with a row for each token
_WORD = "model."  # before the names of a decoder that has its head
IMAGE_SECTIONS = {"vision_config", "qformer_config"}  # of config.json of an image-text model
TOKENIZER_CONFIG = "tokenizer_config.json"
_SPECIAL = ("bos", "eos", "pad")
END_OF_CAPTION = "\n"  # ends every text of BLIP-2 with OPT


@dataclasses.dataclass(frozen=True)
class LanguageFolder:
    """A checked folder of a language model; iterating yields its parameters, path and array.

    Attributes:
      folder: the folder.
      config: the sizes, with the special ids and the vocabulary that BLIP-2 gives the model.
      plan: the conversion of its tensors; no weight is read yet.
      notes: how `config` differs from config.json, one sentence each.
      released: True with BLIP-2's changes, False as LLaVA has it.
    """

    folder: Path
    config: LanguageConfig
    plan: Plan
    notes: tuple[str, ...]
    released: bool = True

    @property
    def nbytes(self) -> int:
        """Size of all parameters in bytes, without rows added for special tokens."""
        return self.plan.nbytes

    def __iter__(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yields each parameter's path and array, reading one at a time.

        Rows added for special tokens are those of `with_mean_rows`.
        """
        for path, array in self.plan:
            if path in (EMBED, HEAD):
                array = with_mean_rows(array, self.config.vocab, axis=int(path == HEAD))
            yield path, array
            del array  # the next leaf is made while no name holds this one

    def copy_tokenizer(self, out: Path) -> None:
        """Makes the folder `out` with a copy of the tokenizer.

        Settings (tokenizer_config.json) are left out where BLIP-2 sets other special tokens: a bare
        vocabulary is loaded with those of `released_special`. For LLaVA they are completed.
        """
        out.mkdir()
        for path in _tokenizer_files(self.folder, self.config.kind, self.released):
            shutil.copyfile(path, out / path.name)
        if not self.released:
            write_settings(out, complete_settings(self.folder))


def is_language_folder(folder: Path) -> bool:
    """Tells whether a folder's config.json is of a language model alone, perhaps an unknown one.

    False for a checkpoint of this package, whose config.json names no architecture, and for an
    image-text model.
    """
    path = folder / "config.json"
    document = read_json(path) if path.is_file() else {}
    return bool(document.keys() & {"model_type", "architectures"}) and not (
        find_family(document) or IMAGE_SECTIONS & document.keys()
    )


def open_language(folder: str | Path, *, released: bool = True) -> LanguageFolder:
    """Returns the language model of a Hugging Face folder; checks all but the weights' values.

    With `released` it gets BLIP-2's changes. Else it is a language model of LLaVA: LLaMA or one of
    its relatives, with its own special tokens.

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
    if not released and language.config is not LlamaConfig:
        known = ", ".join(name for name in LANGUAGES if LANGUAGES[name].config is LlamaConfig)
        raise ConversionError(
            f"{folder} is no language model of LLaVA", [f"model_type is {kind}; supported: {known}"]
        )
    fields, failures = language.section.read({language.section.name: document})
    failures += quantisation_problems(document)
    if failures:
        raise ConversionError(f"{folder}/config.json cannot be held", failures)
    tensors = language_tensors(folder, language)
    config = with_own_head(language.config(**fields), language.head in tensors)
    tied = {**language.section.defaults, **document}["tie_word_embeddings"] is not False
    plan = make_plan(
        language.rules(config, tied and language.head not in tensors),
        tensors,
        _leaf_shapes(config),
        f"the tensors of {folder} do not fit its config.json",
    )
    changed, notes = (_as_released if released else _as_found)(folder, config)
    return LanguageFolder(folder, changed, plan, tuple(notes), released)


def language_tensors(folder: Path, language: Language) -> dict[str, Tensor]:
    """Returns the folder's tensors under the tables' names, which begin with `language_model.`.

    `language` is the row of `LANGUAGES` for the model.
    """
    tensors = open_weights(folder)
    # Saved as the inner model, possibly with its head, a model's names lack their first word.
    bare = bool(tensors) and not any(name.startswith(_WORD) for name in tensors)
    word = _WORD if bare and language.config is not T5Config else ""
    named = lambda name: PREFIX + ("" if PREFIX + name == language.head else word) + name
    return {named(name): tensor for name, tensor in tensors.items()}


def _leaf_shapes(config: LanguageConfig) -> dict[str, Any]:
    """Returns the shape of each parameter below `llm/`, by its path."""
    vision = VisionConfig(layers=1)
    qformer = QFormerConfig(vision.width, config.width, layers=2, instruction_aware=False)
    shapes = checkpoint.flatten(param_shapes(Variant("blip2", vision, qformer, config)))
    return {path: leaf for path, leaf in shapes.items() if path.startswith("llm/")}


def _tokenizer_files(folder: Path, kind: str, released: bool) -> list[Path]:
    special = released and released_special(folder, kind)
    names = [name for name in TOKENIZER_FILES if not (special and name in SETTINGS)]
    return [folder / name for name in names if (folder / name).is_file()]


def _as_released(folder: Path, config: LanguageConfig) -> tuple[LanguageConfig, list[str]]:
    """Returns the config with BLIP-2's changes, and a sentence about each change."""
    special = released_special(folder, config.kind)
    tokenizer, _ = load_tokenizers(folder, None, config.kind, special=special)
    extra = {getattr(tokenizer, f"{name}_token_id") for name in _SPECIAL}
    _check_vocabulary(folder, config, tokenizer, extra)
    changes: dict[str, Any] = {}
    notes = []
    if isinstance(config, T5Config):
        if config.activation == "gelu_new":
            changes["activation"] = "gelu"
            notes.append(
                "activation: gelu by erf, as BLIP-2 sets it; config.json means its tanh form"
            )
        return dataclasses.replace(config, **changes), notes
    for name in _SPECIAL:
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


def _as_found(folder: Path, config: LanguageConfig) -> tuple[LanguageConfig, list[str]]:
    """Returns the config with the ids of the tokenizer's own special tokens, and sentences."""
    settings = complete_settings(folder) or {}
    before = read_json(folder / TOKENIZER_CONFIG) if (folder / TOKENIZER_CONFIG).is_file() else {}
    special = {
        name: token
        for name, token in settings.items()
        if name.endswith("_token") and isinstance(token, str) and not before.get(name)
    }
    tokenizer, _ = load_tokenizers(folder, None, config.kind, special=special)
    _check_vocabulary(folder, config, tokenizer, set())
    ids: dict[str, Any] = {
        f"{name}_id": getattr(tokenizer, f"{name}_token_id") for name in _SPECIAL
    }
    if absent := [name.removesuffix("_id") for name, id_ in ids.items() if id_ is None]:
        raise ConversionError(
            f"the tokenizer of {folder} cannot be used",
            [f"it has no {name} token" for name in absent],
        )
    shown = ", ".join(f"{name} {token}" for name, token in special.items())
    notes = [f"special tokens that the tokenizer does not name: {shown}"] if special else []
    return dataclasses.replace(config, **ids), notes


def _check_vocabulary(
    folder: Path, config: LanguageConfig, tokenizer: Tokenizer, extra: set[Any]
) -> None:
    """Raises a ConversionError if the tokenizer has ids without a row, other than `extra`."""
    surplus = {id_ for id_ in tokenizer.get_vocab().values() if id_ >= config.vocab} - extra
    if surplus:
        raise ConversionError(
            f"the tokenizer of {folder} is of another model",
            [
                f"it has ids up to {max(surplus)}, config.json a vocab_size of {config.vocab}: "
                "get both from one release"
            ],
        )

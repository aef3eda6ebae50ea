"""Joins `.pth` files of LAVIS, and the language model's folder, to a whole model.

    blip2_pretrained.pth + eva_vit_g.pth                                     first stage
    instruct_blip_vicuna7b_trimmed.pth + eva_vit_g.pth + folder of Vicuna    InstructBLIP

LAVIS does not save frozen weights: the vision tower is in a file of its own, the language model in
its Hugging Face folder. The files do not tell the sizes of the model, so the caller names them.
"""

import dataclasses
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jax_instructblip import stores
from jax_instructblip.conversion.engine import Plan
from jax_instructblip.conversion.language_folder import LanguageFolder, open_language
from jax_instructblip.conversion.lavis import convert_lavis, read_files
from jax_instructblip.conversion.safetensors import ConversionError
from jax_instructblip.conversion.stored_model import tokenizers
from jax_instructblip.conversion.torch_files import TorchTensor
from jax_instructblip.data.input_format import InputFormat
from jax_instructblip.data.tokenizer_files import load_qformer_tokenizer
from jax_instructblip.models.released import get_variant, size_differences
from jax_instructblip.models.variants import Variant

SUFFIXES = (".pth", ".pt")


@dataclasses.dataclass(frozen=True)
class OriginalLeaves:
    """The parameters of a model of `.pth` files; iterating makes (path, array), one at a time.

    Those of the files (`plan`) come first, then those of the language model's folder, if any.
    """

    plan: Plan
    language: LanguageFolder | None

    @property
    def nbytes(self) -> int:
        """Size of all parameters in bytes."""
        return self.plan.nbytes + (self.language.nbytes if self.language else 0)

    @property
    def dropped(self) -> dict[str, str]:
        """Tensors of the files that fill no parameter, each with the reason."""
        return self.plan.dropped

    def __iter__(self) -> Iterator[tuple[str, np.ndarray]]:
        """Yields each parameter's path and array."""
        yield from self.plan
        if self.language is not None:
            yield from self.language


class Original(NamedTuple):
    """A checked model of `.pth` files; no weight is read yet.

    Attributes:
      variant: the sizes of the model.
      source: facts about the files, for our config.json.
      leaves: the parameters; iterating makes (path, array), one at a time.
      bert: the folder of the Q-Former's tokenizer, if it was given.
      input_format: how prompts and images are put to the model.
    """

    variant: Variant
    source: dict[str, Any]
    leaves: OriginalLeaves
    bert: Path | None
    input_format: InputFormat = InputFormat()

    def copy_tokenizers(self, out: Path) -> list[str]:
        """Copies the tokenizers to folders in `out`; returns the names of those that are missing.

        The names are those of `stored_model.tokenizers`.
        """
        absent = []
        for name in tokenizers(self.variant):
            if name == "tokenizer" and self.leaves.language is not None:
                self.leaves.language.copy_tokenizer(out / name)
            elif name == "qformer_tokenizer" and self.bert is not None:
                load_qformer_tokenizer(self.bert).save_pretrained(out / name)
            else:
                absent.append(name)
        return absent


def original_files(source: Any) -> list[Path]:
    """Returns `source` as a list of paths if it is one or several `.pth` files, [] for a folder.

    `source` is a path or a sequence of paths. A ConversionError if only some are `.pth` files.
    """
    paths = [source] if isinstance(source, str | os.PathLike) else list(source)
    wrong = [path for path in paths if not str(path).endswith(SUFFIXES)]
    if len(wrong) == len(paths) == 1:
        return []
    if wrong or not paths:
        raise ConversionError(
            "expected one Hugging Face folder, or original files (.pth)",
            [f"found {', '.join(map(str, paths)) or 'nothing'}"],
        )
    return [stores.input_path(path, "file") for path in paths]


def read_original(
    files: Sequence[Path],
    variant: str | Variant | None,
    *,
    llm: str | os.PathLike[str] | None = None,
    bert: str | os.PathLike[str] | None = None,
) -> Original:
    """Returns the model that `.pth` files make together; checks all but the weights' values.

    Args:
      files: one model's file and those of the towers that were saved apart.
      variant: its sizes, or the name of a released model.
      llm: the Hugging Face folder of its language model.
      bert: a folder with BERT's tokenizer (bert-base-uncased), for a Q-Former that reads text.

    Raises:
      ConversionError: with every reason why these are no whole model.
      FileNotFoundError: a file or a tokenizer is missing.
    """
    title = " + ".join(path.name for path in files)
    if variant is None:
        raise ConversionError(
            f"{title} does not say which model it is",
            ["name it: --variant, such as blip2-stage1 or instructblip-vicuna-7b"],
        )
    sizes = get_variant(variant) if isinstance(variant, str) else variant
    language = None
    if llm is not None:
        folder = stores.input_path(llm, "llm")
        if sizes.llm is None:
            raise ConversionError(
                f"{title} has no language model", [f"{folder} was given as one: leave it out"]
            )
        language = open_language(folder)
        sizes = _with_language(sizes, language)
    tensors = read_files(files)
    plan = convert_lavis(tensors, sizes, title, apart=language is not None)
    found = None if bert is None else stores.input_path(bert, "bert")
    if found is not None:
        load_qformer_tokenizer(found)  # what is missing is told before gigabytes are written
    source = {
        "kind": "lavis",
        "dtypes": dict(Counter(tensor.dtype.name for tensor in tensors.values())),
        "files": _file_sizes(tensors),
        "tied_head": False,
        "dropped": plan.dropped,
    }
    if language is not None:
        source |= {"language_model": str(language.folder), "changes": list(language.notes)}
    leaves = OriginalLeaves(plan, language)
    return Original(sizes, source, leaves, found)


def _with_language(sizes: Variant, language: LanguageFolder) -> Variant:
    """Returns the variant with the folder's special ids; raises if the folder has other sizes."""
    own: Any = sizes.llm
    if type(own) is not type(language.config):
        wrong = [f"llm.kind: expected {own.kind}, found {language.config.kind}"]
    elif own.width != language.config.width:
        wrong = [f"llm.width: expected {own.width}, found {language.config.width}"]
    else:
        changed = dataclasses.replace(sizes, llm=language.config)
        wrong = size_differences(changed, sizes)
        if not wrong:
            return changed
    raise ConversionError(f"{language.folder} is not the language model of this variant", wrong)


def _file_sizes(tensors: Mapping[str, TorchTensor]) -> dict[str, dict[str, int]]:
    return {
        path.name: {"bytes": path.stat().st_size}
        for path in sorted({tensor.file for tensor in tensors.values()})
    }

"""Opens the sources of an original LLaVA: a whole folder, a delta and its base, or a projector.

Each gives the tensors of the language model and the projector under the original's names.
"""

import dataclasses
import logging
from pathlib import Path
from typing import Any

import numpy as np

from jax_instructblip.conversion import llava_config
from jax_instructblip.conversion.engine import FLOATS, collapse
from jax_instructblip.conversion.families import LANGUAGES
from jax_instructblip.conversion.hf_config import read_json
from jax_instructblip.conversion.language_folder import language_tensors
from jax_instructblip.conversion.llama_sections import SECTIONS
from jax_instructblip.conversion.llava_config import MARKS
from jax_instructblip.conversion.llava_names import EMBED, HEAD, PROJECTOR
from jax_instructblip.conversion.safetensors import ConversionError
from jax_instructblip.conversion.tables.llama import PREFIX
from jax_instructblip.conversion.token_rows import Sum, TokenRows, WithMeanRows
from jax_instructblip.conversion.torch_files import open_pth
from jax_instructblip.conversion.weight_files import describe_files, has_weights, open_weights
from jax_instructblip.data.tokenizer_files import load_tokenizers

BIN, ADAPTER = "mm_projector.bin", "adapter_config.json"
PAD, PATCH = "[PAD]", "<im_patch>"
CHECKED = (
    "model.layers.0.self_attn.q_proj.weight"  # whose sums tell whether a base is the right one
)
ROUNDED_ABOVE = 0.1  # share of the sums, see `Sum.rounded_share`
_WORD = "mm_projector."
_BUFFER = "rotary_emb.inv_freq"  # of old folders: no weight
_TOWER = "model.vision_tower."


@dataclasses.dataclass(frozen=True)
class LlavaSource:
    """The language model and the projector of an original LLaVA; no weight is read yet.

    Attributes:
      path: the folder, or the file of the projector.
      config: the content of a config.json: keys of the language model, and those of the image.
      kind: the language model, a key of `llama_sections.SECTIONS`.
      tensors: the tensors, which are not read yet, by the original's names.
      tokenizer: the folder that has the tokenizer.
      facts: for our config.json, where the tensors came from.
      added: tokens that the tokenizer lacks, by id.
      dropped: the reasons for files that are left out, by name.
    """

    path: Path
    config: dict[str, Any]
    kind: str
    tensors: dict[str, Any]
    tokenizer: Path
    facts: dict[str, Any]
    added: dict[int, str] = dataclasses.field(default_factory=dict)
    dropped: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def has_head(self) -> bool:
        """Tells whether the language model has a head beside its token embedding."""
        return HEAD in self.tensors


def open_whole(folder: Path, config: dict[str, Any]) -> LlavaSource:
    """Returns the source of a folder that holds the language model and the projector.

    `config` is the folder's config.json.

    Raises:
      ConversionError: its class is unknown, or files are missing or damaged.
    """
    names = config.get("architectures")
    known = [each for each in llava_config.LANGUAGES if names == [each]]
    if not known:
        raise ConversionError(
            f"{folder} holds a class of LLaVA that is not supported",
            [f"architectures is {names!r:.80}; supported: {', '.join(llava_config.LANGUAGES)}"],
        )
    if (folder / ADAPTER).is_file() and not has_weights(folder):
        raise ConversionError(
            f"{folder} holds a LoRA adapter, no whole weights",
            [f"{ADAPTER} is there: merge the adapter with its model in the original code first"],
        )
    tensors = open_weights(folder)
    facts = {"files": describe_files(tensors)}
    dropped = {}
    if (folder / BIN).is_file():
        dropped[BIN] = "the weights of the folder have a projector"
    kind = llava_config.LANGUAGES[known[0]]
    return LlavaSource(folder, config, kind, tensors, folder, facts, dropped=dropped)


def add_base(delta: LlavaSource, folder: Path) -> LlavaSource:
    """Returns the source whose tensors are a delta and its base, the LLaMA in `folder`, added up.

    Warns if many sums are rounded, as with a base that the delta was not made with. No more than
    a warning: a difference that was rounded to a smaller dtype itself has such sums, too.

    Raises:
      ConversionError: the base is another model: of another kind or size.
    """
    _, base = _open_language(folder, delta.kind)
    failures: list[tuple[str, str]] = []
    tensors = dict(delta.tensors)
    for name, tensor in delta.tensors.items():
        if name.startswith((PROJECTOR, _TOWER)) or name.endswith(_BUFFER):
            continue
        other = base.get(name)
        if other is None:
            failures.append((name, "the base has no such tensor"))
        elif not _fits(name, tensor.shape, other.shape):
            shapes = f"{list(tensor.shape)}, the base {list(other.shape)}"
            failures.append((name, f"the delta has the shape {shapes}"))
        elif other.dtype not in FLOATS:
            failures.append((name, f"the base has the dtype {other.dtype}, expected a float"))
        else:
            tensors[name] = Sum(tensor, other)
    for name in base.keys() - delta.tensors.keys():
        if not name.endswith(_BUFFER):
            failures.append((name, "the delta has no such tensor"))
    if failures:
        raise ConversionError(f"{folder} is not the base of {delta.path}", collapse(failures))
    share = tensors[CHECKED].rounded_share() if CHECKED in tensors else 0.0
    if share > ROUNDED_ABOVE:
        logging.getLogger(__name__).warning(
            "%.0f%% of the checked sums of %s and %s are rounded, expected less than %.0f%%: is "
            "this the LLaMA that the delta was made with? The answers of another one are noise",
            *(100 * share, delta.path, folder, 100 * ROUNDED_ABOVE),
        )
    about = {"folder": str(folder), "files": describe_files(base), "rounded_sums": share}
    facts = {**delta.facts, "base": about}
    return dataclasses.replace(delta, tensors=tensors, facts=facts)


def _fits(name: str, delta: tuple[int, ...], base: tuple[int, ...]) -> bool:
    """Tells whether a delta can be added to a base; tables of tokens may have more rows."""
    more = name in (EMBED, HEAD) and delta[1:] == base[1:] and delta[0] > base[0]
    return delta == base or more


def open_projector(path: Path, config: dict[str, Any], llm: Path) -> LlavaSource:
    """Returns the source of a projector's file and the folder of its language model.

    Args:
      path: the file, which may also hold embeddings of `<im_start>` and `<im_end>`.
      config: the config.json beside it, or {}.
      llm: the Hugging Face folder of LLaMA or a relative of it.

    Raises:
      ConversionError: a file holds no projector, or the rows are of another language model.
    """
    document, tensors = _open_language(llm)
    own, rows, others = {}, None, []
    for name, tensor in open_pth(path).items():
        if _WORD in name:
            own[PROJECTOR + name.partition(_WORD)[2]] = tensor
        elif name.endswith("embed_tokens.weight"):
            rows = tensor
        else:
            others.append(name)
    if others or not own:
        found = ", ".join(others[:5]) or "nothing of it"
        raise ConversionError(
            f"{path} is no file of a projector alone",
            [f"found {found}; expected {PROJECTOR}* and, at most, {EMBED}"],
        )
    image = {k: v for k, v in config.items() if k.startswith(llava_config.IMAGE_KEYS)}
    two = any(name.startswith(f"{PROJECTOR}0.") for name in own)
    kind = document["model_type"]
    joined = {
        **document,
        "architectures": [name for name, each in llava_config.LANGUAGES.items() if each == kind],
        "model_type": f"llava_{kind}",
        "mm_projector_type": "mlp2x_gelu" if two else "linear",
        **image,
    }
    facts = {
        "files": describe_files(own),
        "language_model": {"folder": str(llm), "files": describe_files(tensors)},
    }
    source = LlavaSource(path, joined, kind, {**tensors, **own}, llm, facts)
    if rows is not None:
        return _with_rows(source, rows)
    if image.get("mm_use_im_start_end") is True:
        raise ConversionError(
            f"{path} lacks rows of the token embedding",
            [f"mm_use_im_start_end is True, but there is no {EMBED} with those of {MARKS}"],
        )
    return source


def _open_language(folder: Path, kind: str = "") -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns config.json and tensors of a language model's folder; one of `kind`, if given."""
    document = read_json(folder / "config.json")
    found, supported = document.get("model_type"), [kind] if kind else list(SECTIONS)
    if found not in supported:
        raise ConversionError(
            f"{folder} holds no language model of LLaVA",
            [f"model_type is {found!r:.60}; supported: {', '.join(supported)}"],
        )
    named = language_tensors(folder, LANGUAGES[found])
    return document, {name.removeprefix(PREFIX): tensor for name, tensor in named.items()}


def _with_rows(source: LlavaSource, rows: Any) -> LlavaSource:
    """Returns the source with the token embedding of the projector's file.

    The file has the whole table, as trained, or the rows of `<im_start>` and `<im_end>` alone.
    Rows of the head for new tokens hold the mean of the others.
    """
    tensors, embed = dict(source.tensors), source.tensors[EMBED]
    patch = [PATCH] * (source.config.get("mm_use_im_patch_token") is not False)
    before, count = embed.shape[0], rows.shape[0]
    total = before + len(patch) + len(MARKS) if count == len(MARKS) else count
    names = {0: [], len(patch) + 2: [*patch, *MARKS], len(patch) + 3: [PAD, *patch, *MARKS]}
    new = names.get(total - before)
    failures = []
    if rows.shape[1:] != embed.shape[1:] or rows.dtype not in FLOATS or new is None:
        failures.append(
            f"{EMBED}: {list(rows.shape)} {rows.dtype} in the file, {list(embed.shape)} "
            f"{embed.dtype} in the language model; expected {' or '.join(map(str, names))} rows "
            f"more, or {len(MARKS)} rows, of the same width"
        )
    elif count == total and not _are_equal(rows, embed, min(before, total - len(MARKS))):
        failures.append(f"{EMBED}: rows of the file differ from those of the language model")
    else:
        failures += _tokenizer_problems(source, before, new)
    if failures or new is None:
        raise ConversionError(
            f"{source.path} was not trained on the language model {source.tokenizer}", failures
        )
    tensors[EMBED] = rows if count == total else TokenRows(embed, total, rows)
    if HEAD in tensors:
        tensors[HEAD] = WithMeanRows(tensors[HEAD], total)
    added = dict(enumerate(new, start=before))
    config = {**source.config, "vocab_size": total, "mm_use_im_start_end": True}
    return dataclasses.replace(source, tensors=tensors, config=config, added=added)


def _are_equal(rows: Any, embed: Any, count: int) -> bool:
    """Tells whether the first rows of two tables are equal, rounded to the dtype of `rows`."""
    with np.errstate(over="ignore", invalid="ignore"):
        wanted = embed.read()[:count].astype(rows.dtype)
    return np.array_equal(rows.read()[:count].view(np.uint8), wanted.view(np.uint8))


def _tokenizer_problems(source: LlavaSource, rows: int, new: list[str]) -> list[str]:
    """Returns complaints about a tokenizer whose next free id is not that of the first new row."""
    tokenizer, _ = load_tokenizers(source.tokenizer, None, "llama", released="llava")
    vocab = tokenizer.get_vocab()
    if new and len(vocab) != rows:
        return [f"the tokenizer has {len(vocab)} tokens, the embedding {rows} rows"]
    lacking = [] if new else [mark for mark in MARKS if mark not in vocab]
    return [f"neither tokenizer nor rows are of {mark}" for mark in lacking]

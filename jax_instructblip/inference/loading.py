"""The model behind a path or a name: its folder, its variant, its parameters.

A path or name is one of these:

    Hugging Face folder   config.json with `architectures`, model*.safetensors, tokenizers
    checkpoint folder     config.json with `format`, manifest.json, params/, tokenizers
    run directory         checkpoints/<step>/: the trained weights; others come from its base, a
                          checkpoint folder
    embedded name         the name of a checkpoint folder inside the package
"""

import dataclasses
import difflib
import functools
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jax_instructblip import checkpoint, stores
from jax_instructblip.checkpoint.step_meta import META, check_manifest, read_meta
from jax_instructblip.conversion.hf_folder import convert_hf
from jax_instructblip.conversion.positions import fit_positions, with_positions
from jax_instructblip.conversion.stored_model import StoredModel, read_stored_model, tuned
from jax_instructblip.data.input_format import KEY, InputFormat
from jax_instructblip.files import read_json
from jax_instructblip.models import quantise as quantisation
from jax_instructblip.models.variants import DTYPES, QUANTISED, Variant
from jax_instructblip.models.vlm import DECODERS, param_shapes, unstack_decoder
from jax_instructblip.parallel import rules
from jax_instructblip.parallel.mesh import is_split, replicated

EMBEDDED = Path(__file__).resolve().parents[1] / "embedded"

# Kinds of devices on which a loop over new tokens would copy each layer's weights out of their
# stack before it multiplies with them (benchmarks/results/gpu_programs.json).
UNSTACKED = ("cpu", "gpu", "cuda")
Reader = TypeVar("Reader")

LIMITS = ("qformer_limit", "prompt_limit", "answer_limit")  # fields of TextProcessor

KINDS = (
    "a Hugging Face folder (config.json with `architectures`)",
    "a checkpoint folder (config.json with `format`, manifest.json)",
    "a run directory (checkpoints/<step>/meta.json)",
)


@dataclasses.dataclass(frozen=True)
class Source:
    """A model that was found by its path or name, before its weights are read.

    A run is a training directory of this package, its base the checkpoint folder that it tunes.

    Attributes:
      folder: a Hugging Face folder or a checkpoint folder, with the tokenizers; of a run, its base.
      variant: the sizes of the model; of a run, the run's own.
      leaves: of a Hugging Face folder, the pairs (path, array) of its converted leaves, made one by
        one; else None.
      step: of a run, its folder `checkpoints/<step>`, whose weights replace those of `folder`.
      limits: the recorded limits of tokens of each text (fields of TextProcessor), or {}.
      facts: the origin of the weights, which config.json has as `source`.
      input_format: how prompts and images are put to the model.
    """

    folder: Path
    variant: Variant
    leaves: Iterable[tuple[str, np.ndarray]] | None = None
    step: Path | None = None
    limits: Mapping[str, int] = dataclasses.field(default_factory=dict)
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    input_format: InputFormat = InputFormat()


def read_dtype(dtype: Any) -> np.dtype:
    """The dtype to compute in, from a dtype or its name; for None bfloat16, on a CPU float32.

    Raises:
        ValueError: the dtype is not one of `DTYPES`.
    """
    if dtype is None:
        dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    try:
        known = jnp.dtype(dtype)
    except TypeError:
        known = None
    if known is None or known.name not in DTYPES:
        raise ValueError(f"dtype is {str(dtype)[:60]!r}, expected one of {', '.join(DTYPES)}")
    return known


def describe_dtype(dtype: Any, form: str | None) -> str:
    """The text that records how a model computes, such as `bfloat16, int8 weights`.

    `form` is that of quantised weights, or None.
    """
    return str(dtype) if form is None else f"{dtype}, {form} weights"


def resolve_checkpoint(path: str | os.PathLike) -> Path:
    """The local folder for a path, an address in an object store, or the name of an embedded model.

    The folder at an address is copied to this machine; that of a training run without its weights.

    Raises:
        FileNotFoundError: there is no such folder or name.
    """
    folder = stores.input_checkpoint(path)
    if folder.is_dir():
        return folder
    names = sorted(each.name for each in EMBEDDED.glob("*") if (each / "config.json").is_file())
    if os.fspath(path) in names:
        return EMBEDDED / path
    near = difflib.get_close_matches(os.fspath(path), names, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    reason = "is a file" if folder.exists() else "does not exist"
    raise FileNotFoundError(
        f"no checkpoint {os.fspath(path)!r}: the folder {folder.absolute()} {reason}, and the "
        f"embedded checkpoints are {', '.join(names) or 'none'}{hint}. Give one of these names, or "
        f"{', '.join(KINDS[:-1])} or {KINDS[-1]}"
    )


def read_source(path: str | os.PathLike) -> Source:
    """The `Source` for a folder, an address in an object store or an embedded name.

    Reads configuration only, no weights. A training run stands for its latest checkpoint.

    Raises:
        FileNotFoundError: there is no such folder or name, or the run has saved nothing yet.
        ValueError: the folder is of no known kind, or of a newer format.
        CheckpointError: the checkpoint folder that a run tuned has changed since.
    """
    folder = resolve_checkpoint(path)
    if (folder / META).is_file():  # one step of a run, chosen by its folder
        return _run_source(folder)
    if (folder / "checkpoints").is_dir():
        return _run_source(_latest_step(folder / "checkpoints"))
    if (folder / checkpoint.MANIFEST).is_file():
        model = read_stored_model(folder)
        limits = _check_limits(folder, model.limits)
        asked = {"facts": model.facts, "input_format": model.input_format}
        return Source(folder, model.variant, limits=limits, **asked)
    config = read_json(folder / "config.json", dict) if (folder / "config.json").is_file() else {}
    if "architectures" in config or "model_type" in config:
        variant, facts, leaves, asked = convert_hf(folder)
        return Source(folder, variant, leaves, facts=facts, input_format=asked)
    names = ", ".join(sorted(each.name for each in folder.iterdir())[:12]) or "nothing"
    raise ValueError(
        f"{folder} is of no known kind: found {names}; expected {', '.join(KINDS[:-1])} or "
        f"{KINDS[-1]}"
    )


def read_params(
    source: Source, place: checkpoint.Place, *, process: int = 0, processes: int = 1
) -> checkpoint.Tree:
    """Reads the parameters of `source`: a nested dict of the results of `place(path, array)`.

    A path is the keys of a leaf, joined by slashes. Leaves of a checkpoint folder are compared with
    the variant's shapes and with their hashes. For a training run, the trained trees come from its
    checkpoint, the others from the folder that it tuned. As one of several `processes`, this one
    reads only the slices that `place` takes and verifies a share of the hashes.
    """
    trained = {} if source.step is None else _read_trained(source.step, source.variant, place)

    def place_frozen(path: str, array: Any) -> Any:
        if path.partition("/")[0] in trained:
            return None
        return place(path, fit_positions(path, array, source.variant.vision))

    if source.leaves is None:
        # Shapes of a run's towers may differ from its base, whose hash was compared already.
        expected = param_shapes(source.variant) if source.step is None else None
        if processes > 1:
            share: Any = {"process": process, "processes": processes}
            base = checkpoint.read_parts(
                source.folder, **share, expected=expected, place=place_frozen
            )
        else:
            base = checkpoint.read_tree(source.folder, expected=expected, place=place_frozen)
        return {**base, **trained}
    kept = {}
    for path, array in source.leaves:
        kept[path] = place(path, array)
        del array  # the next leaf is made while no name holds this one
    return checkpoint.unflatten(kept)


def _run_source(step: Path) -> Source:
    meta = read_meta(step)
    stores.complete(step / "trainable")
    base = read_source(_base_folder(step, meta["base"]))
    found, wanted = base_digest(base), meta["base"]["sha256"]
    if found != wanted:
        raise checkpoint.CheckpointError(
            f"{step} was tuned on another base: {base.folder} had the sha256 {wanted[:12]}..., now "
            f"it has {found[:12]}...; put that base back, or tune again"
        )
    variant = Variant.from_dict(meta["variant"])
    limits = _check_limits(step, meta.get("text", {}))
    check_manifest(meta, step, "trainable")
    tuning = {
        "step": meta.get("step"),
        "base_sha256": wanted,
        "trained_sha256": checkpoint.manifest_digest(step / "trainable"),
    }
    facts = {**base.facts, "tuned": tuning}
    asked = _check_input_format(step, meta, base.input_format)
    changes: dict[str, Any] = {"limits": limits, "facts": facts, "input_format": asked}
    return dataclasses.replace(base, variant=variant, step=step, **changes)


def _check_input_format(step: Path, meta: Mapping[str, Any], base: InputFormat) -> InputFormat:
    """Returns the input format of a run's step; that of its base if an older run did not say it."""
    try:
        return InputFormat.from_dict(meta[KEY]) if KEY in meta else base
    except ValueError as error:
        raise checkpoint.CheckpointError(f"{step / META} is damaged: {error}") from error


def _check_limits(folder: Path, limits: Any) -> Mapping[str, int]:
    """Returns the limits of text lengths in a checkpoint; a CheckpointError if they are invalid."""
    whole = lambda value: isinstance(value, int) and not isinstance(value, bool)
    if not isinstance(limits, Mapping) or not all(
        name in LIMITS and whole(value) for name, value in limits.items()
    ):
        raise checkpoint.CheckpointError(
            f"{folder} states the limits of texts {limits!r}, expected whole numbers for "
            f"{', '.join(LIMITS)}: copy its JSON files again"
        )
    return limits


def _base_folder(step: Path, base: Mapping[str, str]) -> str:
    """The folder of the model that a training run tuned: by its recorded path, else by its name."""
    places = list(dict.fromkeys([base["path"], base.get("name", base["path"])]))
    for place in places:
        try:
            return os.fspath(resolve_checkpoint(place))
        except FileNotFoundError:
            continue
    raise FileNotFoundError(
        f"the base that {step} was tuned on is gone: looked for {' and '.join(places)}; put the "
        f"checkpoint of sha256 {base['sha256'][:12]}... back there"
    )


def require_kind(source: Source, readers: Mapping[str, type[Reader]]) -> type[Reader]:
    """The class that `readers` has for the kind of a model (a key, one of `variants.KINDS`).

    Raises:
        ValueError: the model is a first stage, or its kind is not in `readers`.
    """
    kind = source.variant.kind
    if source.variant.llm is None:
        raise ValueError(
            f"{source.step or source.folder} is a first stage of BLIP-2, which compares images and "
            "texts and answers nothing: `jax_instructblip.load` gives a Retriever"
        )
    if kind not in readers:
        raise ValueError(
            f"{source.step or source.folder} is a model of kind {kind}, which nothing here answers "
            f"with; expected one of the kinds {', '.join(readers)}"
        )
    return readers[kind]


def stored_model(source: Source) -> StoredModel:
    """The model of a checkpoint folder or a training run, in the form that export and merge need.

    Raises:
        ValueError: `source` is a Hugging Face folder.
    """
    if source.leaves is not None:
        raise ValueError(
            f"{source.folder} is a Hugging Face folder: expected a checkpoint folder or a run "
            "(`jax-instructblip convert` makes the one of the other)"
        )
    base = read_stored_model(source.folder)
    if source.step is None:
        return base
    changes = {
        name: getattr(source, name) for name in ("variant", "facts", "limits", "input_format")
    }
    return with_positions(tuned(base, source.step / "trainable", title=str(source.step), **changes))


def base_digest(source: Source) -> str:
    """The sha256 of a checkpoint folder's manifest, which covers all its parameters.

    A training run records this hash of the folder that it tunes. A ValueError for a Hugging Face
    folder or another run, which cannot be tuned.
    """
    if source.leaves is not None or source.step is not None:
        raise ValueError(
            f"{source.step or source.folder} cannot be the base of a run, because nothing there "
            "stands for all its weights: convert it to a checkpoint folder first"
        )
    return checkpoint.manifest_digest(source.folder)


def _latest_step(folder: Path) -> Path:
    """The folder of a run's newest complete checkpoint; a FileNotFoundError if there is none."""
    steps = [each for each in folder.iterdir() if each.name.isdecimal()]
    steps = [each for each in steps if (each / META).is_file()]
    if not steps:
        raise FileNotFoundError(f"{folder} has no checkpoint yet: the run has not saved anything")
    return max(steps, key=lambda each: int(each.name))


def _read_trained(step: Path, variant: Variant, place: checkpoint.Place) -> checkpoint.Tree:
    shapes = param_shapes(variant)
    expected = {name: shapes[name] for name in read_meta(step)["trainable"]}
    return checkpoint.read_tree(step / "trainable", expected=expected, place=place)


def unstacks(variant: Variant, mesh: Mesh | None, backend: str) -> bool:
    """True if `load_params` unstacks the layers that decode (`models.vlm.unstack_decoder`).

    It does so where each device holds whole weights and `backend`, the name of a kind of devices as
    `jax.default_backend()` gives it, is in `UNSTACKED`.
    """
    return variant.llm is not None and backend in UNSTACKED and (mesh is None or not is_split(mesh))


def load_params(
    source: Source, dtype: Any, mesh: Mesh | None = None, quantise: str | None = None
) -> checkpoint.Tree:
    """Reads the parameters of `source` onto the first device, or sharded over `mesh`.

    `parallel/rules.py` has the shardings. Floats are cast to `dtype`, except for scales of
    quantised kernels. With a mesh of several processes, each reads only its own parts, except that
    it reads the whole of each kernel to be quantised. `quantise` is "int8" or "int4" for the vision
    tower and the language model (`models/quantise.py`), or None. The layers that decode may be
    unstacked (`unstacks`).
    """
    if not (mesh is None or isinstance(mesh, Mesh)):
        raise ValueError(f"mesh is a {type(mesh).__name__}, expected a jax.sharding.Mesh or None")
    if quantise not in (None, *QUANTISED):
        known = ", ".join(QUANTISED)
        raise ValueError(f"quantise is {str(quantise)[:60]!r}, expected None or one of {known}")
    put = functools.partial(_place, dtype=dtype, mesh=mesh)
    place = functools.partial(place_quantised, put, quantise)
    if mesh is not None:
        rules.shardings(param_shapes(source.variant), mesh)  # raises now if the mesh does not fit
        if mesh.is_multi_process:
            share = {"process": jax.process_index(), "processes": jax.process_count()}
            return read_params(source, place, **share)
    if not unstacks(source.variant, mesh, jax.default_backend()):
        return read_params(source, place)
    params = read_params(source, functools.partial(_place_apart, source.variant, place))
    return unstack_decoder(source.variant, params)


def _place(path: str, array: np.ndarray, dtype: Any, mesh: Mesh | None) -> jax.Array:
    """Puts a leaf on its devices; floats are cast to `dtype` on the host, before the transfer.

    Scales of quantised kernels stay float32.
    """
    casts = jnp.issubdtype(array.dtype, jnp.floating) and not quantisation.is_scale(path)
    dtype = dtype if casts else array.dtype
    if mesh is None or is_split(mesh):
        return rules.place(path, array, mesh, dtype)
    return jax.device_put(array.astype(dtype, copy=False), replicated(mesh))


def place_quantised(
    place: checkpoint.Place,
    form: str | None,
    path: str,
    array: Any,
    towers: Sequence[str] = quantisation.TOWERS,
) -> Any:
    """The result of `place(path, array)`, after quantisation if the leaf is a kernel of `towers`.

    A kernel is quantised to `form`, "int8" or "int4" (None: not at all), and becomes a dict: the
    result of `place` for each of its parts `q`, `scale` and, for some paths, `input_scale`, whose
    paths end in these names.
    """
    if form is None or not quantisation.is_quantised(path, towers):
        return place(path, array)
    parts = quantisation.quantise(path, array, form)
    return {name: place(f"{path}/{name}", part) for name, part in parts.items()}


def _place_apart(variant: Variant, place: checkpoint.Place, path: str, array: np.ndarray) -> Any:
    """Applies `place` to a leaf; of layers that decode, to each layer of the stack, as a tuple."""
    if path.startswith(DECODERS[variant.llm.kind] + "/"):
        return tuple(place(path, layer) for layer in array)
    return place(path, array)

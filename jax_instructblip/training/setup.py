"""Builds the parts of a run (mesh, data, model settings, optimizer, validation) from its config.

Errors that depend on devices or files are raised here; those of single fields are found by
`config_fields.py`.
"""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jax_instructblip import remote
from jax_instructblip.atomic import unwritable
from jax_instructblip.data.captions import CaptionTokenizer
from jax_instructblip.data.chat_text import ChatTextProcessor
from jax_instructblip.data.datasets import ALL
from jax_instructblip.data.input_format import InputFormat
from jax_instructblip.data.mixture import Mixture, Source
from jax_instructblip.data.noun_phrases import balanced
from jax_instructblip.data.pairs import PairBatches
from jax_instructblip.data.patch_features import PatchFeatures
from jax_instructblip.data.records import Record
from jax_instructblip.data.sources import dataset_name, open_records
from jax_instructblip.data.templates import TextStyle, needs_prompts, placeholders
from jax_instructblip.data.text import TextProcessor
from jax_instructblip.data.train_batches import TrainBatches
from jax_instructblip.inference.loading import read_source
from jax_instructblip.models import quantise
from jax_instructblip.models.attention_kernels import kernel_for
from jax_instructblip.models.blip2 import Blip2
from jax_instructblip.models.layers import Scan, Scans
from jax_instructblip.models.variants import QUANTISED, Variant
from jax_instructblip.models.vlm import VisionLanguageModel, param_shapes
from jax_instructblip.parallel import pmap, rules
from jax_instructblip.parallel.mesh import batch_sharding, local_rows, make_mesh
from jax_instructblip.training.config_fields import check_config
from jax_instructblip.training.initial import Initial
from jax_instructblip.training.objective import LanguageObjective, Objective
from jax_instructblip.training.pair_objective import PairObjective
from jax_instructblip.training.state import partition

# Called in every process with the keyword arguments that `read_validation` passes; returns scores
# by name, of which `score` chooses the best checkpoint.
Evaluate = Callable[..., dict[str, float]]

# Called with the path of an HTML page, its title, the lines of `metrics.jsonl` and `answers.jsonl`.
Report = Callable[..., None]


class Validation(NamedTuple):
    """The validation of a run, as the config describes it.

    Attributes:
      measure: `measure(params, take_samples=None)` returns scores by name, the headline score first
        and `score`, which chooses the best checkpoint, last. It calls the function `take_samples`
        with a few answers (`evaluation.predictions.Prediction` rows as dicts).
      every: steps between validations.
      first: whether to validate before the first step, too.
    """

    measure: Callable[..., dict[str, float]]
    every: int  # steps
    first: bool  # whether the weights are measured before the first step, too


def read_workdir(config: ConfigDict) -> str:
    """Checks the whole config; returns its workdir, a path or an object-store address.

    Raises:
        ValueError: lists every unusable field, or says why a folder cannot be written.
    """
    check_config(config, run=True)
    if remote.is_remote(config.workdir):
        remote.check(config.workdir)
    elif problem := unwritable(config.workdir):
        raise ValueError(f"config.workdir is {config.workdir}: {problem}; choose another one")
    traces = config.train.profile_folder if config.train.profile_steps else ""
    if traces and (problem := unwritable(traces)):
        raise ValueError(f"config.train.profile_folder is {traces}: {problem}; choose another one")
    return config.workdir


def read_mesh(config: ConfigDict) -> Mesh:
    """Returns the mesh of all devices; raises a ValueError if its sizes do not fit them."""
    mesh = make_mesh(**config.mesh)
    if config.parallel.mode == "pmap":
        pmap.check(mesh)
    return mesh


def read_samples_per_row(config: ConfigDict, mesh: Mesh) -> int:
    """Returns the number of samples packed into each row of a batch.

    It is `config.data.samples_per_row`, or less if a device has fewer samples per part of a step.

    Raises:
        ValueError: the batch cannot be divided evenly among devices, accumulation parts and rows.
    """
    size, parts = config.data.batch_size, config.train.accumulate
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    if size % (devices * parts):
        raise ValueError(
            f"config.data.batch_size is {size}; to be worked on in {parts} parts "
            f"(config.train.accumulate) by data x fsdp = {devices} devices it must be a multiple "
            f"of {devices * parts}"
        )
    apart = size // (devices * parts)
    shared = min(config.data.samples_per_row, apart)
    if apart % shared:
        fitting = [each for each in range(1, apart + 1) if apart % each == 0]
        raise ValueError(
            f"config.data.samples_per_row is {shared}, which does not divide the {apart} samples "
            f"of each device and part (config.data.batch_size {size} over {devices} devices and "
            f"{parts} parts): choose one of {', '.join(map(str, fitting))}"
        )
    return shared


def read_rows(config: ConfigDict, mesh: Mesh) -> np.ndarray:
    """Returns the row indices [b] of each global batch that this host's devices work on."""
    count = config.data.batch_size // read_samples_per_row(config, mesh)
    return local_rows(batch_sharding(mesh), count)


def read_frozen_dtype(config: ConfigDict) -> tuple[Any, str | None]:
    """Returns the dtype of frozen weights, and the form of quantised kernels ("int8") or None."""
    name = config.model.frozen_dtype
    return (jnp.dtype(jnp.bfloat16), name) if name in QUANTISED else (jnp.dtype(name), None)


def read_scans(config: ConfigDict, mesh: Mesh | None) -> Scans:
    """Returns how the layers of each tower run: remat policy, weight sharding, attention kernel.

    The kernel is one for the devices of `mesh`. If `mesh` is None, "auto" stays (`Scans.on`).
    """
    fused = "auto" if config.model.attention == "auto" else ""
    scan = lambda tower: Scan(config.model.remat[tower], rules.constrain_layer, fused=fused)
    scans = Scans(scan("vision"), scan("qformer"), scan("llm"))
    return scans if mesh is None else scans.on(kernel_for(mesh.devices.flat[0]))


def read_mixture(config: ConfigDict) -> Mixture:
    """Opens the sources of `config.data` that have a path.

    Raises:
        ValueError: some cannot be used, all of which are listed, or none has a path.
    """
    sources, wrong = [], []
    for name, fields in sorted(config.data.sources.items()):
        if not fields.path:
            continue
        try:
            needed = needs_prompts(fields.templates) and _reads_prompts(config)
            where = fields.path, fields.split, fields.images
            records, digest = open_records(*where, need_prompts=needed)
            if fields.noun_phrases:
                rule = dict(cap=fields.noun_phrases, seed=config.seed)
                records, digest = balanced(records, digest, fields.path, **rule)
            dataset = ALL.get(dataset_name(fields.path))
            family = dataset.family if dataset else ""
            sources.append(Source(name, records, digest, fields.weight, fields.templates, family))
        except (ValueError, OSError) as error:
            wrong.append(f"config.data.sources.{name}: {error}")
            continue
        if dataset and dataset.held_in is False and name not in config.data.allow_held_out:
            wrong.append(
                f"config.data.sources.{name}: {dataset.name} is held out, to be evaluated without "
                f"training on it; to train on it all the same, add {name!r} to "
                "config.data.allow_held_out"
            )
    if wrong:
        raise ValueError("some sources cannot be used:\n  " + "\n  ".join(wrong))
    return Mixture(
        sources,
        config.seed,
        sampling=config.data.sampling,
        instructions=config.data.instructions,
        style=read_style(config),
    )


def read_style(config: ConfigDict) -> TextStyle:
    """Returns how questions, captions and dialogues are worded (`config.data`)."""
    return TextStyle(config.data.text_processor, config.data.dialogue)


def read_batches(
    config: ConfigDict,
    mixture: Mixture,
    initial: Initial,
    rows: np.ndarray,
    samples_per_row: int = 1,
    features: PatchFeatures | None = None,
) -> TrainBatches | PairBatches:
    """Returns the training batches by step number.

    This host builds only the rows of each with the indices `rows` (`read_rows`). With `features`
    they have patch features in place of images.
    """
    settings: dict[str, Any] = dict(
        batch_size=config.data.batch_size,
        steps=config.train.steps,
        augment=config.data.augment,
        min_decode_ratio=config.data.min_decode_ratio,
        rand_augment=config.data.rand_augment,
        upright=config.data.exif,
        rows=rows,
    )
    text = read_text(config, initial.folder, initial.variant, initial.input_format)
    if isinstance(text, CaptionTokenizer):
        return PairBatches(mixture, text, crop=config.data.crop or "squash", **settings)
    settings |= dict(crop=text.input_format.image_crop, buckets=tuple(config.data.buckets))
    chat = text.chat if isinstance(text, ChatTextProcessor) else None
    settings |= dict(chat=chat, image_order=config.chat.image_order, features=features)
    return TrainBatches(mixture, text, samples_per_row=samples_per_row, **settings)


def read_input_format(config: ConfigDict, base: InputFormat) -> InputFormat:
    """Returns the input format of the tuned model, which is that of its training (`config.chat`).

    `base` is the format of the model to tune. Its image marks are kept; its system message is kept
    if the template is its own and the config has no other. Its images are prepared in the same
    way, unless training does not augment them and `data.crop` names another.
    """
    chat = config.chat
    system = {} if chat.system == "default" else {"system": chat.system}
    crop = {} if config.data.augment or not config.data.crop else {"image_crop": config.data.crop}
    asked = base.with_template(chat.template)
    return dataclasses.replace(asked, limit=chat.limit, **system, **crop)


def read_text(
    config: ConfigDict, folder: Path, variant: Variant, base: InputFormat
) -> TextProcessor | CaptionTokenizer:
    """Loads the tokenizers in a checkpoint `folder`, with the token limits of `config.text`.

    If `config.chat` names a template, the result writes conversations by it. `base` is the input
    format of the model to tune.

    Raises:
        ValueError: a tokenizer is damaged or of another model, or the template of another one.
    """
    limits = dict(config.text)
    caption_limit = limits.pop("caption_limit")
    if variant.llm is None:
        return CaptionTokenizer.load(folder, variant, caption_limit)
    asked = read_input_format(config, base)
    text = TextProcessor.load(folder, variant, input_format=asked, **limits)
    if not asked.template:
        return text
    try:
        return ChatTextProcessor.of(text)
    except ValueError as error:
        raise ValueError(f"config.chat.template: {error}") from error


def make_objective(config: ConfigDict, model: VisionLanguageModel | Blip2) -> Objective:
    """Returns the training objective: image-text pairs for a `Blip2`, else language modelling."""
    if isinstance(model, Blip2):
        return PairObjective(model, config.train.pairs_by_image)
    return LanguageObjective(model)


def check_model(config: ConfigDict) -> None:
    """Raises if `config.model` and `config.text` do not fit the checkpoint; reads no weights.

    Raises:
        FileNotFoundError: a checkpoint or its tokenizer is missing.
        ValueError: the checkpoint is unusable, has no such parts to train, or too few positions.
    """
    sources = {}
    for name in ("checkpoint", "init"):
        try:
            if config.model[name]:
                sources[name] = read_source(config.model[name])
        except FileNotFoundError as error:
            raise FileNotFoundError(f"config.model.{name}: {error}") from error
    base = sources["checkpoint"]
    variant = change_variant(base.variant, config)
    try:
        partition(param_shapes(variant), tuple(config.model.trainable))
    except ValueError as error:
        raise ValueError(f"config.model.trainable: {error}") from error
    if config.model.frozen_dtype in QUANTISED:
        try:
            quantise.frozen_towers(variant, config.model.trainable)
        except ValueError as error:
            raise ValueError(
                f"config.model.frozen_dtype is {config.model.frozen_dtype}: {error}"
            ) from error
    check_samples_per_row(config, variant)
    text = read_text(config, base.folder, variant, base.input_format)
    if isinstance(text, CaptionTokenizer) and config.chat.template:
        raise ValueError(
            f"config.chat.template is {config.chat.template!r}: in the first stage there are "
            "captions, and no conversations; leave it empty"
        )


def change_variant(variant: Variant, config: ConfigDict) -> Variant:
    """Returns the variant with the fields that `config.model` changes.

    Raises:
        ValueError: a value does not fit the variant.
    """
    try:
        return variant.replace(**read_variant_fields(config))
    except ValueError as error:
        raise ValueError(f"config.model: {error}") from error


def check_samples_per_row(config: ConfigDict, variant: Variant) -> None:
    """Raises a ValueError if `data.samples_per_row` is above 1 for BLIP-2's first stage."""
    if variant.llm is None and config.data.samples_per_row > 1:
        raise ValueError(
            f"config.data.samples_per_row is {config.data.samples_per_row}: in the first stage "
            "each pair has a row of its own, 1"
        )


def read_variant_fields(config: ConfigDict) -> dict[str, Any]:
    """Returns the new values of variant fields that `config.model` changes, by dotted name."""
    fields: dict[str, Any] = {}
    if config.model.image_size:
        fields["vision.image_size"] = config.model.image_size
    if not config.model.instruction_aware:
        fields["qformer.instruction_aware"] = False
    for tower in ("qformer", "llm"):
        if config.model[f"{tower}_dropout"] >= 0:
            fields[f"{tower}.dropout"] = config.model[f"{tower}_dropout"]
    return fields


def _reads_prompts(config: ConfigDict) -> bool:
    """False if the model is a first stage of BLIP-2; True also if there is none yet."""
    try:
        return read_source(config.model.checkpoint).variant.llm is not None
    except (ValueError, OSError):
        return True


def read_validation_records(config: ConfigDict) -> Sequence[Record] | None:
    """Opens the validation records, before any weight is read; None if there is no validation.

    Raises:
        ValueError: they cannot be opened.
    """
    settings = config.validation
    if not settings.path:
        return None
    try:
        asked = "question" in placeholders(settings.prompt or "{question}")
        needed = asked and _reads_prompts(config)
        records, _ = open_records(settings.path, settings.split, need_prompts=needed)
    except (ValueError, OSError) as error:
        raise ValueError(f"config.validation.path cannot be used: {error}") from error
    return records


def read_validation(
    config: ConfigDict,
    evaluate: Evaluate | None,
    records: Sequence[Record] | None,
    *,
    model: VisionLanguageModel | Blip2,
    text: TextProcessor | CaptionTokenizer,
    mesh: Mesh,
) -> Validation | None:
    """Returns the validation of `records` by `evaluate`; None if either of them is None.

    `model`, `text` and `mesh` are those of the run.
    """
    settings = config.validation
    if evaluate is None or records is None:
        return None

    def measure(params: Any, take_samples: Any = None) -> dict[str, float]:
        return evaluate(
            model=model,
            params=params,
            text=text,
            records=records,
            mesh=mesh,
            limit=settings.limit,
            batch_size=settings.batch_size,
            max_new_tokens=settings.max_new_tokens,
            path=settings.path,
            split=settings.split,
            prompt=settings.prompt,
            style=read_style(config),
            upright=config.data.exif,
            take_samples=take_samples,
        )

    return Validation(measure, settings.every, settings.first)

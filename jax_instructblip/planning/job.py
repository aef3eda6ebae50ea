"""The step that a plan compiles: what its program depends on, read from a config."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from jax_instructblip.inference.loading import read_source
from jax_instructblip.models import flops
from jax_instructblip.models.layers import Scans
from jax_instructblip.models.released import VARIANTS
from jax_instructblip.models.variants import Variant
from jax_instructblip.training import patch_features, setup
from jax_instructblip.training.config_fields import check_config
from jax_instructblip.training.run_length import make_optimizer


@dataclasses.dataclass(frozen=True)
class Job:
    """A step to compile: everything in a config that its program depends on.

    A row of a batch has slots: places of the language model's input, each for a visual vector or a
    token. A target is a token that the loss counts.

    Attributes:
      variant: the sizes of the model.
      step: "train", or "decode" (greedy answers to the prompts of a batch).
      batch: samples of a step, on all devices together.
      samples_per_row: samples that share a row.
      row: slots and targets of a row of several samples, as `row_slots` and `row_targets`; 0: those
        of samples as long as `lengths`.
      sample: mean images, instruction ids, slots and targets of a sample; () where unknown.
      lengths: most tokens of a sample, by key: `qformer_tokens` (instruction), `tokens` (prompt,
        and what a decoder-only model is trained on; no visual vectors); in training, `targets`; of
        BLIP-2's first stage `captions` alone.
      trainable: the top-level trees of parameters that are trained, such as `qformer`.
      scans: for each tower, how its layers run, and what they keep for the backward pass.
      dtype: the dtype to compute in.
      frozen_dtype: the dtype of parameters that are not trained.
      pairs_by_image: True if all captions of an image are positives (first stage).
      patches: True if a training batch has patch features in place of images.
      frozen_unused: top-level trees that no program of the run has, so that no chip holds them.
      quantise: form of the frozen kernels of vision tower and language model, "int8" or "int4";
        None: they have `frozen_dtype`, as the others have.
      skip_non_finite: a step with a non-finite loss changes nothing, so the old state is kept.
      clip_norm: the norm to which longer gradients are scaled down; None: no limit.
      accumulate: the number of parts that a batch is worked on in, one after another.
      new_tokens: most tokens of an answer ("decode").
    """

    variant: Variant
    step: str
    batch: int
    samples_per_row: int
    row: Mapping[str, int]
    sample: tuple[float, ...]
    lengths: Mapping[str, int]
    trainable: tuple[str, ...]
    scans: Scans
    dtype: Any
    frozen_dtype: Any
    quantise: str | None
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    clip_norm: float | None
    accumulate: int
    skip_non_finite: bool
    new_tokens: int
    pairs_by_image: bool = False
    patches: bool = False
    frozen_unused: tuple[str, ...] = ()

    @property
    def loops(self) -> int:
        """The runs of a decoding step's loop over new tokens, the only loop of unknown length.

        1 for other steps.
        """
        return self.new_tokens - 1 if self.step == "decode" else 1

    def with_remat(self, **towers: str) -> "Job":
        """A copy with other remat policies, by tower: `with_remat(llm="full")`.

        Towers are `vision`, `qformer` and `llm`, policies the keys of `REMAT` (`models/layers.py`).
        """
        scans = {
            tower: dataclasses.replace(getattr(self.scans, tower), remat=remat)
            for tower, remat in towers.items()
        }
        return dataclasses.replace(self, scans=dataclasses.replace(self.scans, **scans))

    def useful(self) -> int:
        """The FLOPs that a training step needs, if all samples have the mean lengths `sample`.

        Padding is not counted. 0 for other steps, and if the mean lengths are unknown.
        """
        if self.step != "train" or not self.sample:
            return 0
        sample, patches = np.array([self.sample]), self.patches
        return self.batch * flops.useful(self.variant, sample, self.trainable, patches=patches)

    def floor(self) -> int:
        """The fewest FLOPs that the step needs: its matrix products, by the model's sizes.

        Rows are as wide as `row` or `lengths` say. What remat computes again does not count.
        """
        trains_vision = "vision" in self.trainable
        if self.variant.llm is None:
            captions = self.lengths["captions"]
            return flops.pairs(self.variant, self.batch, captions, trains_vision=trains_vision)
        text, tokens = self.lengths["qformer_tokens"], self.lengths["tokens"]
        if self.step == "train":
            answer, shared = self.lengths["targets"], self.samples_per_row
            return flops.analytic(
                self.variant,
                self.batch,
                text,
                tokens,
                answer,
                samples_per_row=shared,
                **(self.row if shared > 1 else {}),
                trains_vision=trains_vision,
                trains_llm="llm" in self.trainable,
                patches=self.patches,
            )
        return flops.generation(self.variant, self.batch, text, tokens, self.new_tokens)


def read_job(config: ConfigDict, variant: Variant, step: str = "train") -> Job:
    """The step that a config (configs/common.py) runs, as a `Job`, for a model of this variant.

    `step` is "train" or "decode".

    Raises:
        ValueError: a field is wrong, or the step cannot be planned (pmap, answers of BLIP-2's first
            stage).
    """
    check_config(config)
    pairs = variant.llm is None
    if pairs and step != "train":
        raise ValueError(
            f"a first stage of BLIP-2 has no language model: its step is train, found {step}"
        )
    if config.parallel.mode != "jit":
        raise ValueError(
            f"config.parallel.mode is {config.parallel.mode}: plans are of the program that jit "
            "compiles for a mesh; under pmap each device holds all weights and moments"
        )
    setup.check_samples_per_row(config, variant)
    patch_features.check_kind(config, variant)
    optimizer, schedule = make_optimizer(config)
    frozen_dtype, form = setup.read_frozen_dtype(config)
    train = step == "train"
    limits = config.text
    lengths = {"qformer_tokens": limits.qformer_limit, "tokens": limits.prompt_limit}
    if pairs:
        lengths = {"captions": limits.caption_limit}
    elif train and config.chat.template:
        tokens = max(config.chat.limit - variant.visual_tokens, 1)  # with one image
        lengths |= {"tokens": tokens, "targets": tokens}
    elif train and variant.llm.encoder_decoder:
        lengths["targets"] = limits.answer_limit
    elif train:
        lengths["targets"] = limits.answer_limit - 1
        lengths["tokens"] += lengths["targets"]
    return Job(
        variant=setup.change_variant(variant, config),
        step=step,
        batch=config.data.batch_size if train else config.validation.batch_size,
        samples_per_row=config.data.samples_per_row if train else 1,
        row={name: config.plan[name] for name in ("row_slots", "row_targets")},
        sample=tuple(config.plan.sample),
        lengths=lengths,
        trainable=tuple(config.model.trainable),
        scans=setup.read_scans(config, None),
        dtype=jnp.dtype(config.model.dtype),
        frozen_dtype=frozen_dtype,
        quantise=form,
        optimizer=optimizer,
        schedule=schedule,
        clip_norm=config.optimizer.clip_norm or None,
        accumulate=config.train.accumulate,
        skip_non_finite=config.train.non_finite == "skip",
        new_tokens=config.validation.max_new_tokens,
        pairs_by_image=config.train.pairs_by_image,
        patches=train and bool(config.data.features),
        frozen_unused=patch_features.unused_trees(config) if train else (),
    )


def read_variant(config: ConfigDict) -> tuple[str, Variant]:
    """Name and sizes of the model that a config trains; its weights need not exist.

    The model is the folder or embedded model `config.model.checkpoint`. If there is none, the last
    part of that path is a released model's name (`flan-t5-xl`), or else that of `config.workdir`.

    Raises:
        ValueError: neither path names a known model.
    """
    name = config.model.checkpoint
    if name and (Path(name).is_dir() or "shapes" in name):
        return name, read_source(name).variant
    words = [Path(word).name for word in (name, config.workdir) if word]
    for word in words:
        short = word.lower().replace("_", "-").removeprefix("instructblip-")
        for known in VARIANTS:
            if short in (known, known.removeprefix("instructblip-")):
                return known, VARIANTS[known]
    raise ValueError(
        f"config.model.checkpoint is {name!r}, no folder and no name of a known model; give a "
        f"folder or one of {', '.join(VARIANTS)}"
    )


def fit_rows(job: Job, mesh: Mesh) -> Job:
    """The job with fewer samples per row, if a device has fewer in one accumulation step."""
    parts = mesh.shape["data"] * mesh.shape["fsdp"] * job.accumulate
    shared = max(1, min(job.samples_per_row, job.batch // parts))
    if shared == job.samples_per_row:
        return job
    # A row of fewer samples is shorter, but the longest sample still has to find room.
    longest = {
        "row_slots": job.variant.visual_tokens + job.lengths["tokens"],
        "row_targets": job.lengths["targets"],
    }
    row = {
        name: max(-(-width * shared // job.samples_per_row), min(width, longest[name]))
        for name, width in job.row.items()
    }
    return dataclasses.replace(job, samples_per_row=shared, row=row)


def check_rows(job: Job, mesh: Mesh) -> None:
    """Raises a ValueError if the batch does not divide over devices, accumulation and rows."""
    job = fit_rows(job, mesh)
    devices = mesh.shape["data"] * mesh.shape["fsdp"]
    parts = devices * (job.accumulate if job.step == "train" else 1) * job.samples_per_row
    if job.batch % parts:
        rows = f", in rows of {job.samples_per_row} samples" if job.samples_per_row > 1 else ""
        raise ValueError(
            f"a batch of {job.batch} cannot be worked on in {job.accumulate} parts by data x fsdp "
            f"= {devices} devices{rows}: it must be a multiple of {parts}"
        )

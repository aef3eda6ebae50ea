"""The steps of a run and their learning rates, as its config says."""

import math

import optax
from ml_collections import ConfigDict

from jax_instructblip.data.mixture import Mixture
from jax_instructblip.training.optimizer import adamw, staircase_cosine, warmup_cosine


def with_steps(config: ConfigDict, mixture: Mixture) -> ConfigDict:
    """Returns the config with `train.steps` for `train.epochs` passes over `mixture`'s records.

    An epoch has as many steps as batches are needed for all records; the last batch of an epoch may
    begin the next one. Without `train.epochs` the config is returned as it is.
    """
    if not config.train.epochs:
        return config
    samples = sum(len(source.records) for source in mixture.sources)
    epoch = -(-samples // config.data.batch_size)
    steps = max(1, math.ceil(config.train.epochs * epoch))
    config = config.copy_and_resolve_references()
    config.train.steps = steps
    return config


def make_optimizer(config: ConfigDict) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Returns the optimizer of `config.optimizer`, and its learning rate schedule."""
    settings, steps = config.optimizer, config.train.steps
    warmup = settings.warmup_steps
    if settings.warmup_ratio:  # at least one step has the whole rate
        warmup = min(math.ceil(settings.warmup_ratio * steps), steps - 1)
    rates = dict(
        start=settings.warmup_learning_rate,
        peak=settings.learning_rate,
        end=settings.final_learning_rate,
        warmup_steps=warmup,
        total_steps=steps,
    )
    if settings.schedule == "staircase":
        schedule = staircase_cosine(**rates, epoch_steps=settings.epoch_steps)
    else:
        schedule = warmup_cosine(**rates)
    optimizer = adamw(
        schedule,
        b1=settings.b1,
        b2=settings.b2,
        eps=settings.eps,
        weight_decay=settings.weight_decay,
        vision_layer_decay=settings.vision_layer_decay,
    )
    return optimizer, schedule

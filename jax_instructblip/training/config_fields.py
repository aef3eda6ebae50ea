"""Checks of a run's config: type, range and unit of every field, and rules between fields.

Meaning and default of each field are in `configs/common.py`. The whole config is checked before
any weight is read, and one error lists everything that is wrong.
"""

import difflib
from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from jax_instructblip.data import images, mixture, templates, text_processors
from jax_instructblip.data.chat_templates import CHAT_TEMPLATES, LIMIT, ORDERS
from jax_instructblip.fields import (
    MOST_SECONDS,
    Field,
    dotted,
    find_problems,
    flag,
    number,
    one_of,
    path,
    several,
    text,
    whole,
)
from jax_instructblip.models.layers import REMAT
from jax_instructblip.models.variants import DTYPES, QUANTISED

SOURCES = "data.sources"  # name -> the fields of SOURCE_FIELDS

_DTYPE = one_of(*DTYPES)
_REMAT = one_of(*REMAT)
_STEPS = whole(1, unit="steps")
_RATE = number(0, 1)  # 1 is already absurd: AdamW moves a weight by about the rate in a step
_SAMPLES = whole(1, 65_536, unit="samples")  # the largest has 10 GB of pixels at 224 x 224
_TOKENS = 32_768  # above the context of every language model
_DEVICES = whole(1, 1_000_000, special=(-1,), unit="devices")
_DROPOUT = number(0, below=1, special=(-1.0,), unit="probability; -1: as the checkpoint says")

FIELDS: dict[str, Field] = {
    "workdir": text(),
    "seed": whole(0, 2**32 - 1),  # JAX uses 32 bits of it: a larger one would wrap around
    "model.checkpoint": path(stored=True),
    "model.init": path(stored=True),
    "model.trainable": several(text()),
    "model.image_size": whole(0, 4_096, unit="pixels a side; 0: as the checkpoint says"),
    "model.instruction_aware": flag(),
    "model.qformer_dropout": _DROPOUT,
    "model.llm_dropout": _DROPOUT,
    "model.dtype": _DTYPE,
    "model.frozen_dtype": one_of(*DTYPES, *QUANTISED),
    "model.attention": one_of("auto", "einsum"),
    "model.remat.vision": _REMAT,
    "model.remat.qformer": _REMAT,
    "model.remat.llm": _REMAT,
    "data.batch_size": _SAMPLES,
    "data.samples_per_row": whole(1, 65_536, unit="samples"),
    "data.buckets": several(whole(1, _TOKENS, unit="tokens")),
    "data.augment": flag(),
    "data.crop": one_of("", *images.CROPS),
    "data.min_decode_ratio": number(0, unit="share of the model's pixels; 0: decoded whole"),
    "data.features": path(),
    "data.threads": whole(1, 1_024),
    "data.sampling": one_of(*mixture.SAMPLING),
    "data.text_processor": one_of(*text_processors.PROCESSORS),
    "data.dialogue": one_of(*templates.DIALOGUES),
    "data.rand_augment": flag(),
    "data.exif": flag(),
    "data.instructions": one_of(*mixture.INSTRUCTIONS),
    "data.allow_held_out": several(text()),
    "data.ahead": whole(1, 1_024, unit="batches"),
    "data.workers": whole(0, 1_024, unit="processes"),
    "chat.template": one_of("", *CHAT_TEMPLATES),
    "chat.system": text(),
    "chat.limit": whole(1, _TOKENS, unit="tokens and visual vectors"),
    "chat.image_order": one_of(*ORDERS),
    "text.qformer_limit": whole(3, _TOKENS, unit="tokens"),
    "text.prompt_limit": whole(1, _TOKENS, unit="tokens"),
    "text.answer_limit": whole(2, _TOKENS, unit="tokens"),
    "text.caption_limit": whole(3, _TOKENS, unit="tokens"),
    "train.pairs_by_image": flag(),
    "train.steps": _STEPS,
    "train.epochs": number(0, unit="passes over the records; 0: as train.steps says"),
    "train.log_every": _STEPS,
    "train.hang_limit": number(above=0, at_most=MOST_SECONDS, unit="seconds"),
    "train.non_finite": one_of("stop", "skip"),
    "train.non_finite_limit": _STEPS,
    "train.peak_flops": number(0, unit="a second; 0: as known of the device"),
    "train.profile_steps": whole(0, unit="steps"),
    "train.profile_folder": path(),
    "train.accumulate": whole(1, 65_536, unit="parts of a batch"),
    "optimizer.schedule": one_of("cosine", "staircase"),
    "optimizer.learning_rate": _RATE,
    "optimizer.warmup_learning_rate": _RATE,
    "optimizer.final_learning_rate": _RATE,
    "optimizer.warmup_steps": whole(0, unit="steps"),
    "optimizer.warmup_ratio": number(0, below=1, unit="share of the steps; 0: warmup_steps"),
    "optimizer.epoch_steps": _STEPS,
    "optimizer.b1": number(0, below=1),
    "optimizer.b2": number(0, below=1),
    "optimizer.eps": number(above=0, at_most=1),
    "optimizer.weight_decay": number(0, 10, unit="times the learning rate"),
    "optimizer.vision_layer_decay": number(above=0, at_most=1),
    "optimizer.clip_norm": number(0, unit="norm of the gradient; 0: not clipped"),
    "checkpoints.every": _STEPS,
    "checkpoints.keep": whole(1, unit="checkpoints"),
    "checkpoints.keep_every": whole(0, unit="steps; 0: none"),
    "validation.path": path(stored=True),
    "validation.split": text(),
    "validation.prompt": text(),
    "validation.every": _STEPS,
    "validation.first": flag(),
    "validation.limit": whole(0, unit="questions; 0: all"),
    "validation.batch_size": _SAMPLES,
    "validation.max_new_tokens": whole(1, _TOKENS, unit="tokens"),
    "mesh.data": _DEVICES,
    "mesh.fsdp": _DEVICES,
    "mesh.tensor": _DEVICES,
    "plan.row_slots": whole(0, unit="slots of a row"),
    "plan.row_targets": whole(0, unit="targets of a row"),
    "plan.sample": several(number(0)),
    "parallel.mode": one_of("jit", "pmap"),
}

NEEDED = {  # fields that may not be empty in a run -> what to set them to
    "workdir": "the folder that the run writes to",
    "model.checkpoint": "a converted checkpoint folder, or shapes_t5 or shapes_llama",
    "model.trainable": "the parts to train, as in ('qformer',)",
    SOURCES: "what to train on, as in configs/custom_jsonl.py",
}

SOURCE_FIELDS: dict[str, Field] = {
    "path": path(stored=True),
    "split": text(),
    "weight": number(0, unit="relative to the other weights; 0: by data.sampling"),
    "templates": one_of("", *templates.TEMPLATES, templates.CAPTION_PREFIX),
    "images": path(stored=True),
    "noun_phrases": whole(0, unit="captions a phrase; 0: all"),
}

# Fields that are used with a chat template alone, and their values in `configs/common.py`.
_OF_CHATS = {"chat.system": "default", "chat.limit": LIMIT, "chat.image_order": "written"}


def check_config(config: ConfigDict, *, run: bool = False) -> None:
    """Raises a ValueError that lists every unusable field of `config`.

    With `run`, fields that only a training run needs, such as `workdir`, must also be set.
    """
    tree = config.to_dict()
    if problems := [*(_unset(tree) if run else ()), *_problems(tree)]:
        raise ValueError("\n  ".join(["this config cannot be used:", *problems]))


def _unset(tree: Mapping[str, Any]) -> Iterator[str]:
    """Yields an error for each field that a run needs (`NEEDED`) and that is empty."""
    values = _single(tree) | {SOURCES: _sources(tree)}
    for name, what in NEEDED.items():
        if values.get(name) in ("", (), [], {}):
            yield f"config.{name} is not set: {what}"


def _single(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the config as {dotted name: value}, without the fields below `data.sources`."""
    fields = dotted(tree).items()
    return {name: value for name, value in fields if not f"{name}.".startswith(f"{SOURCES}.")}


def _problems(tree: Mapping[str, Any]) -> Iterator[str]:
    """Yields an error for each missing, unknown, invalid or inconsistent field."""
    values = _single(tree)
    for name in (name for name in FIELDS if name not in values):
        yield f"config.{name} is missing: start from common.get_config()"
    for name in sorted(values.keys() - FIELDS.keys()):
        near = difflib.get_close_matches(name, FIELDS, n=1)
        hint = f"; did you mean config.{near[0]}?" if near else ""
        yield f"config.{name} is unknown{hint}"
    yield from find_problems(values, FIELDS, "config.")
    yield from _source_problems(_sources(tree))
    yield from _together(values)


def _sources(tree: Mapping[str, Any]) -> Any:
    """Returns `data.sources` of the config; {} if there is none."""
    data = tree.get("data", {})
    return data.get("sources", {}) if isinstance(data, Mapping) else {}


def _source_problems(sources: Any) -> Iterator[str]:
    """Yields an error for each training source whose fields are wrong."""
    if not isinstance(sources, Mapping):
        yield f"config.{SOURCES} is {sources!r:.60}, expected names with common.source() for each"
        return
    for name, source in sources.items():
        where = f"config.{SOURCES}.{name}"
        if not isinstance(source, Mapping) or set(source) != set(SOURCE_FIELDS):
            names = sorted(source) if isinstance(source, Mapping) else repr(source)[:60]
            yield (
                f"{where} has the fields {names}, expected {sorted(SOURCE_FIELDS)}: make it with "
                "common.source()"
            )
            continue
        yield from find_problems(dict(source), SOURCE_FIELDS, f"{where}.")


def _together(values: Mapping[str, Any]) -> Iterator[str]:
    """Yields an error for each combination of fields that are valid alone but not together."""
    right = {
        name: values[name]
        for name, field in FIELDS.items()
        if name in values and not field.problems(name, values[name])
    }
    steps, ratio = right.get("train.steps"), right.get("optimizer.warmup_ratio")
    schedule = right.get("optimizer.schedule")
    warmup, epoch = right.get("optimizer.warmup_steps"), right.get("optimizer.epoch_steps")
    if steps is None or right.get("train.epochs"):  # then the data say how many steps there are
        pass
    elif schedule == "cosine" and warmup is not None and warmup >= steps and not ratio:
        yield (
            f"config.optimizer.warmup_steps is {warmup}, config.train.steps is {steps}: the "
            "warm-up must end before the run does; lower the one or raise the other"
        )
    elif schedule == "staircase" and epoch is not None and epoch > steps:
        yield (
            f"config.optimizer.epoch_steps is {epoch}, config.train.steps is {steps}: the run must "
            "have an epoch; lower the one or raise the other"
        )
    if right.get("data.rand_augment") and right.get("data.augment") is False:
        yield (
            "config.data.rand_augment is True, config.data.augment is False: crops alone are "
            "changed further; set config.data.augment, or leave it out"
        )
    if right.get("data.crop") and right.get("data.augment"):
        yield (
            f"config.data.crop is {right['data.crop']!r}, config.data.augment is True: crops are "
            "drawn at random; set config.data.augment to False, or leave config.data.crop out"
        )
    for name, usual in _OF_CHATS.items():
        if right.get("chat.template") == "" and right.get(name, usual) != usual:
            yield (
                f"config.{name} is {right[name]!r:.60}, config.chat.template is '': it is of "
                f"conversations; name a template, or leave it at {usual!r}"
            )
    if features := right.get("data.features"):
        yield from _feature_problems(features, right)
    decay, trainable = right.get("optimizer.vision_layer_decay", 1), right.get("model.trainable")
    if decay != 1 and trainable is not None and "vision" not in trainable:
        yield (
            f"config.optimizer.vision_layer_decay is {decay}, config.model.trainable is "
            f"{trainable}: the vision tower is frozen; train it, or leave the decay at 1"
        )
    if len(right.get("plan.sample", ())) not in (0, 4):
        yield (
            f"config.plan.sample is {right['plan.sample']}, expected four means of a sample: "
            "images, instruction ids, slots, targets; or ()"
        )
    yield from _prompt_problems(right.get("validation.prompt", ""))
    free = [name for name in right if name.startswith("mesh.") and right[name] == -1]
    if len(free) > 1:
        names = " and ".join(f"config.{name}" for name in free)
        yield f"{names} are -1 (all devices that the others leave), which one of them may be"


def _feature_problems(features: str, right: Mapping[str, Any]) -> Iterator[str]:
    """Yields an error for each field with which patch features cannot be read."""
    found = f"config.data.features is {features!r}"
    if right.get("data.augment"):
        yield (
            f"{found}, config.data.augment is True: a crop drawn at random has no features that "
            "were computed before; set config.data.augment to False, or leave the features out"
        )
    if "vision" in (trainable := right.get("model.trainable", ())):
        yield (
            f"{found}, config.model.trainable is {trainable}: a trained vision tower changes with "
            "each step, its features too; leave 'vision' or the features out"
        )


def _prompt_problems(prompt: str) -> Iterator[str]:
    known = ", ".join(f"{{{name}}}" for name in templates.PLACEHOLDERS)
    try:
        unknown = sorted(templates.placeholders(prompt) - set(templates.PLACEHOLDERS))
    except ValueError as error:
        yield f"config.validation.prompt is {prompt!r:.60}: {error}; expected {known}"
        return
    if unknown:
        yield f"config.validation.prompt has the placeholders {unknown}, expected some of {known}"

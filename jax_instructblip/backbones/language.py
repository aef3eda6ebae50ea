"""Trains the embedded language models on text: a scene described in words, a question, an answer.

There are no images: the description is in the place of the visual prompt. The curriculum matters.
To look something up by its key among several things ("Which shape is red?") is learned only if
training begins with one thing per scene. Later stages add things, word orders and all families of
questions.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jax_instructblip.data.batch import IGNORE, collate
from jax_instructblip.data.shapes import tasks, world
from jax_instructblip.data.text import TextProcessor
from jax_instructblip.models.layers import Network
from jax_instructblip.models.variants import LanguageConfig, T5Config
from jax_instructblip.models.vlm import LANGUAGE_MODELS
from jax_instructblip.progress import Progress

ROUND = 8  # rows are padded to a multiple of this many tokens
BUCKETS = 4  # groups of examples of similar length, to reduce padding
TERSE = ("color", "shape", "position", "count", "multiple_choice")
FAMILIES = {**tasks.FAMILIES, "detail": tasks.CAPTION_FAMILIES["detail"]}
NAMES = (*FAMILIES, "relist")  # kinds of examples


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage of the curriculum: `steps` steps on scenes of up to `things` things.

    A thing is a colored shape in a cell of the scene. `relisted` is the share of examples that are
    made by `relist`.
    """

    things: int
    steps: int
    relisted: float


CURRICULUM = (Stage(3, 1000, 0.8), Stage(3, 1500, 0.3), Stage(5, 3000, 0.1))


def text_example(
    seed: int, split: str, index: int, things: int, relisted: float = 0.0
) -> tuple[str, str, str, str] | None:
    """Returns (family, description, prompt, answer) about a random part of a scene.

    The scene is that of `world.sample_scene(seed, split, index)`, with `split` in `world.SPLITS`;
    with the probability `relisted` the example is one of `relist`. The result is None if the drawn
    family of questions cannot ask about the part. The description lists up to `things` things in
    random order. Sometimes a thing's words are shuffled, and sometimes the description is only the
    answer, or a count of equal things.
    """
    scene = world.sample_scene(seed, split, index)
    rng = world.scene_rng(seed, split, index, use=2)
    count = int(rng.integers(1, min(things, len(scene.things)) + 1))
    if things >= 3:
        count = max(count, int(rng.integers(1, min(things, len(scene.things)) + 1)))
    chosen = [scene.things[number] for number in rng.permutation(len(scene.things))[:count]]
    word = scene.word if rng.integers(4) else ""
    part = dataclasses.replace(scene, things=tuple(chosen), word=word)
    if rng.random() < relisted:
        return relist(part, rng)
    name = list(FAMILIES)[int(rng.integers(len(FAMILIES)))]
    focus = tasks.pick_focus(part, "train", rng)
    question = FAMILIES[name].ask(part, rng, focus)
    if question is None:
        return None
    templates = FAMILIES[name].templates
    prompt = tasks.templates.render(templates[int(rng.integers(len(templates)))], **question.fields)
    description = tasks.describe(part)
    if name != "detail" and rng.integers(3) == 0:
        description = _loosely(part.things, part.word, rng)
    if name in TERSE and rng.integers(8) == 0:
        description = question.answer
    elif name == "count" and rng.integers(3) == 0:
        asked = question.fields["question"].rstrip("?").split()
        key = asked[-1] if asked[-2] == "are" else asked[2]
        key = "shapes" if key == "there" else f"{key} shapes"
        description = f"{question.answer} {key}"
    return name, description, prompt, question.answer


def relist(scene: world.Scene, rng: np.random.Generator) -> tuple[str, str, str, str]:
    """Returns an example whose answer repeats the description, with things and words shuffled.

    It is (family, description, prompt, answer), like that of `text_example`. After a thing's first
    word the others must be looked up in the description. Questions need this skill, and here one
    example trains it several times.
    """
    things, word = scene.things, scene.word
    description = tasks.describe(scene) if rng.integers(2) else _loosely(things, word, rng)
    values = [value for t in things for value in (t.color, t.shape, t.place)]
    answer = []
    for index in rng.permutation(len(things)):
        words = [things[index].color, things[index].shape, things[index].place]
        keys = [key for key in words if values.count(key) == 1]
        words = [words[index] for index in rng.permutation(len(words))]
        if keys:  # the first word must identify the thing
            key = keys[int(rng.integers(len(keys)))]
            words = [key, *(word for word in words if word != key)]
            answer.append(" ".join(words))
    answer = answer or [things[0].color]
    return "relist", description, "Again:", ", ".join(answer)


def _loosely(things, word: str, rng: np.random.Generator) -> str:
    """Returns a description with the things, and the words of each thing, in random order."""
    parts = []
    for thing in things:
        words = [thing.color, thing.shape, thing.place] + ["large"] * thing.large
        parts.append(" ".join(words[index] for index in rng.permutation(len(words))))
    parts += [f"word {word}"] * bool(word)
    return ", ".join(parts[index] for index in rng.permutation(len(parts)))


def text_rows(
    text: TextProcessor, examples: list[tuple[str, str, str, str]]
) -> dict[str, np.ndarray]:
    """Returns the examples as one padded batch, with `family` [G], the index of each in `NAMES`.

    Examples are as `text_example` returns them. A row of the batch (`data/batch.py`) is the prompt
    and answer of one, preceded by the tokens of its description.
    """
    rows = []
    for _, description, prompt, answer in examples:
        row = text.example(prompt, answer)
        row = {name: row[name] for name in ("tokens", "targets", "decoder_tokens") if name in row}
        seen = text.llm.backend_tokenizer.encode(description, add_special_tokens=False).ids
        row["tokens"] = np.concatenate([seen, row["tokens"]])
        if "decoder_tokens" not in row:
            row["targets"] = np.concatenate([np.full(len(seen), IGNORE), row["targets"]])
        rows.append(row)
    longest = {name: max(len(row[name]) for row in rows) for name in ("tokens", "targets")}
    round_up = lambda name: -(-longest[name] // ROUND) * ROUND
    lengths = {"slots": round_up("tokens"), "targets": round_up("targets")}
    batch = collate(rows, lengths=lengths, pad_id=text.variant.llm.pad_id)
    batch["family"] = np.array([NAMES.index(name) for name, *_ in examples], np.int32)
    return batch


class Reader(Network):
    """A language model alone; it reads the description in the place of the visual prompt.

    It is called with a batch of `text_rows` and returns the logits of the targets.
    """

    config: LanguageConfig

    def setup(self):
        """Creates the model under the name `llm`, as in `VisionLanguageModel`."""
        self.llm = LANGUAGE_MODELS[self.config.kind](self.config, jnp.float32)

    def __call__(self, batch: dict[str, jax.Array], train: bool = False) -> jax.Array:
        """Returns logits [G, A, V], aligned with the batch's targets."""
        decoder = {name: batch[name] for name in batch if name.startswith("decoder_")}
        rows = (batch[name] for name in ("segments", "positions", "asked"))
        return self.llm(self.llm.embed(batch["tokens"]), *rows, **decoder, train=train)


def pool(
    text: TextProcessor, seed: int, split: str, start: int, count: int, stage: Stage
) -> list[dict[str, np.ndarray]]:
    """Returns examples about `count` scenes as `BUCKETS` batches (`text_rows`) of similar length.

    The scenes are those of `split` from number `start` on. A scene gives one example, or none if
    `text_example` returns None; `stage` has the `things` and `relisted` of that function.
    """
    drawn = (
        text_example(seed, split, start + index, stage.things, stage.relisted)
        for index in range(count)
    )
    examples = sorted(
        (example for example in drawn if example is not None),
        key=lambda example: sum(part.count(" ") for part in example[1:]),
    )
    cuts = [len(examples) * part // BUCKETS for part in range(BUCKETS + 1)]
    return [text_rows(text, examples[a:b]) for a, b in zip(cuts, cuts[1:], strict=False)]


def start_t5(params: dict[str, Any], config: T5Config) -> dict[str, Any]:
    """Returns random parameters changed so that a small T5 can learn to look things up.

    `params` are T5's own, those below `llm`. T5 does not scale attention scores, so query kernels
    are made smaller. And with position biases near zero, T5 ignores word order for a thousand
    steps. So some heads start with a bias for neighbouring tokens (bucket d is d tokens back,
    16 + d is d tokens ahead), which is trained on.
    """
    small = config.head_width**-0.5
    params = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf * small if "query" in jax.tree_util.keystr(path) else leaf, params
    )
    ahead = config.relative_buckets // 2
    for stack, near in (
        ("encoder", ([1], [ahead + 1], [1, 2, 3, ahead + 1, ahead + 2, ahead + 3])),
        ("decoder", ([1], [2], [0, 1, 2, 3])),
    ):
        bias = np.zeros((config.relative_buckets, config.heads), np.float32)
        for head, buckets in enumerate(near[: config.heads]):
            bias[buckets, head] = 4.0
        params[stack]["relative_bias"] = jnp.asarray(bias)
    return params


def train_language(
    text: TextProcessor,
    *,
    curriculum: tuple[Stage, ...] = CURRICULUM,
    batch: int = 64,
    learning_rate: float = 2e-3,
    examples: int = 24_000,
    seed: int = 0,
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Trains the language model `text.variant.llm`; returns its parameters in float32.

    Args:
      text: the tokenizers, and the variant with the sizes.
      curriculum: the stages, one after another.
      batch: examples of a step.
      learning_rate: the peak, after a warm-up and before a cosine decay to 0.
      examples: number of examples that are drawn for each stage.
      seed: of scenes, parameters and dropout.
      log: is called after each stage with the accuracy of each family of questions.

    Returns:
      The nested dict of those below `llm`.
    """
    config = text.variant.llm
    model: Any = Reader(config)
    steps = sum(stage.steps for stage in curriculum)
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, min(200, steps // 2), steps)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.02)
    )

    def loss(params, rows, key):
        logits = model.apply({"params": params}, rows, train=True, rngs={"dropout": key})
        real = rows["targets"] != IGNORE
        each = optax.softmax_cross_entropy_with_integer_labels(
            logits, jnp.where(real, rows["targets"], 0)
        )
        return (each * real).sum() / real.sum()

    @jax.jit
    def step(params, state, rows, number):
        key = jax.random.fold_in(jax.random.key(seed), number)
        value, grads = jax.value_and_grad(loss)(params, rows, key)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    @jax.jit
    def right(params, rows):
        guess = model.apply({"params": params}, rows).argmax(-1)
        return ((guess == rows["targets"]) | (rows["targets"] == IGNORE)).all(-1)

    params: Any = None
    state, number, start = None, 0, 0
    rng = np.random.default_rng(seed)
    with Progress(steps, f"{config.kind} language model", "steps", compiles=True) as progress:
        for stage in curriculum:
            data = pool(text, seed, "text", start, examples, stage)
            start += examples
            if params is None:
                first = {name: jnp.asarray(value[:1]) for name, value in data[0].items()}
                params = model.init(jax.random.key(seed), first)["params"]
                if config.kind == "t5":
                    params["llm"] = start_t5(params["llm"], config)
                state = optimizer.init(params)
            for _ in range(stage.steps):
                bucket = data[rng.integers(BUCKETS)]
                rows = rng.integers(len(bucket["family"]), size=batch)
                chosen = {name: value[rows] for name, value in bucket.items()}
                params, state, value = step(params, state, chosen, number)
                number += 1
                progress.update(note=f"loss {float(value):.3f}" if number % 50 == 0 else "")
            validation = pool(text, seed, "validation", 0, 1500, stage)
            log(f"{config.kind}, {stage.things} things: {_by_family(right, params, validation)}")
    return params["llm"]


def _by_family(right: Callable, params: Any, rows: list[dict[str, np.ndarray]]) -> str:
    good = np.concatenate([np.asarray(right(params, bucket)) for bucket in rows])
    family = np.concatenate([bucket["family"] for bucket in rows])
    accuracies = []
    for index, name in enumerate(NAMES):
        these = family == index
        if these.any():
            accuracies.append(f"{name} {good[these].mean():.2f}")
    return f"all {good.mean():.3f}; " + ", ".join(accuracies)

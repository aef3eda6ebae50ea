"""Questions about a drawn scene: a table of families of questions, and the records made from them.

A family is a row of `FAMILIES`: a function that asks a question about a scene, templates for its
prompts, and whether it is held in (the model is tuned on it) or held out (only in evaluation, zero
shot). Every question has one right answer: it names a thing by a color or a shape that no other
thing of the scene has.

An `ask_...` function takes a scene, random numbers and `focus`, the thing to ask about (None if the
scene has no thing of a unique color and shape). It returns a `Question`, or None if the scene does
not allow one.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterator

import numpy as np

from jax_instructblip.data import templates
from jax_instructblip.data.records import Record
from jax_instructblip.data.shapes import world
from jax_instructblip.data.shapes.world import COLORS, PLACES, SHAPES, Scene, Thing

NUMBERS = ("zero", "one", "two", "three", "four", "five")
OPTIONS = 3  # number of choices of a multiple-choice question


@dataclasses.dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
      fields: the texts that fill the placeholders of a family's templates, by name.
      answer: the right answer.
      choices: the choices, with the answer among them; empty for a free answer.
    """

    fields: dict[str, str]
    answer: str
    choices: tuple[str, ...] = ()


Asker = Callable[[Scene, np.random.Generator, Thing | None], Question | None]


@dataclasses.dataclass(frozen=True)
class Family:
    """A kind of question.

    Attributes:
      ask: an `ask_...` function.
      templates: the templates of its prompts.
      held_in: True if the model is tuned on it, False if it is only evaluated.
    """

    ask: Asker
    templates: tuple[str, ...]
    held_in: bool = True


def ask_caption(scene: Scene, rng: np.random.Generator, focus: Thing | None) -> Question | None:
    """Asks for a short caption, which names the large thing and the written word."""
    main = [thing for thing in scene.things if thing.large]
    if not main or not scene.word:
        return None
    return Question({}, f"a large {main[0].color} {main[0].shape} and the word {scene.word}")


def ask_detail(scene: Scene, rng: np.random.Generator, focus: Thing | None) -> Question | None:
    """Asks for a long caption, which lists everything in the scene."""
    return Question({}, describe(scene))


def ask_color(scene: Scene, rng: np.random.Generator, focus: Thing | None) -> Question | None:
    """Asks for the color of `focus`, which the question names by its shape."""
    return focus and Question({"question": f"What color is the {focus.shape}?"}, focus.color)


def ask_shape(scene: Scene, rng: np.random.Generator, focus: Thing | None) -> Question | None:
    """Asks for the shape of `focus`, which the question names by its color."""
    return focus and Question({"question": f"Which shape is {focus.color}?"}, focus.shape)


def ask_position(scene: Scene, rng: np.random.Generator, focus: Thing | None) -> Question | None:
    """Asks for the quadrant of `focus`, which the question names by its shape or by its color."""
    if focus is None:
        return None
    name = focus.shape if rng.integers(2) else f"{focus.color} shape"
    return Question({"question": f"Where is the {name}?"}, focus.place)


def ask_count(scene: Scene, rng: np.random.Generator, focus: Thing | None) -> Question | None:
    """Asks how many things have a color or a shape, or how many there are; never zero."""
    if not scene.things:
        return None
    kind = rng.integers(3)
    if kind == 0:
        return Question({"question": "How many shapes are there?"}, NUMBERS[len(scene.things)])
    colors = Counter(thing.color for thing in scene.things)
    forms = Counter(thing.shape for thing in scene.things)
    counts = colors if kind == 1 else forms
    # Draw the number first, then a color or shape with it: otherwise most answers would be "one".
    number = _pick(sorted(set(counts.values())), rng)
    name = _pick(sorted(key for key, value in counts.items() if value == number), rng)
    text = f"How many shapes are {name}?" if kind == 1 else f"How many {name} shapes are there?"
    return Question({"question": text}, NUMBERS[number])


def ask_reading(scene: Scene, rng: np.random.Generator, focus: Thing | None) -> Question | None:
    """Asks for the written word."""
    return Question({"question": "What word is written?"}, scene.word) if scene.word else None


def ask_question_generation(
    scene: Scene, rng: np.random.Generator, focus: Thing | None
) -> Question | None:
    """Asks for the question to a given answer, which no other question about the scene has."""
    if focus is None:
        return None
    asked = {
        focus.color: f"What color is the {focus.shape}?",
        focus.shape: f"Which shape is {focus.color}?",
    }
    if sum(thing.place == focus.place for thing in scene.things) == 1:
        asked[focus.place] = f"Where is the {focus.shape}?"
    answer = _pick(list(asked), rng)
    return Question({"answer": answer}, asked[answer])


def ask_choice(scene: Scene, rng: np.random.Generator, focus: Thing | None) -> Question | None:
    """Asks for color, shape or place with `OPTIONS` choices.

    Wrong choices are colors, shapes or places of other things where there are enough.
    """
    if focus is None:
        return None
    kind = _pick(["color", "shape", "position"], rng)
    ask, names = {
        "color": (ask_color, tuple(COLORS)),
        "shape": (ask_shape, SHAPES),
        "position": (ask_position, PLACES),
    }[kind]
    question = ask(scene, rng, focus)
    truth = question.answer
    seen = {
        value
        for thing in scene.things
        for value in (thing.color, thing.shape, thing.place)
        if value in names and value != truth
    }
    unseen = [name for name in names if name != truth and name not in seen]
    wrong = _shuffled(sorted(seen), rng) + _shuffled(unseen, rng)
    choices = tuple(_shuffled([truth, *wrong[: OPTIONS - 1]], rng))
    fields = {**question.fields, "options": templates.render_options(choices)}
    return Question(fields, truth, choices)


def ask_yes_no(scene: Scene, rng: np.random.Generator, focus: Thing | None) -> Question | None:
    """Asks whether `focus` has a color; for "no", that of another thing where there is one."""
    if focus is None:
        return None
    others = sorted({thing.color for thing in scene.things} - {focus.color})
    others = others or [color for color in COLORS if color != focus.color]
    truth = rng.integers(2) == 0
    color = focus.color if truth else _pick(others, rng)
    return Question({"question": f"Is the {focus.shape} {color}?"}, "yes" if truth else "no")


def ask_color_at(scene: Scene, rng: np.random.Generator, focus: Thing | None) -> Question | None:
    """Asks for the color of the only thing in a quadrant."""
    alone = _alone(scene, rng)
    return alone and Question({"question": f"What color is at the {alone.place}?"}, alone.color)


def ask_shape_at(scene: Scene, rng: np.random.Generator, focus: Thing | None) -> Question | None:
    """Asks for the shape of the only thing in a quadrant."""
    alone = _alone(scene, rng)
    return alone and Question({"question": f"Which shape is at the {alone.place}?"}, alone.shape)


# Only the short templates of each kind, to keep the rows of this dataset short.
_QUESTION = templates.QUESTION[:5]

FAMILIES: dict[str, Family] = {
    "captioning": Family(ask_caption, templates.CAPTION[:5]),
    "color": Family(ask_color, _QUESTION),
    "shape": Family(ask_shape, _QUESTION),
    "position": Family(ask_position, _QUESTION),
    "count": Family(ask_count, _QUESTION),
    "reading": Family(ask_reading, _QUESTION),
    "question_generation": Family(ask_question_generation, templates.QUESTION_GENERATION[:4]),
    "multiple_choice": Family(ask_choice, templates.CHOICE),
    "yes_no": Family(ask_yes_no, _QUESTION, held_in=False),
    "color_at": Family(ask_color_at, _QUESTION, held_in=False),
    "shape_at": Family(ask_shape_at, _QUESTION, held_in=False),
}
# Captions on which the Q-Former is pre-trained before instruction tuning.
CAPTION_FAMILIES: dict[str, Family] = {
    "captioning": FAMILIES["captioning"],
    "detail": Family(ask_detail, templates.DETAIL),
}
HELD_IN = tuple(name for name, family in FAMILIES.items() if family.held_in)
HELD_OUT = tuple(name for name, family in FAMILIES.items() if not family.held_in)


def describe(scene: Scene) -> str:
    """Returns the scene in words: `red circle top-left, large blue ring top-right, word lamp`."""
    parts = [
        f"{'large ' if thing.large else ''}{thing.color} {thing.shape} {thing.place}"
        for thing in scene.things
    ]
    return ", ".join(parts + ([f"word {scene.word}"] if scene.word else []))


def pick_focus(scene: Scene, split: str, rng: np.random.Generator) -> Thing | None:
    """Returns the thing to ask about, of unique color and shape, or None if there is none.

    In the split `test_pairs` it is the thing with the held-out pair of color and shape.
    """
    if split == "test_pairs":
        return scene.main
    return _pick(scene.clear, rng) if scene.clear else None


def scene_questions(
    scene: Scene,
    split: str,
    rng: np.random.Generator,
    families: dict[str, Family],
) -> Iterator[tuple[str, str, Question]]:
    """Yields (family, prompt, question): one question of each of `families` that the scene allows.

    The prompt is the question in a random template of the family. `split` is that of the scene, as
    in `pick_focus`.
    """
    for name, family in families.items():
        question = family.ask(scene, rng, pick_focus(scene, split, rng))
        template = _pick(family.templates, rng)
        if question is not None:
            yield name, templates.render(template, **question.fields), question


def scene_records(
    seed: int, split: str, index: int, families: dict[str, Family] | None = None
) -> list[Record]:
    """Returns the records of one scene, one a family; each has the picture as PNG bytes.

    `split` is a key of `world.SPLITS`; `families` None means `FAMILIES`. The result depends on the
    arguments alone.
    """
    scene = world.sample_scene(seed, split, index)
    picture = world.encode(world.draw(scene))
    rng = world.scene_rng(seed, split, index, use=1)
    return [
        Record(
            id=f"shapes-{split}-{index:06d}-{name}",
            images=(picture,),
            prompt=prompt,
            answers=(question.answer,),
            task=name,
            choices=question.choices,
            split=split,
        )
        for name, prompt, question in scene_questions(scene, split, rng, families or FAMILIES)
    ]


def _alone(scene: Scene, rng: np.random.Generator) -> Thing | None:
    crowd = Counter(thing.place for thing in scene.things)
    alone = [thing for thing in scene.things if crowd[thing.place] == 1]
    return _pick(alone, rng) if alone else None


def _pick(values, rng: np.random.Generator):
    return values[int(rng.integers(len(values)))]


def _shuffled(values: list[str], rng: np.random.Generator) -> list[str]:
    return [values[index] for index in rng.permutation(len(values))]

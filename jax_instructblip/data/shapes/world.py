"""Draws the built-in toy world: pictures of colored shapes and one written word.

A scene is a function of (seed, split, index) alone, so there is nothing to download and no end of
scenes. A picture has 4 x 4 cells, each as large as a patch of the vision tower. Three to five
things, each with a color and a shape, stand in cells of their own, and a word takes two cells:

    .  .  C  .        exactly one thing is large: captions speak of it
    w  w  .  t        at least two things are *clear*: no other thing has their color or their
    .  .  .  .        shape, so a question can name them by either
    s  .  .  c        the place of a thing is its quadrant: `top-left` ... `bottom-right`

Some pairs of color and shape (`HELD_OUT_PAIRS`) never occur in what the Q-Former is trained on,
captions and questions alike; the split `test_pairs` asks about them. The frozen vision tower and
language models do know them, as released ones know the web: they were trained on the splits
`vision` and `text`, which have all pairs. Questions are in `data/shapes/tasks.py`.
"""

import dataclasses
import io

import numpy as np
from PIL import Image, ImageDraw, ImageFont

CELL = 14  # pixels a side
GRID = 4  # cells a side
SIZE = CELL * GRID  # pixels a side

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (214, 40, 40),
    "orange": (244, 140, 20),
    "yellow": (232, 212, 30),
    "green": (40, 150, 60),
    "blue": (40, 84, 214),
    "purple": (130, 48, 160),
    "pink": (246, 140, 190),
    "black": (28, 28, 28),
}
SHAPES: tuple[str, ...] = ("circle", "square", "triangle", "diamond", "cross", "ring")
WORDS = tuple(
    "bird boat book cake coin corn door fish gate hill king lamp "
    "leaf milk moon nest rain ship snow song tree wind wolf wood".split()
)
PLACES = ("top-left", "top-right", "bottom-left", "bottom-right")
# One pair a color, so that no color is held out more often than another.
HELD_OUT_PAIRS = frozenset(
    [
        ("red", "triangle"),
        ("orange", "ring"),
        ("yellow", "square"),
        ("green", "cross"),
        ("blue", "diamond"),
        ("purple", "circle"),
        ("pink", "diamond"),
        ("black", "circle"),
    ]
)
# The number that seeds each split; a new split takes a new number.
SPLITS = {
    "train": 0,
    "validation": 1,
    "test": 2,
    "test_pairs": 3,
    "captions": 4,
    "text": 5,
    "vision": 6,
}
OPEN_SPLITS = ("text", "vision")  # the frozen towers learn from these, with all pairs

FEWEST, MOST = 3, 5  # things in a scene
RADIUS = {False: 3.6, True: 5.6}  # pixels: small, large
JITTER = 1.2  # pixels that a centre may be off its cell's centre
SUPERSAMPLE = 4  # shapes are drawn at four times the size and averaged down, for smooth edges


@dataclasses.dataclass(frozen=True)
class Thing:
    """One colored shape in the cell (`row`, `column`).

    `dx` and `dy` are the pixels by which its centre is off the cell's centre.
    """

    color: str
    shape: str
    row: int
    column: int
    large: bool
    dx: float
    dy: float

    @property
    def place(self) -> str:
        """The name of the thing's quadrant, one of `PLACES`."""
        return PLACES[2 * (self.row >= GRID // 2) + (self.column >= GRID // 2)]


@dataclasses.dataclass(frozen=True)
class Scene:
    """The content of one picture.

    `word_cell` is (row, column) of the word's first cell; `background` is red, green and blue, each
    from 0 to 255.
    """

    things: tuple[Thing, ...]
    word: str
    word_cell: tuple[int, int]
    background: tuple[int, int, int]

    @property
    def main(self) -> Thing:
        """The large thing; a scene has exactly one."""
        return next(thing for thing in self.things if thing.large)

    @property
    def clear(self) -> tuple[Thing, ...]:
        """The things whose color and shape no other thing has."""
        return tuple(
            one
            for one in self.things
            if not any(
                other is not one and (other.color == one.color or other.shape == one.shape)
                for other in self.things
            )
        )


def is_held_out(thing: Thing) -> bool:
    """Tells whether the thing's pair of color and shape occurs in the split `test_pairs` alone."""
    return (thing.color, thing.shape) in HELD_OUT_PAIRS


def scene_rng(seed: int, split: str, index: int, use: int = 0) -> np.random.Generator:
    """Returns the random generator of one scene; `use` is 0 to draw it, 1 to ask about it.

    Raises:
        ValueError: the split is not one of `SPLITS`.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r} of shapes; known: {', '.join(SPLITS)}")
    return np.random.default_rng([seed, SPLITS[split], index, use])


def sample_scene(seed: int, split: str, index: int) -> Scene:
    """Returns the scene of that seed, split and index, always the same.

    Held-out pairs of color and shape occur only in `test_pairs`, where the large thing has one and
    is clear, and in `OPEN_SPLITS`, from which the frozen towers learn.
    """
    rng = scene_rng(seed, split, index)
    while True:
        things = _sample_things(rng)
        if split == "test_pairs":
            if not (is_held_out(things[0]) and _unique(things[0], things)):
                continue
        elif split not in OPEN_SPLITS and any(is_held_out(thing) for thing in things):
            continue
        if sum(_unique(thing, things) for thing in things) >= 2:
            break
    row, column = int(rng.integers(GRID)), int(rng.integers(GRID - 1))
    used = {(row, column), (row, column + 1)}
    free = [(r, c) for r in range(GRID) for c in range(GRID) if (r, c) not in used]
    cells = rng.permutation(len(free))[: len(things)]
    offsets = rng.uniform(-JITTER, JITTER, (len(things), 2)).round(2)
    placed = [
        dataclasses.replace(
            thing, row=free[cell][0], column=free[cell][1], dx=float(off[0]), dy=float(off[1])
        )
        for thing, cell, off in zip(things, cells, offsets, strict=True)
    ]
    word = WORDS[rng.integers(len(WORDS))]
    red, green, blue = (int(value) for value in rng.integers(222, 252, 3))
    # Sort by position, so that the order of the things does not tell which one is large.
    placed.sort(key=lambda thing: (thing.row, thing.column))
    return Scene(tuple(placed), word, (row, column), (red, green, blue))


def draw(scene: Scene) -> Image.Image:
    """Returns the picture of a scene, RGB, `SIZE` pixels a side; equal scenes give equal pixels."""
    canvas = Image.new("RGB", (SIZE * SUPERSAMPLE, SIZE * SUPERSAMPLE), scene.background)
    pen = ImageDraw.Draw(canvas)
    for thing in scene.things:
        x = (thing.column + 0.5) * CELL + thing.dx
        y = (thing.row + 0.5) * CELL + thing.dy
        _draw_shape(
            pen, thing.shape, x, y, RADIUS[thing.large], COLORS[thing.color], scene.background
        )
    picture = canvas.resize((SIZE, SIZE), Image.Resampling.BOX)
    row, column = scene.word_cell
    # The bitmap font is part of Pillow itself: 6 x 11 pixels a letter, the same on every machine.
    font = ImageFont.load_default_imagefont()
    left = column * CELL + (2 * CELL - 6 * len(scene.word)) // 2
    ImageDraw.Draw(picture).text((left, row * CELL + 2), scene.word, fill=(20, 20, 60), font=font)
    return picture


def encode(picture: Image.Image) -> bytes:
    """Returns the picture as PNG bytes."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _sample_things(rng: np.random.Generator) -> list[Thing]:
    """Returns three to five things that have no cell yet; the first is large, some look alike."""
    count = int(rng.integers(FEWEST, MOST + 1))
    colors = rng.integers(len(COLORS), size=count)
    shapes = rng.integers(len(SHAPES), size=count)
    alike = rng.integers(4)  # so that there is something to count
    if alike == 1:
        colors[-1] = colors[-2]
    elif alike == 2:
        shapes[-1] = shapes[-2]
    elif alike == 3 and count == MOST:
        colors[-3:] = colors[-1]
    names = tuple(COLORS)
    return [
        Thing(names[color], SHAPES[shape], 0, 0, index == 0, 0.0, 0.0)
        for index, (color, shape) in enumerate(zip(colors, shapes, strict=True))
    ]


def _unique(one: Thing, things: list[Thing]) -> bool:
    others = [thing for thing in things if thing is not one]
    return all(one.color != thing.color and one.shape != thing.shape for thing in others)


def _draw_shape(pen, shape, x, y, radius, color, background) -> None:
    x, y, r = x * SUPERSAMPLE, y * SUPERSAMPLE, radius * SUPERSAMPLE
    thick = 0.36 * r
    if shape == "circle":
        pen.ellipse((x - r, y - r, x + r, y + r), fill=color)
    elif shape == "ring":
        pen.ellipse((x - r, y - r, x + r, y + r), fill=color)
        hole = 0.4 * r
        pen.ellipse((x - hole, y - hole, x + hole, y + hole), fill=background)
    elif shape == "square":
        side = 0.86 * r
        pen.rectangle((x - side, y - side, x + side, y + side), fill=color)
    elif shape == "triangle":
        pen.polygon([(x, y - r), (x - r, y + 0.8 * r), (x + r, y + 0.8 * r)], fill=color)
    elif shape == "diamond":
        pen.polygon([(x, y - r), (x + r, y), (x, y + r), (x - r, y)], fill=color)
    elif shape == "cross":
        pen.rectangle((x - r, y - thick, x + r, y + thick), fill=color)
        pen.rectangle((x - thick, y - r, x + thick, y + r), fill=color)
    else:
        raise ValueError(f"no drawing for the shape {shape!r}; known: {', '.join(SHAPES)}")

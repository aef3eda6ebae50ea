"""The embedded default world: pictures of colored shapes and one written word, drawn on demand.

A scene is a function of (seed, split, index) alone, so the world needs no download and never runs
out. On a 4 x 4 grid of cells as large as the vision tower's patches lie three to five things, each
with a color and a shape, and a word over two cells:

    .  .  C  .        exactly one thing is large: what a caption speaks of
    w  w  .  t        at least two things are *clear*: no other has their color, none their shape,
    .  .  .  .        so a question may name them by either
    s  .  .  c        the place of a thing is its quadrant: `top-left` ... `bottom-right`

Some pairs of color and shape (`HELD_OUT_PAIRS`) are kept from all that the Q-Former is trained on,
captions and questions alike, and are asked about in the split `test_pairs`. The frozen towers do
know them, as released ones know the web: the vision tower has seen scenes of the split `vision`,
the language models have read scenes of the split `text`. What is asked about a scene stands in
`data/shapes/tasks.py`.
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
# One shape a color, so that a color or a shape alone says nothing about a pair being held out.
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
# The stream of random numbers of each split; a new split takes a new number.
SPLITS = {
    "train": 0,
    "validation": 1,
    "test": 2,
    "test_pairs": 3,
    "captions": 4,
    "text": 5,
    "vision": 6,
}
OPEN_SPLITS = ("text", "vision")  # of the frozen towers: every pair of color and shape

FEWEST, MOST = 3, 5  # things in a scene
RADIUS = {False: 3.6, True: 5.6}  # pixels: small, large
JITTER = 1.2  # pixels that a centre may be off its cell's centre
SUPERSAMPLE = 4  # shapes are drawn at four times the size and averaged down, for smooth edges


@dataclasses.dataclass(frozen=True)
class Thing:
    """One colored shape in its cell; `dx` and `dy` are pixels off the cell's centre."""

    color: str
    shape: str
    row: int
    column: int
    large: bool
    dx: float
    dy: float

    @property
    def place(self) -> str:
        """The name of its quadrant."""
        return PLACES[2 * (self.row >= GRID // 2) + (self.column >= GRID // 2)]


@dataclasses.dataclass(frozen=True)
class Scene:
    """The content of one picture; `word_cell` is row and column of the word's first cell."""

    things: tuple[Thing, ...]
    word: str
    word_cell: tuple[int, int]
    background: tuple[int, int, int]

    @property
    def main(self) -> Thing:
        """The large thing."""
        return next(thing for thing in self.things if thing.large)

    @property
    def clear(self) -> tuple[Thing, ...]:
        """The things that share neither color nor shape with another one."""
        return tuple(
            one
            for one in self.things
            if not any(
                other is not one and (other.color == one.color or other.shape == one.shape)
                for other in self.things
            )
        )


def is_held_out(thing: Thing) -> bool:
    """Tells whether its pair of color and shape is kept for the split `test_pairs`."""
    return (thing.color, thing.shape) in HELD_OUT_PAIRS


def scene_rng(seed: int, split: str, index: int, use: int = 0) -> np.random.Generator:
    """The random numbers of one scene; `use` 0 is for the scene itself, 1 for its questions.

    Raises:
        ValueError: the split is not one of `SPLITS`.
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r} of shapes; known: {', '.join(SPLITS)}")
    return np.random.default_rng([seed, SPLITS[split], index, use])


def sample_scene(seed: int, split: str, index: int) -> Scene:
    """The scene of that seed, split and index, always the same.

    Where the Q-Former is concerned held-out pairs are drawn in `test_pairs` alone: there the large
    thing is one, and it is clear.
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
    # Reading order, so that the order of the tuple says nothing that the picture does not.
    placed.sort(key=lambda thing: (thing.row, thing.column))
    return Scene(tuple(placed), word, (row, column), (red, green, blue))


def draw(scene: Scene) -> Image.Image:
    """The picture of a scene: RGB, `SIZE` pixels a side; the same scene gives the same pixels."""
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
    """The picture as PNG bytes."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def _sample_things(rng: np.random.Generator) -> list[Thing]:
    """Three to five things without a cell yet, the first one large; some are alike."""
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

"""Trains the vision tower of the embedded models to recognise what is in each cell of a scene.

Supervision is per patch (color, shape, size, word, row, column) and, on the CLS vector, about the
whole picture (counts, the word, the large thing). The linear heads are discarded afterwards, as the
last block and head of the released tower are.
"""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jax_instructblip.data.shapes import world
from jax_instructblip.models.layers import Network
from jax_instructblip.models.variants import VisionConfig
from jax_instructblip.models.vision import VisionTransformer, normalise
from jax_instructblip.progress import Progress

GREY = 0.3  # share of the training pictures without color
COUNTS = world.MOST + 1  # 0 .. MOST
# Classes of each label of a cell; the last one of the first four means "nothing of the kind".
CELL_HEADS = {
    "color": len(world.COLORS) + 1,
    "shape": len(world.SHAPES) + 1,
    "size": 3,
    "word": len(world.WORDS) + 1,
    "row": world.GRID,
    "column": world.GRID,
}
# Labels and classes of the whole picture, read from CLS.
PICTURE_HEADS = {
    "colors": (len(world.COLORS), COUNTS),
    "shapes": (len(world.SHAPES), COUNTS),
    "things": (1, COUNTS),
    "word": (1, len(world.WORDS)),
    "main color": (1, len(world.COLORS)),
    "main shape": (1, len(world.SHAPES)),
}


def scene_labels(scene: world.Scene) -> dict[str, np.ndarray]:
    """Returns the labels of one scene by name, int32: `[16]` for cells, `[n]` for the picture.

    Labels are numbers of classes. Cells are in the order of rows. Names are the keys of
    `CELL_HEADS`, whose values are the numbers of classes, and those of `PICTURE_HEADS` after the
    word `picture`, whose values are (n, number of classes).
    """
    cells = world.GRID**2
    index = np.arange(cells, dtype=np.int32)
    label = {name: np.full(cells, CELL_HEADS[name] - 1, np.int32) for name in CELL_HEADS}
    label["row"], label["column"] = index // world.GRID, index % world.GRID
    colors, forms = list(world.COLORS), list(world.SHAPES)
    counts = np.zeros(len(colors), np.int32), np.zeros(len(forms), np.int32)
    for thing in scene.things:
        cell = thing.row * world.GRID + thing.column
        color, form = colors.index(thing.color), forms.index(thing.shape)
        label["color"][cell], label["shape"][cell] = color, form
        label["size"][cell] = int(thing.large)
        counts[0][color] += 1
        counts[1][form] += 1
    word = world.WORDS.index(scene.word)
    first = scene.word_cell[0] * world.GRID + scene.word_cell[1]
    label["word"][first : first + 2] = word
    picture = {
        "colors": counts[0],
        "shapes": counts[1],
        "things": [len(scene.things)],
        "word": [word],
        "main color": [colors.index(scene.main.color)],
        "main shape": [forms.index(scene.main.shape)],
    }
    picture = {f"picture {name}": np.asarray(value, np.int32) for name, value in picture.items()}
    return {**label, **picture}


def labelled_scenes(seed: int, split: str, count: int) -> dict[str, np.ndarray]:
    """Draws scenes; returns uint8 `images` `[count, H, W, 3]` and the stacked labels by name.

    The scenes are the first `count` of `split`, one of `world.SPLITS`. The labels are those of
    `scene_labels`, with an axis of scenes in front; H and W are `world.SIZE`.
    """
    rows = []
    with Progress(count, "drawing scenes", "scenes") as progress:
        for index in range(count):
            scene = world.sample_scene(seed, split, index)
            rows.append({"images": np.asarray(world.draw(scene)), **scene_labels(scene)})
            progress.update()
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


class Probed(Network):
    """The vision tower followed by a norm and one linear head per label.

    It is called with normalised pixels `[B, H, W, 3]` and returns logits by the names of
    `scene_labels`.
    """

    config: VisionConfig

    @nn.compact
    def __call__(self, images: jax.Array) -> dict[str, jax.Array]:
        """Returns logits by label: `[B, 16, classes]` of cells, `[B, n, classes]` of pictures."""
        x = VisionTransformer(self.config, jnp.float32, name="vision")(images)
        x = nn.LayerNorm(name="probe_norm")(x)
        logits = {
            name: nn.Dense(classes, name=f"probe {name}")(x[:, 1:])
            for name, classes in CELL_HEADS.items()
        }
        for name, (labels, classes) in PICTURE_HEADS.items():
            y = nn.Dense(labels * classes, name=f"probe picture {name}")(x[:, 0])
            logits[f"picture {name}"] = y.reshape(-1, labels, classes)
        return logits


def some_grey(images: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns normalised pixels with some pictures in grey, and float `[B]`, 1 if in color.

    `images` are uint8 `[B, H, W, 3]`; the pixels have the same shape. The tower must know a shape
    without its color. Otherwise it represents pairs of color and shape, and a model that is trained
    on some pairs does not generalise to others.
    """
    pixels = normalise(images)
    which, mix = jax.random.split(key)
    grey = jax.random.uniform(which, images.shape[:1]) < GREY
    weights = jax.random.dirichlet(mix, jnp.full(3, 2.0), images.shape[:1])
    faded = jnp.einsum("BHWC,BC->BHW", pixels, weights)[..., None]
    pixels = jnp.where(grey[:, None, None, None], faded, pixels)
    return pixels, 1.0 - grey


def train_vision(
    config: VisionConfig,
    *,
    steps: int = 1500,
    batch: int = 64,
    scenes: int = 16_000,
    learning_rate: float = 1e-3,
    seed: int = 0,
    log: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Trains the vision tower; returns its parameters in float32.

    Args:
      config: the sizes of the tower.
      steps: number of training steps.
      batch: images of a step.
      scenes: number of scenes to train on.
      learning_rate: the peak, after a warm-up and before a cosine decay to 0.
      seed: of scenes and parameters.
      log: is called at the end with the accuracy of each label on unseen scenes.

    Returns:
      The nested dict of those below `vision`.
    """
    data = labelled_scenes(seed, "vision", scenes)
    unseen = labelled_scenes(seed, "validation", 512)
    pairs = labelled_scenes(seed, "test_pairs", 512)
    model: Any = Probed(config)
    params: Any = model.init(jax.random.key(seed), data["images"][:1])["params"]
    # Positions as small as in a released tower (0.02) are learned too slowly for a run this short.
    params["vision"]["pos_embed"] *= 10.0
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, min(100, steps // 2), steps)
    optimizer = optax.chain(
        optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.05)
    )

    def loss(params, rows, key):
        pixels, colored = some_grey(rows["images"], key)
        logits = model.apply({"params": params}, pixels)
        total = 0.0
        for name in logits:
            each = optax.softmax_cross_entropy_with_integer_labels(logits[name], rows[name])
            if "color" in name:
                each = each * colored[:, None] * (each.shape[0] / colored.sum())
            total += each.mean()
        return total

    @jax.jit
    def step(params, state, rows, number):
        key = jax.random.fold_in(jax.random.key(seed), number)
        value, grads = jax.value_and_grad(loss)(params, rows, key)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    @jax.jit
    def hits(params, rows):
        logits = model.apply({"params": params}, rows["images"])
        return {name: (logits[name].argmax(-1) == rows[name]).mean() for name in logits}

    state = optimizer.init(params)
    rng = np.random.default_rng(seed)
    with Progress(steps, "vision tower", "steps", compiles=True) as progress:
        for number in range(steps):
            rows = rng.integers(scenes, size=batch)
            chosen = {name: value[rows] for name, value in data.items()}
            params, state, value = step(params, state, chosen, number)
            progress.update(note=f"loss {float(value):.3f}" if number % 50 == 0 else "")
    for name, rows in (("unseen scenes", unseen), ("scenes of held-out pairs", pairs)):
        shares = ", ".join(f"{key} {float(hit):.3f}" for key, hit in hits(params, rows).items())
        log(f"vision tower on {name}: {shares}")
    return params["vision"]

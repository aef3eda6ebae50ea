"""AdamW with the papers' learning rate schedules; a leaf's name decides about its weight decay."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

# Leaf names decide, not dimensions: biases stacked over layers have two. `temp`, a scalar, decays
# as in the released code, which exempts only one-dimensional parameters.
DECAYED = ("kernel", "embedding", "queries", "cls", "pos_embed", "relative_bias", "temp")
NOT_DECAYED = ("bias", "scale")


def warmup_cosine(
    *, start: float, peak: float, end: float, warmup_steps: int, total_steps: int
) -> optax.Schedule:
    """Returns a schedule: linear from `start` to `peak`, then half a cosine down to `end`.

    Step 0 gets `start`, step `warmup_steps` gets `peak`; `total_steps` would get `end`.
    InstructBLIP uses 1e-8, 1e-5, 0; 1,000 and 60,000 steps.

    Raises:
        ValueError: the warm-up is not shorter than the run.
    """
    if not 0 <= warmup_steps < total_steps:
        raise ValueError(
            f"warm-up of {warmup_steps} steps in a run of {total_steps}: the warm-up must end "
            "before the run does; shorten it or lengthen the run"
        )

    def rate(step: jax.typing.ArrayLike) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        done = jnp.clip((step - warmup_steps) / (total_steps - warmup_steps), 0.0, 1.0)
        cosine = end + 0.5 * (peak - end) * (1.0 + jnp.cos(math.pi * done))
        warm = start + (peak - start) * step / max(warmup_steps, 1)
        return jnp.where(step < warmup_steps, warm, cosine)

    return rate


def staircase_cosine(
    *,
    start: float,
    peak: float,
    end: float,
    warmup_steps: int,
    total_steps: int,
    epoch_steps: int,
) -> optax.Schedule:
    """Returns LAVIS's schedule: a cosine whose rate is constant within each inner epoch.

    An inner epoch has `epoch_steps` steps. The warm-up happens in epoch 0 only: it stays at `peak`
    once reached, and if it would be longer than epoch 0, the rest of it is dropped (LAVIS
    `linear_warmup_cosine_lr`, `iters_per_inner_epoch`).

    Raises:
        ValueError: an epoch is shorter than 1 step or longer than the run.
    """
    if epoch_steps < 1 or total_steps < epoch_steps:
        raise ValueError(
            f"epochs of {epoch_steps} steps do not fit a run of {total_steps} steps: expected 1 to "
            f"{total_steps}; shorten the epochs or lengthen the run"
        )
    epochs = total_steps / epoch_steps

    def rate(step: jax.typing.ArrayLike) -> jax.Array:
        step = jnp.asarray(step, jnp.float32)
        epoch = step // epoch_steps
        warm = jnp.minimum(peak, start + (peak - start) * step / max(warmup_steps, 1))
        cosine = end + 0.5 * (peak - end) * (1.0 + jnp.cos(math.pi * epoch / epochs))
        return jnp.where(epoch == 0, warm, cosine)

    return rate


def decays(params: Any) -> Any:
    """Returns a tree of booleans like `params`: True for leaves with weight decay.

    Raises:
        ValueError: lists all leaves whose names are in neither `DECAYED` nor `NOT_DECAYED`.
    """
    names = lambda path: str(getattr(path[-1], "key", path[-1]))
    known = DECAYED + NOT_DECAYED
    flat, _ = jax.tree_util.tree_flatten_with_path(params)
    unknown = [jax.tree_util.keystr(path) for path, _ in flat if names(path) not in known]
    if unknown:
        raise ValueError(
            f"no rule says whether weight decay applies to {', '.join(unknown)}: leaf names are "
            f"{', '.join(known)}"
        )
    return jax.tree_util.tree_map_with_path(lambda path, _: names(path) in DECAYED, params)


def rate_scales(params: Any, vision_layer_decay: float) -> Any:
    """Returns the factor of each leaf's learning rate: a number, or [Y, 1, ...] for stacked layers.

    The result has the structure of `params`, the trained trees; decay is `vision_layer_decay`.

        patches, CLS, positions, the norm before the blocks     decay^(Y + 1)
        block i of the Y blocks of the vision tower             decay^(Y - i)
        everything else                                         1

    The released code makes these groups (`lr_scale`), but its scheduler never multiplies by the
    factor. Here it applies, as in the BLIP-2 paper.
    """
    if "vision" not in params:
        return jax.tree.map(lambda leaf: 1.0, params)
    layers = jax.tree.leaves(params["vision"]["layers"])[0].shape[0]
    by_layer = vision_layer_decay ** np.arange(layers, 0, -1, dtype=np.float64)

    def scale(path: Any, leaf: Any) -> Any:
        names = [key.key for key in path]
        if names[0] != "vision":
            return 1.0
        if "layers" not in names:
            return vision_layer_decay ** (layers + 1)
        return by_layer.astype(np.float32).reshape(layers, *[1] * (leaf.ndim - 1))

    return jax.tree_util.tree_map_with_path(scale, params)


def adamw(
    schedule: optax.Schedule,
    *,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.05,
    vision_layer_decay: float = 1.0,
) -> optax.GradientTransformation:
    """Returns AdamW as in `torch.optim.AdamW`: decay is multiplied by the step's learning rate.

    `vision_layer_decay` lowers the rate of the vision tower from its last layer to its first
    (`rate_scales`); the state has the same form with any value. This does not clip gradients:
    `step.train_step` does, because it computes the norm anyway.
    """
    plain = optax.adamw(schedule, b1=b1, b2=b2, eps=eps, weight_decay=weight_decay, mask=decays)
    if vision_layer_decay == 1:
        return plain

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        updates, state = plain.update(updates, state, params)
        scales = rate_scales(updates, vision_layer_decay)
        return jax.tree.map(lambda leaf, scale: leaf * scale, updates, scales), state

    return optax.GradientTransformation(plain.init, update)

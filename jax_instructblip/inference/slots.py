"""Slots: the state of many answers on the device, each at a step of its own.

    request --admit--> [ slot | slot | slot | ... ] --advance--> up to k tokens more in each
                         free   step 3 step 17

A slot is the decoding loop of `decode.py` for a batch of one question, with the key, the settings
and the limit that choose its tokens. All slots are one pytree, and `advance` is `jax.vmap` of one
slot's step: that each has its own position needs no other model. An ended or free slot computes
along, and nobody reads what.

Shapes depend on `Sizes` and on the padded prompts alone, so two kinds of programs serve all
requests: one `admit` for each padded shape of a prompt, and two of `advance`, of which the greedy
one does not sort the vocabulary.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_instructblip.data.spec import Batch
from jax_instructblip.inference import decode, stops
from jax_instructblip.inference.sampling import TracedSettings
from jax_instructblip.models.vlm import Model


class Sizes(NamedTuple):
    """The sizes of all slots, which compiled programs depend on.

    Attributes:
      count: number of slots.
      width: cached slots of a prompt, visual vectors included; shorter prompts are padded.
      max_new_tokens: most new tokens of any request.
    """

    count: int
    width: int
    max_new_tokens: int


class Request(NamedTuple):
    """One question as the device reads it: padded arrays, and what chooses the tokens."""

    batch: Batch  # one row
    key: Any  # [1, 2] uint32: the data of the row's random key
    settings: TracedSettings
    limit: Any  # [] most new tokens


class Slots(NamedTuple):
    """The state of all slots: each leaf has an axis of slots (`_axes`)."""

    state: decode.State  # with B = R = 1
    key: jax.Array
    settings: TracedSettings
    limit: jax.Array


def free_slots(
    model: Model, sizes: Sizes, params: dict[str, Any], request: Request, table: stops.Table
) -> Slots:
    """Slots without a request, for programs that admit requests like this one."""
    one = jax.eval_shape(functools.partial(_prefill, model, sizes), params, request, table)
    return jax.tree.map(
        lambda leaf, axis: np.zeros(
            (*leaf.shape[:axis], sizes.count, *leaf.shape[axis:]), leaf.dtype
        ),
        one,
        _axes(one),
    )


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def admit(
    model: Model,
    sizes: Sizes,
    params: dict[str, Any],
    slots: Slots,
    index: int,
    request: Request,
    table: stops.Table,
) -> Slots:
    """The slots after the prompt of `request` is read into slot `index`: it has its first token.

    Nothing of the slot's former request is left.
    """
    one = _prefill(model, sizes, params, request, table)
    put = lambda all_slots, slot, axis: jax.lax.dynamic_update_index_in_dim(
        all_slots, slot, index, axis
    )
    return jax.tree.map(put, slots, one, _axes(one))


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def advance(
    model: Model,
    do_sample: bool,
    params: dict[str, Any],
    slots: Slots,
    live: np.ndarray,
    most: int,
    table: stops.Table,
) -> tuple[dict[str, jax.Array], Slots]:
    """The slots after `most` further steps, or fewer: as soon as a live slot has ended.

    `live` [N] is True for slots with a request. Unless `do_sample`, all live slots must be greedy.
    Also returns what a host reads:

        steps     []      int32    steps that were taken
        done      [N]     bool     slots that have ended
        lengths   [N]     int32    number of new tokens so far, of live slots
        tokens    [N, T]  int32
        logprobs  [N, T]  float32
    """
    axes = _axes(slots)
    step = functools.partial(_step, model, do_sample, params, table)
    step = jax.vmap(step, in_axes=(axes,), out_axes=axes)

    def unfinished(carry: tuple[jax.Array, Slots]) -> jax.Array:
        steps, slots = carry
        return (steps < most) & ~(live & slots.state.done[:, 0, 0]).any()

    def body(carry: tuple[jax.Array, Slots]) -> tuple[jax.Array, Slots]:
        steps, slots = carry
        return steps + 1, step(slots)

    done = slots.state.done | ~live[:, None, None]
    slots = slots._replace(state=slots.state._replace(done=done))
    steps, slots = jax.lax.while_loop(unfinished, body, (jnp.zeros((), jnp.int32), slots))
    state = slots.state
    report = {
        "steps": steps,
        "done": state.done[:, 0, 0],
        "lengths": state.step,
        "tokens": state.tokens[:, 0, 0],
        "logprobs": state.logprobs[:, 0, 0],
    }
    return report, slots


def _prefill(
    model: Model, sizes: Sizes, params: dict[str, Any], request: Request, table: stops.Table
) -> Slots:
    """One slot, without the axis of slots, after its prompt is read and its first token chosen."""
    key = jax.random.wrap_key_data(request.key)
    state = decode.start(
        *(model, sizes.max_new_tokens, True, params, request.batch, key, request.settings, table)
    )
    return _limited(Slots(_widened(state, sizes.width), *request[1:]))


def _step(
    model: Model, do_sample: bool, params: dict[str, Any], table: stops.Table, slot: Slots
) -> Slots:
    """One slot after one more token."""
    key = jax.random.wrap_key_data(slot.key)
    state = decode.advance(model, do_sample, params, key, slot.settings, table, slot.state)
    return _limited(slot._replace(state=state))


def _limited(slot: Slots) -> Slots:
    """The slot, ended if it has as many tokens as its limit allows."""
    state = slot.state
    return slot._replace(state=state._replace(done=state.done | (state.step >= slot.limit)))


def _widened(state: decode.State, width: int) -> decode.State:
    """The state with the cached prompt padded to `width` slots, which nobody sees."""
    short = width - state.cache["prefix_mask"].shape[1]
    pad = lambda leaf, axis: jnp.pad(
        leaf, [(0, short if index == axis % leaf.ndim else 0) for index in range(leaf.ndim)]
    )
    cache = state.cache | {
        "prefix": jax.tree.map(lambda leaf: pad(leaf, -2), state.cache["prefix"]),
        "prefix_mask": pad(state.cache["prefix_mask"], 1),
    }
    return state._replace(cache=cache)


def _axes(slots: Slots) -> Any:
    """The axis of slots of each leaf: 0, or 1 behind the axis of stacked layers in a cache."""
    axes, cache = jax.tree.map(lambda leaf: 0, slots), slots.state.cache
    stacked = [name for name in ("prefix", "tail") if not isinstance(cache[name], tuple)]
    behind = {name: jax.tree.map(lambda leaf: 1, cache[name]) for name in stacked}
    return axes._replace(state=axes.state._replace(cache=axes.state.cache | behind))

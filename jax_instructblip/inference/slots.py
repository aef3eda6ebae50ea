"""Slots: the state of many answers on the device, each at a step of its own.

    requests --read--> [ prompt | prompt ]       several prompts by one program, ahead of time
                            | place
                       [  slot  |  slot  |  slot  | ... ] --advance--> up to k tokens more in each
                         step 1   step 17   free

A slot is the decoding loop of `decode.py` for a batch of one question, with the key, the settings
and the limit that choose its tokens. All slots are one pytree, and `advance` is `jax.vmap` of one
slot's step: that each has its own position needs no other model. An ended or free slot computes
along, and its results are not read.

Shapes depend on `Sizes`, on the padded prompts and on how many are read at once, so few programs
serve all requests: `read` for each number and padded shape of prompts, and two of `advance`, of
which the greedy one does not sort the vocabulary, for each number of slots that it is used for.
"""

import functools
from collections.abc import Callable, Sequence
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
      width: cached length of a prompt, visual vectors included; shorter prompts are padded.
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
    """The state of slots, or of read prompts that have none yet; each leaf has an axis of them."""

    state: decode.State  # with B = R = 1
    key: jax.Array
    settings: TracedSettings
    limit: jax.Array


def free_slots(model: Model, sizes: Sizes, prompts: Slots) -> Slots:
    """All slots, without a request; `prompts`, which come from `read`, tell the leaves' shapes."""
    free = lambda axis, leaf: np.zeros(
        (*leaf.shape[:axis], sizes.count, *leaf.shape[axis + 1 :]), leaf.dtype
    )
    return _map(model, free, prompts)


def stack(requests: Sequence[Request]) -> Request:
    """Requests of one padded shape, stacked on a new first axis of each leaf, for `read`."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *requests)


@functools.partial(jax.jit, static_argnums=(0, 1))
def read(
    model: Model, sizes: Sizes, params: dict[str, Any], requests: Request, table: stops.Table
) -> Slots:
    """Reads the prompts of the requests that `stack` returned, and chooses the first token of each.

    Returns a `Slots` with one entry per request, for `place`. `table` is one of stops (`stops.py`),
    or None.
    """
    axes = _axes(model)

    def prompt(request: Request) -> tuple[Slots, jax.Array]:
        state, logits = decode.read_prompt(
            *(model, sizes.max_new_tokens, params, request.batch, request.settings, table)
        )
        return Slots(_widened(state, sizes.width), *request[1:]), logits

    def choose(do_sample: bool) -> Slots:
        return jax.vmap(functools.partial(_choose, model, do_sample, table))(small, logits)

    prompts, logits = jax.vmap(prompt, out_axes=(axes, 0))(requests)
    cache = prompts.state.cache
    small = prompts._replace(state=prompts.state._replace(cache=None))  # a branch would copy it
    greedy = requests.settings.greedy.all()
    small = jax.lax.cond(greedy, lambda: choose(False), lambda: choose(True))
    return small._replace(state=small.state._replace(cache=cache))


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def place(model: Model, slots: Slots, prompts: Slots, row: int, index: int) -> Slots:
    """The slots with slot `index` given to entry `row` of `prompts`, which come from `read`.

    Nothing of the slot's former request is left.
    """
    return _put(model, slots, _take(model, prompts, row), index)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=1)
def move(model: Model, slots: Slots, source: int, index: int) -> Slots:
    """The slots with the request of slot `source` copied to slot `index`."""
    return _put(model, slots, _take(model, slots, source), index)


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

    `live` `[N]` is True for those of the first N slots that have a request; the other slots stay as
    they are. Unless `do_sample`, all live slots must be greedy. `table` is as in `read`. Returned
    before the slots is what a host reads (T is the `max_new_tokens` of `sizes`):

        steps     []      int32    steps that were taken
        done      [N]     bool     slots that have ended
        lengths   [N]     int32    number of new tokens so far, of live slots
        tokens    [N, T]  int32
        logprobs  [N, T]  float32
    """
    axes = _axes(model)
    step = functools.partial(_step, model, do_sample, params, table)
    step = jax.vmap(step, in_axes=(axes,), out_axes=axes)

    def unfinished(carry: tuple[jax.Array, Slots]) -> jax.Array:
        steps, first = carry
        return (steps < most) & ~(live & first.state.done[:, 0, 0]).any()

    def body(carry: tuple[jax.Array, Slots]) -> tuple[jax.Array, Slots]:
        steps, first = carry
        return steps + 1, step(first)

    first = _map(model, lambda axis, leaf: leaf[(slice(None),) * axis + (slice(len(live)),)], slots)
    done = first.state.done | ~live[:, None, None]
    first = first._replace(state=first.state._replace(done=done))
    steps, first = jax.lax.while_loop(unfinished, body, (jnp.zeros((), jnp.int32), first))
    state = first.state
    report = {
        "steps": steps,
        "done": state.done[:, 0, 0],
        "lengths": state.step,
        "tokens": state.tokens[:, 0, 0],
        "logprobs": state.logprobs[:, 0, 0],
    }
    update = lambda axis, leaf, part: jax.lax.dynamic_update_slice_in_dim(leaf, part, 0, axis)
    return report, _map(model, update, slots, first)


def _step(
    model: Model, do_sample: bool, params: dict[str, Any], table: stops.Table, slot: Slots
) -> Slots:
    """One slot, without the axis of slots, after one more token."""
    key = jax.random.wrap_key_data(slot.key)
    state = decode.advance(model, do_sample, params, key, slot.settings, table, slot.state)
    return _limited(slot._replace(state=state))


def _choose(
    model: Model, do_sample: bool, table: stops.Table, slot: Slots, logits: jax.Array
) -> Slots:
    """One slot after its first token, chosen from the logits of its prompt."""
    key = jax.random.wrap_key_data(slot.key)
    state = decode.choose(model, do_sample, key, slot.settings, table, slot.state, logits)
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


def _take(model: Model, slots: Slots, index: Any) -> Slots:
    """One of the slots, without the axis of slots."""
    take = lambda axis, leaf: jax.lax.dynamic_index_in_dim(leaf, index, axis, keepdims=False)
    return _map(model, take, slots)


def _put(model: Model, slots: Slots, slot: Slots, index: Any) -> Slots:
    """The slots with `slot`, which has no axis of slots, in place of the one at `index`."""
    put = lambda axis, leaf, part: jax.lax.dynamic_update_index_in_dim(leaf, part, index, axis)
    return _map(model, put, slots, slot)


def _map(model: Model, function: Callable[..., Any], *slots: Slots) -> Slots:
    """Calls `function(axis of slots, leaf, ...)` for each leaf."""
    of_axis = lambda axis, *trees: jax.tree.map(functools.partial(function, axis), *trees)
    return jax.tree.map(of_axis, _axes(model), *slots)


def _axes(model: Model) -> Slots:
    """The axis of slots of each leaf: 0, or 1 behind the axis of stacked layers in a cache.

    One number stands for all leaves below it.
    """
    behind = 0 if model.scans.llm.unstacked else 1
    cache = {"prefix": behind, "prefix_mask": 0, "tail": behind, "lineage": 0, "step": 0}
    first: Any = 0
    state = decode.State(*[first] * len(decode.State._fields))._replace(cache=cache)
    return Slots(*[first] * len(Slots._fields))._replace(state=state)

"""The ends of answers, found inside the compiled loop: eos, other ids, or a text of several tokens.

A table tells the state of an answer after each token (`data/chat_text.py` draws one):

    token --table[state]--> state, until it is the last one: the answer has ended

So a stop is found whatever tokens spell it, at the cost of one look-up a step. Without a table an
answer ends with eos, and there are no states: None stands for them.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Table = jax.Array | np.ndarray | None  # [S, V] int8: the state behind a token; S: it has ended
States = Any  # [B, R] int32 of unfinished answers, or None without a table


def first_states(table: Table, rows: tuple[int, ...]) -> States:
    """The states, of shape `rows`, of answers that have no token yet; None without a table."""
    return None if table is None else jnp.zeros(rows, jnp.int32)


def next_states(table: Table, states: States, tokens: jax.Array) -> States:
    """The states `[B, R]` after one more token of each answer; ended ones stay ended."""
    if table is None:
        return None
    last = len(table)
    behind = jnp.asarray(table)[jnp.minimum(states, last - 1), tokens].astype(jnp.int32)
    return jnp.where(states == last, last, behind)


def have_ended(table: Table, eos_id: int, states: States, tokens: jax.Array) -> jax.Array:
    """Mask `[B, R]` of the answers that the newest tokens have ended.

    `tokens` `[B, R]` are these tokens, `states` the states after them.
    """
    return tokens == eos_id if table is None else states == len(table)


def ends(table: Table, eos_id: int, states: States, shape: tuple[int, ...]) -> jax.Array:
    """Mask `[B, R, V]` of the tokens that would end each of a sample's R answers.

    `shape` is that of the mask.
    """
    if table is None:
        return jax.lax.broadcasted_iota(jnp.int32, shape, len(shape) - 1) == eos_id
    return jnp.asarray(table)[jnp.minimum(states, len(table) - 1)] == len(table)


def lengths(table: Table, eos_id: int, tokens: jax.Array) -> jax.Array:
    """The length of each answer in `tokens` `[B, R, T]`, its stop included; T without one."""
    if table is None:
        return first_true(tokens == eos_id)

    def step(states: jax.Array, token: jax.Array) -> tuple[jax.Array, jax.Array]:
        states = next_states(table, states, token)
        return states, states == len(table)

    initial = first_states(table, tokens.shape[:-1])
    _, ended = jax.lax.scan(step, initial, jnp.moveaxis(tokens, -1, 0))
    return first_true(jnp.moveaxis(ended, 0, -1))


def first_true(mask: jax.Array) -> jax.Array:
    """The position, from 1, of the first True in each row of `mask` `[..., T]`; T if none is."""
    length = jnp.argmax(mask, axis=-1) + 1
    return jnp.where(mask.any(axis=-1), length, mask.shape[-1]).astype(jnp.int32)

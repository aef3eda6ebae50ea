"""Greedy decoding and sampling: prompt in, tokens out, the whole loop one compiled program.

    prefill --logits--> choose --token--> [ decode_step --logits--> choose --token--> ] ... eos
                                            `lax.while_loop`, until every row has its eos

Parameters are arguments of the program, never constants in it; so are the sampling settings, which
therefore change without a new compilation. What compiles anew: another shape of the batch, another
`max_new_tokens` (the length of the cache's tail) and the change from greedy to sampling.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jax_instructblip.models.instructblip import InstructBlip


class Settings(NamedTuple):
    """How scores become a token, as traced scalars; the defaults change nothing."""

    min_new_tokens: Any = 0  # eos is masked before
    repetition_penalty: Any = 1.0
    temperature: Any = 1.0
    top_k: Any = 0  # 0: off
    top_p: Any = 1.0  # 1: off


class _State(NamedTuple):
    """What the loop carries; R = 1 row a sample."""

    step: jax.Array  # [] new tokens so far
    token: jax.Array  # [B, R] the newest
    done: jax.Array  # [B, R] has its eos
    seen: jax.Array  # [B, R, V] ids that the repetition penalty counts
    tokens: jax.Array  # [B, R, T]
    logprobs: jax.Array  # [B, R, T]
    cache: Any  # the language model's


def generate_tokens(
    model: InstructBlip,
    params: dict[str, Any],
    batch: dict[str, Any],
    keys: jax.Array,
    *,
    max_new_tokens: int,
    sample: bool = False,
    min_new_tokens: int = 0,
    repetition_penalty: float = 1.0,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> dict[str, jax.Array]:
    """New tokens for every row of `batch`, with the log-probability of each.

        tokens    [B, 1, max_new_tokens]  int32    padding (the variant's pad_id) after eos
        lengths   [B, 1]                  int32    how many are real, eos included
        logprobs  [B, 1, max_new_tokens]  float32  0 after eos
        steps     []                      int32    how many the longest row needed

    Without `sample` each token is the best one. With it a token is drawn after `temperature`,
    `top_k` (0: off; ties with the k-th stay) and `top_p` (1: off; the smallest set of best tokens
    whose probabilities reach it), in this order, as Hugging Face does. `keys` [B] are random keys,
    one a row, read only when sampling: what a row draws depends on its own key and on the step, not
    on its neighbours.

    `min_new_tokens` masks eos before that many tokens. `repetition_penalty` divides the positive
    scores of ids that were generated before, and multiplies the negative ones. T5's start id counts
    as generated, as in Hugging Face; a decoder-only row counts its new tokens alone (there the
    released code also counts an `<s>` that was never read, and transformers 5 the prompt).

    `logprobs` come from the float32 log-softmax of the unmodified logits: under sampling, too, they
    say how likely the model holds the token, not how likely the truncated distribution drew it.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens is {max_new_tokens}, expected at least 1")
    integer, real = jnp.int32, jnp.float32
    settings = Settings(
        jnp.asarray(min_new_tokens, integer),
        jnp.asarray(repetition_penalty, real),
        jnp.asarray(temperature, real),
        jnp.asarray(top_k, integer),
        jnp.asarray(top_p, real),
    )
    return _decode(model, max_new_tokens, sample, params, batch, keys, settings)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _decode(
    model: InstructBlip,
    max_new_tokens: int,
    sample: bool,
    params: dict[str, Any],
    batch: dict[str, Any],
    keys: jax.Array,
    settings: Settings,
) -> dict[str, jax.Array]:
    llm, variables = model.variant.llm, {"params": params}

    def choose(state: _State, logits: jax.Array) -> _State:
        """The state one token longer; `logits` [B, R, V] are those of that token."""
        scores = penalise(logits, state.seen, settings.repetition_penalty)
        early = state.step < settings.min_new_tokens
        scores = scores.at[..., llm.eos_id].set(jnp.where(early, -jnp.inf, scores[..., llm.eos_id]))
        if sample:
            now = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, state.step)
            token = jax.vmap(draw, in_axes=(0, 0, None))(now, scores, settings)
        else:
            token = jnp.argmax(scores, axis=-1)
        token = jnp.where(state.done, llm.pad_id, token).astype(jnp.int32)
        logprob = jnp.take_along_axis(jax.nn.log_softmax(logits), token[..., None], axis=-1)
        logprob = jnp.where(state.done, 0.0, logprob[..., 0])
        return state._replace(
            step=state.step + 1,
            token=token,
            done=state.done | (token == llm.eos_id),
            seen=state.seen | jax.nn.one_hot(token, logits.shape[-1], dtype=bool),
            tokens=state.tokens.at[..., state.step].set(token),
            logprobs=state.logprobs.at[..., state.step].set(logprob),
        )

    def unfinished(state: _State) -> jax.Array:
        return (state.step < max_new_tokens) & ~state.done.all()

    def advance(state: _State) -> _State:
        logits, cache = model.apply(variables, state.token, state.cache, method="decode_step")
        return choose(state._replace(cache=cache), logits)

    # The last token is never fed back, so the tail needs one slot less.
    tail = max(max_new_tokens - 1, 1)
    logits, cache = model.apply(variables, batch, tail, method="prefill")
    rows = logits.shape[:2]
    seen = jnp.zeros(logits.shape, bool)
    if llm.kind == "t5":
        seen = seen.at[..., llm.decoder_start_id].set(True)
    state = _State(
        step=jnp.zeros((), jnp.int32),
        token=jnp.zeros(rows, jnp.int32),
        done=jnp.zeros(rows, bool),
        seen=seen,
        tokens=jnp.full((*rows, max_new_tokens), llm.pad_id, jnp.int32),
        logprobs=jnp.zeros((*rows, max_new_tokens), jnp.float32),
        cache=cache,
    )
    state = jax.lax.while_loop(unfinished, advance, choose(state, logits))
    return {
        "tokens": state.tokens,
        "lengths": first_eos(state.tokens, llm.eos_id),
        "logprobs": state.logprobs,
        "steps": state.step,
    }


def first_eos(tokens: jax.Array, eos_id: int) -> jax.Array:
    """Length of each row of `tokens` `[..., T]` up to and with its first eos; T without one."""
    is_eos = tokens == eos_id
    length = jnp.argmax(is_eos, axis=-1) + 1
    return jnp.where(is_eos.any(axis=-1), length, tokens.shape[-1]).astype(jnp.int32)


def penalise(scores: jax.Array, seen: jax.Array, penalty: jax.Array) -> jax.Array:
    """`scores`, those of `seen` ids divided by `penalty`, or multiplied where below zero."""
    return jnp.where(seen, jnp.where(scores < 0, scores * penalty, scores / penalty), scores)


def draw(key: jax.Array, scores: jax.Array, settings: Settings) -> jax.Array:
    """One token `[R]` for each row of `scores` `[R, V]`, by temperature, then top-k, then top-p."""
    order = jnp.argsort(scores, axis=-1, descending=True)
    ranked = truncate(jnp.take_along_axis(scores, order, axis=-1), settings)
    pick = jnp.argmax(ranked + jax.random.gumbel(key, ranked.shape), axis=-1)
    return jnp.take_along_axis(order, pick[..., None], axis=-1)[..., 0]


def truncate(ranked: jax.Array, settings: Settings) -> jax.Array:
    """Scores `[R, V]`, best first, after temperature, with those that must not be drawn at -inf."""
    ranked = ranked / settings.temperature
    width = ranked.shape[-1]
    last = jnp.clip(settings.top_k, 1, width) - 1
    worst = jax.lax.dynamic_slice_in_dim(ranked, last, 1, axis=-1)
    ranked = jnp.where((settings.top_k > 0) & (ranked < worst), -jnp.inf, ranked)
    chance = jax.nn.softmax(ranked, axis=-1)
    better = jnp.cumsum(chance, axis=-1) - chance  # the probability of all better tokens
    # With top_p = 1 the rounding of the sum must not drop the last ones; the best one always stays.
    keep = (better < settings.top_p) | (settings.top_p >= 1)
    keep = keep.at[..., 0].set(True)
    return jnp.where(keep, ranked, -jnp.inf)

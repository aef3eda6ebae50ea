"""Greedy decoding and sampling: the whole loop from prompt to tokens is one compiled program.

    prefill --logits--> choose --token--> [ decode_step --logits--> choose --token--> ] ... eos
                                            `lax.while_loop`, until every row has ended

Parameters and sampling settings are arguments of the program, so new values do not recompile it. It
is compiled again for another shape of the batch, for another `max_new_tokens` (the length of the
cache's tail), and separately for greedy decoding and for sampling, with and without a table of
stops (`stops.py`).

`stream_tokens` compiles the two parts of the loop, `start` and `advance`, as separate programs,
so that each token is available as soon as it is chosen. The slots of `slots.py` are made of the
same parts.
"""

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_instructblip.inference import stops
from jax_instructblip.inference.generation_config import GenerationConfig
from jax_instructblip.inference.sampling import (
    TracedSettings,
    argmax,
    process_logits,
    sample,
    seen_ids,
)
from jax_instructblip.models.vlm import Model


class State(NamedTuple):
    """The state of the decoding loop, with one row per sample (R = 1)."""

    step: jax.Array  # [] number of new tokens so far
    token: jax.Array  # [B, R] the newest token
    done: jax.Array  # [B, R] True for rows that have ended
    seen: jax.Array  # [B, R, V] ids that the repetition penalty counts
    tokens: jax.Array  # [B, R, T]
    logprobs: jax.Array  # [B, R, T]
    stop: stops.States  # [B, R]
    cache: Any  # the language model's


def generate_tokens(
    model: Model,
    params: dict[str, Any],
    batch: dict[str, Any],
    keys: jax.Array,
    config: GenerationConfig,
    table: stops.Table = None,
) -> dict[str, jax.Array]:
    """Generates tokens for every row of `batch`, with the log-probability of each.

        tokens    [B, 1, max_new_tokens]  int32    padding (the variant's pad_id) after the end
        lengths   [B, 1]                  int32    number of tokens before padding, eos included
        logprobs  [B, 1, max_new_tokens]  float32  0 after the end
        steps     []                      int32    number of steps that the longest row needed

    A row ends with eos, or where a `table` of stops (`stops.py`) says so. `batch` has padded
    prompts, as `model.prefill` takes them.

    Unless `config` samples, each token is the best one. Otherwise it is drawn after `temperature`,
    `top_k` (ties with the k-th stay) and `top_p` (the smallest set of best tokens whose
    probabilities reach it), in this order, as in Hugging Face. `keys` `[B]` are random keys, one a
    row (`sampling.row_keys`), read only when sampling: the draws of a row depend on its own key and
    on the step, not on other rows. The config's seed and settings of beam search are not read.

    `logprobs` come from the float32 log-softmax of the unmodified logits, also under sampling: they
    are the model's own probabilities, not those of the truncated distribution.
    """
    chosen = TracedSettings.of(config)
    return _decode(model, config.max_new_tokens, config.sample, params, batch, keys, chosen, table)


def stream_tokens(
    model: Model,
    params: dict[str, Any],
    batch: dict[str, Any],
    keys: jax.Array,
    config: GenerationConfig,
    table: stops.Table = None,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields tokens and log-probabilities, each `[B]`, of every step until all rows have ended.

    Arguments and values are those of `generate_tokens`; rows that have ended give padding. The
    device computes one step ahead.
    """
    chosen = TracedSettings.of(config)
    max_new_tokens, do_sample = config.max_new_tokens, config.sample
    prompt = params, batch, keys, chosen, table
    newest, done, state = _first(model, max_new_tokens, do_sample, *prompt)
    for _ in range(max_new_tokens - 1):
        coming, ended, state = _next(model, do_sample, params, keys, chosen, table, state)
        yield jax.device_get(newest)
        if np.all(done):
            return
        newest, done = coming, ended
    yield jax.device_get(newest)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _decode(
    model: Model,
    max_new_tokens: int,
    do_sample: bool,
    params: dict[str, Any],
    batch: dict[str, Any],
    keys: jax.Array,
    settings: TracedSettings,
    table: stops.Table,
) -> dict[str, jax.Array]:
    def unfinished(state: State) -> jax.Array:
        return (state.step < max_new_tokens) & ~state.done.all()

    following = functools.partial(advance, model, do_sample, params, keys, settings, table)
    state = start(model, max_new_tokens, do_sample, params, batch, keys, settings, table)
    state = jax.lax.while_loop(unfinished, following, state)
    return {
        "tokens": state.tokens,
        "lengths": stops.lengths(table, model.vocabulary.eos_id, state.tokens),
        "logprobs": state.logprobs,
        "steps": state.step,
    }


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _first(*arguments: Any) -> tuple[tuple[jax.Array, jax.Array], jax.Array, State]:
    return _newest(start(*arguments))


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=6)
def _next(*arguments: Any) -> tuple[tuple[jax.Array, jax.Array], jax.Array, State]:
    return _newest(advance(*arguments))


def _newest(state: State) -> tuple[tuple[jax.Array, jax.Array], jax.Array, State]:
    """Each row's (newest token, its log-probability), the mask of ended rows, the state."""
    logprob = jax.lax.dynamic_index_in_dim(state.logprobs[:, 0], state.step - 1, 1, keepdims=False)
    return (state.token[:, 0], logprob), state.done, state


def start(
    model: Model,
    max_new_tokens: int,
    do_sample: bool,
    params: dict[str, Any],
    batch: dict[str, Any],
    keys: jax.Array,
    settings: TracedSettings,
    table: stops.Table,
) -> State:
    """The state of the loop after the prompt is read and the first token is chosen.

    `do_sample` is True if tokens are drawn: the config's `sample`. `settings` are the others of the
    config (`TracedSettings.of`). All other arguments are those of `generate_tokens`.
    """
    state, logits = read_prompt(model, max_new_tokens, params, batch, settings, table)
    return choose(model, do_sample, keys, settings, table, state, logits)


def read_prompt(
    model: Model,
    max_new_tokens: int,
    params: dict[str, Any],
    batch: dict[str, Any],
    settings: TracedSettings,
    table: stops.Table,
) -> tuple[State, jax.Array]:
    """The state of the loop before the first token, and the logits `[B, R, V]` to choose it by.

    The arguments are those of `start`.
    """
    ids = model.vocabulary
    # The last token is never fed back, so the tail needs one slot less.
    tail = max(max_new_tokens - 1, 1)
    logits, cache = model.apply({"params": params}, batch, tail, method="prefill")
    rows = logits.shape[:2]
    state = State(
        step=jnp.zeros((), jnp.int32),
        token=jnp.zeros(rows, jnp.int32),
        done=jnp.zeros(rows, bool),
        seen=seen_ids(ids, batch, settings.prompt_counts)[:, None],
        tokens=jnp.full((*rows, max_new_tokens), ids.pad_id, jnp.int32),
        logprobs=jnp.zeros((*rows, max_new_tokens), jnp.float32),
        stop=stops.first_states(table, rows),
        cache=cache,
    )
    return state, logits


def advance(
    model: Model,
    do_sample: bool,
    params: dict[str, Any],
    keys: jax.Array,
    settings: TracedSettings,
    table: stops.Table,
    state: State,
) -> State:
    """The state of the loop after one more token; the other arguments are those of `start`."""
    variables = {"params": params}
    logits, cache = model.apply(variables, state.token, state.cache, method="decode_step")
    return choose(model, do_sample, keys, settings, table, state._replace(cache=cache), logits)


def choose(
    model: Model,
    do_sample: bool,
    keys: jax.Array,
    settings: TracedSettings,
    table: stops.Table,
    state: State,
    logits: jax.Array,
) -> State:
    """The state of the loop with the next token added, chosen from `logits` `[B, R, V]`.

    Rows that have ended get padding. The other arguments are those of `start`.
    """
    ids = model.vocabulary
    ends = stops.ends(table, ids.eos_id, state.stop, logits.shape)
    scores = process_logits(logits, state.seen, state.step, ends, settings)
    if do_sample:
        now = jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys, state.step)
        token = jax.vmap(sample, in_axes=(0, 0, None))(now, scores, settings)
    else:
        token = argmax(scores)
    token = jnp.where(state.done, ids.pad_id, token).astype(jnp.int32)
    logprob = jnp.take_along_axis(jax.nn.log_softmax(logits), token[..., None], axis=-1)
    logprob = jnp.where(state.done, 0.0, logprob[..., 0])
    stop = stops.next_states(table, state.stop, token)
    return state._replace(
        step=state.step + 1,
        token=token,
        done=state.done | stops.have_ended(table, ids.eos_id, stop, token),
        seen=state.seen | jax.nn.one_hot(token, logits.shape[-1], dtype=bool),
        tokens=state.tokens.at[..., state.step].set(token),
        logprobs=state.logprobs.at[..., state.step].set(logprob),
        stop=stop,
    )

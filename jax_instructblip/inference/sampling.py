"""From logits to the scores that choose a token: what greedy, sampling and beam search share.

Two rules of the repetition penalty and of lengths are followed, named by who computes so:

    released        the original code with its transformers 4.33, which the published figures are of
    transformers5   `generate` of transformers 5

Both count the ids generated so far, and T5's start id. Of a decoder-only model, `released` counts
an `<s>` besides, which stands before the answer there though the model never reads it;
`transformers5` counts the ids of the prompt (`generate` even `<image>`, which is no id here).
`beam_search.py` tells how they differ in lengths.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_instructblip.inference.generation_config import GenerationConfig
from jax_instructblip.models.variants import LanguageConfig, T5Config

# What the released code puts before the new ids of a decoder-only model: `bos_token_id` of the
# language model's generation config, which for Vicuna is not the bos of its tokenizer (`</s>`).
_UNREAD_ID = {"llama": 1}


class TracedSettings(NamedTuple):
    """Settings of the choice of a token, as traced scalars; the defaults change nothing."""

    min_new_tokens: Any = 0  # eos is masked before
    repetition_penalty: Any = 1.0
    prompt_counts: Any = False  # the penalty is by the rule `transformers5`
    temperature: Any = 1.0
    top_k: Any = 0  # 0: off
    top_p: Any = 1.0  # 1: off

    @classmethod
    def of(cls, config: GenerationConfig) -> "TracedSettings":
        """Device scalars of one dtype each, so that no value compiles anew."""
        defaults = cls()
        return cls(
            jnp.asarray(config.min_new_tokens, jnp.int32),
            jnp.asarray(config.repetition_penalty, jnp.float32),
            jnp.asarray(config.length_rule == "transformers5", bool),
            jnp.asarray(config.temperature or defaults.temperature, jnp.float32),
            jnp.asarray(config.top_k or defaults.top_k, jnp.int32),
            jnp.asarray(config.top_p or defaults.top_p, jnp.float32),
        )


def seen_ids(llm: LanguageConfig, batch: dict[str, Any], prompt_counts: jax.Array) -> jax.Array:
    """Ids `[B, V]` that the repetition penalty counts before the first new token."""
    nothing = jnp.zeros((len(batch["tokens"]), llm.vocab), bool)
    if isinstance(llm, T5Config):
        return nothing.at[:, llm.decoder_start_id].set(True)
    rows = jnp.arange(len(nothing))[:, None]
    text = (batch["slots"] < 0) & (batch["segments"] > 0)
    prompt = nothing.at[rows, batch["tokens"]].max(text)
    return jnp.where(
        prompt_counts, prompt, nothing.at[:, _UNREAD_ID.get(llm.kind, llm.bos_id)].set(True)
    )


def penalise(scores: jax.Array, seen: jax.Array, penalty: jax.Array) -> jax.Array:
    """`scores`, those of `seen` ids divided by `penalty`, or multiplied where below zero."""
    return jnp.where(seen, jnp.where(scores < 0, scores * penalty, scores / penalty), scores)


def process_logits(
    scores: jax.Array, seen: jax.Array, step: jax.Array, eos_id: int, settings: TracedSettings
) -> jax.Array:
    """`scores` `[B, R, V]` after the penalty of `seen` ids, without eos before its time."""
    scores = penalise(scores, seen, settings.repetition_penalty)
    early = step < settings.min_new_tokens
    return jnp.where(early & (_places(scores) == eos_id), -jnp.inf, scores)


def argmax(scores: jax.Array) -> jax.Array:
    """The first place of the largest of `scores` `[..., V]`, as `jnp.argmax`.

    Two plain reductions, which XLA vectorises on a CPU; its argmax takes ten times as long there.
    """
    last = scores.shape[-1] - 1
    largest = scores == scores.max(axis=-1, keepdims=True)
    return jnp.where(largest, _places(scores), last).min(axis=-1)


BLOCK = 128  # scores, of which only the best one is looked at first


def best_of_rows(scores: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """The `count` best of `scores` `[B, R, V]` of each sample: values and places in R * V.

    As `top_k` of the flat rows, of equal ones the earlier. `top_k` on a CPU looks at every score
    for long; here it sees the best score of each block, then the `count` blocks that these are of,
    in which the `count` best must be.
    """
    batch, rows, vocab = scores.shape
    width = -(-vocab // BLOCK)
    fill = ((0, 0), (0, 0), (0, width * BLOCK - vocab))
    blocks = jnp.pad(scores, fill, constant_values=-jnp.inf).reshape(batch, rows * width, BLOCK)
    _, chosen = jax.lax.top_k(blocks.max(axis=-1), min(count, rows * width))
    chosen = jnp.sort(chosen, axis=-1)  # so that of equal scores the earlier comes first again
    columns = (chosen % width * BLOCK)[..., None] + jnp.arange(BLOCK)[None, None]
    inside = columns < vocab
    indices = (chosen // width * vocab)[..., None] + jnp.where(inside, columns, 0)
    indices = indices.reshape(batch, -1)
    candidates = jnp.take_along_axis(scores.reshape(batch, -1), indices, axis=1)
    values, picked = jax.lax.top_k(
        jnp.where(inside.reshape(batch, -1), candidates, -jnp.inf), count
    )
    # Or XLA joins slices of these with those above, and sorts where it need only select.
    values, picked = jax.lax.optimization_barrier((values, picked))
    return values, jnp.take_along_axis(indices, picked, axis=1)


def first_eos(tokens: jax.Array, eos_id: int) -> jax.Array:
    """Length of each row of `tokens` `[..., T]` up to and with its first eos; T without one."""
    is_eos = tokens == eos_id
    length = jnp.argmax(is_eos, axis=-1) + 1
    return jnp.where(is_eos.any(axis=-1), length, tokens.shape[-1]).astype(jnp.int32)


def sample(key: jax.Array, scores: jax.Array, settings: TracedSettings) -> jax.Array:
    """One token `[R]` for each row of `scores` `[R, V]`, by temperature, then top-k, then top-p."""
    order = jnp.argsort(scores, axis=-1, descending=True)
    ranked = truncate(jnp.take_along_axis(scores, order, axis=-1), settings)
    pick = jnp.argmax(ranked + jax.random.gumbel(key, ranked.shape), axis=-1)
    return jnp.take_along_axis(order, pick[..., None], axis=-1)[..., 0]


def truncate(ranked: jax.Array, settings: TracedSettings) -> jax.Array:
    """Scores `[R, V]`, best first, after temperature, with those that must not be drawn at -inf."""
    ranked = ranked / settings.temperature
    width = ranked.shape[-1]
    last = jnp.clip(settings.top_k, 1, width) - 1
    worst = jax.lax.dynamic_slice_in_dim(ranked, last, 1, axis=-1)
    ranked = jnp.where((settings.top_k > 0) & (ranked < worst), -jnp.inf, ranked)
    chance = jax.nn.softmax(ranked, axis=-1)
    better = jnp.cumsum(chance, axis=-1) - chance  # the probability of all better tokens
    # With top_p = 1 the rounding of the sum must not drop the last ones; the best one always stays.
    kept = (better < settings.top_p) | (settings.top_p >= 1)
    kept = kept.at[..., 0].set(True)
    return jnp.where(kept, ranked, -jnp.inf)


def _places(scores: jax.Array) -> jax.Array:
    """The id that each of `scores` `[..., V]` is of."""
    return jax.lax.broadcasted_iota(jnp.int32, scores.shape, scores.ndim - 1)


def seed_key(seed: int) -> np.ndarray:
    """The seed's key as an array, which processes of one mesh can share."""
    return np.asarray(jax.random.key_data(jax.random.key(seed)))


@jax.jit
def row_keys(key: Any, rows: np.ndarray) -> jax.Array:
    """A random key for each row, from the seed's key and the row's place in the call."""
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.wrap_key_data(key), rows)

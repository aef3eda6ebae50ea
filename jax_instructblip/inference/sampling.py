"""The choice of a token from logits: what greedy decoding, sampling and beam search share.

`GenerationConfig.length_rule` selects how ids count for the repetition penalty, and for the lengths
of beams (`beam_search.py`):

    released          as the original code with transformers 4.33: published figures
    transformers4.26  as BLIP-2's with transformers 4.26: other lengths of beams, the same penalty
    transformers5     as `generate` of transformers 5

The penalty always counts the ids generated so far, and T5's start id. In a decoder-only model,
`released` also counts `<s>`, which the original code puts before the answer although the model
never reads it; `transformers5` also counts the ids of the prompt (`generate` even `<image>`, which
is no id here).
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_instructblip.inference.generation_config import GenerationConfig
from jax_instructblip.models.blip2 import CaptionVocabulary
from jax_instructblip.models.variants import LanguageConfig, T5Config

# The id that the released code puts before the new ids of a decoder-only model: `bos_token_id` of
# its generation config, which for Vicuna is not the bos of its tokenizer (`</s>`).
_UNREAD_ID = {"llama": 1}


class TracedSettings(NamedTuple):
    """The settings for choosing a token, as traced scalars; the defaults change no score."""

    min_new_tokens: Any = 0  # eos is impossible before
    repetition_penalty: Any = 1.0
    prompt_counts: Any = False  # the penalty counts ids of the prompt: rule `transformers5`
    temperature: Any = 1.0
    top_k: Any = 0  # 0: off
    top_p: Any = 1.0  # 1: off
    greedy: Any = False  # `sample` takes the best token: for greedy rows of a program that samples

    @classmethod
    def of(cls, config: GenerationConfig) -> "TracedSettings":
        """The settings of a config as device scalars; new values do not recompile a program."""
        defaults = cls()
        return cls(
            jnp.asarray(config.min_new_tokens, jnp.int32),
            jnp.asarray(config.repetition_penalty, jnp.float32),
            jnp.asarray(config.length_rule == "transformers5", bool),
            jnp.asarray(config.temperature or defaults.temperature, jnp.float32),
            jnp.asarray(config.top_k or defaults.top_k, jnp.int32),
            jnp.asarray(config.top_p or defaults.top_p, jnp.float32),
            jnp.asarray(not config.sample, bool),
        )


def seen_ids(
    llm: LanguageConfig | CaptionVocabulary, batch: dict[str, Any], prompt_counts: jax.Array
) -> jax.Array:
    """Mask `[B, V]` of the ids that the repetition penalty counts before the first new token.

    `llm` is the model's `vocabulary`, `batch` has the prompts (`models/vlm.py`); `prompt_counts` is
    the field of `TracedSettings`.
    """
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
    """Divides positive scores by `penalty` where `seen`, and multiplies negative ones by it."""
    return jnp.where(seen, jnp.where(scores < 0, scores * penalty, scores / penalty), scores)


def process_logits(
    scores: jax.Array, seen: jax.Array, step: jax.Array, ends: jax.Array, settings: TracedSettings
) -> jax.Array:
    """Applies the repetition penalty to `scores` `[B, R, V]`; an end too early becomes -inf.

    R answers of each sample are running. The masks `seen` (ids that are penalised) and `ends` (ids
    that would end an answer) have the same shape, or one that broadcasts to it. An end is too early
    while `step`, the number of new tokens so far, is below `min_new_tokens`.
    """
    scores = penalise(scores, seen, settings.repetition_penalty)
    early = step < settings.min_new_tokens
    return jnp.where(early & ends, -jnp.inf, scores)


def argmax(scores: jax.Array) -> jax.Array:
    """The index of the largest of `scores` `[..., V]`, the first if several are equal.

    Computed by two plain reductions, which XLA vectorises on a CPU; `jnp.argmax` takes ten times as
    long there.
    """
    last = scores.shape[-1] - 1
    largest = scores == scores.max(axis=-1, keepdims=True)
    return jnp.where(largest, _places(scores), last).min(axis=-1)


BLOCK = 128  # scores per block in `best_of_rows`


def best_of_rows(scores: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """The `count` best of each sample's `scores` `[B, R, V]`: values, and indices into R * V.

    Both are `[B, count]`, best first, and equal to `top_k` over a sample's flattened rows: of equal
    scores the earlier comes first. On a CPU `top_k` over all scores is slow, so it runs twice on
    fewer: over the best score of each block of `BLOCK` scores, then over the `count` best blocks,
    which must contain the `count` best scores.
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
    # Without the barrier XLA joins slices of these results with those above, and sorts all.
    values, picked = jax.lax.optimization_barrier((values, picked))
    return values, jnp.take_along_axis(indices, picked, axis=1)


def sample(key: jax.Array, scores: jax.Array, settings: TracedSettings) -> jax.Array:
    """Draws one token `[R]` per row of `scores` `[R, V]`, by temperature, top-k, then top-p.

    `key` is one random key for all rows. If `settings.greedy`, the best token is taken instead, and
    nothing is sorted.
    """

    def drawn() -> jax.Array:
        order = jnp.argsort(scores, axis=-1, descending=True)
        ranked = truncate(jnp.take_along_axis(scores, order, axis=-1), settings)
        pick = jnp.argmax(ranked + jax.random.gumbel(key, ranked.shape), axis=-1)
        return jnp.take_along_axis(order, pick[..., None], axis=-1)[..., 0].astype(jnp.int32)

    return jax.lax.cond(settings.greedy, lambda: argmax(scores), drawn)


def truncate(ranked: jax.Array, settings: TracedSettings) -> jax.Array:
    """Applies temperature, top-k and top-p to scores `[R, V]` in descending order.

    Scores of tokens that must not be drawn become -inf.
    """
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
    """The vocabulary id of each entry of `scores` `[..., V]`, in an array of the same shape."""
    return jax.lax.broadcasted_iota(jnp.int32, scores.shape, scores.ndim - 1)


def seed_key(seed: int) -> np.ndarray:
    """The random key of a seed as raw data `[2]` uint32, which any process of a mesh can pass."""
    return np.asarray(jax.random.key_data(jax.random.key(seed)))


@jax.jit
def row_keys(key: Any, rows: np.ndarray) -> jax.Array:
    """A random key `[B]` for each row, from a `seed_key` and the question's index in the call.

    `rows` `[B]` holds these indices.
    """
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.wrap_key_data(key), rows)

"""Beam search for every language model: the whole search is one compiled program.

A running row is one of the K unfinished answers (beams) of a sample. A step continues them:

    K running rows of a sample --decode_step--> scores [K, V] --the 2K best--> candidates
        those that end, among the first K       -->  answers, of which the K best are kept
        the K best others                       -->  the running rows of the next step

The prompt is read once, by one row, and its part of the cache is never repeated. Only the cache of
new tokens has K rows. Its contents do not move: each row has a list of the slots that it continues,
its lineage (`models/cache.py`). A sample is done when no running row can beat its K answers. At
`max_new_tokens` running rows become answers as they are, cut off. The search ends when all samples
are done.

An answer is ranked by the sum of its scores / length^length_penalty. With n new tokens, eos
included, two values of `GenerationConfig.length_rule` differ in

                                       released               transformers5
    length of an answer with eos       n                      n
    length of an answer cut off        n + 1                  n
    running rows that become answers   all K                  those among the first K candidates
    "can beat" compares the score of   the best candidate,    the best running row
                                       with or without eos
    at the length                      n + 1                  n

and "transformers4.26" is "released" but for the last line, where it has n. They differ
because transformers 4.33 counts an id before the first new one (T5's start id, or an id that is
never read) and leaves eos out. Settings are arguments of the program: new values do not recompile
it. With a table of stops (`stops.py`) several tokens may end a row: then the K best others are
chosen among the tokens that do not.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_instructblip.inference import stops
from jax_instructblip.inference.generation_config import EARLY_STOPPING, GenerationConfig
from jax_instructblip.inference.sampling import (
    TracedSettings,
    best_of_rows,
    process_logits,
    seen_ids,
)
from jax_instructblip.models.cache import expand_beams, reorder_beams
from jax_instructblip.models.vlm import Model


class Search(NamedTuple):
    """The settings that rank answers and end the search, as traced arrays."""

    weights: jax.Array  # [max_new_tokens + 1] length^length_penalty of lengths 1, 2, ...
    stop: jax.Array  # [] index of `early_stopping` in EARLY_STOPPING
    farthest: jax.Array  # [] True: "can beat" compares at the last length, not at the current one
    ahead: jax.Array  # [] tokens added to the length at which "can beat" compares
    released: jax.Array  # [] True for the length rule "released"


class Answers(NamedTuple):
    """The best finished answers of each sample so far, the best one first."""

    scores: jax.Array  # [B, K]; -inf for no answer yet
    tokens: jax.Array  # [B, K, T]
    logprobs: jax.Array  # [B, K, T]


class _Candidates(NamedTuple):
    """Unfinished answers extended by one token, the best one first; each field is `[B, C]`."""

    total: jax.Array  # the sum of the row's scores, the new token's included
    parent: jax.Array  # the row that is continued
    token: jax.Array
    logprob: jax.Array  # of the token


class _State(NamedTuple):
    """The state of the search loop, with K running rows (unfinished answers) per sample."""

    step: jax.Array  # [] number of new tokens so far
    tokens: jax.Array  # [B, K, T] of the running rows, the best one first
    logprobs: jax.Array  # [B, K, T]
    sums: jax.Array  # [B, K] sums of the rows' scores
    first: jax.Array  # [B, K] True for a row that was among the first K candidates
    parents: jax.Array  # [B, K] the row of the cache that each continues
    seen: jax.Array  # [B, K, V] ids that the repetition penalty counts
    done: jax.Array  # [B]
    answers: Answers
    stop: stops.States  # [B, K] of the running rows
    cache: Any  # the language model's, its tail with K rows


def beam_tokens(
    model: Model,
    params: dict[str, Any],
    batch: dict[str, Any],
    config: GenerationConfig,
    table: stops.Table = None,
) -> dict[str, jax.Array]:
    """The K = `config.num_beams` best answers to every row of `batch`, the best one first.

        tokens    [B, K, max_new_tokens]  int32    padding (the variant's pad_id) after the end
        lengths   [B, K]                  int32    number of tokens before padding, eos included
        logprobs  [B, K, max_new_tokens]  float32  of the model itself; 0 after the end
        scores    [B, K]                  float32  the values by which answers are ranked
        steps     []                      int32    number of steps that the longest search needed

    A row ends with eos, or where a `table` of stops (`stops.py`) says so. `batch` has padded
    prompts, as `model.prefill` takes them. A ValueError is raised for fewer than 2 beams.

    `early_stopping`: True ends a sample's search at K answers. The other values end it when no
    unfinished answer can beat them: False assumes its current length (a guess, as length_penalty >
    0 favours longer answers), "never" the most favourable length (safe). `min_new_tokens` and
    `repetition_penalty` act on log-probabilities.
    """
    max_new_tokens, num_beams = config.max_new_tokens, config.num_beams
    length_penalty, early_stopping = config.length_penalty, config.early_stopping
    if num_beams < 2:
        raise ValueError(f"num_beams is {num_beams}, expected at least 2 (1 is greedy)")
    search = Search(
        # Computed in double precision and rounded once, as in transformers, so that rounding does
        # not change a ranking.
        jnp.asarray(np.arange(1.0, max_new_tokens + 2) ** length_penalty, jnp.float32),
        jnp.asarray(EARLY_STOPPING.index(early_stopping), jnp.int32),
        jnp.asarray(early_stopping == "never" and length_penalty > 0),
        jnp.asarray(config.length_rule == "released", jnp.int32),
        jnp.asarray(config.length_rule != "transformers5"),
    )
    chosen = TracedSettings.of(config)
    return _search(model, max_new_tokens, num_beams, params, batch, chosen, search, table)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _search(
    model: Model,
    max_new_tokens: int,
    num_beams: int,
    params: dict[str, Any],
    batch: dict[str, Any],
    settings: TracedSettings,
    search: Search,
    table: stops.Table,
) -> dict[str, jax.Array]:
    ids, variables = model.vocabulary, {"params": params}
    choose = functools.partial(_choose, ids.eos_id, table, settings, search)

    def unfinished(state: _State) -> jax.Array:
        return (state.step < max_new_tokens) & ~state.done.all()

    def advance(state: _State) -> _State:
        cache = reorder_beams(state.cache, state.parents)
        newest = jax.lax.dynamic_index_in_dim(state.tokens, state.step - 1, axis=2, keepdims=False)
        logits, cache = model.apply(variables, newest, cache, method="decode_step")
        return choose(state._replace(cache=cache), logits)

    # The last token is never fed back, so the tail needs one slot less.
    tail = max(max_new_tokens - 1, 1)
    logits, cache = model.apply(variables, batch, tail, method="prefill")
    state = _initial(ids, num_beams, max_new_tokens, batch, settings, table, cache)
    logits = jnp.broadcast_to(logits, state.seen.shape)
    state = choose(state, logits)
    state = jax.lax.while_loop(unfinished, advance, state)
    answers = _with_the_cut_off(search, state)
    return {
        "tokens": answers.tokens,
        "lengths": stops.lengths(table, ids.eos_id, answers.tokens),
        "logprobs": answers.logprobs,
        "scores": answers.scores,
        "steps": state.step,
    }


def _initial(
    ids: Any,
    beams: int,
    length: int,
    batch: dict[str, Any],
    settings: TracedSettings,
    table: stops.Table,
    cache: Any,
) -> _State:
    """The state before the first token: K empty rows, of which only the first is continued."""
    size = len(batch["tokens"])
    tokens = jnp.full((size, beams, length), ids.pad_id, jnp.int32)
    logprobs = jnp.zeros((size, beams, length), jnp.float32)
    seen = seen_ids(ids, batch, settings.prompt_counts)[:, None]
    return _State(
        step=jnp.zeros((), jnp.int32),
        tokens=tokens,
        logprobs=logprobs,
        # All rows are equal: the candidates of the first step must come from the first row.
        sums=jnp.tile(jnp.where(jnp.arange(beams) == 0, 0.0, -1e9), (size, 1)),
        first=jnp.ones((size, beams), bool),
        parents=jnp.zeros((size, beams), jnp.int32),
        seen=jnp.broadcast_to(seen, (size, beams, ids.vocab)),
        done=jnp.zeros(size, bool),
        answers=Answers(jnp.full((size, beams), -jnp.inf), tokens, logprobs),
        stop=stops.first_states(table, (size, beams)),
        cache=expand_beams(cache, beams),
    )


def _choose(
    eos_id: int,
    table: stops.Table,
    settings: TracedSettings,
    search: Search,
    state: _State,
    logits: jax.Array,
) -> _State:
    """The state one token longer; the new tokens are chosen by `logits` `[B, K, V]`."""
    beams, vocab = logits.shape[1:]
    logprobs = jax.nn.log_softmax(logits)
    ending = stops.ends(table, eos_id, state.stop, logits.shape)
    scores = process_logits(logprobs, state.seen, state.step, ending, settings)
    sums = scores + state.sums[..., None]
    candidates = _best_candidates(sums, logprobs, 2 * beams)
    behind = _states_behind(table, state, candidates)
    ends = stops.have_ended(table, eos_id, behind, candidates.token)

    first = jax.tree.map(lambda leaf: leaf[:, :beams], candidates)
    counts = ends[:, :beams] & ~state.done[:, None]
    ended = jnp.where(counts, first.total / search.weights[state.step], -jnp.inf)
    answers = _best(state.answers, Answers(ended, *_longer(state, first)))

    if table is None:  # at most K of the candidates end: each row has one eos
        ranks = jnp.argsort(ends, axis=1, stable=True)[:, :beams]
        others = jax.tree.map(lambda leaf: _take(leaf, ranks), candidates)
        are_first = ranks < beams
    else:
        others = _best_candidates(jnp.where(ending, -jnp.inf, sums), logprobs, beams)
        are_first = jnp.arange(beams)[None] < (~ends[:, :beams]).sum(axis=1, keepdims=True)
    tokens, chances = _longer(state, others)
    newest = jax.nn.one_hot(others.token, vocab, dtype=bool)
    state = state._replace(
        step=state.step + 1,
        tokens=tokens,
        logprobs=chances,
        sums=others.total,
        first=are_first,
        parents=others.parent,
        seen=_take(state.seen, others.parent) | newest,
        answers=answers,
        stop=_states_behind(table, state, others),
    )
    best = jnp.where(search.released, candidates.total[:, 0], others.total[:, 0])
    return state._replace(done=state.done | _cannot_better(search, state, best))


def _best_candidates(sums: jax.Array, logprobs: jax.Array, count: int) -> _Candidates:
    """The `count` best candidates of each sample by their `sums` `[B, K, V]`, best one first."""
    vocab = sums.shape[-1]
    totals, indices = best_of_rows(sums, count)
    logprob = _take(logprobs.reshape(len(sums), -1), indices)
    return _Candidates(totals, indices // vocab, indices % vocab, logprob)


def _states_behind(table: stops.Table, state: _State, candidates: _Candidates) -> stops.States:
    """The states `[B, C]` of candidates in the table of stops."""
    if table is None:
        return None
    return stops.next_states(table, _take(state.stop, candidates.parent), candidates.token)


def _longer(state: _State, candidates: _Candidates) -> tuple[jax.Array, jax.Array]:
    """Tokens and log-probabilities `[B, K, T]` of K candidates, from parent row and new token."""
    rows = (_take(leaf, candidates.parent) for leaf in (state.tokens, state.logprobs))
    new = (candidates.token, candidates.logprob)
    tokens, logprobs = (
        row.at[..., state.step].set(leaf) for row, leaf in zip(rows, new, strict=True)
    )
    return tokens, logprobs


def _cannot_better(search: Search, state: _State, best: jax.Array) -> jax.Array:
    """Mask `[B]` of the samples whose K answers no unfinished one can beat any more.

    `best` `[B]` is the highest sum of scores of the unfinished answers.
    """
    last = state.tokens.shape[-1]
    length = jnp.where(search.farthest, last, state.step) + search.ahead
    worst = state.answers.scores[:, -1]
    better = best / search.weights[length - 1] > worst
    stands = (worst > -jnp.inf) & (~better | (search.stop == 1))
    # At the last step transformers 5 first turns running rows into answers.
    return stands & (search.released | (state.step < last))


def _with_the_cut_off(search: Search, state: _State) -> Answers:
    """The K best answers of each sample at the end of the search.

    In samples that are not done, unfinished answers count as they are.
    """
    length = state.step + search.released
    scores = state.sums / search.weights[length - 1]
    ends = (search.released | state.first) & ~state.done[:, None]
    scores = jnp.where(ends, scores, -jnp.inf)
    return _best(state.answers, Answers(scores, state.tokens, state.logprobs))


def _best(answers: Answers, others: Answers) -> Answers:
    """The K best of each sample from K answers and further ones; of equal scores the earlier."""
    pool = jax.tree.map(lambda *leaves: jnp.concatenate(leaves, axis=1), answers, others)
    scores, rows = jax.lax.top_k(pool.scores, answers.scores.shape[1])
    return Answers(scores, _take(pool.tokens, rows), _take(pool.logprobs, rows))


def _take(values: jax.Array, rows: jax.Array) -> jax.Array:
    """Gathers along axis 1: `values` `[B, R, ...]` at `rows` `[B, K]` becomes `[B, K, ...]`."""
    return jax.vmap(lambda value, row: value[row])(values, rows)

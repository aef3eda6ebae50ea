"""Ranking: the log-probability of each of many candidate answers.

The candidates form a tree after the prompt. Tokens that several of them begin with are computed
once; the last token of a candidate is never fed to the model, only looked up in the logits of the
token before it:

    red car, red dog, a red dog        [prompt] -- red -- car
                                          |         '---- dog
                                          '-- a --- red -- dog

Here the model reads the prompt once (`prefill`), then the inner tokens, those that others follow
(red, a, and red after a), in one forward pass in which each sees only its own ancestors
(`decode_tree`). The work grows with the inner tokens, not with candidates x prompt. A list whose
tree is large is cut into chunks of about equal size.

The score of a candidate is the sum of the natural log-probabilities of its tokens, with the closing
eos for T5 and without one for LLaMA, as in the released `predict_class` with one segment.
"""

import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jax_instructblip.data.text import TextProcessor
from jax_instructblip.fields import text_problem
from jax_instructblip.models.vlm import VisionLanguageModel

NODES = 256  # inner tokens of a chunk: its attention grows with their square
LOGITS = 1 << 22  # vocabulary logits that are held at once: 16 MiB in float32
LONGEST = 256  # tokens of a candidate, as of an answer in training

Ids = tuple[int, ...]


class Tree(NamedTuple):
    """One chunk: T inner tokens in depth-first order, and E (place, target) pairs to look up.

    Inner tokens are those of candidates that another token follows; only they are fed to the model.
    X is 1 if all questions have the same candidates, else the number of questions in the batch.
    All arrays are int32.
    """

    tokens: np.ndarray  # [X, T]
    depths: np.ndarray  # [X, T] 1 for a token that follows the prompt
    ends: np.ndarray  # [X, T] index just after a token's last descendant
    places: np.ndarray  # [X, E] logits to use: 0 after the prompt, t + 1 after inner token t
    targets: np.ndarray  # [X, E] token whose log-probability is looked up in these logits


class Sizes(NamedTuple):
    """The sizes of a plan's arrays; plans of equal sizes use the same compiled program."""

    chunks: int = 0  # the number of chunks
    inner: int = 0  # inner tokens of each, padding included
    pairs: int = 0  # pairs of each, padding included


class Plan(NamedTuple):
    """The trees of tokens for X lists of candidates, cut into chunks.

    X is the number of questions, or 1 for one list that all of them share. The chunks list
    log-probabilities to look up ("pairs"); `paths` has the indices of each candidate's pairs,
    counted through all chunks, and -1 as padding.
    """

    chunks: list[Tree]
    paths: np.ndarray  # [X, C, longest] int32
    counts: np.ndarray  # [X, C] int32 tokens of each candidate; 0 where a list has fewer

    @property
    def sizes(self) -> Sizes:
        """The number of chunks, and the sizes that each chunk's arrays are padded to."""
        tree = self.chunks[0]
        return Sizes(len(self.chunks), tree.tokens.shape[1], tree.targets.shape[1])


def check_candidates(candidates: Any, questions: int) -> list[list[str]]:
    """The candidates as lists of strings: one list per question, or a single one for all questions.

    `candidates` are as in `InstructBlipPipeline.rank`, `questions` is the number of questions. A
    ValueError lists everything that is wrong: no candidates, empty ones, some that are no text,
    another number of lists than of questions.
    """
    if not isinstance(candidates, list | tuple):
        kind = type(candidates).__name__
        raise ValueError(f"candidates is a {kind}, expected a list, also of a single one")
    if not candidates:
        raise ValueError("candidates is empty: there is nothing to rank")
    nested = [isinstance(each, list | tuple) for each in candidates]
    lists = [list(each) for each in candidates] if all(nested) else [list(candidates)]
    if all(nested) and len(lists) != questions:
        raise ValueError(
            f"{len(lists)} lists of candidates and {questions} questions do not match: give a list "
            "for each question, or one list of strings for all of them"
        )
    wrong = []
    for name, each in _named(lists):
        if not isinstance(each, str):
            wrong.append(f"{name} is a {type(each).__name__}, expected a string")
        elif not each.strip():
            wrong.append(f"{name} is empty")
        elif problem := text_problem(each):
            wrong.append(f"{name} {problem}")
    wrong += [f"question {row} has no candidates" for row, each in enumerate(lists) if not each]
    if wrong:
        raise ValueError("; ".join(wrong))
    return lists


def tokenise(
    text: TextProcessor, candidates: Any, questions: int, known: dict[str, Ids] | None = None
) -> list[list[Ids]]:
    """The token ids of the candidates, one list per question, or a single one for all questions.

    `candidates` and `questions` are as in `check_candidates`. `known` maps texts to ids that are
    reused; new ones are added. A ValueError for candidates that are too long or have no token.
    """
    lists = check_candidates(candidates, questions)
    ids = {} if known is None else known
    for each in set(itertools.chain(*lists)) - ids.keys():
        ids[each] = tuple(text.candidate(each).tolist())
    shortest = 1 + (text.variant.llm.encoder_decoder)  # eos alone is no candidate
    wrong = []
    for name, each in _named(lists):
        if not shortest <= len(ids[each]) <= LONGEST:
            wrong.append(f"{name} ({each[:40]!r}) has {len(ids[each])} tokens")
    if wrong:
        raise ValueError(
            f"a candidate may have {shortest} to {LONGEST} tokens: {', '.join(wrong)}; change or "
            "drop them"
        )
    return [[ids[each] for each in row] for row in lists]


def same_tokens(
    lists: Sequence[Sequence[str]], ids: Sequence[Sequence[Ids]]
) -> list[tuple[str, ...]]:
    """Groups of texts of one list that differ but have the same token ids; each group once.

    `ids` has the token ids of the texts in `lists`, in the same order.
    """
    groups: dict[tuple[str, ...], None] = {}
    for texts, tokens in zip(lists, ids, strict=True):
        by_ids: dict[Ids, dict[str, None]] = {}
        for each, key in zip(texts, tokens, strict=True):
            by_ids.setdefault(key, {})[each] = None
        groups |= dict.fromkeys(tuple(group) for group in by_ids.values() if len(group) > 1)
    return list(groups)


def describe_same(same: Sequence[tuple[str, ...]]) -> str:
    """The text of a warning about groups of candidates that have the same tokens."""
    shown = "; ".join(", ".join(repr(each[:40]) for each in group[:5]) for group in same[:3])
    more = f" and {len(same) - 3} more sets" if len(same) > 3 else ""
    return (
        f"different candidates have the same tokens, and therefore equal scores: {shown}{more}. "
        "The tokenizer does not know their characters, or takes no notice of how they differ"
    )


def _named(lists: Sequence[Sequence[Any]]) -> Iterator[tuple[str, Any]]:
    """Yields each candidate with a name for error messages, such as `candidate 3 of question 0`."""
    for row, candidates in enumerate(lists):
        of = f" of question {row}" if len(lists) > 1 else ""
        for index, each in enumerate(candidates):
            yield f"candidate {index}{of}", each


class _Chunk:
    """A tree of tokens for a part of one list of candidates, which are added in sorted order."""

    def __init__(self):
        self.tokens, self.depths, self.ends = [], [], []
        self.places, self.targets = [], []
        self.ids: Ids = ()  # the newest candidate
        self.path: list[int] = []  # indices of its pairs
        self.nodes: list[int] = []  # indices of its inner tokens

    def shared(self, ids: Ids) -> int:
        """The number of first tokens that `ids` has in common with the candidate added last."""
        pairs = zip(ids, self.ids, strict=False)
        return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))

    def growth(self, ids: Ids) -> int:
        """The number of tokens by which the tree would grow if `ids` were added."""
        return len(ids) - 1 - min(self.shared(ids), len(self.nodes))

    def add(self, ids: Ids) -> None:
        shared = self.shared(ids)
        self.close(shared)
        del self.path[shared:]
        for depth in range(shared, len(ids)):
            if depth > len(self.nodes):
                self.nodes.append(len(self.tokens))
                self.tokens.append(ids[depth - 1])
                self.depths.append(depth)
                self.ends.append(0)
            self.path.append(len(self.targets))
            self.places.append(self.nodes[depth - 1] + 1 if depth else 0)
            self.targets.append(ids[depth])
        self.ids = ids

    def close(self, kept: int = 0) -> None:
        """Ends the open tokens after the first `kept`, which get no more descendants."""
        for node in self.nodes[kept:]:
            self.ends[node] = len(self.tokens)
        del self.nodes[kept:]


def make_plan(
    lists: Sequence[Sequence[Ids]], nodes: int = NODES, pad_to: Sizes | None = None
) -> Plan:
    """Makes the `Plan` for ranking `lists`: one list of candidates per question, or one for all.

    A candidate is a tuple of token ids. A long list is cut into chunks of at most `nodes` inner
    tokens, unless a single candidate has more. Sizes are rounded up to few values, so that one
    compiled program serves many lists; with `pad_to`, the sizes of another plan, they are at least
    as large as those.
    """
    if not isinstance(pad_to := pad_to or Sizes(), Sizes):
        raise ValueError(f"pad_to is a {type(pad_to).__name__}, expected Sizes or None")
    grown = [_grow(candidates, nodes) for candidates in lists]
    count = max(pad_to.chunks, *(len(chunks) for chunks, _ in grown))
    rows = [chunks + [_Chunk()] * (count - len(chunks)) for chunks, _ in grown]
    inner = round_up(max(pad_to.inner, *(len(chunk.tokens) for row in rows for chunk in row)))
    pairs = round_up(max(pad_to.pairs, *(len(chunk.targets) for row in rows for chunk in row)))
    trees = [_stack(column, inner, pairs) for column in zip(*rows, strict=True)]
    width = max(len(candidates) for candidates in lists)
    longest = max(len(ids) for candidates in lists for ids in candidates)
    paths = np.full((len(lists), width, longest), -1, np.int32)
    counts = np.zeros((len(lists), width), np.int32)
    for row, (candidates, (_, chunk_paths)) in enumerate(zip(lists, grown, strict=True)):
        for column, ids in enumerate(candidates):
            chunk, path = chunk_paths[ids]
            paths[row, column, : len(ids)] = np.add(path, chunk * pairs)
            counts[row, column] = len(ids)
    return Plan(trees, paths, counts)


def _grow(candidates: Sequence[Ids], limit: int) -> tuple[list[_Chunk], dict[Ids, Any]]:
    """Cuts one list of candidates into chunks of about equal size.

    Returns the chunks, and for each candidate the index of its chunk and the indices of its tokens'
    log-probabilities among those of the chunk.
    """
    ordered = sorted(set(candidates))
    chunks, chunk_paths = _cut(ordered, limit)
    if len(chunks) > 1:
        even = -(-sum(len(chunk.tokens) for chunk in chunks) // len(chunks))
        return _cut(ordered, min(limit, even + max(map(len, ordered))))
    return chunks, chunk_paths


def _cut(ordered: Sequence[Ids], limit: int) -> tuple[list[_Chunk], dict[Ids, Any]]:
    chunks, chunk_paths = [_Chunk()], {}
    for ids in ordered:
        if chunks[-1].targets and len(chunks[-1].tokens) + chunks[-1].growth(ids) > limit:
            chunks[-1].close()
            chunks.append(_Chunk())
        chunks[-1].add(ids)
        chunk_paths[ids] = len(chunks) - 1, tuple(chunks[-1].path)
    chunks[-1].close()
    return chunks, chunk_paths


def round_up(count: int) -> int:
    """Rounds a size up to a power of two from 8 to 64, or to a multiple of 64; 0 stays 0."""
    if count <= 64:
        return count and max(8, 1 << (count - 1).bit_length())
    return -(-count // 64) * 64


def _stack(chunks: Sequence[_Chunk], inner: int, pairs: int) -> Tree:
    """Stacks one chunk per question to a `Tree`, padded with tokens that no other token sees."""
    shape = (len(chunks), inner)
    tokens, depths = np.zeros(shape, np.int32), np.ones(shape, np.int32)
    ends = np.tile(np.arange(1, inner + 1, dtype=np.int32), (len(chunks), 1))
    places, targets = np.zeros((2, len(chunks), pairs), np.int32)
    for row, chunk in enumerate(chunks):
        for array, values in (
            (tokens, chunk.tokens),
            (depths, chunk.depths),
            (ends, chunk.ends),
            (places, chunk.places),
            (targets, chunk.targets),
        ):
            array[row, : len(values)] = values
    return Tree(tokens, depths, ends, places, targets)


def pair_logprobs(
    model: VisionLanguageModel,
    params: dict[str, Any],
    batch: dict[str, Any],
    chunks: Sequence[Tree],
) -> list[jax.Array]:
    """Float32 log-probabilities `[B, E]` of the targets of each chunk; the prompt is read once.

    `batch` has B questions, as `model.prefill` takes it; `chunks` are those of a `Plan`.
    """
    first, cache = _prefill(model, params, batch)
    return [tree_logprobs(model, params, first, cache, tree) for tree in chunks]


@functools.partial(jax.jit, static_argnums=0)
def _prefill(model: VisionLanguageModel, params: dict[str, Any], batch: dict[str, Any]) -> Any:
    return model.apply({"params": params}, batch, 0, method="prefill")


@functools.partial(jax.jit, static_argnums=0)
def tree_logprobs(
    model: Any, params: dict[str, Any], first: jax.Array, cache: dict[str, Any], tree: Tree
) -> jax.Array:
    """Float32 log-probabilities `[B, E]` of the E targets of a chunk, for B questions.

    `first` and `cache` are the results of `prefill`; `model` is a whole model or a language model
    alone. Logits are computed in blocks of about `LOGITS` numbers, so that those of all the tree's
    tokens need not be in memory at once.
    """
    variables, size, inner = {"params": params}, len(first), tree.tokens.shape[1]
    spread = lambda leaf: jnp.broadcast_to(leaf, (size, leaf.shape[1]))
    places, targets = spread(tree.places), spread(tree.targets)
    logprobs = _look_up(first, jnp.zeros_like(places), targets)
    if not inner:
        return logprobs
    x = model.apply(
        variables, tree.tokens, tree.depths, tree.ends, cache, method="decode_tree"
    )  # [B, T, D]
    count = -(-size * inner * first.shape[-1] // LOGITS)
    rows = -(-inner // count)
    x = jnp.pad(x, ((0, 0), (0, count * rows - inner), (0, 0)))
    x = jnp.moveaxis(x.reshape(size, count, rows, -1), 1, 0)

    def look_up_block(
        logprobs: jax.Array, block: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, None]:
        start, x = block
        logits = model.apply(variables, x, method="logits")
        row = places - 1 - start
        in_block = _look_up(logits, jnp.clip(row, 0, rows - 1), targets)
        return jnp.where((row >= 0) & (row < rows), in_block, logprobs), None

    return jax.lax.scan(look_up_block, logprobs, (jnp.arange(count) * rows, x))[0]


@jax.vmap
def _look_up(logits: jax.Array, rows: jax.Array, tokens: jax.Array) -> jax.Array:
    """Log-probabilities `[E]` of E `tokens`, each in its row of one sample's `logits` `[T, V]`."""
    return logits[rows, tokens] - jax.nn.logsumexp(logits, axis=-1)[rows]


def score(plan: Plan, logprobs: Sequence[np.ndarray], length_normalise: bool) -> np.ndarray:
    """Scores `[B, C]` float32 of a plan's candidates: sums of their tokens' log-probabilities.

    `logprobs` has the result of `pair_logprobs`, `[B, E]` for each chunk. With `length_normalise`,
    scores are means instead of sums. They are -inf where a list has fewer candidates, NaN where the
    model's numbers are not finite.
    """
    size = len(logprobs[0])
    # The last column, zeros, is where a path's padding (-1) points.
    table = np.concatenate([*logprobs, np.zeros((size, 1), np.float32)], axis=1, dtype=np.float64)
    paths = np.broadcast_to(plan.paths, (size, *plan.paths.shape[1:]))
    scores = table[np.arange(size)[:, None, None], paths].sum(axis=-1)
    counts = np.broadcast_to(plan.counts, scores.shape)
    if length_normalise:
        scores = scores / np.maximum(counts, 1)
    scores = np.where(np.isfinite(scores), scores, np.nan)
    return np.where(counts > 0, scores, -np.inf).astype(np.float32)


def stack_scores(batches: Sequence[np.ndarray]) -> np.ndarray:
    """Joins the scores of all batches to `[questions, C]`; narrower ones get columns of -inf."""
    width = max(each.shape[1] for each in batches)
    pad = lambda scores: np.pad(
        scores, ((0, 0), (0, width - scores.shape[1])), constant_values=-np.inf
    )
    return np.concatenate([pad(each) for each in batches])

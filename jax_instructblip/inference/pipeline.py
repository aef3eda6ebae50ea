"""The pipeline that `load()` returns: images and prompts in, answers out.

blip = jax_instructblip.load("runs/quickstart")
for answer in blip.generate(["a.jpg", "b.jpg"], ["What is in the picture?"]):
    print(answer.text, answer.logprob)
"""

import functools
import logging
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jax_instructblip.data import spec
from jax_instructblip.data.chat_text import ChatTextProcessor, Prompt
from jax_instructblip.data.spec import Batch
from jax_instructblip.data.text import TextProcessor
from jax_instructblip.fields import check, flag
from jax_instructblip.inference.answers import Answer, best_answer, check_finite
from jax_instructblip.inference.batch_runner import BatchRunner
from jax_instructblip.inference.batching import (
    Frame,
    Picture,
    Question,
    ask_every_slot,
    check_batch_size,
    compacted,
    make_batches,
    pair_inputs,
)
from jax_instructblip.inference.beam_search import beam_tokens
from jax_instructblip.inference.decode import generate_tokens, stream_tokens
from jax_instructblip.inference.generation_config import BATCH_SIZE, GenerationConfig, configured
from jax_instructblip.inference.loading import (
    Source,
    describe_dtype,
    load_params,
    read_dtype,
    read_source,
    require_kind,
)
from jax_instructblip.inference.ranking import (
    Ids,
    Sizes,
    check_candidates,
    describe_same,
    make_plan,
    pair_logprobs,
    same_tokens,
    score,
    stack_scores,
    tokenise,
)
from jax_instructblip.inference.retrieval import Retriever
from jax_instructblip.inference.sampling import row_keys, seed_key
from jax_instructblip.inference.saving import save_checkpoint
from jax_instructblip.inference.streaming import pieces
from jax_instructblip.inference.text_loading import text_of
from jax_instructblip.models.layers import Scan, Scans
from jax_instructblip.models.quantise import form_of
from jax_instructblip.models.released import released_name
from jax_instructblip.models.variants import Variant
from jax_instructblip.models.vlm import VisionLanguageModel, is_unstacked


def load(
    path: str | os.PathLike,
    mesh: Mesh | None = None,
    dtype: Any = None,
    *,
    template: str | None = None,
    quantise: str | None = None,
) -> "InstructBlipPipeline":
    """Loads the model at `path`; for BLIP-2's first stage, the result is a `Retriever`.

    Args:
      path: a Hugging Face folder, a checkpoint folder of this package, a run directory (its latest
        weights over the base it tuned), or the name of an embedded checkpoint ("shapes_t5").
      mesh: devices over which each batch is split, and weights as `parallel/rules.py` says (over
        `fsdp` and `tensor`); by default the first device works alone. With a mesh of several
        processes, each makes the same calls with the same questions, and gets all answers.
      dtype: of weights and computation, float32, bfloat16 or float16 (a dtype or its name); by
        default bfloat16, on a CPU float32. Norms, softmax and logits are always float32. float16 is
        refused for T5, where it overflows.
      template: the chat template to ask the model by, a key of `chat_templates.CHAT_TEMPLATES`; by
        default its own. LLaVA has one, other models where they were tuned with it.
      quantise: "int8" or "int4" holds the kernels of the vision tower and the language model as
        whole numbers with scales (`models/quantise.py`); None as `dtype`.

    Raises:
      FileNotFoundError: there is no such folder or name.
      ValueError: an argument is invalid or does not suit the model, or the folder holds none.
    """
    dtype, source = read_dtype(dtype), read_source(path)
    if source.variant.llm is None:
        if template is not None:
            raise ValueError(
                f"template is {template!r}, but {path} is a first stage of BLIP-2, which is asked "
                "nothing: leave it out"
            )
        return cast(Any, Retriever.of(source, dtype, mesh, quantise))
    return load_pipeline(path, mesh, dtype, template=template, quantise=quantise)


def load_pipeline(
    path: str | os.PathLike,
    mesh: Mesh | None = None,
    dtype: Any = None,
    *,
    template: str | None = None,
    quantise: str | None = None,
) -> "InstructBlipPipeline":
    """Loads the model at `path` as `load` does; a ValueError for BLIP-2's first stage."""
    dtype, source = read_dtype(dtype), read_source(path)
    reader = require_kind(source, READERS)
    # Binding makes the model refuse a dtype now, before gigabytes are read.
    _ = VisionLanguageModel(source.variant, dtype).bind({}).vision
    text = text_of(source, template)
    params = load_params(source, dtype, mesh, quantise)
    return reader(source.variant, params, text, dtype=dtype, mesh=mesh, source=source)


Images = Sequence[Picture | None] | Frame | None
Prompts = Sequence[Prompt] | Prompt


class InstructBlipPipeline(BatchRunner):
    """A model with its parameters and tokenizers: answers, rankings, features, logits.

    Texts and batches are padded to few sizes (`batching.py`), so that compiled programs are reused.
    """

    def __init__(
        self,
        variant: Variant,
        params: dict[str, Any],
        text: TextProcessor,
        *,
        dtype: Any = jnp.float32,
        mesh: Mesh | None = None,
        silent: bool = False,
        source: Source | None = None,
    ):
        """Takes parameters that are on their devices already; `load` reads them from a folder.

        Decoding layers may be stacked or not (`models.vlm.unstack_decoder`). `source`, the model's
        place on the disk, serves `save` and messages alone.
        """
        self.variant, self.params, self.text, self.mesh = variant, params, text, mesh
        self.silent, self.source = silent, source  # silent: no progress lines
        scans = Scans(llm=Scan(unstacked=is_unstacked(variant, params)))
        self.model = VisionLanguageModel(variant, jnp.dtype(dtype), scans)

    def __repr__(self) -> str:
        name = released_name(self.variant) or f"a {self.variant.llm.kind} model of its own size"
        where = f", {self.source.folder}" if self.source else ""
        dtype = describe_dtype(self.model.dtype, form_of(self.params))
        return f"{type(self).__name__}({name}, {dtype}{where})"

    def generate(
        self,
        images: Images,
        prompts: Prompts,
        config: GenerationConfig | None = None,
        *,
        batch_size: int = BATCH_SIZE,
        **settings: Any,
    ) -> list[Answer]:
        """The answers to prompts about images, one per pair of image and prompt, in order.

        One image serves many prompts, and one prompt many images; otherwise their counts are equal.
        Each image is a path, the bytes of an image file, a PIL image or a uint8 array `[H, W, 3]`.
        A list of these is a video. All videos of a call have the same length.

        A model with a chat template (LLaVA) takes a list as several images. They stand before the
        question, or where it has `<image>`. Their numbers may differ; [] or None is no image. A
        prompt may also be a `Conversation`, or a list of its turns, whose last one is a question.

        Decoding is greedy, or with `num_beams` > 1 a beam search. With any of `temperature`,
        `top_p` and `top_k` tokens are drawn; an answer then depends on `seed` and on its index in
        the call, not on the other questions or on `batch_size`.

        Args:
          images: what the questions are about; a list, or a single image.
          prompts: the questions, or a single one. The language model reads them whole, the Q-Former
            only their last tokens (128, unless the run has another limit).
          config: how to decode (`GenerationConfig` explains all settings).
          batch_size: questions that are answered at once.
          **settings: changes of the config, by name: `max_new_tokens=30`, `num_beams=5`.

        Raises:
          ValueError: no images or no prompts, counts that do not match, a setting out of its range,
            a prompt too long for the model, an image that cannot be used (`ImageError`), other
            numbers of images and of `<image>` in a prompt, scores that are not finite.
        """
        config = configured(config, settings)
        check_batch_size(batch_size)
        return self.answer(self._pair(images, prompts), config, batch_size)

    def answer(
        self, questions: Sequence[Question], config: GenerationConfig, batch_size: int = BATCH_SIZE
    ) -> list[Answer]:
        """The answers of `generate`, in order, to questions made by `pair_inputs`."""
        key = seed_key(config.seed)

        def decode(batch: Batch, rows: np.ndarray) -> dict[str, jax.Array]:
            if config.num_beams > 1:
                return beam_tokens(self.model, self.params, batch, config, self.stop_table)
            keys = row_keys(key, self._on_devices(rows))
            table = self.stop_table
            return generate_tokens(self.model, self.params, batch, keys, config, table)

        results = self._run("answering", decode, questions, batch_size, config.max_new_tokens)
        answers = [
            best_answer(self.text, generated, row, config.num_return_sequences)
            for generated, count in results
            for row in range(count)
        ]
        wrong = [i for i, answer in enumerate(answers) if not math.isfinite(answer.logprob)]
        check_finite(wrong, self.model.dtype)
        return answers

    def stream(
        self,
        image: Picture | None,
        prompt: Prompt,
        config: GenerationConfig | None = None,
        **settings: Any,
    ) -> Iterator[str]:
        """Yields the answer of `generate` to one prompt piece by piece, as it is generated.

        Joined, the pieces are `Answer.text`. Arguments and errors are those of `generate`, except
        that a beam search is refused, because none of its tokens is certain before the end.
        Non-finite scores raise when they occur, all other errors at once.
        """
        config = configured(config, settings)
        if config.num_beams > 1:
            raise ValueError(
                f"num_beams is {config.num_beams}, but a stream has no beams: expected 1"
            )
        questions = self._pair([image], [prompt])
        only = next(make_batches(self.text, questions, 1, self.batch_shards, config.max_new_tokens))
        keys = row_keys(seed_key(config.seed), self._on_devices(only.rows))
        batch = self._on_devices(only.batch)
        steps = stream_tokens(self.model, self.params, batch, keys, config, self.stop_table)
        tokens, text = self._first_row(steps), self.text
        return pieces(text.decode, tokens, rewrites=text.rewrites, stop=text.stop_text)

    def _first_row(self, steps: Iterator[tuple[np.ndarray, np.ndarray]]) -> Iterator[int]:
        while True:
            with self._mesh():  # not around the `yield`: the caller's code must not see this mesh
                newest = next(steps, None)
            if newest is None:
                return
            tokens, logprobs = newest
            check_finite([] if math.isfinite(logprobs[0]) else [0], self.model.dtype)
            yield int(tokens[0])

    def rank(
        self,
        images: Images,
        prompts: Prompts,
        candidates: Sequence[str] | Sequence[Sequence[str]],
        length_normalise: bool = False,
        batch_size: int = BATCH_SIZE,
        pad_to: Sizes | None = None,
    ) -> np.ndarray:
        """Scores `[B, C]` float32 of every candidate answer to each question; the best is largest.

        A score is the natural log-probability of the candidate after the image and the prompt: the
        sum over its tokens, for T5 with the closing eos, for others without one (as in LAVIS). A
        softmax over the candidates gives probabilities. Common beginnings of candidates are
        computed once: long lists of short answers cost little more than their distinct beginnings.

        Args:
          images: what the questions are about, as in `generate`.
          prompts: the questions, as in `generate`.
          candidates: one list for all questions, or a list for each; the scores of a shorter list
            end with -inf. A candidate that is given twice has the same score twice.
          length_normalise: divide each score by its number of tokens; without it, short candidates
            are favoured.
          batch_size: questions that are ranked at once.
          pad_to: sizes (`Plan.sizes`) that every batch's candidates are padded to, so that calls
            with different lists share one compiled program; scores do not change.

        Raises:
          ValueError: as `generate`; no candidates, or one that is empty or too long.
        """
        check_batch_size(batch_size)
        check({"length_normalise": length_normalise}, {"length_normalise": flag()})
        questions = self._pair(images, prompts)
        lists = tokenise(self.text, candidates, len(questions))
        if same := same_tokens(check_candidates(candidates, len(questions)), lists):
            logging.getLogger(__name__).warning("%s", describe_same(same))
        return self.rank_tokens(
            questions,
            lists,
            length_normalise=length_normalise,
            batch_size=batch_size,
            pad_to=pad_to,
        )

    def rank_tokens(
        self,
        questions: Sequence[Question],
        lists: Sequence[Sequence[Ids]],
        *,
        length_normalise: bool = False,
        batch_size: int = BATCH_SIZE,
        pad_to: Sizes | None = None,
    ) -> np.ndarray:
        """Scores as `rank`, for questions of `pair_inputs` and `lists` of `ranking.tokenise`."""
        plan_of_all, plans = (make_plan(lists, pad_to=pad_to) if len(lists) == 1 else None), []

        def compute(batch: Batch, rows: np.ndarray) -> list[jax.Array]:
            plans.append(plan_of_all or make_plan([lists[row] for row in rows], pad_to=pad_to))
            chunks = plans[-1].chunks if plan_of_all else self._on_devices(plans[-1].chunks)
            return pair_logprobs(self.model, self.params, batch, chunks)

        longest = max(len(ids) for each in lists for ids in each)
        results = self._run("ranking", compute, questions, batch_size, longest)
        scores = stack_scores(
            [
                score(plan, logprobs, length_normalise)[:count]
                for plan, (logprobs, count) in zip(plans, results, strict=True)
            ]
        )
        check_finite(np.flatnonzero(np.isnan(scores).any(axis=1)).tolist(), self.model.dtype)
        return scores

    def features(
        self, images: Images, prompts: Prompts, batch_size: int = BATCH_SIZE
    ) -> np.ndarray:
        """The visual vectors that the language model reads, `[B, F*Q, Dl]` float32.

        They are the Q-Former's query outputs for each image under its prompt, projected to the
        width of the language model, frame after frame; in LLaVA the projected patches, whatever the
        prompt. `images` and `prompts` are as in `generate`, each prompt with equally many images.
        """
        check_batch_size(batch_size)
        questions = self._pair(images, prompts)
        if len(counts := {len(question.frames) for question in questions}) > 1 or 0 in counts:
            raise ValueError(
                f"prompts with {sorted(counts)} images have no features of one shape: ask for them "
                "in calls of their own"
            )

        def compute(batch: Batch, rows: np.ndarray) -> jax.Array:
            del rows
            return _apply(self.model, self.params, batch, "visual_vectors")

        results = self._run("looking", compute, questions, batch_size)
        return np.concatenate([vectors[:count].astype(np.float32) for vectors, count in results])

    def _pair(self, images: Any, prompts: Any) -> list[Question]:
        return pair_inputs(images, prompts, chat=isinstance(self.text, ChatTextProcessor))

    @functools.cached_property
    def stop_table(self) -> np.ndarray | None:
        """The table that finds the ends of answers (`stops.py`); None where eos alone ends them."""
        return self.text.stop_table()

    def save(self, folder: str | os.PathLike) -> None:
        """Writes a new checkpoint folder that `load` reads (`saving.save_checkpoint`)."""
        save_checkpoint(folder, self.variant, self.params, self.text, self.source)

    def logits(self, batch: Batch) -> np.ndarray:
        """Float32 logits `[G, A, V]` of a training batch, aligned with its targets.

        `models/vlm.py` draws such a batch. Padding before or between tokens is first moved to the
        end. For a batch without targets, a decoder-only model gives the logits of every slot: `[G,
        X, V]`.

        Raises:
          ValueError: the batch is invalid; the message lists everything that is wrong.
        """
        batch = spec.to_arrays(batch)
        spec.check_arrays(batch, self.variant)
        batch = ask_every_slot(self.variant, compacted(batch))
        spec.check(batch, self.variant)
        with self._mesh():
            return np.asarray(_apply(self.model, self.params, self._on_devices(batch)))


# The class that `load` returns, by the kind of model.
READERS: dict[str, type[InstructBlipPipeline]] = dict.fromkeys(
    ("instructblip", "blip2", "llava"), InstructBlipPipeline
)


@functools.partial(jax.jit, static_argnums=(0, 3))
def _apply(model: VisionLanguageModel, params: Any, batch: Batch, method: str | None = None) -> Any:
    return model.apply({"params": params}, batch, method=method)

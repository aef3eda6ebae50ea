"""Answers to a file of questions (`question_file.py`), written as they come.

OUT.jsonl      one prediction row per question, in their order, when all are answered
OUT.json       facts: weights, dtype, input format, digests of the questions and their settings
OUT.partial/   while answering: the rows so far, in the order in which they are answered

A run that was killed goes on from these (`predictions.Store`).
"""

import collections
import concurrent.futures
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jax_instructblip.atomic import sole_writer
from jax_instructblip.evaluation.answering import THREADS, hushed
from jax_instructblip.evaluation.predictions import Prediction, Store
from jax_instructblip.evaluation.question_file import Line, read_prompts, read_questions
from jax_instructblip.inference.batching import Example, Question, check_batch_size
from jax_instructblip.inference.digests import weights_digest
from jax_instructblip.inference.engine import Engine, check_no_beams, prepare
from jax_instructblip.inference.feature_files import list_digest
from jax_instructblip.inference.generation_config import BATCH_SIZE, GenerationConfig
from jax_instructblip.inference.loading import read_dtype, read_source
from jax_instructblip.inference.pipeline import InstructBlipPipeline, load_pipeline
from jax_instructblip.inference.slots import Request
from jax_instructblip.inference.text_loading import text_of
from jax_instructblip.progress import Progress

Asked = tuple[Line, Example]


class Counts(NamedTuple):
    """The number of all questions, and how many of them could not be asked (`problems`)."""

    questions: int
    problems: int


def answer_jsonl(
    checkpoint: str | os.PathLike,
    path: str | os.PathLike,
    out: str | os.PathLike,
    config: GenerationConfig,
    *,
    dtype: Any = None,
    template: str | None = None,
    quantise: str | None = None,
    batch_size: int = BATCH_SIZE,
) -> Counts:
    """Answers the questions of a file with the engine; rows already in `out` are kept.

    A row has `id`, `prompt`, `text` and `logprob`, or the `problem` of an image that cannot be
    used. Its tokens are those of `InstructBlipPipeline.generate` (`question_file.py` says of which
    call).

    Args:
      checkpoint: any folder or name for `load_pipeline`.
      path: the questions.
      out: the JSON-lines file to write; it must end in `.jsonl`.
      config: settings of the lines that do not name their own.
      dtype: of weights and computation, or its name; None: bfloat16, on a CPU float32.
      template: the chat template to ask the model by, a key of `CHAT_TEMPLATES`; None: its own.
      quantise: the form of the kernels, "int8" or "int4", as in `load`; None: they have `dtype`.
      batch_size: questions that are answered at once, each in a slot of the engine; no answer
        depends on it.

    Raises:
      ValueError: bad lines, all of them listed as `FILE:LINE: reason` before any work; `out` has
        answers to other questions, or of other settings or weights; another process writes to it.
    """
    path, out = Path(path), Path(out)
    check_batch_size(batch_size)
    check_no_beams(config)
    if out.suffix != ".jsonl" or out.resolve() == path.resolve():
        raise ValueError(f"out is {out}, expected another file than the questions, in .jsonl")
    lines = read_questions(path, config)
    source = read_source(checkpoint)
    if source.variant.llm is None:
        raise ValueError(f"{checkpoint} is a first stage of BLIP-2, which is asked nothing")
    examples, width = read_prompts(path, lines, text_of(source, template))
    settings = hashlib.sha256(repr([(line.config, line.row) for line in lines]).encode())
    facts = {
        "weights": weights_digest(source),
        "dtype": read_dtype(dtype).name,
        "quantise": quantise,
        "input_format": source.input_format.with_template(template).to_dict(),
        "questions": list_digest([line.record for line in lines], path.parent),
        "settings": settings.hexdigest(),
    }
    store = Store(out.parent, out.stem, facts)
    with sole_writer(store.partial):
        store.begin()
        rows = store.rows()
        left = [pair for pair in zip(lines, examples, strict=True) if pair[0].record.id not in rows]
        if left:  # if everything is there, no weights are read
            how = {"dtype": dtype, "template": template, "quantise": quantise}
            most = max(line.config.max_new_tokens for line, _ in left)
            engine = Engine(
                load_pipeline(checkpoint, **how),
                slots=min(batch_size, len(left)),
                width=width,
                max_new_tokens=most,
            )
            _answer(engine, path, left, store, len(lines))
            rows = store.rows()
        store.finish([rows[line.record.id] for line in lines])
    return Counts(len(lines), sum(bool(row.problem) for row in rows.values()))


def _answer(engine: Engine, path: Path, left: Sequence[Asked], store: Store, total: int) -> None:
    """Answers the questions that are left, and appends their rows to the store.

    Scores that are not finite are a question's problem, but if there is no usable answer yet, and
    as many as the engine has slots have such scores, the weights are to blame: this raises a
    ValueError.
    """
    done = total - len(left)
    line = Progress(total, "answering", "questions", done=done, compiles=True)
    wrong: list[Prediction] = []  # rows that wait for a usable answer
    usable = any(not row.problem for row in store.rows().values())

    def take(row: Prediction) -> None:
        store.append([row])
        progress.update()

    with engine, line as progress, hushed():
        requests = _requests(engine.blip, left, take)
        for asked, handle in engine.answers(requests):
            try:
                answer = handle.result()
            except ValueError as error:
                wrong.append(_row(asked, problem=str(error)))
                if not usable and len(wrong) == engine.sizes.count:
                    break
            else:
                usable = True
                take(_row(asked, text=answer.text, logprob=answer.logprob))
            while usable and wrong:
                take(wrong.pop())
        if wrong:
            raise ValueError(f"{path}: {wrong[0].id}: {wrong[0].problem}")


def _requests(
    blip: InstructBlipPipeline, left: Sequence[Asked], take: Callable[[Prediction], None]
) -> Iterator[tuple[Line, Request]]:
    """Yields the request of each question; hands the row of an unusable image to `take`.

    Threads open the images of the next questions meanwhile.
    """

    def request(asked: Asked) -> Request:
        line, example = asked
        question = Question(line.record.images, line.record.prompt, example)
        return prepare(blip.text, question, line.config, line.row)

    with concurrent.futures.ThreadPoolExecutor(THREADS) as pool:
        ahead = collections.deque()
        for asked in [*left, *[None] * (2 * THREADS)]:
            ahead.append(asked and (asked[0], pool.submit(request, asked)))
            if len(ahead) > 2 * THREADS and (first := ahead.popleft()):
                line, future = first
                try:
                    yield line, future.result()
                except ValueError as error:
                    take(_row(line, problem=str(error)))


def _row(line: Line, **fields: Any) -> Prediction:
    record = line.record
    return Prediction(
        id=record.id, task=record.task, prompt=record.prompt, answers=record.answers, **fields
    )

"""The engine: answers requests of any lengths and settings side by side (continuous batching).

    with Engine(blip, slots=8, width=96, max_new_tokens=64) as engine:
        handle = engine.submit(prepare(blip.text, question, config))
        while not handle.done():
            engine.step()
        print(handle.result().text)

A request takes a slot, and leaves it for the next one as soon as its answer ends: short answers
never wait for long ones. Its tokens are those of `InstructBlipPipeline.generate` for it alone,
whatever its neighbours are. `slots.py` has what runs on the device.
"""

import collections
import concurrent.futures
import threading
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import jax
import numpy as np

from jax_instructblip.data.text import TextProcessor
from jax_instructblip.fields import check, whole
from jax_instructblip.inference.answers import Answer, best_answer, check_finite
from jax_instructblip.inference.batching import Question, make_batches
from jax_instructblip.inference.generation_config import GenerationConfig
from jax_instructblip.inference.pipeline import InstructBlipPipeline
from jax_instructblip.inference.sampling import TracedSettings, row_keys, seed_key
from jax_instructblip.inference.slots import Request, Sizes, admit, advance, free_slots

STEPS = 16  # most decoding steps between two looks of the host at the slots

Name = TypeVar("Name")


def prepare(
    text: TextProcessor, question: Question, config: GenerationConfig, row: int = 0
) -> Request:
    """The request of a question made by `pair_inputs`; opens its images.

    Its answer is that of `InstructBlipPipeline.generate` to question `row` of a call: draws depend
    on the config's seed and on this number.

    Raises:
      ValueError: the config asks for beams, a prompt is too long or cannot be used.
      ImageError: an image cannot be used.
    """
    check_no_beams(config)
    only = next(make_batches(text, [question], 1, reserve=config.max_new_tokens))
    key = jax.random.key_data(row_keys(seed_key(config.seed), np.array([row], np.int32)))
    settings = jax.device_get(TracedSettings.of(config))
    return Request(only.batch, np.asarray(key), settings, np.int32(config.max_new_tokens))


def check_no_beams(config: GenerationConfig) -> None:
    """Raises a ValueError if the config asks for a beam search."""
    if config.num_beams > 1:
        raise ValueError(
            f"num_beams is {config.num_beams}, but a slot has no beams: expected 1 (`generate` "
            "searches with beams)"
        )


class Handle(concurrent.futures.Future[Answer]):
    """A submitted request: the future of its answer; `cancel()` frees its slot.

    Attributes:
      tokens: the new ids so far, for those who show an answer as it grows.
    """

    def __init__(self, request: Request):
        super().__init__()
        self.request: Request | None = request  # None once a slot has it
        self.greedy = bool(request.settings.greedy)
        self.tokens: tuple[int, ...] = ()


class Engine:
    """A model that answers requests side by side, each in a slot of its own.

    Any thread may call `submit` and `cancel`, a single one everything else.

    Attributes:
      blip: the model.
      sizes: number and shape of the slots.
      steps: decoding steps of all slots together so far: each costs the same for any number of
        requests in the slots.
    """

    def __init__(
        self,
        blip: InstructBlipPipeline,
        *,
        slots: int,
        width: int,
        max_new_tokens: int,
        steps: int = STEPS,
    ):
        """Takes memory for the slots when the first request is admitted.

        Args:
          blip: the model, on one device.
          slots: most requests that are answered at once.
          width: most slots of a padded prompt (`batching.padded_width`).
          max_new_tokens: most new tokens that a request may ask for.
          steps: most decoding steps between two looks at the slots; an answer's end is seen at
            once, a cancelled or a new request waits for them if no slot is free.

        Raises:
          ValueError: the model is on a mesh of devices, or a number is below 1.
        """
        sizes = {"slots": slots, "width": width, "max_new_tokens": max_new_tokens, "steps": steps}
        check(sizes, dict.fromkeys(sizes, whole(1)))
        if blip.mesh is not None:
            raise ValueError("the model is on a mesh, but the engine works on one device alone")
        self.blip = blip
        self.sizes, self.steps = Sizes(slots, width, max_new_tokens), 0
        self._model, self._params, self._text = blip.model, blip.params, blip.text
        self._table, self._most = blip.stop_table, steps
        self._waiting: collections.deque[Handle] = collections.deque()
        self._running: list[Handle | None] = [None] * slots
        self._slots: Any = None
        self._closed, self._lock = False, threading.Lock()

    def submit(self, request: Request) -> Handle:
        """Queues a request; raises a ValueError if it does not fit a slot, or after `close`."""
        self._require_fit(request)
        handle = Handle(request)
        with self._lock:
            if self._closed:
                raise ValueError("the engine is closed: it takes no more requests")
            self._waiting.append(handle)
        return handle

    def cancel(self, handle: Handle) -> None:
        """Gives a request up: it leaves the queue or its slot with the next `step`."""
        handle.cancel()

    def step(self) -> list[Handle]:
        """Fills free slots, then decodes until an answer ends, `steps` steps at most.

        Returns the requests that have ended, with their answers; one whose scores are not finite
        has a ValueError instead. Without any request it returns at once. An error of the device, or
        of the model's about a request, is that request's and is raised, too.
        """
        self._fill()
        live = np.array([handle is not None for handle in self._running])
        if not live.any():
            return []
        sample = any(handle and not handle.greedy for handle in self._running)
        report = self._advance(sample, live)
        self.steps += int(report["steps"])
        ended = []
        for index, handle in enumerate(self._running):
            if handle is None:
                continue
            handle.tokens = tuple(report["tokens"][index, : report["lengths"][index]].tolist())
            if report["done"][index]:
                self._running[index] = None
                if handle.set_running_or_notify_cancel():
                    self._finish(handle, report, index)
                    ended.append(handle)
        return ended

    def answers(self, requests: Iterable[tuple[Name, Request]]) -> Iterator[tuple[Name, Handle]]:
        """Yields each request's name and handle as its answer ends, in any order.

        One that is cancelled meanwhile is left out. `requests` yields pairs of name and request,
        and is read as slots become free.
        """
        left, names = iter(requests), {}
        while True:
            while len(names) < self.sizes.count and (pair := next(left, None)) is not None:
                names[self.submit(pair[1])] = pair[0]
            if not names:
                return
            for handle in self.step():
                if handle in names:  # others may be submitted meanwhile
                    yield names.pop(handle), handle
            names = {handle: name for handle, name in names.items() if not handle.cancelled()}

    def warm_up(self, requests: Iterable[Request]) -> None:
        """Compiles all programs for requests that are padded as these are; no slot may be in use.

        Later requests of these shapes compile nothing, whatever their settings are.

        Raises:
          ValueError: a slot is in use, or a request does not fit one.
        """
        shapes = lambda request: tuple((name, leaf.shape) for name, leaf in request.batch.items())
        if used := sum(handle is not None for handle in self._running):
            raise ValueError(
                f"warm_up would spoil the answers of {used} slot{'s' * (used > 1)} in use: call it "
                "before the first request"
            )
        for request in {shapes(request): request for request in requests}.values():
            self._require_fit(request)
            self._admit(0, request)
        for sample in (False, True):
            self._advance(sample, np.zeros(self.sizes.count, bool))

    def close(self) -> None:
        """Cancels all requests and gives the memory of the slots back."""
        with self._lock:
            self._closed = True
            handles = [*self._waiting, *filter(None, self._running)]
            self._waiting.clear()
        for handle in handles:
            handle.cancel()
            handle.set_running_or_notify_cancel()
        self._running, self._slots = [None] * self.sizes.count, None

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _fill(self) -> None:
        """Frees the slots of cancelled requests, and admits waiting ones to all free slots."""
        for index, handle in enumerate(self._running):
            if handle is not None and handle.cancelled():
                handle.set_running_or_notify_cancel()
                self._running[index] = handle = None
            if handle is None and (handle := self._next()) is not None:
                request, handle.request = handle.request, None
                try:
                    self._admit(index, request)
                except BaseException as error:  # the slot still has the answer before this one
                    if handle.set_running_or_notify_cancel():
                        handle.set_exception(error)
                    raise
                self._running[index] = handle

    def _next(self) -> Handle | None:
        """The first waiting request that is not cancelled, taken out of the queue."""
        with self._lock:
            while self._waiting:
                handle = self._waiting.popleft()
                if not handle.cancelled():
                    return handle
                handle.set_running_or_notify_cancel()
        return None

    def _require_fit(self, request: Request) -> None:
        """Raises a ValueError if a request does not fit a slot."""
        problems, width = [], request.batch["tokens"].shape[1]
        if width > self.sizes.width:
            problems.append(f"its padded prompt has {width} slots, of at most {self.sizes.width}")
        if request.limit > self.sizes.max_new_tokens:
            problems.append(
                f"max_new_tokens is {request.limit}, of at most {self.sizes.max_new_tokens}"
            )
        if problems:
            raise ValueError(f"the request does not fit this engine: {'; '.join(problems)}")

    def _admit(self, index: int, request: Any) -> None:
        if self._slots is None:
            free = free_slots(self._model, self.sizes, self._params, request, self._table)
            self._slots = jax.device_put(free)
        self._slots = admit(
            self._model, self.sizes, self._params, self._slots, index, request, self._table
        )

    def _advance(self, sample: bool, live: np.ndarray) -> dict[str, np.ndarray]:
        report, self._slots = advance(
            self._model, sample, self._params, self._slots, live, self._most, self._table
        )
        return jax.device_get(report)

    def _finish(self, handle: Handle, report: dict[str, np.ndarray], index: int) -> None:
        """Sets the answer of a request, or an error if the model's scores are not finite."""
        names = ("tokens", "lengths", "logprobs")
        generated = {name: report[name][:, None] for name in names}
        try:
            answer = best_answer(self._text, generated, index, count=1)
            check_finite([] if np.isfinite(answer.logprob) else [0], self._model.dtype)
        except Exception as error:
            handle.set_exception(error)
        else:
            handle.set_result(answer)

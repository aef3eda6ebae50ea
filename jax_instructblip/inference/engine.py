"""The engine: answers requests of any lengths and settings side by side (continuous batching).

    with Engine(blip, slots=8, width=96, max_new_tokens=64) as engine:
        handle = engine.submit(prepare(blip.text, question, config))
        while not handle.done():
            engine.step()
        print(handle.result().text)

A request takes a slot, and leaves it for the next one as soon as its answer ends: short answers
never wait for long ones. Its tokens are those of `InstructBlipPipeline.generate` for it alone,
whatever its neighbours are. `slots.py` has what runs on the device.

Requests take slots in the order in which they were submitted. `warm_up` compiles what makes this
cheaper: a prompt is read together with those of its padded shape that wait behind it, before there
are slots for them, and while few slots are in use a step computes a part of them.
"""

import collections
import concurrent.futures
import threading
from collections.abc import Hashable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import numpy as np

from jax_instructblip.data.text import TextProcessor
from jax_instructblip.fields import check, whole
from jax_instructblip.inference import slots as programs
from jax_instructblip.inference.answers import Answer, best_answer, check_finite
from jax_instructblip.inference.batching import Question, make_batches
from jax_instructblip.inference.generation_config import GenerationConfig
from jax_instructblip.inference.pipeline import InstructBlipPipeline
from jax_instructblip.inference.sampling import TracedSettings, row_keys, seed_key
from jax_instructblip.inference.slots import Request, Sizes, Slots

STEPS = 16  # most decoding steps between two looks of the host at the slots
PROMPTS = 8  # most prompts that are read at once

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
        self.request: Request | None = request  # None once its prompt is read
        self.prompt: Any = None  # the read prompts and its row, until a slot has it
        self.greedy = bool(request.settings.greedy)
        self.tokens: tuple[int, ...] = ()


class Engine:
    """A model that answers requests side by side, each in a slot of its own.

    Any thread may call `submit` and `cancel`, a single one everything else.

    Attributes:
      blip: the model.
      sizes: number and shape of the slots.
      steps: decoding steps so far; one step serves all slots.
      slot_steps: the number of slots that each of these steps computed, summed.
      reads: maps a number of prompts to how often as many were read at once so far.
    """

    def __init__(
        self,
        blip: InstructBlipPipeline,
        *,
        slots: int,
        width: int,
        max_new_tokens: int,
        steps: int = STEPS,
        prompts: int = PROMPTS,
    ):
        """Takes memory for the slots when the first request is admitted.

        Prompts that are read before there is a slot for them take as much memory each as a slot.

        Args:
          blip: the model, on one device.
          slots: most requests that are answered at once.
          width: greatest length of a padded prompt, visual vectors included
            (`batching.padded_width`).
          max_new_tokens: most new tokens that a request may ask for.
          steps: most decoding steps between two looks at the slots; an answer's end is seen at
            once, a cancelled or a new request waits for them if no slot is free.
          prompts: most prompts that are read at once, at most `slots` of them; answers in the slots
            wait meanwhile.

        Raises:
          ValueError: the model is on a mesh of devices, or a number is below 1.
        """
        sizes = {"slots": slots, "width": width, "max_new_tokens": max_new_tokens, "steps": steps}
        sizes["prompts"] = prompts
        check(sizes, dict.fromkeys(sizes, whole(1)))
        if blip.mesh is not None:
            raise ValueError("the model is on a mesh, but the engine works on one device alone")
        self.blip = blip
        self.sizes = Sizes(slots, width, max_new_tokens)
        self.steps = self.slot_steps = 0
        self.reads: collections.Counter[int] = collections.Counter()
        self._model, self._params, self._text = blip.model, blip.params, blip.text
        self._table, self._most, self._ahead = blip.stop_table, steps, min(prompts, slots) - 1
        # Numbers of slots that a step computes, and of prompts of a shape that are read at once.
        self._counts: Sequence[int] = (slots,)
        self._groups: dict[Hashable, Sequence[int]] = {}
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
        has a ValueError instead. Without any request it returns at once. An error while prompts
        are read is raised, and the requests with these prompts get it, too.
        """
        self._fill()
        live = self._pack()
        if not live.any():
            return []
        sample = any(handle and not handle.greedy for handle in self._running)
        report = self._advance(sample, live)
        self.steps += int(report["steps"])
        self.slot_steps += int(report["steps"]) * len(live)
        ended = []
        for index, handle in enumerate(self._running[: len(live)]):
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
        and is read as slots become free, as far ahead as prompts are read at once.
        """
        left, names, most = iter(requests), {}, self.sizes.count + self._ahead
        while True:
            while len(names) < most and (pair := next(left, None)) is not None:
                names[self.submit(pair[1])] = pair[0]
            if not names:
                return
            for handle in self.step():
                if handle in names:  # others may be submitted meanwhile
                    yield names.pop(handle), handle
            names = {handle: name for handle, name in names.items() if not handle.cancelled()}

    def warm_up(self, requests: Iterable[Request]) -> None:
        """Compiles all programs for requests that are padded as these are; no slot may be in use.

        Later requests of these shapes compile nothing, whatever their settings are. Without this,
        each prompt is read alone and each step computes all slots, which needs the fewest programs.

        Raises:
          ValueError: a slot is in use, or a request does not fit one.
        """
        if used := sum(handle is not None for handle in self._running):
            raise ValueError(
                f"warm_up would spoil the answers of {used} slot{'s' * (used > 1)} in use: call it "
                "before the first request"
            )
        sizes = tuple(1 << power for power in range((self._ahead + 1).bit_length()))
        for shape, request in {_shape(request): request for request in requests}.items():
            self._require_fit(request)
            for size in sizes:
                self._place(0, self._read([request] * size), 0)
            self._groups[shape] = sizes
        if self._slots is None:
            return
        self._slots = programs.move(self._model, self._slots, 0, 0)
        count = self.sizes.count
        self._counts = tuple(sorted({1, max(count // 4, 1), count}))
        for count in self._counts:
            for sample in (False, True):
                self._advance(sample, np.zeros(count, bool))

    def close(self) -> None:
        """Cancels all requests and gives the memory of the slots back."""
        with self._lock:
            self._closed = True
            handles = [*self._waiting, *filter(None, self._running)]
            self._waiting.clear()
        for handle in handles:
            handle.cancel()
            _discard(handle)
        self._running, self._slots = [None] * self.sizes.count, None

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _fill(self) -> None:
        """Frees the slots of cancelled requests, and gives all free slots to waiting ones."""
        for index, handle in enumerate(self._running):
            if handle is not None and handle.cancelled():
                _discard(handle)
                self._running[index] = None
        free = [index for index, handle in enumerate(self._running) if handle is None]
        first = self._first(len(free) + self._ahead) if free else []
        self._read_first(first, len(free))
        for index, handle in zip(free, first, strict=False):
            with self._lock:
                self._waiting.popleft()
            try:
                self._place(index, *handle.prompt)
            except BaseException as error:  # the slot still has the answer before this one
                _fail(handle, error)
                raise
            self._running[index], handle.prompt = handle, None

    def _first(self, count: int) -> list[Handle]:
        """The first waiting requests, `count` at most; cancelled ones leave the queue."""
        first: list[Handle] = []
        with self._lock:
            while self._waiting and len(first) < count:
                handle = self._waiting.popleft()
                _discard(handle) if handle.cancelled() else first.append(handle)
            self._waiting.extendleft(reversed(first))
        return first

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

    def _read_first(self, first: Sequence[Handle], due: int) -> None:
        """Reads the prompts of the first `due` requests, and of others that the programs take."""
        unread = collections.defaultdict(list)
        for handle in first:
            if handle.request is not None:
                unread[_shape(handle.request)].append(handle)
        for shape, handles in unread.items():
            needed = len([handle for handle in handles if handle in first[:due]])
            while needed > 0:
                size = max(size for size in self._groups.get(shape, (1,)) if size <= len(handles))
                try:
                    prompts = self._read([handle.request for handle in handles[:size]])
                except BaseException as error:
                    self._fail_waiting(handles[:size], error)
                    raise
                self.reads[size] += 1
                for row, handle in enumerate(handles[:size]):
                    handle.request, handle.prompt = None, (prompts, row)
                handles, needed = handles[size:], needed - size

    def _fail_waiting(self, handles: Sequence[Handle], error: BaseException) -> None:
        """Takes requests whose prompts cannot be read out of the queue, with the error."""
        with self._lock:
            for handle in handles:
                self._waiting.remove(handle)
        for handle in handles:
            _fail(handle, error)

    def _pack(self) -> np.ndarray:
        """The mask of slots with a request, of the first slots: as many as a step has to compute.

        Requests of other slots are moved to these.
        """
        busy = [index for index, handle in enumerate(self._running) if handle is not None]
        count = min(count for count in self._counts if count >= len(busy))
        free = [index for index in range(count) if self._running[index] is None]
        for index, source in zip(free, [each for each in busy if each >= count], strict=False):
            self._slots = programs.move(self._model, self._slots, source, index)
            self._running[index], self._running[source] = self._running[source], None
        return np.array([handle is not None for handle in self._running[:count]])

    def _read(self, requests: Sequence[Any]) -> Slots:
        stacked = programs.stack(requests)
        return programs.read(self._model, self.sizes, self._params, stacked, self._table)

    def _place(self, index: int, prompts: Slots, row: int) -> None:
        if self._slots is None:
            free = programs.free_slots(self._model, self.sizes, prompts)
            self._slots = jax.device_put(free)
        self._slots = programs.place(self._model, self._slots, prompts, row, index)

    def _advance(self, sample: bool, live: np.ndarray) -> dict[str, np.ndarray]:
        report, self._slots = programs.advance(
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


def _shape(request: Request) -> Hashable:
    """The shapes of a padded prompt: those that are equal may be read at once."""
    return tuple((name, leaf.shape) for name, leaf in sorted(request.batch.items()))


def _discard(handle: Handle) -> None:
    """Tells those who wait for a cancelled request, and gives the memory of its prompt back."""
    handle.request = handle.prompt = None
    handle.set_running_or_notify_cancel()


def _fail(handle: Handle, error: BaseException) -> None:
    """Gives an error to those who wait for a request, and the memory of its prompt back."""
    handle.request = handle.prompt = None
    if handle.set_running_or_notify_cancel():
        handle.set_exception(error)

"""Asks many requests at once, until each has a usable answer or is given up.

A reply is checked and journaled as soon as it arrives. So a run that ends for whatever reason is
continued by the same call, and no request that has a usable reply is sent again.
"""

import asyncio
import dataclasses
import json
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jax_instructblip.endpoint.client import (
    Client,
    EndpointError,
    RefusedError,
    Reply,
    TransientError,
)
from jax_instructblip.endpoint.journal import Journal, Request, open_journal
from jax_instructblip.endpoint.settings import EndpointSettings
from jax_instructblip.progress import Progress

LONGEST_PAUSE = 60.0  # seconds between two attempts, unless the server asks for more
REFUSALS = 5  # so many refused requests and no reply at all: it is not the requests
CHARACTERS = 4  # of English a token, for estimates

FindProblem = Callable[[Request, str], str]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The result of `ask`.

    Attributes:
      answers: the usable answers by the ids of the requests, in their order.
      missing: by id, the reason why a request has no usable answer.
      tokens: tokens of all requests and replies, of this run and those that it continues.
      endpoint: the base URL that was used.
    """

    answers: dict[str, str]
    missing: dict[str, str]
    tokens: int
    endpoint: str


def ask(
    requests: Sequence[Request],
    settings: EndpointSettings,
    journal: Path,
    facts: Mapping[str, Any],
    find_problem: FindProblem,
) -> Outcome:
    """Returns an answer to each request, or the reason why there is none.

    Args:
      requests: the questions, whose ids are all different.
      settings: the settings of the endpoint.
      journal: the file of replies; requests with a usable reply in it are not asked again.
      facts: a JSON object of what the requests were made from, for the journal (`open_journal`).
      find_problem: function of (request, text of the answer) that returns why the answer cannot be
        used, "" if it can. Such a request is asked again, `settings.attempts` times in all.

    Raises:
      ValueError: there is no key; the journal is of other facts or requests; the tokens of
        `settings.max_tokens` are used up.
      EndpointError: the endpoint cannot be used, or fails too often in a row.
      OSError: the journal cannot be written.
    """
    client = Client(settings)
    with open_journal(journal, {**settings.facts(), **facts}) as opened:
        opened.check(requests)
        run = _Run(settings, client, opened, find_problem)
        asyncio.run(run.finish(requests))
        return Outcome(
            {each.id: opened.answers[each.id] for each in requests if each.id in opened.answers},
            {each.id: run.reason(each) for each in requests if each.id not in opened.answers},
            opened.tokens,
            client.url,
        )


def estimate(request: Request) -> int:
    """Returns roughly the number of tokens of a request, without its answer."""
    return sum(len(each["content"]) // CHARACTERS + CHARACTERS for each in request.messages)


def preview(requests: Sequence[Request], settings: EndpointSettings) -> tuple[Iterator[str], str]:
    """Returns the requests as lines of JSON, and a sentence that estimates their tokens.

    A line has the `id` and the `messages` of a request. The sentence names the model, and counts
    `settings.answer_tokens` for each answer. Nothing is sent.
    """
    lines = (
        json.dumps({"id": each.id, "messages": list(each.messages)}, ensure_ascii=False)
        for each in requests
    )
    asked = sum(map(estimate, requests))
    answers = len(requests) * settings.answer_tokens
    summary = (
        f"{len(requests)} requests to {settings.model}: about {asked:,} tokens of requests "
        f"({CHARACTERS} characters a token) and at most {answers:,} of answers; nothing was sent"
    )
    if 0 < settings.max_tokens < asked + answers:
        summary += f"; --max_tokens {settings.max_tokens:,} may end before the last"
    return lines, summary


class _Run:
    """The requests under way; all methods run in one event loop, so that no lock is needed."""

    def __init__(
        self,
        settings: EndpointSettings,
        client: Client,
        journal: Journal,
        find_problem: FindProblem,
    ):
        self._settings, self._client, self._journal = settings, client, journal
        self._find_problem = find_problem
        self._reserved = 0  # tokens that requests under way may still cost
        self._excess = 1.0  # the highest ratio so far of a reply's tokens to its estimate
        self._replies = 0
        self._refused: dict[str, str] = {}
        self._error: Exception | None = None
        self._ending = asyncio.Event()
        self._freed = asyncio.Condition()

    def reason(self, request: Request) -> str:
        """Returns why a request has no answer."""
        return self._refused.get(request.id) or self._journal.problems.get(request.id, "not asked")

    async def finish(self, requests: Sequence[Request]) -> None:
        """Returns when every request is answered or given up; raises what ended the run early."""
        pending = [each for each in requests if not self._is_done(each)]
        if not pending:
            return
        done = len(requests) - len(pending)
        label = f"asking {self._settings.model}"
        queue = iter(pending)
        try:
            with Progress(len(requests), label, "requests", done=done) as progress:
                async with asyncio.TaskGroup() as group:
                    for _ in range(min(self._settings.concurrency, len(pending))):
                        group.create_task(self._work(queue, progress))
        finally:
            await self._client.close()
        if self._error is not None:
            raise self._error

    async def _work(self, queue: Iterator[Request], progress: Progress) -> None:
        """Takes requests from the common queue until it is empty or the run ends."""
        for request in queue:
            while not self._is_done(request):
                await self._attempt(request)
                if self._ending.is_set():
                    return
            progress.update(note=f"{self._journal.tokens:,} tokens")

    async def _attempt(self, request: Request) -> None:
        """Gets one reply to a request and journals it; ends the run if that is impossible."""
        estimated = estimate(request) + self._settings.answer_tokens
        cost = await self._reserve(estimated)
        if not cost:
            return
        try:
            reply = await self._send(request)
            if reply is not None:
                self._replies += 1
                tokens = cost if reply.tokens is None else reply.tokens
                self._excess = max(self._excess, tokens / estimated)
                problem = _finish_problem(reply) or self._find_problem(request, reply.text)
                self._journal.add(request, reply.text, problem, tokens)
        except RefusedError as error:
            self._refused[request.id] = str(error)
            if len(self._refused) >= REFUSALS and not self._replies:
                self._end(EndpointError(f"the endpoint refuses every request: {error}"))
        except OSError as error:  # an EndpointError, or a full disk
            self._end(error)
        finally:
            async with self._freed:
                self._reserved -= cost
                self._freed.notify_all()

    async def _send(self, request: Request) -> Reply | None:
        """Returns the reply, after pauses and further attempts if needed; None if the run ends."""
        failures = 0
        while not self._ending.is_set():
            try:
                return await self._client.send(request.messages)
            except TransientError as error:
                failures += 1
                if failures > self._settings.retries:
                    raise EndpointError(
                        f"request {request.id!r} failed {failures} times in a row, at last with: "
                        f"{error}. Replies so far are kept in {self._journal.path}: the same "
                        "command goes on from there"
                    ) from None
                await self._pause(failures, error.wait)
        return None

    async def _pause(self, failures: int, wait: float) -> None:
        """Waits longer after each failure, at least `wait` seconds; less if the run ends."""
        pause = min(self._settings.backoff * 2 ** (failures - 1), LONGEST_PAUSE)
        pause *= random.uniform(0.5, 1.0)  # requests that failed together are not repeated together
        try:
            await asyncio.wait_for(self._ending.wait(), max(pause, wait))
        except TimeoutError:
            return

    async def _reserve(self, estimated: int) -> int:
        """Sets tokens aside for a request, waiting for those under way where too few are left.

        Returns their number, which is higher than the estimate where that was exceeded before; 0
        if the run ends. Ends it if there are too few.
        """
        limit = self._settings.max_tokens
        async with self._freed:
            while True:
                cost = math.ceil(estimated * self._excess)
                if not limit or self._journal.tokens + self._reserved + cost <= limit:
                    break
                if self._ending.is_set():
                    return 0
                if not self._reserved:
                    self._end(
                        ValueError(
                            f"--max_tokens {limit:,} does not suffice: {self._journal.tokens:,} "
                            f"are used, the next request may cost {cost:,}. "
                            f"{len(self._journal.answers)} answers are kept in "
                            f"{self._journal.path}: the same command with a larger --max_tokens "
                            "goes on from there"
                        )
                    )
                    return 0
                await self._freed.wait()
            self._reserved += cost
        return cost

    def _end(self, error: Exception) -> None:
        """Ends the run with the first error; replies under way are still journaled."""
        self._error = self._error or error
        self._ending.set()

    def _is_done(self, request: Request) -> bool:
        failures = self._journal.failures[request.id]
        return (
            request.id in self._journal.answers
            or request.id in self._refused
            or failures >= self._settings.attempts
        )


def _finish_problem(reply: Reply) -> str:
    """Returns why a reply is no whole answer; "" if it is one."""
    if reply.finish == "length":
        return "cut off at the most tokens of an answer (--answer_tokens)"
    if reply.finish == "content_filter":
        return "withheld by the endpoint's content filter"
    return "" if reply.text.strip() else "empty"

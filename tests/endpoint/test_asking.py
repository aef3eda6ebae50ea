"""Many requests to an endpoint that fails in every way, within a budget."""

import contextlib
import dataclasses
import json
import threading

import pytest

from jax_instructblip.endpoint import asking, client
from jax_instructblip.endpoint.asking import ask, preview
from jax_instructblip.endpoint.client import EndpointError
from jax_instructblip.endpoint.journal import Request
from jax_instructblip.endpoint.settings import EndpointSettings
from tests.helpers.chat_server import FAULTS, GOOD, TOKENS, chat_server

pytest.importorskip("openai", reason="needs openai: pip install -e .[judge]")
SETTINGS = EndpointSettings("stub", timeout=10.0, backoff=0.01, concurrency=4, answer_tokens=20)


def question(messages):
    return messages[-1]["content"]


def reply(messages):
    return f"about {question(messages)}"


def is_usable(request, text):
    return "" if text == f"about {question(request.messages)}" else "not about it"


@pytest.fixture
def start(tmp_path, monkeypatch):
    """`start(texts, **changes)` asks a server; options of `chat_server` are in `server`."""
    monkeypatch.setenv("OPENAI_API_KEY", "the key")

    def start(texts, server=None, **changes):
        requests = [Request(each, ({"role": "user", "content": each},)) for each in texts]
        with chat_server(**{"answer": reply, "name": question, **(server or {})}) as running:
            start.server = running
            settings = dataclasses.replace(SETTINGS, endpoint=running.url, **changes)
            return ask(requests, settings, tmp_path / "j.jsonl", {"p": 1}, is_usable)

    return start


TEXTS = [f"q{number}" for number in range(24)]


def test_every_request_is_answered_once_whatever_fails(start):
    """Every second request fails in another way, until all ways are through."""
    fault = lambda n: FAULTS[n // 2] if n % 2 == 0 and n // 2 < len(FAULTS) else GOOD
    outcome = start(TEXTS, {"fault": fault}, timeout=4.0)
    assert list(outcome.answers) == TEXTS and not outcome.missing
    assert outcome.answers["q7"] == "about q7"
    log = start.server.log
    assert {what for _, what in log} == {GOOD, *FAULTS}
    assert sorted(name for name, what in log if what == GOOD) == sorted(TEXTS)
    replies = sum(what in (GOOD, "text") for _, what in log)
    assert outcome.tokens == replies * TOKENS
    assert start.server.keys == {"Bearer the key"}
    again = start(TEXTS)  # all is in the journal
    assert again.answers == outcome.answers and start.server.log == []


def test_as_many_requests_as_allowed_run_at_once(start):
    """A request is answered when four are there."""
    barrier = threading.Barrier(4)

    def answer(messages):
        barrier.wait(60)
        return reply(messages)

    start(TEXTS, {"answer": answer}, timeout=60.0)
    assert start.server.most == 4


def test_what_is_sent(start):
    start(["q"], temperature=0.5)
    assert start.server.bodies == [
        {
            "model": "stub",
            "messages": [{"role": "user", "content": "q"}],
            "temperature": 0.5,
            "max_tokens": 20,
        }
    ]


def test_the_newer_name_of_the_limit_is_taken_where_the_older_is_refused(start):
    refusal = "400 use 'max_completion_tokens' instead of 'max_tokens'"
    start(["a", "b"], {"fault": lambda n: GOOD if n else refusal}, concurrency=1)
    sent = [body.keys() & {"max_tokens", "max_completion_tokens"} for body in start.server.bodies]
    assert sent == [{"max_tokens"}, {"max_completion_tokens"}, {"max_completion_tokens"}]


def test_unusable_answers_are_given_up_and_tried_again_with_more_attempts(start):
    outcome = start(["a", "b"], {"fault": lambda n: "text"}, attempts=2)
    assert outcome.answers == {} and outcome.missing == dict.fromkeys("ab", "not about it")
    assert len(start.server.log) == 4
    outcome = start(["a", "b"], attempts=2)
    assert start.server.log == [] and len(outcome.missing) == 2
    assert list(start(["a", "b"], attempts=3).answers) == ["a", "b"]


def test_tokens_end_at_the_limit_and_a_larger_one_goes_on(start, tmp_path):
    """A request may cost 4 + 20 tokens and costs 42."""
    with pytest.raises(ValueError, match="max_tokens 300 .*294 are used.* 7 answers are kept"):
        start(TEXTS, max_tokens=300)
    assert len(start.server.log) == 7
    assert len(start(TEXTS, max_tokens=24 * 42).answers) == 24
    assert len(start.server.log) == 17


def test_an_endpoint_that_never_answers_ends_the_run(start, tmp_path):
    with pytest.raises(EndpointError, match="'a' failed 3 times in a row.*500.*stub 500.*goes on"):
        start(["a"], {"fault": lambda n: "500"}, retries=2)
    assert [name for name, _ in start.server.log] == ["a"] * 3
    assert list(start(["a"]).answers) == ["a"]


@pytest.mark.parametrize(
    ("status", "count", "error"),
    [
        ("401", 1, "is the key in OPENAI_API_KEY right"),
        ("404", 1, "are --endpoint and --model right"),
        ("400", asking.REFUSALS, "refuses every request: .*400"),
    ],
)
def test_errors_that_no_retry_mends_end_the_run(start, status, count, error):
    with pytest.raises(EndpointError, match=error):
        start(TEXTS, {"fault": lambda n: status}, concurrency=1)
    assert len(start.server.log) == count


def test_a_refused_request_is_missing_and_asked_again_by_the_next_run(start):
    outcome = start(["a", "b"], {"fault": lambda n: "400" if n else GOOD}, concurrency=1)
    assert list(outcome.answers) == ["a"] and "400" in outcome.missing["b"]
    assert list(start(["a", "b"]).answers) == ["a", "b"]
    assert [name for name, _ in start.server.log] == ["b"]


def test_pauses_double_up_to_a_minute_and_heed_the_server(monkeypatch, start):
    pauses = []

    async def wait(coroutine, seconds):
        coroutine.close()
        pauses.append(seconds)
        raise TimeoutError

    monkeypatch.setattr(asking.asyncio, "wait_for", wait)
    monkeypatch.setattr(asking.random, "uniform", lambda low, high: high)
    with contextlib.suppress(EndpointError):
        start(["a"], {"fault": lambda n: "429"}, backoff=1.0, retries=8)
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60]
    assert client._retry_after("7.5") == 7.5 and client._retry_after("9999") == 600
    assert client._retry_after("Wed, 21 Oct 2026 07:28:00 GMT") == client._retry_after("nan") == 0


@pytest.mark.parametrize(
    ("choice", "problem"),
    [
        ({"message": {"content": "about a"}, "finish_reason": "length"}, "cut off at the most tok"),
        ({"message": {"content": "about a"}, "finish_reason": "content_filter"}, "withheld"),
        ({"message": {"content": None}, "finish_reason": "stop"}, "empty"),
    ],
)
def test_a_reply_that_is_no_whole_answer_is_unusable(choice, problem):
    made = client._reply(json.dumps({"choices": [choice]}).encode())
    assert made.tokens is None and asking._finish_problem(made).startswith(problem)


@pytest.mark.parametrize("body", ["[]", "{}", '{"choices": []}', '{"choices": ["a"]}', "é\n<html>"])
def test_a_body_that_is_no_reply_is_a_passing_failure(body):
    with pytest.raises(client.TransientError, match="answer is"):
        client._reply(body.encode())


@pytest.mark.parametrize("key", [None, " "])
def test_an_endpoint_without_a_key_is_named_and_nothing_is_written(
    start, monkeypatch, tmp_path, key
):
    monkeypatch.delenv("OPENAI_API_KEY")
    if key is not None:
        monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(ValueError, match="OPENAI_API_KEY is not set"):
        start(["a"])
    assert list(tmp_path.iterdir()) == []


def test_a_preview_estimates():
    requests = [Request(each, ({"role": "user", "content": each * 40},)) for each in "ab"]
    lines, summary = preview(requests, dataclasses.replace(SETTINGS, max_tokens=50))
    assert [json.loads(line)["id"] for line in lines] == ["a", "b"]
    assert "about 28 tokens of requests" in summary and "at most 40 of answers" in summary
    assert "--max_tokens 50 may end before the last" in summary

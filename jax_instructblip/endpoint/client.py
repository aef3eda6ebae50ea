"""Sends one request to a chat endpoint; its exceptions tell whether sending it again can help."""

import asyncio
import os
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jax_instructblip.endpoint.settings import KEY, EndpointSettings
from jax_instructblip.files import kind_of, parse_json

RETRY_AFTER_LIMIT = 600.0  # seconds; a longer wait that a server asks for is cut to this
_OVERLOAD = (408, 409, 425, 429)  # and all of 500 and above
_REFUSED = (400, 413, 422)  # this request alone cannot be answered
_LIMITS = ("max_tokens", "max_completion_tokens")  # names of the limit of an answer
_REASON_LIMIT = 300  # characters of a server's own message


class Reply(NamedTuple):
    """A complete answer of the endpoint.

    Attributes:
      text: the answer; "" if there is none.
      finish: why it ends: "stop", "length", "content_filter" ...
      tokens: tokens of request and answer together; None if the endpoint does not tell.
    """

    text: str
    finish: str
    tokens: int | None


class TransientError(Exception):
    """There is no reply this time, but there may be one later.

    Attributes:
      wait: seconds that the server asks to wait; 0 if it does not say.
    """

    def __init__(self, reason: str, wait: float = 0.0):
        """Keeps the reason for the message that ends a run after too many failures."""
        super().__init__(reason)
        self.wait = wait


class RefusedError(Exception):
    """The endpoint refuses this request, whenever it is sent."""


class EndpointError(OSError):
    """The endpoint cannot be used at all: wrong key, unknown model, no credit, no connection."""


class Client:
    """OpenAI's client with one model and its settings; used inside one event loop.

    Attributes:
      url: the base URL of the endpoint.
    """

    def __init__(self, settings: EndpointSettings):
        """Reads the key from the environment variable `OPENAI_API_KEY`.

        Raises:
          ValueError: there is no key, or the library `openai` is not installed.
        """
        key = os.environ.get(KEY, "").strip()
        if not key:
            raise ValueError(
                f"{KEY} is not set: set it to the endpoint's key; a server of your own that asks "
                "for none takes any text"
            )
        try:
            import openai
        except ImportError as error:
            raise ValueError(
                "asking an endpoint needs the library openai: pip install -e '.[judge]'"
            ) from error
        self._openai, self._settings = openai, settings
        # Failures are retried by `asking`, which counts them; the library would hide them.
        self._client = openai.AsyncOpenAI(
            api_key=key,
            base_url=settings.endpoint or None,
            timeout=settings.timeout,
            max_retries=0,
        )
        self.url = str(self._client.base_url)
        self._limit = _LIMITS[0]

    async def send(self, messages: Sequence[Mapping[str, str]]) -> Reply:
        """Sends one request and returns the reply.

        `messages` are objects with `role` and `content`, as in `journal.Request`.

        Raises:
          TransientError: the endpoint is silent or overloaded, or the reply is damaged.
          RefusedError: the request itself is refused.
          EndpointError: the endpoint cannot answer any request.
        """
        openai, settings, limit = self._openai, self._settings, self._limit
        body: dict[str, Any] = {
            "model": settings.model,
            "messages": list(messages),
            "temperature": settings.temperature,
            limit: settings.answer_tokens,
        }
        try:
            # The library's own limit is of each read: a server that trickles would hold it forever.
            async with asyncio.timeout(settings.timeout):
                raw = await self._client.chat.completions.with_raw_response.create(**body)
            return _reply(raw.content)
        except (TimeoutError, openai.APITimeoutError):
            raise TransientError(f"no complete answer in {settings.timeout:g} seconds") from None
        except openai.APIStatusError as error:
            # Servers know one name of the limit or both; the newer models of OpenAI refuse the old.
            if error.status_code == 400 and limit == _LIMITS[0] and _LIMITS[1] in error.message:
                self._limit = _LIMITS[1]
                return await self.send(messages)
            raise _status_error(error) from None
        except openai.APIConnectionError as error:
            raise TransientError(f"no connection: {error.__cause__ or error}") from None

    async def close(self) -> None:
        """Closes the connections."""
        await self._client.close()


def _status_error(error: Any) -> Exception:
    """Returns the exception for an HTTP status of 400 or above."""
    status, code = error.status_code, getattr(error, "code", None)
    reason = error.message[:_REASON_LIMIT]
    if str(status) not in reason:
        reason = f"status {status}: {reason}"
    if status == 429 and code == "insufficient_quota":
        return EndpointError(f"the endpoint has no credit left ({reason})")
    if status in _OVERLOAD or status >= 500:
        return TransientError(reason, _retry_after(error.response.headers.get("retry-after")))
    if status in _REFUSED:
        return RefusedError(reason)
    hint = f"; is the key in {KEY} right?" if status in (401, 403) else ""
    hint = "; are --endpoint and --model right?" if status == 404 else hint
    return EndpointError(f"the endpoint refuses ({reason}){hint}")


def _retry_after(header: str | None) -> float:
    """Returns the seconds of a Retry-After header; 0 if it has none or names a date."""
    try:
        seconds = float(header or 0)
    except ValueError:
        return 0.0
    return min(seconds, RETRY_AFTER_LIMIT) if seconds > 0 else 0.0


def _reply(content: bytes) -> Reply:
    """Returns the reply in the body of an answer; raises a TransientError if it is none."""
    try:
        body = parse_json(content, allow_nan=True)  # servers add log-probabilities and the like
    except ValueError as error:
        raise TransientError(f"the body of the answer is {error}") from None
    choices = body.get("choices") if isinstance(body, dict) else None
    choice = choices[0] if isinstance(choices, list) and choices else None
    message = choice.get("message") if isinstance(choice, dict) else None
    if choice is None or not isinstance(message, dict):
        raise TransientError(f"the answer is {kind_of(body)} without choices[0].message")
    text, finish = message.get("content"), choice.get("finish_reason")
    usage = body.get("usage")
    total = usage.get("total_tokens") if isinstance(usage, dict) else None
    counted = isinstance(total, int) and not isinstance(total, bool) and total >= 0
    return Reply(
        text if isinstance(text, str) else "",
        finish if isinstance(finish, str) else "stop",
        total if counted else None,
    )

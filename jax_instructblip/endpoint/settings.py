"""Settings of a chat endpoint: which model answers, how, and how failures are handled."""

import dataclasses
import urllib.parse
from typing import Any

from jax_instructblip.fields import Field, check, number, text, whole

KEY = "OPENAI_API_KEY"  # the environment variable of the key; it is written nowhere

# All but `temperature`, which `inference.generation_config` checks where the flag is a model's.
NUMBERS: dict[str, Field] = {
    "answer_tokens": whole(1, unit="tokens"),
    "attempts": whole(1, 1_000, unit="answers"),
    "backoff": number(0, 60, unit="seconds"),
    "concurrency": whole(1, 1_024, unit="requests"),
    "max_tokens": whole(0, unit="tokens in all; 0: no limit"),
    "retries": whole(0, 1_000, unit="failures in a row"),
    "timeout": number(above=0, at_most=86_400, unit="seconds"),
}
_FIELDS = {**NUMBERS, "model": text(), "endpoint": text(), "temperature": number(0, 2)}


@dataclasses.dataclass(frozen=True)
class EndpointSettings:
    """The settings of all requests of a run.

    Attributes:
      model: the name under which the endpoint knows the model.
      endpoint: the base URL, as in `http://localhost:8000/v1`; "" means the one in the environment
        variable `OPENAI_BASE_URL`, else OpenAI's.
      temperature: the temperature of sampling.
      answer_tokens: the most tokens of one answer.
      max_tokens: the most tokens of all requests and answers together; 0 means no limit.
      concurrency: number of requests under way at the same time.
      timeout: seconds in which an answer must be complete.
      attempts: number of answers to one request, after which it is given up if none is usable.
      retries: number of failures in a row (no answer, overload, damaged reply) of one request that
        are tolerated; one more ends the run.
      backoff: seconds of the pause after the first failure; doubled after each further one, up to
        a minute.
    """

    model: str
    endpoint: str = ""
    temperature: float = 1.0
    answer_tokens: int = 1024
    max_tokens: int = 0
    concurrency: int = 8
    timeout: float = 120.0
    attempts: int = 3
    retries: int = 10
    backoff: float = 1.0

    def __post_init__(self):
        check(self, _FIELDS)
        if not self.model.strip():
            raise ValueError("model is empty: give the name under which the endpoint knows it")
        if not self.endpoint:
            return
        url = urllib.parse.urlsplit(self.endpoint)
        if url.scheme not in ("http", "https") or not url.hostname:
            raise ValueError(
                f"endpoint is {self.endpoint!r}, expected a base URL, as in "
                "http://localhost:8000/v1"
            )
        if url.username or url.password or url.query:  # it would stand in journals and results
            raise ValueError(
                f"endpoint holds more than an address: give a key in {KEY}, not in the URL"
            )

    def facts(self) -> dict[str, Any]:
        """Returns the settings that answers depend on, by attribute, as `facts` of a journal."""
        return {
            "model": self.model,
            "temperature": self.temperature,
            "answer_tokens": self.answer_tokens,
        }

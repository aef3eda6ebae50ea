"""Settings of an endpoint: invalid values are refused, and no key can enter a journal."""

import pytest

from jax_instructblip.endpoint.settings import EndpointSettings


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": " "}, "model is empty"),
        ({"temperature": 2.5}, "temperature is 2.5, expected at least 0 and at most 2"),
        ({"attempts": 0, "timeout": 0.0}, "timeout is 0.0, expected above 0.*attempts is 0"),
        ({"endpoint": "localhost:8000"}, "endpoint is 'localhost:8000', expected a base URL"),
        ({"endpoint": "http://me:secret@host/v1"}, "give a key in OPENAI_API_KEY"),
        ({"endpoint": "http://host/v1?key=secret"}, "give a key in OPENAI_API_KEY"),
    ],
)
def test_unusable_settings_are_named(values, message):
    with pytest.raises(ValueError, match=message) as error:
        EndpointSettings(**{"model": "m"} | values)
    assert "secret" not in str(error.value)


def test_facts_are_what_answers_depend_on():
    settings = EndpointSettings("m", "http://a:1/v1", concurrency=3)
    assert settings.facts() == {"model": "m", "temperature": 1.0, "answer_tokens": 1024}

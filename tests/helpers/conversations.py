"""Conversations for tests."""

from jax_instructblip.data.conversation import Conversation, Turn


def talk(*texts, images=1, system=None, name="c1"):
    """A conversation of `texts`, the user first."""
    turns = tuple(Turn(("user", "assistant")[i % 2], text) for i, text in enumerate(texts))
    return Conversation(name, turns, images, system)

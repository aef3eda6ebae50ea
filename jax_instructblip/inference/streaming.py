"""Streaming: pieces of an answer as its tokens come, and a device that works one batch ahead."""

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

HALF = "\ufffd"  # the decoded form of a character whose last bytes are still missing
_LAST_WORD = re.compile(r"\s+\S*\Z")


def pieces(
    decode: Callable[[list[int]], str],
    tokens: Iterable[int],
    *,
    rewrites: bool = False,
    stop: str = "",
) -> Iterator[str]:
    """Yields the text that each new token adds, if any; joined, they equal `decode` of all tokens.

    A character of several tokens is held back until it is complete. If the tokenizer `rewrites`
    what it has decoded ("do n't ." becomes "don't."), the last word and the white space before it
    are also held back; earlier text no longer changes. The beginning of a `stop`, a text at which
    `decode` cuts, is held back until it is certain that it is none.
    """
    ids, said, text = [], "", ""
    for token in tokens:
        ids.append(token)
        text = decode(ids)
        sure = _LAST_WORD.sub("", text) if rewrites and _LAST_WORD.search(text) else text
        if rewrites and sure == text:
            continue  # a single word so far
        sure = _without_beginning(sure, stop)
        if sure.startswith(said) and sure != said and not sure.endswith(HALF):
            yield sure[len(said) :]
            said = sure
    rest = text.removeprefix(said)
    if rest:
        yield rest


def _without_beginning(text: str, stop: str) -> str:
    """The text without the longest beginning of `stop`, if it ends with one, and white space."""
    count = next((n for n in range(len(stop) - 1, 0, -1) if text.endswith(stop[:n])), 0)
    return text[: len(text) - count].rstrip() if count else text


def one_ahead(items: Iterable[Any]) -> Iterator[Any]:
    """Yields the given items, each only when the next one has been made.

    So the device answers one batch while the images of the next batch are decoded.
    """
    waiting = []
    for item in items:
        waiting.append(item)
        if len(waiting) > 1:
            yield waiting.pop(0)
    yield from waiting

"""Answers as they come: pieces of text for a reader, batches one ahead of the device."""

import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

HALF = "\ufffd"  # what a tokenizer makes of a character whose last bytes are still to come
_LAST_WORD = re.compile(r"\s+\S*\Z")


def pieces(
    decode: Callable[[list[int]], str], tokens: Iterable[int], *, rewrites: bool = False
) -> Iterator[str]:
    """The text that each token adds, where it adds any; joined, it is `decode` of all tokens.

    A character of several tokens is held back until it is whole. Where the tokenizer `rewrites`
    what it has decoded ("do n't ." becomes "don't.") the last word is held back, too, with the
    white space in front of it: no rule reaches farther back.
    """
    ids, said, text = [], "", ""
    for token in tokens:
        ids.append(token)
        text = decode(ids)
        sure = _LAST_WORD.sub("", text) if rewrites and _LAST_WORD.search(text) else text
        if rewrites and sure == text:
            continue  # a single word so far
        if sure.startswith(said) and sure != said and not sure.endswith(HALF):
            yield sure[len(said) :]
            said = sure
    rest = text.removeprefix(said)
    if rest:
        yield rest


def one_ahead(items: Iterable[Any]) -> Iterator[Any]:
    """The items, each handed out when the next one has been made.

    The device answers one batch while the images of the next are decoded.
    """
    waiting = []
    for item in items:
        waiting.append(item)
        if len(waiting) > 1:
            yield waiting.pop(0)
    yield from waiting

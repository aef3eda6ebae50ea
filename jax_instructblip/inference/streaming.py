"""From tokens that come one by one to pieces of text that can be shown at once."""

from collections.abc import Callable, Iterable, Iterator

HALF = "\ufffd"  # what a tokenizer makes of a character whose last bytes are still to come


def pieces(decode: Callable[[list[int]], str], tokens: Iterable[int]) -> Iterator[str]:
    """What each token adds to the text, where it adds any: joined, `decode` of all tokens.

    A character of several tokens is held back until it is whole.
    """
    ids, said = [], ""
    for token in tokens:
        ids.append(token)
        text = decode(ids)
        if text.startswith(said) and text != said and not text.endswith(HALF):
            yield text[len(said) :]
            said = text
    rest = decode(ids).removeprefix(said)
    if rest:
        yield rest

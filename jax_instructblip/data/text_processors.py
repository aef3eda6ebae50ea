"""The text processors of the released code: captions and questions in lower case, without marks.

The paper does not mention them, and its prompts and results are written with capitals and marks:
`data.text_processor = "paper"` leaves every text as it is, "lavis" applies these.
"""

import re

PROCESSORS = ("paper", "lavis")
WORDS = 50  # of a text, at most

_MARKS = re.compile(r'[.!"()*#:;~]')
_SPACES = re.compile(r"\s{2,}")


def process_caption(text: str) -> str:
    """The caption as LAVIS's `blip_caption` makes it: each mark becomes a space, then one of many.

    >>> process_caption('A dog (brown): "Rex".')
    'a dog brown rex'
    """
    text = _SPACES.sub(" ", _MARKS.sub(" ", text.lower())).rstrip("\n").strip(" ")
    return _first_words(text)


def process_question(text: str) -> str:
    """The question as LAVIS's `blip_question` makes it: marks are deleted; "?" and "," stay.

    >>> process_question('What is on the "STOP" sign, here?')
    'what is on the stop sign, here?'
    """
    return _first_words(_MARKS.sub("", text.lower()).rstrip(" "))


def _first_words(text: str) -> str:
    words = text.split(" ")
    return " ".join(words[:WORDS])

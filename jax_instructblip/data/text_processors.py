"""LAVIS's text processors, which write captions and questions in lower case without punctuation.

LAVIS is the code that was released with the paper. The paper does not mention them, and its prompts
and results have capitals and punctuation: `data.text_processor = "paper"` leaves texts as they are,
"lavis" applies the functions of this file, which also cut a text after `WORDS` words.
"""

import re

PROCESSORS = ("paper", "lavis")
WORDS = 50  # most words that are kept of a text

_MARKS = re.compile(r'[.!"()*#:;~]')
_SPACES = re.compile(r"\s{2,}")


def process_caption(text: str) -> str:
    """Returns the caption as LAVIS's `blip_caption` writes it: punctuation becomes single spaces.

    >>> process_caption('A dog (brown): "Rex".')
    'a dog brown rex'
    """
    text = _SPACES.sub(" ", _MARKS.sub(" ", text.lower())).rstrip("\n").strip(" ")
    return _first_words(text)


def process_question(text: str) -> str:
    """Returns the question as LAVIS's `blip_question` writes it: without marks but "?" and ",".

    >>> process_question('What is on the "STOP" sign, here?')
    'what is on the stop sign, here?'
    """
    return _first_words(_MARKS.sub("", text.lower()).rstrip(" "))


def _first_words(text: str) -> str:
    words = text.split(" ")
    return " ".join(words[:WORDS])

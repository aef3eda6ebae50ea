"""ScienceQA as LLaVA is scored on it: the letter that an answer names, and accuracy by subject."""

import re
import string
from collections.abc import Iterable, Sequence

import numpy as np

from jax_instructblip.data.records import Record
from jax_instructblip.evaluation.metrics.choice_scores import with_choices
from jax_instructblip.evaluation.metrics.metric import Response, Scores, mean, standard_error

LETTERS = string.ascii_uppercase
# The released scorer's pattern: any character may stand for the full stop.
_SENTENCE = re.compile(r"The answer is ([A-Z]).")


def score_science_qa(responses: Sequence[Response], records: Sequence[Record]) -> Scores:
    """Returns the share of right choices: `accuracy`, and `accuracy/CLASS` of classes of problems.

    NAT, SOC, LAN   subject: natural, social, language science
    TXT, IMG, NO    context: with a hint, with an image, with neither (a problem may have both)
    G1-6, G7-12     grades

    Subject and grades are in the record's task, `DATASET/SUBJECT/GRADES`. A class without problems
    has no value. In a ranking the candidate with the highest score is chosen; a generated answer
    chooses the candidate whose letter it names (`named_letter`), and is wrong if it names none.
    """
    pairs = with_choices(responses, records)
    right = [float(_chosen(response) == record.correct) for response, record in pairs]
    by_class: dict[str, list[float]] = {name: [] for name in _CLASSES}
    for score, (_, record) in zip(right, pairs, strict=True):
        for name in classes(record):
            by_class[name].append(score)
    shares = {f"accuracy/{name}": each for name, each in by_class.items() if each}
    return Scores(
        {"accuracy": mean(right), **{name: mean(each) for name, each in shares.items()}},
        {"accuracy": tuple(right)},
        errors={name: standard_error(each) for name, each in shares.items() if len(each) > 1},
    )


_CLASSES = ("NAT", "SOC", "LAN", "TXT", "IMG", "NO", "G1-6", "G7-12")


def classes(record: Record) -> Iterable[str]:
    """Returns the classes (`NAT`, `IMG`, `G1-6` ...) of a record; `score_science_qa` lists all."""
    context = [name for name, has in (("TXT", record.context), ("IMG", record.images)) if has]
    _, *known = record.task.split("/")
    return [*(name for name in known if name in _CLASSES), *(context or ["NO"])]


def named_letter(text: str) -> str:
    """Returns the letter of the choice that an answer names; "" if it names none, or several.

    It names a letter if that is all, if it begins with it (`X. `), or if it says "The answer is X."
    exactly once, as in the released scorer.
    """
    text = text.strip()
    if len(text) == 1 and text in LETTERS:
        return text
    if text[:1] in LETTERS and text[1:3] == ". ":
        return text[:1]
    named = _SENTENCE.findall(text)
    return named[0] if len(named) == 1 else ""


def _chosen(response: Response) -> int:
    """Returns the index of the choice that the response selects; -1 if it selects none."""
    if len(response.scores):
        return int(np.argmax(response.scores))
    letter = named_letter(response.text)
    return LETTERS.index(letter) if letter else -1

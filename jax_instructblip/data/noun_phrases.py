"""LLaVA's filter of caption pairs: few captions for frequent noun phrases, none for rare ones.

    captions --noun_phrases--> phrases --counted--> rarest first: at most `cap` captions each

Of CC3M's 3.3 million pairs LLaVA keeps 595,000 in this way (arXiv 2304.08485, appendix): phrases in
fewer than 3 captions are skipped; from the rarest of the others on, the captions with a phrase are
taken, and of a phrase in more than 100 captions a random 100.

The paper finds the phrases with spaCy. Here they are the words between function words and marks,
in lower case, so that no tagger is needed. Verbs are not told from nouns: "dog running" is one.
"""

import array
import hashlib
import logging
import os
import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from jax_instructblip import remote, stores
from jax_instructblip.atomic import locked
from jax_instructblip.data.records import Record, RecordSubset
from jax_instructblip.progress import Progress

MIN_CAPTIONS = 3  # captions that a phrase must be in
CAP = 100  # most captions that a phrase brings
VERSION = 1  # raise it where the same captions give other pairs

_WORD = re.compile(r"[^\W\d_][\w'’-]*|[^\w\s]|\d+")
# Words that end a phrase and belong to none.
_FUNCTION_WORDS = frozenset(
    "a an the this that these those some any each every all both no another other such "
    "of in on at to from by with without for as into onto over under above below behind beside "
    "between among near around through across along against during before after about off out "
    "up down inside outside toward towards upon within "
    "and or but nor so yet while when where who whom whose which what why how if because than "
    "then there here not only just also very too "
    "i you he she it we they me him her us them my your his its our their one's "
    "is are was were be been being am do does did has have had can could will would shall should "
    "may might must get gets got".split()
)


def noun_phrases(caption: str) -> list[str]:
    """Returns the different phrases of a caption, in its order: ["red car", "street"]."""
    phrases: list[str] = []
    words: list[str] = []
    for word in [*_WORD.findall(caption.lower()), "."]:
        if word in _FUNCTION_WORDS or not word[0].isalpha():
            if words:
                phrases.append(" ".join(words))
            words = []
        else:
            words.append(word)
    return list(dict.fromkeys(phrases))


def balance(captions: Iterable[str], *, cap: int = CAP, seed: int = 0) -> np.ndarray:
    """Returns the sorted indices [n] of the captions that the filter keeps.

    Args:
      captions: the captions; a blank one has no phrase and is left out.
      cap: most captions that one phrase chooses. Several phrases may choose the same caption.
      seed: seed of the random choice for a phrase that is in more than `cap` captions.
    """
    numbers: dict[str, int] = {}
    phrase_of, caption_of = array.array("q"), array.array("q")
    for index, caption in enumerate(captions):
        for phrase in noun_phrases(caption):
            phrase_of.append(numbers.setdefault(phrase, len(numbers)))
            caption_of.append(index)
    phrases = np.frombuffer(phrase_of, np.int64) if phrase_of else np.zeros(0, np.int64)
    rows = np.frombuffer(caption_of, np.int64) if caption_of else np.zeros(0, np.int64)
    order = np.argsort(phrases, kind="stable")
    counts = np.bincount(phrases, minlength=len(numbers))
    groups = np.split(rows[order], np.cumsum(counts)[:-1]) if len(counts) else []
    rng = np.random.default_rng([seed, VERSION])
    kept = [
        groups[number] if counts[number] <= cap else rng.choice(groups[number], cap, replace=False)
        for number in np.argsort(counts, kind="stable")
        if counts[number] >= MIN_CAPTIONS
    ]
    return np.unique(np.concatenate(kept)) if kept else np.zeros(0, np.int64)


def balanced(
    records: Sequence[Record], digest: str, path: str | os.PathLike[str], *, cap: int, seed: int
) -> tuple[RecordSubset, str]:
    """Returns the records of pairs that the filter keeps, and their digest.

    Every record is read once, and the choice is kept in the folder of copies (`stores.py`). Records
    that are no pairs are left out; the log counts them.

    Args:
      records: the records of pairs, with their captions as answers.
      digest: of the content of `records`.
      path: where they are from, for the folder of copies.
      cap: most captions that one phrase chooses.
      seed: seed of the random choice.

    Raises:
      ValueError: no phrase is in `MIN_CAPTIONS` captions.
    """
    facts = repr([digest, VERSION, MIN_CAPTIONS, cap, seed])
    new = hashlib.sha256(facts.encode()).hexdigest()
    home = stores.working_folder(remote.address_of(path) or os.path.abspath(os.fspath(path)))
    kept = home / f"noun_phrases-{new[:32]}.npy"
    with locked(home / "lock"):
        if not kept.is_file():
            indices = balance(_captions(records, str(path)), cap=cap, seed=seed)
            temporary = kept.with_suffix(".tmp")
            with temporary.open("wb") as file:
                np.save(file, indices, allow_pickle=False)
            temporary.replace(kept)
    indices = np.load(kept)
    if not len(indices):
        raise ValueError(
            f"{path}: no noun phrase is in {MIN_CAPTIONS} of its {len(records)} captions, so the "
            "filter keeps none: set noun_phrases to 0"
        )
    return RecordSubset(records, indices), new


def _captions(records: Sequence[Record], title: str) -> Iterator[str]:
    """Yields the captions of each record as one text; "" for a record that is no pair.

    At the end the log says how many are none.
    """
    problems = []
    with Progress(len(records), f"reading captions of {title}", "pairs") as line:
        for index in range(len(records)):
            record = records[index]
            if record.problem:
                problems.append(f"{record.id}: {record.problem}")
            yield "" if record.problem else " . ".join(record.answers)
            line.update()
    if problems:
        logging.getLogger(__name__).warning(
            f"{title}: {len(problems)} of {len(records)} records are no pairs and left out, the "
            f"first: {problems[0]}"
        )

"""CIDEr, BLEU, ROUGE-L, METEOR and SPICE, computed by COCO's caption tools (pycocoevalcap).

The metrics count words as Stanford's PTBTokenizer splits them. That tokenizer, METEOR and SPICE are
Java programs shipped with the tools. Without Java, `penn_treebank.py` splits the words, METEOR and
SPICE are left out, and the scores have a note about it.
"""

import contextlib
import importlib
import importlib.util
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jax_instructblip.data.records import Record
from jax_instructblip.evaluation.metrics import penn_treebank
from jax_instructblip.evaluation.metrics.metric import MetricError, Response, Scores, align

TOOLS = "pycocoevalcap"
TOKENISER = "tokenizer/stanford-corenlp-3.4.1.jar"
# SPICE parses with a model of 0.3 GB, which the tools would fetch on their own.
SPICE_MODEL = "spice/lib/stanford-corenlp-3.6.0-models.jar"
# Tokens that the tools drop. Brackets are kept in effect: the tokenizer writes them in lower case.
PUNCTUATION = frozenset(
    ("''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-")
    + (".", "?", "!", ",", ":", "-", "--", "...", ";")
)

Captions = Mapping[str, list[str]]  # record id -> captions, each as tokens joined by spaces


def score_captions(
    responses: Sequence[Response],
    records: Sequence[Record],
    *,
    full: bool = False,
    java: bool | None = None,
) -> Scores:
    """Returns CIDEr (that is, CIDEr-D, as usually reported), BLEU-1 to 4 and ROUGE-L.

    CIDEr weighs each word by the number of images whose references have it. So it depends on the
    set of records: score whole splits. For a single image it is 0. Records of tasks such as
    `nocaps/in-domain` also get `cider/in-domain`, CIDEr of these records alone.

    Args:
      responses: the captions.
      records: the references.
      full: add METEOR (20 seconds to start, 2 GB of memory) and SPICE, if they can run;
        `left_out` has the reason if not.
      java: require Java (True) or do without (False); by default Java is used if installed.

    Raises:
      MetricError: the caption tools, or Java if required, are not installed.
    """
    folder = find_tools()
    pairs = align(responses, records)
    has_java = shutil.which("java") is not None
    if java and not has_java:
        raise MetricError("there is no `java` on the PATH: install a Java runtime (17 works)")
    java = has_java if java is None else java
    references, candidates = _tokenised(
        pairs, tokenise_stanford if java else penn_treebank.tokenise
    )

    values: dict[str, float] = {}
    samples: dict[str, tuple[float, ...]] = {}
    notes = (
        []
        if java
        else [f"no Java: words are those of {penn_treebank.__name__}, not PTBTokenizer's"]
    )
    if len(pairs) == 1:
        notes.append("CIDEr of a single image is 0: no word is rarer than another")
    left_out: dict[str, str] = {}
    for names, score in (_SCORERS | _JAVA_SCORERS if full else _SCORERS).items():
        if reason := _obstacle(names, folder, java):
            left_out |= dict.fromkeys(names, reason)
            continue
        for name, (value, of_each) in zip(names, score(references, candidates), strict=True):
            values[name] = float(value)
            samples[name] = tuple(map(float, of_each))
    for group, names in _groups(pairs).items():
        parts = ({name: each[name] for name in names} for each in (references, candidates))
        value, of_each = next(_cider(*parts))
        values[f"cider/{group}"] = float(value)
        samples[f"cider/{group}"] = tuple(map(float, of_each))
    return Scores(values, samples, tuple(notes), left_out)


def _groups(pairs: Sequence[tuple[Response, Record]]) -> dict[str, list[str]]:
    """The ids of each group of records: `in-domain` of those whose task is `nocaps/in-domain`."""
    groups: dict[str, list[str]] = {}
    for _, record in pairs:
        if group := record.task.partition("/")[2]:
            groups.setdefault(group, []).append(record.id)
    return dict(sorted(groups.items()))


def tokenise_stanford(captions: Sequence[str]) -> list[str]:
    """Tokenises each caption by PTBTokenizer; returns its tokens joined by spaces.

    Lower case and without punctuation, as in the caption tools.

    Raises:
      MetricError: Java fails, or returns another number of lines than captions.
    """
    lines = [" ".join(caption.split()) for caption in captions]
    jar = find_tools() / TOKENISER
    command = ["java", "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer"]
    done = subprocess.run(
        [*command, "-preserveLines", "-lowerCase", "-encoding", "utf-8"],
        input="".join(line + "\n" for line in lines).encode("utf-8", "backslashreplace"),
        capture_output=True,
    )
    tokenised = done.stdout.decode("utf-8", "replace").split("\n")[:-1]
    if done.returncode or len(tokenised) != len(lines):
        raise MetricError(
            f"PTBTokenizer made {len(tokenised)} lines of {len(lines)} captions and ended with "
            f"{done.returncode}: {done.stderr.decode('utf-8', 'replace')[-500:]}"
        )
    return [
        " ".join(w for w in line.split(" ") if w and w not in PUNCTUATION) for line in tokenised
    ]


def _tokenised(
    pairs: Sequence[tuple[Response, Record]], split: Callable[[Sequence[str]], list[str]]
) -> tuple[Captions, Captions]:
    """Returns references and candidates by record id, tokenised by `split`."""
    responses = iter(split([response.text for response, _ in pairs]))
    said = iter(split([answer for _, record in pairs for answer in record.answers]))
    references = {record.id: [next(said) for _ in record.answers] for _, record in pairs}
    return references, {record.id: [next(responses)] for _, record in pairs}


def find_tools() -> Path:
    """Returns the folder of the caption tools; raises a MetricError if they are not installed."""
    spec = importlib.util.find_spec(TOOLS)
    if spec is None or not spec.submodule_search_locations:
        raise MetricError(
            f"captions are scored with {TOOLS}, which is not installed: pip install -e '.[eval]'"
        )
    return Path(spec.submodule_search_locations[0])


def _obstacle(names: tuple[str, ...], folder: Path, java: bool) -> str:
    """Returns the reason why the scorer of these metrics cannot run; "" if it can."""
    if names in _JAVA_SCORERS and not java:
        return "it needs Java"
    if names[0] == "spice" and not (folder / SPICE_MODEL).is_file():
        return (
            f"its language model is not there; `python -m {TOOLS}.spice.get_stanford_models` "
            "fetches it"
        )
    return ""


def _cider(references: Captions, candidates: Captions) -> Iterator[tuple[float, Any]]:
    yield _scorer("cider.cider", "Cider")().compute_score(references, candidates)


def _bleu(references: Captions, candidates: Captions) -> Iterator[tuple[float, Any]]:
    scorer = _scorer("bleu.bleu", "Bleu")(4)
    values, of_each = scorer.compute_score(references, candidates, verbose=0)
    yield from zip(values, of_each, strict=True)


def _rouge(references: Captions, candidates: Captions) -> Iterator[tuple[float, Any]]:
    yield _scorer("rouge.rouge", "Rouge")().compute_score(references, candidates)


def _meteor(references: Captions, candidates: Captions) -> Iterator[tuple[float, Any]]:
    scorer = _scorer("meteor.meteor", "Meteor")()
    with contextlib.closing(scorer.meteor_p.stdout), contextlib.closing(scorer.meteor_p.stderr):
        yield scorer.compute_score(references, candidates)


def _spice(references: Captions, candidates: Captions) -> Iterator[tuple[float, Any]]:
    value, of_each = _scorer("spice.spice", "Spice")().compute_score(references, candidates)
    # SPICE returns its scores in the order of sorted ids.
    by_id = dict(zip(sorted(references), (each["All"]["f"] for each in of_each), strict=True))
    yield value, [by_id[name] for name in references]


def _scorer(module: str, name: str) -> Callable[..., Any]:
    return getattr(importlib.import_module(f"{TOOLS}.{module}"), name)


_SCORERS = {
    ("cider",): _cider,
    tuple(f"bleu_{n}" for n in range(1, 5)): _bleu,
    ("rouge_l",): _rouge,
}
_JAVA_SCORERS = {("meteor",): _meteor, ("spice",): _spice}

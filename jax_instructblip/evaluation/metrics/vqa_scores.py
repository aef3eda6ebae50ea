"""Metrics against several annotators' answers: VQA accuracy, A-OKVQA direct answers, iVQA."""

from collections.abc import Callable, Sequence

from jax_instructblip.data.records import Record
from jax_instructblip.evaluation.metrics.metric import (
    MetricError,
    Response,
    Scores,
    align,
    summarise,
)
from jax_instructblip.evaluation.metrics.vqa_text import (
    flatten,
    normalise,
    normalise_evalai,
    strip_punctuation,
)

ANNOTATORS = 10
AGREEING = 3  # number of agreeing annotators that makes an answer right
IVQA_ANNOTATORS = 5

# (answer, annotators' answers) -> both, normalised for comparison
Prepare = Callable[[str, list[str]], tuple[str, list[str]]]


def score_vqa(
    responses: Sequence[Response], records: Sequence[Record], *, headline: str = "vqa_accuracy"
) -> Scores:
    """Returns VQA accuracy by three rules that published numbers use, `headline` first.

        vqa_accuracy         the current official tool
        vqa_accuracy_lavis   an older one in LAVIS: OK-VQA of BLIP-2 and InstructBLIP
        vqa_accuracy_evalai  EvalAI's servers and MMF: TextVQA, VizWiz, VQAv2's test splits

    They differ in text normalisation, which can change the score of a model that writes capitals by
    ten points: if all annotators gave the same answer, the official tool compares raw texts.

    The answer is compared with each subset of all annotators but one: 3 agreeing annotators make it
    right, fewer give a third each. The score is the mean over the subsets. A blank annotation
    agrees with nothing.
    """
    pairs = align(responses, records)
    _check_annotators(pairs, ANNOTATORS)
    fewer = sum(_asked(record) < ANNOTATORS for record in records)
    notes = [f"{fewer} of {len(records)} records have fewer than {ANNOTATORS} annotators"]
    names = sorted(RULES, key=lambda name: name != headline)
    return summarise(
        {
            name: [
                leave_one_out(*RULES[name](response.text, _annotators(record)))
                for response, record in pairs
            ]
            for name in names
        },
        notes if fewer else (),
    )


def score_direct_answer(responses: Sequence[Response], records: Sequence[Record]) -> Scores:
    """Returns `direct_answer` of A-OKVQA: the share min(1, annotators with the same text / 3).

    Texts are not normalised. The official score excludes questions on which annotators disagree too
    much (`difficult_direct_answer`): exclude them from the records.
    """
    pairs = align(responses, records)
    _check_annotators(pairs, ANNOTATORS)
    shares = [min(1.0, record.answers.count(r.text) / AGREEING) for r, record in pairs]
    return summarise({"direct_answer": shares})


def score_ivqa(responses: Sequence[Response], records: Sequence[Record]) -> Scores:
    """Returns `ivqa_accuracy`: per question min(1, agreeing annotators / 2), of five annotators.

    The original metric uses a closed vocabulary (Just Ask). Here texts are compared after the VQA
    tools' normalisation; which of both InstructBLIP used is not known.
    """
    pairs = align(responses, records)
    _check_annotators(pairs, IVQA_ANNOTATORS)
    shares = [
        min(1.0, [normalise(each) for each in record.answers].count(normalise(r.text)) / 2)
        for r, record in pairs
    ]
    return summarise({"ivqa_accuracy": shares})


def leave_one_out(answer: str, annotators: Sequence[str]) -> float:
    """Returns the mean over annotators of min(1, number of agreeing *other* annotators / 3)."""
    agreeing = [each == answer for each in annotators]
    total = sum(agreeing)
    return sum(min(1.0, (total - own) / AGREEING) for own in agreeing) / len(agreeing)


def _official(answer: str, annotators: list[str]) -> tuple[str, list[str]]:
    """Normalises answer and annotations, unless all annotators wrote the same text."""
    answer, annotators = flatten(answer), [flatten(each) for each in annotators]
    if len(set(annotators)) > 1:
        return normalise(answer), [normalise(each) for each in annotators]
    return answer, annotators


def _lavis(answer: str, annotators: list[str]) -> tuple[str, list[str]]:
    """Normalises the answer; strips punctuation from annotations that are not all equal."""
    if len(set(annotators)) > 1:
        annotators = [strip_punctuation(each) for each in annotators]
    return normalise(answer), annotators


def _evalai(answer: str, annotators: list[str]) -> tuple[str, list[str]]:
    return normalise_evalai(answer), [normalise_evalai(each) for each in annotators]


RULES: dict[str, Prepare] = {
    "vqa_accuracy": _official,
    "vqa_accuracy_lavis": _lavis,
    "vqa_accuracy_evalai": _evalai,
}


def _annotators(record: Record) -> list[str]:
    """Returns the annotations, with a text that no model writes for each blank one."""
    return [*record.answers, *["\0"] * record.blank]


def _asked(record: Record) -> int:
    """Returns the number of annotators, including those who left the answer blank."""
    return len(record.answers) + record.blank


def _check_annotators(pairs: Sequence[tuple[Response, Record]], count: int) -> None:
    """Raises a MetricError if a record has fewer than 2 or more than `count` annotators."""
    wrong = [record for _, record in pairs if not 2 <= _asked(record) <= count]
    if wrong:
        raise MetricError(
            f"{len(wrong)} records have not the answers of 2 to {count} annotators, such as "
            f"{wrong[0].id!r} with {_asked(wrong[0])}: score them by exact_match"
        )

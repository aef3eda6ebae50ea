"""Answers compared with those of several annotators: VQA accuracy, A-OKVQA, iVQA."""

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
AGREEING = 3  # so many annotators make an answer right
IVQA_ANNOTATORS = 5

# (answer, annotators' answers) -> the same, ready to be compared
Prepare = Callable[[str, list[str]], tuple[str, list[str]]]


def score_vqa(
    responses: Sequence[Response], records: Sequence[Record], *, headline: str = "vqa_accuracy"
) -> Scores:
    """VQA accuracy by three rules that numbers were published with, `headline` first.

        vqa_accuracy         the official tool as it is now
        vqa_accuracy_lavis   an older one, inside LAVIS: OK-VQA of BLIP-2 and InstructBLIP
        vqa_accuracy_evalai  that of EvalAI's servers and MMF: TextVQA, VizWiz, VQAv2's tests

    They differ in how texts are normalised, for a model that writes capitals by ten points: where
    all annotators wrote the same, the official tool compares texts as they are.

    An answer is compared with all annotators but one, for each of them in turn: three that agree
    make it right, one a third right. The mean of these comparisons counts, of however many
    annotators were asked. What one of them left blank agrees with nothing.
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
    """A-OKVQA's direct answers: three annotators who gave the very same text make it right.

    Nothing is normalised. The official score leaves out the questions whose annotators agreed too
    little (`difficult_direct_answer`): leave them out of the records.
    """
    pairs = align(responses, records)
    _check_annotators(pairs, ANNOTATORS)
    shares = [min(1.0, record.answers.count(r.text) / AGREEING) for r, record in pairs]
    return summarise({"direct_answer": shares})


def score_ivqa(responses: Sequence[Response], records: Sequence[Record]) -> Scores:
    """Accuracy as iVQA has it: two of five annotators make an answer right, one half right.

    Defined on a closed vocabulary (Just Ask); texts are compared here after the normalisation of
    the VQA tools. Which one InstructBLIP took is not known.
    """
    pairs = align(responses, records)
    _check_annotators(pairs, IVQA_ANNOTATORS)
    shares = [
        min(1.0, [normalise(each) for each in record.answers].count(normalise(r.text)) / 2)
        for r, record in pairs
    ]
    return summarise({"ivqa_accuracy": shares})


def leave_one_out(answer: str, annotators: Sequence[str]) -> float:
    """The mean over annotators of min(1, how many others agree with `answer` / 3)."""
    agreeing = [each == answer for each in annotators]
    total = sum(agreeing)
    return sum(min(1.0, (total - own) / AGREEING) for own in agreeing) / len(agreeing)


def _official(answer: str, annotators: list[str]) -> tuple[str, list[str]]:
    """The answer and the annotators', normalised unless all annotators wrote the same."""
    answer, annotators = flatten(answer), [flatten(each) for each in annotators]
    if len(set(annotators)) > 1:
        return normalise(answer), [normalise(each) for each in annotators]
    return answer, annotators


def _lavis(answer: str, annotators: list[str]) -> tuple[str, list[str]]:
    """The answer, normalised, and the annotators', without punctuation unless all are the same."""
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
    """The annotators' answers, with a text that no model can write for each that is blank."""
    return [*record.answers, *["\0"] * record.blank]


def _asked(record: Record) -> int:
    """The number of annotators, those who left the answer blank among them."""
    return len(record.answers) + record.blank


def _check_annotators(pairs: Sequence[tuple[Response, Record]], count: int) -> None:
    """Raises a MetricError where fewer than 2 annotators were asked, or more than `count`."""
    wrong = [record for _, record in pairs if not 2 <= _asked(record) <= count]
    if wrong:
        raise MetricError(
            f"{len(wrong)} records have not the answers of 2 to {count} annotators, such as "
            f"{wrong[0].id!r} with {_asked(wrong[0])}: score them by exact_match"
        )

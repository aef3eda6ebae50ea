"""LLaVA-Bench: a language model judges the answers of a model beside those of a reference.

The judge reads a description of the image, the question, the reference's answer and the model's
(LLaVA, arXiv 2304.08485, section 5). In the benchmark on COCO images it reads captions and boxes,
by the rules `conv`, `detail` and `complex`; in the one "in the wild" captions alone, by the rules
`llava_bench_conv` and so on. The scores of two judges, or of two versions of one, do not compare.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jax_instructblip import files, stores
from jax_instructblip.atomic import refuse_existing, write_file
from jax_instructblip.data.contexts import Context, read_contexts
from jax_instructblip.endpoint.asking import Outcome, ask
from jax_instructblip.endpoint.journal import Request, digest
from jax_instructblip.endpoint.settings import EndpointSettings
from jax_instructblip.evaluation.judge_scores import (
    ALL,
    RelativeScore,
    Review,
    parse_scores,
    relative_scores,
)
from jax_instructblip.evaluation.metrics.metric import MetricError, listed

# The system message of the published judge, part of the benchmark as the rules are.
SYSTEM = "You are a helpful and precise assistant for checking the quality of the answer."
WILD = "llava_bench_"  # begins the names of the rules for contexts without boxes

OWN_RULES = Path(__file__).with_name("judge_rules.json")
OWN = "the package's own rules, not the published ones: scores do not compare with published scores"
PUBLISHED = (
    "the published ones are llava/eval/table/rule.json of github.com/haotian-liu/LLaVA; without "
    "--rules the package's own are taken"
)

JOURNAL, REVIEWS, RESULTS = "journal.jsonl", "reviews.jsonl", "results.json"
INPUTS = ("questions", "contexts", "reference", "answers", "rules")


class Answer(NamedTuple):
    """An answer and its id; an answer without an id of its own has the question's."""

    text: str
    id: Any


@dataclasses.dataclass(frozen=True)
class Case:
    """One question as it is put to the judge.

    Attributes:
      request: what the judge is sent; its id is the question's.
      question_id: as in the file of questions.
      rule: the name of its rule, a key of the JSON file `Inputs.rules`.
      reference, model: the two answers.
    """

    request: Request
    question_id: Any
    rule: str
    reference: Answer
    model: Answer


@dataclasses.dataclass(frozen=True)
class Inputs:
    """The files of a benchmark and the answers to be judged; all in LLaVA's layout.

    Attributes:
      questions: JSON lines with question_id, image, text, category.
      contexts: JSON lines with image, and captions and instances, or caption.
      reference: answers of the reference: JSON lines with question_id (or id) and text.
      answers: answers of the model.
      rules: JSON: {RULE: {"role": ..., "prompt": ...}}; by default the package's own.
    """

    questions: Path
    contexts: Path
    reference: Path
    answers: Path
    rules: Path = OWN_RULES


def make_cases(inputs: Inputs) -> list[Case]:
    """Returns the cases in the order of the questions.

    Raises:
      ValueError: lists what is wrong in a file, and what the files lack of each other.
    """
    questions = _read_rows(inputs.questions, ("question_id",), ("image", "text", "category"))
    contexts: dict[str, Context] = {}
    for context in read_contexts(inputs.contexts):
        if contexts.setdefault(context.image, context) is not context:
            raise MetricError(
                f"{inputs.contexts} describes {context.image} twice: delete one of its lines"
            )
    answers, reference = (
        {key: _answer(row) for key, row in _read_rows(path, ("question_id", "id"), ("text",))}
        for path in (inputs.answers, inputs.reference)
    )
    prefix = "" if any(context.boxes for context in contexts.values()) else WILD
    rules = _read_rules(inputs.rules)
    named = {key: prefix + row["category"] for key, row in questions}
    ids = [key for key, _ in questions]
    problems = [
        listed(f"questions without an answer in {inputs.answers}", _without(ids, answers)),
        listed(f"questions without an answer in {inputs.reference}", _without(ids, reference)),
        listed(f"answers in {inputs.answers} to no question", _without(answers, named)),
        listed(f"answers in {inputs.reference} to no question", _without(reference, named)),
        listed(
            f"images without a line in {inputs.contexts}",
            _without([row["image"] for _, row in questions], contexts),
        ),
        listed(f"rules missing in {inputs.rules} ({PUBLISHED})", _without(named.values(), rules)),
    ]
    if any(problems):
        raise MetricError(
            "\n  ".join(["the files do not belong together:", *filter(None, problems)])
        )
    return [
        _case(
            row,
            contexts[row["image"]],
            (named[key], rules[named[key]]),
            (reference[key], answers[key]),
        )
        for key, row in questions
    ]


def judge(
    inputs: Inputs, settings: EndpointSettings, out: str | os.PathLike[str]
) -> dict[str, Any]:
    """Lets the judge review all answers; writes and returns the results.

    OUT/journal.jsonl has every reply; a run that was interrupted goes on from it.
    OUT/reviews.jsonl has the reviews in LLaVA's layout, scores of -1 where there are none.
    OUT/results.json has the relative scores, the judge's name, prompts and settings.

    Raises:
      FileExistsError: `out` has scores, or is a folder of something else.
      ValueError: as `make_cases` and `endpoint.asking.ask`.
      OSError: as `endpoint.asking.ask`, or `out` cannot be written.
    """
    out = files.local_path(out, "out")
    if not (out / JOURNAL).is_file():
        refuse_existing(out)
    if (out / RESULTS).exists() and is_scored(_read_results(out / RESULTS)):
        raise FileExistsError(f"{out} has scores already: remove it, or choose another folder")
    cases = make_cases(inputs)
    rules = {case.rule: _read_rules(inputs.rules)[case.rule] for case in cases}
    outcome = ask(
        [case.request for case in cases],
        settings,
        out / JOURNAL,
        {"system": digest(SYSTEM), "rules": digest(rules)},
        find_problem,
    )
    rows = [_row(number, case, outcome) for number, case in enumerate(cases, start=1)]
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    write_file(out / REVIEWS, "".join(lines))
    scores = relative_scores(
        [Review(case.request.id, case.rule, _scores(outcome, case.request.id)) for case in cases]
    )
    results = {
        "benchmark": "LLaVA-Bench",
        "judge": {
            **settings.facts(),
            "endpoint": outcome.endpoint,
            "attempts": settings.attempts,
            "system": SYSTEM,
            "rules": rules,
            "rules_of": OWN if inputs.rules == OWN_RULES else str(inputs.rules),
        },
        "files": {name: _file(getattr(inputs, name)) for name in INPUTS},
        "scores": {kind: dataclasses.asdict(score) for kind, score in scores.items()},
        "missing": outcome.missing,
        "tokens": outcome.tokens,
    }
    write_file(out / RESULTS, json.dumps(results, ensure_ascii=False, indent=1) + "\n")
    return results


def find_problem(request: Request, text: str) -> str:
    """Returns why `text`, the reply to `request`, has no scores; "" if it has."""
    try:
        parse_scores(text)
    except ValueError as error:
        return str(error)
    return ""


def read_scores(results: Mapping[str, Any]) -> dict[str, RelativeScore]:
    """Returns the scores in the results of `judge`, as `relative_scores` computed them."""
    return {kind: RelativeScore(**score) for kind, score in results["scores"].items()}


def is_scored(results: Mapping[str, Any]) -> bool:
    """Returns True if the results of `judge` have a score of all questions together."""
    return results["scores"][ALL]["relative"] is not None


def _read_results(path: Path) -> dict[str, Any]:
    """Returns the content of a file that `judge` wrote; a FileExistsError for any other."""
    results = files.read_json(path, dict)
    scores = results.get("scores")
    whole = scores.get(ALL) if isinstance(scores, dict) else None
    if not isinstance(whole, dict) or "relative" not in whole:
        raise FileExistsError(
            f"{path} holds no scores of a judge and is not overwritten: choose another folder"
        )
    return results


def _scores(outcome: Outcome, name: str) -> tuple[float, float] | None:
    return parse_scores(outcome.answers[name]) if name in outcome.answers else None


def _case(
    row: Mapping[str, Any],
    context: Context,
    rule: tuple[str, Mapping[str, str]],
    answers: tuple[Answer, Answer],
) -> Case:
    """Returns the case of a question; the message has the layout of the published judge."""
    name, said = rule
    role = said["role"]
    shown = "\n".join(context.captions)
    if not name.startswith(WILD):
        shown += "\n\n" + "\n".join(map(str, context.boxes))
    parts = [f"[Context]\n{shown}\n\n[Question]\n{row['text']}\n\n"]
    for number, answer in enumerate(answers, start=1):
        parts.append(f"[{role} {number}]\n{answer.text}\n\n[End of {role} {number}]\n\n")
    parts.append(f"[System]\n{said['prompt']}\n\n")
    messages = (
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": "".join(parts)},
    )
    request = Request(str(row["question_id"]), messages)
    return Case(request, row["question_id"], name, *answers)


def _row(number: int, case: Case, outcome: Outcome) -> dict[str, Any]:
    """Returns a line of reviews.jsonl."""
    return {
        "id": number,
        "question_id": case.question_id,
        "answer1_id": case.reference.id,
        "answer2_id": case.model.id,
        "category": case.rule,
        "content": outcome.answers.get(case.request.id, ""),
        "tuple": _scores(outcome, case.request.id) or [-1, -1],
    }


def _answer(row: Mapping[str, Any]) -> Answer:
    name = row.get("question_id", row.get("id"))
    return Answer(row["text"], row.get("answer_id", name))


def _without(names: Any, known: Any) -> list[str]:
    return [str(name) for name in dict.fromkeys(names) if name not in known]


def _read_rows(
    path: Path, keys: Sequence[str], texts: Sequence[str]
) -> list[tuple[str, dict[str, Any]]]:
    """Returns (id, row) of each line of a file of JSON lines; `keys` are names of the id's field.

    Raises:
      MetricError: lists all bad lines, or the file is empty.
    """
    path = stores.input_path(path, "the file")
    rows: dict[str, dict[str, Any]] = {}
    problems = []
    for number, fields, reason in files.scan_jsonl(path):
        try:
            if reason:
                raise ValueError(reason)
            key = _require_row(fields, keys, texts)
            if key in rows:
                raise ValueError(f"{keys[0]} {key} was used before")
            rows[key] = fields
        except ValueError as error:
            problems.append(f"{path}:{number}: {error}")
    if problems:
        raise MetricError("\n  ".join([f"{path} cannot be used:", *problems]))
    if not rows:
        raise MetricError(f"{path} is empty: expected JSON lines with {', '.join(texts)}")
    return list(rows.items())


def _require_row(fields: Any, keys: Sequence[str], texts: Sequence[str]) -> str:
    """Returns the id of a row; raises a ValueError that lists what is wrong in it."""
    if not isinstance(fields, dict):
        raise ValueError(f"found {files.kind_of(fields)}, expected an object {{...}}")
    problems = [
        f"{name} is {files.kind_of(fields.get(name))}, expected text"
        for name in texts
        if not isinstance(fields.get(name), str)
    ]
    key = next((fields[name] for name in keys if name in fields), None)
    if not isinstance(key, str | int) or isinstance(key, bool):
        problems.append(f"{keys[0]} is {files.kind_of(key)}, expected text or a whole number")
    if problems:
        raise ValueError("; ".join(problems))
    return str(key)


def _read_rules(path: Path) -> dict[str, dict[str, str]]:
    """Returns the rules of a file; raises a MetricError if one lacks its role or prompt."""
    rules = files.read_json(stores.input_path(path, "the file of rules"), dict)
    wrong = [
        name
        for name, rule in rules.items()
        if not isinstance(rule, dict)
        or not all(isinstance(rule.get(field), str) for field in ("role", "prompt"))
    ]
    if wrong:
        raise MetricError(f"{path}: {listed('rules without role and prompt', wrong)}; {PUBLISHED}")
    return rules


def _file(path: Path) -> dict[str, str]:
    content = files.read_bytes(stores.input_path(path), files.ANNOTATION_LIMIT)
    name = path.name if path == OWN_RULES else str(path)
    return {"path": name, "sha256": hashlib.sha256(content).hexdigest()}

"""The interface of metrics: their arguments and results, and how responses are matched to records.

A metric is a function `(responses, records) -> Scores`; `METRICS` in `table.py` lists all by name.
Responses and records are matched by `id`, so their order does not matter. Per-record scores are in
the order of the records.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

from jax_instructblip.data.records import Record

_SHOWN = 5  # ids in an error


@dataclasses.dataclass(frozen=True)
class Response:
    """A model's answer to one record; without text and scores it counts as wrong.

    Attributes:
      id: the record's id.
      text: the generated answer; in a ranking it may name the best candidate.
      scores: in a ranking, one number per choice of the record, for example its log-probability;
        higher is better. Empty if the answer was generated.
    """

    id: str
    text: str = ""
    scores: Sequence[float] = ()


@dataclasses.dataclass(frozen=True)
class Scores:
    """The results of a metric.

    Attributes:
      values: scores over all records by name, the first being the headline that papers report.
        Shares are from 0 to 1, not in percent.
      samples: for some of these names, the value of each record, in the order of the records.
      notes: remarks that a reader of the values needs.
      left_out: name -> reason, for values that could not be computed.
      errors: standard errors by name, for values whose error cannot be derived from `samples`.
    """

    values: Mapping[str, float]
    samples: Mapping[str, tuple[float, ...]]
    notes: tuple[str, ...] = ()
    left_out: Mapping[str, str] = dataclasses.field(default_factory=dict)
    errors: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def standard_errors(self) -> dict[str, float]:
        """Returns the standard error of each value that is a sample mean or is in `errors`."""
        errors = {
            name: standard_error(self.samples[name])
            for name, value in self.values.items()
            if len(self.samples.get(name, ())) > 1
            and math.isclose(mean(self.samples[name]), value, rel_tol=1e-9, abs_tol=1e-12)
        }
        return errors | dict(self.errors)


Metric = Callable[[Sequence[Response], Sequence[Record]], Scores]


class MetricError(ValueError):
    """The responses cannot be scored; the message says which, and what to do."""


def align(
    responses: Sequence[Response], records: Sequence[Record], *, need_answers: bool = True
) -> list[tuple[Response, Record]]:
    """Returns each record with its response, in the order of the records.

    Raises:
      MetricError: lists missing, unknown or repeated ids, texts that are no strings, scores that
        are not finite, and (if `need_answers`) records without right answers.
    """
    if not records:
        raise MetricError("there are no records to score")
    by_id = {response.id: response for response in responses}
    ids = [record.id for record in records]
    known = set(ids)
    problems = [
        listed("responses have an id that another has too", _repeated(r.id for r in responses)),
        listed("records have an id that another has too", _repeated(ids)),
        listed("records have no response", [name for name in ids if name not in by_id]),
        listed("responses belong to no record", [name for name in by_id if name not in known]),
        listed("responses have a text that is none", [r.id for r in responses if not _is_text(r)]),
        listed(
            "responses have scores that are not finite (the model overflows, or its weights are "
            "damaged)",
            [r.id for r in responses if not all(map(math.isfinite, r.scores))],
        ),
    ]
    if need_answers:
        hidden = [record.id for record in records if not record.answers]
        problems.append(
            listed("records have no answers: those of this split may not be public", hidden)
        )
    if any(problems):
        raise MetricError("; ".join(filter(None, problems)))
    return [(by_id[record.id], record) for record in records]


def mean(values: Iterable[float]) -> float:
    """Returns the mean, with a result that does not depend on the order of the values."""
    values = list(values)
    return math.fsum(values) / len(values)


def standard_error(values: Sequence[float]) -> float:
    """Returns the standard error of the mean of two or more independent values."""
    middle = mean(values)
    spread = math.fsum((value - middle) ** 2 for value in values) / (len(values) - 1)
    return math.sqrt(spread / len(values))


def summarise(samples: Mapping[str, Sequence[float]], notes: Sequence[str] = ()) -> Scores:
    """Returns `Scores` whose values are the means of the samples."""
    return Scores(
        {name: mean(values) for name, values in samples.items()},
        {name: tuple(values) for name, values in samples.items()},
        tuple(notes),
    )


def _is_text(response: Response) -> bool:
    return isinstance(response.text, str)


def _repeated(ids: Iterable[str]) -> list[str]:
    return [name for name, count in Counter(ids).items() if count > 1]


def listed(what: str, ids: Sequence[str]) -> str:
    """Formats number and first ids for a message, `3 WHAT: 'a', 'b', 'c'`; "" without ids."""
    if not ids:
        return ""
    shown = ", ".join(map(repr, ids[:_SHOWN])) + (", ..." if len(ids) > _SHOWN else "")
    return f"{len(ids)} {what}: {shown}"

"""The arguments and results of a metric, and the way from answers to their records.

A metric is a function `(responses, records) -> Scores`. `METRICS` in `table.py` has all of them, by
the names that protocols use. A response belongs to the record of its `id`, so the order of either
is free; scores come in the order of the records.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence

from jax_instructblip.data.records import Record

_SHOWN = 5  # ids in an error


@dataclasses.dataclass(frozen=True)
class Response:
    """The answer of a model to one record; with neither text nor scores it counts as wrong.

    Attributes:
      id: of the record.
      text: what was generated; of a ranking, it may name the best candidate.
      scores: of a ranking, one for each of the record's choices, the higher the better: their
        log-probabilities, for example. Empty where the answer was generated.
    """

    id: str
    text: str = ""
    scores: Sequence[float] = ()


@dataclasses.dataclass(frozen=True)
class Scores:
    """The results of a metric.

    Attributes:
      values: of all records; the first is the one that papers give. None is multiplied by 100.
      samples: of some or all of them the value of each record, in the order of the records.
      notes: what a reader of the values must know.
      left_out: values that could not be computed, by name, and why.
      errors: standard errors of values, where they do not follow from `samples`.
    """

    values: Mapping[str, float]
    samples: Mapping[str, tuple[float, ...]]
    notes: tuple[str, ...] = ()
    left_out: Mapping[str, str] = dataclasses.field(default_factory=dict)
    errors: Mapping[str, float] = dataclasses.field(default_factory=dict)

    def standard_errors(self) -> dict[str, float]:
        """The standard error of each value that is the mean of its samples, or brings its own."""
        errors = {
            name: standard_error(self.samples[name])
            for name, value in self.values.items()
            if len(self.samples.get(name, ())) > 1
            and math.isclose(mean(self.samples[name]), value, rel_tol=1e-9, abs_tol=1e-12)
        }
        return errors | dict(self.errors)


Metric = Callable[[Sequence[Response], Sequence[Record]], Scores]


class MetricError(ValueError):
    """Responses cannot be scored; the message says which, and what to do."""


def align(
    responses: Sequence[Response], records: Sequence[Record], *, need_answers: bool = True
) -> list[tuple[Response, Record]]:
    """Each record with its response, in the order of the records.

    Raises:
      MetricError: there is nothing to score, ids are absent, unknown or used twice, texts or scores
        are none, or (unless `need_answers` is False) what is right is not known; all are named.
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
    """The mean, the same to the last bit in whatever order the values come."""
    values = list(values)
    return math.fsum(values) / len(values)


def standard_error(values: Sequence[float]) -> float:
    """The standard error of the mean of at least two independent values."""
    middle = mean(values)
    spread = math.fsum((value - middle) ** 2 for value in values) / (len(values) - 1)
    return math.sqrt(spread / len(values))


def summarise(samples: Mapping[str, Sequence[float]], notes: Sequence[str] = ()) -> Scores:
    """Scores whose values are the means of their samples."""
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
    """`3 WHAT: 'a', 'b', 'c'`; nothing where there are none."""
    if not ids:
        return ""
    shown = ", ".join(map(repr, ids[:_SHOWN])) + (", ..." if len(ids) > _SHOWN else "")
    return f"{len(ids)} {what}: {shown}"

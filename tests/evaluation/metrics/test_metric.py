import itertools
import math

import pytest

from jax_instructblip.data.records import Record
from jax_instructblip.evaluation.metrics.metric import MetricError, Response, align, mean, summarise


def record(name, answers=("red",)):
    return Record(name, ("a.jpg",), "What colour is it?", answers)


RECORDS = [record("1"), record("2")]
GOOD = [Response("1", "red"), Response("2", "blue")]


def test_responses_find_their_records_in_the_order_of_the_records():
    assert align(GOOD[::-1], RECORDS) == list(zip(GOOD, RECORDS, strict=True))


@pytest.mark.parametrize(
    ("responses", "records", "message"),
    [
        ([], [], "no records to score"),
        ([], RECORDS, "2 records have no response: '1', '2'"),
        (GOOD[:1], RECORDS, "1 records have no response: '2'"),
        (
            [*GOOD, Response("2", "red")],
            RECORDS,
            "1 responses have an id that another has too: '2'",
        ),
        (GOOD, [*RECORDS, record("1")], "1 records have an id that another has too: '1'"),
        ([*GOOD, Response("3")], RECORDS, "1 responses belong to no record: '3'"),
        ([GOOD[0], Response("2", None)], RECORDS, "1 responses have a text that is none: '2'"),
        ([GOOD[0], Response("2", "", (0.1, math.nan))], RECORDS, "not finite .*: '2'"),
        ([GOOD[0], Response("2", "", (0.1, -math.inf))], RECORDS, "not finite .*: '2'"),
        (GOOD, [RECORDS[0], record("2", ())], "1 records have no answers: .*: '2'"),
    ],
)
def test_bad_input_is_named(responses, records, message):
    with pytest.raises(MetricError, match=message):
        align(responses, records)


def test_all_failures_are_named_and_long_lists_are_cut():
    records = [record(str(number)) for number in range(9)]
    with pytest.raises(MetricError) as raised:
        align([Response("x"), Response("x")], records)
    message = str(raised.value)
    assert "1 responses have an id that another has too: 'x'" in message
    assert "9 records have no response: '0', '1', '2', '3', '4', ..." in message
    assert "1 responses belong to no record: 'x'" in message


def test_hidden_answers_may_be_allowed():
    assert align(GOOD[:1], [record("1", ())], need_answers=False)


def test_the_mean_does_not_depend_on_the_order():
    values = (1e16, 1.0, -1e16)  # of which a plain sum loses the second in this order
    assert {mean(each) for each in itertools.permutations(values)} == {1 / 3}


def test_values_are_means_of_samples():
    scores = summarise({"accuracy": [1.0, 0.0]}, ["said"])
    assert (scores.values, scores.samples) == ({"accuracy": 0.5}, {"accuracy": (1.0, 0.0)})
    assert scores.notes == ("said",)

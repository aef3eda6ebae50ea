import dataclasses
import json

import pytest

from jax_instructblip.evaluation.compare import compare, lines
from jax_instructblip.evaluation.metrics.metric import MetricError
from jax_instructblip.evaluation.predictions import Prediction

ROWS = [Prediction(str(n), "what?", f"a{n}", score=float(n % 2)) for n in range(4)]


def write(folder, rows, name="gqa"):
    path = folder / "predictions" / f"{name}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(row.line() for row in rows))
    return path


def test_samples_that_differ_are_listed_with_both_answers(tmp_path):
    other = [dataclasses.replace(ROWS[0], text="b", score=1.0), *ROWS[1:3]]
    other.append(dataclasses.replace(ROWS[3], score=0.5, prompt="why?"))
    files = write(tmp_path / "a", ROWS), write(tmp_path / "b", other[::-1])
    (found,) = compare(tmp_path / "a", tmp_path / "b")
    assert (found.name, found.same) == ("gqa", 2)
    assert found.differing == [(ROWS[0], other[0]), (ROWS[3], other[3])]
    assert list(lines(found, ("A", "B"))) == [
        "gqa: 2 of 4 samples differ; 1 are better in A, 1 in B",
        *("  0: 'what?'", "    A   0.00  'a0'", "    B   1.00  'b'"),
        *("  3: 'what?'", "    asked in B: 'why?'", "    A   1.00  'a3'", "    B   0.50  'a3'"),
    ]
    assert compare(*files)[0].differing == found.differing
    assert compare(tmp_path / "a", tmp_path / "a")[0].differing == []


def test_two_runs_of_one_kind_alone_are_compared(tmp_path):
    for name, kind in (("a", "families"), ("b", "benchmarks"), ("c", "families")):
        write(tmp_path / name, ROWS, "test")
        (tmp_path / name / "results.json").write_text(json.dumps({"kind": kind}))
    assert compare(tmp_path / "a", tmp_path / "c")[0].differing == []
    message = r"a holds accuracies by family \(test\), .*b holds benchmarks \(test\): only two runs"
    for second in (tmp_path / "b", tmp_path / "b" / "predictions"):
        with pytest.raises(MetricError, match=message.replace("b holds", "holds")):
            compare(tmp_path / "a", second)


def test_runs_of_other_records_are_refused(tmp_path):
    write(tmp_path / "a", ROWS)
    write(tmp_path / "b", [*ROWS[:3], Prediction("x")])
    with pytest.raises(MetricError, match="not of the same records: 1 ids .*: '3'; 1 ids .*: 'x'"):
        compare(tmp_path / "a", tmp_path / "b")
    write(tmp_path / "c", ROWS, "vsr")
    with pytest.raises(MetricError, match="no dataset is in both: .*a has gqa, .*c has vsr"):
        compare(tmp_path / "a", tmp_path / "c")
    (tmp_path / "d").mkdir()
    with pytest.raises(MetricError, match="d has no predictions: expected a folder"):
        compare(tmp_path / "a", tmp_path / "d")

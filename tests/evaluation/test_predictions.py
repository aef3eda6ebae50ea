import json

import pytest

from jax_instructblip.evaluation.metrics.metric import MetricError
from jax_instructblip.evaluation.predictions import Prediction, Store, check_ids, read_rows

FACTS = {"prompt": "{question}", "settings": {"num_beams": 5}}
ROWS = [
    Prediction(str(n), "what?", "é", scores=(-0.5, -1.0), candidates=("a", "b")) for n in range(4)
]


def begun(folder, facts=FACTS, process=0):
    store = Store(folder, "gqa", facts, process)
    store.begin()
    return store


def test_rows_come_back_as_they_were(tmp_path):
    store = begun(tmp_path)
    assert store.rows() == {}
    store.append(ROWS[:1])
    Store(tmp_path, "gqa", FACTS, 1).append(ROWS[1:3])
    assert begun(tmp_path).rows() == {row.id: row for row in ROWS[:3]}
    store.finish(ROWS)
    assert read_rows(tmp_path / "gqa.jsonl") == ROWS
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gqa.json", "gqa.jsonl"]
    assert begun(tmp_path).rows() == {row.id: row for row in ROWS}


def test_a_line_that_was_cut_off_is_dropped(tmp_path):
    store = begun(tmp_path)
    store.append(ROWS[:2])
    path = tmp_path / "gqa.partial" / "0.jsonl"
    data = path.read_bytes()
    for length in (len(data) - 1, len(data) - 20, len(data) // 2 + 1):
        path.write_bytes(data[:length])
        assert begun(tmp_path).rows() == {"0": ROWS[0]}
        begun(tmp_path).append(ROWS[1:2])
        assert begun(tmp_path).rows() == {row.id: row for row in ROWS[:2]}
        (tmp_path / "gqa.partial" / "done.jsonl").unlink()


def test_answers_to_something_else_are_refused(tmp_path):
    begun(tmp_path).append(ROWS)
    other = {**FACTS, "settings": {"num_beams": 1}}
    with pytest.raises(ValueError, match="(?s)settings was .*5}, now .*1}.*choose another --out"):
        begun(tmp_path, other)
    (tmp_path / "vsr.jsonl").write_text(ROWS[0].line())
    with pytest.raises(ValueError, match="vsr.jsonl does not say what was asked"):
        Store(tmp_path, "vsr", FACTS).begin()


def test_rows_taken_out_of_a_finished_file_are_asked_again(tmp_path):
    begun(tmp_path).finish(ROWS)
    (tmp_path / "gqa.jsonl").write_text(ROWS[0].line() + ROWS[2].line())
    store = begun(tmp_path)
    assert store.rows() == {"0": ROWS[0], "2": ROWS[2]}
    store.append(ROWS[1:2])
    assert begun(tmp_path).rows() == {row.id: row for row in ROWS[:3]}
    store.finish(ROWS)
    assert read_rows(tmp_path / "gqa.jsonl") == ROWS
    assert sorted(path.name for path in tmp_path.iterdir()) == ["gqa.json", "gqa.jsonl"]


def test_a_line_cut_off_beside_a_finished_file_is_dropped(tmp_path):
    begun(tmp_path).finish(ROWS[:1])
    begun(tmp_path).append(ROWS[1:2])
    with (tmp_path / "gqa.partial" / "0.jsonl").open("a") as file:
        file.write('{"id": "2", "te')
    store = begun(tmp_path)
    store.append(ROWS[2:3])
    assert store.rows() == {row.id: row for row in ROWS[:3]}


def test_another_files_facts_are_named(tmp_path):
    (tmp_path / "gqa.json").write_text("[1]")
    with pytest.raises(ValueError, match="gqa.json: found a list at the top, expected an object"):
        begun(tmp_path)
    assert (tmp_path / "gqa.json").read_text() == "[1]"


def test_a_damaged_line_is_named(tmp_path):
    begun(tmp_path).append(ROWS[:1])
    path = tmp_path / "gqa.partial" / "0.jsonl"
    path.write_bytes(path.read_bytes() + bytes(9) + b"\n")  # what a power cut may leave
    with pytest.raises(ValueError, match="gqa.partial/0.jsonl:2: not valid JSON: .*remove the li"):
        begun(tmp_path)


def test_a_process_that_does_not_see_the_shared_disk_is_named(tmp_path):
    begun(tmp_path / "a")
    with pytest.raises(ValueError, match="must be on a disk that all processes share"):
        Store(tmp_path / "b", "gqa", FACTS, 1).rows()


def write(path, *lines):
    path.write_text(
        "".join((each if isinstance(each, str) else json.dumps(each)) + "\n" for each in lines)
    )
    return path


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["no json", {"id": 1, "text": "a"}], "1 lines of .* are no answers:\n  .*:1: "),
        ([{"text": "a"}], ":1: expected an object with `id`"),
        ([{"id": 1, "texts": "a"}], "unknown field 'texts'; did you mean 'text'"),
        (
            [{"id": 1, "text": 3, "scores": 2}],
            ":1: text is int 3, expected text; scores is int 2, ",
        ),
        ([{"id": 1, "score": "0.5"}], ":1: score is text, expected a finite number, or null"),
        ([{"id": 1, "scores": [1.0, "a"]}], ":1: scores is .*, expected a list of finite numbers"),
        ([{"id": 1}, {"id": 2}, {"id": "1"}], "1 ids are there more than once: '1'"),
        ([], "holds no answers: it is empty"),
    ],
)
def test_bad_files_of_predictions(tmp_path, lines, message):
    with pytest.raises(MetricError, match=message):
        read_rows(write(tmp_path / "p.jsonl", *lines))


def test_missing_and_strange_ids_are_listed(tmp_path):
    path = tmp_path / "p.jsonl"
    check_ids(path, ROWS, ["3", "2", "1", "0"], "gqa")
    with pytest.raises(MetricError, match="2 records of gqa are not in .*: 'x', 'y'; 1 ids .*'3'"):
        check_ids(path, ROWS, ["0", "1", "2", "x", "y"], "gqa")
    with pytest.raises(MetricError, match="none of the 1 records of gqa: it is of another dataset"):
        check_ids(path, ROWS, ["x"], "gqa")


def test_answers_to_texts_that_cannot_be_written_are_kept(tmp_path):
    row = Prediction("\udc80", "what \ud800 \u7ea2?", "red", answers=("\udfff",))
    store = begun(tmp_path, {"prompt": "\ud800"})
    store.append([row])
    assert store.rows() == {row.id: row}
    store.finish([row])
    assert read_rows(store.path) == [row]
    assert begun(tmp_path, {"prompt": "\ud800"}).rows() == {row.id: row}
    assert "\u7ea2" in store.path.read_text(encoding="utf-8")

import json

import pytest

from jax_instructblip.data.datasets import get_dataset
from jax_instructblip.data.readers.annotations import AnnotationError
from jax_instructblip.data.readers.pope import read_pope
from jax_instructblip.data.records import Record

ROW = {"question_id": 1, "image": "COCO_val2014_000000000009.jpg"}
ROW |= {"text": "Is there a cup in the image?", "label": "yes"}


def write(folder, text, kinds=("random", "popular", "adversarial")):
    folder.mkdir(parents=True, exist_ok=True)
    for kind in kinds:
        (folder / f"coco_pope_{kind}.json").write_text(text)


def test_the_kinds_have_ids_of_their_own(tmp_path):
    second = ROW | {"question_id": 2, "label": "No"}
    write(tmp_path, f"{json.dumps(ROW)}\n{json.dumps(second)}\n")
    records = list(read_pope(tmp_path, "test"))
    assert records[0] == Record(
        id="10000001",
        images=(str(tmp_path / "val2014/COCO_val2014_000000000009.jpg"),),
        prompt="Is there a cup in the image?",
        answers=("yes",),
        task="pope/random",
        split="test",
        choices=("yes", "no"),
        correct=0,
    )
    assert [each.id for each in records[1:]] == ["10000002", "20000001", "20000002", "1", "2"]
    assert records[1].answers == ("no",) and records[1].correct == 1
    assert [each.task for each in read_pope(tmp_path, "popular")] == ["pope/popular"] * 2


def test_copies_have_brackets_and_llava_a_folder(tmp_path):
    write(tmp_path / "coco", f"[{json.dumps(ROW)},\n{json.dumps(ROW | {'question_id': 2})}]\n")
    assert [each.id for each in read_pope(tmp_path, "adversarial")] == ["1", "2"]
    assert get_dataset("pope").present(tmp_path) == ["test", "random", "popular", "adversarial"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (json.dumps(ROW | {"label": "maybe"}), ":1: label is 'maybe', expected yes or no"),
        (f"{json.dumps(ROW)}\n" + '{"question_id"', ":2: .*the file may be damaged or cut off"),
        (json.dumps({**ROW, "image": "../../a.jpg"}), "leads out of the folder"),
        (f"{json.dumps(ROW)}\n{json.dumps(ROW)}", "id '1' of pope/adversarial adversarial is used"),
    ],
)
def test_a_bad_row_is_named(tmp_path, text, message):
    write(tmp_path, text, ["adversarial"])
    with pytest.raises(AnnotationError, match=message):
        list(read_pope(tmp_path, "adversarial"))


def test_ids_are_those_of_llavas_question_file(shared):
    lines = (shared / "data/llava/eval/pope/llava_pope_test.jsonl").read_text().splitlines()
    asked = {str(row["question_id"]): row for row in map(json.loads, lines)}
    records = list(read_pope(shared / "data/vqa/pope", "test"))
    assert len(records) == len(asked) == get_dataset("pope").counts["test"]
    for record in records:
        row = asked[record.id]
        assert record.images[0].endswith(f"/val2014/{row['image']}")
        assert (record.prompt, record.task) == (
            row["text"].split("\n")[0],
            f"pope/{row['category']}",
        )

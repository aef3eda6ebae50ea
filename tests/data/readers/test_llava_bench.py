import collections
import json

import pytest

from jax_instructblip.data.readers.annotations import AnnotationError
from jax_instructblip.data.readers.llava_bench import read_coco, read_wild
from jax_instructblip.data.records import Record

ROW = {"question_id": 7, "image": "001.jpg", "text": "What is it?", "category": "conv"}


def write(path, *rows):
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path.parent


def test_questions_in_the_wild(tmp_path):
    raw = write(tmp_path / "questions.jsonl", ROW, ROW | {"question_id": 8, "category": "complex"})
    first, second = read_wild(raw, "test")
    assert first == Record(
        id="7",
        images=(str(tmp_path / "images/001.jpg"),),
        prompt="What is it?",
        answers=(),
        task="llava_bench_wild/conv",
        split="test",
    )
    assert (second.id, second.task) == ("8", "llava_bench_wild/complex")
    write(tmp_path / "answers_gpt4.jsonl", {"question_id": 7, "text": "A hill.", "model_id": "m"})
    assert [each.answers for each in read_wild(raw, "test")] == [("A hill.",), ()]


def test_questions_about_coco(shared, tmp_path):
    records = list(read_coco(shared / "data/llava", "test"))
    kinds = collections.Counter(record.task for record in records)
    assert kinds == {f"llava_bench_coco/{each}": 30 for each in ("conv", "detail", "complex")}
    assert len({record.images for record in records}) == 30
    assert records[0].images[0].endswith("/val2014/COCO_val2014_000000441147.jpg")
    assert all(record.answers for record in records)  # the file of reference answers is there
    older = "coco2014_val_gpt4_qa_30x3.jsonl"
    (tmp_path / older).write_text((shared / "data/llava" / older).read_text())
    older_records = list(read_coco(tmp_path, "test"))
    assert [record.id for record in older_records] == [str(number) for number in range(90)]
    assert older_records[0].prompt == "What is the position of the skateboard in the image?"
    assert older_records[0].images[0].endswith("/COCO_val2014_000000525439.jpg")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"category": "long"}, ":1: category is 'long', expected one of conv, detail, complex"),
        ({"text": " "}, ":1: text is blank"),
        ({"image": "../../001.jpg"}, ":1: the path .* leads out of the folder"),
        ({"question_id": None}, "question_id: found null, expected a whole number or text"),
    ],
)
def test_a_bad_row_is_named(tmp_path, change, message):
    with pytest.raises(AnnotationError, match=message):
        list(read_wild(write(tmp_path / "questions.jsonl", ROW | change), "test"))

import json
import shutil

import pytest

from jax_instructblip.data.readers.annotations import AnnotationError
from jax_instructblip.data.readers.dataset import FAMILIES
from jax_instructblip.data.readers.reading import DATASETS, read_ocrvqa, read_textvqa
from jax_instructblip.data.records import Record


def write(raw, **documents):
    """`name_json=document` becomes RAW/name.json."""
    for name, document in documents.items():
        (raw / f"{name}.json").write_text(json.dumps(document))


ASKED = {"question_id": 7, "question": " what brand? ", "image_id": "ab", "answers": ["nokia"] * 10}
WORDS = {"image_id": "ab", "ocr_tokens": [f"w{n}" for n in range(40)] + [" "], "ocr_info": []}


@pytest.fixture
def textvqa(tmp_path):
    def write_rows(*rows, words=(WORDS,), split="train"):
        write(
            tmp_path,
            **{
                f"TextVQA_0.5.1_{split}": {"dataset_name": "textvqa", "data": rows},
                f"TextVQA_Rosetta_OCR_v0.2_{split}": {"data": words},
            },
        )
        return tmp_path

    return write_rows


def test_textvqa_in_its_own_files(textvqa):
    raw = textvqa(ASKED)
    assert list(read_textvqa(raw, "train")) == [
        Record(
            id="7",
            images=(str(raw / "train_images" / "ab.jpg"),),
            prompt="what brand?",
            answers=("nokia",) * 10,
            task="textvqa",
            split="train",
            ocr=tuple(f"w{n}" for n in range(40)),  # all of them: templates cut
        )
    ]


def test_textvqa_hides_the_answers_of_test(textvqa):
    hidden = {name: value for name, value in ASKED.items() if name != "answers"}
    (record,) = read_textvqa(textvqa(hidden, split="test"), "test")
    assert record.answers == ()
    assert record.images[0].endswith("test_images/ab.jpg")


def test_textvqa_val_whole(shared, tmp_path):
    extract = shared / "data" / "vqa" / "textvqa"
    for name in ("val_questions_vqa_format.json", "val_annotations_vqa_format.json"):
        shutil.copy(extract / name, tmp_path)
    questions = json.loads((tmp_path / "val_questions_vqa_format.json").read_text())["questions"]
    images = sorted({row["image_id"] for row in questions})
    words = [{"image_id": image, "ocr_tokens": [image[:4], "stop"]} for image in images]
    write(tmp_path, **{"TextVQA_Rosetta_OCR_v0.2_val": {"data": words}})

    records = list(read_textvqa(tmp_path, "val"))
    assert len(records) == DATASETS[0].counts["val"] == 5_000
    assert all(len(record.answers) == 10 for record in records)
    first, fifth, last = records[0], records[4], records[-1]
    assert (first.id, first.prompt) == ("34602", "what is the brand of this camera?")
    assert first.images == (str(tmp_path / "train_images" / "003a8ae2ef43b901.jpg"),)
    assert first.ocr == ("003a", "stop")
    assert first.answers[:4] == ("nous les gosses", "dakota", "clos culombu", "dakota digital")
    assert (fifth.id, fifth.prompt) == ("34606", "how long has the drink on the right been aged?")
    assert fifth.answers[2:5] == ("10 years", "10 years ", "10 years")  # as in the file
    assert (last.id, last.prompt) == ("39601", "when is this being aired?")
    assert last.answers[-1] == "no text in image"


def test_its_own_files_go_before_those_of_the_tools(textvqa):
    raw = textvqa(ASKED)
    write(raw, train_questions_vqa_format={}, train_annotations_vqa_format={})
    assert [record.id for record in read_textvqa(raw, "train")] == ["7"]


BAD_TEXTVQA = [
    ([ASKED], [], "no words of image 'ab': is it of another split?"),
    ([ASKED, ASKED], [WORDS], "id '7' of textvqa train is used twice: by records 0 and 1"),
    ([ASKED | {"image_id": "../ab"}], [WORDS | {"image_id": "../ab"}], "leads out of the folder"),
    ([ASKED | {"question": " "}], [WORDS], "data[0]: question is blank"),
    ([ASKED | {"answers": []}], [WORDS], "data[0]: answers holds nothing"),
    ([{"question_id": 7}], [WORDS], "no field 'image_id'; found question_id"),
    ([ASKED | {"question_id": 1.5}], [WORDS], "question_id: found a number, expected a whole"),
    ([3], [WORDS], "data[0]: found a whole number, expected an object"),
    ([ASKED], [{"image_id": "ab"}], "no field 'ocr_tokens'; found image_id"),
]


@pytest.mark.parametrize(("rows", "words", "message"), BAD_TEXTVQA)
def test_bad_textvqa(textvqa, rows, words, message):
    with pytest.raises(AnnotationError) as error:
        list(read_textvqa(textvqa(*rows, words=words), "train"))
    assert message in str(error.value)


def test_textvqa_without_the_words(textvqa):
    raw = textvqa(ASKED)
    (raw / "TextVQA_Rosetta_OCR_v0.2_train.json").unlink()
    with pytest.raises(AnnotationError, match=r"TextVQA_Rosetta_OCR_v0\.2_train\.json"):
        list(read_textvqa(raw, "train"))


def test_damaged_json(textvqa):
    raw = textvqa(ASKED)
    path = raw / "TextVQA_0.5.1_train.json"
    path.write_text(path.read_text()[:-9])
    with pytest.raises(AnnotationError, match="is not valid JSON.*cut off"):
        list(read_textvqa(raw, "train"))


def test_a_question_of_the_tools_without_answers(tmp_path):
    write(
        tmp_path,
        val_questions_vqa_format={"questions": [ASKED]},
        val_annotations_vqa_format={"annotations": []},
        **{"TextVQA_Rosetta_OCR_v0.2_val": {"data": [WORDS]}},
    )
    with pytest.raises(AnnotationError, match="question 7 has no annotation in"):
        list(read_textvqa(tmp_path, "val"))


def cover(split, **changed):
    return {
        "imageURL": "http://example.org/1.jpg",
        "split": split,
        "questions": ["Who wrote this book?", "Is this a comic?"],
        "answers": ["Ann Lee", "No"],
    } | changed


@pytest.mark.parametrize("name", ["dataset", "ocrvqa"])
def test_ocrvqa_has_all_splits_in_one_file(tmp_path, name):
    write(tmp_path, **{name: {"17": cover(1), "18": cover(3), "19": cover(1)}})
    records = list(read_ocrvqa(tmp_path, "train"))
    assert [record.id for record in records] == ["17:0", "17:1", "19:0", "19:1"]
    assert records[1] == Record(
        id="17:1",
        images=(str(tmp_path / "images" / "17.jpg"),),
        prompt="Is this a comic?",
        answers=("No",),
        task="ocrvqa",
        split="train",
    )
    assert [record.id for record in read_ocrvqa(tmp_path, "test")] == ["18:0", "18:1"]
    assert list(read_ocrvqa(tmp_path, "val")) == []


def test_ocrvqa_with_words_of_your_own(tmp_path):
    write(tmp_path, dataset={"17": cover(1), "18": cover(1)})
    write(tmp_path, ocr_tokens={"data": [{"image_id": "17", "ocr_tokens": ["Ann", "Lee"]}]})
    words = [record.ocr for record in read_ocrvqa(tmp_path, "train")]
    assert words == [("Ann", "Lee"), ("Ann", "Lee"), (), ()]


def test_ocrvqa_without_an_author(tmp_path):
    write(tmp_path, dataset={"17": cover(2, answers=[" ", "No"])})
    assert [record.answers for record in read_ocrvqa(tmp_path, "val")] == [(), ("No",)]


BAD_OCRVQA = [
    ({"17": cover(4)}, "17: split is 4, expected 1, 2 or 3"),
    ({"17": cover("1")}, "split: found text, expected a whole number"),
    ({"17": cover(1, answers=["No"])}, "17: 2 questions and 1 answers, expected as many"),
    ({"17": cover(1, answers=["No", 3])}, "17: [1]: answer: found a whole number, expected text"),
    ({"../17": cover(1)}, "the path 'images/../17.jpg' leads out of the folder"),
    ({"/17": cover(1)}, "the path '/17.jpg' leads out of the folder"),
    ([cover(1)], "found a list at the top, expected an object"),
]


@pytest.mark.parametrize(("document", "message"), BAD_OCRVQA)
def test_bad_ocrvqa(tmp_path, document, message):
    write(tmp_path, dataset=document)
    with pytest.raises(AnnotationError) as error:
        list(read_ocrvqa(tmp_path, "train"))
    assert message in str(error.value)


def test_the_rows_of_the_table():
    assert [(row.name, row.held_in) for row in DATASETS] == [("textvqa", False), ("ocrvqa", True)]
    assert {row.family for row in DATASETS} <= set(FAMILIES)

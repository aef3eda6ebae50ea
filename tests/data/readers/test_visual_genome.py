"""The reader of Visual Genome's questions, and the config of the fine-tuning that reads them."""

import pathlib

import pytest

from jax_instructblip.data.datasets import ALL, TUNING, table
from jax_instructblip.data.prepare import builder, shards
from jax_instructblip.data.readers.annotations import AnnotationError
from jax_instructblip.data.readers.visual_genome import read_questions
from jax_instructblip.data.records import Record
from jax_instructblip.training.config_file import change_fields, load_config
from jax_instructblip.training.setup import read_mixture
from tests.helpers.visual_genome import IMAGES, QUESTIONS, write, write_questions

NAME = "visual_genome_questions"


@pytest.fixture
def raw(tmp_path):
    return write_questions(tmp_path / "raw")


def test_questions_and_their_images(raw):
    clock, post, nobody = read_questions(raw, "train")
    assert clock == Record(
        id="986768",
        images=(f"{raw}/VG_100K_2/1.jpg",),
        prompt="What color is the clock?",
        answers=("Green.",),
        task=NAME,
        split="train",
    )
    assert (post.answers, post.text_problems()) == ((), ["its answer is blank"])
    assert (nobody.images, nobody.answers) == ((f"{raw}/VG_100K/3.jpg",), ("Nobody.",))


def test_questions_of_lavis(tmp_path):
    rows = [
        {"image": "VG_100K/1.jpg", "question": "who?", "answer": "a man", "dataset": "vg"},
        {"image": "VG_100K/1.jpg", "question": "", "answer": ""},
    ]
    found = list(read_questions(write(tmp_path, vg_qa=rows), "train"))
    assert [(each.id, each.images, each.prompt, each.answers) for each in found] == [
        ("0", (f"{tmp_path}/VG_100K/1.jpg",), "who?", ("a man",)),
        ("1", (f"{tmp_path}/VG_100K/1.jpg",), "", ()),
    ]
    assert found[1].problem == "its question and answer is blank"


@pytest.mark.parametrize(
    "documents, message",
    [
        ({"question_answers": QUESTIONS}, "lacks files of split 'train': image_data.json, or else"),
        ({"image_data": IMAGES}, "lacks files of split 'train': question_answers.json, or else"),
        ({"question_answers": {}, "image_data": IMAGES}, "question_answers.json: found an object"),
        (
            {
                "question_answers": QUESTIONS,
                "image_data": [*IMAGES, {"image_id": 1, "url": "https://a/VG_100K/2.jpg"}],
            },
            "image 1 is .*VG_100K/2.jpg, but was .*VG_100K_2/1.jpg before",
        ),
        ({"question_answers": [7], "image_data": IMAGES}, "row 0: found a whole number, expected"),
        ({"question_answers": [{"id": 1}], "image_data": IMAGES}, "row 0: no field 'qas'"),
        (
            {"question_answers": [{"id": 1, "qas": [{"image_id": 1}]}], "image_data": IMAGES},
            r"row 0: qas\[0\]: no field 'qa_id'; found image_id",
        ),
        (
            {"question_answers": QUESTIONS, "image_data": IMAGES[:1]},
            r"row 2: qas\[0\]: image 3 is not in .*image_data.json: get both files of one release",
        ),
        (
            {"question_answers": QUESTIONS, "image_data": [{"image_id": 1}]},
            "image_data.json: row 0: no field 'url'",
        ),
        (
            {"question_answers": QUESTIONS, "image_data": [IMAGES[0] | {"url": "http://a/../1"}]},
            "leads out of the folder",
        ),
        (
            {"question_answers": QUESTIONS + QUESTIONS[:1], "image_data": IMAGES},
            f"id '986768' of {NAME} train is used twice",
        ),
        ({"vg_qa": [{"image": "a.jpg", "question": "who?"}]}, "row 0: no field 'answer'"),
        ({"vg_qa": [{"image": "/a.jpg"}]}, "leads out of the folder"),
    ],
)
def test_bad_files_are_named(documents, message, tmp_path):
    with pytest.raises(AnnotationError, match=message):
        list(read_questions(write(tmp_path / "raw", **documents), "train"))


def test_a_file_that_is_cut_off_is_named(raw):
    path = raw / "question_answers.json"
    path.write_text(path.read_text()[:-9])
    with pytest.raises(AnnotationError, match="question_answers.json.*get it again"):
        list(read_questions(raw, "train"))


def test_the_row_of_the_table():
    assert list(TUNING) == [NAME] and ALL[NAME] is TUNING[NAME]
    assert f"{NAME}: image QA, fine-tuning" in table(NAME)
    with pytest.raises(AnnotationError, match="'val' is not known, expected one of train"):
        list(TUNING[NAME].read(pathlib.Path("raw"), "val"))


def test_the_fine_tuning_reads_what_is_prepared(raw, tmp_path):
    folder = shards.prepare(TUNING[NAME], raw, tmp_path / "data", max_missing=0.5)
    assert [each.id for each in builder.open_folder(folder, "train")] == ["986768", "7"]
    assert shards.read_report(folder)["splits"]["train"]["left_out"] == [
        ["986777", "its answer is blank"]
    ]
    config = load_config("configs/blip2_vqa_flan_t5_xl.py")
    assert config.data.sources[NAME].path == f"data/{NAME}"
    fields = {"vqav2.path": "", "vqav2_val.path": "", f"{NAME}.path": str(tmp_path / "data" / NAME)}
    config = change_fields(config, {f"data.sources.{key}": each for key, each in fields.items()})
    mixture = read_mixture(config)
    (source,) = mixture.sources
    assert (source.name, source.family, len(source.records)) == (NAME, "image QA", 2)
    asked = {mixture.record(place)[1].prompt for place in range(4)}
    assert asked == {"What color is the clock?", "Who is there?"}

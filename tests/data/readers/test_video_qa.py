import json

import pytest

from jax_instructblip.data.readers.annotations import AnnotationError
from jax_instructblip.data.readers.video_qa import (
    DATASETS,
    read_candidates,
    read_ivqa,
    read_msrvtt_qa,
    read_msvd_qa,
)
from jax_instructblip.data.records import Record

ROW = {"question_id": "3", "video": "abc_1_9", "question": " who sings? ", "answer": "man"}
NUMBERED = {"id": 3, "video_id": 7, "question": "who sings?", "answer": "man"}
CLOSED = [(read_msvd_qa, "msvd_qa", ".avi"), (read_msrvtt_qa, "msrvtt_qa", ".mp4")]
HEADER = "video_id,start,end,question,answer1,conf1,answer2,answer3,answer4,answer5\n"


def write(path, document):
    path.write_text(document if isinstance(document, str) else json.dumps(document))


@pytest.mark.parametrize(("read", "task", "container"), CLOSED)
@pytest.mark.parametrize("as_list", [False, True])
def test_the_files_of_lavis(tmp_path, read, task, container, as_list):
    rows = {"0": ROW, "1": ROW | {"question_id": 4, "video": "d.webm"}}
    write(tmp_path / "qa_test.json", list(rows.values()) if as_list else rows)
    first, second = read(tmp_path, "test")
    assert first == Record(
        id="3",
        images=(str(tmp_path / "videos" / f"abc_1_9{container}"),),
        prompt="who sings?",
        answers=("man",),
        task=task,
        split="test",
    )
    assert (second.id, second.images) == ("4", (str(tmp_path / "videos" / "d.webm"),))


def test_the_original_files_number_the_videos(tmp_path):
    write(tmp_path / "val_qa.json", [NUMBERED])
    (record,) = read_msrvtt_qa(tmp_path, "val")
    assert (record.id, record.images) == ("3", (str(tmp_path / "videos" / "video7.mp4"),))

    write(tmp_path / "youtube_mapping.txt", "-4wsuPCjDBc_5_15 vid6\r\nxyz_2_4 vid7\r\n")
    (record,) = read_msvd_qa(tmp_path, "val")
    assert (record.id, record.images) == ("3", (str(tmp_path / "videos" / "xyz_2_4.avi"),))


EXTRACTS = [
    (
        *("msvd", read_msvd_qa, "test", "qa_test.first1000.json"),
        [
            ("jfrrO5K_vKM_55_65.avi", "someone"),
            ("kEGmZDpZ_RE_352_370.avi", "garlic"),
            ("kWLNZzuo3do_217_222.avi", "coat"),
        ],
        (2_423, "aardvark", "zucchini"),
    ),
    (
        *("msrvtt", read_msrvtt_qa, "val", "qa_val.first1000.json"),
        [("video6513.mp4", "couch"), ("video6534.mp4", "horse"), ("video6554.mp4", "use")],
        (1_500, "accept", "zoom"),
    ),
]


@pytest.mark.parametrize(("name", "read", "split", "file", "values", "candidates"), EXTRACTS)
def test_extracts_whole(shared, tmp_path, name, read, split, file, values, candidates):
    extract = shared / "data" / "videoqa" / name
    (tmp_path / f"qa_{split}.json").symlink_to(extract / file)
    records = list(read(tmp_path, split))
    assert [record.id for record in records] == [f"{number:07d}" for number in range(1_000)]
    for record, (video, answer) in zip(
        (records[0], records[500], records[-1]), values, strict=True
    ):
        assert record.images == (str(tmp_path / "videos" / video),)
        assert record.answers == (answer,)
    (tmp_path / "qa_ans2label.json").symlink_to(extract / "qa_ans2label.json")
    count, first, last = candidates
    answers = read_candidates(tmp_path)
    assert (len(answers), answers[0], answers[-1]) == (count, first, last)


def test_candidates_in_the_order_of_their_labels(tmp_path):
    write(tmp_path / "train_ans2label.json", {"cat": 1, "dog": 2, "ape": 0})
    assert read_candidates(tmp_path) == ("ape", "cat", "dog")


@pytest.mark.parametrize("labels", [{"cat": 1}, {"cat": 0, "dog": 0}, {"cat": 0, "dog": 2}])
def test_candidates_with_wrong_labels(tmp_path, labels):
    write(tmp_path / "qa_ans2label.json", labels)
    with pytest.raises(AnnotationError, match=f"labels of {len(labels)} answers are not 0 to"):
        read_candidates(tmp_path)


def test_ivqa(tmp_path):
    write(
        tmp_path / "test.csv",
        f'{HEADER}v-1,10,20,"What, now?",salt,1.0,salt,sugar,,a pinch of salt\n'
        "v2,0,9,Why?,a,1,a,a,b,c",
    )
    first, second = read_ivqa(tmp_path, "test")
    assert first == Record(
        id="v-1_10_20",
        images=(str(tmp_path / "videos" / "v-1_10_20.mp4"),),
        prompt="What, now?",
        answers=("salt", "salt", "sugar", "a pinch of salt"),
        blank=1,
        task="ivqa",
        split="test",
    )
    assert (second.id, second.answers) == ("v2_0_9", ("a", "a", "a", "b", "c"))


BAD = [
    ("qa_test.json", {"0": ROW, "1": ROW}, "id '3' of msvd_qa test is used twice"),
    ("qa_test.json", [ROW | {"video": "../x"}], "the path 'videos/../x.avi' leads out"),
    ("qa_test.json", [ROW | {"video": "/x.mp4"}], "the path '/x.mp4' leads out"),
    ("qa_test.json", [ROW | {"answer": ""}], "[0]: answer is blank"),
    (
        "qa_test.json",
        [{"question_id": "3", "question": "?"}],
        "no field 'video'; found question_id",
    ),
    ("qa_test.json", ["3"], "[0]: found text, expected an object"),
    ("qa_test.json", "3", "found a whole number, expected a list or an object"),
    ("qa_test.json", '{"0": {"ques', "is not valid JSON"),
    ("test_qa.json", [NUMBERED], "youtube_mapping.txt has no vid7: get both files of one release"),
    ("other.json", [], "lacks files of split 'test': qa_test.json, or else test_qa.json"),
]


@pytest.mark.parametrize(("file", "document", "message"), BAD)
def test_bad_files(tmp_path, file, document, message):
    write(tmp_path / file, document)
    if "lacks" not in message:
        write(tmp_path / "youtube_mapping.txt", "abc vid1\n")
    with pytest.raises(AnnotationError) as error:
        list(read_msvd_qa(tmp_path, "test"))
    assert message in str(error.value)


def test_a_bad_line_of_the_mapping(tmp_path):
    write(tmp_path / "test_qa.json", [NUMBERED])
    write(tmp_path / "youtube_mapping.txt", "abc vid1\nabc\n")
    with pytest.raises(AnnotationError, match="youtube_mapping.txt:2: found 'abc', expected NAME"):
        list(read_msvd_qa(tmp_path, "test"))


BAD_IVQA = [
    (f"{HEADER}v,1,2,Why?,,1,,,,", "answers holds only blank texts"),
    (f"{HEADER}v,1,2,Why?,a,1,a,a,a,a\nv,1,2,How?,b,1,b,b,b,b", "id 'v_1_2' of ivqa test is used"),
    (f"{HEADER}../v,1,2,Why?,a,1,a,a,a,a", "the path 'videos/../v_1_2.mp4' leads out"),
    (f"{HEADER}v,1,2,Why?,a,1,a", "answer3: found null, expected text"),
    ("video_id,question\nv,Why?", "no columns answer1, answer2, answer3"),
]


@pytest.mark.parametrize(("lines", "message"), BAD_IVQA)
def test_bad_ivqa(tmp_path, lines, message):
    write(tmp_path / "test.csv", lines)
    with pytest.raises(AnnotationError) as error:
        list(read_ivqa(tmp_path, "test"))
    assert message in str(error.value)


def test_the_rows_of_the_table():
    found = [(row.name, row.held_in, row.family) for row in DATASETS]
    assert found == [(name, False, "video QA") for name in ("msvd_qa", "msrvtt_qa", "ivqa")]


def test_cells_keep_line_breaks_and_rare_separators(shared, tmp_path):
    (tmp_path / "test.csv").write_bytes((shared / "data/cases/ivqa_cells.csv").read_bytes())
    records = list(read_ivqa(tmp_path, "test"))
    assert [record.prompt for record in records] == ["what is\nthis?", "what\u2028now?"]
    assert [record.id for record in records] == ["v1_0_10", "v2_0_10"]
    assert records[0].answers == ("cup", "cup", "mug", "cup", "cup")


@pytest.mark.parametrize("separator", list("\n\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029") + ["\r\n"])
@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_no_separator_but_an_unquoted_newline_ends_a_row(tmp_path, separator, ending):
    rows = [f'v{n},0,1,"a{separator}b",c,,d,d,d,d' for n in range(3)]
    text = ending.join([HEADER.strip(), *rows, ""])
    (tmp_path / "test.csv").write_bytes(text.encode())
    records = list(read_ivqa(tmp_path, "test"))
    assert [record.id for record in records] == ["v0_0_1", "v1_0_1", "v2_0_1"]
    asked = f"a{separator}b".replace("\r\n", "\n")
    assert {record.prompt for record in records} == {asked}


ROWS = {
    "one,0,1,what, now?,c,,d,d,d,d\n": r"test.csv:2: 11 cells, expected 10: a comma inside of a c",
    'one,0,1,"what\nnow?,c,,d,d,d,d\n': r"test.csv:2: the row that begins here is no CSV: unexpec",
    'one,0,1,"what" now,c,,d,d,d,d\n': r"test.csv:2: the row that begins here is no CSV: ',' exp",
    'one,0,1,"a\nb",c,,d,d,d,d\ntwo,0,1,x\n': r"test.csv:4: answer1: found null, expected text",
}


@pytest.mark.parametrize("rows", ROWS)
def test_rows_that_are_cut_elsewhere_are_named(tmp_path, rows):
    (tmp_path / "test.csv").write_text(HEADER + rows)
    with pytest.raises(AnnotationError, match=ROWS[rows]):
        list(read_ivqa(tmp_path, "test"))


def test_columns_that_are_there_twice_are_refused(tmp_path):
    (tmp_path / "test.csv").write_text(HEADER.replace("conf1", "question"))
    with pytest.raises(AnnotationError, match="test.csv: columns 'question' are there twice"):
        list(read_ivqa(tmp_path, "test"))


def test_a_mapping_may_have_blank_lines_and_rare_separators_in_names(tmp_path):
    write(tmp_path / "val_qa.json", [NUMBERED])
    write(tmp_path / "youtube_mapping.txt", "a\u2028b vid6\n\nxyz_2_4 vid7\n\n")
    with pytest.raises(AnnotationError, match="youtube_mapping.txt:1: found 'a.*b vid6'"):
        list(read_msvd_qa(tmp_path, "val"))
    write(tmp_path / "youtube_mapping.txt", "ab vid6\n\nxyz_2_4 vid7\n\n")
    (record,) = read_msvd_qa(tmp_path, "val")
    assert record.images == (str(tmp_path / "videos" / "xyz_2_4.avi"),)

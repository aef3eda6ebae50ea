"""Small raw folders of all 26 datasets, laid out and spelled as they were released.

    write_all(folder) -> {name: raw folder}; LAYOUTS[name] is (split, its records, writer)

A file that holds several splits has records of each. The first record is made by hand in most, with
quotes, braces, accents and blanks where real files have them; the others are numbered.
"""

import csv
import json
import pathlib
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

FRAMES = 8  # of each video

Row = dict[str, Any]


def write_all(folder: pathlib.Path, names: Iterable[str] | None = None) -> dict[str, pathlib.Path]:
    raws = {name: folder / name for name in names or LAYOUTS}
    for name, raw in raws.items():
        raw.mkdir(parents=True)
        LAYOUTS[name].write(raw, LAYOUTS[name].count)
    return raws


# Files


def _document(path: pathlib.Path, document: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")


def _json_lines(path: pathlib.Path, rows: Iterable[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def _picture(path: pathlib.Path) -> None:
    """8 x 8 pixels that follow from the file's name, as JPEG or PNG."""
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(list(path.name.encode())).integers(0, 256, (8, 8, 3))
    Image.fromarray(pixels.astype(np.uint8)).save(path)


def _video(path: pathlib.Path) -> None:
    """`FRAMES` frames of 16 x 16 pixels, each brighter than the one before."""
    av = pytest.importorskip("av", reason="needs PyAV: pip install -e .[video]")
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width = stream.height = 16
        stream.pix_fmt = "yuv420p"
        for number in range(FRAMES):
            pixels = np.full((16, 16, 3), 30 * number + len(path.name), np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())


def _coco(folder: str, number: int) -> str:
    """`train2014/COCO_train2014_000000000009.jpg`, `train2017/000000000009.jpg`."""
    stem = f"COCO_{folder}_" if folder.endswith("2014") else ""
    return f"{folder}/{stem}{number:012d}.jpg"


# Captions


def _coco_caption(raw: pathlib.Path, count: int) -> None:
    """Two captions an image; of the last image in `val2014`, which Karpathy marks restval."""
    images = []
    for number in range(count // 2 + 2):
        split = ["train", "restval", "val", "test"][max(0, number - count // 2 + 2)]
        path = _coco("train2014" if split == "train" else "val2014", 9 + number)
        _picture(raw / path)
        said = [f"A street with {number} cars.", f"{number} cars on a street"]
        if not number:
            said = ["A closeup of bins of food that include broccoli and bread.\n", "A café’s meal"]
        folder, name = path.split("/")
        row = {"filepath": folder, "filename": name, "cocoid": 9 + number, "split": split}
        images.append(row | {"sentences": [{"raw": text} for text in said]})
    _document(raw / "dataset_coco.json", {"images": images, "dataset": "coco"})


def _web_capfilt(raw: pathlib.Path, count: int) -> None:
    rows = []
    for number in range(count):
        rows.append({"image": f"part{number % 3}/{number}.jpg", "caption": f"a sofa no {number}"})
        _picture(raw / rows[-1]["image"])
    rows[0]["caption"] = "a black and white photo of the eiffel tower"
    _document(raw / "annotation.json", rows)


def _nocaps(raw: pathlib.Path, count: int) -> None:
    images = [{"id": n, "file_name": f"{n:016x}.jpg", "domain": "in-domain"} for n in range(count)]
    for row in images:
        _picture(raw / "val" / row["file_name"])
    said = [
        {"image_id": n, "id": 10 * n + k, "caption": f"A baby is standing, {n} {k}."}
        for n in range(count)
        for k in range(10)
    ]
    path = raw / "nocaps_val_4500_captions.json"
    _document(path, {"images": images, "annotations": said, "info": {}, "licenses": []})


def _flickr30k(raw: pathlib.Path, count: int) -> None:
    images = []
    for number in range(count + 2):
        split = "test" if number < count else ["train", "val"][number - count]
        said = [f"A dog runs {number} {k}." for k in range(5)]
        row = {"filename": f"{1007129816 + number}.jpg", "imgid": number, "split": split}
        images.append(row | {"sentences": [{"raw": text} for text in said]})
        _picture(raw / "flickr30k-images" / row["filename"])
    _document(raw / "dataset_flickr30k.json", {"images": images, "dataset": "flickr30k"})


def _textcaps(raw: pathlib.Path, count: int) -> None:
    """Three captions an image."""
    rows, words = [], {}
    for number in range(count):
        image, text = f"{number // 3:016x}", f"A bottle with the number {number}."
        rows.append({"image_id": image, "caption_str": text, "reference_strs": [text]})
        words[image] = {"image_id": image, "ocr_tokens": [str(number), "ml"], "ocr_info": []}
        _picture(raw / f"train_images/{image}.jpg")
    rows[0]["caption_str"] = "A NOKIA phone lies on a table."
    words[rows[0]["image_id"]]["ocr_tokens"] = ["NOKIA", " ", "7{a}"]
    _document(raw / "TextCaps_0.1_train.json", {"dataset_name": "textcaps", "data": rows})
    _document(raw / "TextVQA_Rosetta_OCR_v0.2_train.json", {"data": list(words.values())})


# Questions


def _annotators(*answers: str) -> list[Row]:
    return [
        {"answer": text, "answer_confidence": "yes", "answer_id": number}
        for number, text in enumerate(answers, start=1)
    ]


def _tools(names: tuple[str, str], first: str, answers: tuple[str, ...]) -> Callable:
    """The two files of the VQA tools, over images of COCO train2014; two questions an image."""

    def write(raw: pathlib.Path, count: int) -> None:
        questions, annotations = [], []
        for number in range(count):
            image = 9 + number // 2
            row = {"question_id": 10 * image + number % 2, "image_id": image}
            questions.append(row | {"question": f"How many are left of the {number}?"})
            given = _annotators("2", "2", f"{number} or so", "")
            annotations.append(row | {"answers": given, "question_type": "how many"})
            _picture(raw / _coco("train2014", image))
        questions[0]["question"], annotations[0]["answers"] = first, _annotators(*answers)
        _document(raw / names[0], {"info": {}, "questions": questions})
        _document(raw / names[1], {"info": {}, "annotations": annotations[::-1]})

    return write


def _vizwiz(raw: pathlib.Path, count: int) -> None:
    rows = []
    for number in range(count):
        name = f"VizWiz_val_{number:08d}.jpg"
        given = _annotators("unanswerable", f"can {number}")
        rows.append({"image": name, "question": "What is this?", "answers": given, "answerable": 1})
        _picture(raw / "val" / name)
    rows[0]["question"] = "Ok. There is another picture I hope it is a better one."
    _document(raw / "Annotations/val.json", rows)


def _aokvqa(raw: pathlib.Path, count: int) -> None:
    rows = []
    for number in range(count):
        row = {"split": "train", "image_id": 42 + number, "question_id": f"q{number}"}
        row |= {"question": f"What is number {number}?", "choices": ["cup", "hat", "dog", "bus"]}
        row |= {"correct_choice_idx": number % 4, "difficult_direct_answer": False}
        rows.append(row | {"direct_answers": ["dog", "dog", "puppy"], "rationales": ["It barks."]})
        _picture(raw / _coco("train2017", 42 + number))
    rows[0] |= {"question": "What is in the motorcyclist's mouth? ", "correct_choice_idx": 3}
    rows[0]["direct_answers"] = ["cigarette"] * 9 + [""]
    rows[0]["choices"] = ["toothpick", "food", "", "cigarette"]
    _document(raw / "aokvqa_v1p0_train.json", rows)


def _gqa(raw: pathlib.Path, count: int) -> None:
    rows = {}
    for number in range(count):
        row = {"imageId": f"n{number // 2}", "question": f"Is the {number} left of the chair?"}
        rows[f"2{number:07d}"] = row | {"answer": "yes", "fullAnswer": "Yes, it is.", "types": {}}
        _picture(raw / f"images/n{number // 2}.jpg")
    rows["20000000"] |= {"question": "What kind of furniture is brown?", "answer": "couch"}
    _document(raw / "testdev_balanced_questions.json", rows)


def _vsr(raw: pathlib.Path, count: int) -> None:
    rows = []
    for number in range(count):
        name = f"{17697 + number // 2:012d}.jpg"
        row = {"image": name, "caption": f"The cat is under the {number}.", "label": number % 2}
        rows.append(row | {"image_link": f"http://example.org/{name}", "relation": "under"})
        _picture(raw / "images" / name)
    rows[0] |= {"caption": "The car is behind the suitcase.", "label": 1}
    _json_lines(raw / "splits/zeroshot/test.jsonl", rows)


def _iconqa(raw: pathlib.Path, count: int) -> None:
    for number in range(count):
        row = {"question": f"What comes after {number}?", "choices": ["slide", "flip", "turn"]}
        if not number:
            row = {"question": "What has been done to this letter?", "choices": ["slide", "turn"]}
        folder = raw / f"iconqa/test/choose_txt/{7 + number}"
        _document(folder / "data.json", row | {"answer": 1, "ques_type": "choose_txt"})
        _picture(folder / "image.png")


def _scienceqa(raw: pathlib.Path, count: int) -> None:
    """One problem of test has no image."""
    problems = {}
    for number in range(count + 3):
        split = ["test", "test", "train", "val"][max(0, number - count + 1)]
        row = {"question": f"Which is {number}?", "choices": ["Oslo", "Rome"], "answer": 1}
        row |= {"hint": "", "image": None if number == count else "image.png", "split": split}
        problems[str(4 + number)] = row | {"lecture": "A map ...", "solution": "See the map."}
        if row["image"]:
            _picture(raw / f"images/{split}/{4 + number}/image.png")
    problems["4"] |= {"question": "Which is farthest north?", "hint": "See the map.\n", "answer": 0}
    _document(raw / "problems.json", problems)


def _ocrvqa(raw: pathlib.Path, count: int) -> None:
    """Two questions a cover."""
    covers = {}
    for number in range(count // 2 + 2):
        asked = {"questions": ["Who wrote this book?", "Is this a comic?"]}
        asked["answers"] = [f"Ann Lee {number}", "No"]
        split = 1 + max(0, number - count // 2 + 1)
        covers[f"{number:010d}"] = asked | {"split": split, "imageURL": "http://example.org/1.jpg"}
        _picture(raw / f"images/{number:010d}.jpg")
    covers["0000000000"]["questions"][0] = "What is the title of this book?"
    covers["0000000000"]["answers"][0] = "Mom's {Family} Wall Calendar 2016"
    _document(raw / "dataset.json", covers)


def _textvqa(raw: pathlib.Path, count: int) -> None:
    """The first image has 32 words, more than stand in a prompt."""
    rows, words = [], []
    for number in range(count):
        image = f"{number:016x}"
        row = {"question_id": 34602 + number, "image_id": image, "set_name": "val"}
        rows.append(row | {"question": f"what is {number}?", "answers": ["nokia"] * 10})
        seen = [f"w{number}"] if number else list("abcdefghijklmnopqrstuvwxyzABCDEF")
        words.append({"image_id": image, "ocr_tokens": seen, "ocr_info": []})
        _picture(raw / f"train_images/{image}.jpg")
    rows[0] |= {"question": "what is the brand of this camera?", "answers": ["dakota"] * 10}
    _document(raw / "TextVQA_0.5.1_val.json", {"dataset_name": "textvqa", "data": rows})
    _document(raw / "TextVQA_Rosetta_OCR_v0.2_val.json", {"data": words})


# Videos


def _lavis_video(stem: str, container: str) -> Callable:
    """LAVIS's file, two questions a video, whose container it does not say."""

    def write(raw: pathlib.Path, count: int) -> None:
        rows = {}
        for number in range(count):
            row = {"question_id": f"{number:07d}", "video": f"{stem}{number // 2}"}
            rows[str(number)] = row | {"question": f"what is {number} doing?", "answer": "cook"}
            if not number % 2:
                _video(raw / f"videos/{row['video']}{container}")
        rows["0"] |= {"question": "who is singing into a microphone?", "answer": "man"}
        _document(raw / "qa_test.json", rows)

    return write


def _ivqa(raw: pathlib.Path, count: int) -> None:
    names = ["video_id", "start", "end", "question", *(f"answer{n}" for n in range(1, 6))]
    rows: list[list[Any]] = []
    for number in range(count):
        answers = ["salt", "salt", "sugar", "", "a pinch of salt"]
        rows.append([f"v-{number}", 10, 20 + number, f"What is {number}?", *answers])
        _video(raw / f"videos/v-{number}_10_{20 + number}.mp4")
    rows[0][3] = "What, in the end, is put into the pan?"
    with (raw / "test.csv").open("w", newline="") as file:
        csv.writer(file).writerows([names, *rows])


# Dialogues and memes


def _visual_dialog(raw: pathlib.Path, count: int) -> None:
    """Ten rounds an image, five candidates a round."""
    questions = ["what color is the tablet ", *(f"is it a {number}" for number in range(9))]
    answers = ["black and silver", "yes", "no", "two", "i can't tell"]
    dialogs = []
    for number in range(count // 10):
        rounds = []
        for turn in range(10):
            options = [(turn + k) % 5 for k in range(5)]
            row = {"question": turn, "answer": turn % 5, "answer_options": options}
            rounds.append(row | {"gt_index": 0})
        image = 239030 + number
        dialogs.append({"image_id": image, "caption": "a tablet in a dock", "dialog": rounds})
        _picture(raw / f"VisualDialog_val2018/VisualDialog_val2018_{image:012d}.jpg")
    data = {"questions": questions, "answers": answers, "dialogs": dialogs}
    _document(raw / "visdial_1.0_val.json", {"version": "1.0", "split": "val", "data": data})


def _hateful_memes(raw: pathlib.Path, count: int) -> None:
    rows = []
    for number in range(count):
        name = f"img/{8291 + number:05d}.png"
        row = {"id": 8291 + number, "img": name, "label": 1 - number % 2, "text": f"meme {number}"}
        rows.append(row)
        _picture(raw / name)
    rows[0]["text"] = 'when "they" say: it\'s {fine}'
    _json_lines(raw / "dev_seen.jsonl", rows)


def _llava(file: str, *first: str) -> Callable:
    def write(raw: pathlib.Path, count: int) -> None:
        rows, rounds = [], len(first) // 2
        for number in range(count // rounds):
            said = [f"{word} {number}" for _ in range(rounds) for word in ("Why is it", "It's")]
            said = list(first) if not number else said
            said[0] = f"<image>\n{said[0]}" if number % 2 else f"{said[0]}\n<image>"
            turns = [
                {"from": "gpt" if index % 2 else "human", "value": text}
                for index, text in enumerate(said)
            ]
            name = f"{33471 + number:012d}"
            rows.append({"id": name, "image": f"{name}.jpg", "conversations": turns})
            _picture(raw / _coco("train2017", 33471 + number))
        _document(raw / file, rows)

    return write


class Layout(NamedTuple):
    split: str
    count: int
    write: Callable[[pathlib.Path, int], None]


_VQAV2 = _tools(
    ("v2_OpenEnded_mscoco_train2014_questions.json", "v2_mscoco_train2014_annotations.json"),
    *('What does the "café" sign say?', ("open", "open", "", "open late")),
)
_OKVQA = _tools(
    ("OpenEnded_mscoco_train2014_questions.json", "mscoco_train2014_annotations.json"),
    *("What {sport} can you use this for?", ("race", "race", "motocross")),
)
_TALK = ("What is the man wearing?", "A hat.", 'What does the "café" sign say?', "Open.")
_DETAIL = ("What is this photo about'?", "The image shows a street.")
_WHY = ("Why is the bus blue?", "Since it was painted.")

# Every count is another, and so is every weight.
LAYOUTS: dict[str, Layout] = {
    "coco_caption": Layout("train", 40, _coco_caption),
    "web_capfilt": Layout("train", 38, _web_capfilt),
    "nocaps": Layout("val", 9, _nocaps),
    "flickr30k": Layout("test", 7, _flickr30k),
    "textcaps": Layout("train", 35, _textcaps),
    "gqa": Layout("testdev", 31, _gqa),
    "vsr": Layout("test", 12, _vsr),
    "iconqa": Layout("test", 15, _iconqa),
    "vqav2": Layout("train", 39, _VQAV2),
    "vizwiz": Layout("val", 19, _vizwiz),
    "okvqa": Layout("train", 13, _OKVQA),
    "aokvqa": Layout("train", 17, _aokvqa),
    "scienceqa": Layout("test", 11, _scienceqa),
    "ocrvqa": Layout("train", 36, _ocrvqa),
    "textvqa": Layout("val", 23, _textvqa),
    "vqav2_questions": Layout("train", 37, _VQAV2),
    "okvqa_questions": Layout("train", 14, _OKVQA),
    "aokvqa_questions": Layout("train", 18, _aokvqa),
    "msvd_qa": Layout("test", 5, _lavis_video("-4wsuPCjDBc_5_1", ".avi")),
    "msrvtt_qa": Layout("test", 6, _lavis_video("video651", ".mp4")),
    "ivqa": Layout("test", 3, _ivqa),
    "visual_dialog": Layout("val", 20, _visual_dialog),
    "hateful_memes": Layout("val", 8, _hateful_memes),
    "llava_conversation": Layout("train", 34, _llava("conversation_58k.json", *_TALK)),
    "llava_detail": Layout("train", 22, _llava("detail_23k.json", *_DETAIL)),
    "llava_reasoning": Layout("train", 26, _llava("complex_reasoning_77k.json", *_WHY)),
}

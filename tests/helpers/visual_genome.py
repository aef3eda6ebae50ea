"""Visual Genome's questions as they are released: three of them, of two images."""

import json
import pathlib
from typing import Any

from tests.helpers.tars import picture

SITE = "https://cs.stanford.edu/people/rak248"
IMAGES = [
    {"image_id": 1, "url": f"{SITE}/VG_100K_2/1.jpg", "width": 800, "coco_id": None},
    {"image_id": 3, "url": f"{SITE}/VG_100K/3.jpg", "width": 640, "coco_id": None},
]


def question(number: int, image: int, text: str, answer: str) -> dict[str, Any]:
    row = {"qa_id": number, "image_id": image, "question": text, "answer": answer}
    return row | {"a_objects": [], "q_objects": []}


QUESTIONS = [
    {
        "id": 1,
        "qas": [
            question(986768, 1, "What color is the clock? ", "Green."),
            question(986777, 1, "How tall is the light post?", " "),
        ],
    },
    {"id": 2, "qas": []},
    {"id": 3, "qas": [question(7, 3, "Who is there?", "Nobody.")]},
]


def write(raw: pathlib.Path, **documents: Any) -> pathlib.Path:
    raw.mkdir(exist_ok=True)
    for name, document in documents.items():
        (raw / f"{name}.json").write_text(json.dumps(document))
    return raw


def write_questions(raw: pathlib.Path) -> pathlib.Path:
    """Writes both documents and the images that they name; returns the folder."""
    write(raw, question_answers=QUESTIONS, image_data=IMAGES)
    for number, path in enumerate(("VG_100K_2/1.jpg", "VG_100K/3.jpg")):
        (raw / path).parent.mkdir()
        (raw / path).write_bytes(picture(number))
    return raw

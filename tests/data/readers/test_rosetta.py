import json

import pytest

from jax_instructblip.data.readers.annotations import AnnotationError
from jax_instructblip.data.readers.rosetta import read_rosetta

NOKIA = {"image_id": "c1", "ocr_tokens": ["NOKIA", " ", "7"], "ocr_info": []}


def read(folder, document):
    path = folder / "words.json"
    path.write_text(json.dumps(document))
    return read_rosetta(path)


def test_words_in_order_without_blank_ones(tmp_path):
    document = {"data": [NOKIA, {"image_id": "d2", "ocr_tokens": []}]}
    assert read(tmp_path, document) == {"c1": ("NOKIA", "7"), "d2": ()}


@pytest.mark.parametrize(
    "document, message",
    [
        ([NOKIA], "found a list at the top, expected an object"),
        ({"images": [NOKIA]}, "no field 'data'; found images"),
        ({"data": [NOKIA, NOKIA]}, r"data\[1\]: image_id 'c1' is used twice"),
        ({"data": [NOKIA | {"ocr_tokens": "NOKIA"}]}, r"data\[0\]: ocr_tokens: found text"),
        ({"data": [NOKIA | {"ocr_tokens": [7]}]}, r"ocr_tokens\[0\]: found a whole number"),
        ({"data": [NOKIA | {"image_id": ""}]}, "image_id is blank"),
    ],
)
def test_files_that_cannot_be_used(tmp_path, document, message):
    with pytest.raises(AnnotationError, match=message):
        read(tmp_path, document)

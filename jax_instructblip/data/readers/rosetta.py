"""Reads the words that the OCR system Rosetta found in the images of TextVQA and TextCaps.

Both datasets have the same images. The files are TextVQA_Rosetta_OCR_v0.2_{train,val,test}.json:

    {"data": [{"image_id": "0054c91397f2fe05", "ocr_tokens": ["NOKIA", "7"], ...}, ...]}
"""

import pathlib

from jax_instructblip.data.readers.annotations import (
    AnnotationError,
    field,
    read_json,
    require,
    text_of,
)


def read_rosetta(path: pathlib.Path) -> dict[str, tuple[str, ...]]:
    """Returns the words of each image, by image id, in the file's order and without blank ones."""
    words: dict[str, tuple[str, ...]] = {}
    for number, row in enumerate(field(read_json(path, dict), "data", list, str(path))):
        where = f"{path}: data[{number}]"
        image = text_of(require(row, dict, where), "image_id", where)
        if image in words:
            raise AnnotationError(
                f"{where}: image_id {image!r} is used twice, expected one row an image: delete one"
            )
        tokens = field(row, "ocr_tokens", list, where)
        for index, token in enumerate(tokens):
            require(token, str, f"{where}: ocr_tokens[{index}]")
        words[image] = tuple(token for token in tokens if token.strip())
    return words

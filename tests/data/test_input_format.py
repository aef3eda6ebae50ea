"""Input formats, as config.json and meta.json hold them."""

import json

import pytest

from jax_instructblip.data.input_format import InputFormat

FORMATS = [
    InputFormat(),
    InputFormat("v0", "Be brief.", ("<im_start>", "<im_end>"), "clip", 99),
    InputFormat("chatml", "", None, "pad"),
]


@pytest.mark.parametrize("form", FORMATS)
def test_there_and_back_through_json(form):
    assert InputFormat.from_dict(json.loads(json.dumps(form.to_dict()))) == form


def test_absent_fields_have_their_defaults():
    assert InputFormat.from_dict({"template": "v1"}) == InputFormat("v1")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ([], " is \\[\\], expected an object"),
        ({"tempalte": "v1"}, "unknown fields tempalte; known: template, system"),
        ({"template": "v9"}, "template is 'v9', expected one of '', v0, v1"),
        ({"template": None}, "template is None, expected one of"),
        ({"system": 3}, "system is 3, expected text or None"),
        ({"system": "\ud800"}, "system cannot be written as UTF-8"),
        ({"image_marks": ["<im_start>"]}, "image_marks has 1 tokens, expected one before and one"),
        ({"image_marks": "ab"}, "image_marks is 'ab', expected a tuple"),
        ({"image_crop": "middle"}, "image_crop is 'middle', expected one of squash, center, clip"),
        ({"limit": 0}, "limit is 0, expected at least 1"),
        ({"limit": True}, "limit is True, expected a whole number"),
    ],
)
def test_what_is_no_format_is_named(fields, said):
    with pytest.raises(ValueError, match=f"^input_format.*{said}"):
        InputFormat.from_dict(fields)


def test_another_template_brings_its_own_system_message():
    form = FORMATS[1]
    assert form.with_template(None) is form and form.with_template("v0") is form
    changed = form.with_template("v1")
    assert (changed.template, changed.system, changed.image_crop) == ("v1", None, "clip")
    with pytest.raises(ValueError, match="template is 'x', expected one of"):
        form.with_template("x")

"""The rules of `blip_caption` and `blip_question`, mark by mark."""

import pytest

from jax_instructblip.data.text_processors import process_caption, process_question


@pytest.mark.parametrize(
    ("text", "caption", "question"),
    [
        ("A Dog.", "a dog", "a dog"),
        ('a.b!c"d(e)f*g#h:i;j~k', "a b c d e f g h i j k", "abcdefghijk"),
        ("Is it, really?", "is it, really?", "is it, really?"),
        ("it's a-b & c/d", "it's a-b & c/d", "it's a-b & c/d"),
        ("two  spaces   here ", "two spaces here", "two  spaces   here"),
        (" front", "front", " front"),
        ("end . ", "end", "end"),
        ("", "", ""),
        ("...", "", ""),
        ("ÄRGER Straße", "ärger straße", "ärger straße"),
    ],
)
def test_marks_and_spaces(text, caption, question):
    assert (process_caption(text), process_question(text)) == (caption, question)


def test_at_most_fifty_words_stay():
    text = " ".join(f"w{number}" for number in range(60))
    for process in (process_caption, process_question):
        assert process(text).split(" ") == [f"w{number}" for number in range(50)]

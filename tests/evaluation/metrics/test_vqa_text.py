import json

import pytest

from jax_instructblip.evaluation.metrics.vqa_text import (
    _CONTRACTIONS,
    _PUNCTUATION,
    flatten,
    normalise,
    normalise_evalai,
    strip_punctuation,
    unify_words,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2 dogs.", "2 dogs"),
        ("1,000 people", "1000 people"),
        ("blue/green", "blue green"),
        ("u.s.", "us"),
        ("10:30", "10:30"),
        ("3.5", "3.5"),
        ("two-story", "2 story"),
        ("T-shirt", "t shirt"),
        ("it's a dog", "it's dog"),
        ("The  Two\tDogs\n", "2 dogs"),
        ("none", "0"),
        ("dont", "don't"),
        ("(yes)", "yes"),
        ("yes, it is", "yes it is"),
        ("a,b", "b"),  # a space in between, and then an article
        ("a", ""),
    ],
)
def test_official_examples(text, expected):
    assert normalise(text) == expected


def test_a_mark_is_deleted_where_it_stands_beside_a_space_anywhere():
    assert strip_punctuation("blue/green") == "blue green"
    assert strip_punctuation("blue/green/ red") == "bluegreen red"
    # A comma between digits decides about every mark.
    assert strip_punctuation("1,000 blue/green") == "1000 bluegreen"


def test_only_32_full_stops_are_removed():
    assert strip_punctuation("a." * 40) == "a" * 32 + "a." * 8


def test_words_of_the_table_in_capitals_are_never_found():
    assert unify_words("Im here") == "im here"


def test_the_table_is_whole():
    assert len(_CONTRACTIONS) == 120 and len(_PUNCTUATION) == 21
    assert _CONTRACTIONS["somebody'd"] == "somebodyd"  # the tools' slip
    assert _CONTRACTIONS["y'alld've"] == "y'all'd've"


def test_flatten():
    assert flatten(" a\n\tb ") == "a  b"


def test_cases_of_the_evaluation_server(shared):
    path = shared / "data" / "vqa" / "golden_scores.json"
    cases = json.loads(path.read_text())["evalai_answer_processor_cases"]
    assert [normalise_evalai(text) for text, _ in cases] == [expected for _, expected in cases]
    assert len(cases) == 5

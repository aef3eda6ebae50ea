import pytest

from jax_instructblip.evaluation.metrics.exact_match import is_correct, majority_answer, normalise


@pytest.mark.parametrize(
    ("text", "answers", "expected"),
    [
        ("red", ("red",), True),
        (" Red \n", ("red",), True),
        ("red", ("RED ", "blue"), True),
        ("blue", ("red", "blue"), True),
        ("reddish", ("red",), False),
        ("a red", ("red",), False),
        ("red.", ("red",), False),
        ("", ("red",), False),
    ],
)
def test_whole_answers(text, answers, expected):
    assert is_correct(text, answers) is expected


def test_normalise():
    assert normalise("  A Large  Cup\t") == "a large  cup"


def test_the_majority_answer_is_right_most_often():
    assert majority_answer([("red",), ("blue",), ("Red ",)]) == "red"
    assert majority_answer([("red", "pink"), ("blue", "pink")]) == "pink"
    assert (
        majority_answer([("red", "Red", "red"), ("blue",), ("blue",)]) == "blue"
    )  # once a question
    assert majority_answer([("b",), ("a",)]) == "a"
    with pytest.raises(ValueError, match="no answers"):
        majority_answer([])

"""Answers of a language model, read as rounds of a conversation."""

import pytest

from jax_instructblip.data.instruct_data.rounds import find_problem, parse_rounds, turns
from jax_instructblip.data.readers.dialogue import LLAVA_DETAIL_QUESTIONS

TALK = "Question:\nWhat?\n===\nAnswer:\nA cup.\n\n1. Old.\n===\nQuestion: Why?\n===\nAnswer: So."
ONE = TALK.partition("\n===\nQ")[0]


def test_the_rounds_of_a_conversation():
    rounds = [("What?", "A cup.\n\n1. Old."), ("Why?", "So.")]
    assert parse_rounds("conversation", TALK, "") == rounds
    assert parse_rounds("conversation", f"\n{TALK}\n===\n", "") == rounds
    assert [turn.text for turn in turns(rounds)] == [
        *("<image>\nWhat?", "A cup.\n\n1. Old.", "Why?", "So.")
    ]


def test_a_description_gets_a_question_that_depends_on_the_draw_alone():
    drawn = {parse_rounds("detail_description", " A cup.\n", f"0:{n}")[0] for n in range(200)}
    assert {answer for _, answer in drawn} == {"A cup."}
    assert {question for question, _ in drawn} == LLAVA_DETAIL_QUESTIONS
    once, again = (parse_rounds("detail_description", "A cup.", "0:7") for _ in range(2))
    assert once == again


@pytest.mark.parametrize(
    ("kind", "text", "problem"),
    [
        ("conversation", "", "part 1 begins with ''"),
        ("conversation", "Sure!\n" + TALK, "part 1 begins with 'Sure!"),
        ("conversation", ONE + "\n===\nQuestion:\nWhy?", "ends with question 2, without an answer"),
        ("conversation", TALK.replace("===\nQuestion", "Question"), "part 2 holds another heading"),
        ("conversation", "Answer:\nA\n===\nQuestion:\nQ", "expected 'Question:'"),
        ("conversation", "Question:\n\n===\nAnswer:\nA", "part 1 is empty"),
        ("conversation", ONE + "<image>", "an answer has an <image>"),
        ("conversation", ONE.replace("What", "<image>"), "2 <image> in its questions"),
        ("conversation", ONE + "\ud800", "cannot be written as UTF-8"),
        ("complex_reasoning", TALK, "found 2 questions, expected one"),
        ("detail_description", ONE, "found questions and answers"),
        ("detail_description", " \n", "the description is empty"),
    ],
)
def test_what_is_no_answer_of_its_kind(kind, text, problem):
    assert problem in find_problem(kind, text)


def test_good_answers_have_no_problem():
    for kind, text in (("conversation", TALK), ("complex_reasoning", ONE)):
        assert find_problem(kind, text) == ""
    assert find_problem("detail_description", "A cup === a mug.") == ""

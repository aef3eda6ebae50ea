"""BLIP-2 with T5 beside the values of the original code, weights through the converter."""

import pytest

from tests.helpers.second_stage import BEAMS, GREEDY, SecondStage

PROMPT, QUESTION = "a photo of", "Question: {} Short answer:"
# Names of the texts, and the most tokens of each.
TRAINING = {
    "train_prefix_lm": ("train_prefix_text_input", "train_prefix_text_output", 20),
    "train_qa": ("instructions", "answers", 20),
    "train_qa_trunc5": ("instructions", "answers", 5),
}


@pytest.fixture(scope="module")
def t5(shared, tmp_path_factory):
    return SecondStage("blip2_t5", tmp_path_factory.mktemp("original"))


@pytest.fixture(scope="module")
def prompts(t5):
    return t5.answering([PROMPT] * 3)


@pytest.fixture(scope="module")
def instructions(t5):
    return t5.answering(t5.given["instructions"])


@pytest.mark.parametrize("tag", TRAINING)
def test_training(t5, tag):
    prompts, answers, limit = TRAINING[tag]
    limits = {"prompt_limit": limit, "answer_limit": limit}
    t5.check_training(tag, t5.training(t5.given[prompts], t5.given[answers], **limits))


def test_first_steps_of_an_answer(t5, prompts, instructions):
    t5.check_first_steps("generate", prompts)
    t5.check_first_steps("generate_prompts", instructions)


@pytest.mark.parametrize("setting", GREEDY)
def test_greedy_answers(t5, prompts, setting):
    t5.check_greedy("generate", setting, prompts)


@pytest.mark.parametrize("setting", BEAMS)
def test_answers_of_a_beam_search(t5, prompts, setting):
    t5.check_beams(f"generate/{setting}", prompts, **t5.beam_settings(setting))


def test_answers_to_instructions(t5, instructions):
    t5.check_greedy("generate_prompts", "greedy", instructions)
    settings = t5.beam_settings("beam5_lp-1")
    t5.check_beams("generate_prompts/beam5_lp-1", instructions, **settings)


def test_answers_to_questions(t5):
    batch = t5.answering([QUESTION.format(each) for each in t5.given["instructions"]])
    lengths = t5.recorded["predict_answers/attention_mask"].sum(axis=1).tolist()
    assert (batch["segments"] > 0).sum(axis=1).tolist() == lengths
    t5.check_beams("predict_answers", batch, num_beams=5, max_new_tokens=8, length_penalty=-1.0)

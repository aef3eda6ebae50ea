"""BLIP-2 with OPT beside the values of the original code, weights through the converter."""

import pytest

from tests.helpers.second_stage import BEAMS, GREEDY, SecondStage

PROMPT, QUESTION = "a photo of", "Question: {} Short answer:"
# The prompt, and the limits that make the 20 (6) tokens of a whole text; the prompt has 5 of them.
TRAINING = {
    "train_prompt": (PROMPT, {"answer_limit": 16}),
    "train_noprompt": ("", {"answer_limit": 20}),
    "train_noprompt_trunc6": ("", {"answer_limit": 6}),
}


@pytest.fixture(scope="module")
def opt(shared, tmp_path_factory):
    return SecondStage("blip2_opt", tmp_path_factory.mktemp("original"))


@pytest.fixture(scope="module")
def prompts(opt):
    return opt.answering([PROMPT] * 3)


@pytest.mark.parametrize("tag", TRAINING)
def test_training(opt, tag):
    prompt, limits = TRAINING[tag]
    opt.check_training(tag, opt.training([prompt] * 3, opt.given["captions"], **limits))


def test_first_steps_of_an_answer(opt, prompts):
    opt.check_first_steps("generate", prompts)


@pytest.mark.parametrize("setting", GREEDY)
def test_greedy_answers(opt, prompts, setting):
    opt.check_greedy("generate", setting, prompts)


@pytest.mark.parametrize("setting", BEAMS)
def test_answers_of_a_beam_search(opt, prompts, setting):
    opt.check_beams(f"generate/{setting}", prompts, **opt.beam_settings(setting))


@pytest.mark.parametrize(
    ("tag", "limit"), [("predict_answers", None), ("predict_answers_trunc20", 20)]
)
def test_answers_to_questions(opt, tag, limit):
    asked = [QUESTION.format(each) for each in opt.given["instructions"]]
    batch = opt.answering(asked, limit)
    opt.check_prompt(tag, batch, opt.embed_row(opt.params, batch))
    opt.check_beams(tag, batch, num_beams=5, max_new_tokens=8, length_penalty=0.0)

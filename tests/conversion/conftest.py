"""Fixtures for conversion tests: folders with small vocabularies, 1 MB instead of 26 MB."""

import pytest

from tests.helpers.hf_folders import copy

ROWS = {"language": 300, "qformer": 200}


@pytest.fixture(scope="session")
def small(forge, tmp_path_factory):
    """`small("instructblip-flan-t5-xl", "bfloat16")` is that forged folder with few words."""
    made = {}

    def cut(state):
        for key, rows in (
            ("qformer.embeddings.word_embeddings.weight", ROWS["qformer"]),
            ("language_model.shared.weight", ROWS["language"]),
            ("language_model.model.embed_tokens.weight", ROWS["language"]),
            ("language_model.lm_head.weight", ROWS["language"]),
        ):
            if key in state:
                state[key] = state[key][:rows].clone()

    def configure(config):
        config["qformer_config"]["vocab_size"] = ROWS["qformer"]
        config["text_config"]["vocab_size"] = ROWS["language"]
        config["image_token_index"] = ROWS["language"] - 1
        if config["text_config"]["model_type"] == "llama":
            config["text_config"]["pad_token_id"] = 0

    def small(name, dtype="float32"):
        if (name, dtype) not in made:
            out = tmp_path_factory.mktemp("small") / f"{name}-{dtype}"
            copy(forge(name, dtype), out, change=cut, config=configure)
            for path in out.glob("token*"):  # their ids would lie beyond the cut vocabulary
                path.unlink()
            made[name, dtype] = out
        return made[name, dtype]

    return small


@pytest.fixture(scope="module")
def flan(small):
    return small("instructblip-flan-t5-xl")


@pytest.fixture(scope="module")
def vicuna(small):
    return small("instructblip-vicuna-7b")

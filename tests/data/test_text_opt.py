"""Texts of BLIP-2 with OPT: one text of prompt and answer, which ends with a line break."""

import dataclasses
import json
import shutil

import numpy as np
import pytest

from jax_instructblip.data.batch import IGNORE, collate
from jax_instructblip.data.text import TextProcessor
from jax_instructblip.data.tokenizer_files import load_tokenizers
from jax_instructblip.inference.streaming import pieces
from jax_instructblip.models.variants import OptConfig, QFormerConfig, Variant, VisionConfig
from tests.helpers import golden
from tests.helpers.golden_blip2 import text_processor

SIZES = OptConfig(width=8, heads=2, mlp=8, layers=1)


def variant(llm=SIZES):
    vision = VisionConfig(width=8, heads=2, mlp=8, layers=1)
    qformer = QFormerConfig(8, llm.width, width=8, heads=2, instruction_aware=False)
    return Variant("blip2", vision, qformer, llm)


@pytest.fixture(scope="module")
def folder(shared, tmp_path_factory):
    """The vocabulary of OPT alone, under the names of a checkpoint."""
    out, files = tmp_path_factory.mktemp("opt"), shared / "data" / "tokenizers" / "opt-metaseq"
    for name in ("vocab.json", "merges.txt"):
        shutil.copyfile(files / f"gpt2-{name}", out / name)
    return out


@pytest.fixture(scope="module")
def real(folder):
    return TextProcessor.load(folder, variant())


def test_ids_are_those_of_the_released_tokenizer(real, shared):
    recorded = json.loads((shared / "data" / "tokenizers" / "golden_ids.json").read_text())
    recorded = recorded["with_special_tokens"]["opt"]
    assert len(recorded) == 7
    for prompt, ids in recorded.items():
        assert real.prompt(prompt)["tokens"].tolist() == ids
        assert real.decode(ids[1:]) == prompt.strip()


def test_no_folder_of_the_qformer_is_needed(real):
    assert real.qformer is None
    assert "qformer_tokens" not in real.prompt("a photo of")
    assert "qformer_tokens" not in real.example("a photo of", "a cat")


def test_prompt_and_answer_are_one_text_that_ends_with_a_line_break(real):
    whole = real.prompt("a photo of a red cat\n")["tokens"].tolist()
    prompt = real.prompt("a photo of")["tokens"].tolist()
    assert whole[0] == 2 and whole[-1] == 50118 and whole[: len(prompt)] == prompt
    for given, answer in (("a photo of", "a red cat"), ("a photo of ", " a red cat \n")):
        example = real.example(given, answer)
        assert example["tokens"].tolist() == whole
        masked = [IGNORE] * len(prompt)
        assert example["targets"].tolist() == [*masked, *whole[len(prompt) :]]
        assert not example["truncated"].any()


def test_without_a_prompt_the_start_is_learned_as_released(real):
    example = real.example("", "a red cat")
    np.testing.assert_array_equal(example["targets"], example["tokens"])
    example["images"] = np.zeros((1, 28, 28, 3), np.uint8)
    batch = collate([example], visual_tokens=4)
    assert batch["asked"][0, 0] == 3 and batch["targets"][0, 0] == 2  # of the last visual vector
    never = real.example("", "a red cat", learn_start=False)
    np.testing.assert_array_equal(never["targets"], [IGNORE, *example["tokens"][1:]])
    assert real.example("a photo of", "a red cat")["targets"][0] == IGNORE


def test_limits_count_the_start_and_cut_the_end(real):
    long = " ".join(["dog"] * 400)
    processor = dataclasses.replace(real, prompt_limit=4, answer_limit=6)
    cut = processor.example("a photo of the big " + long, "cat " + long)
    assert cut["tokens"][:4].tolist() == real.prompt("a photo of")["tokens"].tolist()
    assert len(cut["tokens"]) == 4 + 5 and cut["tokens"][-1] != 50118
    assert cut["truncated"].tolist() == [0, 1, 1]
    # 32 tokens of a caption, `</s>` among them, are those of the original code
    caption = dataclasses.replace(real, answer_limit=32).example("", long)
    assert len(caption["tokens"]) == 32


@pytest.mark.parametrize("short", [("What?", "a cat"), ("", "yes")])
def test_an_example_is_cut_to_the_room_of_another(real, short):
    room = real.example(*short)
    cut = real.example("What is the long dog doing there?", "it sleeps all day", room)
    for name in ("tokens", "targets"):
        assert len(cut[name]) == len(room[name]), name
    assert (cut["targets"] != IGNORE).sum() == (room["targets"] != IGNORE).sum()
    same = real.example(*short, room)
    for name, leaf in room.items():
        np.testing.assert_array_equal(same[name], leaf)


def test_candidates_continue_a_prompt_and_have_no_end(real):
    whole = real.prompt("Short answer: yes")["tokens"]
    prompt = real.prompt("Short answer:")["tokens"]
    np.testing.assert_array_equal(real.candidate("yes"), whole[len(prompt) :])


def test_an_answer_without_a_token_is_refused(real):
    for answer in ("", "  \n"):
        with pytest.raises(ValueError, match="has no token"):
            real.example("What?", answer)


def test_tokenizers_of_another_model_are_refused(real, folder):
    other = dataclasses.replace(SIZES, eos_id=2, pad_id=3, bos_id=0, vocab=50000)
    with pytest.raises(ValueError) as caught:
        TextProcessor(variant(other), real.llm, None)
    for part in (
        'end: the model expects id 2, "\\n" has the ids [50118]',
        "bos: the model expects id 0, the tokenizer has 2 ('</s>')",
        "pad: the model expects id 3, the tokenizer has 1 ('<pad>')",
        "the language model has 50000 embeddings, its tokenizer ids up to 50264",
    ):
        assert part in str(caught.value)
    reads = dataclasses.replace(variant().qformer, instruction_aware=True)
    known = variant()
    with pytest.raises(ValueError, match="reads the instruction, but has no tokenizer"):
        TextProcessor(
            Variant("instructblip", known.vision, reads, known.llm),
            *load_tokenizers(folder, None, "opt"),
        )


def test_a_saved_tokenizer_gives_the_same_ids(real, tmp_path):
    real.llm.add_special_tokens({"additional_special_tokens": ["<image>"]})
    real.llm.save_pretrained(tmp_path / "tokenizer")
    loaded = TextProcessor.load(tmp_path, variant())
    for prompt in ("  Two   spaces, what's this?", "", "naïve 東京 \n", "a photo of"):
        ids = real.prompt(prompt)["tokens"]
        np.testing.assert_array_equal(loaded.prompt(prompt)["tokens"], ids)


def test_decoding_equals_the_released_text(shared):
    processor, outputs = text_processor("blip2_opt"), golden.outputs("blip2_opt")
    checked = 0
    for name in outputs:
        if name.endswith("/text"):
            rows = outputs[name.removesuffix("text") + "ids"]
            for row, expected in zip(rows, outputs[name], strict=True):
                end = list(row).index(202) + 1 if 202 in row else len(row)
                assert processor.decode(row[:end]) == str(expected).strip(), (name, row)
                checked += 1
    assert checked > 30


def test_white_space_before_a_full_stop_is_dropped_as_released(real):
    ids = real.prompt("it does n't move .")["tokens"]
    assert real.rewrites and real.decode(ids) == "it doesn't move."
    assert "".join(pieces(real.decode, ids, rewrites=True)) == "it doesn't move."


def test_ids_beyond_the_tokenizer_are_not_text(real):
    """There are seven embeddings more than ids, and a bad model may emit them."""
    assert real.decode([*real.prompt("a cat")["tokens"], 50271]) == "a cat"

import json
import pickle
import random
import subprocess
import sys

import numpy as np
import pytest
import sentencepiece
import transformers

from jax_instructblip.data import text
from jax_instructblip.data.batch import IGNORE, compact
from jax_instructblip.data.tokenizer_files import RELEASED_SPECIAL, load_tokenizers
from jax_instructblip.models.released import get_variant
from jax_instructblip.models.variants import (
    LlamaConfig,
    QFormerConfig,
    T5Config,
    Variant,
    VisionConfig,
)

LAVIS_VICUNA = RELEASED_SPECIAL["llama"]


def variant(llm, bert_vocab=30523):
    vision = VisionConfig(width=8, heads=2, mlp=8, layers=1)
    return Variant(
        "instructblip",
        vision,
        QFormerConfig(vision_width=8, llm_width=llm.width, width=8, heads=2, vocab=bert_vocab),
        llm,
    )


def tiny_t5(**fields):
    sizes = dict(width=8, head_width=4, heads=2, mlp=8, encoder_layers=1, decoder_layers=1)
    return T5Config(**sizes | fields)


def tiny_llama(**fields):
    return LlamaConfig(**dict(width=8, heads=2, mlp=8, layers=1) | fields)


@pytest.fixture(scope="module")
def real(shared):
    """The processors of the real tokenizers, from bare vocabulary files."""
    folder = shared / "data" / "tokenizers"
    bert = folder / "bert-base-uncased"
    return {
        "t5": text.TextProcessor(variant(tiny_t5()), *load_tokenizers(folder / "t5", bert, "t5")),
        "llama": text.TextProcessor(
            variant(tiny_llama()), *load_tokenizers(folder / "llama", bert, "llama")
        ),
    }


@pytest.fixture(scope="module")
def golden(shared):
    """`golden(case, **limits)`: processor with the golden tokenizers, inputs, outputs."""
    folder = shared / "golden" / "tokenizers"

    def golden(case, **limits):
        inputs = np.load(shared / "golden" / case / "inputs.npz")
        outputs = np.load(shared / "golden" / case / "outputs.npz")
        if "t5" in case:
            llm, special = tiny_t5(vocab=144), None
        else:
            llm, special = tiny_llama(vocab=401, pad_id=400), LAVIS_VICUNA
        tokenizers = load_tokenizers(folder / llm.kind, folder / "bert", llm.kind, special=special)
        return text.TextProcessor(variant(llm, 201), *tokenizers, **limits), inputs, outputs

    return golden


TRAIN_TAGS = {
    "train": dict(prompt_limit=40, qformer_limit=40, answer_limit=40),
    "train_trunc_in6_out5": dict(prompt_limit=6, qformer_limit=6, answer_limit=5),
}


def unpad(rows, pad):
    return [[int(i) for i in row if i != pad] for row in rows]


@pytest.mark.parametrize("tag", TRAIN_TAGS)
def test_t5_examples_equal_the_released_rows(golden, tag):
    processor, inputs, outputs = golden("instruct_t5", **TRAIN_TAGS[tag])
    examples = [
        processor.example(str(p), str(a))
        for p, a in zip(inputs["instructions"], inputs["answers"], strict=True)
    ]
    queries = 8
    found = [e["targets"].tolist() for e in examples]
    assert found == unpad(outputs[f"{tag}/llm_labels"], IGNORE)
    found = [e["qformer_tokens"].tolist() for e in examples]
    assert found == unpad(outputs[f"{tag}/qformer_text_ids"], 0)
    lengths = outputs[f"{tag}/llm_attention_mask"].sum(axis=1) - queries
    assert [len(e["tokens"]) for e in examples] == lengths.tolist()
    for e in examples:
        np.testing.assert_array_equal(e["decoder_tokens"], [0, *e["targets"][:-1]])
        assert e["tokens"][-1] == 1
    truncated = np.stack([e["truncated"] for e in examples])
    if tag == "train":
        assert not truncated.any()
    else:
        np.testing.assert_array_equal(truncated, [[1, 1, 0], [1, 1, 1], [1, 1, 1]])


@pytest.mark.parametrize("tag", TRAIN_TAGS)
def test_t5_prompt_ids_are_the_embedded_ones(golden, shared, tag):
    """The recorded rows hold embeddings, not ids: look each of them up in the released table."""
    from safetensors.numpy import load_file

    processor, inputs, outputs = golden("instruct_t5", **TRAIN_TAGS[tag])
    weights = load_file(shared / "golden" / "instruct_t5" / "weights.safetensors")
    table = weights["t5_model.shared.weight"]
    for row, prompt in enumerate(inputs["instructions"]):
        tokens = processor.example(str(prompt), "yes")["tokens"]
        embedded = outputs[f"{tag}/llm_inputs_embeds"][row, 8 : 8 + len(tokens)]
        np.testing.assert_allclose(table[tokens], embedded, atol=1e-6)


@pytest.mark.parametrize("tag", TRAIN_TAGS)
def test_vicuna_examples_equal_the_released_rows(golden, tag):
    processor, inputs, outputs = golden("instruct_vicuna", **TRAIN_TAGS[tag])
    queries = 8
    ids, mask = compact(
        outputs[f"{tag}/concat/llm_input_ids"], outputs[f"{tag}/concat/llm_attention_mask"]
    )
    labels, _ = compact(
        outputs[f"{tag}/llm_labels"][:, queries:], outputs[f"{tag}/concat/llm_attention_mask"]
    )
    for row, (prompt, answer) in enumerate(
        zip(inputs["instructions"], inputs["answers"], strict=True)
    ):
        example = processor.example(str(prompt), str(answer))
        held = int(mask[row].sum())
        np.testing.assert_array_equal(example["tokens"], ids[row, :held])
        np.testing.assert_array_equal(example["targets"], labels[row, :held])
        assert example["tokens"][0] == 2
    found = [processor.instruction(str(p)).tolist() for p in inputs["instructions"]]
    assert found == unpad(outputs[f"{tag}/qformer_text_ids"], 0)


def test_vicuna_learns_the_answer_and_its_end(real):
    example = real["llama"].example("What is it?", "a cat")
    tokens, targets = example["tokens"], example["targets"]
    prompt = real["llama"].prompt("What is it?")["tokens"]
    assert (targets[: len(prompt)] == IGNORE).all()
    np.testing.assert_array_equal(targets[len(prompt) :], tokens[len(prompt) :])
    assert targets[-1] == 2


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_an_example_is_cut_to_the_room_of_another(real, kind):
    for short in (("What?", "a cat"), ("", "yes")):
        room = real[kind].example(*short)
        cut = real[kind].example("What is the long dog doing there?", "it sleeps all day", room)
        for name in ("tokens", "targets", "qformer_tokens"):
            assert len(cut[name]) == len(room[name]), name
        assert (cut["targets"] != IGNORE).sum() == (room["targets"] != IGNORE).sum()
        assert cut["truncated"].tolist() == [1, 1, 1]
        same = real[kind].example(*short, room)
        for name, leaf in real[kind].example(*short).items():
            np.testing.assert_array_equal(same[name], leaf)


@pytest.mark.parametrize("case", ["instruct_t5", "instruct_vicuna"])
def test_decoding_equals_the_released_text(golden, case):
    processor, _, outputs = golden(case)
    checked = 0
    for name in outputs:
        if name.endswith("/text"):
            ids, texts = outputs[name.removesuffix("text") + "ids"], outputs[name]
            for row, expected in zip(ids, texts, strict=True):
                # T5's released text keeps outer white space.
                assert processor.decode(row) == str(expected).strip(), (name, row)
                checked += 1
    assert checked > 30


def test_padding_zero_of_a_vicuna_answer_is_not_text(real):
    processor = real["llama"]
    ids = [*processor.prompt("a cat")["tokens"][1:], 2, 0, 0]
    assert processor.decode(ids) == "a cat"


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_ids_beyond_the_tokenizer_are_not_text(real, kind):
    """Embeddings are more than ids in some checkpoints, and a bad model may emit them."""
    ids = real[kind].example("What?", "a cat")["targets"]
    ids = [*ids[ids != IGNORE][:-1], 32127]
    assert real[kind].decode(ids) == "a cat"


def test_ids_of_the_real_tokenizers(real, shared):
    golden = json.loads((shared / "data" / "tokenizers" / "golden_ids.json").read_text())
    golden = golden["with_special_tokens"]
    assert len(golden["t5"]) == len(golden["llama"]) == len(golden["bert"]) == 7
    for prompt, ids in golden["t5"].items():
        assert real["t5"].prompt(prompt)["tokens"].tolist() == ids
    for prompt, ids in golden["llama"].items():
        assert ids[0] == 1  # the plain LLaMA bos; the released model uses </s>
        assert real["llama"].prompt(prompt)["tokens"].tolist() == [2, *ids[1:]]
    for prompt, ids in golden["bert"].items():
        assert real["t5"].instruction(prompt).tolist() == ids


@pytest.mark.parametrize(("kind", "file"), [("t5", "spiece.model"), ("llama", "tokenizer.model")])
def test_text_is_split_as_sentencepiece_splits_it(real, shared, kind, file):
    pieces = sentencepiece.SentencePieceProcessor(
        model_file=str(shared / "data" / "tokenizers" / kind / file)
    )
    words = "the picture dog? no. 12 naïve 東京 \n I'm x-y \t 🐱 unbelievable <b> </s".split(" ")
    draw = random.Random(0)
    for _ in range(300):
        spaces = [" " * draw.choice([1, 1, 1, 2, 3, 5, 17]) for _ in range(draw.randint(1, 9))]
        sentence = draw.choice(["", " ", "  "]) + "".join(s + draw.choice(words) for s in spaces)
        tokens = real[kind].prompt(sentence)["tokens"].tolist()
        tokens = tokens[:-1] if kind == "t5" else tokens[1:]
        assert tokens == pieces.encode(sentence), sentence


def test_instruction_is_cut_as_the_bert_tokenizer_cuts_it(real, shared):
    bert = transformers.BertTokenizer.from_pretrained(
        shared / "data" / "tokenizers" / "bert-base-uncased", truncation_side="left"
    )
    for words in (1, 125, 126, 127, 128, 300):
        prompt = " ".join(f"word{i} cat" if i % 7 == 0 else "dog" for i in range(words))
        ids = bert(prompt, truncation=True, max_length=128)["input_ids"]
        assert real["t5"].instruction(prompt).tolist() == ids
        assert len(ids) <= 128
        cut = real["t5"].prompt(prompt)["truncated"]
        assert cut.tolist() == [int(len(bert(prompt)["input_ids"]) > 128), 0, 0]


def test_limits_of_training_prompts_and_answers(real):
    long = " ".join(["dog"] * 400)
    t5 = real["t5"].example(long, long)
    assert len(t5["tokens"]) == 128 and t5["tokens"][-1] == 1
    assert len(t5["targets"]) == 256 and t5["targets"][-1] == 1
    assert t5["truncated"].tolist() == [1, 1, 1]
    llama = real["llama"].example(long, long)
    assert len(llama["tokens"]) == 128 + 255 and llama["tokens"][0] == 2
    assert (llama["targets"] != IGNORE).sum() == 255
    assert llama["tokens"][-1] != 2  # as released, a cut answer does not end
    assert llama["truncated"].tolist() == [1, 1, 1]
    # The cut is on the left of a prompt and on the right of an answer.
    cut = real["llama"].example(long + " first cat?", "cat " + long)
    whole = real["llama"].prompt(long + " first cat?")["tokens"]
    np.testing.assert_array_equal(cut["tokens"][1:128], whole[-127:])
    assert real["llama"].decode(cut["tokens"][128:]).startswith("cat dog dog")
    # Nothing is cut for answering but the Q-Former's instruction.
    assert len(real["llama"].prompt(long)["tokens"]) == 401
    assert real["llama"].prompt(long)["truncated"].tolist() == [1, 0, 0]


def test_all_ids_are_int32(real):
    for processor in real.values():
        for array in [*processor.example("q?", "a").values(), *processor.prompt("q?").values()]:
            assert array.dtype == np.int32 and array.ndim == 1


@pytest.mark.parametrize("kind", ["t5", "llama"])
@pytest.mark.parametrize("answer", ["", "  \n"])
def test_answer_without_token_is_refused(real, kind, answer):
    if (kind, answer) == ("llama", "  \n"):
        answer = "   "
    with pytest.raises(ValueError, match="has no token"):
        real[kind].example("What?", answer)


def test_white_space_before_the_end_of_a_vicuna_answer_is_dropped(real):
    a, b = (real["llama"].example("What?", answer)["tokens"] for answer in ("a cat", "a cat \n"))
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_placeholder_in_the_text_is_refused(real, kind):
    with pytest.raises(ValueError, match=r"contains <image>.*remove it"):
        real[kind].prompt("<image>\nWhat is it?")


def test_tokenizers_of_another_model_are_refused_with_all_ids(real, shared):
    llama = real["llama"]
    with pytest.raises(ValueError) as error:
        text.TextProcessor(
            variant(tiny_llama(bos_id=1, pad_id=0, vocab=31000), bert_vocab=30522),
            llama.llm,
            llama.qformer,
            qformer_limit=600,
        )
    message = str(error.value)
    for part in (
        "bos: the model expects id 1, the tokenizer has 2 ('</s>')",
        "pad: the model expects id 0, the tokenizer has 32000 ('[PAD]')",
        "the language model has 31000 embeddings, its tokenizer ids up to 32000",
        "the Q-Former has 30522 embeddings, its tokenizer ids up to 30522",
        "qformer_limit is 600, expected at least 3 and at most 512",
    ):
        assert part in message
    assert "eos" not in message
    with pytest.raises(ValueError, match="eos: the model expects id 1, the tokenizer has 2"):
        text.TextProcessor(variant(tiny_t5()), llama.llm, llama.qformer)
    with pytest.raises(ValueError) as error:
        text.TextProcessor(
            variant(tiny_llama()), llama.llm, llama.qformer, qformer_limit=2, answer_limit=1
        )
    for part in ("qformer_limit is 2, expected at least 3", "answer_limit is 1, expected at least"):
        assert part in str(error.value)
    for name in ("instructblip-flan-t5-xl", "instructblip-vicuna-7b"):  # the right ones
        released = get_variant(name)
        own = real[released.llm.kind]
        text.TextProcessor(released, own.llm, own.qformer)


def test_checkpoint_folders_of_both_layouts(real, shared, tmp_path):
    """A Hugging Face folder as released: tokenizer.json, special tokens, <image> added."""
    files = shared / "data" / "tokenizers"
    prompt = "  Two   spaces, what's this?"
    for kind, llm in (("t5", tiny_t5()), ("llama", tiny_llama())):
        tokenizer, bert = load_tokenizers(files / kind, files / "bert-base-uncased", kind)
        tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
        root = tmp_path / kind
        tokenizer.save_pretrained(root)
        bert.save_pretrained(root / "qformer_tokenizer")
        ours = tmp_path / f"{kind}-ours"
        tokenizer.save_pretrained(ours / "tokenizer")
        bert.save_pretrained(ours / "qformer_tokenizer")
        for folder in (root, ours):
            loaded = text.TextProcessor.load(folder, variant(llm), answer_limit=8)
            assert loaded.answer_limit == 8
            for key, ids in real[kind].prompt(prompt).items():
                np.testing.assert_array_equal(loaded.prompt(prompt)[key], ids)
            assert loaded.qformer.convert_tokens_to_ids("[DEC]") == 30522


def test_length_limit_inside_a_tokenizer_file_is_ignored(real, shared, tmp_path):
    files = shared / "data" / "tokenizers"
    tokenizer, bert = load_tokenizers(files / "t5", files / "bert-base-uncased", "t5")
    for each in (tokenizer, bert):
        each.backend_tokenizer.enable_truncation(4)
        each.backend_tokenizer.enable_padding(length=50)
    tokenizer.save_pretrained(tmp_path)
    bert.save_pretrained(tmp_path / "qformer_tokenizer")
    loaded = text.TextProcessor.load(tmp_path, variant(tiny_t5()))
    for key, ids in real["t5"].prompt("What is unusual about this image?").items():
        np.testing.assert_array_equal(loaded.prompt("What is unusual about this image?")[key], ids)


@pytest.mark.parametrize("token", [None, "the"])
def test_a_qformer_without_its_own_special_tokens_is_refused(real, shared, tmp_path, token):
    bert = real["t5"].qformer
    bert.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings |= {"cls_token": token, "sep_token": token}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    folder = shared / "data" / "tokenizers" / "t5"
    llm, qformer = load_tokenizers(folder, tmp_path, "t5")
    with pytest.raises(ValueError) as error:
        text.TextProcessor(variant(tiny_t5()), llm, qformer)
    for name in ("[CLS]", "[SEP]"):
        assert f"the Q-Former expects {name}, its tokenizer has {token!r}" in str(error.value)


def test_processor_survives_pickling(real):
    for processor in real.values():
        copy = pickle.loads(pickle.dumps(processor))
        example = processor.example("  Two   spaces?", "yes, two")
        for key, ids in copy.example("  Two   spaces?", "yes, two").items():
            np.testing.assert_array_equal(ids, example[key])


_LOAD = """
import sys
{block}
from jax_instructblip.data.tokenizer_files import load_tokenizers
files = {files!r}
load_tokenizers(files + "/t5", files + "/bert-base-uncased", "t5")
llm, bert = load_tokenizers(files + "/llama", files + "/bert-base-uncased", "llama")
assert bert("cat")["input_ids"][0] == 101
loaded = [name for name in ("torch", "tensorflow") if sys.modules.get(name)]
assert not loaded, loaded
"""


@pytest.mark.parametrize("block", ["", "sys.modules['torch'] = None"], ids=["there", "absent"])
def test_loading_does_not_import_torch(shared, block):
    script = _LOAD.format(block=block, files=str(shared / "data" / "tokenizers"))
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr

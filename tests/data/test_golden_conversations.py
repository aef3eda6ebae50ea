"""Ids and labels of conversations equal those that LLaVA's released code makes."""

import numpy as np
import pytest

from jax_instructblip.data.conversation import Conversation, ConversationProcessor, Turn
from jax_instructblip.data.spec import IGNORE
from jax_instructblip.data.tokenizer_files import load_tokenizers
from jax_instructblip.files import read_json, read_jsonl

LLAVA = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<unk>"}
IMAGE_ID = -200  # stands for an image in the recorded ids


@pytest.fixture(scope="module")
def llama(shared):
    folder = shared / "data" / "tokenizers" / "llama"
    return load_tokenizers(folder, None, "llama", special=LLAVA)[0]


def three_rounds(shared):
    turns = {}
    for _, row in read_jsonl(shared / "data" / "llava" / "coco2014_val_gpt4_qa_30x3.jsonl"):
        said = turns.setdefault(row["id"], [])
        image = "" if said else "<image>\n"
        said += [Turn("user", image + row["instruction"]), Turn("assistant", row["output"])]
    return [Conversation(name, tuple(said), 1) for name, said in turns.items()]


def captions(shared):
    return [
        Conversation(row["id"], (Turn("user", "<image>"), Turn("assistant", row["captions"][0])), 1)
        for _, row in read_jsonl(shared / "data" / "llava" / "caps_boxes_coco2014_val_80.jsonl")
    ]


@pytest.mark.parametrize(
    ("case", "template", "legacy", "conversations", "ids", "targets"),
    [
        ("v0_legacy", "v0", True, three_rounds, 11_270, 8_818),
        ("v1_legacy", "v1", True, three_rounds, 10_940, 8_098),
        ("v1_nonlegacy", "v1", False, three_rounds, 10_880, 8_098),
        ("plain_legacy", "plain", True, captions, 1_317, 1_157),
    ],
)
def test_every_id_and_label(shared, llama, case, template, legacy, conversations, ids, targets):
    golden = read_json(shared / "golden" / "llava_label_masks.json")["cases"][case]
    processor = ConversationProcessor(llama, template, visual_tokens=256, legacy=legacy)
    rows = []
    for conversation, row in zip(conversations(shared), golden, strict=True):
        example = processor.example(conversation)
        at = example["image_at"]
        assert conversation.id == row["id"]
        assert np.insert(example["tokens"], at, IMAGE_ID).tolist() == row["input_ids"]
        rows.append(np.insert(example["targets"], at, IGNORE))
        assert rows[-1].tolist() == row["labels"]
        assert not example["truncated"].any()
    assert sum(map(len, rows)) == ids
    assert sum((row != IGNORE).sum() for row in rows) == targets

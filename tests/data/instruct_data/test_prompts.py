"""Folders of prompts: the shipped one, the published one, and what is wrong in others."""

import shutil

import pytest

from jax_instructblip.data.contexts import Box, Context
from jax_instructblip.data.instruct_data.kinds import KINDS
from jax_instructblip.data.instruct_data.prompts import SHIPPED, read_prompts
from jax_instructblip.data.records import RecordError

CONTEXT = Context("1", "1.jpg", ("A cup.",), (Box("cup", (0, 0, 1, 1)),))
BOXES = "A cup.\n\ncup: [0.0, 0.0, 1.0, 1.0]"


def test_the_shipped_prompts_show_boxes_to_two_of_three_kinds():
    prompts = read_prompts()
    assert list(prompts) == list(KINDS)
    for kind, each in prompts.items():
        messages = each.messages(CONTEXT)
        roles = [message["role"] for message in messages]
        assert roles == ["system", *["user", "assistant"] * 2, "user"]
        boxed = kind != "conversation"
        assert messages[-1]["content"] == (BOXES if boxed else "A cup.")
        assert [": [" in message["content"] for message in messages[1:-1:2]] == [boxed] * 2


def test_the_published_prompts_are_sent_byte_for_byte(shared):
    folder = shared / "data/llava/prompts"
    for kind, each in read_prompts(folder).items():
        names = sorted(path.name for path in (folder / kind).glob("0*_*.txt"))
        texts = [(folder / kind / name).read_bytes() for name in ["system_message.txt", *names]]
        assert [m["content"].encode() for m in each.messages(CONTEXT)[:-1]] == texts


@pytest.fixture
def folder(tmp_path):
    return shutil.copytree(SHIPPED, tmp_path / "prompts")


def test_every_text_changes_the_digest(folder):
    before = read_prompts(folder)["conversation"].digest()
    assert before == read_prompts()["conversation"].digest()
    for path in sorted((folder / "conversation").glob("*.txt")):
        text = path.read_text()
        path.write_text(text.replace("a ", "one ", 1))
        assert read_prompts(folder)["conversation"].digest() != before, path
        path.write_text(text)


def test_everything_that_is_wrong_in_a_folder_is_named(folder):
    shutil.rmtree(folder / "conversation")
    detail, complex_ = folder / "detail_description", folder / "complex_reasoning"
    (detail / "000_caps.txt").write_text("a\n\ncup: [0, 0, 1, 2]")
    (detail / "001_conv.txt").unlink()
    (detail / "notes.txt").touch()
    (complex_ / "000_conv.txt").write_text("It is so.")
    (complex_ / "system_message.txt").write_text("\n")
    with pytest.raises(RecordError) as error:
        read_prompts(folder)
    for problem in (
        "conversation/system_message.txt is missing",
        "000_caps.txt:3: 'cup: [0, 0, 1, 2]': the box of cup",
        "001_conv.txt is missing",
        "notes.txt is neither",
        "complex_reasoning/000_conv.txt: part 1 begins with 'It is so.'",
        "complex_reasoning/system_message.txt is empty",
    ):
        assert problem in str(error.value)
    assert len(error.value.problems) == 6


def test_no_folder_and_an_unknown_kind(tmp_path):
    with pytest.raises(FileNotFoundError, match="no folder of prompts"):
        read_prompts(tmp_path / "none")
    with pytest.raises(ValueError, match="unknown kind of request 'conversations'; did you mean"):
        read_prompts(kinds=["conversations"])

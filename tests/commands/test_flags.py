"""Numbers and paths among the flags of verbs, checked before anything is done."""

import argparse
import re

import pytest

from jax_instructblip.__main__ import find_verbs, main
from jax_instructblip.commands.flags import NUMBERS, check_flags

ASK = ["--checkpoint", "none", "--image", "a.png", "--prompt", "what?"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["export", "a", "--format", "hf", "--out", "b", "--shard_bytes", "0"],
            "--shard_bytes",
        ),
        (
            ["rank", *ASK, "--candidates", "a,b", "--batch_size", "10000000"],
            "--batch_size is",
        ),
        (["check", "a.jsonl", "--samples", "-1"], "--samples is -1, expected at least 0"),
        (
            ["prepare", "vsr", "--raw", "a", "--out", "b", "--max_missing", "nan"],
            "--max_missing is",
        ),
        (
            ["prepare", "vsr", "--raw", "a", "--out", "b", "--workers", "-1"],
            "--workers is -1",
        ),
        (
            ["plan", "--config", "a", "--topology", "cpu:1", "--tries", "0"],
            "--tries is 0",
        ),
        (
            ["backbones", "towers", "a", "--scale", "nan"],
            "--scale is nan, expected a fin",
        ),
        (["backbones", "stage1", "a", "b", "--word_std", "0"], "--word_std is 0.0, expected above"),
        (["backbones", "towers", "a", "--seed", "4294967296"], "--seed is 4294967296, expected"),
        (
            ["evaluate", "--checkpoint", "a", "--wait_limit", "1e30"],
            "--wait_limit is 1e+30, expected above 0 and at most",
        ),
        (
            ["rank", *ASK[:-1], "a\udce4", "--candidates", "a,b"],
            "--prompt cannot be written",
        ),
    ],
)
def test_a_flag_out_of_its_range_is_named_and_nothing_is_done(
    words, message, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message}") and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_all_flags_are_reported_together():
    flags = argparse.Namespace(top=0, workers=2.5, out=None, image=["s3://a/b"], prompt=["\ud800"])
    with pytest.raises(ValueError) as error:
        check_flags(flags)
    for name in ("--top is 0", "--workers is 2.5", "image is s3://a/b", "--prompt cannot"):
        assert name in str(error.value)


def test_every_number_that_a_verb_takes_has_a_row():
    taken = set()
    for path in find_verbs().values():
        taken |= set(re.findall(r'"--(\w+)"[^)]*?type=(?:int|float)', path.read_text(), re.DOTALL))
    decoding = {"length_penalty", "max_new_tokens", "min_new_tokens", "num_beams", "top_k", "top_p"}
    decoding |= {"num_return_sequences", "repetition_penalty", "temperature"}
    assert taken - decoding <= set(NUMBERS)

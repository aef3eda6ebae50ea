"""Checkpoints of an earlier version continue a run where newer fields have their defaults."""

import pytest

from jax_instructblip.checkpoint import CheckpointError
from jax_instructblip.data.input_format import InputFormat
from jax_instructblip.inference.text_loading import load_text
from jax_instructblip.training.run_meta import compare_meta, text_facts
from tests.helpers.tiny import tiny_variant, write_base


def meta(variant):
    return {"variant": variant, "trainable": ["qformer"], "base": {"sha256": "a", "path": "b"}}


def test_a_field_that_an_earlier_version_lacks_has_its_default():
    stored = tiny_variant("t5").to_dict()
    for name in ("activation", "pre_norm", "key_bias", "patch_bias", "align_corners"):
        del stored["vision"][name]
    compare_meta("3", meta(stored), meta(tiny_variant("t5").to_dict()))
    clip = tiny_variant("t5", **{"vision.pre_norm": True}).to_dict()
    with pytest.raises(CheckpointError, match="vision.pre_norm is False, the run has True"):
        compare_meta("3", meta(stored), meta(clip))


def test_a_run_says_how_its_model_is_asked(tmp_path):
    text = load_text(write_base(tmp_path / "base", "llama"), template="v1")
    facts = text_facts(text)
    assert facts["text"] == {"qformer_limit": 128, "prompt_limit": 128, "answer_limit": 256}
    assert InputFormat.from_dict(facts["input_format"]) == InputFormat("v1")

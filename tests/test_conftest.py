import jax.numpy as jnp
import jaxtyping
import pytest

from jax_instructblip.models import masks


def test_shapes_of_models_are_checked_in_tests():
    with pytest.raises(jaxtyping.TypeCheckError):
        masks.padding_mask(jnp.ones((2, 3, 4, 5), bool))


def test_ranks_are_not_promoted():
    with pytest.raises(ValueError, match="rank_promotion"):
        jnp.add(jnp.ones((2, 3)), jnp.ones(3))


def test_forge_makes_a_folder_once(forge):
    folder = forge("instructblip-vicuna-7b", dtype="bfloat16")
    assert (folder / "config.json").is_file()
    assert (folder / "qformer_tokenizer").is_dir()
    assert forge("instructblip-vicuna-7b", dtype="bfloat16") == folder
    assert forge("instructblip-vicuna-7b") != folder

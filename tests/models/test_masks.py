import jax.numpy as jnp
import numpy as np
import pytest

from jax_instructblip.models.masks import (
    causal_mask,
    lineage_mask,
    padding_mask,
    segment_mask,
    tree_mask,
)


def drawn(picture: str) -> np.ndarray:
    return np.array([[mark == "#" for mark in line.split()] for line in picture.split("\n")])


def valid(lengths, width):
    return jnp.arange(width)[None, :] < jnp.array(lengths)[:, None]


def test_padding_mask_shows_every_real_key_to_everybody():
    mask = padding_mask(valid([3, 1], 4))
    assert mask.shape == (2, 1, 1, 4)
    assert (np.broadcast_to(mask[0, 0], (2, 4)) == drawn("# # # .\n# # # .")).all()
    assert (np.broadcast_to(mask[1, 0], (2, 4)) == drawn("# . . .\n# . . .")).all()


SEGMENTS = jnp.array([[1, 1, 2, 2, 0], [1, 1, 1, 0, 0]])


def test_causal_mask_hides_what_comes_and_other_samples():
    mask = causal_mask(SEGMENTS)
    assert mask.shape == (2, 1, 5, 5)
    two = "# . . . .\n# # . . .\n. . # . .\n. . # # .\n. . . . #"
    assert (mask[0, 0] == drawn(two)).all()
    one = "# . . . .\n# # . . .\n# # # . .\n. . . # .\n. . . # #"
    assert (mask[1, 0] == drawn(one)).all()


def test_segment_mask_shows_a_sample_its_own_slots_in_both_rows():
    mask = segment_mask(SEGMENTS, jnp.array([[1, 2, 0], [1, 1, 1]]))
    assert mask.shape == (2, 1, 5, 3)
    assert (mask[0, 0] == drawn("# . .\n# . .\n. # .\n. # .\n. . #")).all()
    assert (mask[1, 0] == drawn("# # #\n# # #\n# # #\n. . .\n. . .")).all()


@pytest.mark.parametrize(
    "step, picture",
    [
        (0, ". . . . . .\n. . . . . ."),
        (1, "# . . . . .\n# . . . . ."),
        (3, "# . # . # .\n# . . # . #"),
    ],
)
def test_lineage_mask_shows_the_slots_that_a_row_continues(step, picture):
    lineage = jnp.array([[[0, 0, 0], [0, 1, 1]], [[1, 1, 1], [0, 0, 0]]])
    mask = lineage_mask(lineage, jnp.int32(step))
    assert mask.shape == (2, 1, 2, 6)
    assert (mask[0, 0] == drawn(picture)).all()
    if step == 3:
        assert (mask[1, 0] == drawn(". # . # . #\n# . # . # .")).all()


def test_tree_mask_shows_each_token_its_ancestors():
    mask = tree_mask(jnp.array([[4, 3, 3, 4, 6, 6], [1, 2, 3, 4, 5, 6]]))
    assert mask.shape == (2, 1, 6, 6)
    picture = "# . . . . .\n# # . . . .\n# # # . . .\n# . . # . .\n. . . . # .\n. . . . # #"
    assert (mask[0, 0] == drawn(picture)).all()
    assert (mask[1, 0] == np.eye(6)).all()

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_instructblip.training.optimizer import adamw
from jax_instructblip.training.state import create_state, partition

PARAMS = {
    "vision": {"cls": np.ones((1, 1, 2))},
    "qformer": {"queries": np.ones((1, 3, 2))},
    "llm": {"norm": {"scale": np.ones(2)}},
}


def test_partition():
    chosen, frozen = partition(PARAMS, ("qformer",))
    assert chosen == {"qformer": PARAMS["qformer"]}
    assert list(frozen) == ["vision", "llm"]
    assert list(partition(PARAMS, ("vision", "qformer"))[1]) == ["llm"]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("qfomer",), r"cannot train \['qfomer'\].*vision, qformer, llm; did you mean 'qformer'\?"),
        ((), r"cannot train \[\]"),
        (("qformer", "projector"), r"\['projector'\].*'projector' is a part of LLaVA"),
        (("qformer", "heads"), r"\['heads'\].*'heads' is a part of BLIP-2's first stage"),
    ],
)
def test_partition_refuses(names, message):
    with pytest.raises(ValueError, match=message):
        partition(PARAMS, names)


def test_a_new_state_is_a_float32_copy():
    given = {"queries": jnp.ones((1, 3, 2), jnp.bfloat16)}, {"queries": jnp.ones((1, 3, 2))}
    for tree in given:
        state = create_state({"qformer": tree}, adamw(lambda _: 0.1))
        kept = state.params["qformer"]["queries"]
        assert kept.dtype == jnp.float32
        assert kept is not tree["queries"]
        assert kept.unsafe_buffer_pointer() != tree["queries"].unsafe_buffer_pointer()
        assert (state.step, state.step.dtype) == (0, jnp.int32)
        assert all(not leaf.any() for leaf in jax.tree.leaves(state.optimizer))

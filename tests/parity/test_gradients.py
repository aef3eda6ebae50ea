"""The gradient of every Q-Former tensor against transformers', in float32."""

import numpy as np
import pytest

from jax_instructblip.checkpoint.trees import flatten
from tests.helpers import towers

GRADIENT = 1e-4  # of the largest gradient of the tower

# softmax does not see what is added to all scores of a query: these gradients are rounding noise.
KEY_BIASES = tuple(
    f"qformer/layers/{kind}/key/bias"
    for kind in ("cross/attention", "cross/cross_attention", "plain/attention")
)
# The last layer's text outputs are read by nobody; its layer is the last of the plain ones.
LAST_TEXT = "qformer/layers/plain/text_mlp"


@pytest.mark.parametrize("name", towers.FOLDERS)
def test_gradients(read_pair, name):
    pair = read_pair(name)
    expected, found = pair.torch_gradients(), flatten({"qformer": pair.ours[1]})
    assert expected.keys() == found.keys()
    assert set(KEY_BIASES) < expected.keys()
    top = max(np.abs(leaf).max() for leaf in expected.values())
    for path, theirs in expected.items():
        ours = np.asarray(found[path])
        assert np.abs(ours - theirs).max() < GRADIENT * top, path
        if path in KEY_BIASES:
            assert np.abs(ours).max() < 1e-6 * top, path
            continue
        layers = list(theirs) if "/layers/" in path else [theirs]
        if path.startswith(LAST_TEXT):
            assert not np.any(layers.pop()) and not np.any(ours[-1]), path
        assert all(np.any(layer) for layer in layers), path

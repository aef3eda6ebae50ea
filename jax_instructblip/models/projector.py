"""LLaVA's projector: maps each patch of an image to one vector of the language model's width.

v1 has one linear layer, v1.5 two with an erf-GELU between them (`mlp2x_gelu`). CLS is left out.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jax_instructblip.models.dense import Dense
from jax_instructblip.models.layers import ACTIVATIONS, Network, Scan, constrain
from jax_instructblip.models.variants import ProjectorConfig


class Projector(Network):
    """Maps the patch features of an image to vectors of the language model's width."""

    config: ProjectorConfig
    dtype: Any
    scan: Scan = Scan()  # unused: a projector has no layers to scan, other bridges do

    @nn.compact
    def __call__(
        self,
        patches: Float[Array, "B P Dv"],
        tokens: Int[Array, "B L"] | None = None,
        valid: Bool[Array, "B L"] | None = None,
        train: bool = False,
    ) -> Float[Array, "B Q Dl"]:
        """Q = P - 1 vectors per image, in patch order; all other arguments are ignored."""
        del tokens, valid, train
        width = self.config.llm_width
        x = Dense((width,), self.dtype, name="in")(patches[:, 1:])
        if self.config.layers == 2:
            x = Dense((width,), self.dtype, name="out")(ACTIVATIONS["gelu"](x.astype(jnp.float32)))
        return constrain(x)

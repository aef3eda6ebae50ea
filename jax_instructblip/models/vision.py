"""The vision encoder: maps images to patch features.

EVA ViT-g/14 and CLIP ViT-L/14 differ in fields of `VisionConfig` alone. The released networks have
40 and 24 blocks. The features are the residual stream after block 39, or 23, so the last block, the
final norm and the head are left out. The layer norm that follows is trained and therefore belongs
to the Q-Former (`image_norm`). LLaVA's files hold the last block and the final norm all the same:
these are parameters below `unused`, so that a file can be written again, and are never computed.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from jax_instructblip.models.attention import Attention
from jax_instructblip.models.layers import (
    RESIDUAL,
    LayerNorm,
    Mlp,
    Network,
    Scan,
    constrain,
    scan_layers,
)
from jax_instructblip.models.variants import IMAGE_MEAN, IMAGE_STD, VisionConfig


def normalise(images: UInt8[Array, "*B 3"] | Float[Array, "*B 3"]) -> Float[Array, "*B 3"]:
    """CLIP-normalised float32 pixels of uint8 images; float images are returned as they are."""
    if jnp.issubdtype(images.dtype, jnp.floating):
        return images
    shape = (1,) * (images.ndim - 1) + (3,)
    mean, std = jnp.reshape(jnp.array(IMAGE_MEAN), shape), jnp.reshape(jnp.array(IMAGE_STD), shape)
    return (images.astype(jnp.float32) / 255.0 - mean) / std


class VisionBlock(nn.Module):
    """A pre-norm block; the config says whether keys have a bias, and the activation."""

    config: VisionConfig
    dtype: Any
    fused: str = ""

    @nn.compact
    def __call__(self, x: Float[Array, "B P D"], _: None) -> tuple[Float[Array, "B P D"], None]:
        c = self.config
        attention = Attention(
            c.width,
            c.heads,
            c.width // c.heads,
            self.dtype,
            biases=("query", *(("key",) if c.key_bias else ()), "value", "out"),
            bias_dtype=self.dtype,
            fused=self.fused,
            name="attention",
        )
        y = LayerNorm(c.norm_eps, name="attention_norm")(x)
        x = constrain(x + attention(y, y))
        y = LayerNorm(c.norm_eps, name="mlp_norm")(x)
        mlp = Mlp(c.width, c.mlp, self.dtype, c.activation, bias_dtype=self.dtype, name="mlp")
        return constrain(x + mlp(y)), None


class VisionTransformer(Network):
    """Maps images to patch features, CLS first."""

    config: VisionConfig
    dtype: Any
    scan: Scan = Scan()

    @nn.compact
    def __call__(self, images: Array) -> Float[Array, "B P D"]:
        """The residual stream `[B, P, D]` after the last block, P = 1 + (H / patch)^2.

        `images` are `[B, H, W, 3]`: uint8, or floats that are normalised already.

        Raises:
            ValueError: the images do not have the size that the position embeddings are made for.
        """
        c = self.config
        if images.shape[1:] != (c.image_size, c.image_size, 3):
            raise ValueError(
                f"images have shape {images.shape}, expected [B, {c.image_size}, {c.image_size}, "
                "3]: resize them as data/images.py does"
            )
        patches = nn.Conv(
            c.width,
            (c.patch_size, c.patch_size),
            strides=(c.patch_size, c.patch_size),
            padding="VALID",
            use_bias=c.patch_bias,
            dtype=self.dtype,
            name="patch_embed",
        )(normalise(images).astype(self.dtype))
        patches = patches.reshape(images.shape[0], -1, c.width)  # [B, P-1, D], row-major
        small = nn.initializers.truncated_normal(0.02)
        cls = self.param("cls", small, (1, 1, c.width)).astype(RESIDUAL)
        positions = self.param("pos_embed", small, (1, c.tokens, c.width)).astype(RESIDUAL)
        cls = jnp.broadcast_to(cls, (images.shape[0], 1, c.width))
        x = constrain(jnp.concatenate([cls, patches], axis=1) + positions)
        if c.pre_norm:
            x = LayerNorm(c.norm_eps, name="pre_norm")(x)
        make = scan_layers(VisionBlock, c.computed_layers, self.scan, call=0)
        x = make(c, self.dtype, self.scan.fused, name="layers")(x, None)[0]
        if self.is_initializing() and (c.unused_layers or c.post_norm):
            Unused(c, self.dtype, name="unused")(x)
        return x


class Unused(nn.Module):
    """The blocks and the norm after the features; runs only to make parameters."""

    config: VisionConfig
    dtype: Any

    @nn.compact
    def __call__(self, x: Float[Array, "B P D"]) -> Float[Array, "B P D"]:
        c = self.config
        if c.unused_layers:
            make = scan_layers(VisionBlock, c.unused_layers, Scan(), call=0)
            x = make(c, self.dtype, name="layers")(x, None)[0]
        return LayerNorm(c.norm_eps, name="norm")(x) if c.post_norm else x

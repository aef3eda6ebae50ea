"""InstructBLIP on one page: image and instruction to logits.

    images  [B, F, H, W, 3] uint8                 a still image has F = 1
       --vision-->  patches [B*F, P, Dv]          frozen: no gradient is ever asked of it
       --qformer, with the instruction-->  visual prompt [B, F*Q, Dl]
    [visual prompt ; embed(tokens)] --llm-->  logits [B, T, V]

A batch is a dict; training adds the last two rows:

    images          [B, F, H, W, 3]  uint8, or floats that are normalised already; one row alone
                                     where all prompts are about one picture
    qformer_tokens  [B, L]  int32    the instruction in BERT ids
    qformer_mask    [B, L]  bool     False on padding, which stands at the end only (everywhere)
    tokens          [B, T]  int32    the instruction (LLaMA in training: and the answer)
    mask            [B, T]  bool
    targets         [B, T or U]      read by the loss, not by the model
    decoder_tokens  [B, U]  int32    T5 only: targets shifted right
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jax_instructblip.models.layers import Network, Scans, constrain, separate_layers
from jax_instructblip.models.llama import Llama
from jax_instructblip.models.qformer import QFormer
from jax_instructblip.models.t5 import T5
from jax_instructblip.models.variants import Variant
from jax_instructblip.models.vision import VisionTransformer

LANGUAGE_MODELS = {"t5": T5, "llama": Llama}
# The layers that decode, whose parameters may be taken apart (`layers.Scan.separate`).
DECODERS = {"t5": "llm/decoder/layers", "llama": "llm/layers"}

Batch = dict[str, Array]


class InstructBlip(Network):
    """The whole model; `dtype` is what it computes in, whatever its parameters are stored in.

    `scans` is how its layers are run, which changes no value: `layers.Scan`.
    """

    variant: Variant
    dtype: Any = jnp.float32
    scans: Scans = Scans()

    def setup(self):
        if self.variant.llm.kind == "t5" and self.dtype == jnp.float16:
            raise ValueError(
                "T5 cannot compute in float16: its feed-forwards overflow (activations near 1e5); "
                "use bfloat16 or float32"
            )
        v, scans = self.variant, self.scans
        self.vision = VisionTransformer(v.vision, self.dtype, scans.vision)
        self.qformer = QFormer(v.qformer, self.dtype, scans.qformer)
        self.llm = LANGUAGE_MODELS[v.llm.kind](v.llm, self.dtype, scans.llm)

    def __call__(self, batch: Batch, train: bool = False) -> Float[Array, "B T V"]:
        """Float32 logits, aligned with the batch's targets."""
        inputs, real = self.prompt(batch, train)
        skip = inputs.shape[1] - batch["tokens"].shape[1]
        return self.llm(inputs, real, batch.get("decoder_tokens"), skip=skip, train=train)

    def encode_image(self, images: Array) -> Float[Array, "B P Dv"]:
        """Patch features `[B*F, P, Dv]` of all frames."""
        return self.vision(images.reshape(-1, *images.shape[2:]))

    def visual_prompt(self, batch: Batch, train: bool = False) -> Float[Array, "B Q Dl"]:
        """What the language model sees of the image: `[B, F*Q, Dl]`, frame after frame.

        Each frame is looked at with the same instruction; nothing marks its time (as released).
        """
        rows, frames = batch["tokens"].shape[0], batch["images"].shape[1]
        patches = self.encode_image(batch["images"])
        if len(batch["images"]) != rows:  # one picture of all prompts
            patches = jnp.tile(patches, (rows, 1, 1))
        text = [batch.get(name) for name in ("qformer_tokens", "qformer_mask")]
        if frames > 1:
            text = [None if leaf is None else jnp.repeat(leaf, frames, axis=0) for leaf in text]
        seen = self.qformer(patches, *text, train=train)
        return constrain(seen.reshape(rows, -1, seen.shape[-1]))

    def prompt(self, batch: Batch, train: bool = False) -> tuple[Array, Array]:
        """The embedded row [visual prompt ; tokens] and which of its positions are real."""
        seen = self.visual_prompt(batch, train)
        inputs = jnp.concatenate([seen, self.llm.embed(batch["tokens"])], axis=1)
        real = jnp.concatenate([jnp.ones(seen.shape[:2], bool), batch["mask"]], axis=1)
        return constrain(inputs), real

    def prefill(self, batch: Batch, tail_length: int) -> tuple[Float[Array, "B 1 V"], Any]:
        """Logits of the first new token, and the cache that the LLM's `prefill` draws."""
        return self.llm.prefill(*self.prompt(batch), tail_length)

    def decode_step(
        self, token: Int[Array, "B R"], cache: dict[str, Any]
    ) -> tuple[Float[Array, "B R V"], dict[str, Any]]:
        """Logits of the token after `token`, and the cache one token longer."""
        return self.llm.decode_step(token, cache)

    def decode_tree(
        self,
        tokens: Int[Array, "#B T"],
        depths: Int[Array, "#B T"],
        ends: Int[Array, "#B T"],
        cache: dict[str, Any],
    ) -> Float[Array, "B T D"]:
        """Hidden states of a tree of continuations in depth-first order, as the LLM says."""
        return self.llm.decode_tree(tokens, depths, ends, cache)

    def logits(self, x: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Float32 vocabulary logits of the LLM's hidden states."""
        return self.llm.logits(x)


def example_batch(variant: Variant, batch: int = 1, text: int = 4) -> Batch:
    """A batch of zeros with the right keys, shapes and dtypes, for `init` and `eval_shape`."""
    size = variant.vision.image_size
    tokens, mask = jnp.zeros((batch, text), jnp.int32), jnp.ones((batch, text), bool)
    made = {
        "images": jnp.zeros((batch, 1, size, size, 3), jnp.uint8),
        "qformer_tokens": tokens,
        "qformer_mask": mask,
        "tokens": tokens,
        "mask": mask,
        "targets": tokens,
    }
    return {**made, "decoder_tokens": tokens} if variant.llm.kind == "t5" else made


def init_params(variant: Variant, key: Array) -> dict[str, Any]:
    """Random float32 parameters: {'vision': ..., 'qformer': ..., 'llm': ...}."""
    return dict(InstructBlip(variant).init(key, example_batch(variant))["params"])


def param_shapes(variant: Variant) -> dict[str, Any]:
    """Shapes and (float32) dtypes of all parameters, without making any."""
    return jax.tree.map(lambda leaf: leaf, _param_shapes(variant))  # a tree of the caller's own


@functools.lru_cache(maxsize=16)
def _param_shapes(variant: Variant) -> dict[str, Any]:
    """Traced once: it takes about a second, and a command asks ten times."""
    return jax.eval_shape(lambda key: init_params(variant, key), jax.random.key(0))


def separate_decoder(variant: Variant, params: dict[str, Any]) -> dict[str, Any]:
    """`params` for a model whose `scans.llm` is `separate`: one tree for each decoding layer.

    Leaves of these layers may be tuples instead of stacks. The kernel of the head becomes `[V, D]`.
    """

    def replace(tree: dict[str, Any], path: list[str]) -> dict[str, Any]:
        name, *rest = path
        changed = replace(tree[name], rest) if rest else separate_layers(tree[name])
        return {**tree, name: changed}

    found = replace(params, DECODERS[variant.llm.kind].split("/"))
    head = {"kernel": jnp.asarray(found["llm"]["head"]["kernel"]).T}
    return {**found, "llm": {**found["llm"], "head": head}}


def is_separate(variant: Variant, params: dict[str, Any]) -> bool:
    """Whether `separate_decoder` made these parameters."""
    for name in DECODERS[variant.llm.kind].split("/"):
        params = params[name]
    return "0" in params

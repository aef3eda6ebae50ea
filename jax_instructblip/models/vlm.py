"""The generative models, InstructBLIP, BLIP-2 and LLaVA: images and text to logits.

    images  [G, I, H, W, 3] uint8                  the I images of each row; one still image: I = 1
       --vision-->  patches [G*I, P, Dv]           frozen: its gradient is never computed
                    (a batch may have `patches` [G, I, P, Dv] bfloat16 in place of `images`)
       --bridge, with the instruction-->  visual vectors [G, I*Q, Dl]
    row of X slots: each is a token, or the visual vector that `slots` names
       --llm-->  logits [G, A, V] of the slots `asked`

A batch is a dict of arrays with G rows. `data/spec.py` lists its keys with their types, axes and
padding. A row holds one sample, or several that do not see each other (`segments`):

    tokens     a  b  .  .  c  d  e  .        ids; ignored where a slot is a visual vector
    slots     -1 -1  0  1 -1 -1 -1 -1        -1: a token; else the index of a visual vector
    segments   1  1  1  1  1  2  2  0        number of the sample that owns the slot; 0: padding
    positions  0  1  2  3  4  0  1  0        position in the sample
    asked      3  5                          slots that predict the `targets` (T5: decoder slots)
    places     2  3                          slot of each visual vector: the inverse of `slots`

InstructBLIP and BLIP-2 put the image first, LLaVA inside a turn; only `slots` differs.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jax_instructblip.models import blip2
from jax_instructblip.models.dense import WordFactors, kernel_by_word
from jax_instructblip.models.layers import (
    RESIDUAL,
    Network,
    Scans,
    constrain,
    take_slots,
    unstack_layers,
)
from jax_instructblip.models.llama import Llama
from jax_instructblip.models.opt import Opt
from jax_instructblip.models.projector import Projector
from jax_instructblip.models.protocols import Bridge, LanguageModel
from jax_instructblip.models.qformer import QFormer
from jax_instructblip.models.t5 import T5
from jax_instructblip.models.variants import LanguageConfig, Variant
from jax_instructblip.models.vision import VisionTransformer

BRIDGES: dict[str, Any] = {"qformer": QFormer, "projector": Projector}
LANGUAGE_MODELS: dict[str, Any] = {"t5": T5, "llama": Llama, "opt": Opt}
# Path of the layers that decode, whose parameters may be unstacked (`layers.Scan.unstacked`).
DECODERS = {"t5": "llm/decoder/layers", "llama": "llm/layers", "opt": "llm/layers"}

Batch = dict[str, Array]


class VisionLanguageModel(Network):
    """A whole generative model: vision tower, bridge and language model.

    `variant` holds the sizes. `dtype` is the compute dtype, whatever the parameters are stored in.
    `scans` sets how layers run (rematerialised, unstacked) and changes no result.
    """

    variant: Variant
    dtype: Any = jnp.float32
    scans: Scans = Scans()

    def setup(self):
        v, scans = self.variant, self.scans
        if v.llm.kind == "t5" and self.dtype == jnp.float16:
            raise ValueError(
                "T5 cannot compute in float16: its feed-forwards overflow (activations near 1e5); "
                "use bfloat16 or float32"
            )
        self.vision = VisionTransformer(v.vision, self.dtype, scans.vision)
        bridge = BRIDGES[v.bridge.key](v.bridge, self.dtype, scans.qformer, name=v.bridge.key)
        self.bridge: Bridge = bridge
        self.llm: LanguageModel = LANGUAGE_MODELS[v.llm.kind](v.llm, self.dtype, scans.llm)

    @property
    def vocabulary(self) -> LanguageConfig:
        """The language model's config, which holds the ids that the decoding loops need."""
        return self.variant.llm

    def __call__(self, batch: Batch, train: bool = False) -> Float[Array, "G A V"]:
        """Float32 logits that predict the batch's `targets`, in their order."""
        return self.logits(self.asked_states(batch, train))

    def asked_factors(self, batch: Batch, train: bool = False) -> WordFactors:
        """The factors whose product, `dense.word_logits`, is the result of `__call__`.

        They are for a loss that does not hold all of the logits; layers must not be unstacked.
        """
        return self.llm.factors(self.asked_states(batch, train))

    def asked_states(self, batch: Batch, train: bool = False) -> Float[Array, "G A Dl"]:
        """Hidden states from which `logits` predicts the batch's `targets`, in their order.

        `batch["asked"]` holds the slots that they belong to: slots of a row, for T5 of the
        decoder's row.
        """
        inputs = self.embed_row(batch, train)
        decoder = {name: batch[name] for name in batch if name.startswith("decoder_")}
        rows = batch["segments"], batch["positions"], batch["asked"]
        return self.llm.asked_states(inputs, *rows, **decoder, train=train)

    def encode_image(self, images: Array) -> Float[Array, "B P Dv"]:
        """Patch features `[G*I, P, Dv]` of all images `[G, I, H, W, 3]` of all rows."""
        return self.vision(images.reshape(-1, *images.shape[2:]))

    def visual_vectors(self, batch: Batch, train: bool = False) -> Float[Array, "G S Dl"]:
        """The visual vectors of each row, `[G, I*Q, Dl]`: Q per image, images in order.

        The bridge reads each image with the instruction of the sample that owns it. The frames of a
        video carry no mark of time, as in the original model. If all rows ask about the same
        images, `images` may have a first axis of size 1.
        """
        rows = batch["tokens"].shape[0]
        if "patches" in batch:  # computed before; the vision tower is no part of the program
            stored = batch["patches"]
            patches = stored.reshape(-1, *stored.shape[2:]).astype(RESIDUAL)
        else:
            patches = self.encode_image(batch["images"])
            if len(batch["images"]) != rows:
                patches = jnp.tile(patches, (rows, 1, 1))
        tokens, valid = self._instructions(batch)
        vectors = self.bridge(patches, tokens, valid, train=train)
        return constrain(vectors.reshape(rows, -1, vectors.shape[-1]))

    def embed_row(self, batch: Batch, train: bool = False) -> Float[Array, "G X Dl"]:
        """The language model's input: each slot is an embedded token or a visual vector.

        The batch's `slots` says which.
        """
        tokens = self.llm.embed(batch["tokens"])
        visual = take_slots(self.visual_vectors(batch, train), batch["slots"], batch["places"])
        return constrain(jnp.where((batch["slots"] >= 0)[..., None], visual, tokens))

    def prefill(self, batch: Batch, tail_length: int) -> tuple[Float[Array, "B 1 V"], Any]:
        """Logits of the first new token of each row, and the language model's cache (`cache.py`).

        A row holds one sample (J = 1) with padding at its end; the cache has space for
        `tail_length` new tokens.
        """
        return self.llm.prefill(self.embed_row(batch), batch["segments"] > 0, tail_length)

    def decode_step(
        self, token: Int[Array, "B R"], cache: dict[str, Any]
    ) -> tuple[Float[Array, "B R V"], dict[str, Any]]:
        """Logits of the token after `token`, and the cache with `token` added; R are beams."""
        return self.llm.decode_step(token, cache)

    def decode_tree(
        self,
        tokens: Int[Array, "#B T"],
        depths: Int[Array, "#B T"],
        ends: Int[Array, "#B T"],
        cache: dict[str, Any],
    ) -> Float[Array, "B T D"]:
        """Hidden states of many continuations of a prompt, given as one tree in depth-first order.

        `depths` is 1 for a token that follows the prompt; `ends[b, t]` is the index just after the
        last descendant of token t. `cache` comes from `prefill` and is only read.
        """
        return self.llm.decode_tree(tokens, depths, ends, cache)

    def logits(self, x: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Float32 vocabulary logits of the language model's hidden states."""
        return self.llm.logits(x)

    def make_params(self) -> None:
        """Runs every tower once on the smallest inputs, so that `init` makes all parameters."""
        size, ones = self.variant.vision.image_size, jnp.ones((1, 2), jnp.int32)
        patches = self.vision(jnp.zeros((1, size, size, 3), jnp.uint8))
        reads = self.variant.reads_instruction
        inputs = self.bridge(patches, *((ones, ones > 0) if reads else (None, None)))[:, :2]
        if self.variant.llm.encoder_decoder:
            self.llm(inputs, ones, ones, ones, decoder_tokens=ones, decoder_segments=ones)
        else:
            self.llm(inputs, ones, ones, ones)
        self.llm.embed(ones)

    def _instructions(self, batch: Batch) -> tuple[Array | None, Array | None]:
        """Ids and mask `[G*I, L]` of each image's instruction, or (None, None).

        Both are None if the bridge does not read the instruction.
        """
        if not self.variant.reads_instruction:
            return None, None
        # Unused images (sample 0) get the first instruction; no slot refers to their vectors.
        owner = jnp.maximum(batch["image_sample"] - 1, 0)[..., None]
        of_image = lambda name: jnp.take_along_axis(batch[name], owner, axis=1)
        flat = lambda leaf: leaf.reshape(-1, leaf.shape[-1])
        return flat(of_image("qformer_tokens")), flat(of_image("qformer_mask"))


Model = VisionLanguageModel | blip2.Blip2


def model_of(variant: Variant, dtype: Any = jnp.float32, scans: Scans | None = None) -> Model:
    """The Flax model of a variant: `Blip2` without a language model, else `VisionLanguageModel`.

    `dtype` is the compute dtype; `scans` None stands for `Scans()`.
    """
    page = VisionLanguageModel if variant.llm is not None else blip2.Blip2
    return page(variant, dtype, scans or Scans())


@functools.partial(jax.jit, static_argnums=0)  # twice as fast as one small program an array
def init_params(variant: Variant, key: Array) -> dict[str, Any]:
    """Random float32 parameters: {'vision': ..., 'qformer' or 'projector': ..., 'llm': ...}."""
    if variant.llm is None:
        return blip2.init_params(variant, key)
    return dict(VisionLanguageModel(variant).init(key, method="make_params")["params"])


def param_shapes(variant: Variant) -> dict[str, Any]:
    """The tree of all parameters as `jax.ShapeDtypeStruct`s, float32: nothing is allocated."""
    return jax.tree.map(lambda leaf: leaf, _param_shapes(variant))  # a copy: callers may change it


@functools.lru_cache(maxsize=16)
def _param_shapes(variant: Variant) -> dict[str, Any]:
    """The cached result of `param_shapes`: tracing takes a second, and a command needs it often."""
    return jax.eval_shape(lambda key: init_params(variant, key), jax.random.key(0))


def unstack_decoder(variant: Variant, params: dict[str, Any]) -> dict[str, Any]:
    """Returns `params` with one tree per decoding layer, for a model with `scans.llm.unstacked`.

    Leaves of these layers may be stacks or tuples of layers. The head's kernel becomes that of
    `kernel_by_word`. OPT has none: its head is the token embedding, which is `[V, D]` already.
    """

    def replace(tree: dict[str, Any], path: list[str]) -> dict[str, Any]:
        name, *rest = path
        changed = replace(tree[name], rest) if rest else unstack_layers(tree[name])
        return {**tree, name: changed}

    unstacked = replace(params, DECODERS[variant.llm.kind].split("/"))
    if "head" not in unstacked["llm"]:
        return unstacked
    head = {"kernel": kernel_by_word(jnp.asarray(unstacked["llm"]["head"]["kernel"]))}
    return {**unstacked, "llm": {**unstacked["llm"], "head": head}}


def is_unstacked(variant: Variant, params: dict[str, Any]) -> bool:
    """True if `params` come from `unstack_decoder`, which only takes the kinds in `DECODERS`."""
    if variant.llm.kind not in DECODERS:
        return False
    for name in DECODERS[variant.llm.kind].split("/"):
        params = params[name]
    return "0" in params

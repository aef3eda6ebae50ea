"""A language model of one causal row: what LLaMA and OPT have in common, around their layers.

A model of its own has `embed`, `begin`, `shared`, `logits`, a final `norm`, and `layers` with the
methods `__call__` (whole rows), `step` (one token a row) and `tree` (a ranking's candidates).
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jax_instructblip.models.cache import append, start, tail_view
from jax_instructblip.models.layers import (
    Network,
    constrain,
    take_slots,
    unique_inverse,
    zip_layers,
)
from jax_instructblip.models.masks import causal_mask, padding_mask, tree_mask


class DecoderOnly(Network):
    """The rows, the cache and the trees of a causal language model."""

    def embed(self, tokens: Int[Array, "*B T"]) -> Float[Array, "*B T D"]:
        """Token embeddings; each model has its own."""
        raise NotImplementedError

    def begin(
        self, x: Float[Array, "B T D"], positions: Int[Array, "#B T"]
    ) -> Float[Array, "B T D"]:
        """The beginning of the residual stream: embedded slots at their positions."""
        raise NotImplementedError

    def shared(self, positions: Int[Array, "#B T"]) -> tuple[Any, ...]:
        """Arguments that follow from the positions and that all layers share."""
        raise NotImplementedError

    def logits(self, x: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Float32 vocabulary logits of normed hidden states."""
        raise NotImplementedError

    def hidden(
        self, inputs: Array, segments: Array, positions: Array, return_kv: bool, train: bool
    ) -> tuple[Array, Any]:
        """Normed hidden states `[B, X, D]`; keys and values of all layers where `return_kv`."""
        shared = self.shared(positions)
        x = self.begin(inputs, positions)
        x, cache = self.layers(x, None, causal_mask(segments), *shared, return_kv, train)
        return self.norm(x), cache

    def __call__(
        self,
        inputs: Float[Array, "B X D"],
        segments: Int[Array, "B X"],
        positions: Int[Array, "B X"],
        asked: Int[Array, "B A"],
        decoder_tokens: None = None,
        decoder_segments: None = None,
        train: bool = False,
    ) -> Float[Array, "B A V"]:
        """Logits `[B, A, V]`: those of slot t tell the token after it.

        `inputs` are the embedded slots, `segments` the sample that owns each (0: padding),
        `positions` its place in the sample. Slots that nobody asked for get no logits.
        `decoder_tokens` and `decoder_segments` are of the encoder-decoders: none here.
        """
        del decoder_tokens, decoder_segments
        x, _ = self.hidden(inputs, segments, positions, return_kv=False, train=train)
        return self.logits(take_slots(x, asked, unique_inverse(asked, x.shape[1])))

    def prefill(
        self, inputs: Float[Array, "B S D"], valid: Bool[Array, "B S"], tail_length: int
    ) -> tuple[Float[Array, "B 1 V"], dict[str, Any]]:
        """Logits of the first new token, and the cache with room for `tail_length` new ones."""
        positions = jnp.arange(inputs.shape[1])[None]
        x, prefix = self.hidden(
            inputs, valid.astype(jnp.int32), positions, return_kv=True, train=False
        )
        last = valid.sum(axis=1) - 1  # padding stands at the end only
        x = jnp.take_along_axis(x, last[:, None, None], axis=1)
        return self.logits(x), start(prefix, valid, tail_length)

    def decode_step(
        self, token: Int[Array, "B R"], cache: dict[str, Any]
    ) -> tuple[Float[Array, "B R V"], dict[str, Any]]:
        """Logits of the token after `token`, and the cache with `token` written to its tail."""
        valid = cache["prefix_mask"]
        positions = jnp.broadcast_to(valid.sum(axis=1, keepdims=True) + cache["step"], token.shape)
        x, outputs = self.layers.step(
            self.begin(self.embed(token), positions),
            zip_layers(prefix=cache["prefix"], tail=cache["tail"]),
            padding_mask(valid),
            tail_view(cache),
            *self.shared(positions),
        )
        return self.logits(self.norm(x)), append(cache, outputs)

    def decode_tree(
        self,
        tokens: Int[Array, "#B T"],
        depths: Int[Array, "#B T"],
        ends: Int[Array, "#B T"],
        cache: dict[str, Any],
    ) -> Float[Array, "B T D"]:
        """Normed hidden states of a tree of continuations; `logits` makes logits of them.

        The tree stands in depth-first order. Each token sees the prompt, the tokens that lead to it
        (`tree_mask(ends)`) and itself; its depth is 1 where it follows the prompt, and `ends[b, t]`
        is the index behind all that hangs below token t. `cache` is that of `prefill`, before any
        step, and is only read.
        """
        valid, inner = cache["prefix_mask"], tokens.shape[1]
        shape = (valid.shape[0], inner, self.config.width)
        x = constrain(jnp.broadcast_to(self.embed(tokens), shape))
        positions = valid.sum(axis=1, keepdims=True) + depths - 1
        x, _ = self.layers.tree(
            self.begin(x, positions),
            cache["prefix"],
            padding_mask(valid),
            tree_mask(ends),
            *self.shared(positions),
        )
        return self.norm(x)

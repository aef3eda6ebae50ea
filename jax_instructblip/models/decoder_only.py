"""The part that LLaMA and OPT share: rows, cache and candidate trees of a decoder-only model.

A subclass has `embed`, `begin`, `shared`, `logits`, a final `norm`, and `layers` with the methods
`__call__` (whole rows), `step` (one token per row) and `tree` (the candidates of a ranking).
"""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jax_instructblip.models.attention_kernels import CausalRows
from jax_instructblip.models.cache import append, start, tail_view
from jax_instructblip.models.dense import WordFactors
from jax_instructblip.models.layers import (
    Network,
    constrain,
    take_slots,
    unique_inverse,
    zip_layers,
)
from jax_instructblip.models.masks import causal_mask, padding_mask, tree_mask


class DecoderOnly(Network):
    """Base class of the causal language models; a subclass adds embeddings, layers and a head."""

    def embed(self, tokens: Int[Array, "*B T"]) -> Float[Array, "*B T D"]:
        """Token embeddings, defined by each subclass."""
        raise NotImplementedError

    def begin(
        self, x: Float[Array, "B T D"], positions: Int[Array, "#B T"]
    ) -> Float[Array, "B T D"]:
        """The first layer's input: the embedded slots, plus any position embeddings.

        A slot holds an embedded token or a visual vector.
        """
        raise NotImplementedError

    def shared(self, positions: Int[Array, "#B T"]) -> tuple[Any, ...]:
        """Position-dependent arguments that every layer receives, such as LLaMA's rotation."""
        raise NotImplementedError

    def logits(self, x: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Float32 vocabulary logits of hidden states after the final norm."""
        raise NotImplementedError

    def factors(self, x: Float[Array, "*B D"]) -> WordFactors:
        """The two factors whose product is `logits`: hidden states, and the stored kernel."""
        weights = self.variables["params"]
        if "head" in weights:
            return WordFactors(x, weights["head"]["kernel"], "DV")
        return WordFactors(x, weights["embed"]["embedding"], "VD")

    def hidden(
        self, inputs: Array, segments: Array, positions: Array, return_kv: bool, train: bool
    ) -> tuple[Array, Any]:
        """Hidden states `[B, X, D]` after the final norm, and the keys and values of all layers.

        The second item, in the form of a cache's `prefix`, is None unless `return_kv`.
        `inputs` `[B, X, D]` are embedded slots. `segments` `[B, X]` is the number of the sample
        that owns each slot, 0 on padding; `positions` `[B, X]` is the slot's position in it.
        """
        shared = self.shared(positions)
        x = self.begin(inputs, positions)
        rows = CausalRows(causal_mask(segments), segments)
        x, cache = self.layers(x, None, rows, *shared, return_kv, train)
        return self.norm(x), cache

    def asked_states(
        self,
        inputs: Float[Array, "B X D"],
        segments: Int[Array, "B X"],
        positions: Int[Array, "B X"],
        asked: Int[Array, "B A"],
        decoder_tokens: None = None,
        decoder_segments: None = None,
        train: bool = False,
    ) -> Float[Array, "B A D"]:
        """Hidden states of the slots `asked`, from which `logits` predicts the tokens after them.

        A slot holds an embedded token or a visual vector: `inputs`. `segments` is the number of the
        sample that owns each slot (0: padding), `positions` the slot's position in that sample.
        `asked` holds indices of slots, none twice in a row; out of range (padding) they give zeros.
        `decoder_tokens` and `decoder_segments` are for encoder-decoder models only.
        """
        del decoder_tokens, decoder_segments
        x, _ = self.hidden(inputs, segments, positions, return_kv=False, train=train)
        return take_slots(x, asked, unique_inverse(asked, x.shape[1]))

    def __call__(self, *row: Any, **options: Any) -> Float[Array, "B A V"]:
        """Logits of the slots `asked`; the arguments are those of `asked_states`."""
        return self.logits(self.asked_states(*row, **options))

    def prefill(
        self, inputs: Float[Array, "B S D"], valid: Bool[Array, "B S"], tail_length: int
    ) -> tuple[Float[Array, "B 1 V"], dict[str, Any]]:
        """Logits of the first new token, and a cache with space for `tail_length` new tokens.

        `inputs` are embedded prompts; `valid` is False on padding, which comes after the prompt.
        """
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
        """Logits of the token after `token`, and the cache with `token` added; R are beams."""
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
        """Final hidden states of many continuations of a prompt, given as one tree.

        Continuations that begin alike share tokens; the tree's T tokens are in depth-first order.
        Each token sees the prompt, its ancestors (`tree_mask(ends)`) and itself. `depths` is 1 for
        a token that follows the prompt; `ends[b, t]` is the index just after the last descendant of
        token t. `cache` comes from `prefill`, before any `decode_step`, and is only read. `logits`
        takes the result.
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

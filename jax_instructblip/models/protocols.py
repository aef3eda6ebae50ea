"""The methods of a bridge and of a language model; `vlm.py` calls no others.

A bridge maps the patch features of an image to vectors of the language model's width. A new bridge
or language model is one file with these methods, its sizes in `variants.py`, a conversion table,
and a row of `BRIDGES` or `LANGUAGE_MODELS` in `vlm.py`.
"""

from typing import Any, Protocol

from jaxtyping import Array, Bool, Float, Int

from jax_instructblip.models.dense import WordFactors

Cache = dict[str, Any]  # its keys and shapes: `cache.py`


class Bridge(Protocol):
    """Maps the patches of an image to Q vectors of the language model's width."""

    def __call__(
        self,
        patches: Float[Array, "B P Dv"],
        tokens: Int[Array, "B L"] | None = None,
        valid: Bool[Array, "B L"] | None = None,
        train: bool = False,
    ) -> Float[Array, "B Q Dl"]:
        """The vectors of each image; `tokens` is its instruction, `valid` is False on padding.

        Both may be None if the bridge reads no instruction.
        """
        ...


class LanguageModel(Protocol):
    """A decoder-only or encoder-decoder model over embedded tokens and visual vectors."""

    def embed(self, tokens: Int[Array, "*B T"]) -> Float[Array, "*B T D"]:
        """Float32 token embeddings."""
        ...

    def asked_states(
        self,
        inputs: Float[Array, "B X D"],
        segments: Int[Array, "B X"],
        positions: Int[Array, "B X"],
        asked: Int[Array, "B A"],
        decoder_tokens: Int[Array, "B U"] | None = None,
        decoder_segments: Int[Array, "B U"] | None = None,
        train: bool = False,
    ) -> Float[Array, "B A D"]:
        """Hidden states of the slots `asked`; a slot sees only slots of its own sample.

        A slot holds an embedded token or a visual vector: `inputs`. `segments` is the number of the
        sample that owns each slot (0: padding), `positions` the slot's position in that sample.
        Encoder-decoder models also take the decoder's tokens and their sample numbers; `asked` then
        indexes those tokens. An index out of range (padding) gives zeros.
        """
        ...

    def __call__(self, *row: Any, **options: Any) -> Float[Array, "B A V"]:
        """Float32 logits of the slots `asked`: `logits` of `asked_states` of these arguments."""
        ...

    def prefill(
        self, inputs: Float[Array, "B S D"], valid: Bool[Array, "B S"], tail_length: int
    ) -> tuple[Float[Array, "B 1 V"], Cache]:
        """Logits of the first new token after each prompt, and the cache of the prompts.

        `inputs` are embedded prompts, `valid` is False on padding. The cache has space for
        `tail_length` new tokens.
        """
        ...

    def decode_step(
        self, token: Int[Array, "B R"], cache: Cache
    ) -> tuple[Float[Array, "B R V"], Cache]:
        """Logits of the token after `token`, and the cache with `token` added; R are beams."""
        ...

    def decode_tree(
        self,
        tokens: Int[Array, "#B T"],
        depths: Int[Array, "#B T"],
        ends: Int[Array, "#B T"],
        cache: Cache,
    ) -> Float[Array, "B T D"]:
        """Hidden states of many continuations of a prompt, given as one tree in depth-first order.

        `depths` is 1 for a token that follows the prompt; `ends[b, t]` is the index just after the
        last descendant of token t. Each token sees the prompt, its ancestors and itself. `cache`
        comes from `prefill` and is only read; `logits` takes the result.
        """
        ...

    def logits(self, x: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Float32 vocabulary logits of hidden states."""
        ...

    def factors(self, x: Float[Array, "*B D"]) -> WordFactors:
        """The factors whose product is `logits`, for a loss that does not hold all of the logits.

        Only for a model of stacked layers (`layers.Scan.unstacked` is False): with others the
        head's kernel is stored in another layout, which `axes` of the result would not tell.
        """
        ...

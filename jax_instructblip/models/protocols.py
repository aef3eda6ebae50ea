"""The methods of a language model and of a bridge; `vlm.py` asks for nothing else of them.

Adding one is a file with these methods, its sizes in `variants.py`, a conversion table, and a row
of `BRIDGES` or `LANGUAGE_MODELS` in `vlm.py`.
"""

from typing import Any, Protocol

from jaxtyping import Array, Bool, Float, Int

Cache = dict[str, Any]  # drawn in `cache.py`


class Bridge(Protocol):
    """Makes Q vectors of the language model's width of an image's patches."""

    def __call__(
        self,
        patches: Float[Array, "B P Dv"],
        tokens: Int[Array, "B L"] | None = None,
        valid: Bool[Array, "B L"] | None = None,
        train: bool = False,
    ) -> Float[Array, "B Q Dl"]:
        """The vectors of each image; `tokens` are its instruction, `valid` is False on padding."""
        ...


class LanguageModel(Protocol):
    """A decoder, or an encoder and a decoder, over rows of embedded slots."""

    def embed(self, tokens: Int[Array, "*B T"]) -> Float[Array, "*B T D"]:
        """Token embeddings in the compute dtype."""
        ...

    def __call__(
        self,
        inputs: Float[Array, "B X D"],
        segments: Int[Array, "B X"],
        positions: Int[Array, "B X"],
        asked: Int[Array, "B A"],
        decoder_tokens: Int[Array, "B U"] | None = None,
        decoder_segments: Int[Array, "B U"] | None = None,
        train: bool = False,
    ) -> Float[Array, "B A V"]:
        """Float32 logits of the slots `asked`; a slot sees those of its own segment alone."""
        ...

    def prefill(
        self, inputs: Float[Array, "B S D"], valid: Bool[Array, "B S"], tail_length: int
    ) -> tuple[Float[Array, "B 1 V"], Cache]:
        """Logits of the first new token behind each prompt, and the cache of the prompts."""
        ...

    def decode_step(
        self, token: Int[Array, "B R"], cache: Cache
    ) -> tuple[Float[Array, "B R V"], Cache]:
        """Logits of the token after `token`, and the cache one token longer."""
        ...

    def decode_tree(
        self,
        tokens: Int[Array, "#B T"],
        depths: Int[Array, "#B T"],
        ends: Int[Array, "#B T"],
        cache: Cache,
    ) -> Float[Array, "B T D"]:
        """Hidden states of a tree of continuations in depth-first order."""
        ...

    def logits(self, x: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Float32 vocabulary logits of hidden states."""
        ...

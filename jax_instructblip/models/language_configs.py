"""The sizes of the language models as data: FlanT5, LLaMA and its relatives, OPT."""

import dataclasses
from typing import ClassVar, Literal


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Sizes of FlanT5 (T5 v1.1): gated feed-forward, relative position bias, untied head."""

    width: int
    head_width: int
    heads: int
    mlp: int
    encoder_layers: int
    decoder_layers: int
    vocab: int = 32128
    relative_buckets: int = 32
    relative_max_distance: int = 128
    norm_eps: float = 1e-6
    # 'gelu' is erf, as the released folders say; stock Flan-T5 has 'gelu_new' (tanh).
    activation: Literal["gelu", "gelu_new", "relu", "silu"] = "gelu"
    scale_decoder_outputs: bool = False  # times width^-0.5, for a head tied to the embedding
    # Active in training although T5 is frozen: the released code leaves it in train mode.
    dropout: float = 0.1
    pad_id: int = 0
    eos_id: int = 1
    decoder_start_id: int = 0
    kind: Literal["t5"] = "t5"
    encoder_decoder: ClassVar[bool] = True
    longest_sample: ClassVar[None] = None  # positions are relative: there is no last one


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Sizes of a LLaMA-like model: RMSNorm, rotary positions, SwiGLU.

    The defaults are those of Vicuna v1.1 (LLaMA-1). Other values give Llama 2 and 3, Mistral, Qwen
    2 and Qwen 3; the fields from `key_value_heads` on change the structure.
    """

    width: int
    heads: int
    mlp: int
    layers: int
    vocab: int = 32001
    norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    max_positions: int = 2048
    dropout: float = 0.0
    bos_id: int = 2  # the released InstructBLIP sets bos = eos = unk = </s>
    eos_id: int = 2
    pad_id: int = 32000
    key_value_heads: int = 0  # each serves heads / key_value_heads query heads; 0: as many as heads
    head_size: int = 0  # width of one head; 0: width / heads
    key_bias: bool = False  # Qwen 2: queries, keys and values have a bias
    key_norm: bool = False  # Qwen 3: an RMS norm on each head of the queries and of the keys
    tied_head: bool = False  # the token embedding is the head
    sliding_window: int = 0  # slots that a query may see; 0: all. Longer samples are refused
    rope_scaling: Literal["none", "linear", "llama3"] = "none"
    rope_factor: float = 1.0  # by which the scaled frequencies are divided
    # Llama 3: a pair is scaled by how often it turns within the original positions: fully below
    # the low number, not at all above the high one.
    rope_low_turns: float = 1.0
    rope_high_turns: float = 4.0
    rope_original_positions: int = 8192
    kind: Literal["llama"] = "llama"
    encoder_decoder: ClassVar[bool] = False

    @property
    def head_width(self) -> int:
        """Width of one attention head."""
        return self.head_size or self.width // self.heads

    @property
    def cached_heads(self) -> int:
        """The number of key heads, equal to that of value heads: the heads that a cache holds."""
        return self.key_value_heads or self.heads

    @property
    def longest_sample(self) -> int:
        """Most slots of a sample: the positions, or a smaller sliding window.

        Attention within a window is not implemented, so a sample must fit into it.
        """
        return min(self.max_positions, self.sliding_window or self.max_positions)


@dataclasses.dataclass(frozen=True)
class OptConfig:
    """Sizes of OPT: LayerNorm before sub-layers, learned positions, ReLU, tied head."""

    width: int
    heads: int
    mlp: int
    layers: int
    vocab: int = 50272  # 50,265 ids of the tokenizer, and unused ones
    max_positions: int = 2048
    norm_eps: float = 1e-5
    # Active in training although OPT is frozen: the released code leaves it in train mode.
    dropout: float = 0.1
    bos_id: int = 2
    eos_id: int = 50118  # "\n", which ends BLIP-2's captions; OPT's own is 2
    pad_id: int = 1
    kind: Literal["opt"] = "opt"
    encoder_decoder: ClassVar[bool] = False

    @property
    def head_width(self) -> int:
        """Width of one attention head."""
        return self.width // self.heads

    @property
    def longest_sample(self) -> int:
        """Most slots of a sample: each has a row of the position table."""
        return self.max_positions


LanguageConfig = T5Config | LlamaConfig | OptConfig

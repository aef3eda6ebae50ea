"""Makes the checkpoint that LLaVA's first stage starts from.

    a vision tower --whole, frozen----+
    random --projector----------------+--> write_llava --> a base of LLaVA's first stage
    a language model --whole----------+

The first stage trains the projector alone, the second the language model as well; a run of the
first is the `config.model.init` of the second.
"""

import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jax_instructblip import checkpoint
from jax_instructblip.backbones.joining import part_of_arrays, write_joined
from jax_instructblip.backbones.parts import language_of, vision_of
from jax_instructblip.models.projector import Projector
from jax_instructblip.models.variants import LlamaConfig, ProjectorConfig, Variant


def write_llava(
    vision: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    llm: str | os.PathLike[str],
    layers: int = 2,
    seed: int = 0,
) -> Path | str:
    """Writes `out`: a vision tower and a language model with a random projector between them.

    Args:
      vision: a Hugging Face folder of CLIP, or any checkpoint, whose vision tower is taken.
      out: the folder to make, or its address in a store; it must not exist.
      llm: a Hugging Face folder of a LLaMA-like language model (LLaMA, Vicuna, Llama 3, Mistral,
        Qwen), which keeps its special tokens, or any checkpoint that has one.
      layers: of the projector, 1 (LLaVA v1) or 2 (LLaVA v1.5).
      seed: the seed of the random projector.

    Returns:
      The folder `out`, or its address.

    Raises:
      ValueError: a part cannot be used, with every reason.
      OSError: `out` exists, a tokenizer is missing, or there is no room.
    """
    config, tower = vision_of(vision)
    language, weights, copy_tokenizer = language_of(llm, released=False)
    if not isinstance(language, LlamaConfig):
        raise ValueError(
            f"{os.fspath(llm)} is a language model of kind {language.kind}: LLaVA takes LLaMA and "
            "its relatives (Vicuna, Llama 3, Mistral, Qwen)"
        )
    bridge = ProjectorConfig(config.width, language.width, layers)
    variant = Variant("llava", config, bridge, language)
    parts = {
        "vision tower": tower,
        "projector": part_of_arrays("random", _projector(bridge, seed)),
        "language model": weights,
    }
    return write_joined(out, variant, parts, copy_tokenizer)


def _projector(config: ProjectorConfig, seed: int) -> dict[str, np.ndarray]:
    """Returns a random projector: path and float32 array."""
    patches = jnp.zeros((1, 2, config.vision_width))
    params = Projector(config, jnp.float32).init(jax.random.key(seed), patches)["params"]
    leaves = checkpoint.flatten({config.key: dict(params)})
    return {path: np.asarray(leaf) for path, leaf in leaves.items()}

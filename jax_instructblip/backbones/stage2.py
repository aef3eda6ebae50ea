"""Makes the checkpoints that BLIP-2's second stage and instruction tuning start from.

    stage 1 --vision, queries' half of the Q-Former--+
    language model --whole, frozen-------------------+--> write_stage2 --> a base of stage 2
    random --projection------------------------------+

    stage 2 --all of it------------------------------+
    stage 1 --text half of the Q-Former, tokenizer---+--> write_instruct --> a base of InstructBLIP

The second stage reads no text in the Q-Former and its checkpoints lack that half; the instruction
is read by the half that the first stage has trained, as in the released InstructBLIP.
"""

import dataclasses
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jax_instructblip import checkpoint
from jax_instructblip.backbones.joining import part_of, part_of_arrays, write_joined
from jax_instructblip.backbones.parts import language_of, source_of
from jax_instructblip.conversion.stored_model import copy_tokenizers
from jax_instructblip.inference.loading import Source
from jax_instructblip.models.qformer import QFormer
from jax_instructblip.models.variants import QFormerConfig, Variant
from jax_instructblip.models.vlm import param_shapes

PROJECTION = "qformer/projection/"  # of the Q-Former's outputs to the language model's width


def write_stage2(
    stage1: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    llm: str | os.PathLike[str],
    seed: int = 0,
) -> Path | str:
    """Writes `out`: the Q-Former of a first stage before a frozen language model (kind `blip2`).

    Args:
      stage1: a checkpoint or a run of the first stage, whose vision tower and Q-Former are taken.
      out: the folder to make, or its address in a store; it must not exist.
      llm: a Hugging Face folder of a language model (FlanT5, OPT, LLaMA or Vicuna), or any
        checkpoint that has one.
      seed: the seed of the random projection to the language model's width.

    Returns:
      The folder `out`, or its address.

    Raises:
      ValueError: `stage1` is of another stage, or `llm` cannot be used, with every reason.
      OSError: `out` exists, a tokenizer is missing, or there is no room.
    """
    first = source_of(stage1, "blip2_stage1", "the first stage (`backbones stage1`, then `train`)")
    config, language, copy_tokenizer = language_of(llm)
    qformer = dataclasses.replace(
        first.variant.qformer,
        llm_width=config.width,
        instruction_aware=False,
        feature_width=0,
        caption_head=QFormerConfig.caption_head,
    )
    variant = Variant("blip2", first.variant.vision, qformer, config)
    expected = checkpoint.flatten(param_shapes(variant))
    parts = {
        "vision tower": part_of(first, lambda path: path.startswith("vision/"), stage1),
        "Q-Former": part_of(
            first,
            lambda path: path.startswith("qformer/") and path in expected.keys(),
            stage1,
        ),
        "projection": part_of_arrays("random", _projection(qformer, seed)),
        "language model": language,
    }
    return write_joined(out, variant, parts, copy_tokenizer)


def write_instruct(
    stage2: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    text_from: str | os.PathLike[str],
) -> Path | str:
    """Writes `out`: a second stage whose Q-Former reads the instruction (kind `instructblip`).

    Args:
      stage2: a checkpoint or a run of the second stage; all its weights are taken.
      out: the folder to make, or its address in a store; it must not exist.
      text_from: the first stage that gives the parts which a second stage lacks: the Q-Former's
        text embeddings and text feed-forwards, and BERT's tokenizer.

    Returns:
      The folder `out`, or its address.

    Raises:
      ValueError: a model is of another stage, or the two Q-Formers are of other sizes.
      OSError: `out` exists, a tokenizer is missing, or there is no room.
    """
    second = source_of(stage2, "blip2", "the second stage (`backbones stage2`, then `train`)")
    first = source_of(text_from, "blip2_stage1", "the first stage that it began with")
    text = first.variant.qformer
    qformer = dataclasses.replace(
        second.variant.qformer,
        instruction_aware=True,
        vocab=text.vocab,
        max_positions=text.max_positions,
    )
    _compare(second, first)
    variant = Variant("instructblip", second.variant.vision, qformer, second.variant.llm)
    own = checkpoint.flatten(param_shapes(second.variant)).keys()
    lacking = checkpoint.flatten(param_shapes(variant)).keys() - own
    parts = {
        "vision tower, Q-Former and language model": part_of(second, lambda path: True, stage2),
        "text half of the Q-Former": part_of(first, lambda path: path in lacking, text_from),
    }

    def copy(folder: Path) -> None:
        copy_tokenizers(second.folder, folder, second.variant)
        copy_tokenizers(first.folder, folder, first.variant)

    return write_joined(out, variant, parts, copy)


def _projection(config: QFormerConfig, seed: int) -> dict[str, np.ndarray]:
    """Returns a random projection to the language model's width: path and float32 array."""
    patches = jnp.zeros((1, 1, config.vision_width))
    params = QFormer(config, jnp.float32).init(jax.random.key(seed), patches)["params"]
    leaves = checkpoint.flatten({"qformer": dict(params)})
    return {p: np.asarray(leaf) for p, leaf in leaves.items() if p.startswith(PROJECTION)}


def _compare(second: Source, first: Source) -> None:
    """Raises a ValueError if the Q-Formers of two models have different sizes."""
    ours, theirs = second.variant.qformer, first.variant.qformer
    wrong = [
        f"qformer.{name}: {getattr(ours, name)} and {getattr(theirs, name)}"
        for name in ("width", "layers", "heads", "mlp")
        if getattr(ours, name) != getattr(theirs, name)
    ]
    if wrong:
        raise ValueError(
            f"the Q-Formers of {second.step or second.folder} and {first.step or first.folder} "
            f"do not fit together: {', '.join(wrong)}"
        )

"""Conversion table of the heads of BLIP-2's first stage, which has no language model.

They are the projections of image and text, the image-text match, the captions and a temperature.
"""

from jax_instructblip.conversion.engine import Drop, Entry, Rule
from jax_instructblip.conversion.transforms import identity, linear
from jax_instructblip.models.variants import QFormerConfig


def rules(config: QFormerConfig) -> list[Entry]:
    """Returns the rules for all heads.

    Only original checkpoints have a caption head and a temperature; Hugging Face folders have none.
    """
    entries: list[Entry] = []
    names = [
        ("vision_projection", "image_projection"),
        ("text_projection", "text_projection"),
        ("itm_head", "match"),
    ]
    if config.caption_head:
        names.append(("cls.predictions.transform.dense", "caption/in"))
        entries += [
            Rule("temp", "heads/temp", identity),
            Rule("cls.predictions.bias", "heads/caption/bias", identity),
            Rule(
                "cls.predictions.transform.LayerNorm.weight", "heads/caption/norm/scale", identity
            ),
            Rule("cls.predictions.transform.LayerNorm.bias", "heads/caption/norm/bias", identity),
            Drop(
                "cls.predictions.decoder.weight",
                "the head of captions is tied to the word embeddings",
                same_as="qformer.embeddings.word_embeddings.weight",
            ),
            Drop(
                "cls.predictions.decoder.bias",
                "a second name of cls.predictions.bias",
                same_as="cls.predictions.bias",
            ),
        ]
    for theirs, ours in names:
        entries += [
            Rule(f"{theirs}.weight", f"heads/{ours}/kernel", linear),
            Rule(f"{theirs}.bias", f"heads/{ours}/bias", identity),
        ]
    return entries

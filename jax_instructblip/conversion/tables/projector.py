"""Conversion table of LLaVA's projector: `multi_modal_projector.` of Hugging Face, `projector/`.

Hugging Face has two linear layers alone. A projector of one (LLaVA v1) is stored as two with the
activation `linear` between them, which is none, and the identity as the second one.
"""

from jax_instructblip.conversion.engine import Entry, Fixed, Rule
from jax_instructblip.conversion.transforms import identity, linear
from jax_instructblip.models.variants import ProjectorConfig

PREFIX = "multi_modal_projector."
NOT_ONE_LAYER = (
    "with projector_hidden_act linear this must be the identity: the two linear layers are not one"
)


def rules(config: ProjectorConfig) -> list[Entry]:
    """Returns the rules for both layers."""
    entries: list[Entry] = []
    for name, ours in (("linear_1", "in"), ("linear_2", "out"))[: config.layers]:
        entries += [
            Rule(f"{PREFIX}{name}.weight", f"projector/{ours}/kernel", linear),
            Rule(f"{PREFIX}{name}.bias", f"projector/{ours}/bias", identity),
        ]
    if config.layers == 1:
        like = "projector/in/bias"
        entries += [
            Fixed(f"{PREFIX}linear_2.weight", "identity", NOT_ONE_LAYER, like),
            Fixed(f"{PREFIX}linear_2.bias", "zeros", NOT_ONE_LAYER, like),
        ]
    return entries

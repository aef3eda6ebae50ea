"""The earlier names of what `vlm.py` holds."""

from jax_instructblip.models.vlm import (
    DECODERS as DECODERS,
)
from jax_instructblip.models.vlm import (
    LANGUAGE_MODELS as LANGUAGE_MODELS,
)
from jax_instructblip.models.vlm import (
    Batch as Batch,
)
from jax_instructblip.models.vlm import (
    VisionLanguageModel as InstructBlip,
)
from jax_instructblip.models.vlm import (
    init_params as init_params,
)
from jax_instructblip.models.vlm import (
    is_separate as is_separate,
)
from jax_instructblip.models.vlm import (
    param_shapes as param_shapes,
)
from jax_instructblip.models.vlm import (
    separate_decoder as separate_decoder,
)

__all__ = ["InstructBlip"]

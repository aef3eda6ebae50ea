"""What the first two stages of BLIP-2 (arXiv 2301.12597) share: pairs, crops, AdamW, warm-up.

The paper's 129 million images are those of the table below. Web images have captions that BLIP
wrote and filtered (CapFilt): the paper ranks ten of them and the web's own with CLIP, keeps the
best two and draws one a step. From a list of captions in an entry's .json one is drawn likewise;
the lists that were released have one caption an image.
"""

from ml_collections import ConfigDict

from configs import common

# Each as `jax-instructblip prepare NAME --raw ... --out data` makes it, or img2dataset's folder of
# tars as it is: `--config.data.sources.laion.path=downloads/laion`. The released code trains on
# the first two alone: `--config.data.sources.laion.path=` leaves a source out.
PAIRS = (
    "coco_caption",  # 566,747 captions of Karpathy's train split
    "visual_genome",  # 821,774 captions of regions
    "cc3m",
    "cc12m",
    "sbu",
    "laion",  # 115 million of LAION-400M
)


def get_config(name: str, batch_size: int, steps: int) -> ConfigDict:
    """The training of one stage; `batch_size` is the paper's, on all devices together."""
    config = common.get_config()
    config.workdir = f"runs/{name}"
    config.data.sources = ConfigDict({pairs: common.source(f"data/{pairs}") for pairs in PAIRS})
    config.data.batch_size = batch_size
    config.data.sampling = "proportional"  # pairs of all sources are one set
    config.train.steps = steps
    config.optimizer.learning_rate = 1e-4
    config.optimizer.warmup_learning_rate = 1e-6  # as released; the paper does not say
    config.optimizer.warmup_steps = 2_000
    config.optimizer.b2 = 0.98
    return config

"""BLIP-2's fine-tunings (arXiv 2301.12597, appendix): the image encoder is trained as well.

Five epochs, 1,000 steps of warm-up, weight decay 0.05, no drop path. The released code's schedule
is a staircase: one step of the cosine an epoch. Its layer-wise rates never applied, because its
scheduler left them out; here they do.
"""

from ml_collections import ConfigDict

from configs import common

EPOCHS = 5
COCO_CAPTIONS = 566_747  # of Karpathy's training split
VQAV2 = 443_757 + 214_354  # questions of train and val
VISUAL_GENOME = 1_445_000  # questions, about: `prepare` says how many there are


def get_config(name: str, samples: int, batch_size: int, image_size: int) -> ConfigDict:
    """Returns what the fine-tunings share; the run's folder is `runs/NAME`.

    `samples` are those of an epoch; `batch_size` counts all devices together; images have
    `image_size` pixels a side.
    """
    config = common.get_config()
    config.workdir = f"runs/{name}"
    config.model.image_size = image_size  # positions are resized where the checkpoint has others
    config.model.trainable = ("vision", "qformer")
    # As released: of 677 or 1,226 tokens an image nothing but the input of each layer is kept.
    config.model.remat.vision = "full"
    config.model.remat.llm = "dots"
    config.data.batch_size = batch_size
    config.data.text_processor = "lavis"  # the released captions and questions: lower case
    config.data.sampling = "proportional"  # the sources of a fine-tuning are one set
    config.text.prompt_limit = 32  # the released code's length of texts
    config.text.answer_limit = 32
    config.train.steps = EPOCHS * (samples // batch_size)
    config.optimizer.schedule = "staircase"
    config.optimizer.epoch_steps = samples // batch_size
    config.checkpoints.every = samples // batch_size
    config.validation.every = samples // batch_size
    return config


def caption(name: str, vision_layer_decay: float) -> ConfigDict:
    """Returns the fine-tuning on COCO captions, from a second stage of BLIP-2.

    `name` is a folder in `runs/coco_caption`. Each layer of the image encoder learns at
    `vision_layer_decay` times the rate of the one after it.
    """
    config = get_config(f"coco_caption/{name}", COCO_CAPTIONS, batch_size=256, image_size=364)
    config.data.sources = ConfigDict(
        {"coco_caption": common.source("data/coco_caption", templates="blip2_caption")}
    )
    config.optimizer.vision_layer_decay = vision_layer_decay
    config.validation.path = "data/coco_caption"
    config.validation.split = "val"
    config.validation.prompt = "a photo of"
    return config


def vqa(name: str, vision_layer_decay: float) -> ConfigDict:
    """Returns the fine-tuning on VQAv2 and Visual Genome, whose Q-Former reads the question.

    `name` is a folder in `runs/vqa`; `vision_layer_decay` is as in `caption`. It starts from
    `jax-instructblip backbones instruct`: a second stage, with the first stage's half that
    reads texts. `--config.data.sources.visual_genome_questions.path=` leaves Visual
    Genome's questions out; then `train.steps` is 25,705 and `optimizer.epoch_steps` 5,141.
    """
    samples = VQAV2 + VISUAL_GENOME
    config = get_config(f"vqa/{name}", samples, batch_size=128, image_size=490)
    sources = {
        "vqav2": ("data/vqav2", "train"),
        "vqav2_val": ("data/vqav2", "val"),
        "visual_genome_questions": ("data/visual_genome_questions", "train"),
    }
    config.data.sources = ConfigDict(
        {
            source: common.source(path, split, templates="blip2_question")
            for source, (path, split) in sources.items()
        }
    )
    config.optimizer.vision_layer_decay = vision_layer_decay
    # The paper trains on val, too, and asks the test server: these scores are of seen questions.
    config.validation.path = "data/vqav2"
    config.validation.split = "val"
    config.validation.prompt = "Question: {question} Answer:"
    return config


def retrieval(name: str) -> ConfigDict:
    """Returns the fine-tuning for retrieval on COCO, by the first stage's three losses.

    `name` is a folder in `runs/coco_retrieval`.
    """
    config = get_config(f"coco_retrieval/{name}", COCO_CAPTIONS, batch_size=224, image_size=364)
    config.model.trainable = ("vision", "qformer", "heads")
    config.data.sources = ConfigDict({"coco_caption": common.source("data/coco_caption")})
    config.train.pairs_by_image = True  # five captions an image, all of them right
    config.validation.path = "data/coco_caption"
    config.validation.split = "val"
    return config

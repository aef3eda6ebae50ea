"""The recipe that the four InstructBLIP trainings share: 13 held-in datasets, 60,000 steps.

Learning rate, warm-up, cosine, AdamW and 224 pixels are those of `common.py`. Where a number was
never published the text says so.
"""

from ml_collections import ConfigDict

from configs import common

# Held-in datasets as `jax-instructblip prepare NAME --raw ... --out data` makes them, and the
# templates of the paper's appendix C.
HELD_IN = {
    "coco_caption": "caption",
    "web_capfilt": "caption",
    "textcaps": "caption",
    "vqav2": "question",
    "okvqa": "question",
    "aokvqa": "question",
    "ocrvqa": "question",
    "vqav2_questions": "question_generation",
    "okvqa_questions": "question_generation",
    "aokvqa_questions": "question_generation",
    # Instructions are the dataset's own.
    "llava_conversation": "",
    "llava_detail": "",
    "llava_reasoning": "",
}


def get_config(
    name: str,
    batch_size: int,
    samples_per_row: int,
    row: tuple[int, int],
    sample: tuple[float, ...],
) -> ConfigDict:
    """Returns the training with one language model; its folder is `runs/NAME`.

    `batch_size` is the paper's, on all devices together; `samples_per_row` samples share a row.
    `row` and `sample` are `config.plan`: slots and targets of a row, and the mean images,
    instruction ids, slots and targets of a sample, counted on samples of this mixture
    (`python -m benchmarks.packing`). Slots count visual vectors.

    `config.model.checkpoint` must be given. The paper's Q-Former started from the second stage of
    BLIP-2 with the same language model, whose released files have no text branch; with a converted
    InstructBLIP the run goes on from tuned weights.
    """
    config = common.get_config()
    config.workdir = f"runs/{name}"
    # Weights are sqrt(size). The paper then lowers A-OKVQA and raises OKVQA by amounts that were
    # never published: set `weight` here to do so.
    config.data.sources = ConfigDict(
        {
            dataset: common.source(f"data/{dataset}", templates=templates)
            for dataset, templates in HELD_IN.items()
        }
    )
    config.data.batch_size = batch_size
    config.data.samples_per_row = samples_per_row
    config.plan.row_slots, config.plan.row_targets = row
    config.plan.sample = sample
    config.data.min_decode_ratio = 0.0  # crops of the whole image's pixels, as released
    # Little work, and half of the memory that waits for the backward pass; launch/README.md says
    # what fits where.
    config.model.remat.llm = config.model.remat.qformer = "dots"
    # The one held-in dataset whose validation split stands in the file that it is trained from (so
    # it is prepared with it), is not trained on, and is scored without further tools: exact match.
    # vqav2 (`val`) and coco_caption (`val`, extra `eval`) do as well, where those are prepared.
    config.validation.path = "data/ocrvqa"
    config.validation.split = "val"
    return config

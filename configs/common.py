"""Every field of a run, once, with its unit; other files start from here and change some."""

from ml_collections import ConfigDict


def source(
    path: str,
    split: str = "train",
    weight: float = 0.0,
    templates: str = "",
    images: str = "",
    noun_phrases: int = 0,
) -> ConfigDict:
    """Returns the fields of one source of training data (`config.data.sources.NAME`).

    Args:
      path: a file of JSON lines, a JSON list of conversations (LLaVA), a folder of
        `jax-instructblip prepare`, a folder of tars with images and captions (img2dataset), or a
        drawn dataset (`shapes`); "" leaves the source out.
      split: the name of the split of its records that is read.
      weight: its share, relative to the other weights; 0 means what `data.sampling` says.
      templates: the name of a list in `data/templates.py` that dresses the prompts; "" takes them
        as they are.
      images: the folder of the images that a JSON list of conversations names; "": its own folder.
      noun_phrases: the most captions that a noun phrase may bring into training, by LLaVA's filter
        of caption pairs (`data/noun_phrases.py`; LLaVA takes 100); 0 takes all pairs.
    """
    fields = dict(path=path, split=split, weight=weight, templates=templates, images=images)
    return ConfigDict(dict(fields, noun_phrases=noun_phrases))


def get_config() -> ConfigDict:
    """Returns all fields with their defaults: InstructBLIP's recipe where the paper states one."""
    config = ConfigDict()
    config.workdir = ""  # folder of the run; one that has checkpoints is taken up again
    config.seed = 0  # of the data's order, augmentation and dropout

    config.model = ConfigDict()
    config.model.checkpoint = ""  # folder made by `convert`, or an embedded name: frozen weights
    config.model.init = ""  # another checkpoint or run whose weights the trained part starts from
    config.model.trainable = ("qformer",)  # top-level parts of the model that are trained
    config.model.image_size = 0  # pixels a side; other than the checkpoint's: positions are resized
    config.model.instruction_aware = True  # False: the Q-Former does not read the instruction
    config.model.qformer_dropout = -1.0  # probability; -1: as the checkpoint says
    config.model.llm_dropout = -1.0  # probability, in the frozen model too; -1: as the checkpoint
    config.model.dtype = "bfloat16"  # of the computation; norms, softmax and loss are float32
    # Of the frozen weights; trained ones are float32. "int8", "int4": of frozen vision towers and
    # language models the kernels are whole numbers with scales, all else bfloat16.
    config.model.frozen_dtype = "bfloat16"
    # Over whole rows: "einsum", or "auto" for a kernel that keeps no scores, where it can be used
    # (bfloat16 or float16, no dropout of weights, no learned bias): cuDNN's on NVIDIA's GPUs, on
    # TPUs splash attention (bfloat16) in LLaMA-likes whose rows have a multiple of 128 slots.
    # Programs with them are compiled and counted, but no chip has run them yet: compare the losses
    # of some steps, or run `pytest tests/models/test_attention_kernels.py` there, before you rely
    # on it.
    config.model.attention = "einsum"
    # What a backward pass computes again to save memory: "none"; "dots", all of a layer but its
    # products with weights (little to compute); "full", whole layers (a second forward pass). The
    # vision tower has no backward pass unless it is trained.
    config.model.remat = ConfigDict(dict(vision="none", qformer="none", llm="none"))

    config.data = ConfigDict()
    config.data.sources = ConfigDict()  # name -> source(...)
    config.data.batch_size = 128  # samples, on all devices together
    # Samples that share a row, without seeing each other: answers are short, and rows of one sample
    # are mostly padding. Fewer where a device has fewer.
    config.data.samples_per_row = 1
    config.data.buckets = (64,)  # tokens that rows are padded to, besides the limits below
    config.data.augment = True  # random crop (half to all of the area) and mirroring
    # Without `augment`, how an image becomes a square: "squash"; "center" or "clip", its middle
    # (LLaVA v1: "clip"); "pad", all of it on a square (LLaVA v1.5). "": as the checkpoint is asked.
    config.data.crop = ""
    # 0: JPEGs are decoded whole, and crops have the released code's pixels. Above it they are
    # decoded at 1/2, 1/4 or 1/8 of their sides where the crop then still has this share of the
    # model's pixels: 0.6 saves a third of the time and gives other pixels, 5 of 255 away in the
    # mean (`python -m benchmarks.crop_decoding --photos DIR`).
    config.data.min_decode_ratio = 0.0
    # Without `augment` and with a frozen vision tower: a folder of patch features that are read in
    # place of pixels. `jax-instructblip features` with the words of the run writes it. "": none.
    config.data.features = ""
    config.data.rand_augment = False  # after it, two operations as the released FlanT5 training has
    config.data.exif = True  # photographs are turned upright; False: as the released code
    config.data.text_processor = "paper"  # "lavis": questions and captions in lower case, no marks
    config.data.dialogue = "plain"  # earlier rounds one after the other; "q_a": `q: ... a: ...`
    config.data.threads = 8  # that make batches
    config.data.sampling = "sqrt"  # of sizes; ablations: "uniform", "proportional"
    config.data.instructions = "templates"  # ablations: "plain" input, or "tag" of task and dataset
    config.data.allow_held_out = ()  # names of sources that may be of a held-out dataset
    config.data.ahead = 4  # batches made before they are asked for, at least one a thread
    config.data.workers = 0  # processes that make batches; 0: threads of this one

    config.chat = ConfigDict()
    config.chat.template = ""  # of conversations: "v1", "llama3", "chatml" ...; "": prompt, answer
    # System message; "default": the checkpoint's, or that of another template; "": none.
    config.chat.system = "default"
    config.chat.limit = 2_048  # tokens and visual vectors of a conversation
    # Of the first question's images and text: as they are written, "first", "last", or "drawn".
    config.chat.image_order = "written"

    config.text = ConfigDict()
    config.text.qformer_limit = 128  # tokens of the instruction that the Q-Former reads
    config.text.prompt_limit = 128  # tokens of the instruction that the language model reads
    config.text.answer_limit = 256  # tokens of the answer
    config.text.caption_limit = 32  # tokens of a caption, in BLIP-2's first stage

    config.train = ConfigDict()
    config.train.steps = 60_000
    # Passes over all records of all sources, which set `steps` (rounded up); 0: as `steps` says.
    config.train.epochs = 0.0
    # Of the first stage: all captions of an image are right for it (retrieval), not its own alone.
    config.train.pairs_by_image = False
    config.train.log_every = 10  # steps between lines of metrics
    config.train.hang_limit = 1_800.0  # seconds without a step after which stacks are printed
    config.train.non_finite = "stop"  # on a loss that is no number; or "skip": leave the step out
    config.train.non_finite_limit = 10  # such steps in a row that end a run which skips them
    config.train.peak_flops = 0.0  # a second, of one device, for the MFU; 0: as known of its kind
    config.train.profile_steps = 0  # that a trace is written of, after the first ones
    config.train.profile_folder = ""  # of the trace; "": profile/ in the workdir
    config.train.accumulate = 1  # parts of a batch that are worked on one after the other

    config.optimizer = ConfigDict()
    config.optimizer.schedule = "cosine"  # or "staircase": one step of the cosine an epoch (LAVIS)
    config.optimizer.learning_rate = 1e-5  # at the end of the warm-up
    config.optimizer.warmup_learning_rate = 1e-8  # of the first step
    config.optimizer.final_learning_rate = 0.0  # where the cosine ends
    config.optimizer.warmup_steps = 1_000
    config.optimizer.warmup_ratio = 0.0  # share of all steps, rounded up; 0: as `warmup_steps` says
    config.optimizer.epoch_steps = 3_000  # of the staircase
    config.optimizer.b1 = 0.9
    config.optimizer.b2 = 0.999
    config.optimizer.eps = 1e-8
    config.optimizer.weight_decay = 0.05  # times the learning rate; not on biases and norms
    # Of the rate, from each layer of a trained vision tower to the one before it; 1: the same rate.
    config.optimizer.vision_layer_decay = 1.0
    config.optimizer.clip_norm = 0.0  # largest norm of the gradient; 0: not clipped

    config.checkpoints = ConfigDict()
    config.checkpoints.every = 3_000  # steps
    config.checkpoints.keep = 3  # newest ones that stay, besides the best
    config.checkpoints.keep_every = 0  # steps of which each multiple stays, too; 0: none

    config.validation = ConfigDict()
    # Records to validate on, as in source(); "": no validation. What `prepare` wrote is asked with
    # the protocol of its dataset and scored by its metric, as `evaluate --datasets` does.
    config.validation.path = ""
    config.validation.split = "validation"
    # "": as the dataset's protocol asks, or the bare question. Else a prompt with placeholders, as
    # "Question: {question} Answer:": that of training, where it had one alone.
    config.validation.prompt = ""
    config.validation.every = 3_000  # steps
    config.validation.first = True  # whether the weights are validated before the first step
    config.validation.limit = 1_000  # questions, always the same ones; 0: all
    config.validation.batch_size = 64  # questions answered at once
    config.validation.max_new_tokens = 30  # of an answer, where no protocol says it

    config.mesh = ConfigDict()
    # Groups of devices, each with whole weights and rows of its own; -1: all that are left.
    config.mesh.data = -1
    config.mesh.fsdp = 1  # devices of a group that split weights and rows
    config.mesh.tensor = 1  # devices that split weights and work on the same rows

    # What the verb `plan`, which reads no data, takes rows of several samples for: numbers that the
    # metrics of a run have, by the same names.
    config.plan = ConfigDict()
    config.plan.row_slots = 0  # slots of a row; 0: every sample is as long as its limits
    config.plan.row_targets = 0  # targets of a row; 0: likewise
    config.plan.sample = ()  # means of a sample: images, instruction ids, slots, targets

    config.parallel = ConfigDict()
    config.parallel.mode = "jit"  # or "pmap": whole copies of everything, on one host's devices
    return config.lock()

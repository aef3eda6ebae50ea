"""Protocols: how each benchmark is asked, answered and scored, with the paper's numbers.

    protocol = get_protocol("nocaps")
    blip.generate(images, [protocol.prompt], **protocol.settings(blip.variant.llm.kind))
    protocol.metric, protocol.paper     -> "cider", {"instructblip-flan-t5-xl": 119.9, ...}

There is one row per benchmark, and four general protocols for everyday use. Decoding settings come
partly from the released code, not the paper: its tasks do not pass every value of their config on
to `generate`. A row has the values that reach the model. Lengths are numbers of new tokens; the
released code counts one more, the token that decoding starts from.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from jax_instructblip import lookup
from jax_instructblip.data import templates
from jax_instructblip.inference.generation_config import GenerationConfig
from jax_instructblip.models.released import released_name
from jax_instructblip.models.variants import Variant

GENERATE = (
    *("num_beams", "length_penalty", "repetition_penalty"),
    *("max_new_tokens", "min_new_tokens", "length_rule"),
)
RANK = ("length_normalise",)
RETRIEVE = ("k", "itm_only")

# The models that papers have numbers of, and what reports call them.
SHORT = {
    "instructblip-flan-t5-xl": "FlanT5-XL",
    "instructblip-flan-t5-xxl": "FlanT5-XXL",
    "instructblip-vicuna-7b": "Vicuna-7B",
    "instructblip-vicuna-13b": "Vicuna-13B",
    "blip2-opt-2.7b": "BLIP-2 OPT-2.7B",
    "blip2-opt-6.7b": "BLIP-2 OPT-6.7B",
    "blip2-flan-t5-xl": "BLIP-2 FlanT5-XL",
    "blip2-flan-t5-xl-vit-l": "BLIP-2 FlanT5-XL, ViT-L",
    "blip2-flan-t5-xxl": "BLIP-2 FlanT5-XXL",
    "blip2-vicuna-7b": "BLIP-2 Vicuna-7B",
    "blip2-vicuna-13b": "BLIP-2 Vicuna-13B",
    "blip2-opt-2.7b-coco": "BLIP-2 OPT-2.7B, COCO",
    "blip2-opt-6.7b-coco": "BLIP-2 OPT-6.7B, COCO",
    "blip2-flan-t5-xl-coco": "BLIP-2 FlanT5-XL, COCO",
    "blip2-stage1-coco": "BLIP-2 ViT-g, COCO",
    "llava-1.5-13b": "LLaVA-1.5-13B",
}
# InstructBLIP (arXiv 2305.06500), table 1: zero-shot results, in percent, of these models.
MODELS = tuple(name for name in SHORT if name.startswith("instructblip"))


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How a benchmark is asked, answered and scored; plain data.

    Attributes:
      name: the name in flags, files and results.
      dataset: name of the dataset with the records; "" for none.
      split: the split to evaluate by default; "" if there is no usual one.
      prompt: the prompt, with placeholders for a record's texts (`templates.format_prompt`).
      metric: a name of `metrics.table.METRICS` that follows the published numbers; "" if there is
        no score.
      ranking: True if candidates are ranked (`blip.rank`), False if answers are generated.
      words: in a ranking, the words that stand for each of the record's choices; () if the
        choices themselves are ranked.
      decoding: settings of generation; in a ranking, used only if it is overridden to generate.
      llama: settings that replace those of `decoding` for decoder-only models (LLaMA, OPT).
      prompts: prompts that replace `prompt`, by kind of language model ("opt").
      retrieval: True if images and captions are matched with each other (`Retriever.rank`).
      k: in a retrieval, the number of nearest candidates that are re-ranked by the match.
      itm_only: in a retrieval, score by the logit of the match without the similarity.
      judged: True if a judge compares the answers, which are written in a form that judges read.
      length_normalise: in a ranking, divide each score by its number of tokens.
      paper: published results in percent, by model name.
      paper_values: published results of values besides the headline, by model name and value.
      notes: remarks on what is unknown or deviates.
    """

    name: str
    prompt: str
    dataset: str = ""
    split: str = ""
    metric: str = ""
    ranking: bool = False
    words: tuple[tuple[str, ...], ...] = ()
    decoding: GenerationConfig = dataclasses.field(default_factory=GenerationConfig)
    llama: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    prompts: Mapping[str, str] = dataclasses.field(default_factory=dict)
    retrieval: bool = False
    k: int = 0
    itm_only: bool = False
    judged: bool = False
    length_normalise: bool = False
    paper: Mapping[str, float] = dataclasses.field(default_factory=dict)
    paper_values: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def mode(self) -> str:
        """How questions are answered: "ranked", "generated" or "retrieved"."""
        if self.retrieval:
            return "retrieved"
        return "ranked" if self.ranking else "generated"

    def config(self, llm: str = "t5") -> GenerationConfig:
        """Returns the generation settings for a language model kind (`variant.llm.kind`)."""
        return self.decoding if llm == "t5" else self.decoding.replace(**self.llama)

    def settings(self, llm: str = "t5") -> dict[str, Any]:
        """Returns keyword arguments of `blip.rank` if `ranking` or `retrieval`, else `generate`.

        `llm` is as in `config`.
        """
        if self.ranking or self.retrieval:
            return {name: getattr(self, name) for name in (RANK if self.ranking else RETRIEVE)}
        config = self.config(llm)
        return {name: getattr(config, name) for name in GENERATE} | config.changed()

    def override(self, fields: Mapping[str, Any], llm: str = "t5") -> "Protocol":
        """Returns a copy with the values in `fields`: `prompt`, `ranking` or settings, by name.

        The copy's other settings of generation are those of a language model of the kind `llm`.
        Settings that the copy's `mode` does not use are ignored, and so are other names.

        Raises:
          ValueError: a setting of generation has an invalid value.
        """
        names = RETRIEVE if self.retrieval else ("prompt", "ranking", *RANK)
        own = {"prompt": self.prompts.get(llm, self.prompt), "prompts": {}}
        own |= {name: fields[name] for name in names if name in fields}
        config = self.config(llm)
        if not fields.get("ranking", self.ranking):
            config = config.replace(**{name: fields[name] for name in GENERATE if name in fields})
        return dataclasses.replace(self, decoding=config, llama={}, **own)


# The released code's configs, as far as they reach `generate`. For captions all values do. For
# questions the length penalty does not: `predict_answers` uses its own default, -1 with T5 and 0
# with LLaMA. Nor does the repetition penalty: the default of `generate` applies.
_CAPTION: dict[str, Any] = {
    "decoding": GenerationConfig(
        num_beams=5, repetition_penalty=1.15, max_new_tokens=80, min_new_tokens=9
    ),
    "llama": {"max_new_tokens": 79},
}
_SHORT: dict[str, Any] = {
    "decoding": GenerationConfig(
        num_beams=5, length_penalty=-1.0, repetition_penalty=1.5, max_new_tokens=10
    ),
    "llama": {"length_penalty": 0.0, "max_new_tokens": 9},
}
_LONG: dict[str, Any] = {  # the defaults of `generate`
    "decoding": GenerationConfig(num_beams=5, repetition_penalty=1.5, max_new_tokens=256),
    "llama": {"max_new_tokens": 255},
}
_RANKED: dict[str, Any] = {"ranking": True, **_SHORT}

_CAPTION_PROMPT = "A short image description."
# From the paper's appendix E (GQA, VizWiz, video sets); also used here for VQAv2 and OK-VQA.
_QUESTION = "Question: {question} Short answer:"
_OPTIONS = "Question: {question} Options: {options}. Short answer:"
_GENERATED_QUESTION = "Given the image, generate a question whose answer is: {answer}. Question:"

_UNSCORED: dict[str, Any] = {"notes": ("The paper does not score it.",)}
_CANDIDATES = "Ranked over the answers of qa_ans2label.json; the released code generates."


def _paper(*values: float) -> dict[str, float]:
    return dict(zip(MODELS, values, strict=True))


def _row(
    name: str, split: str, metric: str, prompt: str, decoding: Mapping[str, Any], **fields: Any
) -> Protocol:
    return Protocol(
        name, prompt, split=split, metric=metric, **{"dataset": name, **decoding, **fields}
    )


EVERY_DAY = (
    Protocol("caption", _CAPTION_PROMPT, **_CAPTION),
    Protocol("vqa_short", _QUESTION, **_SHORT),
    Protocol("describe", "Write a detailed description.", **_LONG),
    Protocol("rank", "{question}", **_RANKED),
)
_BENCHMARKS = (
    _row("coco_caption", "test", "cider", _CAPTION_PROMPT, _CAPTION),
    _row("web_capfilt", "", "", _CAPTION_PROMPT, _CAPTION, **_UNSCORED),
    _row(
        *("nocaps", "val", "cider", _CAPTION_PROMPT, _CAPTION),
        paper=_paper(119.9, 120.0, 123.1, 121.9),
    ),
    _row(
        *("flickr30k", "test", "cider", _CAPTION_PROMPT, _CAPTION),
        paper=_paper(84.5, 83.5, 82.4, 82.8),
    ),
    _row("textcaps", "val", "cider", _CAPTION_PROMPT, _CAPTION),
    _row(
        *("gqa", "testdev", "exact_match", _QUESTION, _SHORT),
        paper=_paper(48.4, 47.9, 49.2, 49.5),
    ),
    _row(
        *("vsr", "test", "accuracy"),
        'Based on the image, is this statement true or false? "{question}" Answer:',
        _SHORT,
        paper=_paper(64.8, 65.6, 54.3, 52.1),
        notes=(
            "Whether the paper generated is not known; users rank yes, true, no, false.",
            "The size of the paper's test set is not known.",
        ),
    ),
    _row(
        *("iconqa", "test", "accuracy", _OPTIONS, _RANKED),
        paper=_paper(50.0, 51.2, 43.1, 44.8),
    ),
    # VQAv2's published numbers are from its test servers, which use EvalAI's metric.
    _row("vqav2", "val", "vqa_accuracy_evalai", _QUESTION, _SHORT),
    _row(
        *("vizwiz", "val", "vqa_accuracy_evalai", _QUESTION, _SHORT),
        paper=_paper(32.7, 30.9, 34.5, 33.4),
        notes=("The paper scored test-dev on the server, whose answers are not public.",),
    ),
    _row("okvqa", "val", "vqa_accuracy_lavis", _QUESTION, _SHORT),
    _row("aokvqa", "val", "direct_answer", _QUESTION, _SHORT),
    _row(
        *("scienceqa", "test", "accuracy"),
        "Context: {context} Question: {question} Options: {options}. Answer:",
        _RANKED,
        paper=_paper(70.4, 70.6, 60.5, 63.1),
        notes=("Whether texts or letters were ranked is not known.",),
    ),
    _row(
        *("textvqa", "val", "vqa_accuracy_evalai"),
        "OCR tokens: {ocr}. Question: {question} Short answer:",
        _SHORT,
        paper=_paper(46.6, 46.6, 50.1, 50.7),
    ),
    _row("ocrvqa", "test", "exact_match", _QUESTION, _SHORT),
    *(
        _row(f"{name}_questions", "", "", _GENERATED_QUESTION, _LONG, **_UNSCORED)
        for name in ("vqav2", "okvqa", "aokvqa")
    ),
    _row(
        *("msvd_qa", "test", "exact_match", _QUESTION, _RANKED),
        paper=_paper(43.4, 44.3, 41.8, 41.2),
        notes=(_CANDIDATES,),
    ),
    _row(
        *("msrvtt_qa", "test", "exact_match", _QUESTION, _RANKED),
        paper=_paper(25.0, 25.6, 22.1, 24.8),
        notes=(_CANDIDATES,),
    ),
    _row(
        *("ivqa", "test", "ivqa_accuracy", _QUESTION, _SHORT),
        paper=_paper(53.1, 53.8, 52.2, 51.0),
    ),
    _row(
        *("visual_dialog", "val", "mrr"),
        "Dialog history: {history}\n Question: {question} Short answer:",
        _RANKED,
        paper=_paper(46.6, 48.5, 45.2, 45.4),
        notes=("Whether the paper scored all ten rounds or the last is not known.",),
    ),
    _row(
        *("hateful_memes", "val", "auroc"),
        'This is an image with: "{context}" written on it. {question} Answer:',
        _RANKED,
        words=(("yes", "true"), ("no", "false")),
        paper=_paper(56.6, 54.1, 59.6, 57.5),
        notes=(
            "How one score was made of the four words is not known.",
            "On which split the paper scored is not known.",
        ),
    ),
    *(
        _row(f"llava_{kind}", "", "", "{question}", _LONG, **_UNSCORED)
        for kind in ("conversation", "detail", "reasoning")
    ),
    _row(
        *("aokvqa_choices", "val", "accuracy", templates.CHOICE[0], _RANKED),
        dataset="aokvqa",
        notes=("Multiple choice; the prompt is that of training, as the paper gives none.",),
    ),
)
BENCHMARKS: dict[str, Protocol] = {row.name: row for row in _BENCHMARKS}
PROTOCOLS: dict[str, Protocol] = {row.name: row for row in EVERY_DAY} | BENCHMARKS

# What `--datasets held_out` stands for, in the order of the paper's table.
HELD_OUT = (
    *("nocaps", "flickr30k", "gqa", "vsr", "iconqa", "textvqa", "visual_dialog", "hateful_memes"),
    *("vizwiz", "scienceqa", "msvd_qa", "msrvtt_qa", "ivqa"),
)


def get_protocol(name: str) -> Protocol:
    """Returns the protocol `name`; raises a ValueError that suggests similar names if unknown."""
    return lookup.find(PROTOCOLS, name, "protocol")


def table(rows: Mapping[str, Protocol] = PROTOCOLS) -> str:
    """Formats protocols for printing: prompt, split, mode of answering, metric."""
    return "\n".join(line for name, row in rows.items() for line in _described(name, row))


def _described(name: str, row: Protocol) -> Iterator[str]:
    scored = f"scored by {row.metric}" if row.metric else "not scored"
    scored = "scored by a judge" if row.judged else scored
    split = (row.split or "any split") if row.dataset else "for every day"
    yield f"{name}: {split}, {row.mode}, {scored}"
    if row.prompt:
        yield f"  prompt: {row.prompt!r}"
    for kind, prompt in row.prompts.items():
        yield f"  of {kind}: {prompt!r}"
    settings = {kind: row.settings(kind) for kind in ("t5", "llama")}
    for kind, values in settings.items():
        if kind == "t5" or values != settings["t5"]:
            said = ", ".join(f"{field} {value}" for field, value in values.items())
            yield f"  {'settings' if kind == 't5' else 'with a LLaMA'}: {said}"
    if row.words:
        yield f"  ranked: {'; '.join(' or '.join(words) for words in row.words)}"
    if row.paper:
        numbers = ", ".join(f"{model} {value}" for model, value in row.paper.items())
        yield f"  paper: {numbers}"
    for note in row.notes:
        yield f"  note: {note}"


def paper_model(variant: Variant) -> str:
    """Returns the name of the published model with these sizes; "" if there is none."""
    name = released_name(variant)
    return name if name in SHORT else ""

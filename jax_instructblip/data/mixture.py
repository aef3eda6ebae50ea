"""The order of training samples: sources are shuffled, repeated and mixed by weight.

    sources --shuffled, repeated, mixed by weight--> record k --template--> prompt, answer

Sample k of a run (k = 0, 1, 2, ...) is a function of (seed, k) alone, so there is no state to save.
"""

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Sequence
from typing import Any, cast

import grain
import numpy as np

from jax_instructblip.data import templates
from jax_instructblip.data.conversation import Conversation
from jax_instructblip.data.records import Record

# Weight of a source of n records: "sqrt" is the paper's rule, which it compares with the others.
SAMPLING: dict[str, Callable[[int], float]] = {
    "sqrt": math.sqrt,
    "uniform": lambda n: 1.0,
    "proportional": float,
}
# Text before the input of a prompt. None: a template is used. The others are the paper's ablation:
# no text, or a tag of task family and dataset.
INSTRUCTIONS: dict[str, Callable[["Source"], str | None]] = {
    "templates": lambda source: None,
    "plain": lambda source: "",
    "tag": lambda source: f"[{':'.join(filter(None, (source.family, source.name)))}]",
}


@dataclasses.dataclass(frozen=True)
class Source:
    """The records of one dataset, and how often the mixture draws from them.

    Attributes:
      name: its name in tables and metrics.
      records: the records, anything with `len` and `[i]`.
      digest: a hash of the content; a run refuses to resume with another one.
      weight: its share, relative to the weights of the others; 0 means that a rule of `SAMPLING`
        computes it from the number of records.
      templates: what makes the prompts, as the `kind` of `instruct`; "" means that prompts are used
        as they are.
      family: the kind of task ("image QA"), which the rule `tag` of `INSTRUCTIONS` writes in
        prompts.
    """

    name: str
    records: Sequence[Record]
    digest: str
    weight: float = 0.0
    templates: str = ""
    family: str = ""

    def __post_init__(self):
        wrong = []
        if not len(self.records):
            wrong.append("it has no records")
        if self.weight < 0:
            wrong.append(f"weight is {self.weight}, expected 0 (by data.sampling) or more")
        if self.templates not in ("", *templates.TEMPLATES, templates.CAPTION_PREFIX):
            wrong.append(
                f"templates is {self.templates!r}, expected one of "
                f"{', '.join(templates.TEMPLATES)}, {templates.CAPTION_PREFIX} or nothing"
            )
        if wrong:
            raise ValueError(f"source {self.name!r}: {'; '.join(wrong)}")


class Mixture:
    """The endless order of training samples; `mixture.record(k)` gives sample k."""

    def __init__(
        self,
        sources: Sequence[Source],
        seed: int,
        *,
        sampling: str = "sqrt",
        instructions: str = "templates",
        style: templates.TextStyle = templates.PAPER,
    ):
        """Mixes `sources` by weight in an order that `seed` determines.

        Args:
          sources: at least one, with different names.
          seed: of all random choices.
          sampling: key of `SAMPLING`, which gives the weight of a source that has none of its own.
          instructions: key of `INSTRUCTIONS`, which says what stands before the input of a prompt.
          style: how questions, captions and dialogues are written.

        Raises:
          ValueError: an argument is none of those allowed.
        """
        for name, value, known in (
            ("sampling", sampling, SAMPLING),
            ("instructions", instructions, INSTRUCTIONS),
        ):
            if value not in known:
                raise ValueError(f"{name} is {value!r}, expected one of {', '.join(known)}")
        names = [source.name for source in sources]
        if not sources or len(set(names)) < len(names):
            raise ValueError(f"sources {names}: expected at least one, and different names")
        self.sources = tuple(sources)
        self.seed, self.sampling, self.instructions = seed, sampling, instructions
        self.style = style
        size = SAMPLING[sampling]
        weights = [source.weight or size(len(source.records)) for source in sources]
        self.shares = [weight / sum(weights) for weight in weights]
        parts = [
            # Seeded by name, so that the order of a source does not depend on the other sources.
            grain.MapDataset.range(len(source.records))
            .shuffle(seed=int(digest_of([seed, source.name])[:8], 16))
            .repeat()
            .map(functools.partial(_pair, number))
            for number, source in enumerate(sources)
        ]
        self._order = grain.MapDataset.mix(parts, weights)

    def record(self, position: int, attempt: int = 0) -> tuple[Source, Record]:
        """Returns (source, record) of sample `position`.

        `attempt` > 0 gives a random record of the same source instead, as a replacement.
        """
        source, index = self.find(position, attempt)
        return source, source.records[index]

    def find(self, position: int, attempt: int = 0) -> tuple[Source, int]:
        """Returns (source, index of the record in it) of sample `position`; the record is not read.

        `attempt` > 0 gives a random record of the same source instead.
        """
        number, index = cast(tuple[int, int], self._order[position])
        source = self.sources[number]
        if attempt:
            index = int(self.rng(position, attempt, use="replace").integers(len(source.records)))
        return source, index

    def rng(self, position: int, attempt: int, use: str) -> np.random.Generator:
        """Returns a random generator that depends on the seed and on the arguments alone.

        Different names in `use` ("text", "image") give independent numbers for one sample.
        """
        return np.random.default_rng([self.seed, position, attempt, *use.encode()])

    def fingerprint(self) -> str:
        """Returns a sha256 that changes with the seed and with any source, its content or share.

        A run refuses to resume with another one.
        """
        rows = [
            [s.name, s.digest, len(s.records), s.templates, f"{share:.9f}"]
            for s, share in zip(self.sources, self.shares, strict=True)
        ]
        style = [] if self.style == templates.PAPER else [repr(self.style)]
        return digest_of([self.seed, self.instructions, *style, *rows])

    def instruct(self, source: Source, record: Record, rng: np.random.Generator) -> tuple[str, str]:
        """Returns (prompt, answer) of a record of `source`, with this mixture's instructions.

        `rng`, that of the sample (`Mixture.rng`), draws the template and the answer.
        """
        tag = INSTRUCTIONS[self.instructions](source)
        return instruct(record, source.templates, rng, tag, self.style)

    def converse(
        self, source: Source, record: Record, rng: np.random.Generator, order: str = "written"
    ) -> Conversation:
        """Returns the conversation of a record of `source`, its images in `order` (`ORDERS`).

        A source without templates keeps all rounds of a dialogue, and one of the distinct answers
        to its last question. With templates, prompt and answer of `instruct` are the only round.
        `rng` is as in `instruct`.

        Raises:
            ValueError: the record has no answer.
        """
        if source.templates:
            prompt, answer = self.instruct(source, record, rng)
            record = dataclasses.replace(record, prompt=prompt, answers=(answer,), history=())
        else:
            record = dataclasses.replace(record, answers=(draw_answer(record, rng),))
        return Conversation.from_record(record).ordered(order, rng)

    def table(self) -> str:
        """Returns the sources with their sizes and shares as a table for people."""
        width = max(6, *(len(source.name) for source in self.sources))
        lines = [f"{'source':{width}}  {'records':>10}  share"]
        for source, share in zip(self.sources, self.shares, strict=True):
            note = f"  (weight {source.weight:g})" if source.weight else ""
            lines.append(f"{source.name:{width}}  {len(source.records):>10}  {share:6.2%}{note}")
        return "\n".join(lines)


def split_caption(caption: str, rng: np.random.Generator) -> tuple[str, str]:
    """Returns (prompt, answer): the beginning of a caption, and its rest, as BLIP-2 asks FlanT5.

    The beginning ends after a word that is drawn evenly from the first to the middle one. A
    caption of one word is the answer, to no prompt.
    """
    words = caption.split()
    if len(words) < 2:
        return "", caption
    count = int(rng.integers(1, len(words) // 2 + 1))
    return " ".join(words[:count]), " ".join(words[count:])


def draw_answer(record: Record, rng: np.random.Generator) -> str:
    """Returns one of the distinct answers, drawn evenly; a ValueError if there is none."""
    if not record.answers:
        raise ValueError("it has no answer")
    distinct = tuple(dict.fromkeys(record.answers))
    return distinct[int(rng.integers(len(distinct)))]


def instruct(
    record: Record,
    kind: str,
    rng: np.random.Generator,
    tag: str | None = None,
    style: templates.TextStyle = templates.PAPER,
) -> tuple[str, str]:
    """Returns (prompt, answer) of a training sample.

    Args:
      record: the record.
      kind: a key of `templates.TEMPLATES`, from whose list a template is drawn evenly; or
        `caption_prefix`, which splits the caption (`split_caption`); or "", which uses the record's
        prompt as it is. For `question_generation` question and answer change places.
      rng: draws the template and one of the distinct answers, evenly as LAVIS (the released code)
        does.
      tag: if not None, no template is used: the prompt is the tag, then the question. "" gives the
        bare question. Both are rules of the paper's ablation of instructions.
      style: how questions, captions and dialogues are written. Its `processor` is not applied
        without `kind`.

    Raises:
      ValueError: the record has no answer, or a caption of which the style leaves nothing.
    """
    answer = draw_answer(record, rng)
    turned = kind == "question_generation"
    if not kind:
        style = dataclasses.replace(style, processor="paper")
    if kind in templates.CAPTIONS:
        answer = style.training_caption(answer)
    if kind == templates.CAPTION_PREFIX:
        return split_caption(answer, rng)
    if tag is not None:
        bare = "{answer}" if turned else "{question}"
        prompt = f"{tag} {templates.format_prompt(bare, record, answer, style)}".strip()
    else:
        choices = templates.TEMPLATES[kind] if kind else ("{question}",)
        template = choices[int(rng.integers(len(choices)))]
        prompt = templates.format_prompt(template, record, answer, style)
    return prompt, style.question(record.prompt) if turned else answer


def _pair(number: int, index: int) -> tuple[int, int]:
    return number, index


def digest_of(value: Any) -> str:
    """Returns the sha256 of `repr(value)`."""
    return hashlib.sha256(repr(value).encode()).hexdigest()

"""The order of training samples: sources shuffled, mixed by weight, turned into prompt and answer.

    sources --shuffled, repeated, mixed by weight--> sample k --template--> prompt, answer

Sample k of a run, k = 0, 1, 2, ..., is a function of (seed, k) alone: nothing is remembered.
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
from jax_instructblip.data.records import Record

# Weight of a source of n records: the paper's, and the two it was compared with.
SAMPLING: dict[str, Callable[[int], float]] = {
    "sqrt": math.sqrt,
    "uniform": lambda n: 1.0,
    "proportional": float,
}
# What stands before the input: a template, or as in the paper's ablation nothing, or task and name.
INSTRUCTIONS: dict[str, Callable[["Source"], str | None]] = {
    "templates": lambda source: None,
    "plain": lambda source: "",
    "tag": lambda source: f"[{':'.join(filter(None, (source.family, source.name)))}]",
}


@dataclasses.dataclass(frozen=True)
class Source:
    """Records with random access, and how often the mixture draws from them.

    Attributes:
      name: what tables and metrics call it.
      records: anything with `len` and `[i]`.
      digest: stands for the content; a run refuses to resume on another one.
      weight: its share, relative to the other weights; 0 means what `SAMPLING` makes of its size.
      templates: the name of a list in `templates.TEMPLATES`; without, prompts are used as they are.
      family: the kind of task, for `INSTRUCTIONS` that name it.
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
        if self.templates and self.templates not in templates.TEMPLATES:
            wrong.append(
                f"templates is {self.templates!r}, expected one of "
                f"{', '.join(templates.TEMPLATES)} or nothing"
            )
        if wrong:
            raise ValueError(f"source {self.name!r}: {'; '.join(wrong)}")


class Mixture:
    """The endless order of samples: `mixture.record(k)` is what stands at place k."""

    def __init__(
        self,
        sources: Sequence[Source],
        seed: int,
        *,
        sampling: str = "sqrt",
        instructions: str = "templates",
        style: templates.TextStyle = templates.PAPER,
    ):
        """Raises `ValueError` without sources, with two of one name, or for an unknown rule."""
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
            # Seeded by name, so that another source beside it does not change a source's order.
            grain.MapDataset.range(len(source.records))
            .shuffle(seed=int(digest_of([seed, source.name])[:8], 16))
            .repeat()
            .map(functools.partial(_pair, number))
            for number, source in enumerate(sources)
        ]
        self._order = grain.MapDataset.mix(parts, weights)

    def record(self, position: int, attempt: int = 0) -> tuple[Source, Record]:
        """The record at that place; `attempt` > 0 gives others of the same source instead."""
        source, index = self.find(position, attempt)
        return source, source.records[index]

    def find(self, position: int, attempt: int = 0) -> tuple[Source, int]:
        """The source of that record, and its number there; the record itself is not read."""
        number, index = cast(tuple[int, int], self._order[position])
        source = self.sources[number]
        if attempt:
            index = int(self.rng(position, attempt, use="replace").integers(len(source.records)))
        return source, index

    def rng(self, position: int, attempt: int, use: str) -> np.random.Generator:
        """Random numbers of one sample, independent for each `use` of them."""
        return np.random.default_rng([self.seed, position, attempt, *use.encode()])

    def fingerprint(self) -> str:
        """A sha256 that changes with the seed, a source, its content or its share."""
        rows = [
            [s.name, s.digest, len(s.records), s.templates, f"{share:.9f}"]
            for s, share in zip(self.sources, self.shares, strict=True)
        ]
        style = [] if self.style == templates.PAPER else [repr(self.style)]
        return digest_of([self.seed, self.instructions, *style, *rows])

    def instruct(self, source: Source, record: Record, rng: np.random.Generator) -> tuple[str, str]:
        """Prompt and answer of a record of that source, by the mixture's kind of instructions."""
        tag = INSTRUCTIONS[self.instructions](source)
        return instruct(record, source.templates, rng, tag, self.style)

    def table(self) -> str:
        """The sources, their sizes and their shares, for people."""
        width = max(6, *(len(source.name) for source in self.sources))
        lines = [f"{'source':{width}}  {'records':>10}  share"]
        for source, share in zip(self.sources, self.shares, strict=True):
            note = f"  (weight {source.weight:g})" if source.weight else ""
            lines.append(f"{source.name:{width}}  {len(source.records):>10}  {share:6.2%}{note}")
        return "\n".join(lines)


def instruct(
    record: Record,
    kind: str,
    rng: np.random.Generator,
    tag: str | None = None,
    style: templates.TextStyle = templates.PAPER,
) -> tuple[str, str]:
    """Prompt and answer of a training sample.

    The answer is drawn evenly from the distinct ones (as the released code does), the template
    evenly from the list `kind`; without `kind` the record's prompt is an instruction already. For
    `question_generation` question and answer change places. With a `tag` no template is used: the
    prompt is the tag and the bare input, as in the paper's ablation of instructions. `style` says
    how questions, captions and dialogues are written; what brings its own instruction is left.
    """
    if not record.answers:
        raise ValueError("it has no answer")
    distinct = tuple(dict.fromkeys(record.answers))
    answer = distinct[int(rng.integers(len(distinct)))]
    turned = kind == "question_generation"
    if not kind:
        style = dataclasses.replace(style, processor="paper")
    if kind == "caption":
        answer = style.caption(answer)
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
    """The sha256 of how Python writes the value."""
    return hashlib.sha256(repr(value).encode()).hexdigest()

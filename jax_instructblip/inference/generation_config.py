"""Decoding settings: the dataclass `GenerationConfig`, with the names that transformers uses.

    blip.generate(images, prompts, num_beams=5, length_penalty=-1.0)
    blip.generate(images, prompts, GenerationConfig(num_beams=5, length_penalty=-1.0))

The pipeline, commands, evaluation protocols, benchmarks and validation all use this class. Types,
ranges and contradictions are checked when a config is made.
"""

import argparse
import dataclasses
import difflib
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np

from jax_instructblip.fields import Field, find_problems, number, one_of, whole

LengthRule = Literal["released", "transformers4.26", "transformers5"]
LENGTH_RULES: tuple[LengthRule, ...] = ("released", "transformers4.26", "transformers5")
EARLY_STOPPING = (False, True, "never")
DRAWING = ("temperature", "top_k", "top_p")

BATCH_SIZE = 8  # questions that are answered at once, unless told otherwise

# Every beam has a row of the cache, and every step sorts the candidates of all beams: with more
# beams a search needs the memory of many prompts. No published setting comes near.
MOST_BEAMS = 1024

FIELDS: dict[str, Field] = {
    "max_new_tokens": whole(1, unit="tokens"),
    "min_new_tokens": whole(0, unit="tokens"),
    "num_beams": whole(1, MOST_BEAMS, unit="1 is greedy"),
    "num_return_sequences": whole(1),
    # Lengths of thousands to a power above 10 overflow float32.
    "length_penalty": number(-10.0, 10.0),
    "repetition_penalty": number(1e-6, 1e6, unit="1 changes nothing"),
    "temperature": number(1e-6, 1e6, optional=True, unit="leave it out for greedy decoding"),
    "top_k": whole(1, optional=True, unit="leave it out to draw among all tokens"),
    "top_p": number(above=0.0, at_most=1.0, optional=True),
    "seed": whole(0, 2**32 - 1),
    "length_rule": one_of(*LENGTH_RULES),
}

# Names of settings in other programs, or that transformers counts otherwise -> names here.
_OTHER_NAMES = {
    "max_length": "max_new_tokens, which does not count the prompt",
    "min_length": "min_new_tokens, which does not count the prompt",
    "max_tokens": "max_new_tokens",
    "max_decode_len": "max_new_tokens",
    "beam_size": "num_beams",
    "beams": "num_beams",
    "num_captions": "num_return_sequences",
    "n": "num_return_sequences",
    "sample": "do_sample",
    "use_nucleus_sampling": "do_sample with top_p",
    "nucleus": "top_p",
    "random_seed": "seed",
}

HELP = {
    "max_new_tokens": "most tokens of an answer (default: %(default)s)",
    "min_new_tokens": "no answer ends before (default: %(default)s)",
    "do_sample": "draw tokens; so do --temperature, --top_k and --top_p",
    "num_beams": "rows of a beam search (default: %(default)s; 1 is greedy)",
    "num_return_sequences": "answers to show of a beam search (default: %(default)s)",
    "length_penalty": "of beams; above 0 favours long answers (default: %(default)s)",
    "repetition_penalty": "above 1: fewer repeats (default: %(default)s)",
    "temperature": "above 0; draws instead of taking the best token",
    "top_k": "draws among the k best tokens only",
    "top_p": "draws among the best tokens that together reach p only",
    "seed": "of the draws (default: %(default)s)",
    "length_rule": "how beams' lengths are counted (default: %(default)s)",
}


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """Settings of `generate`; the defaults decode greedily.

    With any of `temperature`, `top_k` and `top_p`, or with `do_sample`, tokens are drawn from the
    distribution that is left after temperature, top-k and top-p, in this order.

    Attributes:
      max_new_tokens: most tokens of an answer, eos included and prompt excluded. Another value
        compiles another program.
      min_new_tokens: no answer ends before this many tokens.
      do_sample: draw tokens instead of taking the best; None means True if temperature, top_k or
        top_p is given.
      num_beams: running answers of a beam search; 1 is greedy. Not together with drawing.
      num_return_sequences: answers of a beam search to keep.
      early_stopping: when a beam search ends: True, as soon as there are `num_beams` answers;
        False, when a better one is unlikely; "never", when a better one is impossible.
      length_penalty: a beam search ranks answers by the sum of their scores /
        length^length_penalty. Above 0 favours long answers, below 0 short ones.
      repetition_penalty: divides positive scores of tokens that the answer already has, and
        multiplies negative ones.
      temperature: divides the scores. Close to 0 is close to greedy.
      top_k: draw only among this many of the best tokens.
      top_p: draw only among the best tokens that together reach this probability.
      seed: seed of the random draws.
      length_rule: how lengths and repetitions are counted: "released" as in the original code
        of InstructBLIP, "transformers4.26" as in that of BLIP-2 (they differ in beam searches
        alone), "transformers5" as in `generate` of transformers 5 (`sampling.py`,
        `beam_search.py`).
    """

    max_new_tokens: int = 30
    min_new_tokens: int = 0
    do_sample: bool | None = None
    num_beams: int = 1
    num_return_sequences: int = 1
    early_stopping: bool | str = False
    length_penalty: float = 1.0
    repetition_penalty: float = 1.0
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    length_rule: LengthRule = "released"

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, np.generic):  # so that it can be written as JSON
                object.__setattr__(self, field.name, value.item())
        problems = find_problems(self, FIELDS)
        wrong = {problem.partition(" is ")[0] for problem in problems}
        if problems := [*problems, *self._contradictions(wrong)]:
            raise ValueError("; ".join(problems))

    @classmethod
    def of(cls, **settings: Any) -> "GenerationConfig":
        """The config with the given settings, and defaults for all others.

        Raises:
          ValueError: unknown names, with hints, and invalid values; all in one message.
        """
        return cls().replace(**settings)

    def replace(self, **settings: Any) -> "GenerationConfig":
        """A copy with the given settings changed; a ValueError for bad names or values."""
        unknown = [name for name in settings if name not in NAMES]
        known = {name: value for name, value in settings.items() if name in NAMES}
        try:
            config = dataclasses.replace(self, **known)
        except ValueError as error:
            raise ValueError("; ".join([*map(_hint, unknown), str(error)])) from error
        if unknown:
            raise ValueError("; ".join(map(_hint, unknown)))
        return config

    @property
    def sample(self) -> bool:
        """True if tokens are drawn at random."""
        return self._drawing if self.do_sample is None else self.do_sample

    @property
    def _drawing(self) -> bool:
        return any(getattr(self, name) is not None for name in DRAWING)

    def changed(self) -> dict[str, Any]:
        """The settings that differ from their defaults, by name."""
        return {
            field.name: value
            for field in dataclasses.fields(self)
            if (value := getattr(self, field.name)) != field.default
        }

    def _contradictions(self, wrong: set[str]) -> Iterator[str]:
        """Yields a sentence for each pair of settings that contradict each other.

        `wrong` has the names of settings that are invalid by themselves, which are skipped.
        """
        if not (self.do_sample is None or isinstance(self.do_sample, bool)):
            yield f"do_sample is {self.do_sample!r}, expected True, False or None"
            return
        stop = self.early_stopping
        if not (isinstance(stop, bool) or stop == "never"):
            yield f"early_stopping is {stop!r}, expected one of {EARLY_STOPPING}"
        lengths = {"min_new_tokens", "max_new_tokens"}
        if not lengths & wrong and self.min_new_tokens > self.max_new_tokens:
            yield (
                f"min_new_tokens is {self.min_new_tokens}, expected 0 to max_new_tokens "
                f"({self.max_new_tokens})"
            )
        if self.do_sample is False and self._drawing:
            drawing = [name for name in DRAWING if getattr(self, name) is not None]
            yield (
                f"do_sample is False, but {', '.join(drawing)} would draw tokens: leave out either"
            )
        if {"num_beams", "num_return_sequences"} & wrong:
            return
        if self.num_beams > 1 and self.sample:
            yield (
                f"num_beams is {self.num_beams}, but a beam search does not draw: leave out "
                "do_sample, temperature, top_p and top_k, or num_beams"
            )
        if self.num_return_sequences > self.num_beams:
            hint = (
                "; to draw several answers ask as often, each prompt with its image again"
                if self.sample
                else "; raise num_beams for more"
            )
            yield (
                f"num_return_sequences is {self.num_return_sequences}, expected 1 to num_beams "
                f"({self.num_beams}){hint}"
            )


NAMES = tuple(field.name for field in dataclasses.fields(GenerationConfig))


def add_flags(parser: Any, *names: str, unset: bool = False) -> None:
    """Adds a command-line flag for each setting in `names`; by default all but `early_stopping`.

    `parser` is an argparse parser or a group of one. With `unset`, a flag that is not given is None
    instead of the setting's default.
    """
    defaults = GenerationConfig()
    for name in names or HELP:
        default = None if unset else getattr(defaults, name)
        usual = "as the dataset's protocol says" if unset else str(getattr(defaults, name))
        said = HELP[name].replace("%(default)s", usual)
        if name == "do_sample":
            parser.add_argument("--do_sample", action="store_true", default=None, help=said)
        elif name == "length_rule":
            parser.add_argument("--length_rule", choices=LENGTH_RULES, default=default, help=said)
        else:
            kind = FIELDS[name].kind
            parser.add_argument(f"--{name}", type=kind, default=default, help=said)


def read_flags(flags: argparse.Namespace) -> GenerationConfig:
    """The config of flags that `add_flags` added; a ValueError for invalid values."""
    settings = {name: getattr(flags, name) for name in NAMES if hasattr(flags, name)}
    return GenerationConfig.of(**settings)


def _hint(name: str) -> str:
    if name in _OTHER_NAMES:
        return f"unknown setting {name!r}: it is {_OTHER_NAMES[name]} here"
    near = difflib.get_close_matches(name, NAMES, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"known: {', '.join(NAMES)}"
    return f"unknown setting {name!r}; {hint}"


def configured(config: Any, settings: dict[str, Any]) -> GenerationConfig:
    """The `config`, or the default for None, with `settings` changed by name.

    A `config` of another type, and bad names or values, raise a ValueError.
    """
    if config is None:
        return GenerationConfig.of(**settings)
    if not isinstance(config, GenerationConfig):
        raise ValueError(
            f"config is {config!r}, expected a GenerationConfig: settings are given by name, as in "
            "max_new_tokens=30"
        )
    return config.replace(**settings)

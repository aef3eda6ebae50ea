"""Which settings of `generate` can be, each by itself and together."""

from typing import NamedTuple

from jax_instructblip.inference.beam import EARLY_STOPPING
from jax_instructblip.inference.scores import LENGTH_RULES


class Drawing(NamedTuple):
    """How tokens are drawn, where any of these is given; None leaves a step out."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None

    @property
    def asked(self) -> bool:
        """Whether tokens are drawn at all."""
        return any(value is not None for value in self)

    def values(self) -> dict[str, float]:
        """The fields of `scores.Settings`, those left out at what changes nothing."""
        defaults = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
        given = {name: value for name, value in self._asdict().items() if value is not None}
        return defaults | given


def check_search(
    num_beams: int,
    sample: bool,
    early_stopping: bool | str,
    num_return_sequences: int,
    length_rule: str,
) -> None:
    """Raises a ValueError that lists every setting of a beam search that cannot be."""
    wrong = []
    if num_beams > 1 and sample:
        wrong.append(
            f"num_beams is {num_beams}, but a beam search does not draw: leave out temperature, "
            "top_p and top_k, or num_beams"
        )
    if early_stopping not in EARLY_STOPPING:
        wrong.append(f"early_stopping is {early_stopping!r}, expected one of {EARLY_STOPPING}")
    if not 1 <= num_return_sequences <= num_beams:
        wrong.append(
            f"num_return_sequences is {num_return_sequences}, expected 1 to num_beams ({num_beams})"
        )
    if length_rule not in LENGTH_RULES:
        wrong.append(f"length_rule is {length_rule!r}, expected one of {', '.join(LENGTH_RULES)}")
    if wrong:
        raise ValueError("; ".join(wrong))


def check_settings(
    max_new_tokens: int,
    min_new_tokens: int,
    num_beams: int,
    repetition_penalty: float,
    drawing: Drawing,
) -> None:
    """Raises a ValueError that lists every setting out of its range."""
    temperature, top_k, top_p = drawing
    demands = [
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "at least 1"),
        (
            "min_new_tokens",
            min_new_tokens,
            0 <= min_new_tokens <= max_new_tokens,
            f"0 to max_new_tokens ({max_new_tokens})",
        ),
        ("num_beams", num_beams, num_beams >= 1, "at least 1 (greedy)"),
        ("repetition_penalty", repetition_penalty, repetition_penalty > 0, "above 0"),
        (
            "temperature",
            temperature,
            temperature is None or temperature > 0,
            "above 0 (leave it out for greedy decoding)",
        ),
        ("top_p", top_p, top_p is None or 0 < top_p <= 1, "above 0 and at most 1"),
        ("top_k", top_k, top_k is None or top_k >= 1, "at least 1"),
    ]
    wrong = [
        f"{name} is {value}, expected {want}" for name, value, good, want in demands if not good
    ]
    if wrong:
        raise ValueError("; ".join(wrong))

"""All metrics, by the names that protocols use (`Protocol.metric`)."""

import functools
from collections.abc import Callable

from jax_instructblip import lookup
from jax_instructblip.evaluation.metrics import penn_treebank, vqa_text
from jax_instructblip.evaluation.metrics.caption_scores import score_captions
from jax_instructblip.evaluation.metrics.choice_scores import (
    score_accuracy,
    score_auroc,
    score_yes_no,
)
from jax_instructblip.evaluation.metrics.dialogue_scores import score_ranks
from jax_instructblip.evaluation.metrics.exact_match import (
    normalise,
    score_exact_match,
    score_families,
)
from jax_instructblip.evaluation.metrics.metric import Metric
from jax_instructblip.evaluation.metrics.science_scores import (
    named_letter,
    score_science_qa,
)
from jax_instructblip.evaluation.metrics.vqa_scores import (
    RULES,
    score_direct_answer,
    score_ivqa,
    score_vqa,
)

RANKED = ("auroc", "mrr")  # metrics that need scores of all candidates, so answers must be ranked

METRICS: dict[str, Metric] = {
    "accuracy": score_accuracy,
    "auroc": score_auroc,
    "captions": functools.partial(score_captions, full=True),
    "cider": score_captions,
    "direct_answer": score_direct_answer,
    "exact_match": score_exact_match,
    "family_accuracy": score_families,
    "ivqa_accuracy": score_ivqa,
    "mrr": score_ranks,
    **{name: functools.partial(score_vqa, headline=name) for name in RULES},
    "science_qa": score_science_qa,
    "yes_no": score_yes_no,
}

_NORMALISED: dict[str, Callable[[str], str]] = {
    **dict.fromkeys((*RULES, "exact_match", "ivqa_accuracy"), vqa_text.normalise),
    "vqa_accuracy_evalai": vqa_text.normalise_evalai,
    **dict.fromkeys(("accuracy", "auroc", "family_accuracy"), normalise),
    "science_qa": named_letter,
    "cider": lambda text: penn_treebank.tokenise([text])[0],
}


def normalise_as(name: str, text: str) -> str:
    """Returns `text` in the form in which the metric `name` compares it.

    For captions that form is the counted words. `text` is returned unchanged if the metric compares
    texts as they are, or no metric has that name.
    """
    return _NORMALISED.get(name, str)(text)


def get_metric(name: str) -> Metric:
    """Returns the metric `name`; raises a ValueError that suggests similar names if unknown."""
    return lookup.find(METRICS, name, "metric")

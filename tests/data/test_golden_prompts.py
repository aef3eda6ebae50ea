"""The prompts and tokens of each dataset, byte for byte.

`golden_prompts.json` holds those of one record each. To write it anew, after a change that is meant
to change them (then check by hand what it holds):

    python -m tests.data.test_golden_prompts
"""

import functools
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest

from jax_instructblip.data import templates
from jax_instructblip.data.batch import IGNORE
from jax_instructblip.data.datasets import DATASETS
from jax_instructblip.data.mixture import instruct
from jax_instructblip.data.readers.dataset import FAMILIES
from jax_instructblip.data.text import TextProcessor
from jax_instructblip.data.tokenizer_files import load_tokenizers
from jax_instructblip.evaluation.protocol import BENCHMARKS
from jax_instructblip.models.released import get_variant
from tests.helpers.raw_layouts import LAYOUTS, write_all

GOLDEN = Path(__file__).with_name("golden_prompts.json")
SEEDS = range(3)  # of the training prompts
ASKED = {"visual_dialog": 2, "llava_conversation": 1}  # records with a history; else the first
MODELS = {"t5": "instructblip-flan-t5-xl", "llama": "instructblip-vicuna-7b"}


def prompts_of(name: str, raw: Path) -> dict:
    """Training prompts with their answers, and the zero-shot prompt, of one record."""
    dataset = DATASETS[name]
    record = list(dataset.read(raw, LAYOUTS[name].split))[ASKED.get(name, 0)]
    drawn = [instruct(record, dataset.templates, np.random.default_rng(seed)) for seed in SEEDS]
    return {
        "record": record.id,
        "training": [list(pair) for pair in dict.fromkeys(drawn)],
        "zero_shot": templates.format_prompt(BENCHMARKS[name].prompt, record, record.answers[0]),
    }


def dataset_of(family: str) -> str:
    """The one whose tokens are kept."""
    return next(name for name, dataset in DATASETS.items() if dataset.family == family)


def processor(shared: Path, kind: str) -> TextProcessor:
    folder = shared / "data/tokenizers"
    tokenizers = load_tokenizers(folder / kind, folder / "bert-base-uncased", kind)
    return TextProcessor(get_variant(MODELS[kind]), *tokenizers)


def tokens_of(text: TextProcessor, prompt: str, answer: str) -> dict[str, str]:
    """Ids that the Q-Former reads, that ask the language model, and that it is to answer."""
    example = text.example(prompt, answer)
    asked = text.prompt(prompt)["tokens"]
    wanted = example["targets"][example["targets"] != IGNORE]
    ids = {"instruction": example["qformer_tokens"], "prompt": asked, "target": wanted}
    return {name: " ".join(map(str, values)) for name, values in ids.items()}


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    folder = tmp_path_factory.mktemp("raw")
    return functools.cache(lambda name: write_all(folder, [name])[name])


@pytest.fixture(scope="module")
def golden():
    return json.loads(GOLDEN.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", DATASETS)
def test_prompts_are_the_golden_ones(name, raw, golden):
    assert prompts_of(name, raw(name)) == golden["prompts"][name]


@pytest.mark.parametrize("kind", MODELS)
def test_tokens_are_the_golden_ones(kind, shared, golden):
    text = processor(shared, kind)
    assert set(golden["tokens"][kind]) == set(FAMILIES)
    for family, stored in golden["tokens"][kind].items():
        prompt, answer = golden["prompts"][dataset_of(family)]["training"][0]
        assert tokens_of(text, prompt, answer) == stored, family
        example = text.example(prompt, answer)
        asked, target = (list(map(int, stored[name].split())) for name in ("prompt", "target"))
        joined = asked if kind == "t5" else asked + target
        assert example["tokens"].tolist() == joined
        assert not example["truncated"].any()
        if kind == "llama":
            expected = [IGNORE] * len(asked) + target
            assert example["targets"].tolist() == expected


def write_golden() -> None:
    with tempfile.TemporaryDirectory() as folder:
        raws = write_all(Path(folder))
        prompts = {name: prompts_of(name, raws[name]) for name in DATASETS}
    tokens = {}
    for kind in MODELS:
        text = processor(Path(__file__).parents[3] / "shared", kind)
        tokens[kind] = {
            family: tokens_of(text, *prompts[dataset_of(family)]["training"][0])
            for family in FAMILIES
        }
    about = "written by python -m tests.data.test_golden_prompts; tokens of the first training"
    document = {"about": about, "prompts": prompts, "tokens": tokens}
    GOLDEN.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    write_golden()

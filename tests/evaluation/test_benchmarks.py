import pytest

from jax_instructblip.data.datasets import DATASETS
from jax_instructblip.evaluation.benchmarks import (
    BENCHMARKS,
    HELD_OUT,
    MODELS,
    PAPER,
    get_benchmark,
    paper_model,
)
from jax_instructblip.evaluation.metrics import METRICS
from jax_instructblip.inference.presets import PRESETS
from jax_instructblip.models.variants import VARIANTS


def test_every_benchmark_has_a_dataset_a_preset_and_a_split_that_there_is():
    assert set(BENCHMARKS) == {*DATASETS, "aokvqa_choices"}
    for name, benchmark in BENCHMARKS.items():
        assert benchmark.name == name and name in PRESETS
        files = DATASETS[benchmark.dataset].files
        assert benchmark.split in files if benchmark.metric else not benchmark.split
        assert benchmark.metric in {*METRICS, ""}


def test_the_paper_has_numbers_of_what_is_held_out():
    assert set(HELD_OUT) == {name for name, dataset in DATASETS.items() if not dataset.held_in}
    assert all(list(row) == list(MODELS) for row in PAPER.values())
    assert PAPER["nocaps"]["instructblip-vicuna-7b"] == 123.1
    assert PAPER["ivqa"]["instructblip-flan-t5-xl"] == 53.1
    assert PAPER["scienceqa"]["instructblip-vicuna-13b"] == 63.1


@pytest.mark.parametrize("name", MODELS)
def test_the_papers_models_are_known_by_their_sizes(name):
    assert paper_model(VARIANTS[name]) == name
    assert paper_model(VARIANTS[name].replace(**{"qformer.dropout": 0.0})) == name
    assert paper_model(VARIANTS[name].replace(**{"qformer.instruction_aware": False})) == ""


def test_another_model_is_none_of_them():
    assert paper_model(VARIANTS["tiny-t5"]) == ""


def test_the_nearest_names_are_suggested():
    with pytest.raises(ValueError, match="unknown dataset 'nocap'; did you mean nocaps"):
        get_benchmark("nocap")

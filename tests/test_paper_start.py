"""The paper's training starts from downloaded folders by the three commands that README has."""

import pathlib
import re
import shlex

import pytest

from configs.paper import HELD_IN
from jax_instructblip.__main__ import main
from jax_instructblip.training import setup
from jax_instructblip.training.config_file import load_config
from jax_instructblip.training.metrics import read_metrics
from tests.helpers.raw_layouts import write_all
from tests.helpers.tiny import write_base

ROOT = pathlib.Path(__file__).resolve().parents[1]
CONFIGS = ("flan_t5_xl", "flan_t5_xxl", "vicuna_7b", "vicuna_13b")


def commands():
    """The words of the three commands, by their verb."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## The paper's mixture")[1]
    lines = section.split("```bash")[1].split("```")[0].strip().splitlines()
    words = [shlex.split(line, comments=True)[1:] for line in lines]
    assert [each[:2] for each in words[:2]] == [["prepare", "--list"], ["prepare", "vqav2"]]
    assert words[2][0] == "train" and len(words) == 3
    return words


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the held-in datasets downloaded and prepared, each by README's command."""
    folder = tmp_path_factory.mktemp("paper")
    write_all(folder / "downloads", HELD_IN)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        _, prepare, _ = commands()
        for name in HELD_IN:
            words = [re.sub(r"\bvqav2\b", name, word) for word in prepare]
            assert main([*words, "--workers", "0"]) == 0
    return folder


@pytest.mark.parametrize("name", CONFIGS)
def test_the_papers_configs_find_what_was_prepared(folder, monkeypatch, name):
    monkeypatch.chdir(folder)
    config = load_config(str(ROOT / f"configs/paper_{name}.py"))
    mixture = setup.read_mixture(config)
    assert {source.name for source in mixture.sources} == set(HELD_IN)
    records = setup.read_validation_records(config)
    assert records and {record.split for record in records} == {"val"}
    trained = {source.name: source.records for source in mixture.sources}["ocrvqa"]
    assert not {record.id for record in records} & {record.id for record in trained}


def test_the_papers_configs_start_from_prepared_data_as_the_readme_says(folder, monkeypatch):
    monkeypatch.chdir(folder)
    write_base(folder / "flan-t5-xl", "t5")
    words = [word.replace("configs/", f"{ROOT}/configs/") for word in commands()[2]]
    fields = {
        **{"train.steps": 2, "optimizer.warmup_steps": 1, "data.batch_size": 8, "data.threads": 1},
        **{"validation.every": 2, "validation.first": False, "validation.limit": 2},
    }
    assert main([*words, *(f"--config.{name}={value}" for name, value in fields.items())]) == 0
    lines = read_metrics(folder / "runs" / "flan_t5_xl")
    assert [line["step"] for line in lines if "loss" in line][-1] == 2
    assert [line["step"] for line in lines if "validation/score" in line] == [2]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"validation.path": "data/validation.jsonl"}, "config.validation.path cannot be used: "),
        ({"validation.split": "train9"}, "config.validation.path cannot be used: .*no split"),
        ({"data.sources.vqav2.path": "data/vqa"}, "config.data.sources.vqav2: no records at"),
        ({"model.init": "nowhere"}, "nowhere"),
    ],
)
def test_paths_are_checked_before_any_weight_is_read(folder, monkeypatch, capsys, fields, message):
    def read_params(*given, **named):
        raise AssertionError("weights were read")

    monkeypatch.setattr("jax_instructblip.training.initial.read_params", read_params)
    monkeypatch.chdir(folder)
    if not (folder / "base").is_dir():
        write_base(folder / "base", "t5")
    words = ["train", "--config", f"{ROOT}/configs/paper_flan_t5_xl.py"]
    words += ["--config.model.checkpoint=base", "--config.workdir=runs/refused"]
    assert main([*words, *(f"--config.{name}={value}" for name, value in fields.items())]) == 1
    assert re.search(message, capsys.readouterr().err)

import importlib
import inspect
import os
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from jax_instructblip.commands import train
from jax_instructblip.evaluation import validation

CONFIGS = Path(train.__file__).resolve().parents[2] / "configs"
PAPERS = {"flan_t5_xl": 192, "vicuna_7b": 128, "flan_t5_xxl": 64, "vicuna_13b": 64}


def read(*words, name="quickstart"):
    return train.read_config(["--config", str(CONFIGS / f"{name}.py"), *words])


def test_fields_are_changed_from_the_command_line():
    config = read(
        "--config.optimizer.learning_rate=3e-4",
        "--config.data.buckets=(8,16)",
        "--config.model.instruction_aware=False",
        "--config.data.sources.shapes.weight=2",
        "--config.workdir=/tmp/x y",
    )
    assert config.optimizer.learning_rate == 3e-4
    assert config.data.buckets == (8, 16)
    assert config.model.instruction_aware is False
    assert config.data.sources.shapes.weight == 2.0
    assert config.workdir == "/tmp/x y"


def test_can_be_called_again():
    assert read("--config.seed=1").seed == 1
    assert read("--config.seed=2").seed == 2
    assert read().seed == 0


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("--config.optimizer.learning_rat=1", "did you mean config.optimizer.learning_rate?"),
        ("--config.optimzer.learning_rate=1", "did you mean config.optimizer.learning_rate?"),
        ("--config.learning_rate=1", "did you mean config.optimizer.learning_rate?"),
        ("--config.data.sources.shape.path=x", "did you mean config.data.sources.shapes.path?"),
        ("--config.train.steps=1e3", "config.train.steps=1e3: invalid literal"),
        ("--confg.seed=1", "confg.seed"),
        ("stray", "unexpected 'stray'"),
    ],
)
def test_a_mistake_is_said_with_the_nearest_name(word, message):
    with pytest.raises(ValueError) as error:
        read(word)
    assert message in str(error.value)


def test_a_long_value_is_not_repeated_whole():
    with pytest.raises(ValueError, match=r"^flag --config.train.steps=a+ \.\.\. '?a+$") as error:
        read("--config.train.steps=" + "a" * 10_000)
    assert len(str(error.value)) < 500


def test_a_config_is_checked_before_the_records_to_validate_on_are_read(monkeypatch, tmp_path):
    monkeypatch.setattr(validation, "check", lambda *_: pytest.fail("records were read"))
    words = ["--config", str(CONFIGS / "quickstart.py"), f"--config.workdir={tmp_path}"]
    with pytest.raises(ValueError, match="config.checkpoints.every is -1"):
        train.main([*words, "--config.checkpoints.every=-1"])


def test_a_misspelt_field_in_a_config_file(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from configs import common\n"
        "def get_config():\n"
        "    config = common.get_config()\n"
        "    config.optimizer.learning_rat = 1.0\n"
        "    return config\n"
    )
    with pytest.raises(ValueError, match="learning_rat"):
        train.read_config([f"--config={path}"])


def test_no_config_and_no_file(tmp_path, capsys):
    with pytest.raises(SystemExit):
        train.read_config([])
    assert "--config" in capsys.readouterr().err
    with pytest.raises(OSError, match="no config file /nowhere.py"):
        train.read_config(["--config=/nowhere.py"])
    (tmp_path / "empty.py").write_text("")
    with pytest.raises(ValueError, match=r"has no get_config\(\)"):
        train.read_config([f"--config={tmp_path / 'empty.py'}"])


def test_help(capsys):
    with pytest.raises(SystemExit) as ended:
        train.main(["--help"])
    assert ended.value.code == 0
    assert "--config.FIELD=VALUE" in capsys.readouterr().out


def test_every_config_has_the_fields_of_common_and_no_others():
    common = importlib.import_module("configs.common").get_config()
    fields = set(importlib.import_module("configs.common").source("data"))
    seen = set()
    for path in CONFIGS.glob("*.py"):
        module = importlib.import_module(f"configs.{path.stem}")
        if path.stem == "common" or inspect.signature(module.get_config).parameters:
            continue  # one that others start from
        config = module.get_config()
        seen.add(path.stem)
        assert isinstance(config, ConfigDict) and config.is_locked
        for name, value in common.items():
            if isinstance(value, ConfigDict):
                assert set(config[name]) == set(value), (path.stem, name)
                for field, given in value.items():
                    assert type(config[name][field]) is type(given), (path.stem, name, field)
        assert set(config) == set(common)
        for source in config.data.sources.values():
            assert set(source) == fields
    assert {"quickstart", "custom_jsonl", *(f"paper_{name}" for name in PAPERS)} <= seen


@pytest.mark.parametrize("name", PAPERS)
def test_the_papers_recipe(name):
    config = read(name=f"paper_{name}")
    assert config.data.batch_size == PAPERS[name]
    assert config.train.steps == 60_000
    optimizer = config.optimizer
    rates = optimizer.warmup_learning_rate, optimizer.learning_rate, optimizer.final_learning_rate
    assert rates == (1e-8, 1e-5, 0.0)
    assert (optimizer.warmup_steps, optimizer.schedule) == (1_000, "cosine")
    assert (optimizer.b1, optimizer.b2, optimizer.weight_decay) == (0.9, 0.999, 0.05)
    assert optimizer.clip_norm == 0.0
    assert config.validation.every == 3_000
    assert len(config.data.sources) == 13
    assert config.model.checkpoint == ""  # must be given: it is where the run starts from


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "def get_config():\n    pass\n",
            "get_config() returns a NoneType, expected the Conf",
        ),
        (
            "def get_config():\n    return {'a': 1}\n",
            "get_config() returns a dict, expected",
        ),
        ("get_config = 3\n", "get_config() returns a NoneType"),
        ("def get_config(:\n", ":1: SyntaxError: invalid syntax"),
        ("\nimport nowhere\n", ":2: ModuleNotFoundError: No module named 'nowhere'"),
        ("def get_config():\n    return 1 / 0\n", ":2: ZeroDivisionError: division by zero"),
        ("def get_config():\n    return get_config()\n", "RecursionError: maximum recursion depth"),
        ("x = '\\ud800'\ndef get_config():\n    raise ValueError('no')\n", ":3: ValueError: no"),
    ],
)
def test_a_config_file_that_gives_no_config_is_named_with_its_line(tmp_path, body, message):
    path = tmp_path / "mine.py"
    path.write_text(body)
    with pytest.raises(ValueError) as error:
        train.read_config([f"--config={path}"])
    assert str(path) in str(error.value) and message in str(error.value)


@pytest.mark.parametrize("name", ["fifo", "folder.py", "zero"])
def test_a_config_that_is_no_regular_file_is_refused(tmp_path, name):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder.py").mkdir()
    (tmp_path / "zero").symlink_to("/dev/zero")
    with pytest.raises(OSError, match="no config file|expected a regular file"):
        train.read_config([f"--config={tmp_path / name}"])

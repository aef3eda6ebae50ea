import importlib.util
import json
import os
import subprocess
import sys

import jax
import pytest

from jax_instructblip.__main__ import main
from jax_instructblip.planning import sweep
from jax_instructblip.planning.chips import GIB
from jax_instructblip.planning.report import lines
from jax_instructblip.planning.topology import has_cuda
from tests.commands.test_train import CONFIGS, PAPERS
from tests.helpers.tiny import write_base

# Those of launch/README.md: data, fsdp, tensor.
MESHES = {
    "v5e:4x4": dict.fromkeys(PAPERS, "1,16,1"),
    "v4:2x2x4": {name: "8,2,1" if "3b" in name or "xxl" in name else "16,1,1" for name in PAPERS},
    "v5p:2x2x4": dict.fromkeys(PAPERS, "16,1,1"),
    "v6e:4x4": {name: "8,2,1" if "3b" in name or "xxl" in name else "16,1,1" for name in PAPERS},
}
with_compiler = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install -e .[tpu]"
)

with_cuda = pytest.mark.skipif(
    not has_cuda(), reason="needs the CUDA compiler: pip install -e .[gpu]"
)


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    base = write_base(tmp_path_factory.mktemp("base") / "llama", "llama")
    limits = [f"--config.text.{name}_limit=9" for name in ("qformer", "prompt", "answer")]
    given = ["plan", "--config", str(CONFIGS / "custom_jsonl.py"), *limits]
    return [*given, f"--config.model.checkpoint={base}", "--config.data.batch_size=4"]


def test_prints_and_writes_a_plan(words, tmp_path, capsys):
    jax.devices()  # the number of devices stays what it is
    path = tmp_path / "new" / "plan.json"
    assert main([*words, "--topology", "cpu:1", "--explain", "--json", str(path)]) == 0
    text, found = capsys.readouterr().out, json.loads(path.read_text())
    assert "train step on cpu:1, 1 chips" in text and "verdict: " in text
    largest = found["explain"]["arrays"]
    assert "largest arrays that are made" in text and largest[0]["shape"].partition("{")[0] in text
    assert largest[0]["bytes"] >= largest[-1]["bytes"] > 0
    assert "token" not in found  # a figure of answers
    answers = list(lines({**found, "token": {"read": 3 * GIB, "needed": 2 * GIB}}))
    assert "a chip reads 3.000 GiB for a new token; weights and cache are 2.000" in answers
    assert found["mesh"] == {"data": 1, "fsdp": 1, "tensor": 1} and found["fits"]
    assert found["lengths"] == {"qformer_tokens": 9, "tokens": 17, "targets": 8}
    assert 1.0 <= found["flops"]["ratio"] <= 1.05
    memory = found["memory"]
    parts = ("arguments", "outputs", "temporaries", "code")
    assert memory["need"] == sum(memory[part] for part in parts)
    assert set(found["seconds"]) == {"trace", "lower", "compile"}


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--topology", "v5f:4x4"], "unknown topology 'v5f:4x4'; did you mean v5e:4x4"),
        (["--topology", "cpu:1", "--mesh", "1,1"], "--mesh 1,1: expected three sizes"),
        (["--topology", "cpu:1", "--sweep", "--explain"], "--explain is about one plan"),
        (["--topology", "cpu:1", "--sweep", "--mesh", "1,1,1"], "--mesh is 1,1,1, but --sweep"),
        (["--topology", "cpu:1", "--tries", "3"], "--tries is 3: it is of a --sweep"),
        (["--topology", "cpu:1", "--mesh", "1,3,1"], "does not use the 1 devices"),
        (["--topology", "cpu:1", "--config.train.accumulate=3"], "a batch of 4 cannot be worked"),
        (["--topology", "cpu:1", "--config.train.acumulate=3"], "did you mean config.train."),
    ],
)
def test_mistakes_are_said(words, more, message, capsys):
    jax.devices()
    assert main([*words, *more]) == 1
    assert message in capsys.readouterr().err


def test_where_a_plan_goes_is_looked_at_before_it_is_made(words, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    more = ["--topology", "cpu:1", "--json", str(tmp_path / "file" / "plan.json")]
    assert main([*words, *more]) == 1
    printed = capsys.readouterr()
    assert "file is a file; choose another file" in printed.err and not printed.out


def test_a_sweep_recommends_one_and_survives_those_that_fail(words, monkeypatch, tmp_path, capsys):
    jax.devices()

    def elsewhere(given):
        # The one that was given first is overridden by the sweep's.
        batch = int([w for w in given if w.startswith("--config.data.b")][-1].partition("=")[2])
        if batch == 8:
            return {"error": "Segmentation fault"}
        bounds = {"compute": 1.0, "links": 0.0}
        mesh = dict(zip(("data", "fsdp", "tensor"), (1, 1, 1), strict=True))
        return {"verdict": "fits", "fits": True, "batch": batch, "mesh": mesh, "bounds": bounds,
                "moved_bytes": 0, "memory": {"need": 1}}  # fmt: skip

    monkeypatch.setattr(sweep, "elsewhere", elsewhere)
    path = tmp_path / "sweep.json"
    assert main([*words, "--topology", "cpu:1", "--sweep", "--json", str(path)]) == 0
    text, found = capsys.readouterr().out, json.loads(path.read_text())
    assert "recommended: --mesh 1,1,1, batch 4" in text and "Segmentation fault" in text
    assert found["recommended"]["batch"] == 4 and len(found["tried"]) == 2


def _on_chips(*words: str) -> subprocess.CompletedProcess:
    """In a process of its own: compilers are told things before they are loaded."""
    environment = {name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"}
    command = [sys.executable, "-m", "jax_instructblip", *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@with_compiler
def test_a_plan_for_chips_that_are_not_there(words, tmp_path):
    path = tmp_path / "plan.json"
    more = ["--topology", "v5e:2x2", "--mesh", "2,2,1", "--json", str(path)]
    done = _on_chips(*words, *more)
    assert done.returncode == 0, done.stderr
    found = json.loads(path.read_text())
    assert found["chips"] == 4 and found["moved"]["all-gather"]["bytes"] > 0
    assert 0 < found["memory"]["need"] < found["memory"]["chip"]
    assert done.stderr == ""


@with_cuda
def test_a_plan_for_a_gpu_that_is_not_there(words, tmp_path):
    path = tmp_path / "plan.json"
    more = ["--topology", "h200:1", "--step", "decode", "--explain", "--json", str(path)]
    done = _on_chips(*words, *more)
    assert done.returncode == 0, done.stderr
    found = json.loads(path.read_text())
    assert 0 < found["memory"]["need"] < found["memory"]["chip"] == int(0.75 * 139.8 * GIB)
    assert found["token"]["read"] >= found["token"]["needed"] > 0
    assert found["explain"]["arrays"] and "cuBLAS" in found["remarks"][-1]


@pytest.mark.full
@with_compiler
@pytest.mark.parametrize("topology", MESHES)
@pytest.mark.parametrize("name", PAPERS)
def test_the_papers_models_fit_as_recommended(name, topology, tmp_path):
    path = tmp_path / "plan.json"
    words = ["plan", "--config", str(CONFIGS / f"paper_{name}.py"), "--topology", topology]
    words.append("--config.model.remat.qformer=dots")  # 7B on v4 needs it, no other is harmed
    done = _on_chips(*words, "--mesh", MESHES[topology][name], "--json", str(path))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(path.read_text())
    assert found["fits"] and found["flops"]["ratio"] <= 1.05
    assert found["seconds"]["compile"] < 300

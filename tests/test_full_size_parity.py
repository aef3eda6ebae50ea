"""FlanT5-XL at its released size, bfloat16 weights: as transformers, answering, learning.

A photograph and random weights; folders and figures as in `test_full_size.py`.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_full_size import SHORT, forged, place, run_measured  # noqa: F401

pytest.importorskip("torch", reason="needs torch: pip install -e .[torch]")
pytestmark = pytest.mark.full
ROOT = Path(__file__).parents[1]
VARIANT = "instructblip-flan-t5-xl"


@pytest.fixture(scope="module")
def figures(place, shared):  # noqa: F811
    """What `benchmarks.full_size` recorded; each stage ran in a process of its own."""
    folder, ours = forged(place, shared, VARIANT), place / SHORT[VARIANT]
    if not ours.exists():
        run_measured("convert", folder, "--out", ours, "--variant", VARIANT)
    out = ROOT / "benchmarks" / "results" / "full_size_flan_t5_xl.json"
    words = ["--folder", folder, "--checkpoint", ours, "--out", out]
    words += ["--photo", shared / "data" / "images" / "lavis" / "Confusing-Pictures.jpg"]
    command = [sys.executable, "-m", "benchmarks.full_size", *map(str, words)]
    subprocess.run(command, check=True, cwd=ROOT)
    return json.loads(out.read_text())["results"]


def test_float32_logits_are_those_of_transformers(figures):
    assert figures["ours"]["relative_error"] <= 1e-3


def test_a_question_about_a_photograph_is_answered(figures):
    assert figures["answer"]["tokens"] == 8


def test_one_step_of_tuning_fits_in_memory(figures):
    """8 GB of frozen weights, 3 GB of trained ones with moments and gradient, and activations."""
    first, second = figures["train"]["steps"]
    assert first["tokens"] == second["tokens"] > 1
    assert figures["train"]["peak_gigabytes"] < 20

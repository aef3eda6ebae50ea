"""The released sizes for real: gigabytes and minutes, so only with `pytest -m full`.

Converted and exported; and FlanT5-XL as transformers, answering about a photograph, learning.

Set JAX_INSTRUCTBLIP_FULL_SIZE to a folder with 25 GB of room (Vicuna: 35 GB) to keep what is made
for the next run; without it a temporary folder is used and emptied. Figures go to
benchmarks/results/.
"""

import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jax_instructblip import checkpoint
from jax_instructblip.conversion.safetensors import open_folder

pytestmark = pytest.mark.full
RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
SHORT = {"instructblip-flan-t5-xl": "xl", "instructblip-vicuna-7b": "vicuna"}
MEMORY_LIMIT = {"instructblip-flan-t5-xl": 4e9, "instructblip-vicuna-7b": 7e9}  # bytes


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    kept = os.environ.get("JAX_INSTRUCTBLIP_FULL_SIZE")
    folder = Path(kept) if kept else tmp_path_factory.mktemp("full")
    folder.mkdir(parents=True, exist_ok=True)
    yield folder
    if not kept:
        shutil.rmtree(folder)


def forged(place, shared, variant):
    """The Hugging Face folder of that variant: released shapes, random bfloat16 weights."""
    folder = place / f"{SHORT[variant]}_hf"
    if not folder.exists():
        script = shared / "tools" / "forge_checkpoint.py"
        words = ["--variant", variant, "--out", f"{folder}.partial"]
        subprocess.run([sys.executable, str(script), *words], check=True)
        Path(f"{folder}.partial").rename(folder)
    return folder


def run_measured(*words):
    """Wall and CPU seconds and peak resident bytes of one command of the package."""
    start = time.monotonic()
    process = subprocess.Popen([sys.executable, "-m", "jax_instructblip", *map(str, words)])
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    seconds = {"seconds": round(time.monotonic() - start, 1)}
    seconds["cpu_seconds"] = round(usage.ru_utime + usage.ru_stime, 1)
    return seconds, usage.ru_maxrss * 1024


def record(name, **figures):
    """Writes one result file; figures are rounded to what they mean."""
    versions = {
        package: importlib.metadata.version(package)
        for package in ("jax", "orbax-checkpoint", "numpy", "tensorstore")
    }
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    machine = f"{os.cpu_count()} CPU cores, {memory / 2**30:.0f} GB"
    document = {"name": name, **figures, "machine": machine}
    document["versions"] = {"python": platform.python_version(), **versions}
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n")


@pytest.mark.parametrize("variant", MEMORY_LIMIT)
def test_conversion_holds_two_leaves_and_never_the_model(place, shared, variant):
    source, kept = forged(place, shared, variant), place / SHORT[variant]
    out = place / f"{kept.name}_fresh"
    shutil.rmtree(out, ignore_errors=True)
    seconds, peak = run_measured("convert", source, "--out", out, "--variant", variant)
    manifest = checkpoint.read_manifest(out)
    sizes = [checkpoint.manifest_bytes({path: entry}) for path, entry in manifest.items()]
    record(
        f"convert_{variant.removeprefix('instructblip-').replace('-', '_')}",
        command=f"jax-instructblip convert {source.name} --out {kept.name} --variant {variant}",
        source="random bfloat16 weights of the released shapes",
        gigabytes=round(sum(sizes) / 1e9, 3),
        largest_leaf_gigabytes=round(max(sizes) / 1e9, 3),
        **seconds,
        peak_memory_gigabytes=round(peak / 1e9, 3),
        limit_gigabytes=MEMORY_LIMIT[variant] / 1e9,
    )
    assert peak <= MEMORY_LIMIT[variant]
    assert peak <= 2 * max(sizes) + 1e9

    tensors = open_folder(source)
    for key, path, index in (
        ("vision_model.encoder.layers.38.mlp.fc1.weight", "vision/layers/mlp/in/kernel", 38),
        (
            "qformer.encoder.layer.7.output.dense.weight",
            "qformer/layers/plain/text_mlp/out/kernel",
            3,
        ),
        ("language_model.lm_head.weight", "llm/head/kernel", None),
    ):
        ((_, leaf),) = checkpoint.read_leaves(out, [path])
        leaf = leaf if index is None else leaf[index]
        np.testing.assert_array_equal(leaf.view(np.uint16), tensors[key].read().view(np.uint16).T)
        del leaf
    if kept.exists():
        shutil.rmtree(out)
    else:
        out.rename(kept)


def test_export_of_the_full_size_is_bit_equal(place, shared):
    """FlanT5-XL; every tensor is compared, and memory stays within one group of leaves."""
    variant = "instructblip-flan-t5-xl"
    source = forged(place, shared, variant)
    ours, back = place / SHORT[variant], place / f"{SHORT[variant]}_back"
    if not ours.exists():
        run_measured("convert", source, "--out", ours)
    seconds, peak = run_measured("export", ours, "--format", "hf", "--out", back)
    try:
        found, wanted = open_folder(back), open_folder(source)
        assert found.keys() == wanted.keys()
        for key, tensor in wanted.items():
            assert (found[key].dtype, found[key].shape) == (tensor.dtype, tensor.shape), key
            equal = np.array_equal(found[key].read().view(np.uint16), tensor.read().view(np.uint16))
            assert equal, key
    finally:
        shutil.rmtree(back)
    record(
        "export_flan_t5_xl",
        command=f"jax-instructblip export {ours.name} --format hf --out {back.name}",
        source="the conversion of random bfloat16 weights of the released shapes",
        tensors_bit_equal=len(wanted),
        gigabytes=round(sum(tensor.nbytes for tensor in wanted.values()) / 1e9, 3),
        **seconds,
        peak_memory_gigabytes=round(peak / 1e9, 3),
    )
    assert peak <= MEMORY_LIMIT[variant]


@pytest.fixture(scope="module")
def figures(place, shared):
    """The record of `benchmarks.full_size` on FlanT5-XL; each stage ran in its own process."""
    pytest.importorskip("torch", reason="needs torch: pip install -e .[torch]")
    variant = "instructblip-flan-t5-xl"
    folder, ours = forged(place, shared, variant), place / SHORT[variant]
    if not ours.exists():
        run_measured("convert", folder, "--out", ours, "--variant", variant)
    out = RESULTS / "full_size_flan_t5_xl.json"
    words = ["--folder", folder, "--checkpoint", ours, "--out", out]
    words += ["--photo", shared / "data" / "images" / "lavis" / "Confusing-Pictures.jpg"]
    command = [sys.executable, "-m", "benchmarks.full_size", *map(str, words)]
    subprocess.run(command, check=True, cwd=RESULTS.parents[1])
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

"""Every shell and Python block of README and docs runs, small models in place of large ones."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from jax_instructblip import remote
from jax_instructblip.backbones.llava import write_llava
from jax_instructblip.backbones.stage1 import write_stage1
from jax_instructblip.data.shapes import dataset as shapes
from jax_instructblip.inference.loading import EMBEDDED
from tests.helpers import forked
from tests.helpers.object_stores import s3_server
from tests.helpers.raw_layouts import write_all
from tests.helpers.tars import write_shards
from tests.helpers.visual_genome import write_questions

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")))

# What a command becomes where its own would take hours, a download, a cluster or other programs.
INSTEAD = {
    "bash launch/quickstart.sh": "bash -n launch/quickstart.sh",
    "bash launch/test.sh": "bash -n launch/test.sh",
    "sbatch --nodes=4 launch/slurm.sbatch": "bash launch/slurm.sbatch --dry_run",
    "bash launch/local_pod.sh": "bash launch/local_pod.sh --dry_run",
    "bash launch/gpu_pmap.sh": "bash launch/gpu_pmap.sh --dry_run",
    "bash launch/tpu_pod.sh": "bash launch/tpu_pod.sh --dry_run",
    "PROJECT=... ZONE=... POD=blip TYPE=v4-32 bash launch/tpu_pod.sh": (
        "PROJECT=p ZONE=z POD=blip TYPE=v4-32 bash launch/tpu_pod.sh --dry_run"
    ),
    "export PROJECT=my-project": "export TPU_POD=1 PROJECT=my-project",
    "hf download": "true",
    "jax-instructblip convert": "true",  # the folder is not there: tests/commands converts one
    "jax-instructblip export llava": "true",  # likewise: tests/conversion exports one
    "jax-instructblip verify": "jax-instructblip verify --help",
    "jax-instructblip plan": "jax-instructblip plan --help",  # libtpu: tests/commands/test_plan.py
    "jax-instructblip train --config configs/paper_": "jax-instructblip train --help # ",
    "jax-instructblip train --config configs/blip2_": "jax-instructblip train --help # ",
    "jax-instructblip train --config configs/tuning_": "jax-instructblip train --help # ",
    "jax-instructblip train --config configs/llava_": "jax-instructblip train --help # ",
    # Both stages on the drawn world: tests/training/test_llava_run.py.
    "jax-instructblip train --config configs/shapes_llava": "jax-instructblip train --help # ",
    "jax-instructblip backbones llava clip-": "jax-instructblip backbones llava --help # ",
    "jax-instructblip evaluate --checkpoint runs/flan_t5_xl --datasets held_out": "true",
    # LLaVA's benchmarks, and several models in one table: tests/evaluation runs these.
    "jax-instructblip evaluate --checkpoint llava-1.5-7b": "jax-instructblip evaluate --help # ",
    "jax-instructblip evaluate --checkpoint flan-t5-xl --beside": "true",
    "jax-instructblip evaluate --checkpoint runs/quickstart --beside": "true",
    "jax-instructblip evaluate --checkpoint runs/llava_1_5_finetune": "true",
    # A model that sees no image is asked: tests/data/instruct_data and tests/evaluation do that.
    "jax-instructblip instruct-data": "jax-instructblip instruct-data --help # ",
    "jax-instructblip judge": "jax-instructblip judge --help # ",
    "jax-instructblip prepare scienceqa_qcm": "jax-instructblip prepare --help # ",
}
# Words that are changed wherever they stand.
SMALL = {
    "--raw downloads/visual_genome": "--raw downloads/visual_genome --max_missing 0.5",
    "--datasets gqa,vsr": "--datasets gqa,vsr --limit 2",
    "gqa --data data --predictions": "gqa --limit 2 --data data --predictions",
    "--datasets flickr30k_retrieval": "--datasets flickr30k_retrieval --limit 2",
    "--datasets gqa --data data --out": "--datasets gqa --limit 2 --data data --out",
    "configs/shapes_stage1.py": "configs/shapes_stage1.py --config.train.steps=2 "
    "--config.optimizer.warmup_steps=1 --config.validation.limit=4 --config.data.batch_size=4",
    "configs/shapes_captions.py": "configs/shapes_captions.py --config.train.steps=2 "
    "--config.optimizer.warmup_steps=1 --config.validation.limit=4 --config.data.batch_size=4",
    "--config.train.steps=40": "--config.train.steps=4",
    "--config.validation.every=20": "--config.validation.every=2",
    "--config.optimizer.warmup_steps=5": "--config.optimizer.warmup_steps=1",
    '"train.steps": 2000': '"train.steps": 2, "optimizer.warmup_steps": 1',
    "--step 3000": "--step 2",
    "--compare zero-shot other": "--compare zero-shot zero-shot",
    "gs://bucket": "s3://bucket",  # whose server runs here
    "--predictions answers.jsonl": "--predictions zero-shot/predictions/gqa.jsonl",
}


def blocks(page: str) -> list[tuple[int, str, str]]:
    """Line, language and text of each block of a page that a reader would run."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.finditer(r"^```(bash|python)\n(.*?)^```", text, re.M | re.S)
    return [(text.count("\n", 0, each.start()) + 1, each[1], each[2]) for each in found]


def commands(text: str) -> list[str]:
    """The commands of a shell block, as they are run here."""
    lines = text.replace("\\\n", " ").splitlines()
    made = []
    for line in (line.strip() for line in lines if line.strip()):
        fits = [start for start in INSTEAD if line.startswith(start)]
        if fits:
            start = max(fits, key=len)
            line = INSTEAD[start] + ("" if INSTEAD[start] == "true" else line[len(start) :])
        made.append(small(line))
    return made


def small(text: str) -> str:
    """The text with the small settings of the tests."""
    for words, other in SMALL.items():
        text = text.replace(words, other)
    return text


def draw_few(folder: Path) -> None:
    """The built-in datasets under their usual names, with few scenes: all would take a minute."""
    with pytest.MonkeyPatch.context() as patch:
        for name, splits in shapes.DATASETS.items():
            few = {split: (stream, 40, asked) for split, (stream, _, asked) in splits.items()}
            patch.setitem(shapes.DATASETS, name, few)
            shapes.prepare_shapes(folder, name)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """A folder like a reader's: the repository's files, photographs, data, checkpoints, a run."""
    folder = tmp_path_factory.mktemp("reader")
    for name in ("launch", "configs", "benchmarks", "jax_instructblip"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "photos").mkdir()
    for number, color in enumerate(("red", "green", "blue", "white"), 1):
        Image.new("RGB", (64, 48), color).save(folder / "photos" / f"{number}.jpg")
    shutil.copy(folder / "photos" / "1.jpg", folder / "photo.jpg")
    line = '{{"image": "photos/{0}.jpg", "prompt": "What color is it?", "answer": "{1}"}}\n'
    lines = [line.format(n % 4 + 1, "red green blue white".split()[n % 4]) for n in range(8)]
    for name in ("train.jsonl", "validation.jsonl", "data.jsonl"):
        (folder / name).write_text("".join(lines))
    write_stage1(EMBEDDED / "shapes_t5", folder / "retrieval", features=24)
    write_llava(EMBEDDED / "shapes_llama", folder / "llava-1.5-7b", llm=EMBEDDED / "shapes_llama")
    shutil.copytree(EMBEDDED / "shapes_llama", folder / "vicuna-7b")
    for name in ("flan-t5-xl", "path/to/checkpoint"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copytree(EMBEDDED / "shapes_t5", folder / name)
    write_all(folder / "downloads", ["vqav2", "gqa", "vsr", "flickr30k"])
    write_questions(folder / "downloads" / "visual_genome")
    write_shards(folder / "downloads" / "cc3m", (6, 4))
    draw_few(folder / "drawn")
    return folder


@pytest.fixture
def workplace(prepared, tmp_path):
    """The reader's folder of one page, which begins anew."""
    return shutil.copytree(prepared, tmp_path / "reader", symlinks=True)


@pytest.fixture(scope="module")
def server():
    with s3_server() as variables:
        yield variables


@pytest.fixture(scope="module")
def environment(prepared, server, tmp_path_factory):
    """The variables of a reader's shell, whose programs are forks of one that waits."""
    binaries = tmp_path_factory.mktemp("bin")
    variables = {
        **os.environ,
        **server,
        "PATH": f"{binaries}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "JAX_INSTRUCTBLIP_CACHE": str(prepared / "drawn"),
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("programs")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    with forked.server(variables) as command:
        programs = {"jax-instructblip": f'exec {command} "$@"', "kubectl": "cat >/dev/null"}
        for name, line in programs.items():
            (binaries / name).write_text(f"#!/usr/bin/env bash\n{line}\n")
            (binaries / name).chmod(0o755)
        yield variables


@pytest.fixture(scope="module")
def run(prepared, environment):
    """`runs/mine`, as the page on tuning makes it."""
    (training,) = (
        c for _, _, text in blocks("docs/fine_tune.md") for c in commands(text) if "train " in c
    )
    subprocess.run(["bash", "-c", training], cwd=prepared, env=environment, check=True)
    (prepared / "runs" / "mine").rename(prepared / "run")
    remote.put(prepared / "run", "s3://bucket/run")
    remote.put_file(prepared / "photos" / "1.jpg", "s3://bucket")


@pytest.mark.parametrize("page", PAGES)
def test_every_block_of_a_page_runs(page, run, workplace, environment):
    if "config.workdir=runs/mine" not in (ROOT / page).read_text(encoding="utf-8"):
        (workplace / "runs").mkdir(exist_ok=True)
        (workplace / "run").rename(workplace / "runs" / "mine")
    session = ""  # Python blocks go on where the one before ended
    for line, language, text in blocks(page):
        if language == "python":
            session += small(text)
            words = [sys.executable, "-c", session]
        else:
            words = ["bash", "-euo", "pipefail", "-c", "\n".join(commands(text))]
        done = subprocess.run(
            words, cwd=workplace, env=environment, capture_output=True, text=True, check=False
        )
        said = (done.stdout + done.stderr)[-3000:]
        assert done.returncode == 0, (
            f"{page}:{line}: the block ends with {done.returncode}:\n{said}"
        )


def test_a_broken_block_is_named_by_page_and_line(
    run, workplace, environment, tmp_path, monkeypatch
):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    (tmp_path / "page.md").write_text("text\n\n```bash\njax-instructblip gnerate\n```\n")
    with pytest.raises(AssertionError, match="page.md:3: the block ends with 2"):
        test_every_block_of_a_page_runs("page.md", run, workplace, environment)


def test_no_substitute_is_left_over():
    texts = "".join(text.replace("\\\n", " ") for page in PAGES for _, _, text in blocks(page))
    texts = re.sub(" +", " ", texts)
    assert [words for words in (*INSTEAD, *SMALL) if words not in texts] == []

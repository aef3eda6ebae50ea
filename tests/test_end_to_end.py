"""Real photographs, captions, questions and tokenizers through the verbs, with a tiny model."""

import json
import os

import numpy as np
import pytest

from jax_instructblip.__main__ import main
from jax_instructblip.training.metrics import read_metrics
from tests.helpers.tiny import compile_cache


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory):
    with compile_cache(tmp_path_factory.mktemp("compiled")):
        yield


@pytest.fixture(scope="module")
def photographs(shared, tmp_path_factory):
    """JSON lines: COCO captions, and the A-OKVQA questions about the same photographs."""
    images = shared / "data" / "images"
    captions = json.loads((images / "coco" / "captions.json").read_text())
    lines, found = [], {}
    for each in captions:
        image = images / each["file"]
        if image.is_file():
            found[each["image_id"]] = str(image)
            caption = {"image": str(image), "prompt": "A short image description:"}
            lines.append(caption | {"answers": each["captions"], "task": "caption"})
    questions = json.loads(
        (shared / "data" / "vqa" / "aokvqa" / "aokvqa_v1p0_val.json").read_text()
    )
    for each in questions:
        if each["image_id"] in found:
            question = {"image": found[each["image_id"]], "prompt": f"Question: {each['question']}"}
            lines.append(question | {"answers": each["direct_answers"], "task": "vqa"})
    assert len(lines) > 20 and {line["task"] for line in lines} == {"caption", "vqa"}
    path = tmp_path_factory.mktemp("photographs") / "train.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.full  # a minute each; tests/parity/test_tuned_run.py goes the same way
@pytest.mark.parametrize("variant", ["instructblip-vicuna-7b", "instructblip-flan-t5-xl"])
def test_convert_train_resume_answer(forge, photographs, tmp_path, capsys, variant):
    base, run = str(tmp_path / "base"), tmp_path / "run"
    assert main(["convert", str(forge(variant)), "--out", base]) == 0
    assert main(["check", str(photographs), "--checkpoint", base]) == 0

    train = [
        *("train", "--config", "configs/custom_jsonl.py"),
        f"--config.workdir={run}",
        f"--config.model.checkpoint={base}",
        f"--config.data.sources.mine.path={photographs}",
        f"--config.validation.path={photographs}",
        "--config.validation.limit=4",
        "--config.validation.max_new_tokens=4",
        "--config.validation.every=100",
        "--config.data.batch_size=4",
        "--config.data.buckets=()",
        "--config.data.threads=1",
        "--config.text.qformer_limit=24",
        "--config.text.prompt_limit=24",
        "--config.text.answer_limit=24",
        "--config.model.dtype=float32",
        "--config.model.frozen_dtype=float32",
        "--config.optimizer.learning_rate=1e-2",
        "--config.optimizer.warmup_steps=2",
        "--config.model.qformer_dropout=0",  # its noise is larger than what a few steps gain
        "--config.model.llm_dropout=0",
        "--config.train.log_every=1",
        "--config.checkpoints.every=10",
    ]
    assert main([*train, "--config.train.steps=30"]) == 0
    loss = {line["step"]: line["loss"] for line in read_metrics(run) if "loss" in line}
    first, last = (
        np.mean([loss[step] for step in steps]) for steps in (range(1, 6), range(26, 31))
    )
    # The towers are random, so little can be learned through them, T5's least of all.
    assert last < first - 0.2

    assert main([*train, "--config.train.steps=32"]) == 0
    assert f"resuming {run} at step 30 of 32" in capsys.readouterr().err
    assert sorted(os.listdir(run / "checkpoints"), key=int) == ["20", "30", "32"]

    image = json.loads(photographs.read_text().splitlines()[0])["image"]
    ask = ["--image", image, "--prompt", "what is this?", "--max_new_tokens", "4", "--json"]
    assert main(["generate", "--checkpoint", str(run), *ask]) == 0
    answer = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert np.isfinite(answer["logprob"])

    out = tmp_path / "evaluated"
    measure = ["--split", "train", "--limit", "6", "--max_new_tokens", "4", "--batch_size", "4"]
    assert main(["evaluate", "--checkpoint", str(run), *measure, "--out", str(out)]) == 0
    results = json.loads((out / "results.json").read_text())["datasets"]["train"]
    assert results["count"] == 6
    assert set(results["baselines"]) == {"before", "blind", "majority"}
    assert len((out / "predictions" / "train.jsonl").read_text().splitlines()) == 6
    assert "<img" in (out / "report.html").read_text()

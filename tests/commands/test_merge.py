"""`merge` and `export` of a tuned run."""

import json
import shutil

import numpy as np
import pytest

from jax_instructblip import checkpoint
from jax_instructblip.__main__ import main
from jax_instructblip.conversion.positions import resize_positions
from jax_instructblip.data.input_format import InputFormat
from jax_instructblip.inference.loading import read_params, read_source
from jax_instructblip.models.vlm import param_shapes
from jax_instructblip.training.step_choice import METRIC
from tests.helpers.tiny import write_base

LIMITS = {"qformer_limit": 12, "prompt_limit": 12, "answer_limit": 6}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("merge") / "base", "t5")


def write_run(folder, base, steps=(2, 4), metrics=(), **fields):
    """A run as the loop leaves it: its Q-Former is the base's plus the step."""
    variant = read_source(base).variant.replace(**fields)
    shapes = checkpoint.flatten({"qformer": param_shapes(variant)["qformer"]})
    leaves = dict(checkpoint.read_leaves(base))
    for step in steps:
        place = folder / "checkpoints" / str(step)
        trained = {path: leaves[path] + np.float32(step) for path in shapes}
        checkpoint.write_tree(place / "trainable", trained.items())
        meta = {
            "format": 1,
            "step": step,
            "variant": variant.to_dict(),
            "trainable": ["qformer"],
            "base": {
                "name": str(base),
                "path": str(base),
                "sha256": checkpoint.manifest_digest(base),
            },
            "text": LIMITS,
            "input_format": {"image_crop": "center"},
        }
        (place / "meta.json").write_text(json.dumps(meta))
    lines = [{"step": step, METRIC: value} for step, value in metrics]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def queries(folder):
    params = read_params(read_source(folder), lambda path, leaf: leaf)
    return params["qformer"]["queries"]


def refused(capsys, *words):
    assert main(list(map(str, words))) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    return error


@pytest.mark.parametrize("verb", ["merge", "export"])
def test_the_step_asked_for_is_written(base, tmp_path, capsys, verb):
    run = write_run(tmp_path / "run", base, metrics=[(2, 0.75), (4, 0.5)])
    start = queries(base)
    for step, flags in ((4, []), (2, ["--step", "2"]), (2, ["--best"])):
        out = tmp_path / "-".join(["out", *flags])
        assert main([verb, str(run), "--out", str(out), *flags]) == 0
        assert f"step {step} of {run} (validation/score " in capsys.readouterr().out
        np.testing.assert_array_equal(queries(out), start + np.float32(step))
    assert main([verb, str(run / "checkpoints" / "2"), "--out", str(tmp_path / "by_folder")]) == 0
    np.testing.assert_array_equal(queries(tmp_path / "by_folder"), start + np.float32(2))


def test_a_merged_run_answers_within_its_limits_and_is_a_base_again(base, tmp_path):
    run = write_run(tmp_path / "run", base, **{"qformer.dropout": 0.25})
    assert main(["merge", str(run), "--out", str(tmp_path / "out")]) == 0
    source = read_source(tmp_path / "out")
    assert (dict(source.limits), source.variant.qformer.dropout) == (LIMITS, 0.25)
    assert source.input_format == read_source(run).input_format == InputFormat(image_crop="center")
    assert read_source(base).input_format == InputFormat()
    tuned = source.facts["tuned"]
    assert (tuned["step"], tuned["base_sha256"]) == (4, checkpoint.manifest_digest(base))
    again = write_run(tmp_path / "again", tmp_path / "out")
    path = again / "checkpoints" / "2" / "meta.json"
    path.write_text(path.read_text().replace('"center"', '"middle"'))
    with pytest.raises(ValueError, match=r"meta.json is damaged: .* image_crop is 'middle'"):
        read_source(path.parent)
    np.testing.assert_array_equal(queries(again), queries(base) + np.float32(4) + np.float32(4))


def test_a_run_on_images_of_another_size_has_resized_positions(base, tmp_path):
    run = write_run(tmp_path / "run", base, **{"vision.image_size": 42})
    before = dict(checkpoint.read_leaves(base))["vision/pos_embed"]
    after = resize_positions(before, 3)
    for verb in ("merge", "export"):
        assert main([verb, str(run), "--out", str(tmp_path / verb)]) == 0
    for folder in (run, tmp_path / "merge", tmp_path / "export"):
        source = read_source(folder)
        assert source.variant.vision.image_size == 42
        params = read_params(source, lambda path, leaf: leaf)
        np.testing.assert_array_equal(params["vision"]["pos_embed"], after)


def test_an_export_says_what_transformers_does_otherwise(base, tmp_path, capsys):
    run = write_run(tmp_path / "run", base, **{"llm.dropout": 0.25})
    assert main(["export", str(run), "--out", str(tmp_path / "out")]) == 0
    error = capsys.readouterr().err
    assert "note: the Q-Former was tuned on the last 12 tokens of an instruction" in error
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["text_config"]["dropout_rate"] == 0.25


def test_a_run_without_instructions_is_merged_but_not_exported(base, tmp_path, capsys):
    run = write_run(tmp_path / "run", base, **{"qformer.instruction_aware": False})
    error = refused(capsys, "export", run, "--out", tmp_path / "hf")
    assert "without the instruction branch" in error and "jax-instructblip merge" in error
    assert not (tmp_path / "hf").exists()
    assert main(["merge", str(run), "--out", str(tmp_path / "out")]) == 0
    assert not read_source(tmp_path / "out").variant.qformer.instruction_aware
    np.testing.assert_array_equal(queries(tmp_path / "out"), queries(base) + np.float32(4))


@pytest.mark.parametrize("verb", ["merge", "export"])
def test_what_cannot_be_written_is_one_sentence(base, tmp_path, capsys, verb):
    own = tmp_path / "base"
    shutil.copytree(base, own)
    run, out = write_run(tmp_path / "run", own), tmp_path / "out"
    assert "step 3; it has those of step 2, step 4" in refused(
        capsys, verb, run, "--out", out, "--step", "3"
    )
    assert "was never validated" in refused(capsys, verb, run, "--out", out, "--best")
    assert f"{own} is no run" in refused(capsys, verb, own, "--out", out, "--best")
    assert "not overwritten" in refused(capsys, verb, run, "--out", run)
    with pytest.raises(SystemExit):
        main([verb, str(run), "--out", str(out), "--best", "--step", "2"])
    assert "not allowed with argument" in capsys.readouterr().err
    (tmp_path / "empty" / "checkpoints").mkdir(parents=True)
    assert "has no checkpoint yet" in refused(capsys, verb, tmp_path / "empty", "--out", out)

    config = json.loads((own / "manifest.json").read_text())
    config["llm/norm"] = config.pop("llm/embed/embedding")
    (own / "manifest.json").write_text(json.dumps(config))
    assert "was tuned on another base" in refused(capsys, verb, run, "--out", out)
    shutil.rmtree(own)
    error = refused(capsys, verb, run, "--out", out)
    assert f"is gone: looked for {own}" in error
    for text, words in (
        ("{}", "meta.json is damaged; copy it again:"),
        ('{"base": 3}', "base is 3, expected an object"),
        ("[]", "meta.json is damaged"),
        ("{", "meta.json is damaged"),
    ):
        (run / "checkpoints" / "4" / "meta.json").write_text(text)
        assert words in refused(capsys, verb, run, "--out", out)
    assert not out.exists() and not list(tmp_path.glob(".*"))


def test_merge_wants_a_run(base, tmp_path, capsys):
    assert "there is nothing to merge" in refused(capsys, "merge", base, "--out", tmp_path / "out")


def test_the_help_of_best_names_the_score(capsys):
    with pytest.raises(SystemExit):
        main(["merge", "--help"])
    assert METRIC in capsys.readouterr().out

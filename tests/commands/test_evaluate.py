import json
import shutil

import pytest

from jax_instructblip.commands import evaluate
from jax_instructblip.evaluation.predictions import read_rows
from tests.helpers.tiny import compile_cache, write_base, write_data


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluate")
    return write_base(folder / "base"), write_data(folder / "data", count=6)


def test_needs_data_and_a_place(files):
    with pytest.raises(ValueError, match="--data and --out: needed, because .* is no run"):
        evaluate.main(["--checkpoint", str(files[0])])


def test_an_unknown_split_is_refused_before_weights_are_read(files, tmp_path):
    with pytest.raises(ValueError, match="no split 'tset'; its splits: "):
        words = ["--checkpoint", "/nowhere", "--data", "shapes", "--split", "tset"]
        evaluate.main([*words, "--out", str(tmp_path)])


def test_a_place_that_cannot_be_written_is_refused_before_weights_are_read(files, tmp_path):
    (tmp_path / "file").write_text("")
    words = ["--checkpoint", "/nowhere", "--data", str(files[1])]
    with pytest.raises(FileExistsError, match="file"):
        evaluate.main([*words, "--out", str(tmp_path / "file")])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--mode", "rank"], "--mode: only used with --datasets"),
        (["--prompt", "x", "--tensor", "2"], "--prompt, --tensor: only used with --datasets"),
        (
            ["--compare", "a", "b"],
            "--checkpoint, --data, --out: not used with --compare, which takes no other flag",
        ),
        (["--list"], "--checkpoint, --data, --out: not used with --list"),
        (
            ["--datasets", "gqa", "--predictions", "x", "--num_beams", "2", "--dtype", "float32"],
            "--checkpoint, --dtype, --num_beams: not used with --predictions: nothing is answered",
        ),
        (["--datasets", "gqa", "--no_baselines"], "--no_baselines: only used without --datasets"),
        (["--num_beams", "0"], "num_beams is 0, expected at least 1"),
        (["--length_penalty", "nan"], "length_penalty is nan"),
    ],
)
def test_flags_that_change_nothing_are_refused(files, tmp_path, words, message):
    given = ["--checkpoint", "/nowhere", "--data", str(files[1]), "--out", str(tmp_path)]
    with pytest.raises(ValueError, match=message):
        evaluate.main([*given, *words])


def test_a_checkpoint_folder_is_measured_on_a_file(files, tmp_path, capsys):
    base, data = files
    broken = tmp_path / "data"
    shutil.copytree(data.parent, broken)
    (broken / "2.png").write_bytes(b"no image")
    out = tmp_path / "out"
    words = ["--data", str(broken / "train.jsonl"), "--out", str(out), "--max_new_tokens", "2"]
    with compile_cache(tmp_path / "compiled"):
        assert evaluate.main(["--checkpoint", str(base), *words, "--batch_size", "4"]) == 0
    said = capsys.readouterr().out
    assert "mean of the families" in said and "report.html" in said
    results = json.loads((out / "results.json").read_text())
    assert results["command"].startswith("jax-instructblip evaluate --checkpoint ")
    assert results["kind"] == "families" and results["versions"]["jax"] and results["date"]
    results = results["datasets"]["test"]
    assert set(results["baselines"]) == {"majority", "blind"}  # nothing was tuned
    assert results["baselines"]["majority"]["accuracy"] == pytest.approx(100 * 2 / 6)
    assert results["families"] == {"color": 6} and results["count"] == 6
    assert len(results["problems"]) == 1 and "2.png" in results["problems"][0]
    assert f"could not be asked: {results['problems'][0]}" in said
    found = read_rows(out / "predictions" / "test.jsonl")
    assert [each.id for each in found] == [f"train:{number}" for number in range(1, 7)]
    assert found[2].score == 0.0 and {each.task for each in found} == {"color"}
    assert evaluate.main(["--compare", str(out), str(out)]) == 0
    assert "test: 0 of 6 samples differ" in capsys.readouterr().out

import json
import shutil

import pytest

from jax_instructblip.commands import evaluate
from jax_instructblip.evaluation.families import Prediction
from tests.micro import compile_cache, write_base, write_data


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
    results = json.loads((out / "results.json").read_text())["splits"]["test"]
    assert set(results["mean"]) == {"tuned", "majority", "blind"}  # nothing was tuned
    assert results["mean"]["majority"] == pytest.approx(2 / 6)
    assert results["tasks"]["color"]["count"] == results["count"] == 6
    assert len(results["problems"]) == 1 and "2.png" in results["problems"][0]
    assert f"could not be asked: {results['problems'][0]}" in said
    lines = (out / "predictions" / "test.jsonl").read_text().splitlines()
    found = [Prediction(**json.loads(line)) for line in lines]
    assert [each.id for each in found] == [f"train:{number}" for number in range(1, 7)]
    assert not found[2].correct

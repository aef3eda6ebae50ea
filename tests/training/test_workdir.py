import os

import pytest

from jax_instructblip.training import workdir
from jax_instructblip.training.workdir import Workdir
from tests.bucket import bucket


def test_a_folder_on_the_disk_is_made_and_stays(tmp_path):
    with Workdir(str(tmp_path / "a" / "run")) as place:
        assert str(place) == str(place.folder) == str(tmp_path / "a" / "run")
        assert not place.folder.exists()  # until it is needed
        place.fetch()
        (place.folder / "config.json").write_text("{}")
        place.push()
    assert os.listdir(tmp_path / "a" / "run") == ["config.json"]


def test_small_files_go_to_the_store_and_come_back(monkeypatch):
    with bucket() as store:
        with Workdir("gs://bucket/run/") as place:
            assert str(place) == "gs://bucket/run"
            place.fetch()
            for name in ("config.json", "metrics.jsonl", "tensorboard/events", "checkpoints/1/x"):
                (place.folder / name).parent.mkdir(parents=True, exist_ok=True)
                (place.folder / name).write_text(name)
            place.push()
            local = place.folder
        assert not local.exists()
        names = {"config.json", "metrics.jsonl", "tensorboard/events"}
        assert set(store.store) == {f"/bucket/run/{name}" for name in names}
        with Workdir("gs://bucket/run") as place:
            place.fetch()
            assert sorted(os.listdir(place.folder)) == ["config.json", "metrics.jsonl"]
            assert (place.folder / "metrics.jsonl").read_text() == "metrics.jsonl"
            monkeypatch.setattr(workdir.jax, "process_index", lambda: 1)
            (place.folder / "metrics.jsonl").write_text("another's")
            place.push()  # of several processes the first one does
        assert store.store["/bucket/run/metrics.jsonl"].getvalue() == b"metrics.jsonl"


@pytest.mark.parametrize("place", ["gs://bucket/run", "run"])
def test_its_copy_on_the_disk_goes_when_the_run_fails(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError), bucket(), Workdir(place) as made:
        made.fetch()
        raise ValueError
    assert made.folder.exists() == (place == "run")

import os

import pytest

from jax_instructblip.training import run_lock, workdir
from jax_instructblip.training.workdir import Workdir
from tests.helpers.bucket import bucket


def test_a_folder_on_the_disk_is_made_and_stays(tmp_path):
    with Workdir(str(tmp_path / "a" / "run")) as location:
        assert str(location) == str(location.folder) == str(tmp_path / "a" / "run")
        assert not location.folder.exists()  # until it is needed
        location.fetch()
        (location.folder / "config.json").write_text("{}")
        location.push()
    assert os.listdir(tmp_path / "a" / "run") == ["config.json"]


def test_small_files_go_to_the_store_and_come_back(monkeypatch):
    with bucket() as store:
        with Workdir("gs://bucket/run/") as location:
            assert str(location) == "gs://bucket/run"
            location.fetch()
            for name in ("config.json", "metrics.jsonl", "tensorboard/events", "checkpoints/1/x"):
                (location.folder / name).parent.mkdir(parents=True, exist_ok=True)
                (location.folder / name).write_text(name)
            location.push()
            local = location.folder
        assert not local.exists()
        names = {"config.json", "metrics.jsonl", "tensorboard/events"}
        assert set(store.store) == {f"/bucket/run/{name}" for name in names}
        with Workdir("gs://bucket/run") as location:
            location.fetch()
            assert sorted(os.listdir(location.folder)) == ["config.json", "metrics.jsonl"]
            assert (location.folder / "metrics.jsonl").read_text() == "metrics.jsonl"
            monkeypatch.setattr(workdir.jax, "process_index", lambda: 1)
            (location.folder / "metrics.jsonl").write_text("another's")
            location.push()  # of several processes the first one does
        assert store.store["/bucket/run/metrics.jsonl"].getvalue() == b"metrics.jsonl"


@pytest.mark.parametrize("location", ["gs://bucket/run", "run"])
def test_its_copy_on_the_disk_goes_when_the_run_fails(location, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError), bucket(), Workdir(location) as made:
        made.fetch()
        raise ValueError
    assert made.folder.exists() == (location == "run")


def test_a_second_run_in_a_folder_is_refused(tmp_path):
    with Workdir(str(tmp_path / "run")) as location:
        with Workdir(str(tmp_path / "run")) as other:  # not there yet: nothing to lock
            location.fetch()
            with pytest.raises(ValueError, match="in use by another run"):
                other.fetch()
        with pytest.raises(ValueError, match="in use by another run"), Workdir(str(location)):
            pass
    with Workdir(str(tmp_path / "run")) as location:
        location.fetch()
        assert os.listdir(location.folder) == ["run.lock"]
    assert not os.listdir(tmp_path / "run")


def test_in_a_store_the_run_that_comes_last_goes_on(capsys, monkeypatch):
    with bucket() as store:
        with Workdir("gs://bucket/run") as first:
            first.fetch()
            first.push()
            assert list(store.store) == ["/bucket/run/run.lock"] and not capsys.readouterr().err
            me = run_lock.Owner.me()
            monkeypatch.setattr(
                run_lock.Owner, "me", lambda: run_lock.Owner("elsewhere", me.process, me.since)
            )
            with Workdir("gs://bucket/run") as second:
                second.fetch()
                said = capsys.readouterr().err
                assert f"a run that has not ended ({me})" in said and "stops at its next" in said
                (first.folder / "metrics.jsonl").write_text("first")
                with pytest.raises(OSError, match=r"taken over by another run \(process .* on els"):
                    first.push()
                assert "/bucket/run/metrics.jsonl" not in store.store
                second.push()
        assert not store.store  # the note goes with the run


def test_a_run_that_was_taken_over_leaves_the_note_of_the_other(monkeypatch):
    with bucket() as store:
        with Workdir("gs://bucket/run") as first:
            first.fetch()
            store.store["/bucket/run/run.lock"].seek(0)
            store.store["/bucket/run/run.lock"].truncate()
            store.store["/bucket/run/run.lock"].write(b"another's")
        assert store.store["/bucket/run/run.lock"].getvalue() == b"another's"

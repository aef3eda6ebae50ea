import threading

import pytest

from jax_instructblip import remote
from tests.helpers.bucket import bucket


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(remote, "PAUSE_SECONDS", 0.0)


@pytest.fixture
def store():
    with bucket() as made:
        yield made


def fill(folder):
    for name in ("a.json", "deep/b", "deep/er/c"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def test_what_is_an_address():
    assert remote.is_remote("gs://bucket/run") and not remote.is_remote("runs/mine")


def test_a_folder_comes_back_and_its_last_file_is_put_last(store, tmp_path):
    order = []
    store.before = order.append
    remote.put(fill(tmp_path / "here"), "gs://bucket/there", last="a.json")
    names = [path.removeprefix("/bucket/there/") for path in order]
    assert sorted(names[:-1]) == ["deep/b", "deep/er/c"] and names[-1] == "a.json"
    remote.get("gs://bucket/there", tmp_path / "back")
    for name in ("a.json", "deep/b", "deep/er/c"):
        assert (tmp_path / "back" / name).read_text() == name
    assert remote.names("gs://bucket/there") == ["a.json", "deep"]
    assert remote.holds("gs://bucket/there", "a.json")
    assert remote.read("gs://bucket/there", "a.json") == b"a.json"
    remote.remove("gs://bucket/there", first="a.json")
    assert remote.names("gs://bucket/there") == [] and not remote.names("gs://nowhere/x")
    assert remote.read("gs://bucket/there", "a.json") is None
    with pytest.raises(FileNotFoundError, match="gs://bucket/there has no files"):
        remote.get("gs://bucket/there", tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


def test_files_travel_together(store, tmp_path):
    """A store's answer takes a tenth of a second, a checkpoint has hundreds of files."""
    meet = threading.Barrier(3)
    store.before = lambda path: meet.wait(timeout=30)
    remote.put(fill(tmp_path / "here"), "gs://bucket/there")
    assert len(remote.names("gs://bucket/there")) == 2 and not meet.broken


def test_a_file_is_tried_again_and_then_given_up_before_the_last_one(store, tmp_path):
    left = [2]

    def fail(path):
        if path.endswith("er/c") and left[0]:
            left[0] -= 1
            raise ConnectionError("503 the store is busy")

    store.before = fail
    here = fill(tmp_path / "here")
    remote.put(here, "gs://bucket/there", last="a.json")
    left[0] = 3
    remote.remove("gs://bucket/there")
    message = r"gs://bucket/there/deep/er/c: 503 the store is busy \(3 tries\)"
    with pytest.raises(OSError, match=message):
        remote.put(here, "gs://bucket/there", last="a.json")
    assert not remote.holds("gs://bucket/there", "a.json")


def test_a_store_that_refuses_is_told_at_once_with_what_to_do(store):
    remote.check("gs://bucket/run")
    assert remote.names("gs://bucket/run") == []  # nothing is left of it

    def refuse(path):
        raise PermissionError("403 no access")

    store.before = refuse
    with pytest.raises(ValueError, match="gs://bucket/run cannot be written to: 403 no access; is"):
        remote.check("gs://bucket/run")


@pytest.mark.parametrize(
    ("folder", "message"),
    [("az://bucket/run", "pip install adlfs"), ("ftp://bucket/run", "known are gs://, s3://")],
)
def test_an_unknown_store_or_an_absent_library_is_named(folder, message):
    with pytest.raises(ValueError, match=message):
        remote.check(folder)

import concurrent.futures
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from jax_instructblip import atomic
from jax_instructblip.atomic import (
    atomic_folder,
    free_bytes,
    refuse_existing,
    set_aside,
    sole_writer,
    write_file,
)


def test_folder_appears_whole(tmp_path):
    with atomic_folder(tmp_path / "a" / "b") as temporary:
        (temporary / "file").write_text("x")
        assert not (tmp_path / "a" / "b").exists()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]
    assert (tmp_path / "a" / "b" / "file").read_text() == "x"


def test_nothing_is_left_after_an_error(tmp_path):
    with pytest.raises(RuntimeError, match="boom"), atomic_folder(tmp_path / "b") as temporary:
        (temporary / "file").write_text("x")
        raise RuntimeError("boom")
    assert list(tmp_path.iterdir()) == []


def test_existing_folder_is_refused_and_kept(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "file").write_text("old")
    with pytest.raises(FileExistsError, match="not overwritten"), atomic_folder(tmp_path / "b"):
        raise AssertionError("must not be entered")
    assert (tmp_path / "b" / "file").read_text() == "old"
    with pytest.raises(FileExistsError):
        refuse_existing(tmp_path / "b")


def test_folder_that_appears_meanwhile_is_kept(tmp_path):
    with pytest.raises(FileExistsError), atomic_folder(tmp_path / "b"):
        (tmp_path / "b").mkdir()
        (tmp_path / "b" / "file").write_text("another writer's")
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
    assert (tmp_path / "b" / "file").read_text() == "another writer's"


def test_empty_folder_is_filled(tmp_path):
    with atomic_folder(tmp_path) as temporary:
        (temporary / "file").write_text("x")
    assert (tmp_path / "file").read_text() == "x"


def test_remains_of_a_killed_writer_are_removed_but_not_those_of_a_living_one(tmp_path):
    dead = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True
    )
    host = socket.gethostname()
    left = tmp_path / f".b.partial-{host}-{int(dead.stdout)}"
    living = tmp_path / f".b.partial-{host}-{os.getppid()}"
    other = tmp_path / f".c.partial-{host}-{int(dead.stdout)}"
    for folder in (left, living, other):
        folder.mkdir()
    with atomic_folder(tmp_path / "b"):
        pass
    assert (left.exists(), living.exists(), other.exists()) == (False, True, True)


def test_free_bytes_of_a_folder_not_yet_made(tmp_path):
    assert free_bytes(tmp_path / "a" / "b" / "c") > 0


def test_a_file_appears_whole(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    write_file(path, "old")
    write = Path.write_bytes

    def full(self, data):
        write(self, data[:2])
        raise OSError("no space left")

    with monkeypatch.context() as disk, pytest.raises(OSError, match="no space left"):
        disk.setattr(Path, "write_bytes", full)
        write_file(path, "new")
    assert path.read_text() == "old"
    write_file(path, "new")
    assert path.read_text() == "new"


def test_a_text_that_is_no_utf8_is_written_as_json_has_it(tmp_path):
    path = tmp_path / "rows.json"
    rows = {"a\ud800": "\udcff \u7ea2 \U0001f534"}
    write_file(path, json.dumps(rows, ensure_ascii=False))
    assert json.loads(path.read_text(encoding="utf-8")) == rows
    assert "\u7ea2" in path.read_text(encoding="utf-8")


def test_what_cannot_be_written_to_is_told_before_anything_is_made(tmp_path, monkeypatch):
    assert atomic.unwritable(tmp_path / "new" / "run") == ""
    (tmp_path / "file").write_text("")
    assert atomic.unwritable(tmp_path / "file" / "run") == f"{tmp_path / 'file'} is a file"
    with pytest.raises(OSError, match="file is a file; choose another"):
        refuse_existing(tmp_path / "file" / "run")
    # Of a read-only disk; what permissions say does not bind the superuser.
    monkeypatch.setattr(atomic.os, "access", lambda place, how: place != tmp_path)
    assert atomic.unwritable(tmp_path / "new").startswith(f"{tmp_path} cannot be written to")


def test_a_folder_has_one_writer(tmp_path):
    folder = tmp_path / "a" / "b"
    with sole_writer(folder):
        with pytest.raises(ValueError, match="another process writes to .*b: wait"):
            with sole_writer(folder):
                pass
        assert folder.is_dir()
    assert not folder.exists()  # nothing was written
    with sole_writer(folder):
        (folder / "file").write_text("x")
    assert (folder / "file").is_file()


@pytest.mark.parametrize("made_again", [False, True])
def test_a_folder_that_its_last_writer_removes_meanwhile_is_locked_anew(
    tmp_path, monkeypatch, made_again
):
    folder, lock_alone, calls = tmp_path / "a", atomic.lock_alone, []

    def late(file, path):
        calls.append(file)
        if len(calls) == 1:  # between our opening and our lock
            folder.rmdir()
            if made_again:
                folder.mkdir()
        lock_alone(file, path)

    monkeypatch.setattr(atomic, "lock_alone", late)
    with sole_writer(folder):
        (folder / "file").write_text("x")
        with pytest.raises(ValueError, match="another process writes"):
            with sole_writer(folder):
                pass
    assert len(calls) == 3 and (folder / "file").is_file()


def test_a_writer_whose_folder_is_gone_removes_no_other_writers(tmp_path):
    folder = tmp_path / "a"
    first, second = sole_writer(folder), sole_writer(folder)
    with first:
        folder.rmdir()
        second.__enter__()
    with pytest.raises(ValueError, match="another process writes"), sole_writer(folder):
        pass
    second.__exit__(None, None, None)
    assert not folder.exists()


@pytest.mark.parametrize("make", [Path.touch, os.mkfifo, lambda path: path.symlink_to("none")])
def test_what_is_no_folder_is_named(tmp_path, make):
    make(tmp_path / "a")
    with pytest.raises(FileExistsError, match="/a'"), sole_writer(tmp_path / "a"):
        pass


def test_a_place_that_does_not_exist_is_said_at_once(tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to("none")
    with pytest.raises(OSError, match="link"), sole_writer(tmp_path / "link" / "a"):
        pass
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(FileNotFoundError), sole_writer(Path("a")):
        pass


def test_many_writers_of_a_folder_wait_or_write_and_fail_in_no_other_way(tmp_path):
    def write(number):
        written = 0
        for _ in range(200):
            try:
                with sole_writer(tmp_path / "a"):
                    written += 1
            except ValueError as error:
                assert "another process writes" in str(error)
        return written

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(write, range(4))) > 0


def test_what_is_set_aside_replaces_nothing(tmp_path):
    for number in ("", "-2", "-3"):
        (tmp_path / "a.jsonl").write_text(number)
        assert set_aside(tmp_path / "a.jsonl") == tmp_path / f"a.aside{number}.jsonl"
        assert (tmp_path / f"a.aside{number}.jsonl").read_text() == number
    (tmp_path / "1.5").mkdir()
    assert set_aside(tmp_path / "1.5", "old") == tmp_path / "1.5.old"


def test_a_name_that_is_not_utf_8_is_refused_before_anything_is_made(tmp_path):
    folder = tmp_path / "a\udce9"
    said = "cannot be written as UTF-8: .* is the byte 0xE9 of another encoding"
    with pytest.raises(ValueError, match=said):
        refuse_existing(folder)
    with pytest.raises(ValueError, match=said), atomic_folder(folder):
        raise AssertionError("must not be entered")
    assert "the byte 0xE9" in atomic.unwritable(folder)
    assert list(tmp_path.iterdir()) == []

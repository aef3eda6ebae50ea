"""Files and folders of a store are read and written as those of a disk are."""

import json
import os
import signal
import subprocess
import sys
import time
import uuid

import pytest

import jax_instructblip
from jax_instructblip import remote, stores
from jax_instructblip.commands import prepare
from jax_instructblip.data.sources import open_records
from tests.helpers import object_stores
from tests.helpers.bucket import bucket
from tests.helpers.interpreter import ROOT
from tests.helpers.raw_layouts import write_all
from tests.helpers.tiny import compile_cache, write_base, write_data
from tests.test_entry_points import content, fields

LIMIT = 300  # seconds until a killed run must have saved


@pytest.fixture(autouse=True)
def own_copies(monkeypatch, tmp_path):
    monkeypatch.setenv(stores.VARIABLE, str(tmp_path / "copies"))
    monkeypatch.setattr(remote, "PAUSE_SECONDS", 0.0)


@pytest.fixture(scope="module")
def server():
    """The environment of those who shall find the server: its client keeps its address."""
    with object_stores.s3_server() as environment:
        yield environment


@pytest.fixture(params=["memory", "s3"])
def home(request, server):
    """The address of an empty folder."""
    return f"{request.param}://bucket/{uuid.uuid4().hex}"


def write(folder, **files):
    for name, text in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def test_only_what_has_changed_is_copied_again(home, tmp_path, monkeypatch):
    remote.put(write(tmp_path / "a", x="1", deep__y="2"), home)
    copied = []
    get = remote.get_files
    note = lambda address, targets, done: (
        copied.append(sorted(targets)) or get(address, targets, done)
    )
    monkeypatch.setattr(remote, "get_files", note)
    copy = stores.input_path(home)
    assert (copy / "x").read_text() == "1" and (copy / "deep/y").read_text() == "2"
    assert stores.input_path(home + "/") == copy  # nothing
    time.sleep(0.01)  # a store in memory tells files apart by their time
    remote.put_file(write(tmp_path / "b", x="3") / "x", home)
    assert (stores.input_path(home) / "x").read_text() == "3"
    (copy / "deep/y").unlink()  # somebody tidied up
    stores.input_path(home)
    remote.remove_file(home, "x")
    assert stores.input_path(home) == copy and not (copy / "x").exists()
    assert copied == [["deep/y", "x"], [], ["x"], ["deep/y"], []]
    assert stores.input_path(f"{home}/deep/y").read_text() == "2"  # a single file


def test_nothing_there_and_names_that_lead_out(home, tmp_path):
    with pytest.raises(FileNotFoundError, match=f"{home}/no.* does not exist: check the address"):
        stores.input_path(f"{home}/no")
    with bucket() as store:
        store.store["/bucket/evil/../../x"] = None
        store.find = lambda self, path, **_: {"/bucket/evil/../../x": {"size": 1}}
        try:
            with pytest.raises(ValueError, match="names that lead out of it"):
                stores.input_path("gs://bucket/evil")
        finally:
            del store.find


def test_a_new_folder_appears_whole_or_stays_on_the_disk(home, tmp_path):
    with stores.output_folder(f"{home}/new") as (folder, title):
        write(folder, **{"config.json": "{}", "params__a": "1"})
    assert title == f"{home}/new" and remote.names(title) == ["config.json", "params"]
    assert not list(stores.folder_of_copies().glob("outgoing-*"))
    with pytest.raises(FileExistsError, match="new exists and is not overwritten"):
        with stores.output_folder(f"{home}/new"):
            pass
    with pytest.raises(KeyError), stores.output_folder(f"{home}/other") as (folder, _):
        write(folder, **{"config.json": "{}"})
        raise KeyError("the work failed")
    assert remote.names(f"{home}/other") == []
    assert not list(stores.folder_of_copies().glob("outgoing-*"))


def test_a_store_that_fails_in_the_middle_leaves_no_whole_folder_and_loses_nothing():
    with bucket() as store, pytest.raises(OSError, match=r"503 busy.*stands whole in") as error:
        with stores.output_folder("gs://bucket/new") as (folder, _):
            write(folder, **{"config.json": "{}", "params__a": "1"})
            store.before = fail
    assert not any("config.json" in name for name in store.store)
    assert (folder / "params/a").read_text() == "1" and str(folder) in str(error.value)


def test_an_interrupted_copy_says_where_all_of_it_is(capsys):
    def interrupt(path):
        raise KeyboardInterrupt

    with bucket() as store, pytest.raises(KeyboardInterrupt):
        with stores.output_folder("gs://bucket/new") as (folder, _):
            write(folder, **{"config.json": "{}"})
            store.before = interrupt
    assert f"it stands whole in {folder}" in capsys.readouterr().err
    assert (folder / "config.json").is_file()


def fail(path):
    raise ConnectionError("503 busy")


def test_a_folder_that_grows_goes_to_the_store_meanwhile_and_comes_back(
    home, tmp_path, monkeypatch
):
    monkeypatch.setattr(stores, "PUSH_SECONDS", 0.05)
    with stores.growing_folder(f"{home}/out") as folder:
        write(folder, rows="1", old="x")
        deadline = time.monotonic() + 30
        while remote.read(f"{home}/out", "rows") != b"1":
            assert time.monotonic() < deadline
            time.sleep(0.02)
    monkeypatch.setenv(stores.VARIABLE, str(tmp_path / "another machine"))
    with pytest.raises(KeyError), stores.growing_folder(f"{home}/out") as folder:
        assert (folder / "rows").read_text() == "1"
        (folder / "old").unlink()
        write(folder, rows="12")
        raise KeyError("the work failed")
    assert remote.read(f"{home}/out", "rows") == b"12" and remote.names(f"{home}/out") == ["rows"]


def test_of_json_lines_the_images_that_they_name_are_copied(home, tmp_path):
    folder = write_data(tmp_path / "data", count=3).parent
    lines = next(folder.glob("*.jsonl"))
    named = {json.loads(line)["image"] for line in lines.read_text().splitlines()}
    write(folder, **{"run__checkpoints__1__a.b": "of another run", "unnamed.png": "1"})
    remote.put(folder, home)
    copy = stores.input_rows(f"{home}/{lines.name}")
    found = {path.relative_to(copy.parent).as_posix() for path in copy.parent.rglob("*.*")}
    assert found == {lines.name, *named}
    with pytest.raises(FileNotFoundError, match=f"data is {home}/no.jsonl, which does not exist"):
        stores.input_rows(f"{home}/no.jsonl")


def test_bad_lines_of_a_store_are_left_to_their_reader(home, tmp_path):
    lines = ("[]", '{"image": 3}', '{"images": "a.png"}', "no json")
    bad = "\n".join([*lines, '{"images": ["../up.png", "sub/./a.png"]}'])
    files = {"rows.jsonl": bad, "sub__a.png": "1", "x__other.png": "1"}
    remote.put(write(tmp_path / "data", **files), home)
    copy = stores.input_rows(f"{home}/rows.jsonl")
    assert copy.read_text() == bad and (copy.parent / "sub/a.png").is_file()
    assert not (copy.parent / "x").exists()


def test_results_that_cannot_be_copied_stay_and_go_there_next_time(tmp_path):
    with bucket() as store:
        with pytest.raises(OSError, match="gs://bucket/out lacks what was found last .*503 busy"):
            with stores.growing_folder("gs://bucket/out") as folder:
                write(folder, rows="1")
                store.before = fail
        store.before = None
        with stores.growing_folder("gs://bucket/out") as folder:
            assert (folder / "rows").read_text() == "1"
        assert remote.read("gs://bucket/out", "rows") == b"1"


def test_prepared_in_a_store(home, tmp_path, capsys):
    raw = write_all(tmp_path / "raw")["vsr"]
    words = ["vsr", "--raw", str(raw), "--split", "test", "--workers", "0", "--out", home]
    assert prepare.main(words) == 0
    address = f"{home}/vsr/{prepare_version()}"
    assert f"prepared: {address}" in capsys.readouterr().out
    assert {"prepared.json", "dataset_info.json"} <= set(remote.names(address))
    first = dict(remote.stamps(address))
    assert prepare.main(words) == 0 and remote.stamps(address) == first  # done already
    with pytest.raises(ValueError, match="shard_size"):
        prepare.main([*words, "--shard_size", "3"])
    records, _ = open_records(f"{home}/vsr", "test")
    here, _ = open_records(stored_here(raw, tmp_path), "test")
    assert list(records) == list(here)


def prepare_version():
    from jax_instructblip.data.prepare.shards import VERSION

    return VERSION


def stored_here(raw, tmp_path):
    assert prepare.main(["vsr", "--raw", str(raw), "--split", "test", "--out", str(tmp_path)]) == 0
    return tmp_path / "vsr"


def test_from_the_base_to_the_export_nothing_lies_on_the_disk(server, tmp_path):
    """Trained, killed, taken up, asked, measured, merged, exported: by the real client of S3."""
    remote_parts = ("base", "data", "run", "answers", "exported", "merged")
    base = write_base(tmp_path / "base", "t5")
    data = write_data(tmp_path / "data", count=6)
    with compile_cache(tmp_path / "programs"):
        at = {name: f"s3://bucket/{name}" for name in remote_parts}
        remote.put(base, at["base"], last="config.json")
        remote.put(data.parent, at["data"])
        lines = f"{at['data']}/{data.name}"
        given = fields(at["base"], lines, at["run"]) | {"train.steps": 40, "checkpoints.every": 2}
        killed_after_a_save(given, server)
        steps = saved_steps(at["run"])
        assert steps and steps[-1] < 40
        config = ROOT / "configs" / "custom_jsonl.py"
        given |= {"train.steps": steps[-1] + 2}
        assert jax_instructblip.train(config, given) == at["run"]
        assert saved_steps(at["run"])[-1] == steps[-1] + 2

        blip = jax_instructblip.load(at["run"])
        image = next(name for name in remote.stamps(at["data"]) if name.endswith(".png"))
        prompt = "What is there?"
        answer = blip.generate(f"{at['data']}/{image}", prompt, max_new_tokens=3)[0]
        there = blip.generate(str(data.parent / image), prompt, max_new_tokens=3)[0]
        assert answer.tokens == there.tokens
        # Of a run's checkpoints the one that is read is copied.
        copies = [path.parent.parent.name for path in stores.folder_of_copies().rglob("params")]
        assert [name for name in copies if name.isdecimal()] == [str(steps[-1] + 2)]

        results = jax_instructblip.evaluate(
            at["run"], data=lines, out=at["answers"], split="test", no_baselines=True
        )
        stored = json.loads(remote.read(at["answers"], "results.json") or b"")
        assert stored == results and results["checkpoint"] == at["run"]
        assert jax_instructblip.merge(at["run"], at["merged"]) == at["merged"]
        assert jax_instructblip.export(at["merged"], at["exported"]) == at["exported"]
        jax_instructblip.merge(at["run"], tmp_path / "merged")
        jax_instructblip.export(tmp_path / "merged", tmp_path / "exported")
        remote.get(at["exported"], tmp_path / "back")
        assert content(tmp_path / "back") == content(tmp_path / "exported")
        again = jax_instructblip.convert(at["exported"], "s3://bucket/converted")
        picture = str(data.parent / image)
        blip = jax_instructblip.load(again)
        assert blip.generate(picture, prompt, max_new_tokens=3)[0].tokens == answer.tokens


def killed_after_a_save(given, environment):
    """Starts the training as a user does, and kills it when a checkpoint is there."""
    flags = [f"--config.{name}={value}" for name, value in given.items()]
    process = subprocess.Popen(
        [sys.executable, "-m", "jax_instructblip", "train", "--config", "configs/custom_jsonl.py"]
        + flags,
        cwd=ROOT,
        env={**os.environ, **environment},
        stderr=subprocess.PIPE,
    )
    deadline = time.monotonic() + LIMIT
    while not saved_steps(given["workdir"]):
        assert process.poll() is None, process.stderr.read().decode()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()


def saved_steps(run):
    names = remote.names(f"{run}/checkpoints")
    return sorted(int(n) for n in names if remote.holds(f"{run}/checkpoints/{n}", "meta.json"))

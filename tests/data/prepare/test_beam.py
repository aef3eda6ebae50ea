"""Preparation by Apache Beam, where it is installed: `pip install apache-beam`."""

import hashlib
import pathlib

import pytest

from jax_instructblip.data.datasets import DATASETS
from jax_instructblip.data.prepare.beam import prepare_with_beam
from jax_instructblip.data.prepare.builder import open_folder
from jax_instructblip.data.prepare.shards import PrepareError, prepare, read_report
from tests.helpers.raw_layouts import LAYOUTS, write_all

pytest.importorskip("apache_beam", reason="Apache Beam is not installed")

NAMES = ("vsr", "msvd_qa")


@pytest.fixture(scope="module")
def raw(tmp_path_factory):
    folder = tmp_path_factory.mktemp("raw")
    write_all(folder, NAMES)
    return folder


@pytest.mark.parametrize("name", NAMES)
def test_the_records_are_those_of_the_other_road(raw, tmp_path, name):
    splits = (LAYOUTS[name].split,)
    here = prepare(DATASETS[name], raw / name, tmp_path / "here", splits=splits)
    beam = prepare_with_beam(
        DATASETS[name], raw / name, tmp_path / "beam", runner="DirectRunner", splits=splits
    )
    assert list(open_folder(beam, splits[0])) == list(open_folder(here, splits[0]))
    found, wanted = (read_report(folder)["splits"][splits[0]] for folder in (beam, here))
    for field in ("records", "read", "annotations", "left_out_count"):
        assert found[field] == wanted[field]
    shards = sorted(beam.glob("*.array_record-*"))
    digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in shards]
    assert [digest for _, digest in found["shards"]] == digests


def test_missing_images_are_left_out_or_end_the_run(tmp_path):
    out = tmp_path / "out"
    raw = write_all(tmp_path / "raw", ["vsr"])["vsr"]
    split = LAYOUTS["vsr"].split
    count = len(list(DATASETS["vsr"].read(raw, split)))
    record = next(iter(DATASETS["vsr"].read(raw, split)))
    pathlib.Path(str(record.images[0])).write_bytes(b"")
    settings = {"runner": "DirectRunner", "splits": (split,)}
    with pytest.raises(PrepareError, match="records cannot be used"):
        prepare_with_beam(DATASETS["vsr"], raw, out, max_missing=0.0, **settings)
    assert not [path for path in out.rglob("*") if path.is_file()]
    folder = prepare_with_beam(DATASETS["vsr"], raw, out, max_missing=1.0, **settings)
    report = read_report(folder)["splits"][split]
    assert 0 < report["left_out_count"] == count - len(open_folder(folder, split))

import json

import numpy as np
import pytest

from jax_instructblip.conversion.safetensors import (
    NAMES,
    ConversionError,
    Tensor,
    Writer,
    fingerprint,
    open_folder,
)
from tests.helpers.hf_folders import INDEX, save_file, tensors

torch = pytest.importorskip("torch", reason="needs torch: pip install -e .[torch]")

STATE = {
    "a": torch.arange(12, dtype=torch.float32).reshape(3, 4),
    "b": torch.arange(6, dtype=torch.bfloat16).reshape(6, 1),
    "c": torch.arange(5, dtype=torch.float16),
    "scalar": torch.tensor(2.5),
    "ids": torch.arange(4, dtype=torch.int64),
    "empty": torch.zeros(0, 3),
}


@pytest.fixture
def single(tmp_path):
    save_file(STATE, tmp_path / "model.safetensors", {"format": "pt"})
    return tmp_path


@pytest.fixture
def sharded(tmp_path):
    parts = {"model-1.safetensors": ("a", "ids"), "model-2.safetensors": ("b", "c")}
    index = {}
    for name, keys in parts.items():
        save_file({key: STATE[key] for key in keys}, tmp_path / name)
        index |= dict.fromkeys(keys, name)
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": index}))
    return tmp_path


def failures(folder):
    with pytest.raises(ConversionError) as error:
        open_folder(folder)
    assert all(line in str(error.value) for line in error.value.failures)
    return error.value.failures


def rewrite_header(path, change):
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    change(header)
    made = json.dumps(header).encode()
    path.write_bytes(len(made).to_bytes(8, "little") + made + raw[8 + length :])


def test_reads_what_the_usual_library_wrote(single):
    found = open_folder(single)
    assert found.keys() == STATE.keys()
    for key, wanted in STATE.items():
        array = found[key].read()
        assert array.shape == tuple(wanted.shape)
        assert str(wanted.dtype) == f"torch.{array.dtype.name}"
        np.testing.assert_array_equal(array.astype(np.float64), wanted.to(torch.float64).numpy())


def test_reads_a_part_along_the_first_axis(single):
    found = open_folder(single)["b"]
    np.testing.assert_array_equal(found.read(1, 3).astype(np.float32), [[2], [3]])


def test_reads_shards(sharded):
    found = open_folder(sharded)
    assert sorted(found) == ["a", "b", "c", "ids"]
    np.testing.assert_array_equal(found["c"].read(), np.arange(5))
    assert {name: entry["bytes"] for name, entry in fingerprint(found).items()} == {
        path.name: path.stat().st_size for path in sharded.glob("*.safetensors")
    }


def test_no_weights(tmp_path):
    (tmp_path / "pytorch_model.bin").write_text("")
    (line,) = failures(tmp_path)
    assert "only safetensors are read" in line and "pytorch_model.bin" in line
    assert "no folder" in failures(tmp_path / "nowhere")[0]


def test_truncated_file(single):
    path = single / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    (line,) = failures(single)
    assert line.startswith("model.safetensors: ") and line.endswith(": truncated")
    path.write_bytes(path.read_bytes()[:40])
    assert "truncated" in failures(single)[0]
    path.write_bytes(b"1234")
    assert "4 bytes" in failures(single)[0]
    path.write_bytes(b"\x08" + bytes(7) + b"not json")
    assert "header cannot be read" in failures(single)[0]


def test_bytes_left_over(single):
    path = single / "model.safetensors"
    path.write_bytes(path.read_bytes() + b"x")
    assert failures(single)[0].endswith("bytes left over")


def test_a_wrong_header_lists_every_error(single):
    def lie(header):
        header["a"]["shape"] = [3, 5]
        header["c"]["dtype"] = "F7"
        header["b"]["data_offsets"] = [10**9, 10**9 + 12]

    rewrite_header(single / "model.safetensors", lie)
    lines = failures(single)
    assert any("a: [3, 5] F32 takes 60 bytes" in line and "hold 48" in line for line in lines)
    assert any("b: begins at 1000000000" in line and "hole" in line for line in lines)
    assert any("c: entry" in line and "F7" in line for line in lines)
    assert any(line.endswith("truncated") for line in lines)


def test_overlapping_tensors(single):
    def overlap(header):
        begin, end = header["a"]["data_offsets"]
        header["again"] = {"dtype": "F32", "shape": [3, 4], "data_offsets": [begin, end]}

    rewrite_header(single / "model.safetensors", overlap)
    assert any("overlaps the tensor before it" in line for line in failures(single))


def test_shards_and_index_that_disagree_are_all_listed(sharded):
    document = json.loads((sharded / INDEX).read_text())
    index = document["weight_map"]
    del index["ids"]  # in the shard, not in the index
    index["ghost"] = "model-1.safetensors"  # in the index, not in the shard
    index["lost"] = "model-3.safetensors"  # no such shard
    index["c"] = "model-1.safetensors"  # in another shard
    outside = f"../{sharded.name}/model-1.safetensors"  # there, but a shard is no path
    index["out"] = outside
    (sharded / INDEX).write_text(json.dumps(document))
    save_file({"x": STATE["a"]}, sharded / "model-9.safetensors")  # a shard that no key is in
    lines = failures(sharded)
    for words in (
        ("model-1.safetensors: holds ids, which the index does not name",),
        ("model-1.safetensors: the index promises ghost",),
        ("model-1.safetensors: the index promises c,",),
        ("model-2.safetensors: holds c, which the index places in model-1.safetensors",),
        ("model-3.safetensors: the index names this shard, but there is no such file", "lost"),
        (f"{outside}: the index names this shard",),
        ("model-9.safetensors: the index does not name this file",),
    ):
        assert any(all(word in line for word in words) for line in lines), (words, lines)
    assert len(lines) == 7


@pytest.mark.parametrize(
    ("document", "said"),
    [
        ({}, "no readable weight_map: found null"),
        ({"weight_map": []}, "no readable weight_map: found a list"),
        ({"weight_map": {}}, "no readable weight_map: found an object"),
        ({"weight_map": {"a": 5, "b": None}}, "2 tensors have no file name; the first is a: found"),
        ({"weight_map": {"a": ["x"]}}, "1 tensors have no file name"),
        ([], "found a list at the top, expected an object"),
        (5, "at the top, expected an object"),
    ],
)
def test_damaged_index(sharded, document, said):
    (sharded / INDEX).write_text(json.dumps(document))
    (line,) = failures(sharded)
    assert said in line
    (sharded / INDEX).write_text('{"weight_map": {"a": "x", "a": "y"}}')
    assert 'key "a" twice' in failures(sharded)[0]


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        (5, "entry is int 5, expected an object"),
        ([], "entry is a list, expected an object"),
        ({"dtype": 5}, "entry has the dtype 5, expected one of F64, F32"),
        ({"dtype": ["F32"]}, "entry has the dtype ['F32']"),
        ({"shape": 3}, "entry has the shape 3"),
        ({"shape": [3, 4.0]}, "entry has the shape [3, 4.0]"),
        ({"shape": [True, 12]}, "entry has the shape [True, 12]"),
        ({"shape": ["3", 4]}, "entry has the shape ['3', 4]"),
        ({"shape": [-3, -4]}, "entry has the shape [-3, -4]"),
        ({"shape": [1] * 9}, "expected at most 8 whole numbers"),
        ({"shape": [2**70]}, "entry has the shape [1180591620717411303424]"),
        ({"data_offsets": None}, "entry has the data_offsets None"),
        ({"data_offsets": [0]}, "entry has the data_offsets [0]"),
        ({"data_offsets": [0, 1, 2]}, "entry has the data_offsets [0, 1, 2]"),
        ({"data_offsets": [0.0, 48.0]}, "entry has the data_offsets [0.0, 48.0]"),
        ({"data_offsets": ["0", "48"]}, "entry has the data_offsets ['0', '48']"),
        ({"data_offsets": {"a": 1}}, "entry has the data_offsets {'a': 1}"),
    ],
)
def test_wrong_types_in_a_header_are_one_sentence(single, entry, said):
    def change(header):
        header["a"] = {**header["a"], **entry} if isinstance(entry, dict) else entry

    rewrite_header(single / "model.safetensors", change)
    assert any(
        line.startswith("model.safetensors: a: ") and said in line for line in failures(single)
    )


@pytest.mark.parametrize("header", [b"[]", b"55", b'{"a": {}, "a": {}}', b"[" * 5000, b'"text"'])
def test_a_header_that_is_none(single, header):
    path = single / "model.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header)
    (line,) = failures(single)
    assert line.startswith("model.safetensors: the header cannot be read: ")
    path.write_bytes((24).to_bytes(8, "little") + b'{"__metadata__": [1] }  ')
    assert "__metadata__ is a list, expected an object" in failures(single)[0]


@pytest.mark.parametrize(("dtype", "said"), [("F8_E4M3", "quantised weights: take"), ("U16", "no")])
def test_a_dtype_that_is_not_read_is_named_once_with_the_cure(tmp_path, dtype, said):
    size = 1 if dtype.startswith("F8") else 2
    header = {
        name: {"dtype": dtype, "shape": [4], "data_offsets": [4 * size * n, 4 * size * (n + 1)]}
        for n, name in enumerate("abc")
    }
    raw = json.dumps(header).encode()
    path = tmp_path / "model.safetensors"
    path.write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(12 * size))
    with pytest.raises(ConversionError, match="holds weights of a dtype that is not read") as error:
        open_folder(tmp_path)
    (line,) = error.value.failures
    assert line.startswith(f"3 tensors are {dtype}, the first is a: {said}")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ConversionError, match="is damaged"):
        open_folder(tmp_path)


def test_file_that_shrinks_while_it_is_read(single):
    found = open_folder(single)
    path = single / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-60])
    with pytest.raises(OSError, match="ended while a tensor was read"):
        for tensor in found.values():
            tensor.read()


@pytest.mark.parametrize("shard_bytes", [10**6, 60, 1])
def test_writer_is_read_by_the_usual_library(tmp_path, shard_bytes):
    specs = {}
    arrays = {}
    save_file(STATE, tmp_path / "model.safetensors")
    for key, tensor in open_folder(tmp_path).items():
        arrays[key] = tensor.read()
        specs[key] = (tensor.dtype, tensor.shape)
    out = tmp_path / "out"
    out.mkdir()
    writer = Writer(out, specs, shard_bytes)
    for key in reversed(list(arrays)):
        writer.write(key, arrays[key])
    writer.close()
    files = sorted(out.glob("*.safetensors"))
    assert len(files) == {10**6: 1, 60: 3, 1: 6}[shard_bytes]
    assert (out / INDEX).exists() == (len(files) > 1)
    found = tensors(out)
    assert found.keys() == STATE.keys()
    for key, wanted in STATE.items():
        assert found[key].dtype == wanted.dtype and torch.equal(found[key], wanted)
    for tensor in open_folder(out).values():  # and by this one, each aligned to its own width
        assert tensor.offset % tensor.dtype.itemsize == 0


def test_writer_refuses_what_does_not_fit(tmp_path):
    writer = Writer(
        tmp_path, {"a": (np.dtype("float32"), (2, 3)), "b": (np.dtype("int8"), (1,))}, 99
    )
    with pytest.raises(ValueError, match="a: "):
        writer.write("a", np.zeros((3, 2), np.float32))
    writer.write("a", np.zeros((2, 3), np.float32))
    with pytest.raises(ValueError, match="taken"):
        writer.write("a", np.zeros((2, 3), np.float32))
    with pytest.raises(ValueError, match="never written: b"):
        writer.close()


def test_every_dtype_has_one_name():
    assert len(NAMES) == 10
    assert Tensor(None, np.dtype("float16"), (3, 4), 0).nbytes == 24


@pytest.mark.parametrize("name", ["../a/x.safetensors", "/a/x.safetensors", "..", ".", "x" * 300])
def test_a_shard_that_is_no_name_of_a_file_beside_the_index_is_refused(tmp_path, name):
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": name}}))
    with pytest.raises(ConversionError) as error:
        open_folder(tmp_path)
    (line,) = error.value.failures
    said = f"{name:.255}: the index names this shard, but it is no name of a file beside it (1"
    assert line.startswith(said)

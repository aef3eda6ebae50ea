import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jax_instructblip
from jax_instructblip import checkpoint
from jax_instructblip.inference.loading import read_params, read_source, require_kind
from jax_instructblip.inference.pipeline import READERS, InstructBlipPipeline
from jax_instructblip.parallel.mesh import make_mesh
from tests.helpers.tiny import write_base


@pytest.fixture(scope="module", params=["t5", "llama", "opt"])
def base(request, tmp_path_factory):
    return write_base(tmp_path_factory.mktemp("save") / "base", request.param)


def leaves(path):
    return checkpoint.flatten(read_params(read_source(path), lambda path, leaf: leaf))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_saved_is_what_is_held(base, tmp_path, dtype):
    blip = jax_instructblip.load(base, dtype=dtype)
    queries = blip.params["qformer"]["queries"]
    blip.params["qformer"]["queries"] = queries + 1
    blip.save(tmp_path / "out")
    found, wanted = leaves(tmp_path / "out"), leaves(base)
    assert found.keys() == wanted.keys()
    for path, leaf in wanted.items():
        expected = np.asarray(queries + 1) if path == "qformer/queries" else leaf.astype(dtype)
        assert found[path].dtype == expected.dtype
        np.testing.assert_array_equal(found[path], expected, err_msg=path)
    assert read_source(tmp_path / "out").variant == blip.variant


def test_stacked_weights_and_those_over_a_mesh_are_saved_alike(base, tmp_path):
    blip = jax_instructblip.load(base, mesh=make_mesh(data=1))
    blip.save(tmp_path / "mesh")
    source = read_source(base)
    params = read_params(source, lambda path, leaf: jnp.asarray(leaf))
    own = InstructBlipPipeline(source.variant, params, blip.text)
    own.save(tmp_path / "own")
    digests = [checkpoint.manifest_digest(tmp_path / name) for name in ("mesh", "own")]
    assert set(digests) == {checkpoint.manifest_digest(base)}
    text = jax_instructblip.load(tmp_path / "own").text  # its tokenizers were not copied
    for words in ("what color is it? red", "  blue"):
        np.testing.assert_array_equal(
            text.prompt(words)["tokens"], blip.text.prompt(words)["tokens"]
        )


def test_limits_stay(base, tmp_path):
    blip = jax_instructblip.load(base)
    source = read_source(base)
    text = type(blip.text).load(base, source.variant, qformer_limit=5)
    InstructBlipPipeline(source.variant, blip.params, text, source=source).save(tmp_path / "out")
    assert jax_instructblip.load(tmp_path / "out").text.qformer_limit == 5
    config = checkpoint.read_config(tmp_path / "out")
    (tmp_path / "out" / "files.json").unlink()  # config.json is changed below
    for limits in ({"other": 5}, {"qformer_limit": "5"}, [5], {"qformer_limit": True}):
        checkpoint.write_config(tmp_path / "out", {**config, "text": limits})
        with pytest.raises(checkpoint.CheckpointError, match="states the limits of texts"):
            read_source(tmp_path / "out")


def test_refusals_leave_nothing(base, tmp_path, monkeypatch):
    blip = jax_instructblip.load(base)
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").write_text("kept")
    with pytest.raises(FileExistsError, match="not overwritten"):
        blip.save(tmp_path / "taken")
    elsewhere = type(
        "Elsewhere", (), {"is_fully_addressable": False, "nbytes": 1, "dtype": jnp.dtype("float32")}
    )()
    blip.params = jax.tree.map(lambda leaf: elsewhere, blip.params)
    with pytest.raises(ValueError, match="other processes hold parts of the parameters"):
        blip.save(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


def test_a_kind_without_a_reader_is_named(base):
    source = read_source(base)
    assert source.variant.kind in READERS and require_kind(source, READERS)
    with pytest.raises(ValueError, match="which nothing here answers with; expected .* llava") as e:
        require_kind(source, {"llava": dict})
    assert f"{base} is a model of kind {source.variant.kind}" in str(e.value)

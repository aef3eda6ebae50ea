"""PyTorch files: old formats, `Parameter` objects, other objects than tensors, broken files."""

import numpy as np
import pytest

from jax_instructblip.conversion.safetensors import ConversionError
from jax_instructblip.conversion.torch_files import open_pth

torch = pytest.importorskip("torch", reason="needs torch: pip install -e .[torch]")

ROWS = torch.arange(6.0).reshape(2, 3)


def test_files_of_before_torch_1_6(tmp_path):
    path = tmp_path / "a.bin"
    torch.save({"a": ROWS}, path, _use_new_zipfile_serialization=False)
    np.testing.assert_array_equal(open_pth(path)["a"].read(), ROWS.numpy())


def test_parameters_are_tensors(tmp_path):
    torch.save({"a": torch.nn.Parameter(ROWS)}, tmp_path / "a.pth")
    np.testing.assert_array_equal(open_pth(tmp_path / "a.pth")["a"].read(1, 2), ROWS[1:].numpy())


@pytest.mark.parametrize(
    ("tensor", "kind"),
    [
        (ROWS.to_sparse(), "sparse"),
        (ROWS.to("meta"), "without data"),
        (ROWS.to(torch.float8_e4m3fn), r"of the dtype torch\.float8_e4m3fn"),
    ],
    ids=["sparse", "meta", "float8"],
)
def test_tensors_that_are_no_arrays(tmp_path, tensor, kind):
    torch.save({"a": ROWS, "b": tensor}, tmp_path / "a.pth")
    with pytest.raises(ConversionError, match=rf"cannot be read \(\d\):\n  b is {kind}") as caught:
        open_pth(tmp_path / "a.pth")
    assert ("take the release in bfloat16" in str(caught.value)) == ("dtype" in kind)


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ({"state_dict": {"a": ROWS}, "epoch": 3}, r"state_dict \(dict\), epoch \(int\)"),
        ({"model": {"a": ROWS, "steps": 3}}, r"found steps \(int\); expected a state_dict"),
        ([ROWS], "found a list"),
        ({}, "found nothing"),
    ],
    ids=["other key", "number", "list", "empty"],
)
def test_what_is_no_dict_of_tensors_is_named(tmp_path, content, found):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(ConversionError, match=found):
        open_pth(tmp_path / "a.pth")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "it is empty"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 9\n", "git lfs pull"),
        (b"<html>404</html>", "no file of PyTorch, for it begins with b'<html>404"),
    ],
    ids=["empty", "git-lfs", "page"],
)
def test_what_is_no_file_of_pytorch(tmp_path, content, reason):
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(ConversionError, match=reason):
        open_pth(tmp_path / "a.pth")


def test_nobody_is_told_to_run_what_a_file_holds(tmp_path):
    torch.save({"a": ROWS, "b": np.random.default_rng}, tmp_path / "a.pth")
    with pytest.raises(ConversionError, match=r"it holds numpy\.\S*default_rng, no") as error:
        open_pth(tmp_path / "a.pth")
    assert "weights_only" not in str(error.value)

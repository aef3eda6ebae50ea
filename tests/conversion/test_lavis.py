"""Original checkpoints (`.pth`): read as tensors alone, under the names of the original."""

import dataclasses
import os
import re

import ml_dtypes
import numpy as np
import pytest

from jax_instructblip.conversion import lavis
from jax_instructblip.conversion.safetensors import ConversionError
from tests.helpers import golden_blip2
from tests.helpers.golden import GOLDEN

torch = pytest.importorskip("torch", reason="needs torch: pip install -e .[torch]")
clip = pytest.importorskip("tests.helpers.clip", reason="needs torch: pip install -e .[torch]")

SAVED = lambda case: GOLDEN / case / "weights.pth"
IMAGE_TOWER = "visual_encoder."
EVA_ONLY = ("head.weight", "norm.bias", "fc_norm.weight")


def save(path, tensors):
    torch.save(tensors, path)
    return path


@pytest.fixture
def original(shared, tmp_path):
    """All tensors of a stage by the names of the original code."""

    def read(case):
        tensors = golden_blip2.tensors(tmp_path / "recorded", case)
        return {name: torch.from_numpy(tensor.read()) for name, tensor in tensors.items()}

    return read


@pytest.mark.parametrize("case", [golden_blip2.CASE, *golden_blip2.SECOND])
def test_a_file_of_the_original_code_and_its_frozen_towers(original, tmp_path, case):
    """The code saves what it trains, and of what is frozen the second names of tied tensors."""
    variant, whole, saved = (
        golden_blip2.variant(case),
        original(case),
        lavis.open_lavis(SAVED(case)),
    )
    with pytest.raises(ConversionError, match="saved without its frozen towers") as error:
        lavis.convert_lavis(saved, variant, case)
    lacking = [line.partition("*")[0] for line in error.value.failures]
    assert lacking == [IMAGE_TOWER] + (
        [] if variant.llm is None else [f"{variant.llm.kind}_model."]
    )

    frozen = {name: whole[name] for name in whole if name.startswith(tuple(lacking))}
    towers = save(tmp_path / "towers.pth", frozen)
    found = dict(lavis.convert_lavis(lavis.read_files([SAVED(case), towers]), variant, case))
    expected = golden_blip2.tensors(tmp_path / "again", case)
    for path, leaf in lavis.convert_lavis(expected, variant, case):
        np.testing.assert_array_equal(found.pop(path), leaf)
    assert not found


def test_towers_that_are_stored_apart(original, tmp_path):
    """The tower of EVA-CLIP has bare names, and more than a model reads."""
    case = "blip2_t5"
    variant, whole = golden_blip2.variant(case), original(case)
    tower = {n.removeprefix(IMAGE_TOWER): whole[n] for n in whole if n.startswith(IMAGE_TOWER)}
    first, last = "blocks.0.", f"blocks.{variant.vision.layers}."
    surplus = {name.replace(first, last): tower[name] for name in tower if name.startswith(first)}
    surplus |= dict.fromkeys(EVA_ONLY, torch.zeros(3))
    eva = save(tmp_path / "eva_vit_g.pth", tower | surplus)
    llm = {name: whole[name] for name in whole if name.startswith("t5_model.")}
    rest = {
        name: whole[name] for name in whole.keys() - llm.keys() if not name.startswith(IMAGE_TOWER)
    }
    trimmed = save(tmp_path / "trimmed.pth", {"model": rest, "epoch": 3})

    with pytest.raises(ConversionError, match="saved without its frozen towers") as error:
        lavis.convert_lavis(lavis.open_lavis(trimmed), variant, "trimmed.pth")
    assert any("eva_vit_g.pth" in line for line in error.value.failures)
    assert any("t5_model.*" in line for line in error.value.failures)
    with pytest.raises(ConversionError) as error:  # of the towers one is still lacking
        lavis.convert_lavis(lavis.read_files([trimmed, eva]), variant, "two files")
    assert [line.partition("*")[0] for line in error.value.failures] == ["t5_model."]

    tensors = lavis.read_files([eva, trimmed, save(tmp_path / "llm.pth", llm)])
    found = dict(lavis.convert_lavis(tensors, variant, "three files"))
    together = lavis.open_lavis(save(tmp_path / "whole.pth", {"model": whole}))
    for path, leaf in lavis.convert_lavis(together, variant, "one file"):
        np.testing.assert_array_equal(found[path], leaf)


def test_a_tensor_that_is_lacking_or_too_much_is_named(original, tmp_path):
    variant, whole = golden_blip2.variant(), original(golden_blip2.CASE)
    lost = whole.pop("Qformer.bert.embeddings.LayerNorm.weight")
    path = save(tmp_path / "a.pth", {"model": whole | {"Qformer.bert.pooler.weight": lost}})
    with pytest.raises(ConversionError, match=r"the tensors of a\.pth do not fit") as error:
        lavis.convert_lavis(lavis.open_lavis(path), variant, "a.pth")
    text = " ".join(error.value.failures)
    assert "Qformer.bert.embeddings.LayerNorm.weight" in text
    assert "Qformer.bert.pooler.weight" in text


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.int64])
def test_values_and_facts_of_every_dtype(tmp_path, dtype):
    rows = torch.arange(12).reshape(4, 3).to(dtype)
    # Of a view that is not contiguous only the rows that are asked for are read.
    found = lavis.open_lavis(save(tmp_path / "a.pth", {"a": rows, "turned": rows.T}))
    expected = rows.to(torch.float32).numpy()
    assert found["a"].shape == (4, 3) and found["a"].nbytes == 12 * rows.element_size()
    np.testing.assert_array_equal(found["a"].read().astype(np.float32), expected)
    np.testing.assert_array_equal(found["a"].read(1, 2).astype(np.float32), expected[2:])
    np.testing.assert_array_equal(found["turned"].read().astype(np.float32), expected.T)
    name = str(dtype).removeprefix("torch.")
    assert found["a"].dtype == found["a"].read().dtype == np.dtype(getattr(ml_dtypes, name, name))


class Code:
    """An object whose unpickling would leave a mark."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.mkdir, (str(self.mark),)


def test_code_in_a_file_is_not_run(tmp_path):
    path = save(tmp_path / "a.pth", {"model": {"a": torch.zeros(2)}, "x": Code(tmp_path / "mark")})
    with pytest.raises(ConversionError, match=r"a\.pth cannot be read as tensors alone"):
        lavis.open_lavis(path)
    assert not (tmp_path / "mark").exists()
    torch.load(path, weights_only=False)
    assert (tmp_path / "mark").exists()  # so the file would have done it


@pytest.mark.parametrize(
    "content",
    [{}, {"model": {}}, {"model": 3}, [torch.zeros(2)], torch.zeros(2), {"a": "text"}],
    ids=["empty", "empty model", "number", "list", "tensor", "text"],
)
def test_files_without_tensors_by_name(tmp_path, content):
    with pytest.raises(ConversionError, match="holds no tensors by name"):
        lavis.open_lavis(save(tmp_path / "a.pth", content))


def test_damaged_and_absent_files(tmp_path):
    whole = save(tmp_path / "whole.pth", {"a": torch.zeros(1000)}).read_bytes()
    path = tmp_path / "a.pth"
    for damaged in (b"", b"no checkpoint", whole[:-200], whole[:100]):
        path.write_bytes(damaged)
        with pytest.raises(ConversionError, match="cannot be read as tensors alone"):
            lavis.open_lavis(path)
    with pytest.raises(FileNotFoundError, match=r"no\.pth"):
        lavis.open_lavis(tmp_path / "no.pth")
    with pytest.raises(OSError, match="folder"):
        lavis.open_lavis(tmp_path)


@pytest.fixture
def with_clip(original):
    """A first stage behind CLIP's tower: its variant, all tensors behind EVA's, CLIP's."""
    variant, whole = golden_blip2.variant(), original(golden_blip2.CASE)
    variant = dataclasses.replace(variant, vision=clip.SIZES)
    return variant, whole, clip.openai_tensors(clip.theirs())


def trimmed(whole):
    return {name: whole[name] for name in whole if not name.startswith(IMAGE_TOWER)}


def test_a_model_behind_clip(with_clip, tmp_path):
    variant, whole, tower = with_clip
    files = [save(tmp_path / "trimmed.pth", {"model": trimmed(whole)})]
    with pytest.raises(ConversionError, match="saved without its frozen towers") as error:
        lavis.convert_lavis(lavis.read_files(files), variant, "trimmed.pth")
    assert "give clip_vit_L.pth, too" in error.value.failures[0]
    plan = lavis.convert_lavis(
        lavis.read_files([*files, save(tmp_path / "clip_vit_L.pth", tower)]), variant, "two files"
    )
    leaves = dict(plan)
    dropped = [name for name in plan.dropped if name.startswith(IMAGE_TOWER)]
    assert len(dropped) == 12 + 3  # the last block, and what follows it
    np.testing.assert_array_equal(leaves["vision/cls"][0, 0], tower["class_embedding"])
    np.testing.assert_array_equal(leaves["vision/pos_embed"][0], tower["positional_embedding"])
    bias = tower["transformer.resblocks.2.attn.in_proj_bias"].numpy().reshape(3, 4, 12)
    for part, name in enumerate(("query", "key", "value")):
        found = leaves[f"vision/layers/attention/{name}/bias"][2]
        np.testing.assert_array_equal(found, bias[part])


def test_the_other_image_tower_is_refused(with_clip, tmp_path):
    behind_clip, whole, tower = with_clip
    behind_eva, rest = golden_blip2.variant(), trimmed(whole)
    eva_file = lavis.open_lavis(save(tmp_path / "whole.pth", {"model": whole}))
    clip_file = lavis.read_files(
        [save(tmp_path / "a.pth", {"model": rest}), save(tmp_path / "b.pth", tower)]
    )
    for variant, tensors, ours, other in (
        (behind_eva, clip_file, "ViT-g", r"ViT-L .*as clip_vit_L\.pth"),
        (behind_clip, eva_file, "ViT-L", r"ViT-g .*as eva_vit_g\.pth"),
    ):
        with pytest.raises(ConversionError, match=f"image tower is {ours}") as error:
            lavis.convert_lavis(tensors, variant, "a.pth")
        assert re.search(other, error.value.failures[0])
    rest["ln_vision.weight"] = torch.ones(50)
    narrow = lavis.open_lavis(save(tmp_path / "trimmed.pth", {"model": rest}))
    with pytest.raises(ConversionError, match="image tower is ViT-g of width 48") as error:
        lavis.convert_lavis(narrow, behind_eva, "trimmed.pth")
    assert "ln_vision.weight is of features of width 50" in error.value.failures[0]


@pytest.mark.parametrize("count, message", [(37, "of images of 84 pixels a side"), (8, "shape")])
def test_positions_of_another_size_are_named(original, tmp_path, count, message):
    variant, whole = golden_blip2.variant(), original(golden_blip2.CASE)
    whole[f"{IMAGE_TOWER}pos_embed"] = torch.zeros(1, count, variant.vision.width)
    file = lavis.open_lavis(save(tmp_path / "a.pth", {"model": whole}))
    with pytest.raises(ConversionError, match=message) as error:
        lavis.convert_lavis(file, variant, "a.pth")
    assert f"{IMAGE_TOWER}pos_embed" in error.value.failures[0]


def test_two_files_with_other_values_of_a_tensor(tmp_path):
    """A model that was trained with its tower has the tower's own weights."""
    tuned = save(
        tmp_path / "a.pth", {"model": {f"{IMAGE_TOWER}x": torch.ones(2), "b": torch.ones(3)}}
    )
    tower = save(tmp_path / "b.pth", {f"{IMAGE_TOWER}x": torch.zeros(2)})
    for files in ([tuned, tower], [tower, tuned]):
        with pytest.raises(ConversionError, match=r"different values(.|\n)*1 tensors"):
            lavis.read_files(files)
    assert lavis.read_files([tuned, tuned]).keys() == {f"{IMAGE_TOWER}x", "b"}


def test_a_tower_without_its_model(original, tmp_path):
    whole = original(golden_blip2.CASE)
    tower = {name: whole[name] for name in whole if name.startswith(IMAGE_TOWER)}
    with pytest.raises(ConversionError, match=r"no Q-Former(.|\n)*blip2_pretrained\.pth"):
        lavis.convert_lavis(
            lavis.open_lavis(save(tmp_path / "a.pth", tower)), golden_blip2.variant(), "a.pth"
        )

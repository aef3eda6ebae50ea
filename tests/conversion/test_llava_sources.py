"""Sources of original LLaVA that make no model are refused with the reason; nothing is left."""

import json
import shutil

import numpy as np
import pytest

import jax_instructblip
from jax_instructblip import convert, export
from jax_instructblip.__main__ import main
from jax_instructblip.conversion.safetensors import ConversionError
from tests.helpers.llava_folders import write_llava
from tests.helpers.llava_originals import write_clip, write_llama, write_original

torch = pytest.importorskip("torch", reason="needs torch: pip install -e .[torch]")

PROJECTOR = "model.mm_projector."
EMBED = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("original")
    write_llava(root / "hf", "llama", linear=True)
    write_clip(root / "hf", root / "clip")
    write_original(root / "hf", root / "original")
    tensors = {}
    for path in (root / "original").glob("*.bin"):
        tensors |= torch.load(path)
    own = {n: leaf for n, leaf in tensors.items() if not n.startswith(PROJECTOR)}
    write_llama(root / "hf", root / "llm", own)
    return root


@pytest.fixture
def folder(root, tmp_path):
    return shutil.copytree(root / "original", tmp_path / "original")


def change_config(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(source, tmp_path, said, **given):
    with pytest.raises(ConversionError, match=said) as caught:
        convert(source, tmp_path / "out", **given)
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]
    return caught.value.failures


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"image_aspect_ratio": "anyres"}, "image_aspect_ratio is 'anyres': LLaVA v1.6 and later"),
        ({"mm_patch_merge_type": "spatial_unpad"}, "mm_patch_merge_type is 'spatial_unpad': LLaVA"),
        ({"architectures": ["LlavaQwenForCausalLM"]}, "'LlavaQwenForCausalLM' is of a later vers"),
        ({"architectures": ["LlavaMptForCausalLM"]}, "supported: LlavaLlamaForCausalLM, LlavaMis"),
        ({"architectures": 3}, "architectures is 3; supported"),
        ({"image_aspect_ratio": "tile"}, "image_aspect_ratio is 'tile', expected one of square, p"),
        ({"mm_vision_select_layer": -1}, "mm_vision_select_layer is -1; supported: -2"),
        ({"mm_vision_select_feature": "cls_patch"}, "is 'cls_patch'; supported: 'patch'"),
        ({"mm_projector_type": "mlp3x_gelu"}, "'mlp3x_gelu', expected one of linear, mlp2x_gelu"),
        ({"mm_projector_type": "mlp2x_gelu"}, r"mm_projector\.0\.weight: missing"),
        ({"mm_hidden_size": 1024}, "mm_hidden_size is 1024, the tower has the width 24"),
        (
            {"mm_vision_tower": "openai/clip-vit-large-patch14-336"},
            "of 336 pixels a side, the tower has 28",
        ),
        ({"mm_vision_tower": ["a"]}, "mm_vision_tower is .*, expected text"),
        ({"quantization_config": {}}, "quantization_config is {}"),
        ({"hidden_size": 2**20}, "hidden_size is 1048576, but the longest axis"),
        ({"rope_scaling": {"type": "yarn"}}, "rope_type is 'yarn'"),
    ],
)
def test_configurations_that_are_refused(root, folder, tmp_path, changes, said):
    change_config(folder, **changes)
    refused(folder, tmp_path, said, vision=root / "clip")


def test_what_is_missing_is_named(root, tmp_path, capsys):
    (said,) = refused(root / "original", tmp_path, "makes no whole model")
    for words in ("somebody/clip-tiny", "config.json", "pytorch_model.bin", "--vision"):
        assert words in said
    torch.save({f"{PROJECTOR}weight": torch.ones(24, 24)}, tmp_path / "mm_projector.bin")
    assert len(refused(tmp_path / "mm_projector.bin", tmp_path, "the projector alone")) == 2
    with pytest.raises(FileNotFoundError, match="gone.bin"):
        convert(tmp_path / "gone.bin", tmp_path / "out", vision=root / "clip")
    with pytest.raises(ValueError, match="holds original LLaVA, whose image tower is not in it"):
        jax_instructblip.load(root / "original")
    words = ["convert", str(root / "original"), "--out", str(tmp_path / "out")]
    assert main([*words, "--vision", str(root / "clip"), "--llm", str(root / "llm")]) == 1
    assert "the folder has its own" in capsys.readouterr().err
    assert main([*words, "--vision", str(root / "clip"), "--bert", str(root / "llm")]) == 1
    assert "bert goes with original LAVIS files" in capsys.readouterr().err
    refused(root / "hf", tmp_path, "vision goes with original LLaVA", vision=root / "clip")
    given = {"vision": root / "clip", "llm": root / "llm", "base": root / "llm"}
    refused(tmp_path / "mm_projector.bin", tmp_path, "the projector is no delta", **given)
    refused(root / "original", tmp_path, "is no folder of CLIP", vision=root / "hf")


def test_other_sizes_and_adapters_are_refused(root, folder, tmp_path):
    given = {"vision": root / "clip"}
    refused(folder, tmp_path, "is not llava-7b; no released", variant="llava-7b", **given)
    for path in folder.glob("pytorch_model*"):
        path.unlink()
    refused(folder, tmp_path, "holds no weights(.|\n)*pytorch_model", **given)
    (folder / "adapter_config.json").write_text("{}")
    refused(folder, tmp_path, "holds a LoRA adapter", **given)


def test_a_later_version_of_hugging_face_is_named(root, tmp_path):
    folder = shutil.copytree(root / "hf", tmp_path / "next")
    change_config(folder, architectures=["LlavaNextForConditionalGeneration"])
    refused(folder, tmp_path, "'LlavaNextForConditionalGeneration' is of a later version")


def test_shards_that_are_missing_or_truncated(root, folder, tmp_path):
    shard = folder / "pytorch_model-00002-of-00002.bin"
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    refused(folder, tmp_path, r"00002\.bin cannot be read(.|\n)*damaged", vision=root / "clip")
    shard.unlink()
    refused(folder, tmp_path, "lacks files of its index", vision=root / "clip")
    (folder / "pytorch_model.bin.index.json").unlink()
    refused(folder, tmp_path, "lacks shards(.|\n)*00002-of-00002", vision=root / "clip")


def test_files_that_hold_no_projector(root, tmp_path):
    given = {"vision": root / "clip", "llm": root / "llm"}
    path = tmp_path / "mm_projector.bin"
    torch.save({f"{PROJECTOR}weight": np.random.default_rng}, path)
    refused(path, tmp_path, "it holds numpy.*default_rng, no tensor", **given)
    torch.save({f"{PROJECTOR}weight": torch.ones(2, 2), "lm_head.weight": torch.ones(2)}, path)
    refused(path, tmp_path, "no file of a projector alone(.|\n)*found lm_head", **given)
    torch.save({f"{PROJECTOR}weight": torch.ones(20, 24), f"{PROJECTOR}bias": torch.ones(20)}, path)
    (weight, *_) = refused(path, tmp_path, "do not fit their config.json", **given)[-1:]
    assert "for projector/in/kernel: expected shape [24, 24], found [20, 24]" in weight
    refused(path, tmp_path, "holds no language model of LLaVA", **given | {"llm": root / "clip"})


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        (lambda embed: torch.cat([embed, embed[:7]]), "expected 0 or 3 or 4 rows more, or 2 rows"),
        (lambda embed: embed[:-5], "expected 0 or 3 or 4 rows more"),
        (lambda embed: torch.cat([embed, embed[:3]])[:, :-1], "of the same width"),
        (lambda embed: torch.cat([embed + 1, embed[:3]]), "differ from those of the language"),
        (lambda embed: torch.cat([embed, embed[:3]]), r"has \d+ tokens, the embedding \d+ rows"),
        (lambda embed: embed, "neither tokenizer nor rows are of <im_start>"),
    ],
    ids=["too many", "too few", "width", "values", "tokens", "no tokens"],
)
def test_rows_of_another_language_model(root, tmp_path, rows, said):
    embed = torch.load(root / "llm" / "pytorch_model-00001-of-00001.bin")[EMBED]
    tensors = {f"{PROJECTOR}weight": torch.ones(24, 24), f"{PROJECTOR}bias": torch.ones(24)}
    torch.save(tensors | {EMBED: rows(embed).clone()}, tmp_path / "mm_projector.bin")
    given = {"vision": root / "clip", "llm": root / "llm"}
    refused(tmp_path / "mm_projector.bin", tmp_path, said, **given)


def test_marks_that_should_be_in_a_projector(root, tmp_path):
    tensors = {f"{PROJECTOR}weight": torch.ones(24, 24), f"{PROJECTOR}bias": torch.ones(24)}
    torch.save(tensors, tmp_path / "mm_projector.bin")
    config = {"mm_vision_tower": "clip", "mm_use_im_start_end": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    given = {"vision": root / "clip", "llm": root / "llm"}
    refused(tmp_path, tmp_path, "lacks rows of the token embedding", **given)


def test_layouts_that_hold_no_such_model(root, tmp_path):
    with pytest.raises(ValueError, match="original, projector"):
        export(root / "hf", tmp_path / "out", format="gguf")
    for name in ("original", "projector"):
        with pytest.raises(ValueError, match="is a model of kind instructblip: the layout of orig"):
            export("shapes_t5", tmp_path / "out", format=name)
    assert list(tmp_path.iterdir()) == []

"""Original files and a language model's folder to a whole checkpoint, by the verb and in Python."""

import json
import shutil

import numpy as np
import pytest
import transformers
from PIL import Image
from safetensors.numpy import load_file

import jax_instructblip
from jax_instructblip import checkpoint
from jax_instructblip.__main__ import main
from jax_instructblip.conversion.lavis import convert_lavis
from jax_instructblip.inference.loading import read_params, read_source
from jax_instructblip.inference.retrieval import Retriever
from tests.helpers import golden, golden_blip2
from tests.helpers.golden import GOLDEN

torch = pytest.importorskip("torch", reason="needs torch: pip install -e .[torch]")

BERT = GOLDEN / "tokenizers" / "bert"
LANGUAGE = {
    "blip2_opt": (transformers.OPTConfig, "opt", "opt_model."),
    "blip2_t5": (transformers.T5Config, "t5", "t5_model."),
    "instruct_t5": (transformers.T5Config, "t5", "t5_model."),
    "instruct_vicuna": (transformers.LlamaConfig, "llama", "llm_model."),
}
ROWS = ("model.embed_tokens.weight", "lm_head.weight")
PHOTO = Image.new("RGB", (40, 30), (200, 30, 30))


def recorded(case):
    return load_file(GOLDEN / case / "weights.safetensors")


def leaves(path):
    return checkpoint.flatten(read_params(read_source(path), lambda path, array: array))


@pytest.fixture
def files(shared, tmp_path):
    """A case as it is released: its trimmed file, the image tower, the language model's folder."""

    def write(case):
        whole = {name: torch.from_numpy(leaf) for name, leaf in recorded(case).items()}
        begin = "visual_encoder."
        tower = {n.removeprefix(begin): whole[n] for n in whole if n.startswith(begin)}
        torch.save(tower, tmp_path / "eva_vit_g.pth")
        if case in LANGUAGE:
            write_llm(case, whole)
        return [GOLDEN / case / "weights.pth", tmp_path / "eva_vit_g.pth"]

    def write_llm(case, whole):
        """As it was before a padding token was added to it."""
        config, kind, begin = LANGUAGE[case]
        sizes = json.loads((GOLDEN / case / "config.json").read_text())["llm"]
        own = {n.removeprefix(begin): whole[n] for n in whole if n.startswith(begin)}
        if kind == "llama":
            own = {n: own[n][: sizes["vocab_size"]] if n in ROWS else own[n] for n in own}
        else:
            sizes |= {"vocab_size": golden_blip2.variant(case).llm.vocab} if kind == "opt" else {}
            sizes |= {"vocab_size": len(own["shared.weight"])} if kind == "t5" else {}
        (tmp_path / "llm").mkdir(exist_ok=True)
        config(**sizes).save_pretrained(tmp_path / "llm")
        torch.save(own, tmp_path / "llm" / "pytorch_model.bin")
        for path in (GOLDEN / "tokenizers" / kind).iterdir():
            shutil.copy(path, tmp_path / "llm" / path.name)

    return write


@pytest.mark.parametrize("case", golden.CASES[:2])
def test_trimmed_instructblip(files, tmp_path, case):
    """The tables' leaves are those of a rename that knows nothing of them."""
    variant, paths, out = golden.variant(case), files(case), tmp_path / "out"
    if variant.llm.kind == "llama":
        variant = variant.replace(**{"llm.max_positions": 256})
    jax_instructblip.convert(paths, out, variant=variant, llm=tmp_path / "llm", bert=BERT)
    expected, found = checkpoint.flatten(golden.params(case)), leaves(out)
    assert found.keys() == expected.keys()
    for path, leaf in expected.items():
        rows = slice(-1) if variant.llm.kind == "llama" else slice(None)
        cut = {"llm/embed/embedding": rows, "llm/head/kernel": (slice(None), rows)}.get(path, ())
        np.testing.assert_array_equal(found[path][cut], leaf[cut])
    blip = jax_instructblip.load(out)
    assert blip.variant.llm.pad_id == variant.llm.vocab - 1 or variant.llm.kind == "t5"
    (answer,) = blip.generate([PHOTO], ["what is it?"], max_new_tokens=2)
    assert answer.tokens


@pytest.mark.parametrize("case", golden_blip2.SECOND)
def test_trimmed_files_and_a_language_model_are_the_recorded_model(files, tmp_path, case):
    variant, paths = golden_blip2.variant(case), files(case)
    out = tmp_path / "out"
    jax_instructblip.convert(paths, out, variant=variant, llm=tmp_path / "llm")
    found = leaves(out)
    expected = golden_blip2.tensors(tmp_path / "again", case)
    for path, leaf in convert_lavis(expected, variant, case):
        np.testing.assert_array_equal(found.pop(path), leaf)
    assert not found
    stored = checkpoint.read_config(out)["source"]
    assert stored["kind"] == "lavis" and stored["files"].keys() == {p.name for p in paths}
    assert any("_model." in name for name in stored["dropped"])  # second names of its embedding
    blip = jax_instructblip.load(out)
    assert blip.variant.llm == variant.llm  # of the tokenizer: "\n" ends OPT's texts
    assert blip.variant.qformer.image_norm_eps == 1e-5


def test_a_first_stage_is_a_retriever(files, tmp_path, capsys):
    variant, paths = golden_blip2.variant(), files(golden_blip2.CASE)
    jax_instructblip.convert(paths, tmp_path / "out", variant=variant, bert=BERT)
    assert "tensors float32" in capsys.readouterr().out
    blip = jax_instructblip.load(tmp_path / "out")
    assert isinstance(blip, Retriever) and blip.variant.qformer.caption_head
    assert blip.text_features(["a red thing"]).shape == (1, variant.qformer.feature_width)
    jax_instructblip.convert(paths, tmp_path / "mute", variant=variant)
    assert "no qformer_tokenizer" in capsys.readouterr().err


def test_what_is_missing_or_too_much_is_said(files, tmp_path, capsys):
    case = "blip2_opt"
    paths, out = files(case), tmp_path / "out"
    words = ["convert", *map(str, paths), "--out", str(out)]
    assert main(words) == 1
    assert "does not say which model it is" in capsys.readouterr().err
    assert main([*words, "--variant", "blip2-opt-2.7b", "--llm", str(tmp_path / "llm")]) == 1
    assert "is not the language model of this variant" in capsys.readouterr().err
    assert main([*words, "--variant", "blip2-stage1", "--llm", str(tmp_path / "llm")]) == 1
    assert "has no language model" in capsys.readouterr().err
    variant = golden_blip2.variant(case)
    with pytest.raises(ValueError, match=r"saved without(.|\n)*eva_vit_g\.pth") as error:
        jax_instructblip.convert(paths[0], out, variant=variant)
    assert "--llm" in str(error.value)
    with pytest.raises(ValueError, match=r"expected one Hugging Face folder, or original files"):
        jax_instructblip.convert([paths[0], tmp_path], out, variant=variant)
    with pytest.raises(ValueError, match=r"goes with original files \(\.pth, mm_projector\.bin\)"):
        jax_instructblip.convert(tmp_path / "llm", out, llm=tmp_path / "llm")
    with pytest.raises(FileNotFoundError, match=r"gone\.pth"):
        jax_instructblip.convert(tmp_path / "gone.pth", out, variant=variant)
    with pytest.raises(FileNotFoundError, match="Q-Former's tokenizer is missing"):
        first = files(golden_blip2.CASE)
        jax_instructblip.convert(first, out, variant=golden_blip2.variant(), bert=tmp_path)
    assert not out.exists()


def test_a_second_stage_is_no_first_one(files, tmp_path):
    paths = files("blip2_opt")
    with pytest.raises(ValueError, match=r"do not fit this model(.|\n)*text_proj\.weight: missing"):
        jax_instructblip.convert(paths, tmp_path / "out", variant=golden_blip2.variant())

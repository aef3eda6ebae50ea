"""Original files and a language model's folder to a whole checkpoint, by the verb and in Python."""

import json
import shutil

import numpy as np
import pytest
import transformers

import jax_instructblip
from jax_instructblip import checkpoint
from jax_instructblip.__main__ import main
from jax_instructblip.conversion.lavis import convert_lavis
from jax_instructblip.inference.loading import read_params, read_source
from jax_instructblip.inference.retrieval import Retriever
from tests.helpers import golden_blip2
from tests.helpers.golden import GOLDEN

torch = pytest.importorskip("torch", reason="needs torch: pip install -e .[torch]")

BERT = GOLDEN / "tokenizers" / "bert"
LANGUAGE = {
    "blip2_opt": (transformers.OPTConfig, "opt"),
    "blip2_t5": (transformers.T5Config, "t5"),
}


def leaves(path):
    return checkpoint.flatten(read_params(read_source(path), lambda path, array: array))


@pytest.fixture
def files(shared, tmp_path):
    """A case as it is released: its trimmed file, the image tower, the language model's folder."""

    def write(case):
        named = golden_blip2.tensors(tmp_path / "recorded" / case, case)
        whole = {name: torch.from_numpy(tensor.read()) for name, tensor in named.items()}
        begin = "visual_encoder."
        tower = {n.removeprefix(begin): whole[n] for n in whole if n.startswith(begin)}
        torch.save(tower, tmp_path / "eva_vit_g.pth")
        if case in LANGUAGE:
            config, kind = LANGUAGE[case]
            sizes = json.loads((GOLDEN / case / "config.json").read_text())["llm"]
            sizes |= {"vocab_size": golden_blip2.variant(case).llm.vocab}
            (tmp_path / "llm").mkdir()
            config(**sizes).save_pretrained(tmp_path / "llm")
            begin = f"{kind}_model."
            own = {n.removeprefix(begin): whole[n] for n in whole if n.startswith(begin)}
            torch.save(own, tmp_path / "llm" / "pytorch_model.bin")
            for path in (GOLDEN / "tokenizers" / kind).iterdir():
                shutil.copy(path, tmp_path / "llm" / path.name)
        return [GOLDEN / case / "weights.pth", tmp_path / "eva_vit_g.pth"]

    return write


@pytest.mark.parametrize("case", LANGUAGE)
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
    with pytest.raises(ValueError, match=r"go with original files \(\.pth\)"):
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

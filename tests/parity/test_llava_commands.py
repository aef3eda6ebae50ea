"""README's commands of LLaVA at tiny sizes: weights in, both stages, a benchmark, weights out."""

import json
import shlex
import types

import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from PIL import Image

import jax_instructblip
from jax_instructblip import checkpoint
from jax_instructblip.__main__ import main
from jax_instructblip.inference.loading import read_params, read_source
from tests.conversion.test_export import load_in_transformers
from tests.data.readers.test_pope import ROW
from tests.data.readers.test_pope import write as write_pope
from tests.helpers import hf_folders
from tests.helpers.golden_blip2 import normalised
from tests.helpers.language_folders import tokenizer_of, write_language
from tests.helpers.llava_folders import IMAGE, PATCHES, write_llava
from tests.helpers.llava_originals import write_clip, write_original
from tests.helpers.numerics import error
from tests.helpers.tiny import COLORS, TEXT
from tests.test_docs import ROOT, blocks

torch = pytest.importorskip("torch", reason="needs torch: pip install -e .[torch]")
pytestmark = pytest.mark.full  # two trainings and eight compiled programs

CLIP, LLM, POSITIONS = "clip-vit-large-patch14-336", "vicuna-7b-v1.5", 512
SMALL = {
    "train.epochs": 0,
    "train.steps": 2,
    "data.batch_size": 4,
    "data.threads": 1,
    "chat.limit": POSITIONS,
    "model.dtype": "float32",
    "model.frozen_dtype": "float32",
    "optimizer.warmup_learning_rate": 1e-3,  # or the first of the two steps had a rate of 0
}
STAGES = ("runs/llava_1_5_pretrain", "runs/llava_1_5_finetune")


def readme_commands():
    """The words of README's block on LLaVA, a list for each command."""
    (text,) = (t for _, _, t in blocks("README.md") if "configs/llava_1_5_finetune.py" in t)
    lines = text.replace("\\\n", " ").splitlines()
    return [shlex.split(line)[1:] for line in lines if line.strip()]


def write_files(folder):
    """A reader's downloads: weights of LLaVA, CLIP and Vicuna, captions, talks, POPE."""
    write_llava(folder / "hf", "llama", linear=False, positions=POSITIONS)
    write_original(folder / "hf", folder / "llava-v1.5-7b")
    write_clip(folder / "hf", folder / CLIP)
    tokenizer = tokenizer_of("llama", ["a line\nand a line", *TEXT])  # `plain` ends with a line
    sizes = {"max_position_embeddings": POSITIONS, "vocab_size": len(tokenizer)}
    write_language(folder / LLM, "llama", **sizes)
    tokenizer.save_pretrained(folder / LLM)
    (folder / "configs").symlink_to(ROOT / "configs")
    for name, rounds in (
        ("llava_lcs/blip_laion_cc_sbu_558k.json", 1),
        ("llava_mix/llava_v1_5_mix665k.json", 2),
    ):
        path = folder / "data" / name
        path.parent.mkdir(parents=True)
        rows = []
        for color, value in COLORS.items():
            Image.new("RGB", (40, 30), value).save(path.parent / f"{color}.png")
            said = [("human", "<image>\nwhat color is it?"), ("gpt", color)] * rounds
            said[2:3] = [("human", "what color is it?")] * (rounds - 1)
            turns = [{"from": speaker, "value": text} for speaker, text in said]
            rows.append({"id": color, "image": f"{color}.png", "conversations": turns})
        path.write_text(json.dumps(rows))
    write_pope(folder / "data" / "pope", json.dumps(ROW) + "\n")
    (folder / "data/pope/val2014").mkdir()
    Image.new("RGB", (40, 30), "red").save(folder / "data/pope/val2014" / ROW["image"])


def leaves(path):
    return checkpoint.flatten(read_params(read_source(path), lambda path, leaf: np.array(leaf)))


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """The folder in which README's five commands ran, and what became of the parts."""
    folder = tmp_path_factory.mktemp("llava")
    write_files(folder)
    fields = [f"--config.{name}={value}" for name, value in SMALL.items()]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for words in readme_commands():
            assert main([*words, *(fields if words[0] == "train" else ())]) == 0, words
    return types.SimpleNamespace(folder=folder, end=folder / STAGES[1])


def test_the_five_commands_train_what_they_say(story):
    verbs = [words[0] for words in readme_commands()]
    assert verbs == ["convert", "backbones", "train", "train", "evaluate"]
    base, first, second = (leaves(story.folder / name) for name in ("base", *STAGES))
    stays = {"vision": (True, True), "projector": (False, False), "llm": (True, False)}
    for path, before in base.items():
        part = path.partition("/")[0]
        same = [(a == b).all() for a, b in ((before, first[path]), (first[path], second[path]))]
        assert same[0] == stays[part][0] and (same[1] == stays[part][1] or part == "llm"), path
    assert any((first[p] != second[p]).any() for p in base if p.startswith("llm/"))
    scored = json.loads((story.folder / "pope/results.json").read_text())["datasets"]["pope"]
    assert scored["count"] == 3 and scored["values"]["accuracy"] in (0.0, 100.0)
    assert read_source(story.folder / "llava").input_format.template == "v1"


def test_transformers_computes_the_tuned_models_logits(story, tmp_path, capsys):
    """Nothing is missing or left over; `<image>` is added as the note of the export says."""
    out = tmp_path / "hf"
    assert main(["export", str(story.end), "--out", str(out)]) == 0
    note = capsys.readouterr().err
    assert "add_tokens(['<image>']" in note and "resize_token_embeddings" in note
    theirs = load_in_transformers(out, "LlavaForConditionalGeneration").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    theirs.resize_token_embeddings(len(tokenizer))
    theirs.config.image_token_id = len(tokenizer) - 1

    blip = jax_instructblip.load(story.end, dtype=jnp.float32)
    example = blip.text.prompt("what color is it?", 1)
    ids, (at,) = example["tokens"].tolist(), example["image_at"].tolist()
    ids[at:at] = [len(tokenizer) - 1] * PATCHES
    pixels = np.random.default_rng(0).integers(0, 256, (1, 1, IMAGE, IMAGE, 3), np.uint8)
    with torch.no_grad():
        given = {"pixel_values": torch.tensor(normalised(pixels)), "input_ids": torch.tensor([ids])}
        wanted = theirs(**given).logits[0, -1, :-1].numpy()
    candidates = ["red", "green", "blue"]
    scores = blip.rank(pixels[0, 0], "what color is it?", candidates)[0]
    first = [blip.text.candidate(each).tolist() for each in candidates]
    assert all(len(ids) == 1 for ids in first)
    logprobs = wanted - np.log(np.exp(wanted - wanted.max()).sum()) - wanted.max()
    assert error(scores, logprobs[[ids[0] for ids in first]]) < 1e-4


@pytest.mark.parametrize("layout", ["hf", "original"])
def test_all_roads_lead_back_bit_for_bit(story, tmp_path, layout):
    out, back = tmp_path / "out", tmp_path / "back"
    assert main(["export", str(story.end), "--format", layout, "--out", str(out)]) == 0
    vision = ["--vision", str(out / "vision_tower")] if layout == "original" else []
    assert main(["convert", str(out), *vision, "--out", str(back)]) == 0
    expected, found = leaves(story.end), leaves(back)
    assert found.keys() == expected.keys()
    for path, leaf in expected.items():
        assert found[path].tobytes() == leaf.tobytes(), path
    again = tmp_path / "again"
    assert main(["export", str(back), "--format", layout, "--out", str(again)]) == 0
    first, second = hf_folders.tensors(out), hf_folders.tensors(again)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)

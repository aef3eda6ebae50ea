"""Training and joining of the embedded towers: labels, rows of text, the resulting checkpoint."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jax_instructblip import checkpoint
from jax_instructblip.__main__ import main
from jax_instructblip.backbones import language, towers, vision
from jax_instructblip.backbones.build import text_processor
from jax_instructblip.backbones.language import Stage, text_example, text_rows
from jax_instructblip.data.batch import IGNORE
from jax_instructblip.data.shapes import world
from jax_instructblip.data.shapes.world import Scene, Thing
from jax_instructblip.inference.loading import read_params, read_source
from tests.helpers.tiny import write_base

SCENE = Scene(
    things=(
        Thing("red", "circle", 0, 3, large=True, dx=0.0, dy=0.0),
        Thing("red", "ring", 2, 1, large=False, dx=0.0, dy=0.0),
    ),
    word="lamp",
    word_cell=(3, 2),
    background=(240, 240, 240),
)


def test_labels_of_cells_and_picture():
    labels = vision.scene_labels(SCENE)
    colors, forms = list(world.COLORS), list(world.SHAPES)
    nothing = {name: classes - 1 for name, classes in vision.CELL_HEADS.items()}
    large, small, word = 3, 9, (14, 15)  # cells in reading order
    assert labels["color"][[large, small]].tolist() == [colors.index("red")] * 2
    assert labels["shape"][[large, small]].tolist() == [forms.index("circle"), forms.index("ring")]
    assert labels["size"][[large, small, 0]].tolist() == [1, 0, nothing["size"]]
    for name, full in (("color", {large, small}), ("word", set(word))):
        assert set(np.flatnonzero(labels[name] != nothing[name])) == full
    assert (labels["row"][small], labels["column"][small]) == (2, 1)
    assert labels["picture colors"].tolist() == [2] + [0] * (len(colors) - 1)
    assert labels["picture things"].tolist() == [2]
    assert labels["picture main shape"].tolist() == [forms.index("circle")]


def test_grey_pictures_have_no_color_and_are_said_to_have_none():
    images = np.asarray([world.draw(SCENE)] * 32)
    pixels, colored = vision.some_grey(jnp.asarray(images), jax.random.key(0))
    spread = np.ptp(np.asarray(pixels), axis=-1).max(axis=(1, 2))
    np.testing.assert_array_equal(spread > 1e-6, np.asarray(colored) == 1)
    assert 0 < colored.sum() < len(images)


@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_a_row_is_the_description_and_a_training_example(kind):
    text = text_processor(kind)
    examples = [text_example(0, "text", index, things=5) for index in range(20)]
    examples = [example for example in examples if example is not None]
    batch = text_rows(text, examples)
    for row, (_, description, prompt, answer) in enumerate(examples):
        read = text.decode(batch["tokens"][row][batch["segments"][row] > 0])
        learned = batch["targets"][row][batch["targets"][row] != IGNORE]
        assert learned[-1] == text.variant.llm.eos_id
        assert text.decode(learned) == answer
        expected = [description, prompt, *([answer] if kind == "llama" else [])]
        assert read.split() == " ".join(expected).split()


@pytest.mark.parametrize("things", [3, 5])
def test_what_is_relisted_can_be_read_in_the_description(things):
    for index in range(50):
        name, description, prompt, answer = text_example(0, "text", index, things, relisted=1.0)
        assert (name, prompt) == ("relist", "Again:")
        told = [set(part.split()) for part in description.split(", ")]
        for part in answer.split(", "):
            assert any(set(part.split()) <= each for each in told), (description, answer)


@pytest.mark.full
def test_a_language_model_learns_from_text():
    lines = []
    stages = (Stage(1, 40, relisted=0.0),)
    language.train_language(
        text_processor("llama"), curriculum=stages, examples=256, log=lines.append
    )
    (line,) = lines
    assert float(line.split("all ")[1].split(";")[0]) > 0.1  # before any step: 0.0
    assert "reading" in line and "color" in line


def leaves(path):
    return checkpoint.flatten(read_params(read_source(path), lambda path, array: array))


def test_an_embedded_checkpoint_is_its_source_in_bfloat16(tmp_path, capsys):
    source, out = write_base(tmp_path / "source", "t5"), tmp_path / "out"
    write_base(out, "llama")
    assert main(["backbones", "embed", str(source), str(out)]) == 0
    assert f"written: {out}" in capsys.readouterr().out
    before, after = leaves(source), leaves(out)
    assert before.keys() == after.keys()
    for path, leaf in before.items():
        np.testing.assert_array_equal(after[path], leaf.astype(ml_dtypes.bfloat16))
    assert read_source(out).variant == read_source(source).variant
    facts = checkpoint.read_config(out)["source"]
    assert set(facts) == {"vision", "llm", "qformer"} and str(tmp_path) not in str(facts)
    for name in ("tokenizer", "qformer_tokenizer"):
        files = {path.name: path.read_bytes() for path in (source / name).iterdir()}
        assert files == {path.name: path.read_bytes() for path in (out / name).iterdir()}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_embedded_towers_are_taken_as_they_are_before_a_random_qformer(tmp_path):
    words = ["backbones", "towers", str(tmp_path / "work"), "--embedded", "--kinds", "t5"]
    assert main(words) == 0
    base = tmp_path / "work" / "base_t5"
    ours, theirs = leaves(base), leaves("shapes_t5")
    assert ours.keys() == theirs.keys()
    for path, leaf in theirs.items():
        if path.startswith(("vision/", "llm/")):
            np.testing.assert_array_equal(ours[path], leaf)
    same = [
        (ours[path] == theirs[path]).mean()
        for path in ours
        if path.startswith("qformer") and path.endswith("query/kernel")
    ]
    assert max(same) < 0.01
    folders = [base / "tokenizer", read_source("shapes_t5").folder / "tokenizer"]
    files = [{path.name: path.read_bytes() for path in each.iterdir()} for each in folders]
    assert files[0] == files[1]
    with pytest.raises(ValueError, match="settings: found towers of the embedded checkpoints"):
        towers.train_towers(tmp_path / "work", ["t5"])
    with pytest.raises(ValueError, match="expected .*scale 0.5"):
        towers.copy_towers(tmp_path / "work", ["t5"], scale=0.5)


def test_towers_of_other_settings_are_refused(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(towers, "train_vision", lambda *a, **b: made.append(b) or {"a": 1.0})
    monkeypatch.setattr(towers, "train_language", lambda *a, **b: {"a": 1.0})
    written = lambda folder, *a, **b: made.append(folder) or folder.mkdir()
    monkeypatch.setattr(towers.build, "write_checkpoint", written)
    monkeypatch.setattr(towers.checkpoint, "read_tree", lambda folder: {})
    words = ["backbones", "towers", str(tmp_path / "work")]
    assert main([*words, "--kinds", "t5", "--scale", "0.01"]) == 0 and len(made) == 2
    assert main([*words, "--scale", "0.01"]) == 0 and made[2:] == [tmp_path / "work" / "base_llama"]
    for other in ({"scale": 0.02}, {"scale": 0.01, "seed": 1}):
        with pytest.raises(ValueError, match=r"settings: found seed 0, scale 0.01.*; expected"):
            towers.train_towers(tmp_path / "work", **other)
    assert len(made) == 3
    (tmp_path / "work" / "recipe.json").unlink()
    with pytest.raises(ValueError, match="found none, as there is no recipe.json"):
        towers.train_towers(tmp_path / "work", scale=0.01)


def test_what_is_no_checkpoint_folder_is_not_replaced(tmp_path, monkeypatch, capsys):
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "1.jpg").write_bytes(b"")
    assert main(["backbones", "embed", "shapes_t5", str(photos)]) == 1
    monkeypatch.chdir(photos)
    assert main(["backbones", "embed", "shapes_t5", "."]) == 1
    assert capsys.readouterr().err.count(f"{photos} is no checkpoint folder") == 2
    assert [path.name for path in photos.iterdir()] == ["1.jpg"]

"""The drawn world: repeatable scenes, held-out pairs outside of training, right answers."""

import re
from collections import Counter, defaultdict

import numpy as np
import pytest

from jax_instructblip.data.images import decode
from jax_instructblip.data.shapes import dataset, tasks, world

SCENES = 150


def scenes(split, count=SCENES):
    return [world.sample_scene(0, split, index) for index in range(count)]


def records(split, count=SCENES, families=None):
    return [
        (world.sample_scene(0, split, index), record)
        for index in range(count)
        for record in tasks.scene_records(0, split, index, families)
    ]


def question_of(record):
    """The bare question in a prompt."""
    return re.search(r"(What|Which|Where|How|Is) [^?]*\?", record.prompt).group(0)


def oracle(scene, question):
    """Every answer that the scene allows to a question, worked out from its words alone."""
    things = scene.things
    words = question.rstrip("?").split()
    with_word = lambda name: [t for t in things if name in (t.color, t.shape)]
    if question == "What word is written?":
        return {scene.word}
    if question == "How many shapes are there?":
        return {tasks.NUMBERS[len(things)]}
    if words[:2] == ["How", "many"]:
        (key,) = {*words} & {*world.COLORS, *world.SHAPES}
        return {tasks.NUMBERS[len(with_word(key))]}
    if " at the " in question:
        place = question.rstrip("?").split(" at the ")[1]
        there = [t for t in things if t.place == place]
        return {t.color if "color" in question else t.shape for t in there}
    if words[0] == "Is":
        return {"yes" if words[3] == t.color else "no" for t in with_word(words[2])}
    if words[0] == "Where":
        (key,) = {*words} & {*world.COLORS, *world.SHAPES}
        return {t.place for t in with_word(key)}
    if words[1] == "color":
        return {t.color for t in with_word(words[-1])}
    return {t.shape for t in with_word(words[-1])}


def test_a_scene_is_a_function_of_seed_split_and_index():
    first = world.sample_scene(3, "train", 7)
    assert first == world.sample_scene(3, "train", 7)
    others = [(4, "train", 7), (3, "test", 7), (3, "train", 8)]
    assert all(world.sample_scene(*other) != first for other in others)
    assert tasks.scene_records(3, "train", 7) == tasks.scene_records(3, "train", 7)


def test_an_unknown_split_is_refused():
    with pytest.raises(ValueError, match="unknown split 'tarin'.*train, validation"):
        world.sample_scene(0, "tarin", 0)


@pytest.mark.parametrize("split", sorted(world.SPLITS))
def test_held_out_pairs_stay_in_their_split(split):
    for scene in scenes(split):
        held_out = [thing for thing in scene.things if world.is_held_out(thing)]
        if split == "test_pairs":
            assert scene.main in held_out and scene.main in scene.clear
        elif split not in world.OPEN_SPLITS:
            assert not held_out


def test_what_the_qformer_is_trained_on_shows_no_held_out_pair():
    streams = {splits["train"][0] for splits in dataset.DATASETS.values()}
    assert streams == {"train", "captions"}
    assert streams.isdisjoint({"test_pairs", *world.OPEN_SPLITS})


@pytest.mark.parametrize("split", sorted(world.SPLITS))
def test_things_and_word_have_cells_of_their_own(split):
    for scene in scenes(split):
        row, column = scene.word_cell
        cells = [(thing.row, thing.column) for thing in scene.things]
        cells += [(row, column), (row, column + 1)]
        assert len(set(cells)) == len(cells)
        assert all(0 <= r < world.GRID and 0 <= c < world.GRID for r, c in cells)
        assert world.FEWEST <= len(scene.things) <= world.MOST
        assert [thing.large for thing in scene.things].count(True) == 1
        assert len(scene.clear) >= 2


def test_every_color_and_shape_is_seen_in_training_and_one_pair_each_is_held_out():
    seen = {(thing.color, thing.shape) for scene in scenes("train", 600) for thing in scene.things}
    every = {(color, shape) for color in world.COLORS for shape in world.SHAPES}
    assert seen == every - world.HELD_OUT_PAIRS
    assert Counter(color for color, _ in world.HELD_OUT_PAIRS) == Counter(world.COLORS.keys())


def test_the_picture_shows_the_scene():
    for scene in scenes("test", 40):
        pixels = np.asarray(world.draw(scene)).astype(int)
        assert pixels.shape == (world.SIZE, world.SIZE, 3)
        for thing in scene.things:
            rows = slice(thing.row * world.CELL, (thing.row + 1) * world.CELL)
            columns = slice(thing.column * world.CELL, (thing.column + 1) * world.CELL)
            cell = pixels[rows, columns].reshape(-1, 3)
            near = np.abs(cell - np.array(world.COLORS[thing.color])).max(-1) < 12
            assert near.sum() >= 8, thing
        empty = pixels[0, 0]  # the corner of a cell is background, whatever lies in it
        assert tuple(empty) == scene.background
        row, column = (cell * world.CELL for cell in scene.word_cell)
        ink = pixels[row : row + world.CELL, column : column + 2 * world.CELL].sum(-1) < 140
        assert ink.sum() >= 25


def test_the_picture_survives_the_files(tmp_path):
    scene = world.sample_scene(0, "train", 0)
    decoded = np.asarray(decode(world.encode(world.draw(scene))))
    np.testing.assert_array_equal(decoded, np.asarray(world.draw(scene)))


@pytest.mark.parametrize("split", ["train", "test", "test_pairs"])
def test_every_answer_is_the_only_right_one(split):
    for scene, record in records(split):
        (answer,) = record.answers
        if record.task == "captioning":
            main = scene.main
            assert answer == f"a large {main.color} {main.shape} and the word {scene.word}"
        elif record.task == "question_generation":
            given = re.search(r"[:\"] ?([a-z-]+)[.\"]", record.prompt).group(1)
            assert oracle(scene, answer) == {given}, (record.prompt, answer)
        else:
            assert oracle(scene, question_of(record)) == {answer}, record.prompt


def test_a_generated_question_is_the_only_one_of_the_world_with_that_answer():
    keys = [*world.COLORS, *world.SHAPES]
    for scene, record in records("train", families=_only("question_generation")):
        (answer,) = record.answers
        (truth,) = oracle(scene, answer)
        kind = answer.split()[0]
        start = {"What": "What color is the ", "Which": "Which shape is ", "Where": "Where is the "}
        asked = {f"{start[kind]}{key}?" for key in keys}
        if kind != "Which":
            asked = {text for text in asked if text.rstrip("?").split()[-1] in world.SHAPES}
        else:
            asked = {text for text in asked if text.rstrip("?").split()[-1] in world.COLORS}
        assert [text for text in asked if oracle(scene, text) == {truth}] == [answer]


def test_choices_hold_the_answer_once():
    places = Counter()
    for _, record in records("train"):
        if record.task == "multiple_choice":
            assert len(set(record.choices)) == len(record.choices) == tasks.OPTIONS
            assert record.choices.count(record.answers[0]) == 1
            places[record.choices.index(record.answers[0])] += 1
        else:
            assert record.choices == ()
    assert min(places.values()) > 0.2 * sum(places.values())


def test_questions_about_held_out_pairs_are_about_the_pair():
    asked = _only("color", "shape", "position", "multiple_choice", "question_generation")
    for scene, record in records("test_pairs", 60, asked):
        main = scene.main
        text = record.prompt + " " + record.answers[0]
        assert main.color in text or main.shape in text


def test_no_answer_is_common_and_none_stands_in_the_id():
    answers = defaultdict(Counter)
    for _, record in records("train", 400):
        answers[record.task][record.answers[0]] += 1
        assert record.answers[0] not in record.id.split("-")
    for task, counts in answers.items():
        assert max(counts.values()) <= 0.55 * sum(counts.values()), task


def test_families_are_held_in_or_held_out_and_dressed_in_four_templates():
    assert set(tasks.HELD_IN) | set(tasks.HELD_OUT) == set(tasks.FAMILIES)
    assert len(tasks.HELD_IN) >= 8 and len(tasks.HELD_OUT) >= 2
    for family in {**tasks.FAMILIES, **tasks.CAPTION_FAMILIES}.values():
        assert len(family.templates) >= 4
    used = defaultdict(set)
    for _, record in records("train", 300):
        used[record.task].add(re.sub(r"(What|Which|Where|How|Is) [^?]*\?.*", "", record.prompt))
    assert len(used["color"]) >= 3


def _only(*names):
    return {name: tasks.FAMILIES[name] for name in names}

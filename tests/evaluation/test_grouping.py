import dataclasses

import pytest
from PIL import Image

from jax_instructblip.evaluation.grouping import LOAD_UNITS, loads, places, plan
from jax_instructblip.inference.ranking import Sizes, make_plan, tokenise
from jax_instructblip.models.released import get_variant
from tests.helpers.fake_pipeline import Text, make_task, record
from tests.helpers.tiny import tiny_variant

TEXT = Text(tiny_variant("t5"))


def test_questions_of_one_shape_are_together_in_their_order():
    clip = (Image.new("RGB", (4, 4)),) * 3
    records = [record(1), record(2, 20), record(3, images=clip), record(4), record(5, 2)]
    found = plan(make_task("gqa", records), TEXT, 2)
    assert [(u.group.frames, u.group.length, u.rows) for u in found.units] == [
        *((1, 16, (0, 3)), (1, 16, (4,)), (1, 32, (1,)), (3, 16, (2,))),
    ]
    assert all(each.images == ("-",) * (3 if each.id == "r3" else 1) for each in found.records)
    assert found.cut == 1 and not found.problems


def test_the_digest_is_of_the_questions():
    def digest(*records, **fields):
        task = dataclasses.replace(make_task("gqa", list(records)), **fields)
        return plan(task, TEXT, 2).digest

    first = digest(record(1), record(2))
    assert first == digest(record(1), record(2))
    assert first != digest(record(2), record(1))
    assert first != digest(record(1), record(2, answers=("another",)))
    assert first != digest(record(1), record(2), digest="of other files")


def test_what_cannot_be_asked_is_a_problem_of_the_record():
    records = [record(1), record(2, prompt="a < b"), record(3, 3000)]
    found = plan(make_task("gqa", records), TEXT, 2)
    assert [unit.rows for unit in found.units] == [(0,)]
    assert "has a <" in found.problems[1]
    assert found.problems[2] == "the prompt has 3000 tokens, the model holds 2048: shorten it"


def test_a_question_without_an_image_is_asked_of_llava_alone():
    task = make_task("gqa", [record(1), record(2, images=())])
    found = plan(task, TEXT, 2)
    assert found.problems == {1: "it has no image, which a model of kind instructblip needs"}
    assert found.prompts == ["how how how"] * 2
    found = plan(task, Text(get_variant("llava-7b")), 2)
    assert not found.problems
    assert [(unit.group.frames, unit.rows) for unit in found.units] == [(0, (1,)), (1, (0,))]


def test_a_prompt_may_be_as_long_as_llamas_positions_allow():
    text = Text(tiny_variant("llama", **{"llm.max_positions": 40}))
    records = [record(1, 23), record(2, 24)]  # 7 queries, 10 new tokens
    found = plan(make_task("gqa", records), text, 2)
    assert found.problems == {1: "the prompt has 24 tokens, the model holds 23: shorten it"}


def test_candidates_are_padded_to_few_sizes():
    lists = [tuple(f"{'x' * (n + 2)} yy z{'z' * n}" for n in range(count)) for count in (3, 2, 30)]
    records = [record(n, choices=lists[n % 3], correct=0) for n in range(9)]
    units = plan(make_task("iconqa", records), TEXT, 4).units
    sizes = {row: unit.group.sizes for unit in units for row in unit.rows}
    assert sizes[0] == sizes[1] != sizes[2]
    own = [make_plan(tokenise(TEXT, [list(each)], 1)).sizes for each in lists]
    assert own[0].pairs > own[1].pairs
    assert all(map(int.__ge__, sizes[0], own[0])) and sizes[2] == own[2]
    assert all(sizes[n] == sizes[n % 3] for n in range(9))
    shared = plan(make_task("msvd_qa", records, candidates=("a", "b c")), TEXT, 4).units
    assert {unit.group.sizes for unit in shared} == {Sizes()}


@pytest.mark.parametrize("count", [1, 7, 100])
@pytest.mark.parametrize("devices", [1, 4])
@pytest.mark.parametrize("workers", [1, 3])
def test_every_question_is_asked_once_by_one_worker(count, devices, workers):
    records = [record(n, 3 if n % 3 else 20) for n in range(count)]
    units = plan(make_task("gqa", records), TEXT, 2).units
    made = loads(units, devices, workers)
    assert sum(made, []) == units
    assert all(len({unit.group for unit in load}) == 1 for load in made)
    assert all(len(load) <= devices * LOAD_UNITS for load in made)
    asked = []
    for worker in range(workers):
        for load in made[worker::workers]:
            order = list(places(load, 2, devices))
            assert len(order) % (2 * devices) == 0
            asked += [number for number, real in order if real]
            # Whatever the devices, a question has its place in its unit, and the same neighbours.
            for index, unit in enumerate(load):
                mine = [number for number, _ in order[2 * index : 2 * index + 2]]
                assert mine == [unit.rows[0], unit.rows[-1]]
    assert sorted(asked) == list(range(count))


def test_a_unit_of_nothing_is_refused():
    with pytest.raises(ValueError, match="batch_size is 0, expected at least 1"):
        plan(make_task("gqa", [record(1)]), TEXT, 0)

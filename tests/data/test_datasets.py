import pathlib
import pickle
import re

import pytest

from jax_instructblip.data import templates
from jax_instructblip.data.datasets import DATASETS, get_dataset, table
from jax_instructblip.data.readers.annotations import AnnotationError
from jax_instructblip.data.readers.dataset import FAMILIES
from jax_instructblip.data.records import Record
from jax_instructblip.evaluation.protocol import BENCHMARKS

HELD_IN = {
    "image captioning": ("coco_caption", "web_capfilt"),
    "captioning with reading comprehension": ("textcaps",),
    "image QA": ("vqav2",),
    "knowledge-grounded image QA": ("okvqa", "aokvqa"),
    "image QA with reading comprehension": ("ocrvqa",),
    "image question generation": ("vqav2_questions", "okvqa_questions", "aokvqa_questions"),
    "LLaVA-Instruct-150K": ("llava_conversation", "llava_detail", "llava_reasoning"),
}
HELD_OUT = {
    "image captioning": ("nocaps", "flickr30k"),
    "visual reasoning": ("gqa", "vsr", "iconqa"),
    "image QA": ("vizwiz",),
    "knowledge-grounded image QA": ("scienceqa",),
    "image QA with reading comprehension": ("textvqa",),
    "video QA": ("msvd_qa", "msrvtt_qa", "ivqa"),
    "visual conversational QA": ("visual_dialog",),
    "image classification": ("hateful_memes",),
}
# What InstructBLIP was asked (arXiv 2305.06500, appendix E), filled with the record below.
ASKED = {
    "nocaps": "A short image description.",
    "flickr30k": "A short image description.",
    "gqa": "Question: Q? Short answer:",
    "vizwiz": "Question: Q? Short answer:",
    "okvqa": "Question: Q? Short answer:",
    "vqav2": "Question: Q? Short answer:",
    "ivqa": "Question: Q? Short answer:",
    "msvd_qa": "Question: Q? Short answer:",
    "msrvtt_qa": "Question: Q? Short answer:",
    "textvqa": "OCR tokens: A, 7. Question: Q? Short answer:",
    "iconqa": "Question: Q? Options: (a) blue (b) pink. Short answer:",
    "scienceqa": "Context: C. Question: Q? Options: (a) blue (b) pink. Answer:",
    "hateful_memes": 'This is an image with: "C." written on it. Q? Answer:',
    "vsr": 'Based on the image, is this statement true or false? "Q?" Answer:',
    "visual_dialog": "Dialog history: Is it? yes\n Question: Q? Short answer:",
}
RANKED = {"scienceqa", "iconqa", "hateful_memes", "visual_dialog", "msvd_qa", "msrvtt_qa"}


@pytest.mark.parametrize("held_in, families", [(True, HELD_IN), (False, HELD_OUT)])
def test_datasets_and_their_families(held_in, families):
    found: dict[str, set[str]] = {}
    for name, dataset in DATASETS.items():
        assert name == dataset.name
        if dataset.held_in == held_in:
            found.setdefault(dataset.family, set()).add(name)
    assert found == {family: set(names) for family, names in families.items()}
    assert sum(map(len, found.values())) == 13


def test_there_are_26_in_11_families():
    assert len(DATASETS) == 26
    assert {dataset.family for dataset in DATASETS.values()} == set(FAMILIES)
    assert len(FAMILIES) == 11


@pytest.mark.parametrize("name", ASKED)
def test_zero_shot_prompts(name):
    record = Record(
        id="1",
        images=("a.jpg",),
        prompt="Q?",
        answers=(),
        choices=("blue", "pink"),
        context="C.",
        ocr=("A", "7") if name == "textvqa" else (),
        history=(("Is it?", "yes"),) if name == "visual_dialog" else (),
    )
    assert templates.format_prompt(BENCHMARKS[name].prompt, record) == ASKED[name]


def test_every_held_out_prompt_is_known():
    assert {name for name, dataset in DATASETS.items() if not dataset.held_in} <= set(ASKED)


def test_zero_shot_prompts_are_those_of_the_reference(shared):
    text = (shared / "reference/REFERENCE.md").read_text()
    written = re.findall(r"`([^`]+)`", text.split("### 6.3")[1].split("### 6.4")[0])
    for name in ASKED:
        prompt = BENCHMARKS[name].prompt
        if name == "hateful_memes":
            prompt = prompt.replace("{question}", "Is it hateful?")
        assert re.sub(r"\{\w+\}", "{}", prompt).replace("\n", r"\n") in written, name


def test_which_are_ranked():
    assert {name for name in DATASETS if BENCHMARKS[name].ranking} == RANKED


def test_training_templates():
    by_family = {
        **dict.fromkeys(("image captioning", "captioning with reading comprehension"), "caption"),
        "image question generation": "question_generation",
        "LLaVA-Instruct-150K": "",
    }
    for name, dataset in DATASETS.items():
        if dataset.held_in:
            assert dataset.templates == by_family.get(dataset.family, "question"), name


@pytest.mark.parametrize("name", DATASETS)
def test_rows_are_whole(name):
    dataset = DATASETS[name]
    assert dataset.files and all(dataset.files.values())
    assert set(dataset.counts) <= set(dataset.files)
    assert set(dataset.rerelease) <= set(dataset.files)
    assert dataset.templates in {"", *templates.TEMPLATES}
    assert dataset.source and dataset.licence
    # Workers that prepare it get the reader by pickle.
    assert pickle.loads(pickle.dumps(dataset)).name == name


@pytest.mark.parametrize("name", DATASETS)
def test_readers_name_the_missing_files(name, tmp_path):
    dataset = DATASETS[name]
    for split, names in dataset.files.items():
        with pytest.raises(AnnotationError, match=re.escape(pathlib.Path(names[0]).name)):
            list(dataset.read(tmp_path, split))


@pytest.mark.parametrize("name", DATASETS)
def test_readers_refuse_unknown_splits(name, tmp_path):
    with pytest.raises(AnnotationError, match="'dreams' is not known, expected one of"):
        list(DATASETS[name].read(tmp_path, "dreams"))


@pytest.mark.parametrize(
    "name, message",
    [
        ("vqa2", "unknown dataset 'vqa2'; did you mean vqav2"),
        ("nocap", "did you mean nocaps"),
        ("imagenet-1k", "known: coco_caption, web_capfilt, nocaps"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(ValueError, match=message):
        get_dataset(name)


def test_table_for_people():
    text = table()
    for dataset in DATASETS.values():
        use = "held in" if dataset.held_in else "held out"
        assert f"{dataset.name}: {dataset.family}, {use}" in text
        assert dataset.source in text
    assert re.search(
        r"^  train +443,757 records .*_annotations.json, or vqa_train.json$", text, re.M
    )

import json
import re

import pytest
from PIL import Image

import jax_instructblip
from jax_instructblip.__main__ import main
from tests.helpers.small_checkpoint import write_checkpoint
from tests.helpers.tiny import COLORS, write_base

PROMPTS = ["What is this?", "Is there a dog in the picture?"]
NEW = 4


@pytest.fixture(scope="module")
def folder(shared, tmp_path_factory):
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "t5", "t5", shared)


@pytest.fixture(scope="module")
def photographs(shared):
    return [str(path) for path in sorted((shared / "data" / "images" / "coco").glob("*.jpg"))[:2]]


def words(folder, images, prompts, *more):
    asked = [word for prompt in prompts for word in ("--prompt", prompt)]
    given = ["generate", "--checkpoint", str(folder), "--image", *images, *asked]
    return [*given, "--max_new_tokens", str(NEW), *more]


def test_json_has_what_the_library_answers(folder, photographs, capsys):
    assert main(words(folder, photographs, PROMPTS, "--json")) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    blip = jax_instructblip.load(folder)
    expected = blip.generate(photographs, PROMPTS, max_new_tokens=NEW)
    assert found == [
        {
            "image": image,
            "prompt": prompt,
            "answer": answer.text,
            "logprob": answer.logprob,
            "tokens": list(answer.tokens),
            "logprobs": list(answer.logprobs),
            "alternatives": [],
        }
        for image, prompt, answer in zip(photographs, PROMPTS, expected, strict=True)
    ]


def test_text_for_many_prompts_of_one_image(folder, photographs, capsys):
    sampling = ["--temperature", "2", "--top_k", "50", "--top_p", "0.9", "--seed", "1"]
    assert main(words(folder, photographs[:1], PROMPTS, *sampling)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        *("image", "prompt", "answer", "log-probability", ""),
    ] * 2
    assert [line.partition(":")[2].strip() for line in lines[1::5]] == PROMPTS
    assert float(lines[3].split()[1]) < 0


def test_a_streamed_answer_is_the_answer(folder, photographs, capsys):
    assert main(words(folder, photographs, PROMPTS, "--stream")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["image", "prompt", "answer", ""] * 2
    expected = jax_instructblip.load(folder).generate(photographs, PROMPTS, max_new_tokens=NEW)
    assert [line.partition(":")[2].strip() for line in lines[2::4]] == [e.text for e in expected]


@pytest.mark.parametrize(
    ("images", "more", "message"),
    [
        (["a.jpg", "b.jpg"], ["--stream", "--num_beams", "5"], "--stream shows each token"),
        (["a.jpg", "b.jpg"], ["--stream", "--json"], "leave out --num_beams.*--json"),
        (["a.jpg"], ["--stream", "--batch_size", "2"], "--batch_size, for one question is answ"),
        (["a.jpg", "b.jpg", "c.jpg"], [], "3 images and 2 prompts do not match"),
        (["a.jpg", "b.jpg"], [], "a.jpg: no such file; b.jpg: no such file"),
        (["a.jpg"], ["--checkpoint", "nowhere"], "no checkpoint 'nowhere'"),
    ],
)
def test_errors_are_one_line(folder, images, more, message, capsys):
    assert main(words(folder, images, PROMPTS, *more)) == 1
    printed = capsys.readouterr()
    assert (
        printed.out == "" and re.search(message, printed.err) and printed.err.startswith("error: ")
    )
    assert printed.err.count("\n") == 1


def test_wrong_usage(capsys):
    with pytest.raises(SystemExit) as left:
        main(["generate", "--image", "a.jpg"])
    assert left.value.code == 2
    assert "--checkpoint" in capsys.readouterr().err


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    """A LLaVA that is asked by the template v1, and three images."""
    folder = tmp_path_factory.mktemp("chat")
    write_base(folder / "llava", "llava")
    files = [str(folder / f"{name}.png") for name in COLORS][:3]
    for file, color in zip(files, COLORS.values(), strict=False):
        Image.new("RGB", (40, 30), color).save(file)
    return folder / "llava", files


def test_several_images_stand_at_their_places(chat, capsys):
    folder, files = chat
    asked = ["Is <image> as <image>?", "What color is it?"]
    more = ("--template", "v1")
    assert main(words(folder, files, asked, "--json", *more)) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    blip = jax_instructblip.load(folder, template="v1")
    pictures = [files[:2], files[2:]]
    expected = blip.generate(pictures, asked, max_new_tokens=NEW)
    assert [row["logprob"] for row in found] == [answer.logprob for answer in expected]
    assert [row.get("images", row.get("image")) for row in found] == [files[:2], files[2]]
    assert main(words(folder, files[:2], asked[:1], "--stream", *more)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith(f" {files[0]}, {files[1]}")
    assert lines[2].partition(":")[2].strip() == expected[0].text


@pytest.mark.parametrize(
    ("count", "prompt", "more", "message"),
    [
        (
            3,
            "Is <image> as <image>?",
            ("--template", "v1"),
            "3 images and 2 <image> in the prompts",
        ),
        (2, "Is <image> as <image>?", (), "<image>, but this model has no chat template"),
    ],
)
def test_images_without_places_are_one_line(folder, chat, count, prompt, more, message, capsys):
    model = chat[0] if more else folder
    assert main(words(model, chat[1][:count], [prompt], *more)) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1

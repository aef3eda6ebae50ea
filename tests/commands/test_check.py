import json
import shutil

import pytest
from PIL import Image

from jax_instructblip.__main__ import main
from jax_instructblip.data import jsonl_check
from jax_instructblip.data.tokenizer_files import load_tokenizers
from jax_instructblip.models.released import get_variant


@pytest.fixture(scope="module")
def checkpoint(shared, tmp_path_factory):
    """`checkpoint("t5")` is a checkpoint folder with real tokenizers, and without weights."""
    files = shared / "data" / "tokenizers"
    made = {}

    def checkpoint(kind):
        if kind not in made:
            folder = made[kind] = tmp_path_factory.mktemp(kind)
            variant = get_variant({"t5": "tiny-t5", "llama": "tiny-vicuna"}[kind])
            config = {"format": 1, "variant": variant.to_dict()}
            (folder / "config.json").write_text(json.dumps(config))
            (folder / "manifest.json").write_text("{}")
            llm, bert = load_tokenizers(files / kind, files / "bert-base-uncased", kind)
            llm.save_pretrained(folder / "tokenizer")
            bert.save_pretrained(folder / "qformer_tokenizer")
        return str(made[kind])

    return checkpoint


@pytest.fixture
def data(tmp_path):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    (tmp_path / "broken.png").write_bytes((tmp_path / "a.png").read_bytes()[:40])
    return tmp_path


def write(folder, *lines):
    path = folder / "data.jsonl"
    path.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines) + "\n")
    return path


GOOD = {"image": "a.png", "prompt": "What is on the table?", "answer": "a cup"}


@pytest.mark.parametrize(
    ("kind", "rows"),
    [
        (
            "t5",
            [
                "Q-Former reads  [CLS] what is on the table ? [SEP]",
                "encoder reads   ▁What ▁is ▁on ▁the ▁table ? </s>",
                "decoder writes  [▁ a ▁cup </s>]",
            ],
        ),
        (
            "llama",
            [
                "Q-Former reads  [CLS] what is on the table ? [SEP]",
                "LLM reads       </s> ▁What ▁is ▁on ▁the ▁table ? [▁a ▁cup </s>]",
            ],
        ),
    ],
)
def test_good_file(checkpoint, data, capsys, kind, rows):
    path = write(data, GOOD, GOOD | {"answer": "one large red cup of tea beside a small plate"})
    assert main(["check", str(path), "--checkpoint", checkpoint(kind)]) == 0
    out = capsys.readouterr().out
    assert f"{path}: 2 good lines, 0 bad" in out
    for row in rows:
        assert f"    {row}\n" in out
    assert "data.jsonl:2" in out
    assert "instruction for the Q-Former: 8 to 8 tokens, median 8" in out
    assert "      1-8        2 ########################################" in out
    low = 4 if kind == "t5" else 3
    assert f"answer: {low} to " in out
    assert "lose tokens" not in out


def test_every_bad_line_is_reported_and_the_exit_code_is_one(checkpoint, data, capsys):
    path = write(
        data,
        GOOD,
        "{",
        GOOD | {"image": "none.png"},
        {"images": ["b.png", "broken.png"], "prompt": "What?", "answer": "a cup"},
        GOOD | {"prompt": "<image>\nWhat?"},
        GOOD | {"answer": ""},
        GOOD,
        {"image": "broken.png", "prompt": "What?", "answer": "a cup"},
    )
    assert main(["check", str(path), "--checkpoint", checkpoint("t5"), "--samples", "1"]) == 1
    out = capsys.readouterr().out
    assert f"{path}: 2 good lines, 6 bad" in out
    for reason in (
        "2: not valid JSON",
        "3: image 'none.png' does not exist",
        f"4: {data / 'broken.png'}: ",
        "5: the text '<image>\\nWhat?' contains <image>",
        "6: answer is empty",
        f"8: {data / 'broken.png'}: ",
    ):
        assert f"  {path}:{reason}" in out
    assert out.count("Q-Former reads") == 1


def test_many_lines_of_one_cause_are_told_once(checkpoint, tmp_path, capsys):
    lines = [{"image": f"{n}.png", "prompt": "what?", "answer": "a"} for n in range(1200)]
    lines[7] = {"image": "7.png", "prompt": "what?", "answer": 1}
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["check", str(path), "--checkpoint", checkpoint("t5")]) == 1
    said = capsys.readouterr().out.splitlines()
    assert said[0] == f"{path}: 0 good lines, 1200 bad"
    assert [line.partition(": ")[0].strip() for line in said[1:4]] == [
        f"{path}:{number}" for number in (1, 2, 3)
    ]
    assert said[4] == "  and 1,197 more lines of this kind"
    assert said[5] == f"  {path}:8: answer is int 1, expected text"
    assert (
        said[-1] == f"tokens are counted with the tokenizers of {checkpoint('t5')} (--checkpoint)"
    )


@pytest.mark.parametrize("text", ['[{"image": "a.png"}]', '\ufeff [\n{"image": "a.png"}\n]\n'])
def test_a_json_array_is_named(checkpoint, tmp_path, capsys, text):
    (tmp_path / "train.json").write_text(text, encoding="utf-8")
    assert main(["check", str(tmp_path / "train.json"), "--checkpoint", checkpoint("t5")]) == 1
    said = capsys.readouterr().out
    assert "0 good lines, 1 bad" in said and "train.json:1: this is a JSON array, expected" in said


def test_every_answer_counts_and_cuts_are_told(checkpoint, data, capsys):
    long = " ".join(["dog"] * 300)
    path = write(data, GOOD, {"image": "a.png", "prompt": long, "answers": ["a", long]})
    assert main(["check", str(path), "--checkpoint", checkpoint("llama")]) == 0
    out = capsys.readouterr().out
    assert "2 of 3 samples lose tokens of their instruction to its limit" in out
    assert "2 of 3 samples lose tokens of their prompt to its limit" in out
    assert "1 of 3 samples lose tokens of their answer to its limit" in out
    assert "answer: 2 to 255 tokens, median 3" in out


def test_empty_file_is_bad(checkpoint, data, capsys):
    path = write(data)
    assert main(["check", str(path), "--checkpoint", checkpoint("t5")]) == 1
    assert "holds no records" in capsys.readouterr().out


def test_missing_file_is_an_error_of_one_line(checkpoint, data, capsys):
    assert main(["check", str(data / "no.jsonl"), "--checkpoint", checkpoint("t5")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and "no.jsonl" in error and error.count("\n") == 1


def test_each_image_is_opened_once(data, monkeypatch):
    opened = []
    monkeypatch.setattr(jsonl_check, "decode", opened.append)
    assert jsonl_check.open_images(["a", "b", "a"]) == {}
    assert sorted(opened) == ["a", "b"]


def test_help_is_of_this_verb(capsys):
    with pytest.raises(SystemExit):
        main(["check", "--help"])
    assert "jax-instructblip check" in capsys.readouterr().out


def test_lines_whose_texts_cannot_be_written_are_named(checkpoint, data, capsys):
    rows = [GOOD, GOOD | {"prompt": "what\ud800"}, GOOD | {"context": "\udc00"}]
    path = write(data, *rows, GOOD | {"image": "\ud800.png"}, GOOD | {"prompt": "a " * 5_000_000})
    assert main(["check", str(path), "--checkpoint", checkpoint("t5")]) == 1
    out = capsys.readouterr().out
    assert f"{path}: 1 good lines, 4 bad" in out
    for line, reason in [
        (2, "prompt cannot be written as UTF-8: '\\ud800' at character 4"),
        (3, "context cannot be written as UTF-8: '\\udc00' at character 0"),
        (4, "images[0] cannot be the name of a file"),
        (5, "prompt has 10,000,000 characters, at most 100,000 are read"),
    ]:
        assert f"{path}:{line}: {reason}" in out


def test_the_recorded_case_of_such_lines(checkpoint, shared, capsys):
    path = shared / "data" / "cases" / "surrogate.jsonl"
    if not path.is_file():
        pytest.skip("shared/data/cases is not there")
    assert main(["check", str(path), "--checkpoint", checkpoint("t5")]) == 1
    out = capsys.readouterr().out
    assert "1 good lines, 2 bad" in out
    assert f"{path}:2: prompt cannot" in out and f"{path}:3: answers[0] cannot" in out


@pytest.mark.parametrize("kind", ["t5", "llama"])
def test_characters_that_a_tokenizer_does_not_know_are_counted(checkpoint, data, capsys, kind):
    answers = [GOOD | {"answer": "\U0001f534"}, GOOD | {"answer": "红色"}] * 2
    path = write(data, GOOD, *answers, GOOD | {"prompt": "Is it \U0001f534?"})
    assert main(["check", str(path), "--checkpoint", checkpoint(kind)]) == 0
    out = capsys.readouterr().out
    count = "samples have characters in their"
    # LLaMA's tokenizer writes what it does not know as bytes.
    assert (f"4 of 6 {count} answer that the language model's tokenizer" in out) == (kind == "t5")
    assert (f"1 of 6 {count} prompt that the language model's tokenizer" in out) == (kind == "t5")
    assert f"1 of 6 {count} instruction that the Q-Former's tokenizer does not know" in out
    assert (f"  {path}:2: '\U0001f534'\n" in out) == (kind == "t5")
    assert ("  and 1 more\n" in out) == (kind == "t5")
    assert f"  {path}:6: 'Is it \U0001f534?'\n" in out


def test_a_file_whose_characters_are_known_tells_of_none(checkpoint, data, capsys):
    for kind in ("t5", "llama"):
        assert main(["check", str(write(data, GOOD)), "--checkpoint", checkpoint(kind)]) == 0
    assert "does not know" not in capsys.readouterr().out


TALK = [
    {"from": "human", "value": "<image>\nWhat is this?"},
    {"from": "gpt", "value": "A cat."},
    {"from": "human", "value": "Sure?"},
    {"from": "gpt", "value": "Yes."},
]


def check_talk(checkpoint, data, *flags, kind="llama"):
    path = data / "talk.json"
    rows = [{"image": "a.png", "conversations": TALK}, {"conversations": TALK[2:]}]
    path.write_text(json.dumps([*rows, {"image": "a.png", "conversations": TALK[2:]}]))
    return main(["check", str(path), "--checkpoint", checkpoint(kind), *flags])


@pytest.fixture(scope="module")
def first_stage(checkpoint, tmp_path_factory):
    """A checkpoint folder of BLIP-2's first stage, without weights."""
    folder = tmp_path_factory.mktemp("stage1")
    shutil.copytree(f"{checkpoint('t5')}/qformer_tokenizer", folder / "qformer_tokenizer")
    variant = get_variant("tiny-stage1")
    config = {"format": 1, "variant": variant.to_dict()}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "manifest.json").write_text("{}")
    return str(folder)


def test_captions_of_a_first_stage(first_stage, data, capsys):
    row = {"image": "a.png", "prompt": "-", "answers": ["A cup.", "a \U0001f534", "A cup."]}
    long = row | {"answers": [" ".join(["dog"] * 40)]}
    bad = {"images": ["a.png", "b.png"], "prompt": "-", "answer": "two"}
    path = write(data, row, long, bad, row | {"image": "broken.png"})
    assert main(["check", str(path), "--checkpoint", first_stage]) == 1
    out = capsys.readouterr().out
    for line in (
        f"{path}: 2 good lines, 2 bad; each caption is a sample",
        f"  {path}:3: it has 2 images, a pair has one",
        "caption: 4 to 32 tokens, median 5",
        "1 of 3 samples lose tokens of their answer to its limit",
        "1 of 3 samples have characters in their answer that the Q-Former's tokenizer does not know"
        ": they all become one and the same <unk>",
        "    Q-Former reads  [CLS] a cup . [SEP]",
        "    Q-Former writes  [DEC] [a cup . [SEP]]",
    ):
        assert line in out.splitlines(), line
    assert f"  {path}:4: {data / 'broken.png'}: " in out
    assert main(["check", str(path), "--checkpoint", first_stage, "--limit", "50"]) == 1
    assert "lose tokens" not in capsys.readouterr().out


def test_a_first_stage_reads_no_conversations(first_stage, data, capsys):
    path = write(data, GOOD)
    assert main(["check", str(path), "--checkpoint", first_stage, "--template", "v1"]) == 1
    assert "first stage of BLIP-2, which is trained on captions" in capsys.readouterr().err
    assert check_talk(lambda kind: first_stage, data) == 1
    assert "but the checkpoint is a first stage of BLIP-2" in capsys.readouterr().err


def test_conversations_are_shown_by_turn_with_ids_and_targets(checkpoint, data, capsys):
    assert check_talk(checkpoint, data, "--template", "v1") == 1
    said = capsys.readouterr().out.splitlines()
    path = data / "talk.json"
    assert said[0] == f"{path}: 2 good lines, 1 bad; each conversation is a sample"
    assert said[1] == (
        f"  {path}:3: it has 1 images, but 0 <image> in its questions: each image needs one"
    )
    first = said.index(f"  talk.json:1  {data / 'a.png'}")
    shown = {line[:18].strip(): line[20:] for line in said[first + 1 : first + 9]}
    assert shown["user 1"].endswith("▁US ER : ▁ <image> ▁ <0x0A> What ▁is ▁this ? ▁A SS IST ANT :")
    assert shown["ids 1"].endswith(
        "29901 29871 <image> 29871 13 5618 338 445 29973 319 1799 9047 13566 29901"
    )
    assert shown["assistant 2"] == "[▁A ▁cat . </s>]"
    assert shown["ids 2"] == "[319 6635 29889 2]"
    assert shown["user 3"] == "▁US ER : ▁Sure ? ▁A SS IST ANT :"
    assert shown["assistant 4"] == "[▁Yes . </s>]"


def test_conversations_that_are_cut_are_told(checkpoint, data, capsys):
    check_talk(checkpoint, data, "--template", "v1", "--limit", "65")
    said = capsys.readouterr().out
    for name in ("prompt", "answer"):
        assert f"1 of 2 samples lose tokens of their {name} to its limit" in said
    first, _, second = said.partition("talk.json:2")
    assert "assistant 2     [▁A ▁cat . </s>]" in first and "assistant 4" not in first
    assert "assistant 2     [▁Yes . </s>]" in second


def test_lines_are_conversations_of_one_round_too(checkpoint, data, capsys):
    path = write(data, GOOD)
    flags = ("--checkpoint", checkpoint("llama"), "--template", "v1")
    assert main(["check", str(path), *flags]) == 0
    said = capsys.readouterr().out
    assert "<image> ▁ <0x0A> What ▁is ▁on ▁the ▁table ?" in said
    assert "assistant 2     [▁a ▁cup </s>]" in said
    own = shutil.copytree(checkpoint("llama"), data / "own")  # its template is stored
    config = json.loads((own / "config.json").read_text())
    form = {"template": "v1", "limit": 20}
    (own / "config.json").write_text(json.dumps(config | {"input_format": form}))
    assert main(["check", str(path), "--checkpoint", str(own)]) == 1
    assert "beyond the limit of 20" in capsys.readouterr().out
    assert main(["check", str(path), "--checkpoint", str(own), "--limit", "2048"]) == 0
    assert capsys.readouterr().out == said.replace(checkpoint("llama"), str(own))


def test_conversations_need_a_template_of_a_decoder_only_model(checkpoint, data, capsys):
    assert check_talk(checkpoint, data) == 1
    assert "name the chat template that writes them (--template)" in capsys.readouterr().err
    assert check_talk(checkpoint, data, "--template", "v1", kind="t5") == 1
    assert "'v1' needs a decoder-only language model, t5 is an" in capsys.readouterr().err
    assert check_talk(checkpoint, data, "--template", "chatml") == 1
    assert "it has no control token '<|im_start|>'" in capsys.readouterr().err


def test_the_images_of_conversations_may_lie_in_another_folder(checkpoint, data, tmp_path, capsys):
    path = tmp_path / "elsewhere" / "talk.json"
    path.parent.mkdir()
    path.write_text(json.dumps([{"image": "a.png", "conversations": TALK}]))
    words = ["check", str(path), "--checkpoint", checkpoint("llama"), "--template", "v1"]
    assert main(words) == 1 and "image 'a.png' does not exist" in capsys.readouterr().out
    assert main([*words, "--images", str(data)]) == 0
    lines = ["check", str(write(data, GOOD)), "--images", str(data)]
    assert main(lines) == 1 and "has no conversations: the images" in capsys.readouterr().err

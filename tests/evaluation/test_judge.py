"""The judge of LLaVA-Bench: its messages, its scores, reviews that fail, and a run that goes on."""

import dataclasses
import json

import pytest

from jax_instructblip.__main__ import main
from jax_instructblip.evaluation.judge import OWN, OWN_RULES, SYSTEM, Inputs, make_cases
from jax_instructblip.evaluation.judge_scores import read_reviews
from jax_instructblip.evaluation.metrics.metric import MetricError
from tests.helpers.chat_server import GOOD, chat_server

pytest.importorskip("openai", reason="needs openai: pip install -e .[judge]")
KINDS = ("conv", "detail", "complex")
RULES = {
    prefix + kind: {"role": "Assistant", "prompt": f"Judge {prefix}{kind}."}
    for kind in KINDS
    for prefix in ("", "llava_bench_")
}


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


@pytest.fixture
def files(tmp_path, monkeypatch):
    """`files(count)` writes the files of a benchmark of so many questions about two images."""
    monkeypatch.setenv("OPENAI_API_KEY", "none")
    folder = tmp_path / "bench"
    folder.mkdir()

    def write(count=6, contexts=None, **changes):
        contexts = contexts or [{"image": f"{n}.jpg", "caption": [f"cup {n}", "b"]} for n in (0, 1)]
        questions = [
            {"question_id": n, "image": f"{n % 2}.jpg", "text": f"Q{n}?", "category": KINDS[n % 3]}
            for n in range(count)
        ]
        rows = {
            "questions": questions,
            "contexts": contexts,
            "reference": [{"question_id": n, "text": f"gold {n}"} for n in range(count)],
            "answers": [{"id": str(n), "text": f"mine {n}"} for n in range(count)],
        }
        for name, each in (rows | changes).items():
            (folder / f"{name}.jsonl").write_text(lines(each))
        (folder / "rules.json").write_text(json.dumps(RULES))
        paths = {name: folder / f"{name}.jsonl" for name in rows}
        return Inputs(**paths, rules=folder / "rules.json")

    return write


def command(inputs, out, server, *flags):
    words = ["judge", "--model", "stub", "--endpoint", server.url, "--out", str(out)]
    for name in ("questions", "contexts", "reference", "answers", "rules"):
        words += [f"--{name}", str(getattr(inputs, name))]
    return [*words, "--backoff", "0.01", "--timeout", "2", *flags]


def number(messages):
    return int(messages[-1]["content"].partition("[Question]\nQ")[2].partition("?")[0])


def test_the_published_files_make_the_published_messages(shared):
    """COCO: 30 images with 3 questions each, captions and boxes before the question."""
    folder = shared / "data/llava"
    questions, reference = folder / "qa90_questions.jsonl", folder / "qa90_gpt4_answer.jsonl"
    contexts = folder / "caps_boxes_coco2014_val_80.jsonl"
    rules = folder / "review/rule.json"
    cases = make_cases(Inputs(questions, contexts, reference, reference, rules))
    asked, gold, described = (
        [json.loads(line) for line in path.read_text().splitlines()]
        for path in (questions, reference, contexts)
    )
    images = {row["image"]: row for row in described}
    said = json.loads(rules.read_text())
    assert len(cases) == 90
    for case, question, answer in zip(cases, asked, gold, strict=True):
        image, rule = images[question["image"]], said[question["category"]]
        boxes = "\n".join(f"{each['category']}: {each['bbox']}" for each in image["instances"])
        captions = "\n".join(image["captions"])
        text = answer["text"]
        assert case.request.messages[0] == {"role": "system", "content": SYSTEM}
        assert case.request.messages[1]["content"] == (
            f"[Context]\n{captions}\n\n{boxes}\n\n[Question]\n{question['text']}\n\n"
            f"[Assistant 1]\n{text}\n\n[End of Assistant 1]\n\n"
            f"[Assistant 2]\n{text}\n\n[End of Assistant 2]\n\n[System]\n{rule['prompt']}\n\n"
        )


def test_published_answers_in_the_wild_are_read(shared, files):
    answers = shared / "data/llava/eval/llava-bench-in-the-wild/answers/llava-v1.5-13b.jsonl"
    rows = [json.loads(line) for line in answers.read_text().splitlines()]
    questions = [
        {"question_id": row["question_id"], "image": "0.jpg", "text": row["prompt"]} for row in rows
    ]
    inputs = files(60, questions=[{**each, "category": "conv"} for each in questions])
    rules = shared / "data/llava/review/rule.json"
    cases = make_cases(dataclasses.replace(inputs, answers=answers, rules=rules))
    assert len(cases) == 60
    for case, row in zip(cases, rows, strict=True):
        assert case.model == (row["text"], row["answer_id"])
        assert f"[Assistant 2]\n{row['text']}\n\n[End" in case.request.messages[1]["content"]


def test_without_boxes_the_rules_in_the_wild_hold(files):
    cases = make_cases(files())
    assert [case.rule for case in cases] == [f"llava_bench_{kind}" for kind in KINDS] * 2
    assert cases[1].request.messages[1]["content"] == (
        "[Context]\ncup 1\nb\n\n[Question]\nQ1?\n\n"
        "[Assistant 1]\ngold 1\n\n[End of Assistant 1]\n\n"
        "[Assistant 2]\nmine 1\n\n[End of Assistant 2]\n\n[System]\nJudge llava_bench_detail.\n\n"
    )


def test_scores_judge_prompts_and_settings_are_stored(files, tmp_path, capsys):
    inputs, out = files(), tmp_path / "out"
    with chat_server(lambda messages: f"8 {number(messages)}\nBoth.") as server:
        assert main(command(inputs, out, server, "--temperature", "0")) == 0
        results = json.loads((out / "results.json").read_text())
        assert results["scores"]["all"]["relative"] == pytest.approx(100 * 2.5 / 8)
        assert results["scores"]["llava_bench_conv"]["model"] == 1.5
        assert results["judge"] == {
            "model": "stub",
            "temperature": 0.0,
            "answer_tokens": 1024,
            "endpoint": f"{server.url}/",
            "attempts": 3,
            "system": SYSTEM,
            "rules": {name: RULES[name] for name in results["judge"]["rules"]},
            "rules_of": str(inputs.rules),
        }
        assert len(results["judge"]["rules"]) == 3 and len(results["files"]) == 5
        assert "31.2" in capsys.readouterr().out
        assert main(command(inputs, out, server)) == 1
        assert "has scores already" in capsys.readouterr().err
    rows = [json.loads(line) for line in (out / "reviews.jsonl").read_text().splitlines()]
    assert rows[4] == {
        "id": 5,
        "question_id": 4,
        "answer1_id": 4,
        "answer2_id": "4",
        "category": "llava_bench_detail",
        "content": "8 4\nBoth.",
        "tuple": [8.0, 4.0],
    }
    assert main(["judge", "--reviews", str(out / "reviews.jsonl")]) == 0
    assert "31.2" in capsys.readouterr().out


@pytest.mark.parametrize("scores", [{}, {"scores": {}}, {"scores": {"all": 3}}, {"scores": 1}])
@pytest.mark.parametrize("begun", [False, True])
def test_results_of_something_else_are_refused_and_unchanged(
    files, tmp_path, capsys, scores, begun
):
    (tmp_path / "results.json").write_text(json.dumps({"kind": "benchmarks", **scores}))
    before = (tmp_path / "results.json").read_bytes()
    if begun:
        (tmp_path / "journal.jsonl").touch()
    with chat_server(lambda messages: "8 9") as server:
        assert main(command(files(), tmp_path, server)) == 1
        assert not server.log
    said = "holds no scores of a judge" if begun else "exists and is not overwritten"
    assert said in capsys.readouterr().err
    assert (tmp_path / "results.json").read_bytes() == before


def test_a_failed_parse_is_asked_again_then_left_out_and_counted(files, tmp_path, capsys):
    """Question 3 is never judged, question 4 at the second time; 1 of 20 may be missing."""
    tries = []

    def answer(messages):
        tries.append(number(messages))
        failed = tries[-1] == 3 or (tries[-1] == 4 and tries.count(4) < 2)
        return "Assistant 1: 8" if failed else "10 5"

    out = tmp_path / "out"
    with chat_server(answer) as server:
        assert main(command(files(20), out, server)) == 0
    assert tries.count(3) == 3 and tries.count(4) == 2 and len(tries) == 23
    results = json.loads((out / "results.json").read_text())
    assert results["scores"]["all"] == {
        **{"relative": 50.0, "model": 5.0, "reference": 10.0},
        **{"questions": 20, "missing": 1},
    }
    assert results["scores"]["llava_bench_conv"]["relative"] is None  # 1 of 7
    assert results["missing"] == {"3": "it begins with 'Assistant 1: 8', expected two scores"}
    assert [row.id for row in read_reviews(out / "reviews.jsonl") if row.scores is None] == ["3"]


def test_over_five_percent_missing_is_no_score_until_more_attempts_mend_it(files, tmp_path, capsys):
    inputs, out = files(), tmp_path / "out"
    with chat_server(lambda messages: "8" if number(messages) == 3 else "10 5") as server:
        assert main(command(inputs, out, server, "--attempts", "1")) == 1
    assert json.loads((out / "results.json").read_text())["scores"]["all"]["relative"] is None
    with chat_server(lambda messages: "10 5") as server:
        assert main(command(inputs, out, server, "--attempts", "2")) == 0
        assert len(server.log) == 1
    assert json.loads((out / "results.json").read_text())["scores"]["all"]["relative"] == 50.0


def test_an_interrupted_run_goes_on_but_not_with_other_answers(files, tmp_path, capsys):
    inputs, out = files(), tmp_path / "out"
    fault = lambda n: GOOD if n < 4 else "401"
    with chat_server(lambda messages: "10 5", fault=fault) as server:
        assert main(command(inputs, out, server, "--concurrency", "1")) == 1
        assert "is the key" in capsys.readouterr().err and not (out / "results.json").exists()
    with chat_server(lambda messages: "10 5") as server:
        files(answers=[{"id": n, "text": "other"} for n in range(6)])
        assert main(command(inputs, out, server)) == 1
        assert "4 replies are to requests with other messages" in capsys.readouterr().err
        files()
        assert main(command(inputs, out, server, "--temperature", "1")) == 1
        assert "temperature was 0.2, now 1.0" in capsys.readouterr().err
        assert main(command(inputs, out, server)) == 0
        assert len(server.log) == 2


def test_files_that_do_not_belong_together_are_named(files):
    inputs = files(
        answers=[{"id": n, "text": ""} for n in range(1, 7)],
        contexts=[{"image": "0.jpg", "caption": "a"}],
    )
    inputs.rules.write_text(json.dumps({"llava_bench_conv": RULES["conv"]}))
    with pytest.raises(MetricError) as error:
        make_cases(inputs)
    for part in (
        "1 questions without an answer in",
        "1 answers in",
        "1 images without a line in",
        "rules missing in",
        "the published ones are llava/eval/table/rule.json",
        "'llava_bench_detail', 'llava_bench_complex'",
    ):
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("name", "rows", "message"),
    [
        ("answers", [{"question_id": 0}], "answers.jsonl:1: text is null, expected text"),
        ("answers", [{"text": "a"}], "question_id is null, expected text or a whole"),
        ("answers", [{"id": 0, "text": "a"}] * 2, "answers.jsonl:2: question_id 0 was used before"),
        ("questions", [{"question_id": 0, "text": "Q"}], "image is null, expected text; category"),
        ("reference", [], "is empty: expected JSON lines with text"),
        ("contexts", [{"id": n, "image": "0.jpg", "caption": "a"} for n in (0, 1)], "0.jpg twice"),
    ],
)
def test_bad_rows_are_named(files, name, rows, message):
    with pytest.raises(ValueError, match=message):
        make_cases(files(**{name: rows}))


def test_a_rule_without_a_prompt(files):
    inputs = files()
    inputs.rules.write_text('{"llava_bench_conv": {"role": "Assistant"}}')
    with pytest.raises(MetricError, match="1 rules without role and prompt: 'llava_bench_conv'"):
        make_cases(inputs)


def test_without_rules_the_own_ones_hold_and_are_named(files, tmp_path, capsys):
    inputs, out = files(), tmp_path / "out"
    with chat_server(lambda messages: "8 9\nBoth.") as server:
        words = command(inputs, out, server)
        at = words.index("--rules")
        assert main(words[:at] + words[at + 2 :]) == 0
    assert capsys.readouterr().err.startswith("rules: the package's own rules, not the published")
    results = json.loads((out / "results.json").read_text())
    assert results["judge"]["rules_of"] == OWN
    assert results["files"]["rules"]["path"] == "judge_rules.json"
    asked = server.bodies[0]["messages"][1]["content"]
    assert "Begin your reply with a line that holds two numbers alone" in asked
    own = json.loads(OWN_RULES.read_text())
    assert own.keys() == RULES.keys() and {rule["role"] for rule in own.values()} == {"Assistant"}


def test_flags_that_do_not_go_together(files, capsys):
    for words, message in (
        (["--reviews", "r.jsonl", "--model", "m"], "--reviews takes no other flag; found --model"),
        (["--questions", "q.jsonl"], "expected --contexts, --reference, --answers, --out"),
    ):
        with pytest.raises(SystemExit):
            main(["judge", *words])
        assert message in capsys.readouterr().err

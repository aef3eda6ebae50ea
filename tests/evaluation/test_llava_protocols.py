"""LLaVA's protocols: its benchmarks, its prompts for others, and scores of published answers."""

import gzip
import json

import pytest

from jax_instructblip.__main__ import main
from jax_instructblip.data.datasets import EVALUATION
from jax_instructblip.evaluation.by_kind import BY_KIND, INSTRUCTBLIP, full_table, get_benchmark
from jax_instructblip.evaluation.llava_protocols import ADDED, SHORT_ANSWER
from jax_instructblip.evaluation.metrics.table import METRICS
from jax_instructblip.evaluation.protocol import BENCHMARKS

KINDS = ("random", "popular", "adversarial")


def test_there_is_one_for_each_of_llavas_benchmarks():
    assert list(ADDED) == list(EVALUATION)
    for name, row in ADDED.items():
        assert row.name == row.dataset == name and row.split in EVALUATION[name].files
        assert (row.metric == "") == row.judged and row.metric in {*METRICS, ""}
    assert all(rows.keys() >= ADDED.keys() for kind, rows in BY_KIND.items() if "1" not in kind)


@pytest.mark.parametrize(
    ("name", "kind", "prompt", "beams", "length"),
    [
        ("gqa", "llava", f"{{question}}\n{SHORT_ANSWER}", 1, 128),
        ("pope", "llava", f"{{question}}\n{SHORT_ANSWER}", 1, 128),
        ("pope", "instructblip", "Question: {question} Short answer:", 5, 9),
        ("pope", "blip2", "Question: {question} Short answer:", 5, 10),
        ("llava_bench_wild", "llava", "{question}", 1, 1024),
        ("llava_bench_coco", "instructblip", "{question}", 5, 255),
        ("scienceqa_qcm", "llava", "{question}", 1, 1024),
    ],
)
def test_how_a_model_with_a_llama_is_asked(name, kind, prompt, beams, length):
    row = get_benchmark(name, kind)
    settings = row.override({}, "llama").settings()
    assert row.override({}, "llama").prompt == prompt
    assert (settings["num_beams"], settings["max_new_tokens"]) == (beams, length)


def test_other_rows_of_llava_differ_in_decoding_alone():
    for name in ("iconqa", "hateful_memes", "msvd_qa", "nocaps"):
        llava, other = get_benchmark(name, "llava"), BENCHMARKS[name]
        assert (llava.prompt, llava.ranking, llava.words) == (
            *(other.prompt, other.ranking, other.words),
        )
    assert get_benchmark("gqa") is INSTRUCTBLIP["gqa"] is BENCHMARKS["gqa"]


def test_the_list_has_them():
    text = full_table()
    assert "pope: test, generated, scored by yes_no" in text
    assert "llava_bench_wild: test, generated, scored by a judge" in text
    assert SHORT_ANSWER in text[text.index("\nof LLaVA:\n") :]


def scored(out, *words):
    assert main(["evaluate", *map(str, words), "--out", str(out)]) == 0
    return json.loads((out / "results.json").read_text())["datasets"]


def test_published_answers_to_pope_have_their_scores(shared, tmp_path):
    answers = shared / "data/llava/eval/pope/answers/llava-v1.5-13b.jsonl"
    words = ("--datasets", "pope", "--data", shared / "data/vqa/pope", "--predictions", answers)
    result = scored(tmp_path, *words)["pope"]
    golden = json.loads((shared / "data/vqa/golden_scores.json").read_text())
    values = result["values"]
    assert result["metric"] == "f1" and result["count"] == 8910
    assert values["f1"] == pytest.approx(golden["pope_mean_F1_percent"], rel=1e-15)
    assert round(values["f1"], 1) == golden["pope_published_mean_F1_percent"]
    assert round(values["f1"], 1) == ADDED["pope"].paper["llava-1.5-13b"]
    for kind in KINDS:
        of_kind = golden[f"pope_{kind}"]
        for name in ("F1", "accuracy", "yes_ratio"):
            assert values[f"{name.lower()}/{kind}"] == 100 * of_kind[name]
        published = ADDED["pope"].paper_values["llava-1.5-13b"][f"f1/{kind}"]
        assert round(values[f"f1/{kind}"], 1) == published
        right, said = of_kind["TP"], of_kind["TP"] + of_kind["FP"]
        assert values[f"true_positives/{kind}"] == right
        assert values[f"precision/{kind}"] == 100 * (right / said)
        assert values[f"recall/{kind}"] == 100 * (right / (right + of_kind["FN"]))
    assert values["true_positives"] == sum(values[f"true_positives/{k}"] for k in KINDS)
    assert "| true_positives/random | 1182 | - |" in (tmp_path / "report.md").read_text()


def test_published_answers_to_scienceqa_have_their_score(shared, tmp_path):
    problems = json.loads((shared / "data/vqa/scienceqa/problems.extract.json").read_text())
    path = shared / "data/llava/review/test_sqa_llava_13b_v0.json.gz"
    published = json.loads(gzip.decompress(path.read_bytes()))
    (tmp_path / "problems.json").write_text(json.dumps(problems))
    test = {key: row for key, row in problems.items() if row["split"] == "test"}
    lines = [{"id": key, "text": published["outputs"][key]} for key in test]
    answers = tmp_path / "answers.jsonl"
    answers.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    words = ("--datasets", "scienceqa_qcm", "--data", tmp_path, "--predictions", answers)
    result = scored(tmp_path / "out", *words)["scienceqa_qcm"]
    right = {key: published["results"][key] == row["answer"] for key, row in test.items()}
    assert result["value"] == pytest.approx(100 * sum(right.values()) / len(right))
    images = [right[key] for key, row in test.items() if row["image"]]
    assert result["values"]["accuracy/IMG"] == pytest.approx(100 * sum(images) / len(images))

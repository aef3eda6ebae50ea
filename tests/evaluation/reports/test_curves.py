import base64
import io
import re

import numpy as np
import pytest
from PIL import Image

from jax_instructblip.evaluation.reports import curves

LINES = [
    {"step": step, "loss": 3.0 / step, "learning_rate": 1e-5 * step, "samples_per_second": 9.0}
    for step in range(1, 6)
]


def pixels(page):
    data = base64.b64decode(re.search(r"data:image/png;base64,([^\']+)", page)[1])
    return np.asarray(Image.open(io.BytesIO(data)).convert("L"))


def test_a_panel_for_each_kind_of_number(tmp_path):
    curves.write(tmp_path / "report.html", "Training of <runs/a>", LINES)
    page = (tmp_path / "report.html").read_text()
    assert "<h1>Training of &lt;runs/a&gt;</h1>" in page
    few = pixels(page)
    scored = [*LINES, {"step": 5, "validation/score": 0.5}]
    many = pixels(curves.picture([line | {"gradient_norm": 1.0} for line in scored]))
    assert many.shape[0] > 1.3 * few.shape[0]  # 3 panels take two rows, 5 take three
    flat = pixels(curves.picture([line | {"loss": 3.0} for line in LINES]))
    assert flat.shape == few.shape and (flat != few).any()


def test_answers_stand_beside_the_truth_step_by_step(tmp_path):
    answer = lambda step, name, text: {
        **{"step": step, "id": name, "prompt": f"{name}<?>", "answers": ["red", "red"]},
        "text": text,
    }
    answers = [answer(0, "a", "x"), answer(0, "b", "y"), answer(9, "a", "red")]
    curves.write(tmp_path / "report.html", "x", LINES, answers)
    page = (tmp_path / "report.html").read_text()
    head, *rows = re.findall("<tr>(.*?)</tr>", page)
    cells = lambda row: re.findall("<t[hd]>(.*?)</t[hd]>", row)
    assert cells(head) == ["question", "truth", "before", "step 9"]
    assert [cells(row) for row in rows] == [
        ["a&lt;?&gt;", "red", "x", "red"],
        ["b&lt;?&gt;", "red", "y", "-"],
    ]


@pytest.mark.parametrize("count", [1, 2, 3])
def test_there_is_no_panel_without_numbers(count, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        curves.matplotlib.figure.Figure,
        "savefig",
        lambda figure, file, **_: drawn.append([axis.get_title() for axis in figure.axes]),
    )
    names = ["step", "loss", "learning_rate", "samples_per_second"][: count + 1]
    curves.picture([{name: line[name] for name in names} for line in LINES])
    assert drawn == [["loss", "learning rate", "speed"][:count]]


def test_runs_are_compared_panel_by_panel(monkeypatch):
    figures = []
    png = curves._png
    monkeypatch.setattr(curves, "_png", lambda figure: figures.append(figure) or png(figure))
    run = [{"step": 0, "score": 0.1}, {"step": 5}, {"step": 9, "score": 0.7}]
    panels = {"a": {"x": run, "y": run[:1]}, "b": {"x": run}, "c": {"z": []}}
    image = curves.image(curves.compared(panels, "score"))
    assert pixels(image).shape == pixels(curves.picture(LINES)).shape  # 3 panels, too
    first, second, third = figures[0].axes
    assert [axis.get_title() for axis in (first, second, third)] == ["a", "b", "c"]
    assert [line.get_label() for line in first.lines] == ["x", "y"]
    assert [line.get_xydata().tolist() for line in first.lines + second.lines] == [
        [[0, 0.1], [9, 0.7]],
        [[0, 0.1]],
        [[0, 0.1], [9, 0.7]],
    ]
    assert not third.lines


def test_a_run_without_steps_has_no_page(tmp_path):
    curves.write(tmp_path / "report.html", "x", [{"step": 0, "validation/score": 0.1}])
    assert not (tmp_path / "report.html").exists()

import re
from collections import Counter

import pytest
from PIL import Image

from jax_instructblip.data.mixture import Source
from jax_instructblip.data.records import Record
from jax_instructblip.data.text import TextProcessor
from jax_instructblip.evaluation.reports.samples import draw, write_preview
from jax_instructblip.inference.loading import read_source

RED = Image.new("RGB", (8, 8), (200, 0, 0))


def records(count):
    return [Record(f"<r>{i}", (RED,), "What color is it?", ("red",)) for i in range(count)]


def test_every_record_is_drawn_as_often_as_any_other():
    seen = Counter(record.id for seed in range(600) for record in draw(records(12), 4, seed))
    assert len(seen) == 12 and max(abs(count - 200) for count in seen.values()) < 50
    ids = [int(record.id[3:]) for record in draw(records(50), 10)]
    assert ids == sorted(ids) and len(set(ids)) == 10
    assert len(draw(records(3), 10)) == 3


@pytest.mark.parametrize("name", ["shapes_llama", "shapes_t5"])
def test_the_page_marks_what_is_learned(tmp_path, name):
    base = read_source(name)
    text = TextProcessor.load(base.folder, base.variant)
    rows = [*records(5), Record("odd", (RED,), "What?", ())]
    write_preview(
        tmp_path / "page.html", Source("toy", rows, "", templates="question"), text, shown=20
    )
    page = (tmp_path / "page.html").read_text()
    assert page.count("<img ") == 6 and "<r>0" not in page and "&lt;r&gt;0" in page
    marked = "".join(re.findall(r"<mark>(.*?)</mark>", page.split("odd;")[0]))
    assert marked.count("red") == 5
    assert "it has no answer" in page
    assert "answer: 2 to 2 tokens" in page or "answer: 3 to 3 tokens" in page

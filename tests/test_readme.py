"""Files, verbs and figures that the documents name are there."""

import re
from pathlib import Path

import pytest

from benchmarks import plans
from jax_instructblip import __main__ as cli

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = (
    *("README.md", "CONTRIBUTING.md", "launch/README.md"),
    *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md")),
)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_file_named_is_there(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    named = re.findall(r"(?:jax_instructblip|configs|tests|benchmarks|launch)/[\w./]*\w", text)
    assert {path for path in named if not (ROOT / path).exists()} == set()


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_verb_named_is_there(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    named = set(
        re.findall(r"^jax-instructblip ([a-z][a-z-]*)|`jax-instructblip ([a-z][a-z-]*)", text, re.M)
    )
    assert {a or b for a, b in named} <= set(cli.find_verbs())


@pytest.mark.parametrize("file", plans.ROWS)
def test_plans_told_of_are_the_recorded_ones(file):
    text = (ROOT / "launch" / "README.md").read_text(encoding="utf-8")
    rows = plans.tables()[file]
    assert rows and [row for row in rows if row not in text] == []

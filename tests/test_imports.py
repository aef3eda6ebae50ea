"""The order of imports between packages, and libraries that must not be imported."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import jax_instructblip
from tests.helpers.interpreter import run_python

PACKAGE = Path(__file__).resolve().parents[1] / "jax_instructblip"
SOURCES = sorted(PACKAGE.rglob("*.py"))

# A part imports itself and parts of smaller numbers.
LAYERS = {
    "remote": -3,
    "files": -2,
    "fields": -1,
    "models": 0,
    "atomic": 0,
    "processes": 0,
    "progress": 0,
    "lookup": 0,
    "tpu_compiler": 0,
    "program_cache": 0,
    "stores": 1,
    "endpoint": 1,
    "data": 2,
    "checkpoint": 2,
    "parallel": 2,
    "conversion": 3,
    "inference": 4,
    "training": 5,
    "evaluation": 5,
    "planning": 6,
    "backbones": 6,
    "api": 7,
    "__init__": 8,
    "commands": 9,
    "__main__": 10,
}
PUBLIC = jax_instructblip.__all__  # what __init__ offers besides the parts
LONGEST = 400  # lines
NEVER_AT_IMPORT = ("torch", "tensorflow")
# What a machine that only computes need not have.
ABSENT = (
    *("grain", "tensorflow_datasets", "array_record", "ml_collections", "tensorboardX"),
    *("matplotlib", "torch", "tensorflow"),
)


def _part(path: Path) -> str:
    """The part of the package that a file belongs to: 'models', 'checkpoint', '__main__' ..."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def _imports(tree: ast.AST, package: str) -> Iterator[tuple[int, str]]:
    """Line and full name of everything a module imports, wherever in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*parents, *filter(None, [node.module])])
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"


def _layer(part: str) -> float:
    return LAYERS.get(part, float("inf"))


def _uphill(path: Path, source: str) -> list[str]:
    """Each import of a part that does not lie below the part of `path`."""
    own = _part(path)
    package = ".".join(["jax_instructblip", *path.relative_to(PACKAGE).parts[:-1]])
    found = []
    for line, name in _imports(ast.parse(source), package):
        top, _, rest = name.partition(".")
        part = rest.partition(".")[0]
        if not part or part in PUBLIC:
            part = "__init__"
        if top == "jax_instructblip" and part != own and _layer(part) >= _layer(own):
            found.append(f"{path.relative_to(PACKAGE)}:{line} ({own}) imports {part}")
    return found


def _top_level(node: ast.AST) -> Iterator[ast.AST]:
    """Every statement that runs when the module is imported: what no function holds."""
    for child in ast.iter_child_nodes(node):
        if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield child
            yield from _top_level(child)


def test_every_part_has_a_layer():
    assert {_part(path) for path in SOURCES} - set(LAYERS) == set()


def test_imports_run_downward():
    found = [_uphill(path, path.read_text(encoding="utf-8")) for path in SOURCES]
    assert sum(found, []) == []


@pytest.mark.parametrize(
    ("part", "source", "imported"),
    [
        ("models", "from jax_instructblip.data import text", "data"),
        ("models", "from ..data.text import tokenise", "data"),
        ("models", "from .. import load", "__init__"),
        ("data", "def f():\n    import jax_instructblip.training.step", "training"),
        ("training", "from jax_instructblip import evaluation", "evaluation"),
        ("training", "from jax_instructblip import elsewhere", "elsewhere"),
        ("training", "from jax_instructblip.inference.pipeline import load", None),
        ("training", "from jax_instructblip import evaluate", "__init__"),
        ("data", "from . import text, images\nfrom ..models import variants", None),
        ("commands", "from jax_instructblip import load\nimport jax, data", None),
    ],
)
def test_the_rule_of_layers(part, source, imported):
    found = _uphill(PACKAGE / part / "new.py", source)
    line = source.count("\n") + 1
    assert found == ([f"{part}/new.py:{line} ({part}) imports {imported}"] if imported else [])


def test_no_torch_or_tensorflow_at_import():
    found = []
    for path in SOURCES:
        for node in _top_level(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import | ast.ImportFrom):
                for line, name in _imports(ast.Module([node], []), ""):
                    if name.partition(".")[0] in NEVER_AT_IMPORT:
                        found.append(f"{path.relative_to(PACKAGE)}:{line} imports {name}")
    assert found == []


def test_files_are_named_by_concern_and_short():
    assert [str(path) for path in SOURCES if path.stem in ("utils", "util", "helpers")] == []
    lines = {str(path.relative_to(PACKAGE)): len(path.read_text().splitlines()) for path in SOURCES}
    assert {path: count for path, count in lines.items() if count > LONGEST} == {}


def test_the_package_imports_nothing_heavy():
    heavy = run_python("""
        import sys
        import jax_instructblip
        print(*{"jax", "flax", "transformers", "numpy"} & set(sys.modules))
    """)
    assert heavy.split() == []


def test_public_names():
    names = run_python("""
        import jax_instructblip
        print(callable(jax_instructblip.load), jax_instructblip.Answer.__name__)
        print("load" in dir(jax_instructblip))
        try:
            jax_instructblip.laod
        except AttributeError as error:
            print(error)
    """)
    assert names.splitlines() == [
        "True Answer",
        "True",
        "module 'jax_instructblip' has no attribute 'laod'",
    ]


@pytest.mark.parametrize("module", ["models.vlm", "inference.pipeline", "training.step"])
def test_computing_needs_no_data_library(module):
    run_python(f"""
        import sys
        sys.modules.update(dict.fromkeys({ABSENT!r}))  # importing one of these now fails
        import jax_instructblip.{module}
    """)


def test_no_module_brings_torch_or_tensorflow():
    modules = [
        ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
        for path in SOURCES
        if path.stem not in ("__init__", "__main__")
    ]
    found = run_python(f"""
        import importlib, sys
        for module in {modules!r}:
            importlib.import_module(module)
            guilty = [name for name in {NEVER_AT_IMPORT!r} if name in sys.modules]
            if guilty:
                print(module, "brings", *guilty)
                break
    """)
    assert found == ""

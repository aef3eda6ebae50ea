"""Loads the config of a run: a Python file with `get_config()`, plus changes of single fields.

absl and ml_collections are imported inside the functions, because they are slow to import and
commands that load no config do not need them.
"""

import copy
import difflib
import importlib.machinery
import importlib.util
import os
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jax_instructblip import stores

if TYPE_CHECKING:
    from ml_collections import ConfigDict

# `configs/` is next to the package in a checkout, and inside the package in a wheel.
_PACKAGE = Path(__file__).resolve().parents[1]
_CONFIGS = next(
    (
        folder
        for folder in (_PACKAGE.parent / "configs", _PACKAGE / "configs")
        if (folder / "common.py").is_file()
    ),
    None,
)


def load_config(path: str | os.PathLike) -> "ConfigDict":
    """Runs the Python file `path` and returns the config of its `get_config()`.

    `configs/NAME.py` of this project can be named from any working directory.

    Raises:
        ValueError: the file is no Python program, fails, has no `get_config()`, or sets a field
            that does not exist.
        OSError: the file cannot be read.
    """
    path = stores.input_path(path, "the config")
    _offer_configs()
    own = _CONFIGS and _CONFIGS.parent / path
    if not Path(path).is_file() and own and own.parent == _CONFIGS and own.is_file():
        path = own
    if not Path(path).is_file():
        known = sorted(each.name for each in _CONFIGS.glob("*.py")) if _CONFIGS else ()
        raise FileNotFoundError(
            f"no config file {path} (those of this project are in configs/: {', '.join(known)})"
        )
    spec = importlib.util.spec_from_file_location("config_file", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is no Python file: a config is one, with get_config()")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        make = getattr(module, "get_config", None)
        config = make() if callable(make) else None
    except Exception as error:  # the file is a user's program, which may raise anything
        raise ValueError(f"{_place(path, error)}: {type(error).__name__}: {error}") from error
    if make is None:
        raise ValueError(f"{path} has no get_config(): see configs/custom_jsonl.py for one")
    from ml_collections import ConfigDict

    if not isinstance(config, ConfigDict):
        raise ValueError(
            f"{path}: get_config() returns a {type(config).__name__}, expected the ConfigDict of "
            "common.get_config() with some fields changed: is `return config` missing?"
        )
    return config


def _offer_configs() -> None:
    """Registers the project's `configs/` as a module for `from configs import common`."""
    if _CONFIGS and "configs" not in sys.modules:
        spec = importlib.machinery.ModuleSpec("configs", None, is_package=True)
        module = importlib.util.module_from_spec(spec)
        module.__path__ = [str(_CONFIGS)]
        sys.modules["configs"] = module


def _place(path: str | os.PathLike, error: Exception) -> str:
    """Returns FILE:LINE of the line in the config file `path` where `error` was raised."""
    own = Path(path).absolute()
    if isinstance(error, SyntaxError):
        return f"{error.filename or path}:{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename).absolute() == own]
    return f"{path}:{lines[-1]}" if lines else f"{path}"


def parse_words(config: "ConfigDict", words: Sequence[str]) -> "ConfigDict":
    """Returns the config after applying command-line words of the form `--config.FIELD=VALUE`.

    Raises:
        ValueError: an unknown flag or field, with the nearest name, or a value of the wrong type.
    """
    from absl import flags as absl_flags
    from ml_collections import config_flags

    names = (word.lstrip("-") for word in words if word.startswith("--config."))
    _refuse_unknown(config, (name.removeprefix("config.").partition("=")[0] for name in names))
    own = absl_flags.FlagValues()  # not absl's global ones: a process may call this twice
    words = ["train", *words]
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=own, sys_argv=words)
        rest = own(words)
    except absl_flags.Error as error:
        raise ValueError(_short(str(error))) from error
    if rest[1:]:
        raise ValueError(f"unexpected {' '.join(rest[1:])!r}: values are given as --FIELD=VALUE")
    changed = own["config"].value
    assert changed is not None
    return changed


def change_fields(config: "ConfigDict", fields: Mapping[str, Any]) -> "ConfigDict":
    """Returns a copy of the config with the values of `fields`, such as `{"train.steps": 100}`.

    Raises:
        ValueError: lists all unknown fields, with the nearest names, or all values of a wrong type.
    """
    changed, wrong = copy.deepcopy(config), []
    _refuse_unknown(changed, fields)
    for name, value in fields.items():
        *sections, last = name.split(".")
        section = changed
        for part in sections:
            section = section[part]
        try:
            section[last] = os.fspath(value) if isinstance(value, os.PathLike) else value
        except TypeError:
            kind = type(section[last]).__name__
            wrong.append(f"config.{name} is {value!r:.60}, expected a value of type {kind}")
    if wrong:
        raise ValueError("\n  ".join(["this config cannot be used:", *wrong]))
    return changed


def _short(message: str) -> str:
    """Cuts the middle out of a message of more than 400 characters."""
    return message if len(message) <= 400 else f"{message[:200]} ... {message[-200:]}"


def _refuse_unknown(config: "ConfigDict", names: Iterable[str]) -> None:
    """Raises a ValueError that lists every name in `names` that is no field of the config."""
    known, wrong = list(_fields(config)), []
    for name in map(str, names):
        if name in known:
            continue
        last = [field for field in known if field.rpartition(".")[2] == name.rpartition(".")[2]]
        near = difflib.get_close_matches(name, known, n=1) or last
        hint = f"; did you mean config.{near[0]}?" if near else ""
        wrong.append(f"unknown field config.{name}{hint}")
    if wrong:
        raise ValueError("\n  ".join(["configs/common.py has all fields:", *wrong]))


def _fields(config: "ConfigDict", prefix: str = "") -> Iterator[str]:
    """Yields the dotted name of every section and field of the config."""
    from ml_collections import ConfigDict

    for name, value in config.items():
        yield prefix + name
        if isinstance(value, ConfigDict):
            yield from _fields(value, f"{prefix}{name}.")

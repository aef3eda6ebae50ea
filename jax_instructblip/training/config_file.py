"""The config of a run, from a file: a Python program with `get_config()`, whose fields are changed.

Only what is called imports the libraries of configs: a verb that has just its flags to read does
without.
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

# `configs/` stands beside the package in a checkout, inside it where a wheel was installed.
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
    """The config that `get_config()` of the file returns.

    The files of this project are found as `configs/NAME.py` from any folder.

    Raises:
        ValueError: the file has no such function, or it sets a field that there is not.
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
    except Exception as error:  # the file is a program of the user's; fields and types besides
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
    """Makes `from configs import common` work, whatever the working directory is."""
    if _CONFIGS and "configs" not in sys.modules:
        spec = importlib.machinery.ModuleSpec("configs", None, is_package=True)
        module = importlib.util.module_from_spec(spec)
        module.__path__ = [str(_CONFIGS)]
        sys.modules["configs"] = module


def _place(path: str | os.PathLike, error: Exception) -> str:
    """FILE:LINE of the config's own line that an error came from."""
    own = Path(path).absolute()
    if isinstance(error, SyntaxError):
        return f"{error.filename or path}:{error.lineno}"
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if Path(frame.filename).absolute() == own]
    return f"{path}:{lines[-1]}" if lines else f"{path}"


def parse_words(config: "ConfigDict", words: Sequence[str]) -> "ConfigDict":
    """The config with the fields that `--config.FIELD=VALUE ...` say.

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
    """A copy of the config with other values of `fields`: `{"train.steps": 100}`.

    Raises:
        ValueError: unknown fields, with the nearest names, or values of the wrong type, all told.
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
    """The message without the middle of a value of thousands of letters."""
    return message if len(message) <= 400 else f"{message[:200]} ... {message[-200:]}"


def _refuse_unknown(config: "ConfigDict", names: Iterable[str]) -> None:
    """Raises a ValueError that lists every name of a field that the config has not."""
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
    from ml_collections import ConfigDict

    for name, value in config.items():
        yield prefix + name
        if isinstance(value, ConfigDict):
            yield from _fields(value, f"{prefix}{name}.")

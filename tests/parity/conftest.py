"""Folders that both transformers and we read, each read once."""

import functools

import pytest


@pytest.fixture(scope="session")
def read_pair(forge, tmp_path_factory):
    pytest.importorskip("torch", reason="needs torch: pip install -e .[torch]")
    from tests.helpers import towers

    @functools.cache
    def read(name: str) -> towers.Pair:
        kind, form = name.split("-")
        folder = tmp_path_factory.mktemp("hf") / name
        if form == "odd":
            towers.write_odd(folder, kind)
        elif form == "forged":
            folder = forge(towers.RELEASED[kind])
        else:
            towers.write_seed(folder, forge(towers.RELEASED[kind]), int(form.removeprefix("seed")))
        return towers.Pair(folder)

    return read

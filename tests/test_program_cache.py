import os

import pytest
from PIL import Image

from jax_instructblip import program_cache
from tests.helpers.interpreter import run_python

NAMES = ("JAX_COMPILATION_CACHE_DIR", program_cache._MIN_SECONDS[0])


@pytest.fixture
def home(tmp_path, monkeypatch):
    for name in NAMES:
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_folder_for_this_kind_of_processor(home, monkeypatch):
    program_cache.set_default()
    folder = os.environ["JAX_COMPILATION_CACHE_DIR"]
    assert folder.startswith(str(home / "jax_instructblip" / "programs-"))
    assert os.path.isdir(folder) and os.environ[NAMES[1]] == "0"
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setattr(program_cache.platform, "processor", lambda: "other")
    monkeypatch.setattr(program_cache.Path, "read_text", lambda *_, **__: "flags : none")
    program_cache.set_default()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] != folder


@pytest.mark.parametrize("own", ["", "/elsewhere"])
def test_a_users_own_choice_stays(home, monkeypatch, own):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", own)
    program_cache.set_default()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == own and not home.exists()


def test_a_home_that_cannot_be_written_to_has_none(home):
    home.write_text("")
    program_cache.set_default()
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ


def test_a_user_without_a_home_has_none(home, monkeypatch):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(program_cache.Path, "home", no_home)
    program_cache.set_default()
    assert "JAX_COMPILATION_CACHE_DIR" not in os.environ


def test_the_same_command_in_a_new_process_compiles_nothing(home, tmp_path):
    Image.new("RGB", (32, 32), "red").save(tmp_path / "red.png")
    code = f"""
        import sys
        from jax_instructblip.__main__ import main
        from jax_instructblip import program_cache
        program_cache.set_default()
        import jax
        events = []
        jax.monitoring.register_event_listener(lambda name, **_: events.append(name))
        words = ["--image", {str(tmp_path / "red.png")!r}, "--prompt", "What color?", "--json"]
        assert main(["generate", "--checkpoint", "shapes_llama", *words]) == 0
        cache = "/jax/compilation_cache/cache_"
        print(events.count(cache + "misses"), events.count(cache + "hits"))
    """
    first, second = (run_python(code).splitlines() for _ in range(2))
    assert first[:-1] == second[:-1]  # the answer
    misses, hits = map(int, second[-1].split())
    assert misses == 0 and hits > 0 and int(first[-1].split()[0]) == hits

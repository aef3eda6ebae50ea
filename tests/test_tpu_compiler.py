import os

from jax_instructblip import tpu_compiler


def test_adds_to_what_is_set_and_leaves_what_the_user_chose(monkeypatch):
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--other=1")
    tpu_compiler.set_flags()
    tpu_compiler.set_flags()
    assert os.environ["LIBTPU_INIT_ARGS"] == f"--other=1 {tpu_compiler.STACK}"
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "--fibers_default_thread_stack_size=9")
    tpu_compiler.set_flags()
    assert os.environ["LIBTPU_INIT_ARGS"] == "--fibers_default_thread_stack_size=9"

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from jax_instructblip.training.config_file import load_config

ROOT = Path(__file__).resolve().parents[2]


def test_configs_of_the_project_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_config("configs/quickstart.py").workdir == "runs/quickstart"
    with pytest.raises(
        FileNotFoundError,
        match=r"configs/: .*blip2_pretraining.py, .* common.py, custom_jsonl.py, .*paper.py",
    ):
        load_config("configs/quick.py")
    (tmp_path / "configs").mkdir()
    mine = "from configs import common\n\ndef get_config():\n    return common.get_config()\n"
    (tmp_path / "configs" / "quickstart.py").write_text(mine)
    assert load_config("configs/quickstart.py").workdir == ""  # one's own comes first


def test_a_wheel_carries_them(tmp_path):
    """As `pip` builds it: the package and what `setup.py` puts beside."""
    build = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path / "site")]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    code = """
        import sys
        from pathlib import Path
        from jax_instructblip.training import config_file
        assert Path(config_file.__file__).is_relative_to(sys.argv[1]), config_file.__file__
        print(config_file.load_config("configs/paper_vicuna_7b.py").data.batch_size)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "site"), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "128\n", done.stderr

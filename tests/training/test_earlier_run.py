import os

import pytest

from jax_instructblip import checkpoint
from jax_instructblip.training.checkpoints import Checkpoints
from jax_instructblip.training.earlier_run import set_incomplete_aside
from tests.training.test_checkpoints import save


def test_an_interrupted_copy_is_set_aside_and_no_longer_in_the_way(tmp_path):
    manager = Checkpoints(tmp_path / "checkpoints")
    assert set_incomplete_aside(manager, fresh=False) == []  # nothing there yet
    for step in (1, 2, 3):
        save(manager, step)
    (manager.path(3) / "meta.json").unlink()
    manager.path(4).write_text("a file")
    (manager.folder / "notes").mkdir()
    notes = set_incomplete_aside(manager, fresh=False)
    assert [note.partition(" is no complete checkpoint")[0] for note in notes] == [
        str(manager.path(3)),
        str(manager.path(4)),
    ]
    assert notes[0].endswith(f"set aside as {manager.folder / '3.incomplete'}")
    assert sorted(os.listdir(manager.folder)) == ["1", "2", "3.incomplete", "4.incomplete", "notes"]
    assert set_incomplete_aside(manager, fresh=False) == []
    save(manager, 3)
    (manager.path(3) / "meta.json").unlink()
    assert "3.incomplete-2" in set_incomplete_aside(manager, fresh=False)[0]


def test_every_damaged_meta_is_told_before_the_first_step(tmp_path):
    manager = Checkpoints(tmp_path)
    for step in (1, 2):
        save(manager, step)
    for text in ("", "[1]", "[" * 100_000, '{"format'):
        (tmp_path / "2" / "meta.json").write_text(text)
        with pytest.raises(checkpoint.CheckpointError, match=r"2/meta.json is damaged") as error:
            set_incomplete_aside(manager, fresh=False)
        assert str(error.value).endswith(f"remove {tmp_path / '2'} to go on from step 1")


def test_a_dangling_link_is_told(tmp_path):
    folder = tmp_path / "checkpoints"
    folder.symlink_to(tmp_path / "unmounted")
    with pytest.raises(ValueError, match=r"is a link to .*unmounted, which is not there"):
        set_incomplete_aside(Checkpoints(folder), fresh=False)
    (note,) = set_incomplete_aside(Checkpoints(folder), fresh=True)
    assert note.endswith(f"the link is now {tmp_path / 'checkpoints.aside'}")
    assert os.path.lexists(tmp_path / "checkpoints.aside")
    folder.write_text("")
    with pytest.raises(ValueError, match="is no folder"):
        set_incomplete_aside(Checkpoints(folder), fresh=False)

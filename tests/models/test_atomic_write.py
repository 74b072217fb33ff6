import errno
import os

import pytest

from diffkern.models import atomic_write


def test_replaces_the_whole_file(tmp_path):
    path = tmp_path / "state"
    path.write_text("a long old content")
    atomic_write(path, lambda temporary: temporary.write_text("new"))
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["state"]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_write_that_fails_changes_nothing(tmp_path, error):
    path = tmp_path / "state"
    path.write_text("old")

    def writer(temporary):
        temporary.write_text("half of the n")
        assert path.read_text() == "old"
        raise error

    with pytest.raises(type(error)):
        atomic_write(path, writer)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["state"]


def test_the_file_has_the_permissions_of_a_new_file(tmp_path):
    def replace_by_a_private_file(temporary):
        temporary.unlink()
        os.close(os.open(temporary, os.O_CREAT | os.O_WRONLY, 0o600))

    (tmp_path / "plain").touch()
    atomic_write(tmp_path / "ours", replace_by_a_private_file)
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_needs_the_folder(tmp_path):
    with pytest.raises(FileNotFoundError):
        atomic_write(tmp_path / "absent" / "state", lambda temporary: temporary.write_text(""))

"""What a job submission would send, packed as Ray packs it."""

from pathlib import Path

import pytest

from workloads.config import UserError
from workloads.upload import packed_size


def test_what_git_or_rayignore_leave_out_is_not_sent(tmp_path: Path):
    for name, size in {"job.py": 10, "kept/x.py": 10, "runs/big": 10**6, "old/big": 10**6}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"x" * size)
    (tmp_path / ".gitignore").write_text("runs/\n")
    (tmp_path / ".rayignore").write_text("old/\n")
    files, size = packed_size(tmp_path)
    assert files == 4
    assert size < 10_000


def test_a_folder_that_stands_before_nothing_is_sent(tmp_path: Path):
    (tmp_path / "code").mkdir()
    (tmp_path / "code/train.py").touch()
    assert packed_size(tmp_path)[0] == 1


@pytest.mark.parametrize("name", ["stat.py", "json/__init__.py"])
def test_a_name_that_would_hang_the_job_is_refused(name: str, tmp_path: Path):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).touch()
    with pytest.raises(UserError, match="stand before Python's own module"):
        packed_size(tmp_path)

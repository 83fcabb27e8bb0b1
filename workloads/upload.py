"""What `ray job submit --working-dir .` would send, looked at before it is sent.

workloads check --submit
"""

import logging
import re
import sys
import tempfile
import zipfile
from pathlib import Path

from .config import UserError


def packed_size(folder: Path) -> tuple[int, int]:
    """Files and bytes that `ray job submit --working-dir FOLDER` would send, packed as Ray packs.

    Raises UserError where a name would stand before a module of the standard library, which hangs
    the job, or where Ray would refuse the size.
    """
    from ray._private.runtime_env import packaging

    logging.getLogger(packaging.__name__).setLevel(logging.ERROR)
    with tempfile.TemporaryDirectory() as aside:
        packed = Path(aside) / "upload.zip"
        quiet = logging.getLogger("workloads.upload")
        packaging.create_package(str(folder), packed, include_gitignore=True, logger=quiet)
        with zipfile.ZipFile(packed) as archive:
            names = [name for name in archive.namelist() if not name.endswith("/")]
        size = packed.stat().st_size
    # A folder without __init__.py stands behind all modules.
    found = (re.fullmatch(r"([^/]+)(\.py|/__init__\.py)", name) for name in names)
    shadows = sorted(one[0] for one in found if one and one[1] in sys.stdlib_module_names)
    if shadows:
        raise UserError(
            f"{folder}: {', '.join(shadows)} would stand before Python's own module of that name "
            "in the job and hang it. Rename it, or name it in .rayignore"
        )
    if size > packaging.GCS_STORAGE_MAX_SIZE:
        raise UserError(
            f"{folder}: {size / 2**20:,.0f} MiB in {len(names):,} files; Ray takes "
            f"{packaging.GCS_STORAGE_MAX_SIZE / 2**20:,.0f} MiB. Name what the job does not need "
            "in .rayignore"
        )
    return len(names), size

"""A training's checkpoints on its storage: none is used that is not whole.

train/checkpoints/checkpoint_STEP/ holds model/ (as transformers saves it), state.pt (the rest that
resuming needs), notes.json, and SHA256SUMS, which `sha256sum -c` reads. What lies there counts, not
Ray's list of it: that is written in place, and a kill cuts it short.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from ray.train import Checkpoint
from safetensors.torch import load_file

from .artifacts import RunFolder
from .loop import Point

FOLDER = "train/checkpoints"
_SUMS = "SHA256SUMS"


class DamagedError(Exception):
    """A checkpoint that is not as it was written."""


def name_of(step: int) -> str:
    """The checkpoint after so many steps; names sort as steps do."""
    return f"checkpoint_{step:08d}"


def write(local: Path, net: Any, point: Point, history: list[dict[str, Any]]) -> None:
    """Fills an empty folder."""
    state = point.state()
    net.save_pretrained(local / "model", state_dict=state.pop("model"))
    torch.save(state, local / "state.pt")
    notes = {"metrics": point.metrics, "history": history, "confusion": point.confusion}
    (local / "notes.json").write_text(json.dumps(notes))
    (local / _SUMS).write_text(_sums(local))


def _sums(local: Path) -> str:
    files = sorted(f for f in local.rglob("*") if f.is_file() and f.name != _SUMS)
    return "".join(f"{_sha256(file)}  {file.relative_to(local).as_posix()}\n" for file in files)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextmanager
def opened(folder: RunFolder, name: str) -> Iterator[Path]:
    """A checkpoint as a local folder; raises DamagedError unless all of it is as it was written."""
    with Checkpoint(f"{folder.path}/{FOLDER}/{name}", folder.files).as_directory() as local:
        sums = Path(local) / _SUMS
        written = sums.read_text(errors="replace") if sums.is_file() else ""
        wrong = set(written.splitlines()) ^ set(_sums(Path(local)).splitlines())
        if wrong or not written:
            files = sorted({line[66:] for line in wrong} - {""}) if written else [_SUMS]
            raise DamagedError(f"{name} is damaged ({', '.join(files) or _SUMS})")
        yield Path(local)


def load(folder: RunFolder, name: str, device: str) -> dict[str, Any]:
    """What `loop.train` starts from, with the history so far; raises DamagedError."""
    with opened(folder, name) as local:
        state = torch.load(local / "state.pt", map_location=device, weights_only=True)
        state["model"] = load_file(local / "model" / "model.safetensors")
        return {**state, "history": _notes(local)["history"]}


def notes(folder: RunFolder, name: str) -> dict[str, Any]:
    """Metrics, history and confusion of a checkpoint; raises DamagedError."""
    with opened(folder, name) as local:
        return _notes(local)


def _notes(local: Path) -> dict[str, Any]:
    return json.loads((local / "notes.json").read_text())


def names(folder: RunFolder) -> list[str]:
    """All checkpoints, the latest first; some may be damaged."""
    from pyarrow import fs

    where = fs.FileSelector(f"{folder.path}/{FOLDER}", allow_not_found=True)
    found = [info.base_name for info in folder.files.get_file_info(where)]
    return sorted((n for n in found if re.fullmatch(r"checkpoint_\d{8,}", n)), reverse=True)


def latest(
    folder: RunFolder,
    read: Callable[[RunFolder, str], dict[str, Any]],
    tell: Callable[[str], None],
) -> dict[str, Any] | None:
    """What `read` makes of the latest checkpoint that is whole. Later ones are told and removed:
    what a kill or a full disk left half-written takes room, and its name will be wanted again."""
    for name in names(folder):
        try:
            return read(folder, name)
        except DamagedError as e:
            tell(f"warning: {e}; it is removed, the one before it is used")
            remove(folder, name)
    return None


def best_first(folder: RunFolder, scores: dict[int, float]) -> list[str]:
    """Those that were evaluated, given the scores of all evaluated steps; of equals the earlier."""
    known = {name_of(step): (score, -step) for step, score in scores.items()}
    return sorted(set(names(folder)) & known.keys(), key=known.__getitem__, reverse=True)


def prune(folder: RunFolder, keep: int, scores: dict[int, float]) -> None:
    """Removes all but the `keep` best and the latest two: the latest may turn out damaged."""
    found = names(folder)
    for name in set(found) - set(best_first(folder, scores)[:keep]) - set(found[:2]):
        remove(folder, name)


def remove(folder: RunFolder, name: str) -> None:
    """Deletes a checkpoint."""
    folder.files.delete_dir(f"{folder.path}/{FOLDER}/{name}")


def forget_rays_list(folder: RunFolder) -> None:
    """Before Ray Train starts: it would not start with a list that a kill has cut short, or that
    names a checkpoint which is gone."""
    inner = f"{FOLDER}/checkpoint_manager_snapshot.json"
    if folder.has(inner):
        folder.files.delete_file(f"{folder.path}/{inner}")

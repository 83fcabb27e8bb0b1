"""A training's checkpoints on its storage: none is used that is not whole.

train/checkpoints/checkpoint_STEP/ holds model/ (as transformers saves it), state.pt (the rest that
resuming needs), notes.json, after an evaluation answers.npy (to each validation row), and
SHA256SUMS, which `sha256sum -c` reads. What lies there counts, not
Ray's list of it: that is written in place, and a kill cuts it short.
"""

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import ray.train
from ray.train import Checkpoint
from ray.train.collective import broadcast_from_rank_zero

from .artifacts import RunFolder

if TYPE_CHECKING:
    from .loop import Point

FOLDER = "train/checkpoints"
ANSWERS = "answers.npy"
_SUMS = "SHA256SUMS"


class DamagedError(Exception):
    """A checkpoint that is not as it was written."""


def name_of(step: int) -> str:
    """The checkpoint after so many steps; names sort as steps do."""
    return f"checkpoint_{step:08d}"


def write(local: Path, net: Any, point: "Point", history: list[dict[str, Any]]) -> None:
    """Fills an empty folder."""
    import torch

    state = point.state()
    net.save_pretrained(local / "model", state_dict=state.pop("model"))
    torch.save(state, local / "state.pt")
    notes = {"metrics": point.metrics, "history": history, "confusion": point.confusion}
    (local / "notes.json").write_text(json.dumps(notes))
    if point.answers is not None:
        np.save(local / ANSWERS, point.answers)
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


def start(folder: RunFolder, device: str, tell: Callable[[str], None]) -> dict[str, Any] | None:
    """What all ranks go on from, or None: rank 0 chooses."""
    rank = ray.train.get_context().get_world_rank()
    read = partial(load, device=device)
    state = latest(folder, read, tell) if rank == 0 else None
    step = broadcast_from_rank_zero(state and state["step"])
    return read(folder, name_of(step)) if step and rank else state


def report(
    folder: RunFolder,
    net: Any,
    point: "Point",
    history: list[dict[str, Any]],
    keep: int,
    scores: dict[int, float],
    alone: bool,
) -> None:
    """Hands a checkpoint to Ray Train, which uploads it unless it is in local mode (`alone`); then
    those before it may go."""
    if ray.train.get_context().get_world_rank() != 0:
        ray.train.report(point.metrics)
        return
    name = name_of(int(point.metrics["step"]))
    with _scratch(folder) as local:
        write(local, getattr(net, "module", net), point, history)
        made = Checkpoint.from_directory(local)
        if alone:
            folder.put(local, f"{FOLDER}/{name}")
        ray.train.report(point.metrics, checkpoint=made, checkpoint_dir_name=name)
    prune(folder, keep, scores)


@contextmanager
def _scratch(folder: RunFolder) -> Iterator[Path]:
    """An empty folder on this node, the same for all checkpoints of a run: what a killed worker
    leaves there goes with the next."""
    mark = hashlib.sha256(folder.uri.encode()).hexdigest()[:12]
    local = Path(tempfile.gettempdir()) / f"workloads-checkpoint-{mark}"
    shutil.rmtree(local, ignore_errors=True)
    local.mkdir()
    try:
        yield local
    finally:
        shutil.rmtree(local, ignore_errors=True)


def load(folder: RunFolder, name: str, device: str) -> dict[str, Any]:
    """What `loop.train` starts from, with the history so far; raises DamagedError."""
    import torch
    from safetensors.torch import load_file

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


def forget_halves(folder: RunFolder) -> None:
    """What a kill has left of copies that were never renamed."""
    from pyarrow import fs

    where = fs.FileSelector(f"{folder.path}/{FOLDER}", allow_not_found=True)
    for info in folder.files.get_file_info(where):
        if re.fullmatch(r"checkpoint_\d{8,}\.[0-9a-f]{8}", info.base_name):
            folder.files.delete_dir(info.path)


def forget_rays_list(folder: RunFolder) -> None:
    """Before Ray Train starts: it would not start with a list that a kill has cut short, or that
    names a checkpoint which is gone."""
    inner = f"{FOLDER}/checkpoint_manager_snapshot.json"
    if folder.has(inner):
        folder.files.delete_file(f"{folder.path}/{inner}")

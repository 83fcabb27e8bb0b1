"""What a run's manifest (run.json) says of where the run came from: packages, commit, machine,
command, and digests of files."""

import functools
import hashlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from . import __version__

WEIGHTS = "*.safetensors"
# What decides what a base model is: not its README, nor copies in other formats.
_BASE = (WEIGHTS, "*.json", "*.txt", "*.model")


def now() -> str:
    """UTC, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def made() -> dict[str, Any]:
    """With what this process does its work."""
    return {"versions": versions(), **git(), "host": host(), "argv": list(sys.orig_argv)}


def versions() -> dict[str, str]:
    """What was installed; a GPU's image may lack the engines of CPUs."""
    own = {"python": platform.python_version(), "workloads": __version__}
    names = {"ray", "torch", "transformers", "datasets", "optuna", "openvino", "nncf", "numpy"}
    held = {(one.name or "").lower() for one in importlib.metadata.distributions()}
    return own | {name: importlib.metadata.version(name) for name in sorted(names & held)}


@functools.cache
def git() -> dict[str, Any]:
    """The commit of the checkout, and whether there were changes beside it; None outside of one."""
    where = ("git", "-C", str(Path(__file__).parent))
    commit = _said(*where, "rev-parse", "HEAD")
    dirty = bool(_said(*where, "status", "--porcelain")) if commit else None
    return {"git": commit or None, "dirty": dirty}


@functools.cache
def host() -> dict[str, Any]:
    """This machine. Memory in bytes."""
    return {
        "name": platform.node(),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count(),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "accelerators": _accelerators(),
    }


def _cpu() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _accelerators() -> list[str]:
    # torch would take some of the GPU's memory to tell.
    if shutil.which("nvidia-smi") is None:
        return []
    return _said("nvidia-smi", "--query-gpu=name", "--format=csv,noheader").splitlines()


def _said(*command: str) -> str:
    """What a command prints; nothing where it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return "" if done.returncode else done.stdout.strip()


# ---------------------------------------------------------------- digests


def base_digest(folder: Path) -> str:
    """SHA-256 over names and contents of a base model's weights, configuration and tokenizer."""
    return _digest(file for pattern in _BASE for file in folder.glob(pattern))


def model_digest(folder: Path, noted: str | None = None) -> str:
    """SHA-256 of a model's weights, as sha256sum gives it where they are one file. Of a folder
    without safetensors what was `noted` of its model, or else its config.json's."""
    weights = list(folder.glob(WEIGHTS))
    if not weights and noted:
        return noted
    if len(weights) > 1:
        return _digest(weights)
    return f"sha256:{_sha256(weights[0] if weights else folder / 'config.json')}"


def _digest(files: Iterable[Path]) -> str:
    lines = [f"{_sha256(file)}  {file.name}\n" for file in sorted(files) if file.is_file()]
    return f"sha256:{hashlib.sha256(''.join(lines).encode()).hexdigest()}"


def _sha256(file: Path) -> str:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()

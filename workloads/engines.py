"""Which engine serves a model on this machine: exports it once, checks each candidate against torch
in fp32 (the gate), times those that load, and keeps the figures in engines.json.

They lie in the model's folder where that is a run's and can be written, else in
~/.cache/workloads/engines/. The work is done by a process of its own
(python -m workloads.engines), whose memory ends with it.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from . import gate, samples
from .config import TargetServe, UserError
from .engine import BF16, FP32, INT8, Engine, TorchEngine, load
from .sources import is_remote

Record = dict[str, Any]
Say = Callable[[str], None]
FEWEST_TEXTS = 50
PACKED = "packaged.json"
REFERENCE_BUDGET_S = 20.0
_MODEL_FILES = (".safetensors", ".bin", ".json", ".txt", ".model")
_BF16 = {"avx512_bf16", "amx_bf16", "bf16"}
# What makes one CPU's arithmetic another one's.
_FLAGS = {"avx2", "avx_vnni", "avx512f", "avx512_vnni", "amx_int8", "i8mm", "sve"} | _BF16


class Choice(NamedTuple):
    """An engine's kind, why it is this one, where the exported networks lie, and the kind that
    embeds: rounding moves no label before it moves an embedding."""

    kind: str
    reason: str
    exported: Path | None
    embeds: str = "torch"
    spare: str | None = None  # where `kind` does not give the golden answers
    rows_per_s: float | None = None  # as measured here


def ready(
    folder: Path,
    name: str,
    limits: TargetServe,
    texts: list[str] | None = None,
    say: Say = print,
    light: bool = False,
) -> Choice:
    """The engine for a model on this machine; the first call on a kind of machine takes a minute.

    `name` is what the user called the model; `texts` stand for the validation rows of a model
    that has none; `light` leaves torch out where anything else will do. Raises UserError where an
    engine was asked for that may not be used.
    """
    if always := _without_measuring(folder, limits):
        return always
    for line in missing(folder, name, limits, texts):
        say(line)
    found = kept(folder, name, streams(limits), texts or [])
    assert found is not None
    return choose(found, limits, _exported(places(folder, name)), light)


def _without_measuring(folder: Path, limits: TargetServe) -> Choice | None:
    if record := packed(folder):
        return _choose_packed(record, folder, limits)
    if limits.gpus_per_replica or limits.engine == "torch":
        why = "on a GPU" if limits.gpus_per_replica else "as the target says"
        return Choice("torch", f"engine: torch ({why})", None)
    return None


def missing(
    folder: Path, name: str, limits: TargetServe, texts: list[str] | None = None
) -> Iterator[str]:
    """Makes what `ready` lacks and yields a line about each step; nothing where all is there."""
    texts = texts or []
    if 0 < len(texts) < FEWEST_TEXTS:
        raise UserError(f"--texts: {len(texts)} texts say too little; give {FEWEST_TEXTS} or more")
    if (
        not _without_measuring(folder, limits)
        and kept(folder, name, streams(limits), texts) is None
    ):
        yield from prepare(folder, name, streams(limits), texts)


def streams(limits: TargetServe) -> int:
    """Forward passes that a replica makes at once, a core each."""
    if limits.streams:
        return limits.streams
    if 1 in (limits.replicas.max, limits.max_replicas_per_node):
        return cores()
    return max(1, int(limits.cpus_per_replica))


def cores() -> int:
    """Those that this process may use; a container has fewer than its machine."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with contextlib.suppress(OSError, ValueError):  # no limit, or no cgroups
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(count or 1, int(quota) // int(period)))
    return count or 1


# ---------------------------------------------------------------- what is kept, and where


def places(folder: Path, name: str) -> list[Path]:
    """Where engines.json and serving/networks/ of a model may be; the first is written to."""
    # Others' folders are left as they are; the copy of a remote one is gone with its process.
    own = (folder / "workloads.json").is_file() and not is_remote(name)
    if own and os.access(folder, os.W_OK):
        return [folder]
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    cache = home / "workloads" / "engines" / _fingerprint(folder)
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError:  # a container's user without a home
        cache = Path(tempfile.gettempdir()) / f"workloads-engines-{os.getuid()}" / cache.name
        cache.mkdir(parents=True, exist_ok=True)
    return [cache, folder]


def _fingerprint(folder: Path) -> str:
    """Of all files that make a model what it is."""
    files = [f for f in folder.iterdir() if f.is_file() and f.suffix in _MODEL_FILES]
    files = [f for f in files if f.name not in ("engines.json", "workloads.json")]
    total = hashlib.sha256()
    for file in sorted([*files, *folder.glob("1_Pooling/*.json"), *folder.glob("serving/*.npz")]):
        with file.open("rb") as opened:
            total.update(file.name.encode() + hashlib.file_digest(opened, "sha256").digest())
    return total.hexdigest()[:24]


def machine() -> tuple[str, set[str]]:
    """This kind of CPU, and those of its instruction sets that matter here."""
    file = Path("/proc/cpuinfo")
    text = file.read_text() if file.is_file() else ""
    name = re.search(r"^model name\s*: (.*)$", text, re.M)
    flags = re.search(r"^(?:flags|Features)\s*: (.*)$", text, re.M)
    has = set(flags[1].split()) & _FLAGS if flags else set()
    return name[1] if name else platform.processor() or platform.machine(), has


def has_bf16() -> bool:
    """Whether this CPU computes in bfloat16 itself."""
    return bool(machine()[1] & _BF16)


def _key(folder: Path, num_streams: int, basis: str) -> str:
    cpu, flags = machine()
    version = importlib.metadata.version("openvino")
    what = f"{cpu} ({' '.join(sorted(flags))}), {num_streams} stream(s), openvino {version}"
    # Other weights may be put into a folder that was served.
    return f"{what}, model {_fingerprint(folder)}, checked on {basis}"


def _basis(folder: Path, texts: list[str]) -> str:
    if (folder / "serving" / "rows.npz").is_file():
        return "validation rows"
    if texts:
        return f"texts {hashlib.sha256(json.dumps(texts).encode()).hexdigest()[:12]}"
    return "nothing"


def kept(folder: Path, name: str, num_streams: int, texts: list[str]) -> Record | None:
    """The figures for this kind of machine, if they have been measured."""
    basis = _basis(folder, texts)
    for place in places(folder, name):
        records = _read(place / "engines.json")
        # Texts that were given once need not be given again.
        wanted = ["texts ", basis] if basis == "nothing" else [basis]
        for start in (_key(folder, num_streams, one) for one in wanted):
            for key in reversed(records):
                if key.startswith(start):
                    return records[key]
    return None


def keep(place: Path, key: str, record: Record) -> None:
    """Adds a record to engines.json, whole or not at all."""
    aside = place / f"engines.json.{uuid.uuid4().hex[:8]}"
    text = json.dumps({**_read(place / "engines.json"), key: record}, indent=2)
    aside.write_text(text + "\n", encoding="utf-8")
    aside.replace(place / "engines.json")


def _read(file: Path) -> Record:
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def _exported(where: list[Path]) -> Path:
    there = [place / "serving" / "networks" for place in where]
    return next((folder for folder in there if (folder / "int8").is_dir()), there[0])


def _forget_others(exported: Path, fingerprint: str) -> None:
    """Networks of other weights, which were in the folder before, go."""
    made_of = exported / "model.txt"
    if not made_of.is_file() or made_of.read_text() != fingerprint:
        shutil.rmtree(exported, ignore_errors=True)
        exported.mkdir(parents=True)
        made_of.write_text(fingerprint)


@contextlib.contextmanager
def _alone(place: Path) -> Iterator[None]:
    """One at a time on this machine: others wait, then find what the first has kept."""
    import fcntl

    with (place / ".engines.lock").open("w") as file:
        with contextlib.suppress(OSError):  # a filesystem without locks: all work is atomic anyway
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


# ---------------------------------------------------------------- the choice


def choose(
    record: Record, limits: TargetServe, exported: Path | None, light: bool = False
) -> Choice:
    """The quickest engine of those that passed, or the one that the target names.

    Raises UserError where that one did not pass.
    """
    engines: Record = record["engines"]
    kind: str = limits.engine
    gap = limits.max_embedding_gap
    exact = [k for k, figures in engines.items() if k == "torch" or gate.embeds(figures, gap)]
    embeds = _quickest(engines, exact, light)
    why_not = {k: _why_not(record, k, limits) for k in engines}
    if kind == "auto":
        # What could not be checked is left to those who ask for it.
        fit = [k for k, why in why_not.items() if not why and "unchecked" not in engines[k]]
        kind = _quickest(engines, fit, light)
    elif kind not in engines or why_not[kind]:
        why = why_not.get(kind) or record.get("problem") or "this CPU has no bfloat16 arithmetic"
        raise UserError(
            f"serve.engine is '{kind}', which cannot be used here: {why}. Leave it at auto, or see "
            "serve.max_accuracy_drop and serve.max_embedding_gap"
        )
    if record.get("head") == "embedding":
        embeds = kind
    reason = f"engine: {kind} ({_reason(record, kind, why_not)})"
    rate = _rate(record["engines"][kind]) or None
    spare = "torch" if limits.engine == "auto" and kind != "torch" else None
    return Choice(kind, reason, exported, embeds, spare, rate)


def _quickest(engines: Record, kinds: list[str], light: bool) -> str:
    others = [kind for kind in kinds if kind != "torch"]
    return max(others if light and others else kinds, key=lambda kind: _rate(engines[kind]))


def _why_not(record: Record, kind: str, limits: TargetServe) -> str | None:
    figures = record["engines"][kind]
    if kind != "torch" and record.get("head") == "embedding" and "problem" not in figures:
        far = f"its embeddings are up to {figures['gap']:.1e} from torch's"
        return None if gate.embeds(figures, limits.max_embedding_gap) else far
    return gate.refusal(figures, limits.max_accuracy_drop)


def _reason(record: Record, kind: str, why_not: dict[str, str | None]) -> str:
    engines = record["engines"]
    short = {k: k.removeprefix("openvino-") for k in engines}
    others = [f"{short[k]} {_rate(f):,.0f}" for k, f in engines.items() if k != kind and _rate(f)]
    parts = [f"{_rate(engines[kind]):,.0f} rows/s; {', '.join(others)}"] if others else []
    if "difference" in engines[kind]:
        parts.append(f"accuracy {gate.accuracy(engines[kind])} on {record['rows']:,} rows")
    elif record.get("head") == "embedding" and kind != "torch":
        parts.append(f"embeddings within {engines[kind]['gap']:.0e} of torch's")
    elif kind != "torch" and record.get("basis", "nothing") != "nothing":
        agrees = 1 - engines[kind]["disagreement"]
        parts.append(f"agrees with torch on {agrees:.1%} of {record['rows']:,} texts")
    parts += [f"not {short[k]}: {why}" for k, why in why_not.items() if why]
    return "; ".join([*parts, *([record["problem"]] if "problem" in record else [])])


def _rate(figures: Record) -> float:
    return max(figures.get("rows_per_s", {"1": 0}).values())


# ---------------------------------------------------------------- the choice of a package


def pack(folder: Path, out: Path, choice: Choice) -> None:
    """Writes what was chosen for a model into a copy of its folder that has only what that
    takes."""
    # A package of a package was measured where the first was made.
    about = packed(folder) or {"reason": choice.reason, "cpu": machine()[0]}
    record = {**about, "kind": choice.kind, "embeds": choice.embeds}
    (out / "serving").mkdir(exist_ok=True)
    (out / "serving" / PACKED).write_text(
        json.dumps(record, indent=2, sort_keys=True) + "\n", encoding="utf-8"
    )


def packed(folder: Path) -> Record:
    """What `pack` wrote; {} for a model that was not packed."""
    return _read(folder / "serving" / PACKED)


def _choose_packed(record: Record, folder: Path, limits: TargetServe) -> Choice:
    has = {record["kind"], record["embeds"]}
    if BF16 in has:
        has.add(FP32)  # the same network
    wanted = "torch" if limits.gpus_per_replica else limits.engine
    kind, embeds = (record["kind"] if wanted == "auto" else wanted), record["embeds"]
    if kind not in has:
        raise UserError(
            f"serve.engine is '{kind}', which this package lacks (it has {', '.join(sorted(has))})"
            f"; make another: workloads package target.serve.engine={kind}"
        )
    reason = f"{record['reason']}; as packaged on {record['cpu']}"
    if not has_bf16() and BF16 in (kind, embeds):
        reason += "; this CPU has no bfloat16 arithmetic: fp32"
        kind, embeds = (FP32 if k == BF16 else k for k in (kind, embeds))
    exported = folder / "serving" / "networks"
    return Choice(kind, reason, exported, embeds, embeds if embeds != kind else None)


# ---------------------------------------------------------------- the measurement


def prepare(folder: Path, name: str, num_streams: int, texts: list[str]) -> Iterator[str]:
    """Exports and measures in another process, and yields what it says."""
    asked = json.dumps([str(folder), name, num_streams, texts])
    env = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    env["PYTHONPATH"] = os.pathsep.join(p or os.getcwd() for p in sys.path)
    with tempfile.TemporaryFile("w+") as errors, tempfile.TemporaryFile("w+") as asks:
        asks.write(asked)
        asks.seek(0)
        child = subprocess.Popen(
            [sys.executable, "-m", "workloads.engines"],
            stdin=asks,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=env,
        )
        assert child.stdout is not None
        yield from (line.rstrip() for line in child.stdout)
        if code := child.wait():
            errors.seek(0)
            last = (errors.read().strip().splitlines() or [""])[-1]
            place = places(folder, name)[0]
            problem = (
                f"the preparation of others ended with {code}: {last[:200]}; remove "
                f"{place / 'engines.json'} to try again"
            )
            record = {"problem": problem, "engines": {"torch": {}}}
            keep(place, _key(folder, num_streams, _basis(folder, texts)), record)


def measure(folder: Path, name: str, num_streams: int, texts: list[str], say: Say) -> None:
    """Exports what is missing, checks and times each engine, and keeps the figures."""
    from . import export  # imports torch, which a replica that calls `ready` does without

    where = places(folder, name)
    with _alone(where[0]):
        if kept(folder, name, num_streams, texts) is not None:
            return
        began = time.perf_counter()
        say(f"engines: first time on this kind of machine ({machine()[0]}): loading torch")
        torch = TorchEngine(folder, name, threads=os.cpu_count() or 1)
        known = samples.read(folder) or (samples.of_texts(torch, texts) if texts else None)
        _forget_others(_exported(where), _fingerprint(folder))
        problems = export.export(torch, _exported(where), known, say)
        say("engines: checking against torch in fp32")
        rows = known.validation if known else gate.MADE_UP
        classifies = torch.info.head == "logits"
        reference = gate.logits(torch, rows if classifies else [], REFERENCE_BUDGET_S)
        engines: dict[str, Engine] = {"torch": load(folder, name, streams=num_streams)}
        figures: dict[str, Record] = {"torch": {}}
        if classifies and known and known.labels is not None:
            figures["torch"]["accuracy"] = float(
                (gate.decisions(reference, False)[:, 0] == known.labels[: len(reference)]).mean()
            )
        sound = not samples.golden_problem(torch, folder)  # or no engine is to blame
        for kind in (FP32, *([BF16] if has_bf16() else []), INT8):
            try:
                if kind in problems:
                    raise RuntimeError(problems[kind])
                engine = load(folder, name, kind, _exported(where), num_streams, spare_bytes=0)
                figures[kind] = gate.check(engine, rows, reference, known) if classifies else {}
                figures[kind]["gap"] = gate.gap(engine, torch, rows)
                # What would be refused where it serves is not chosen.
                if sound and (problem := samples.golden_problem(engine, folder)):
                    figures[kind]["problem"] = problem
                engines[kind] = engine
            except Exception as e:  # whatever the runtime thinks of this network or machine
                figures[kind] = {"problem": " ".join(str(e).split())[:300]}
        say("engines: timing")
        for kind, rates in gate.timings(engines, rows, num_streams).items():
            figures[kind]["rows_per_s"] = rates
        basis = _basis(folder, texts)
        record: Record = {"head": torch.info.head, "basis": basis, "rows": len(reference)}
        record["engines"] = figures
        chosen = choose(record, TargetServe(), None)
        seconds = round(time.perf_counter() - began, 1)
        record = {"choice": chosen.kind, "reason": chosen.reason, "took_s": seconds, **record}
        keep(where[0], _key(folder, num_streams, basis), record)


if __name__ == "__main__":
    _folder, _name, _streams, _texts = json.load(sys.stdin)
    _out = os.fdopen(os.dup(1), "w")  # whoever prints anything else does it to stderr
    os.dup2(2, 1)
    measure(Path(_folder), _name, _streams, _texts, lambda t: print(t, file=_out, flush=True))

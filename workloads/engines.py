"""Which engine serves a model on this machine: exports it once, checks each candidate against torch
in fp32 (the gate), times those that load, and keeps the figures in engines.json.

They lie in the model's folder where that is a run's and can be written, else in
~/.cache/workloads/engines/. The work is done by a process of its own
(python -m workloads.engines), whose memory ends with it.
"""

import contextlib
import hashlib
import importlib.metadata
import itertools
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from . import samples
from .config import TargetServe, UserError
from .engine import OPENVINO, Engine, TorchEngine, load
from .sources import is_remote

Record = dict[str, Any]
Say = Callable[[str], None]
FP32, BF16, INT8 = (OPENVINO + bits for bits in ("fp32", "bf16", "int8"))
MOST_DISAGREEMENT = 0.03  # share of rows
FEWEST_TEXTS = 50
REFERENCE_BUDGET_S = 20.0
SLICE_S = 0.15  # of one engine's timing; an engine takes a second in all
_BF16 = {"avx512_bf16", "amx_bf16", "bf16"}
# What makes one CPU's arithmetic another one's.
_FLAGS = {"avx2", "avx_vnni", "avx512f", "avx512_vnni", "amx_int8", "i8mm", "sve"} | _BF16


class Choice(NamedTuple):
    """An engine's kind, why it is this one, and where the exported networks lie."""

    kind: str
    reason: str
    exported: Path | None


def ready(
    folder: Path, name: str, limits: TargetServe, texts: list[str] | None = None, say: Say = print
) -> Choice:
    """The engine for a model on this machine; the first call on a kind of machine takes a minute.

    `name` is what the user called the model; `texts` stand for the validation rows of a model
    that has none. Raises UserError where an engine was asked for that may not be used.
    """
    if always := _without_measuring(limits):
        return always
    for line in missing(folder, name, limits, texts):
        say(line)
    found = kept(folder, name, streams(limits), texts or [])
    assert found is not None
    return choose(found, limits, _exported(places(folder, name)))


def _without_measuring(limits: TargetServe) -> Choice | None:
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
    if not _without_measuring(limits) and kept(folder, name, streams(limits), texts) is None:
        yield from prepare(folder, name, streams(limits), texts)


def streams(limits: TargetServe) -> int:
    """Forward passes that a replica makes at once."""
    return max(1, int(limits.cpus_per_replica))


# ---------------------------------------------------------------- what is kept, and where


def places(folder: Path, name: str) -> list[Path]:
    """Where engines.json and serving/openvino/ of a model may be; the first is written to."""
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
    files = [f for f in folder.iterdir() if f.is_file() and f.name != "engines.json"]
    total = hashlib.sha256()
    for file in sorted([*files, *folder.glob("serving/rows.npz")]):
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


def _key(num_streams: int, basis: str) -> str:
    cpu, flags = machine()
    version = importlib.metadata.version("openvino")
    what = f"{cpu} ({' '.join(sorted(flags))}), {num_streams} stream(s), openvino {version}"
    return f"{what}, checked on {basis}"


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
        for start in (_key(num_streams, one) for one in wanted):
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
    there = [place / "serving" / "openvino" for place in where]
    return next((folder for folder in there if (folder / "int8").is_dir()), there[0])


@contextlib.contextmanager
def _alone(place: Path) -> Iterator[None]:
    """One at a time on this machine: others wait, then find what the first has kept."""
    import fcntl

    with (place / ".engines.lock").open("w") as file:
        with contextlib.suppress(OSError):  # a filesystem without locks: all work is atomic anyway
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


# ---------------------------------------------------------------- the choice


def refusal(figures: Record, max_drop: float) -> str | None:
    """Why an engine with these figures may not be used."""
    if "problem" in figures:
        return figures["problem"]
    if "difference" in figures and -figures["difference"] > max_drop:
        return f"its accuracy is {_accuracy(figures)}, more than {max_drop:g} lower"
    if figures.get("disagreement", 0) > MOST_DISAGREEMENT:
        return f"it disagrees with torch on {figures['disagreement']:.1%} of the rows"
    return None


def choose(record: Record, limits: TargetServe, exported: Path | None) -> Choice:
    """The quickest engine of those that passed, or the one that the target names.

    Raises UserError where that one did not pass.
    """
    engines, kind = record["engines"], limits.engine
    why_not = {k: refusal(figures, limits.max_accuracy_drop) for k, figures in engines.items()}
    if kind == "auto":
        # What could not be checked is left to those who ask for it.
        fit = [k for k, why in why_not.items() if not why and "unchecked" not in engines[k]]
        kind = max(fit, key=lambda k: _rate(engines[k]))
    elif kind not in engines or why_not[kind]:
        why = why_not.get(kind) or record.get("problem") or "this CPU has no bfloat16 arithmetic"
        raise UserError(
            f"serve.engine is '{kind}', which cannot be used here: {why}. Leave it at auto, or see "
            "serve.max_accuracy_drop"
        )
    return Choice(kind, f"engine: {kind} ({_reason(record, kind, why_not)})", exported)


def _reason(record: Record, kind: str, why_not: dict[str, str | None]) -> str:
    engines = record["engines"]
    short = {k: k.removeprefix(OPENVINO) for k in engines}
    others = [f"{short[k]} {_rate(f):,.0f}" for k, f in engines.items() if k != kind and _rate(f)]
    parts = [f"{_rate(engines[kind]):,.0f} rows/s; {', '.join(others)}"] if others else []
    if "difference" in engines[kind]:
        parts.append(f"accuracy {_accuracy(engines[kind])} on {record['rows']:,} rows")
    elif "disagreement" in engines[kind]:
        agrees = 1 - engines[kind]["disagreement"]
        parts.append(f"agrees with torch on {agrees:.1%} of {record['rows']:,} texts")
    parts += [f"not {short[k]}: {why}" for k, why in why_not.items() if why]
    return "; ".join([*parts, *([record["problem"]] if "problem" in record else [])])


def _accuracy(figures: Record) -> str:
    low, high = figures["interval"]
    return f"{figures['accuracy']:.4f} against {figures['reference']:.4f}, {low:+.4f}..{high:+.4f}"


def _rate(figures: Record) -> float:
    return max(figures.get("rows_per_s", {"1": 0}).values())


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
            keep(place, _key(num_streams, _basis(folder, texts)), record)


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
        problems = export.export(torch, _exported(where), known, say)
        say("engines: checking against torch in fp32")
        rows = known.validation if known else []
        reference = logits(torch, rows, REFERENCE_BUDGET_S)
        engines: dict[str, Engine] = {"torch": load(folder, name, streams=num_streams)}
        figures: dict[str, Record] = {"torch": {}}
        if known and known.labels is not None:
            figures["torch"]["accuracy"] = float(
                (decisions(reference, False)[:, 0] == known.labels[: len(reference)]).mean()
            )
        for kind in (FP32, *([BF16] if has_bf16() else []), INT8):
            try:
                if kind in problems:
                    raise RuntimeError(problems[kind])
                engine = load(folder, name, kind, _exported(where), num_streams)
                figures[kind] = check(engine, rows, reference, known)
                engines[kind] = engine
            except Exception as e:  # whatever the runtime thinks of this network or machine
                figures[kind] = {"problem": " ".join(str(e).split())[:300]}
        say("engines: timing")
        for kind, rates in timings(engines, rows, num_streams).items():
            figures[kind]["rows_per_s"] = rates
        record: Record = {"rows": len(reference), "engines": figures}
        chosen = choose(record, TargetServe(), None)
        seconds = round(time.perf_counter() - began, 1)
        record = {"choice": chosen.kind, "reason": chosen.reason, "took_s": seconds, **record}
        keep(where[0], _key(num_streams, _basis(folder, texts)), record)


def check(
    engine: Engine, rows: samples.Rows, reference: np.ndarray, known: samples.Samples | None
) -> Record:
    """How an engine's answers differ from the reference's; empty without rows."""
    if known is None:
        return {"unchecked": True} if engine.kind != FP32 else {}
    given = logits(engine, rows[: len(reference)])
    return compare(given, reference, known.labels, engine.info.multi_label)


def compare(
    given: np.ndarray, reference: np.ndarray, labels: np.ndarray | None, multi_label: bool
) -> Record:
    """Share of rows that are decided otherwise; with labels, the accuracy and the 95 % interval
    of the paired difference."""
    ours, theirs = (decisions(logits, multi_label) for logits in (given, reference))
    figures: Record = {"disagreement": float((ours != theirs).any(1).mean())}
    if not np.isfinite(given).all():
        figures["problem"] = "its answers are not all finite"
    if labels is None or multi_label:
        return figures
    right, was_right = (decided[:, 0] == labels[: len(decided)] for decided in (ours, theirs))
    paired = right.astype(float) - was_right
    mean, error = paired.mean(), 1.96 * paired.std() / math.sqrt(len(paired))
    return figures | {
        "accuracy": float(right.mean()),
        "reference": float(was_right.mean()),
        "difference": float(mean),
        "interval": [float(mean - error), float(mean + error)],
    }


def decisions(logits: np.ndarray, multi_label: bool) -> np.ndarray:
    """The best class of each row (N, 1), or which labels apply (N, C)."""
    return logits > 0 if multi_label else logits.argmax(1)[:, None]


def logits(engine: Engine, rows: samples.Rows, budget_s: float = math.inf) -> np.ndarray:
    """Logits (N, C) of the first N rows: all, or as many as the time allows."""
    end = time.perf_counter() + budget_s
    done: list[np.ndarray] = []
    for start in range(0, len(rows), 256):
        part = rows[start : start + 256]
        order = sorted(range(len(part)), key=lambda i: len(part[i]))
        found = np.empty((len(part), len(engine.info.labels)), np.float32)
        for batch in (order[i : i + 16] for i in range(0, len(order), 16)):
            found[batch] = engine.predict([part[i] for i in batch])
        done.append(found)
        if time.perf_counter() > end:
            break
    return np.concatenate(done) if done else np.empty((0, len(engine.info.labels)))


def timings(
    engines: dict[str, Engine], rows: samples.Rows, num_streams: int
) -> dict[str, dict[str, float]]:
    """Rows a second of each engine by micro-batch size, in turn, median of three."""
    rows = rows[:256] or [[5] * length for length in range(8, 40)]
    rates: dict[tuple[str, str], list[float]] = {}
    for seconds in (SLICE_S / 4, SLICE_S, SLICE_S, SLICE_S):  # the first round warms up
        for size in (1, 8):
            batches = micro_batches(rows, size)
            for kind, engine in engines.items():
                found = rate(engine, batches, num_streams, seconds)
                rates.setdefault((kind, str(size)), []).append(found)
    medians = {key: round(statistics.median(found[1:]), 1) for key, found in rates.items()}
    return {kind: {size: medians[kind, size] for size in ("1", "8")} for kind in engines}


def micro_batches(rows: samples.Rows, size: int) -> list[samples.Rows]:
    """Rows of like length together, in random order."""
    ordered = sorted(rows, key=len)
    batches = [ordered[i : i + size] for i in range(0, len(ordered), size)]
    return [batches[i] for i in np.random.default_rng(0).permutation(len(batches))]


def rate(engine: Engine, batches: list[samples.Rows], num_streams: int, seconds: float) -> float:
    """Rows a second while as many threads as the engine has streams take batch after batch."""
    threads = min(num_streams, engine.streams)
    began = time.perf_counter()

    def work(first: int) -> int:
        done = 0
        for i in itertools.count(first, threads):
            done += len(engine.predict(batches[i % len(batches)]))
            if time.perf_counter() - began > seconds:
                return done
        raise AssertionError

    with ThreadPoolExecutor(threads) as pool:
        total = sum(pool.map(work, range(threads)))
    return total / (time.perf_counter() - began)


if __name__ == "__main__":
    _folder, _name, _streams, _texts = json.load(sys.stdin)
    _out = os.fdopen(os.dup(1), "w")  # whoever prints anything else does it to stderr
    os.dup2(2, 1)
    measure(Path(_folder), _name, _streams, _texts, lambda t: print(t, file=_out, flush=True))

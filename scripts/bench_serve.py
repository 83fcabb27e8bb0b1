"""Compares `workloads serve` with other ways to put the same text classifier behind HTTP.

    .venv/bin/python scripts/bench_serve.py --model runs/NAME --texts FILE.csv [-- KEY=VALUE]
    .venv/bin/python scripts/bench_serve.py --embed --model FOLDER --texts FILE.csv

Each server is brought up in turn, round after round, checked against plain transformers, loaded
with wrk and taken down; the table has medians over the rounds. With --embed they are asked for
embeddings, as OpenAI's clients ask. What follows `--` goes to
`workloads serve`. The other servers are scripts/bench_servers/*, each installed once into an
environment of its own. Letters of the loads: N connections, each with one request in flight.
Not covered: accelerators, and clients on another machine.
"""

import argparse
import contextlib
import csv
import hashlib
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import httpx
import psutil
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))
from ports import free_port

ROOT = Path(__file__).resolve().parent.parent
SERVERS = ROOT / "scripts/bench_servers"
REFERENCE = "fastapi-onnx"
CHECKED, MIN_AGREEMENT = 50, 0.95  # texts; share of labels
SENTENCES = 32  # in a request of the second load
BATCH_CONNECTIONS = 4
WARM_UP_S, START_LIMIT_S, STOP_LIMIT_S = 4, 180, 15
TORCH = "torch==2.13.0"
FASTAPI = ("fastapi==0.165.0", "uvicorn[standard]==0.54.0", "transformers==5.23.0")
ONNX = ("onnxruntime==1.31.1", "onnx==1.23.2", "onnxscript==0.7.2", "tokenizers==0.23.3")


@dataclass(frozen=True)
class Contender:
    """A server: how it starts ({python}, {bin}, {model}, {port}, {int8}) and how it is asked."""

    command: str
    env: str = ""  # its environment; none: the one that runs this
    packages: tuple[str, ...] = ()
    path: str = "/predict"
    key: str = "inputs"
    lists_only: bool = False  # a single text too is sent as a list of one
    embeds: bool = False  # by the path of OpenAI's API

    def body(self, texts: list[str], model: str) -> dict[str, Any]:
        """The JSON of a request."""
        more = {"model": model} if self.embeds else {}
        return {self.key: texts[0] if len(texts) == 1 and not self.lists_only else texts, **more}


CONTENDERS = {
    "ours": Contender(
        "{python} -m workloads serve --model {model} --json target.serve.port={port}"
    ),
    "fastapi-pipeline": Contender(
        "{python} fastapi_pipeline.py {model} {port}", "fastapi", FASTAPI + ONNX
    ),
    REFERENCE: Contender(
        "{python} fastapi_onnx.py {model} {port} {int8}", "fastapi", FASTAPI + ONNX
    ),
    "serve-tutorial": Contender("{python} serve_tutorial.py {model} {port}"),
    "litserve": Contender(
        "{python} litserve_batched.py {model} {port}",
        "litserve",
        ("litserve==0.2.19", "transformers==5.23.0"),
    ),
    "infinity": Contender(
        "{bin}/infinity_emb v2 --model-id {model} --port {port} --host 127.0.0.1 --engine torch"
        " --device cpu --no-model-warmup",
        "infinity",
        ("infinity-emb[server,torch]==0.0.78",),
        path="/classify",
        key="input",
        lists_only=True,
    ),
    "ours-embed": Contender(
        "{python} -m workloads serve --model {model} --json target.serve.port={port}",
        path="/v1/embeddings",
        key="input",
        embeds=True,
    ),
    "infinity-embed": Contender(
        "{bin}/infinity_emb v2 --model-id {model} --port {port} --host 127.0.0.1 --engine torch"
        " --device cpu --no-model-warmup --served-model-name {name}",
        "infinity",
        ("infinity-emb[server,torch]==0.0.78",),
        path="/embeddings",
        key="input",
        embeds=True,
    ),
    "bentoml": Contender(
        "{bin}/bentoml serve bentoml_batched:Classifier --host 127.0.0.1 --port {port}",
        "bentoml",
        ("bentoml==1.4.39", "transformers==5.23.0"),
        lists_only=True,
    ),
}


class Excluded(Exception):
    """Why a contender is not timed; said in the table."""


@dataclass
class Bench:
    """What is compared, and where things are kept."""

    model: Path
    texts: list[str]
    envs: Path
    scratch: Path
    connections: list[int]
    seconds: int
    flags: list[str]
    embed: bool = False
    expected: list[str] = field(default_factory=list)  # labels of the first texts

    @property
    def name(self) -> str:
        """The model's, for those who ask for embeddings."""
        return next((p for p in reversed(self.model.parts) if p != "model"), "model")


def say(text: str) -> None:
    """A line of progress."""
    print(text, file=sys.stderr, flush=True)


# ---------------------------------------------------------------- what a contender needs


def python_of(bench: Bench, contender: Contender) -> Path:
    """The interpreter of its environment, which is made at the first time; raises Excluded."""
    if not contender.env:
        return Path(sys.executable)
    home = bench.envs / contender.env
    python, done = home / "bin/python", home / "installed.json"
    if done.is_file() and json.loads(done.read_text()) == list(contender.packages):
        return python
    say(f"{contender.env}: installing {', '.join(contender.packages)} into {home}")
    run_or_exclude("not installed", [sys.executable, "-m", "venv", "--clear", str(home)])
    for packages in ([TORCH], contender.packages):  # torch first: the others take what is there
        run_or_exclude("not installed", [str(python), "-m", "pip", "install", "-q", *packages])
    done.write_text(json.dumps(contender.packages))
    return python


def run_or_exclude(failed: str, line: list[str]) -> str:
    """The standard output of a command; raises Excluded with the end of its complaint."""
    done = subprocess.run(line, capture_output=True, text=True, cwd=SERVERS, env=environment())
    if done.returncode:
        told = (done.stderr or done.stdout).strip().splitlines() or ["no word"]
        raise Excluded(f"{failed}: {told[-1][-200:]}")
    return done.stdout


def environment(model: Path | None = None) -> dict[str, str]:
    """Offline, quiet, and with this checkout importable."""
    more = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), "BENTOML_DO_NOT_TRACK": "true"}
    more |= {"DO_NOT_TRACK": "1", "INFINITY_ANONYMOUS_USAGE_STATS": "0"}
    here = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    return here | more | ({"BENCH_MODEL": str(model)} if model else {})


def int8_file(bench: Bench, python: Path) -> Path:
    """The model as int8 ONNX, exported at the first time; raises Excluded."""
    digest = hashlib.sha256((bench.model / "model.safetensors").read_bytes()).hexdigest()[:12]
    path = bench.envs / f"int8-{digest}.onnx"
    if not path.is_file():
        say("exporting the model to int8 ONNX")
        run_or_exclude("no export", [str(python), "int8_model.py", str(bench.model), str(path)])
    return path


def command(bench: Bench, name: str, port: int) -> list[str]:
    """The line that starts a contender; raises Excluded."""
    contender = CONTENDERS[name]
    python = python_of(bench, contender)
    int8 = int8_file(bench, python) if "{int8}" in contender.command else ""
    told: dict[str, Any] = {"python": python, "bin": python.parent, "model": bench.model}
    told |= {"port": port, "name": bench.name}
    line = [part.format(**told, int8=int8) for part in contender.command.split()]
    return line + (bench.flags if name.startswith("ours") else [])


# ---------------------------------------------------------------- a server, up and down


@dataclass
class Server:
    """One that answers."""

    name: str
    model: str
    root: psutil.Process
    port: int
    ready_s: float = 0.0  # from the start of the process to the first right answer
    client: httpx.Client = field(default_factory=lambda: httpx.Client(timeout=60))

    def labels(self, texts: list[str]) -> list[str]:
        """The best label of each text, in one request; of an embedding where it is largest."""
        contender = CONTENDERS[self.name]
        url = f"http://127.0.0.1:{self.port}{contender.path}"
        reply = self.client.post(url, json=contender.body(texts, self.model))
        reply = reply.raise_for_status().json()
        rows = reply["data"] if isinstance(reply, dict) else reply
        if contender.embeds:
            vectors = [row["embedding"] for row in rows]
            return [str(vector.index(max(vector))) for vector in vectors]
        scored = [row if isinstance(row, list) else [row] for row in rows]
        return [max(row, key=lambda s: s["score"])["label"] for row in scored]

    def processes(self) -> list[psutil.Process]:
        """Itself and all it has started."""
        return [self.root, *self.root.children(recursive=True)]


@contextlib.contextmanager
def up(bench: Bench, name: str) -> Iterator[Server]:
    """A contender in a process group of its own, gone afterwards; raises Excluded."""
    port = free_port()
    line, log = command(bench, name, port), bench.scratch / f"{name}.log"
    began = time.perf_counter()
    with log.open("w") as out:
        env = environment(bench.model)
        options: dict[str, Any] = {"stdout": out, "stderr": out, "stdin": subprocess.DEVNULL}
        started = subprocess.Popen(line, cwd=SERVERS, env=env, start_new_session=True, **options)
    server = Server(name, bench.name, psutil.Process(started.pid), port)
    try:
        wait_until_right(bench, server, started, log)
        server.ready_s = time.perf_counter() - began
        yield server
    finally:
        take_down(server, started)


def wait_until_right(
    bench: Bench, server: Server, started: subprocess.Popen[bytes], log: Path
) -> None:
    """Returns at the first right answer; raises Excluded when the server dies or takes too long."""
    limit, asked = time.monotonic() + START_LIMIT_S, bench.texts[:4]
    while started.poll() is None and time.monotonic() < limit:
        with contextlib.suppress(httpx.HTTPError):
            same = zip(server.labels(asked), bench.expected, strict=False)
            if sum(a == b for a, b in same) >= 3:  # int8 may differ in one
                return
        time.sleep(0.05)
    tail = " ".join(log.read_text(errors="replace").split())[-300:]
    raise Excluded(f"did not come up: {tail}")


def take_down(server: Server, started: subprocess.Popen[bytes]) -> None:
    """As Ctrl-C would, then by id what is left."""
    left = server.processes() if started.poll() is None else []
    started.send_signal(signal.SIGINT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        started.wait(STOP_LIMIT_S)
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):  # psutil never kills a reused id
            process.kill()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(started.pid, signal.SIGKILL)
    started.wait()


def total(server: Server, value: Callable[[psutil.Process], float]) -> float:
    """The sum of a figure over a server's processes."""
    found = 0.0
    for process in server.processes():
        with contextlib.suppress(psutil.NoSuchProcess):
            found += value(process)
    return found


def memory_mb(process: psutil.Process) -> float:
    """Its proportional share where the system tells it, else what is its own."""
    told = process.memory_full_info()
    return getattr(told, "pss", told.uss) / 1e6


def cpu_s(process: psutil.Process) -> float:
    """User and system time."""
    used = process.cpu_times()
    return used.user + used.system


# ---------------------------------------------------------------- what is measured


def plain_labels(bench: Bench) -> list[str]:
    """What transformers, or sentence-transformers, itself says of the first texts."""
    from transformers import pipeline
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    if bench.embed:
        from sentence_transformers import SentenceTransformer

        vectors = SentenceTransformer(str(bench.model), device="cpu").encode(bench.texts[:CHECKED])
        return [str(number) for number in vectors.argmax(1)]
    classifier = pipeline("text-classification", model=str(bench.model), device=-1)
    return [answer["label"] for answer in classifier(bench.texts[:CHECKED], truncation=True)]


def agreement(bench: Bench, server: Server) -> float:
    """The share of the first texts with the right label, asked side by side; raises Excluded."""
    with ThreadPoolExecutor(16) as pool:
        told = [row[0] for row in pool.map(lambda t: server.labels([t]), bench.texts[:CHECKED])]
    together = server.labels(bench.texts[:SENTENCES])
    expected = bench.expected + bench.expected[:SENTENCES]
    same = sum(a == b for a, b in zip(told + together, expected, strict=True)) / len(expected)
    if same < MIN_AGREEMENT:
        raise Excluded(f"agrees with transformers on {same:.0%} of the texts only: not timed")
    return same


LUA = """
local bodies, requests, i = {%s}, {}, 0
function init()
  local headers = {["content-type"] = "application/json"}
  for k, body in ipairs(bodies) do requests[k] = wrk.format("POST", "%s", headers, body) end
end
function request() i = i %% #requests + 1; return requests[i] end
function done(s, latency)
  local e = s.errors
  print(string.format('{"requests": %%d, "seconds": %%f, "p50_ms": %%f, "p99_ms": %%f,'
    .. '"refused": %%d, "broken": %%d}', s.requests, s.duration / 1e6,
    latency:percentile(50) / 1e3, latency:percentile(99) / 1e3,
    e.status, e.connect + e.read + e.write + e.timeout))
end
"""


def script(bench: Bench, contender: Contender, size: int) -> Path:
    """The wrk script that cycles through requests of `size` texts."""
    groups = [bench.texts[i : i + size] for i in range(0, len(bench.texts) - size + 1, size)]
    # Lua takes the JSON as it is; only a text can hold what ends such a string there.
    told = [
        json.dumps(contender.body(g, bench.name)).replace("]==]", r"\u005d==\u005d") for g in groups
    ]
    bodies = ", ".join(f"[==[{body}]==]" for body in told)
    path = bench.scratch / "load.lua"
    path.write_text(LUA % (bodies, contender.path))
    return path


def load(bench: Bench, server: Server, connections: int, seconds: int, size: int = 1) -> dict:
    """One run of wrk: what it says, sentences a second, CPU time a sentence, and how busy others
    kept the machine."""
    lua = script(bench, CONTENDERS[server.name], size)
    line = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}", "--latency", "--timeout", "60"]
    cpu, machine = total(server, cpu_s), psutil.cpu_times()
    before = sum_children()
    done = subprocess.run(
        [*line, "-s", str(lua), f"http://127.0.0.1:{server.port}"], capture_output=True, text=True
    )
    cpu, wrk = total(server, cpu_s) - cpu, sum_children() - before
    if done.returncode:
        raise Excluded(f"wrk: {(done.stderr or done.stdout).strip()[-200:]}")
    told = json.loads(done.stdout.strip().splitlines()[-1])
    right = (told["requests"] - told["refused"]) * size
    others = busy_s(machine, psutil.cpu_times()) - cpu - wrk
    return told | {
        "rate": right / told["seconds"],
        "cpu_ms": 1e3 * cpu / max(1, right),
        "others": max(0.0, others / told["seconds"] / (os.cpu_count() or 1)),
    }


def sum_children() -> float:
    """CPU time of the children that have ended, wrk above all."""
    used = os.times()
    return used.children_user + used.children_system


def busy_s(before: Any, after: Any) -> float:
    """CPU time that the whole machine spent between two readings."""
    idle = {"idle", "iowait", "guest", "guest_nice"}
    names = [name for name in before._fields if name not in idle]
    return sum(getattr(after, name) - getattr(before, name) for name in names)


def measure(bench: Bench, name: str) -> dict[str, Any]:
    """One round of one contender; raises Excluded."""
    with up(bench, name) as server:
        found: dict[str, Any] = {"agreement": agreement(bench, server), "ready_s": server.ready_s}
        time.sleep(1)
        found["memory_mb"] = total(server, memory_mb)
        found["loads"] = {}
        for n in bench.connections:
            load(bench, server, n, WARM_UP_S)
            found["loads"][n] = load(bench, server, n, bench.seconds)
        found["batch"] = load(bench, server, BATCH_CONNECTIONS, bench.seconds, SENTENCES)
    found["others"] = max(r["others"] for r in [*found["loads"].values(), found["batch"]])
    rates = ", ".join(f"{n}: {run['rate']:.0f}/s" for n, run in found["loads"].items())
    say(f"{name}: {rates}; up in {found['ready_s']:.1f} s; other work: {found['others']:.0%}")
    return found


def no_server(bench: Bench, name: str) -> dict[str, float]:
    """Sentences a second of an engine in one process; raises Excluded."""
    python, kind, more = Path(sys.executable), "ours", []
    if name == REFERENCE:
        python = python_of(bench, CONTENDERS[name])
        kind, more = "int8", [str(int8_file(bench, python))]
    texts = bench.scratch / "texts.json"
    texts.write_text(json.dumps(bench.texts))
    line = [str(python), "no_server.py", kind, str(bench.model), str(texts), str(bench.seconds)]
    return json.loads(run_or_exclude("failed", line + more).splitlines()[-1])


# ---------------------------------------------------------------- what is shown


def medians(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """The median of each figure over the rounds; the worst of what shows a bad measurement."""

    def over(runs: list[dict[str, float]]) -> dict[str, float]:
        joined = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        return joined | {key: sum(run[key] for run in runs) for key in ("refused", "broken")}

    plain = {key: statistics.median(r[key] for r in rounds) for key in ("ready_s", "memory_mb")}
    loads = {n: over([r["loads"][n] for r in rounds]) for n in rounds[0]["loads"]}
    worst = {"agreement": min(r["agreement"] for r in rounds)}
    worst["others"] = max(r["others"] for r in rounds)
    return {**plain, **worst, "loads": loads, "batch": over([r["batch"] for r in rounds])}


def cell(run: dict[str, float], base: dict[str, float] | None) -> str:
    """Two lines: the rate and its ratio, then the latencies; errors on a third."""
    ratio = f"  {run['rate'] / base['rate']:.2f}x" if base and base["rate"] else ""
    p50, p99 = (f"{ms:.1f}" if ms < 100 else f"{ms:.0f}" for ms in (run["p50_ms"], run["p99_ms"]))
    text = f"{run['rate']:,.0f}/s{ratio}\n{p50} / {p99} ms"
    wrong = int(run["refused"] + run["broken"])
    return text + (f"\n[red]{wrong:,} errors[/red]" if wrong else "")


def table(bench: Bench, report: dict[str, Any]) -> Table:
    """The one table."""
    shown = Table(title=title(bench, report), caption=caption(report), show_lines=True)
    shown.add_column("server", no_wrap=True)
    for n in bench.connections:
        shown.add_column(f"{n} connected\n[dim]p50 / p99[/dim]", justify="right", no_wrap=True)
    head = f"{SENTENCES} a request\n[dim]sentences[/dim]"
    shown.add_column(head, justify="right", no_wrap=True)
    for head in ("CPU ms\na text", "idle\nMB", "first\nanswer s", "agrees", "other\nwork"):
        shown.add_column(head, justify="right")
    base = report["servers"].get(base_of(bench), {}).get("median")
    for name, found in report["servers"].items():
        shown.add_row(*row(bench, name, found, base))
    return shown


def base_of(bench: Bench) -> str:
    """Whose rates the others are compared with."""
    return "infinity-embed" if bench.embed else REFERENCE


def row(bench: Bench, name: str, found: dict[str, Any], base: dict[str, Any] | None) -> list[str]:
    """A contender's cells; those of one that was not timed say why below the table."""
    if "median" not in found:
        return [f"{name}\n[red]not timed[/red]", *["-"] * (len(bench.connections) + 6)]
    m = found["median"]
    cells = [cell(run, base and base["loads"][n]) for n, run in m["loads"].items()]
    widest = m["loads"][max(bench.connections)]
    last = [f"{widest['cpu_ms']:.2f}", f"{m['memory_mb']:,.0f}", f"{m['ready_s']:.1f}"]
    last += [f"{m['agreement']:.0%}", f"{m['others']:.0%}"]
    return [name, *cells, cell(m["batch"], base and base["batch"]), *last]


def title(bench: Bench, report: dict[str, Any]) -> str:
    """What was measured, on what, when."""
    return (
        f"{bench.model} on {report['cpu']}, {report['cores']} cores, {report['date']}\n"
        f"one text a request ({SENTENCES} a request: {BATCH_CONNECTIONS} connections), "
        f"{bench.seconds} s a load, medians of {report['rounds']} round(s), ratio to "
        f"{base_of(bench)}"
    )


def caption(report: dict[str, Any]) -> str:
    """No server at all, why some are not timed, and what else ran."""
    lines = [
        f"no server at all, {name}: "
        + ", ".join(f"{r:,.0f}/s in batches of {size}" for size, r in found.items())
        for name, found in report["no_server"].items()
    ]
    lines += [f"{n}: {r['excluded']}" for n, r in report["servers"].items() if "excluded" in r]
    return "\n".join([*lines, "other work: the most of the CPUs that anything else took"])


def plot(bench: Bench, report: dict[str, Any], path: Path) -> None:
    """Requests a second and p99 against connections."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    shown = [("rate", "texts a second"), ("p99_ms", "p99, ms")]
    for axis, (key, label) in zip(axes, shown, strict=True):
        for name, found in report["servers"].items():
            if "median" in found:
                loads = found["median"]["loads"]
                width = 2.5 if name == "ours" else 1.2
                axis.plot(list(loads), [r[key] for r in loads.values()], "o-", lw=width, label=name)
        axis.set(xscale="log", yscale="log", xlabel="connections", ylabel=label)
        axis.set_xticks(bench.connections, [str(n) for n in bench.connections])
        axis.grid(alpha=0.3, which="both")
    axes[0].legend(fontsize=8)
    figure.suptitle(title(bench, report), fontsize=9)
    figure.savefig(path, dpi=150)


# ---------------------------------------------------------------- the whole


def cpu_name() -> str:
    """The processor's name."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def compare(bench: Bench, names: list[str], rounds: int) -> dict[str, Any]:
    """Every contender in turn, round after round."""
    bench.expected = plain_labels(bench)
    servers: dict[str, Any] = {name: {"rounds": []} for name in names}
    for i in range(rounds):
        for name in (n for n in names if "excluded" not in servers[n]):
            say(f"round {i + 1} of {rounds}: {name}")
            try:
                servers[name]["rounds"].append(measure(bench, name))
            except (Excluded, httpx.HTTPError, psutil.Error) as e:
                servers[name]["excluded"] = str(e) or repr(e)
                say(f"{name}: {e!r}")
    for found in servers.values():
        if "excluded" not in found:
            found["median"] = medians(found["rounds"])
    return {
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "date": date.today().isoformat(),
        "rounds": rounds,
        "model": str(bench.model),
        "seconds": bench.seconds,
        "flags": bench.flags,
        "servers": servers,
        "no_server": engines_alone(bench, names),
    }


def engines_alone(bench: Bench, names: list[str]) -> dict[str, Any]:
    """The rates without a server, of ours and of the reference."""
    found = {}
    for name in (n for n in ("ours", REFERENCE) if n in names and not bench.embed):
        try:
            found[name] = no_server(bench, name)
        except Excluded as e:
            say(f"{name} without a server: {e}")
    return found


def options(args: list[str]) -> argparse.Namespace:
    """The command line, but for what follows `--`."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="a run's or a model's folder")
    parser.add_argument("--texts", type=Path, required=True, help="a csv with a column 'text'")
    parser.add_argument("--embed", action="store_true", help="ask for embeddings")
    parser.add_argument("--contenders", help=f"of {', '.join(CONTENDERS)}; default: all")
    parser.add_argument("--seconds", type=int, default=8, help="of each load")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--connections", default="1,16,64")
    parser.add_argument("--envs", type=Path, default=Path("~/.cache/workloads-bench"))
    parser.add_argument("--plot", type=Path, help="FILE.png")
    parser.add_argument("--json", type=Path, help="where all figures go")
    asked = parser.parse_args(args)
    every = [name for name, one in CONTENDERS.items() if one.embeds == asked.embed]
    asked.contenders = asked.contenders.split(",") if asked.contenders else every
    if unknown := set(asked.contenders) - set(CONTENDERS):
        parser.error(f"no such contender: {', '.join(unknown)}; there are {', '.join(CONTENDERS)}")
    if shutil.which("wrk") is None:
        parser.error("wrk is not installed: apt install wrk, or brew install wrk")
    if (asked.model / "model/config.json").is_file():
        asked.model /= "model"
    if not (asked.model / "config.json").is_file():
        parser.error(f"--model {asked.model}: neither a run's folder nor a model's")
    return asked


def read_texts(path: Path) -> list[str]:
    """The column 'text' of a csv."""
    with path.open(encoding="utf-8", newline="") as file:
        return [row["text"] for row in csv.DictReader(file)]


def main() -> None:
    """Measures, prints the table, and writes what was asked for."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # servers are taken down then too
    end = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    asked, flags = options(sys.argv[1:end]), sys.argv[end + 1 :]
    envs = asked.envs.expanduser()
    envs.mkdir(parents=True, exist_ok=True)
    widths = [int(n) for n in asked.connections.split(",")]
    with tempfile.TemporaryDirectory(prefix="bench-serve-") as scratch:
        texts, model = read_texts(asked.texts), asked.model.resolve()
        bench = Bench(model, texts, envs, Path(scratch), widths, asked.seconds, flags)
        bench.embed = asked.embed
        report = compare(bench, asked.contenders, asked.rounds)
    Console(width=max(140, Console().width)).print(table(bench, report))
    if asked.json:
        asked.json.write_text(json.dumps(report, indent=1))
    if asked.plot:
        plot(bench, report, asked.plot)


if __name__ == "__main__":
    main()

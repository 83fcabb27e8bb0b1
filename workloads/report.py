"""report.html: one page that shows what a run found, from what its stages left in the run folder.

The page needs nothing but itself: no script, no font, no request. Plots are SVG in the page's own
colours, so they follow light and dark. Not covered: serving, and comparing runs.
"""

import io
import math
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from .artifacts import RunFolder

Tree = dict[str, Any]

# What matplotlib writes as these colours becomes the page's own.
_TEXT, _LINE, _ACCENT, _SECOND = "#010101", "#020202", "#030303", "#040404"
_CSS = {
    _TEXT: "var(--muted)",
    _LINE: "var(--line)",
    _ACCENT: "var(--accent)",
    _SECOND: "var(--second)",
}
_STYLE: Any = {
    "svg.fonttype": "none",
    # A label with a dollar sign is no formula.
    "text.parse_math": False,
    "font.size": 9,
    "lines.linewidth": 1.6,
    "legend.frameon": False,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.facecolor": "none",
    **{f"{key}.color": _TEXT for key in ("text", "xtick", "ytick")},
    **{key: _LINE for key in ("grid.color", "axes.edgecolor")},
    "axes.labelcolor": _TEXT,
}
_NAMES = {"eval_accuracy": "accuracy", "eval_f1": "macro F1", "eval_loss": "eval loss"}
# A diverged trial reports this instead of a loss.
_LOST = 1e9
# More classes than this do not fit a readable matrix.
_MATRIX_CLASSES = 20
# PED-ANOVA compares the better half with all; Optuna asks for at least five in the better part.
_MIN_TRIALS, _TOP = 10, 0.5


class Plot(NamedTuple):
    """SVG and what to write over it."""

    title: str
    svg: Any


def write_report(folder: RunFolder) -> str:
    """Writes report.html from what there is of run.json, tune/ and train/; returns its URI."""
    import jinja2

    run = folder.read("run.json")
    sweep, training = folder.read("tune/result.json"), folder.read("train/metrics.json")
    plan = run.get("task", {}).get("tune", {})
    pages = jinja2.Environment(autoescape=True, undefined=jinja2.ChainableUndefined)
    pages.filters |= {
        "num": _num,
        "value": _value,
        "time": _time,
        "percent": _percent,
        "yaml": _yaml,
    }
    page = pages.from_string(Path(__file__).with_name("report.html.j2").read_text("utf-8")).render(
        run=run,
        name=folder.name,
        names=_NAMES,
        sweep=sweep,
        sweep_plots=_sweep_plots(folder, sweep, plan.get("space", {})) if sweep else [],
        importances=_importances(sweep, plan.get("space", {})) if sweep else {},
        training=training,
        training_plots=_training_plots(training),
        **_errors(training.get("labels", []), training.get("confusion", [])),
    )
    folder.write_text("report.html", page)
    return f"{folder.uri}/report.html"


# ---------------------------------------------------------------- numbers as text


def _real(value: Any) -> float:
    """NaN for what is missing, not finite or stands for a diverged trial."""
    ok = isinstance(value, int | float) and math.isfinite(value) and abs(value) < _LOST
    return float(value) if ok else math.nan


def _num(value: Any, digits: int = 4) -> str:
    return "–" if math.isnan(_real(value)) else f"{_real(value):,.{digits}f}"


def _value(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _time(seconds: Any) -> str:
    s = _real(seconds)
    if math.isnan(s) or s < 120:
        return f"{_num(s, 1)} s"
    return f"{s / 60:.1f} min" if s < 7200 else f"{s / 3600:.1f} h"


def _yaml(tree: Any) -> str:
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=100)


def _percent(part: Any, whole: Any) -> str:
    return f"{_num(100 * _real(part) / (_real(whole) or math.nan), 0)}%"


# ---------------------------------------------------------------- plots


def _plot(draw: Callable[[Any], None], alt: str) -> Any:
    """What `draw` puts on a pair of axes, as SVG for the inside of a page."""
    import matplotlib
    from markupsafe import Markup
    from matplotlib.figure import Figure

    out = io.StringIO()
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(4.5, 2.8), layout="constrained")
        draw(figure.subplots())
        empty = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(out, format="svg", transparent=True, metadata=empty)
    svg = out.getvalue()
    # Names such as axes_1 are in every figure; on one page an id is there once.
    svg = re.sub(r' id="\w+_\d+"', "", svg[svg.index("<svg") + 4 :])
    for colour, ours in _CSS.items():
        svg = svg.replace(colour, ours)
    return Markup('<svg role="img" aria-label="{}"').format(alt) + Markup(svg)


def _sweep_plots(folder: RunFolder, sweep: Tree, space: Tree) -> list[Plot]:
    name = _NAMES[sweep["metric"]]
    plots = [
        Plot(path, _plot(partial(_scatter, sweep, path, draw), f"{name} over {path}"))
        for path, draw in space.items()
    ]
    if folder.has("tune/curves.csv") and (text := folder.read_text("tune/curves.csv").strip()):
        curves = _plot(partial(_curves, sweep, text), f"{name} of every trial over its epochs")
        plots.insert(0, Plot("Learning curves", curves))
    return plots


def _curves(sweep: Tree, text: str, axes: Any) -> None:
    import pandas as pd

    metric = sweep["metric"]
    # A trial's name may look like a number, 12e45678 even.
    frame = pd.read_csv(io.StringIO(text), dtype={"trial": str}).dropna(subset=["epoch"])
    for trial, points in frame[frame[metric].abs() < _LOST].groupby("trial"):
        best = trial == sweep.get("best_trial")
        look = {"color": _ACCENT, "zorder": 3} if best else {"color": _TEXT, "alpha": 0.45}
        axes.plot(points["epoch"], points[metric], ".-", **look)
    axes.set(xlabel="epoch", ylabel=_NAMES[metric])


def _scatter(sweep: Tree, path: str, draw: Tree, axes: Any) -> None:
    metric = sweep["metric"]
    trials = [t for t in sweep["leaderboard"] if path in t["params"]]
    xs = _x_axis(axes, draw, [t["params"][path] for t in trials])
    for x, t in zip(xs, trials, strict=True):
        score, best = _real(t.get(metric)), t["trial"] == sweep.get("best_trial")
        if math.isnan(score) or (t["state"] == "diverged" and not best):
            # It has no score to be drawn at: on the edge of the worst.
            edge = {"transform": axes.get_xaxis_transform(), "clip_on": False, "zorder": 3}
            axes.plot(x, float(metric == "eval_loss"), "x", color=_SECOND, **edge)
            continue
        colour, fill = _ACCENT if best else _TEXT, best or t["state"] == "finished"
        look = {"markersize": 9 if best else 5.5, "zorder": 3 if best else 2}
        axes.plot(x, score, "o", color=colour, markerfacecolor=colour if fill else "none", **look)
    axes.set(xlabel=path, ylabel=_NAMES[metric])


def _x_axis(axes: Any, draw: Tree, values: list[Any]) -> list[float]:
    """Sets the axis up for what was drawn and returns where on it the values lie."""
    from matplotlib.ticker import FuncFormatter, LogLocator

    if draw["draw"] == "choice":
        names = _categories(values)
        short = [n if len(n) <= 14 else n[:13] + "…" for n in names]
        axes.set_xticks(range(len(names)), short, rotation=30 if sum(map(len, short)) > 36 else 0)
        axes.set_xlim(-0.5, max(len(names), 1) - 0.5)
        return [names.index(str(v)) for v in values]
    if draw["draw"] == "loguniform":
        axes.set_xscale("log")
        wide = draw["high"] / draw["low"] > 1000
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    return [_real(v) for v in values]


def _categories(values: list[Any]) -> list[str]:
    order = {str(v): (0, v, "") if isinstance(v, int | float) else (1, 0, str(v)) for v in values}
    return sorted(order, key=order.__getitem__)


def _training_plots(training: Tree) -> list[Plot]:
    if not training.get("history"):
        return []
    lines = {
        "Loss": {"train": "loss", "eval": "eval_loss"},
        "Accuracy and macro F1": {"accuracy": "eval_accuracy", "macro F1": "eval_f1"},
        "Throughput": {"samples/s": "samples_per_s"},
    }
    return [
        Plot(title, _plot(partial(_history, training, keys), f"{title} over epochs"))
        for title, keys in lines.items()
    ]


def _history(training: Tree, keys: dict[str, str], axes: Any) -> None:
    epochs = [_real(m.get("epoch")) for m in training["history"]]
    for (name, key), colour in zip(keys.items(), (_ACCENT, _SECOND), strict=False):
        points = [_real(m.get(key)) for m in training["history"]]
        axes.plot(epochs, points, ".-", color=colour, label=name)
    axes.axvline(_real(training.get("epoch")), color=_TEXT, linestyle=":", linewidth=1)
    axes.set(xlabel="epoch")
    if len(keys) > 1:
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2, borderaxespad=0)


# ---------------------------------------------------------------- what mattered, what went wrong


def _importances(sweep: Tree, space: Tree) -> Tree:
    """`shares` by parameter (they sum to 1), or the `reason` why there are none.

    PED-ANOVA: Watanabe et al., https://arxiv.org/abs/2304.10255
    """
    metric = sweep["metric"]
    trials = [t for t in sweep["leaderboard"] if not math.isnan(_real(t.get(metric)))]
    if len(space) < 2:
        return {"reason": f"{len(space)} parameter(s) were drawn; it takes two to compare them"}
    if len(trials) < _MIN_TRIALS:
        return {"reason": f"it takes {_MIN_TRIALS} trials with a score; there are {len(trials)}"}
    if len({t[metric] for t in trials}) == 1:
        return {"reason": "every trial has the same score"}
    return {"shares": _ped_anova(trials, metric, space), "trials": len(trials)}


def _ped_anova(trials: list[Tree], metric: str, space: Tree) -> dict[str, float]:
    import optuna
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    drawn = {path: [t["params"][path] for t in trials] for path in space}
    kinds = {path: _distribution(draw, drawn[path]) for path, draw in space.items()}
    study = optuna.create_study(direction="minimize" if metric == "eval_loss" else "maximize")
    for t in trials:
        params = {
            path: str(t["params"][path])
            if draw["draw"] == "choice"
            # A draw on a bound may lie a rounding error beyond it.
            else min(max(t["params"][path], draw["low"]), draw["high"])
            for path, draw in space.items()
        }
        trial = optuna.create_trial(params=params, distributions=kinds, value=t[metric])
        study.add_trial(trial)
    return get_param_importances(study, evaluator=PedAnovaImportanceEvaluator(target_quantile=_TOP))


def _distribution(draw: Tree, values: list[Any]) -> Any:
    from optuna import distributions as d

    if draw["draw"] == "choice":
        return d.CategoricalDistribution(_categories(values))
    if draw["draw"] == "int":
        return d.IntDistribution(draw["low"], draw["high"])
    return d.FloatDistribution(draw["low"], draw["high"], log=draw["draw"] == "loguniform")


def _errors(labels: list[str], confusion: list[list[int]]) -> Tree:
    """Scores per class; the confusion matrix where it fits, else the pairs confused most."""
    predicted = [sum(column) for column in zip(*confusion, strict=True)]
    supports = [sum(row) for row in confusion]
    classes = [
        {
            "label": label,
            "precision": confusion[i][i] / predicted[i] if predicted[i] else None,
            "recall": confusion[i][i] / supports[i] if supports[i] else None,
            "f1": 2 * confusion[i][i] / (predicted[i] + supports[i] or math.nan),
            "support": supports[i],
        }
        for i, label in enumerate(labels)
    ]
    if len(labels) <= _MATRIX_CLASSES:
        return {"classes": classes, "matrix": confusion}
    wrong = [
        (n, i, j) for i, row in enumerate(confusion) for j, n in enumerate(row) if n and i != j
    ]
    pairs = [(labels[i], labels[j], n, n / supports[i]) for n, i, j in sorted(wrong, reverse=True)]
    by_f1 = sorted(classes, key=lambda c: (math.isnan(c["f1"]), c["f1"]))
    return {"classes": by_f1, "pairs": pairs[:15], "confused": len(pairs)}

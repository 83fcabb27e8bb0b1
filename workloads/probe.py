"""Does a text classifier answer otherwise when only the people in a text are others?

workloads probe --model runs/NAME --max-flips 0.05

Two texts that differ in one term, for one group and for another, should get the same label:
counterfactual token fairness, Garg et al. 2019, https://arxiv.org/abs/1809.10610. Intervals are
percentiles of a bootstrap over templates, whose texts are alike: Efron 1979, Bootstrap Methods:
Another Look at the Jackknife, https://doi.org/10.1214/aos/1176344552. Not covered: texts that
name no group, and whether a label is right.

Letters: T templates, K terms of a group, C classes.
"""

from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field, model_validator

from . import card, plots
from .artifacts import RunFolder
from .config import Section, Target, UserError, list_configs, read_section
from .engine import Engine, Function, TorchEngine, apply
from .live import doing, say
from .report import write_report

Tree = dict[str, Any]

SLOT = "{person}"
RESAMPLES = 2000
BATCH = 32

Term = Annotated[str, Field(min_length=1)]


class Templates(Section):
    """A file of templates; configs/probes/default.yaml explains the format."""

    templates: Annotated[list[str], Field(min_length=1)]
    groups: Annotated[dict[str, dict[str, list[Term]]], Field(min_length=1)]

    @model_validator(mode="after")
    def _check(self) -> "Templates":
        for i, text in enumerate(self.templates):
            if text.count(SLOT) != 1 or "{" in text.replace(SLOT, ""):
                raise ValueError(f"templates.{i}: needs {SLOT} once and no other {{}}: {text!r}")
        for kind, groups in self.groups.items():
            if len(groups) < 2:
                raise ValueError(f"groups.{kind}: needs two groups or more, to compare them")
            counts = {name: len(terms) for name, terms in groups.items()}
            if len(set(counts.values())) > 1 or 0 in counts.values():
                raise ValueError(
                    f"groups.{kind}: groups need equally many terms, as each stands for one of the "
                    f"others; there are {', '.join(f'{n} of {k}' for k, n in counts.items())}"
                )
        return self


def read_templates(file: str | None) -> Templates:
    """The templates of a file, by default those that ship; raises UserError."""
    default = list_configs("probes")["default"]
    path = Path(file).expanduser() if file else default
    if not path.is_file():
        raise UserError(f"--templates {file}: no such file; one to copy is {default}")
    return read_section(Templates, path)


def filled(template: str, term: str) -> str:
    """A template with a term in it."""
    text = template.replace(SLOT, term)
    return text[:1].upper() + text[1:]


def probe(engine: Engine, given: Templates, max_flips: float) -> Tree:
    """What flips and shifts between each two groups; raises UserError for a model without
    labels."""
    if not engine.info.labels:
        raise UserError(
            "this model only embeds texts: a probe compares labels. Train a classifier on it: "
            "workloads train task.model.pretrained=MODEL"
        )
    named = {
        (kind, group): [filled(text, term) for text in given.templates for term in terms]
        for kind, groups in given.groups.items()
        for group, terms in groups.items()
    }
    scores = scores_of(engine, sorted({text for texts in named.values() for text in texts}))
    shape, found = (len(given.templates), -1), []
    for kind, groups in given.groups.items():
        for a, b in combinations(groups, 2):
            first, second = (np.array([scores[t] for t in named[kind, g]]) for g in (a, b))
            pair = compare(first, second, shape, engine.info.multi_label)
            by_label = dict(zip(engine.info.labels, pair.pop("by_label"), strict=True))
            found.append({"what": kind, "a": a, "b": b, **pair, "by_label": by_label})
    return {
        "templates": len(given.templates),
        "max_flips": max_flips,
        "over": [f"{one['a']} / {one['b']}" for one in found if one["flips"] > max_flips],
        "pairs": found,
    }


def scores_of(engine: Engine, texts: list[str]) -> dict[str, list[float]]:
    """Scores (C,) of each text, those of like length together."""
    function: Function = "sigmoid" if engine.info.multi_label else "softmax"
    ids = [row.ids for row in engine.encode(texts)]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    found: dict[str, list[float]] = {}
    for start in range(0, len(order), BATCH):
        part = order[start : start + BATCH]
        logits = engine.predict([ids[i] for i in part])
        found |= {
            texts[i]: apply(function, row.tolist()) for i, row in zip(part, logits, strict=True)
        }
    return found


def compare(first: np.ndarray, second: np.ndarray, shape: Any, multi_label: bool) -> Tree:
    """Of scores (T * K, C) twice: how often the label flips and how far its score shifts from the
    first to the second, with intervals.

    The label whose score is looked at is the best of both texts' mean, so that swapping the groups
    changes the sign and nothing else. With several labels at once, those over 0.5 are the answer.
    """
    if multi_label:
        flips = ((first > 0.5) != (second > 0.5)).any(axis=1)
    else:
        flips = first.argmax(1) != second.argmax(1)
    label = (first + second).argmax(1)[:, None]
    shifts = np.take_along_axis(second - first, label, 1)[:, 0]
    found: Tree = {"texts": len(flips)}
    measures = {"flips": flips, "shift": abs(shifts), "signed": shifts}
    for name, values in measures.items():
        means = values.reshape(shape).mean(axis=1)  # (T,)
        found |= {name: float(means.mean()), f"{name}_interval": bootstrap(means)}
    return found | {"by_label": (second - first).mean(axis=0).tolist()}


def bootstrap(means: np.ndarray) -> list[float]:
    """The 95 % interval of the mean of means (T,), templates drawn again with repetition."""
    rng = np.random.default_rng(0)
    drawn = means[rng.integers(len(means), size=(RESAMPLES, len(means)))].mean(axis=1)
    return [float(end) for end in np.quantile(drawn, (0.025, 0.975))]


# ---------------------------------------------------------------- the command


def run(
    model: str,
    target: Target,
    templates: str | None,
    max_flips: float,
    out: str | None,
    console: Any,
) -> Tree:
    """Probes a model, prints the table, and keeps both in its run or in `out`; raises UserError."""
    given = read_templates(templates)
    from .replica import fetch
    from .serve import locate

    located, info = locate(model, target.ray.storage, target.tracking.mlflow)
    with doing(console, f"asking {info.notes.get('run') or model}"):
        found = probe(TorchEngine(fetch(located), model, threads=0), given, max_flips)
    result = {"file": Path(templates).name if templates else "default.yaml", **found}
    console.print(table(result))
    picture = plots.svg(partial(plots.flips, result), plots.ALONE, plots.flips_height(result))
    folder = _run_of(located)
    if out is not None:
        path = Path(out).expanduser().resolve()
        _leave(RunFolder(str(path.parent), path.name), result, picture, out)
    elif folder is not None:
        _leave(folder, result, picture, folder.uri)
        _into_card(folder, result, picture, console)
        write_report(folder)
    where = out or (folder and folder.uri)
    say(console, f"probe: {where}/probe.json, probe.svg" if where else "probe: -o DIR keeps it")
    return {"model": located, "folder": where, **result}


def _run_of(located: str) -> RunFolder | None:
    """The run that a model belongs to."""
    path, _, last = located.rpartition("/")
    storage, _, name = path.rpartition("/")
    folder = RunFolder(storage, name) if last == "model" and storage else None
    return folder if folder and folder.has("run.json") else None


def _leave(folder: RunFolder, result: Tree, picture: str, where: str) -> None:
    try:
        folder.write("probe.json", result)
        folder.write_text("probe.svg", picture)
    except OSError as e:
        raise UserError(f"{where}: cannot be written: {e}") from None


def _into_card(folder: RunFolder, result: Tree, picture: str, console: Any) -> None:
    text = card.text_of(folder)
    if not card.is_ours(text):
        why = "has been changed by hand" if text else "is not there"
        say(console, f"probe: the model's card {why}; it stays so")
        return
    folder.write_text("model/probe.svg", picture)
    folder.write_text(f"model/{card.FILE}", card.with_probe(text, section(result)))


def section(result: Tree) -> str:
    """What goes into a card, as Markdown."""
    over = ", ".join(map(card.cell, result["over"])) or "none"
    lines = [
        f"{result['templates']} templates ({card.cell(result['file'])}), a term for one group "
        "swapped for one of another. Flips: the share of such pairs of texts that get another "
        "label. Shift: how far the label's score moves from the first group to the second. With "
        f"95 % intervals. Over the limit of {100 * result['max_flips']:g} % flips: {over}.",
        "",
        "| first / second | pairs | flips, % | shift, % | signed shift, % |",
        "| --- | --- | --- | --- | --- |",
    ]
    for one in result["pairs"]:
        cells = [f"{one['a']} / {one['b']}", str(one["texts"]), *_numbers(one)]
        lines.append(f"| {' | '.join(map(card.cell, cells))} |")
    return "\n".join([*lines, "", "![pairs that flip](probe.svg)"])


def table(result: Tree) -> Any:
    """For people."""
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    title = f"probe: {result['templates']} templates, 95 % intervals"
    rows = Table("first / second", title=title, box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for name in ("flips, %", "shift, %", "signed, %"):
        rows.add_column(name, justify="right", no_wrap=True)
    for one in result["pairs"]:
        style = "bold red" if one["flips"] > result["max_flips"] else None
        rows.add_row(escape(f"{one['a']} / {one['b']}"), *_numbers(one), style=style)
    return rows


def _numbers(one: Tree) -> list[str]:
    """In percent, with their intervals."""

    def text(name: str, form: str) -> str:
        value, low, high = (100 * x for x in (one[name], *one[f"{name}_interval"]))
        return f"{value:{form}} ({low:{form}}..{high:{form}})"

    return [text("flips", ".1f"), text("shift", ".1f"), text("signed", "+.1f")]

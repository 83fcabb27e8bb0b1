"""The report: whole, self-contained and escaped, whatever the stages left behind."""

import math
import re
import shutil
import subprocess
import sys
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import script

from workloads import costs, evaluation, openapi, report
from workloads.artifacts import RunFolder
from workloads.config import Target

SPACE = {
    "train.lr": {"draw": "loguniform", "low": 1e-4, "high": 1e-2},
    "model.layers": {"draw": "choice", "values": [1, 2]},
}
CURVES = "trial,evals,epoch,loss,seconds,eval_loss,eval_accuracy,eval_f1\n"


def trial(name: str, score: float | None, lr: float = 1e-3, **more: Any) -> dict[str, Any]:
    row = {"trial": name, "evals": 2, "seconds": 3.0, "state": "finished"}
    params = {"train.lr": lr, "model.layers": 1 + len(name) % 2}
    scores = {"eval_accuracy": score, "eval_f1": score, "eval_loss": 1.0}
    return {"params": params, **row, **scores, **more}


def sweep(board: list[dict[str, Any]], metric: str = "eval_accuracy") -> dict[str, Any]:
    best = {k: board[0][k] for k in ("eval_accuracy", "eval_f1", "eval_loss")}
    found = {"best_trial": board[0]["trial"], "best_params": board[0]["params"], **best}
    counts = {"trials": len(board), "stopped_early": 0, "failed": 0, "concurrent_trials": 2}
    times = {"wall_s": 30.0, "trial_seconds": 40.0, "saved_trial_seconds": 10.0, "ideal_s": 20.0}
    cost = {**times, "overhead_s_per_trial": 0.5}
    return {"metric": metric, "leaderboard": board, **found, **counts, **cost}


def training(labels: list[str], confusion: list[list[int]], **more: Any) -> dict[str, Any]:
    scores = {"eval_accuracy": 0.75, "eval_f1": 0.7, "eval_loss": 0.6}
    point = {"epoch": 1.0, "step": 9, "loss": 0.5, "samples_per_s": 800.0, **scores}
    pace = {"epoch": 1.0, "steps": 9, "samples_per_s": 800.0, "workers": 2, "wall_s": 12.5}
    errors = {"labels": labels, "confusion": confusion}
    return {"params": {}, "history": [point], **scores, **pace, **errors, **more}


def evaluated(labels: list[str]) -> dict[str, Any]:
    true = np.arange(80) % len(labels)
    answers = np.array([true, np.full(80, 0.6)]).T
    return evaluation.evaluate(true, np.arange(80), answers, labels)


def probed(*names: str, flips: float = 0.125) -> dict[str, Any]:
    ends = {f"{key}_interval": [0.0625, 0.25] for key in ("flips", "shift", "signed")}
    scores = {"texts": 48, "flips": flips, "shift": 0.031, "signed": -0.017, **ends}
    pairs = [{"what": "kind", "a": a, "b": b, **scores} for a, b in combinations(names, 2)]
    over = [f"{p['a']} / {p['b']}" for p in pairs if flips > 0.05]
    return {"file": "mine.yaml", "templates": 12, "max_flips": 0.05, "over": over, "pairs": pairs}


def why(text: str, label: str, truth: str, *added: float) -> dict[str, Any]:
    """An explained row: what each of its words, by spaces, adds."""
    spans = [match.span() for match in re.finditer(r"\S+", text)]
    tokens = [
        {"token": "t", "word": i, "start": start, "end": end, "score": score}
        for i, ((start, end), score) in enumerate(zip(spans, added, strict=True))
    ]
    told = {"label": label, "score": 0.875, "tokens": tokens, "truncated": len(added) > 3}
    return {"text": text, "truth": truth, **openapi.EXPLAINED, **told}


def page(tmp_path: Path, space: dict[str, Any] | None = None, **files: Any) -> str:
    folder = RunFolder(str(tmp_path), "run-1")
    task = {"data": {"source": "files"}, "tune": {"space": SPACE if space is None else space}}
    run = {"task_name": "mine", "target_name": "laptop", "task": task, "target": {"device": "cpu"}}
    folder.write("run.json", {**run, "versions": {"ray": "2.60.0"}, **files.pop("run", {})})
    paths = {"sweep": "tune/result.json", "training": "train/metrics.json"}
    paths |= {"evaluation": "train/evaluation.json", "probe": "probe.json"}
    paths |= {"explanations": "train/explanations.json"}
    for name, tree in files.items():
        folder.write(paths[name], tree)
    assert report.write_report(folder) == f"{folder.uri}/report.html"
    return folder.read_text("report.html")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A page with all there can be, and hostile names wherever names are the user's."""
    evil = "<script>alert('$x^$')</script>"
    space = {**SPACE, "train.metric": {"draw": "choice", "values": [evil, None]}}
    board = [trial(f"t{i:02}", 0.9 - i / 100, lr=10 ** (-2 - i / 6)) for i in range(12)]
    for i, t in enumerate(board):
        t["params"]["train.metric"] = evil if i % 2 else None
    data = {"train_rows": 1234, "labels": [evil, "b"], "fingerprint": "f00d"}
    priced = Target.model_validate({"cost": {"cpu_hour": 0.5, "currency": "EUR"}})
    held = {"used": costs.Used(cpu_s=1800), "nodes": []}
    stages = {"tune": {"started": "2026-11-20T01:02:03+00:00"}, "train": {"digest": "sha256:f00"}}
    for i, stage in enumerate(stages):
        stages[stage]["cost"] = costs.spent(priced, stage, 3600, 2 + i, **held)
    stages["serve"] = {"cost": costs.serving(priced.cost, priced.serve, 2, 100), "engine": "torch"}
    lineage = {"parents": {"rerun_of": evil}, "stages": stages, "argv": ["workloads", evil]}
    estimate = {"train": costs.spent(priced, "train", 1800, 2, None, [])}
    return page(
        tmp_path_factory.mktemp("whole"),
        space,
        run={
            "data": data,
            "task_name": evil,
            "git": "f" * 40 + evil,
            "estimate": estimate,
            **lineage,
        },
        sweep=sweep(board),
        training=training([evil, "b"], [[31, 7], [11, 53]], params={"train.metric": evil}),
        evaluation=evaluated([evil, "b"]),
        probe=probed(evil, "men"),
        explanations={"rows": [why(f"🎬 {evil} x y", evil, "b", 0.1, 2.0, -1.0, 0.001)]},
    )


def test_importing_the_module_loads_nothing_heavy() -> None:
    code = "import sys, workloads.report; print([m for m in sys.argv[1:] if m in sys.modules])"
    heavy = ["matplotlib", "jinja2", "optuna", "pandas", "torch", "ray", "pyarrow"]
    done = subprocess.run(
        [sys.executable, "-c", code, *heavy], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_the_page_asks_nobody_for_anything(whole: str) -> None:
    links = re.findall(r"""(?:src|href)\s*=\s*["']?([^"'\s>]*)""", whole)
    assert links  # the plots' own markers
    assert all(link.startswith("#") for link in links)
    assert not re.search(r"<(script|link|iframe|object|img)\b|@import|url\((?!#)", whole)


def test_what_users_named_is_escaped(whole: str) -> None:
    assert "<script" not in whole
    assert whole.count("&lt;script&gt;alert") > 10


def test_an_id_is_on_the_page_once(whole: str) -> None:
    assert not [i for i, n in Counter(re.findall(r'\bid="([^"]+)"', whole)).items() if n > 1]


def test_plots_are_in_the_colours_of_the_page(whole: str) -> None:
    plots = re.findall(r"<svg.*?</svg>", whole, re.DOTALL)
    # A parameter each; loss, accuracy and throughput; calibration and flips.
    assert len(plots) == 3 + 3 + 2
    assert all("var(--" in plot for plot in plots)
    assert not any(f"#0{i}0{i}0{i}" in whole for i in range(1, 5))


def test_confusion_and_its_scores_appear(whole: str) -> None:
    for number in ("31", "7", "11", "53"):
        assert re.search(rf"<td style=[^>]*>{number}</td>", whole)
    # Class b: 53 of 60 predicted, 53 of 64 true.
    for score in (53 / 60, 53 / 64, 2 * 53 / (60 + 64)):
        assert f"{score:.3f}" in whole


def test_the_summary_says_what_the_sweep_saved_and_cost(whole: str) -> None:
    assert "20% of 50.0 s of trials" in whole
    assert "+50%" in whole
    assert "0.7500" in whole
    assert "f00d" in whole


def test_the_evaluation_appears(whole: str) -> None:
    assert "On 80 validation rows" in whole
    assert "expected calibration error 0.4000" in whole  # always right, and 60 % sure of it
    assert re.search(r"0 to 19 tokens</td><td>20</td><td[^>]*>1.000</td><td>0.839 to 1.000", whole)


def test_a_probe_appears_with_what_is_over_its_limit(whole: str) -> None:
    assert "Over the limit of 5%: &lt;script&gt;" in whole
    row = r"/ men</td><td>48</td><td[^>]*>12.5</td><td>6.2 to 25.0</td><td>3.1</td><td>-1.7</td>"
    assert re.search(row, whole)


def test_explained_rows_are_marked_and_said_to_be_validation_rows(tmp_path: Path) -> None:
    rows = [why("so 🎬 bad", "good", "bad", -0.5, 0, 0.25), why("fine", "good", "good", 1)]
    text = page(tmp_path, explanations={"rows": rows})
    assert "<h2>Why these answers" in text
    assert "Validation rows" in text
    marks = re.findall(r'<mark class="(\w+)" style="--share:([\d.]+)">([^<]*)</mark>', text)
    assert marks == [("against", "1.0", "so"), ("for", "0.5", "bad"), ("for", "1.0", "fine")]
    assert "</mark> 🎬 <mark" in text
    assert 'good, 88% – <span class="failed">but it is bad' in text
    assert "<bdi>“so”</bdi> -0.50, <bdi>“bad”</bdi> +0.25" in text
    assert "Completeness gap 2e-05 (0.00%)" in text
    assert "50 steps" in text


def test_a_run_without_explanations_has_a_page(tmp_path: Path) -> None:
    trained = training(["a", "b"], [[3, 1], [0, 4]])
    for explanations in ({}, {"rows": []}):
        text = page(tmp_path, training=trained, explanations=explanations)
        assert "<h2>Training" in text
        assert "Why these answers" not in text


def test_a_probe_below_its_limit_says_so(tmp_path: Path) -> None:
    text = page(tmp_path, probe=probed("women", "men", flips=0.01))
    assert "None is over the limit of 5%" in text
    assert "<h2>Evaluation" not in text


def test_importances_name_the_parameter_that_decides(whole: str) -> None:
    shares = re.findall(r"<span>([^<]*)</span><i style", whole)
    assert shares[0] == "train.lr"
    assert sorted(shares) == ["model.layers", "train.lr", "train.metric"]


@pytest.mark.parametrize(
    ("board", "reason"),
    [
        ([trial(f"t{i}", 0.5) for i in range(12)], "too many trials have the same score"),
        ([trial("best", 0.9)] + [trial(f"t{i}", 0.5) for i in range(12)], "too many trials have"),
        ([trial(f"t{i}", i / 10) for i in range(4)], "it takes 10 scored trials; the sweep has 4"),
    ],
)
def test_without_importances_there_is_a_reason(board: list[dict[str, Any]], reason: str) -> None:
    assert reason in report._importances(sweep(board), SPACE)["reason"]


def test_one_drawn_parameter_has_no_importance() -> None:
    space = {"train.lr": SPACE["train.lr"]}
    assert "two drawn parameters" in report._importances(sweep([trial("a", 0.5)]), space)["reason"]


def test_a_smaller_loss_is_better() -> None:
    losses = [trial(f"t{i}", 0.5, lr=10 ** (-4 + i / 6), eval_loss=0.1 + i) for i in range(12)]
    kept = report._importances(sweep(losses, "eval_loss"), SPACE)
    flipped = [{**t, "eval_accuracy": -t["eval_loss"]} for t in losses]
    assert kept == report._importances(sweep(flipped), SPACE)


def test_a_run_without_a_sweep_has_a_page(tmp_path: Path) -> None:
    text = page(tmp_path, training=training(["a", "b"], [[3, 1], [0, 4]]))
    assert "<h2>Training" in text
    assert "<h2>Sweep" not in text
    assert "No summary of the data" in text


def test_a_run_without_a_training_has_a_page(tmp_path: Path) -> None:
    text = page(tmp_path, sweep=sweep([trial("only", 0.5)]))
    assert "best trial of the sweep" in text
    assert "1 trial on" in text
    assert "<h2>Training" not in text


def test_a_run_that_has_only_begun_has_a_page(tmp_path: Path) -> None:
    assert "no finished sweep and no finished training" in page(tmp_path)


def test_many_classes_are_listed_by_their_confusions(tmp_path: Path) -> None:
    n = 150
    confusion = [[10 * (i == j) for j in range(n)] for i in range(n)]
    confusion[7][9], confusion[8] = 99, [0] * n
    text = page(tmp_path, training=training([f"class-{i}" for i in range(n)], confusion))
    assert re.search(r">class-7</td><td[^>]*>class-9</td><td>99</td>", text)
    assert 'class="matrix"' not in text
    assert text.count('<td class="text" title="class-') == n + 2


def test_what_diverged_failed_or_is_missing_does_not_break_the_page(tmp_path: Path) -> None:
    board = [
        trial("good", 0.9, state="stopped early"),
        trial("none", None, state="failed"),
        trial("nan", math.nan),
        trial("bad", 0.0, eval_loss=1e9, state="diverged"),
    ]
    history = [{"epoch": 1.0, "loss": math.nan, "eval_loss": None}]
    trained = training(["a", "b"], [[0, 0], [0, 0]], history=history, samples_per_s=None)
    text = page(tmp_path, sweep={**sweep(board), "trials": 6, "failed": 2}, training=trained)
    assert "2 more have no score; 2 failed" in text
    assert "1,000,000,000" not in text
    assert "<td>–</td>" in text


def test_a_trial_called_like_a_number_is_still_the_best_one(tmp_path: Path) -> None:
    folder = RunFolder(str(tmp_path), "run-1")
    folder.write_text(
        "tune/curves.csv", CURVES + "12e45678,1,1.0,1,1,1,0.5,0.5\nbad,2,,,,1e9,0,0\n"
    )
    plots = report._sweep_plots(folder, sweep([trial("12e45678", 0.5)]), {})
    assert "var(--accent)" in plots["Learning curves"]


def test_means_and_spreads_of_the_confirmed_appear(tmp_path: Path) -> None:
    scores = {"eval_accuracy": 0.8125, "eval_f1": 0.8, "eval_loss": 0.5}
    confirmed = [{"trial": "a", **scores, "spread": dict.fromkeys(scores, 0.0375)}]
    found = {**sweep([trial("a", 0.875)]), "seeds": 3, "confirmed": confirmed}
    text = page(tmp_path, sweep=found, space={})
    assert "0.8125 ± 0.0375" in text
    assert "on average over 3 seeds" in text


def test_costs_are_beside_what_was_estimated(whole: str) -> None:
    assert "<td>1.5 EUR</td>" in whole  # three cores for an hour at half a unit
    assert "30.0 min, 0.5 EUR" in whole
    assert "per million predictions" in whole


def test_where_it_comes_from_and_how_to_serve_it(whole: str) -> None:
    assert "workloads serve --run run-1" in whole
    assert "workloads runs rerun run-1" in whole
    assert "repeats</dt>" in whole
    assert "sha256:f00" in whole


@pytest.mark.browser
@pytest.mark.skipif(not shutil.which("chromium"), reason="there is no Chromium here")
@pytest.mark.parametrize(("width", "scheme"), [(1200, "light"), (1200, "dark"), (320, "light")])
def test_a_browser_shows_it_within_the_window(
    whole: str, tmp_path: Path, width: int, scheme: Any
) -> None:
    assert len(whole.encode()) < 3_000_000
    (tmp_path / "report.html").write_text(whole)
    said: list[str] = []
    with script("screenshots").chromium() as browser:
        opened = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        opened.on("console", lambda message: said.append(message.text))
        opened.on("dialog", lambda dialog: said.append(dialog.message))
        opened.goto((tmp_path / "report.html").as_uri())
        assert opened.evaluate("document.documentElement.scrollWidth") <= width
        heads = opened.locator("h2").all_inner_texts()
        back = opened.evaluate("getComputedStyle(document.body).backgroundColor")
    assert {"Sweep", "Training", "Evaluation", "Probe", "Cost", "Lineage"} <= set(heads)
    assert "How to serve it" in heads
    assert back == ("rgb(15, 18, 23)" if scheme == "dark" else "rgb(245, 246, 248)")
    assert said == []

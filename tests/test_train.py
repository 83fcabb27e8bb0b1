"""Stage 2 on a real Ray: width does not change what is learned, and what is exported is what was
measured. What is lost when something dies: test_lost."""

import json
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import changed, wait_for
from rich.console import Console

from workloads import artifacts
from workloads.config import Run, Target, Task, UserError

pytestmark = pytest.mark.ray


def fit(
    task: Task,
    target: Target,
    prepared: Any,
    name: str,
    params: dict[str, Any] | None = None,
    shown: bool = False,
) -> dict[str, Any]:
    from workloads import train

    run = Run("tiny", task, "laptop", target)
    folder = artifacts.open_existing(target.ray.storage, run, name)
    folder = folder or artifacts.create(target.ray.storage, run, name)
    return train.fit(run, folder, prepared, params or {}, Console(quiet=not shown))


def losses(result: dict[str, Any]) -> list[float]:
    return [m[key] for m in result["history"] for key in ("loss", "eval_loss")]


@pytest.fixture(scope="module")
def exact(tiny: Task) -> Task:
    """Without dropout, and batches of 7, which neither 2 nor 3 workers divide."""
    return changed(tiny, **{"model.dropout": 0.0, "train.global_batch": 7})


DRAWN = {"model.layers": 2, "train.lr": 2e-3}


@pytest.fixture(scope="module")
def alone(exact: Task, laptop: Target, prepared: Any) -> dict[str, Any]:
    """With what a sweep found."""
    return fit(exact, changed(laptop, **{"train.workers": 1}), prepared, "alone", DRAWN)


def test_three_workers_give_the_losses_of_one(
    exact: Task, laptop: Target, prepared: Any, alone: dict[str, Any]
) -> None:
    workers = 3  # two are tried in test_loop, on the same loop, and below
    wide = changed(laptop, **{"train.workers": workers, "train.max_batch_per_worker": 2})
    result = fit(exact, wide, prepared, f"wide-{workers}", DRAWN)
    assert result["workers"] == workers
    assert losses(result) == pytest.approx(losses(alone), rel=1e-4)
    one, other = (
        artifacts.RunFolder(laptop.ray.storage, name).read("train/evaluation.json")
        for name in ("alone", f"wide-{workers}")
    )
    assert one["lengths"] == other["lengths"]
    assert one["calibration"]["ece"] == pytest.approx(other["calibration"]["ece"], abs=1e-3)


def test_training_leaves_an_evaluation_and_a_card(laptop: Target, alone: dict[str, Any]) -> None:
    from huggingface_hub import ModelCard

    from workloads import card

    folder = artifacts.RunFolder(laptop.ray.storage, "alone")
    found, text = folder.read("train/evaluation.json"), card.text_of(folder)
    assert found["confusion"] == alone["confusion"]
    assert (found["accuracy"], found["f1"]) == (alone["eval_accuracy"], alone["eval_f1"])
    noted = folder.read("model/workloads.json")["eval_calibration_error"]
    assert noted == round(found["calibration"]["ece"], 4)
    assert card.is_ours(text)
    scores = {r.metric_type: r.metric_value for r in ModelCard(text).data.eval_results}
    assert scores["calibration_error"] == noted
    assert "| learning rate | 0.002 |" in text  # what the sweep found
    assert folder.has("model/reliability.svg")


def test_training_explains_some_of_its_answers(
    laptop: Target, prepared: Any, alone: dict[str, Any]
) -> None:
    from workloads import explain, report

    folder = artifacts.RunFolder(laptop.ray.storage, "alone")
    rows = folder.read("train/explanations.json")["rows"]
    validation = prepared.dataset.validation
    wrong = round((1 - alone["eval_accuracy"]) * len(validation.texts))
    assert len(rows) == min(wrong, explain.REPORTED - 1) + 1
    truth = dict(zip(validation.texts, validation.labels, strict=True))
    for one in rows:
        assert one["completeness_gap"]["relative"] < 0.05
        (whole,) = [text for text in truth if text.startswith(one["text"])]
        assert one["truth"] == truth[whole]
    report.write_report(folder)
    assert "Why these answers" in folder.read_text("report.html")


def test_the_exported_model_scores_in_plain_transformers_what_was_measured(
    laptop: Target, prepared: Any, alone: dict[str, Any]
) -> None:
    from transformers import pipeline

    path = f"{laptop.ray.storage}/alone/model"
    classify = pipeline("text-classification", model=path, device=-1)
    rows = prepared.dataset.validation
    answers = classify(rows.texts, truncation=True, max_length=24)
    hits = sum(a["label"] == label for a, label in zip(answers, rows.labels, strict=True))
    assert hits / len(rows.texts) == pytest.approx(alone["eval_accuracy"])


def test_training_leaves_what_serving_is_checked_on(
    laptop: Target, prepared: Any, alone: dict[str, Any]
) -> None:
    from workloads import samples
    from workloads.engine import TorchEngine

    path = Path(f"{laptop.ray.storage}/alone/model")
    known = samples.read(path)
    assert known is not None
    assert len(known.validation) == len(prepared.held_out)
    assert samples.golden_problem(TorchEngine(path, "alone"), path) is None


def test_the_parameters_of_a_sweep_are_used_and_kept_for_resuming(
    laptop: Target, alone: dict[str, Any]
) -> None:
    from workloads.train import _fixed_params

    assert alone["params"] == DRAWN
    folder = artifacts.RunFolder(laptop.ray.storage, "alone")
    assert _fixed_params(folder, {"model.layers": 1}, Console(quiet=True)) == DRAWN
    assert (
        json.loads(Path(f"{folder.path}/model/config.json").read_text())["num_hidden_layers"] == 2
    )


def test_a_loss_that_is_no_number_ends_with_advice(
    tiny: Task, laptop: Target, prepared: Any
) -> None:
    broken = {"classifier.bias": np.full(2, np.nan, np.float32)}
    sick = prepared._replace(base=replace(prepared.base, weights=broken))
    with pytest.raises(UserError, match="lower train.lr"):
        fit(tiny, changed(laptop, **{"train.workers": 1}), sick, "sick")


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_ctrl_c_ends_a_training_at_once_and_its_run_goes_on(
    command: Any, tiny: Task, tmp_path: Path, workers: int
) -> None:
    path = tmp_path / "reviews.yaml"
    epochs = 30 if workers > 1 else 100  # still at it when the signal comes
    long = changed(tiny, **{"train.epochs": epochs})
    path.write_text(yaml.safe_dump(long.model_dump(mode="json")))
    flags = ["--run", "stopped", "--json", f"target.train.workers={workers}"]
    flags.append("target.train.cpus_per_worker=0.5")
    first = command("train", "--task", str(path), *flags)
    checkpoints = tmp_path / "runs/stopped/train/checkpoints"
    wait_for(lambda: any(checkpoints.glob("checkpoint_*/SHA256SUMS")), 180)
    os.kill(first.process.pid, signal.SIGINT)
    assert first.wait(90) == 130
    assert "with --run stopped goes on from here" in first.err.read_text()
    where = "one worker, this process" if workers == 1 else "starting the workers"
    assert f"train: {where}" in first.err.read_text()
    if workers > 1:  # goes on as after a kill: see test_lost.py
        return
    second = command("train", *flags)  # the run knows its task
    assert second.result()["epoch"] <= epochs
    assert "from step" in second.err.read_text()

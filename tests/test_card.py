"""The model card: what the hub reads, what people read, and whose it is."""

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub import ModelCard

from workloads import artifacts, card, costs, evaluation
from workloads.artifacts import RunFolder
from workloads.config import Run, Target, Task

EVIL = "no|<b>`\n---\ngood"


def training(**more: Any) -> dict[str, Any]:
    point = {"epoch": 2.0, "step": 9, "steps": 9, "eval_loss": 0.5}
    target = Target.model_validate({"cost": {"cpu_hour": 0.5, "currency": "EUR"}})
    cost = costs.spent(target, "train", 7200, 2, costs.Used(cpu_s=1800), [])
    return {**point, "workers": 2, "seconds": 12.4, "base": None, "cost": cost, **more}


def notes_of(task: Task, labels: list[str]) -> dict[str, Any]:
    data = {"train_rows": 1234, "validation_rows": 40, "labels": labels, "duplicates_dropped": 7}
    scores = {
        "eval_accuracy": 0.75,
        "eval_f1": 0.7,
        "eval_loss": 0.5,
        "eval_calibration_error": 0.1,
    }
    task_tree = task.model_dump(mode="json")
    return {"run": "r-1", "task": task_tree, "data": {**data, "fingerprint": "f00d"}, **scores}


def evaluated(labels: list[str]) -> dict[str, Any]:
    true = np.arange(40) % len(labels)
    answers = np.array([np.where(np.arange(40) % 3, true, 0), np.full(40, 0.75)]).T
    return evaluation.evaluate(true, np.arange(40), answers, labels)


@pytest.fixture
def folder(tmp_path: Path, tiny: Task) -> RunFolder:
    return artifacts.create(str(tmp_path / "runs"), Run("tiny", tiny, "laptop", Target()), "r-1")


def written(
    folder: RunFolder, tmp_path: Path, task: Task, labels: list[str] | None = None, **more: Any
) -> Path:
    model = tmp_path / "model"
    model.mkdir(exist_ok=True)
    names = labels or ["bad", "good"]
    card.write(model, folder, notes_of(task, names), training(**more), evaluated(names))
    return model


def test_the_hub_reads_the_head_back(folder: RunFolder, tmp_path: Path, tiny: Task):
    data = ModelCard.load(written(folder, tmp_path, tiny) / "README.md").data
    assert (data.pipeline_tag, data.library_name) == ("text-classification", "transformers")
    assert data.model_name == "r-1"
    assert {r.metric_type: r.metric_value for r in data.eval_results} == {
        "accuracy": 0.75,
        "f1": 0.7,
        "calibration_error": 0.1,
    }
    again = ModelCard(f"---\n{data.to_yaml()}\n---\n").data
    assert again.to_dict() == data.to_dict()
    assert (data.base_model, data.datasets) == (None, None)


def test_models_and_data_of_the_hub_are_linked(folder: RunFolder, tmp_path: Path, tiny: Task):
    task = tiny.patched({"data.source": "nyu-mll/glue", "data.subset": "sst2", "data.train": None})
    model = written(folder, tmp_path, task, base="google/bert_tiny@0123abcd")
    data = ModelCard.load(model / "README.md").data
    assert (data.base_model, data.datasets) == ("google/bert_tiny", ["nyu-mll/glue"])
    assert {r.dataset_config for r in data.eval_results} == {"sst2"}


def test_only_the_built_in_rows_give_an_example(folder: RunFolder, tmp_path: Path, tiny: Task):
    own = (written(folder, tmp_path, tiny) / "README.md").read_text()
    task = tiny.patched({"data.source": "builtin:docstrings", "data.train": None})
    built_in = (written(folder, tmp_path, task) / "README.md").read_text()
    assert "widget" not in own
    assert "language:" not in own
    assert "language: en" in built_in
    # As the page at GET / looks for it.
    assert re.search(r"^\s*- text: Compute the inverse of a matrix\.$", built_in, re.MULTILINE)


def test_it_says_what_is_known(folder: RunFolder, tmp_path: Path, tiny: Task):
    text = (written(folder, tmp_path, tiny) / "README.md").read_text()
    for known in (
        "1,234",
        "f00d",
        "reviews.csv",
        "- bad\n",
        "12 s",
        "2 workers on cpu",
        "| seed | 0",
    ):
        assert known in text
    assert "| **good** | 7 | 13 |\n" in text  # every third row is answered with the first class
    assert "| good | 100.0% | 65.0% | 78.8% | 20 | 43.3 to 81.9% |" in text
    assert "Too few validation rows to say much of: bad, good" in text
    assert "{" + "{" not in text


def test_no_folder_of_this_machine_is_in_it(folder: RunFolder, tmp_path: Path, tiny: Task):
    text = (written(folder, tmp_path, tiny, base="/home/me/models/own") / "README.md").read_text()
    assert "| base model | own |" in text
    assert "/home/me" not in text
    assert str(Path(str(tiny.data.train)).parent) not in text


@pytest.mark.parametrize(
    ("named", "written"),
    [
        ("not_spam", r"not\_spam"),
        ("__init__", r"\_\_init\_\_"),
        ("# x", r"\# x"),
        ("- a", r"\- a"),
        ("1. a", r"1\. a"),
        ("~~x~~ &lt;", r"\~\~x\~\~ \&lt;"),
        ("-0.5", "-0.5"),
        ("a-b 3.5+ c#", "a-b 3.5+ c#"),
    ],
)
def test_a_name_is_shown_as_it_is(named: str, written: str) -> None:
    assert card.cell(named) == written


def test_nothing_of_a_signed_address_is_in_it(folder: RunFolder, tmp_path: Path, tiny: Task):
    task = tiny.patched({"data.train": "https://u:pw@corp.example/reviews.csv?Signature=beef"})
    text = (written(folder, tmp_path, task) / "README.md").read_text()
    assert "| source | reviews.csv" in text
    assert "beef" not in text
    assert "pw@" not in text


def test_tables_are_tables_whatever_labels_are(folder: RunFolder, tmp_path: Path, tiny: Task):
    model = written(folder, tmp_path, tiny, [EVIL, "good"])
    text = ModelCard.load(model / "README.md").text
    assert "<b>" not in text.replace(r"\<b\>", "")
    lines = text.splitlines()
    for i, line in enumerate(lines):
        if re.fullmatch(r"(\| --- )+\|", line):  # the line under a table's head
            widths = [len(re.findall(r"(?<!\\)\|", row)) for row in lines[i - 1 : i + 2]]
            assert len(set(widths)) == 1, lines[i - 1 : i + 2]


def test_many_classes_are_shown_by_their_confusions(folder: RunFolder, tmp_path: Path, tiny: Task):
    text = (written(folder, tmp_path, tiny, [f"c{i}" for i in range(30)]) / "README.md").read_text()
    assert "The pairs that are confused most" in text
    assert "| c3 | c0 | 2 |" in text


def test_the_plot_lies_beside_it(folder: RunFolder, tmp_path: Path, tiny: Task):
    model = written(folder, tmp_path, tiny)
    plot = (model / "reliability.svg").read_text()
    assert "(reliability.svg)" in (model / "README.md").read_text()
    assert plot.startswith("<svg")
    assert "var(" not in plot  # of the report's page


def test_what_a_person_changed_stays(folder: RunFolder, tmp_path: Path, tiny: Task):
    ours = (written(folder, tmp_path, tiny) / "README.md").read_text()
    theirs = ours.replace("## Intended use", "## For whom")
    assert card.is_ours(ours)
    assert not card.is_ours(theirs)
    folder.write_text("model/README.md", theirs)
    assert (written(folder, tmp_path, tiny) / "README.md").read_text() == theirs


def test_our_own_is_written_anew(folder: RunFolder, tmp_path: Path, tiny: Task):
    folder.write_text("model/README.md", card.sealed("# old\n"))
    assert "# old" not in (written(folder, tmp_path, tiny) / "README.md").read_text()


def test_a_probe_replaces_the_one_before_and_leaves_the_card_ours(
    folder: RunFolder, tmp_path: Path, tiny: Task
):
    text = (written(folder, tmp_path, tiny) / "README.md").read_text()
    once = card.with_probe(text, "first")
    twice = card.with_probe(once, "second")
    assert "\nfirst\n" in once
    assert "first" not in twice
    assert card.is_ours(twice)
    assert twice.partition("<!-- probe -->")[0] == text.partition("<!-- probe -->")[0]
    assert card.with_probe(twice, "first") == once


def test_a_model_that_was_not_evaluated_has_a_card(folder: RunFolder, tmp_path: Path, tiny: Task):
    card.write(tmp_path, folder, notes_of(tiny, ["a", "b"]), training(), {})
    text = (tmp_path / "README.md").read_text()
    assert "## Evaluation" not in text
    assert ModelCard(text).data.eval_results


def test_replicas_read_it_as_text(folder: RunFolder, tmp_path: Path, tiny: Task, trained: Path):
    from workloads.engine import read_info

    model = shutil.copytree(trained, tmp_path / "copy")
    shutil.copy(written(folder, tmp_path, tiny) / "README.md", model)
    shown = read_info(model, "copy").card
    assert shown == (model / "README.md").read_text()


def test_it_says_what_training_cost(folder: RunFolder, tmp_path: Path, tiny: Task) -> None:
    text = (written(folder, tmp_path, tiny) / "README.md").read_text()
    assert "| core-hours | 4 reserved, 0.5 used |" in text
    assert "| energy | 2.5 Wh: 5 W for each core that computes (assumed) |" in text
    assert "| cost | 2 EUR |" in text

"""The probe: what flips, how sure that is, and where it is kept."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from workloads import artifacts, card, cli, config, probe
from workloads.artifacts import RunFolder
from workloads.config import Run, Target, Task, UserError
from workloads.engine import Encoded, Engine, Info, TorchEngine

LABELS = ["bad", "good"]


class Rule(Engine):
    """Answers by what a text says: for each word that it has, logits are added."""

    kind, streams = "rule", 1

    def __init__(self, multi_label: bool = False, **words: list[float]) -> None:
        self.info = Info(LABELS, 99, multi_label, {}, 0)
        self.words = words
        self.encoder = lambda texts: [Encoded([ord(c) for c in text], False) for text in texts]

    def predict(self, rows: list[list[int]], head: Any = None) -> np.ndarray:
        texts = ["".join(map(chr, row)) for row in rows]
        found = [[w for word, w in self.words.items() if word in text] for text in texts]
        return np.array([np.sum([[0.5, 0.0], *some], axis=0) for some in found])


def given(*templates: str, **groups: list[str]) -> probe.Templates:
    return probe.Templates(templates=list(templates), groups={"kind": groups})


def only(engine: Engine, templates: probe.Templates) -> dict[str, Any]:
    [pair] = probe.probe(engine, templates, 0.05)["pairs"]
    return pair


def test_a_model_that_reads_no_groups_flips_nothing():
    seen = only(Rule(late=[2, 0]), given("{person} was late.", "{person} won.", x=["A"], y=["B"]))
    assert [seen[k] for k in ("flips", "shift", "signed")] == [0, 0, 0]
    assert seen["flips_interval"] == seen["signed_interval"] == [0, 0]


def test_flips_and_shifts_are_those_made_by_hand():
    texts = given("{person} won.", "{person} is late.", x=["Ann", "Bea"], y=["Cid", "Dan"])
    seen = only(Rule(Dan=[0, 2], late=[4, 0]), texts)
    # Only "Dan won." is answered otherwise; beside "late" the score moves, and no label.
    assert (seen["texts"], seen["flips"]) == (4, 1 / 4)
    plain, dan = 1 / (1 + np.exp(0.5)), 1 / (1 + np.exp(-1.5))
    late, dan_late = 1 / (1 + np.exp(-4.5)), 1 / (1 + np.exp(-2.5))
    up, down = dan - plain, dan_late - late
    assert seen["signed"] == pytest.approx((up + down) / 4)
    assert seen["shift"] == pytest.approx((up - down) / 4)
    assert seen["by_label"] == pytest.approx({"good": (up - down) / 4, "bad": (down - up) / 4})


def test_swapped_groups_change_the_sign_and_nothing_else():
    rule, texts = Rule(Ann=[0, 2], late=[3, 0]), ("{person} won.", "{person} is late.")
    one, other = (
        only(rule, given(*texts, x=[a], y=[b])) for a, b in (("Ann", "Bob"), ("Bob", "Ann"))
    )
    assert one["signed"] == pytest.approx(-other["signed"])
    assert one["signed"] != 0
    assert (one["flips"], one["shift"]) == (other["flips"], other["shift"])


def test_of_several_labels_at_once_those_over_a_half_are_the_answer():
    texts = given("{person} won.", x=["Ann"], y=["Bob"])
    rule = {"Ann": [4.0, 1.0], "Bob": [4.0, -1.0]}
    assert only(Rule(**rule), texts)["flips"] == 0
    assert only(Rule(multi_label=True, **rule), texts)["flips"] == 1


def test_every_two_groups_of_a_kind_are_compared():
    texts = probe.Templates(
        templates=["{person} won."],
        groups={"one": {"a": ["A"], "b": ["B"], "c": ["C"]}, "two": {"d": ["D"], "e": ["E"]}},
    )
    pairs = probe.probe(Rule(), texts, 0.05)["pairs"]
    assert [p["a"] + p["b"] for p in pairs] == ["ab", "ac", "bc", "de"]


def test_the_interval_narrows_with_templates_and_is_the_same_again():
    few, many = np.array([0.0, 1.0] * 4), np.array([0.0, 1.0] * 200)
    low, high = probe.bootstrap(few)
    assert probe.bootstrap(few) == [low, high]
    assert low < 0.3 < 0.7 < high
    # A binomial's: 1.96 standard deviations of 0.5 / sqrt(400)
    assert probe.bootstrap(many) == pytest.approx([0.451, 0.549], abs=0.01)


def test_a_term_that_begins_a_sentence_has_a_capital():
    assert probe.filled("{person} won.", "the man") == "The man won."
    assert probe.filled("I met {person}.", "the man") == "I met the man."


def test_a_model_that_only_embeds_is_refused():
    engine = Rule()
    engine.info = engine.info._replace(labels=[])
    with pytest.raises(UserError, match="only embeds"):
        probe.probe(engine, given("{person} won.", x=["A"], y=["B"]), 0.05)


def test_the_templates_that_ship_are_as_they_should_be():
    assert set(config.list_configs("probes")) == {"default"}
    assert len(probe.read_templates(None).templates) >= 20


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("templates: [a, b\ngroups: {", "line 2"),
        ("templates: ['{person} won.']", "groups: field required"),
        ("template: ['{person} won.']\ngroups: {}", "did you mean 'templates'"),
        ("templates: ['He won.']\ngroups: {k: {a: [A], b: [B]}}", "templates.0: needs {person}"),
        ("templates: ['{person} {verb}']\ngroups: {k: {a: [A], b: [B]}}", "no other {}"),
        ("templates: ['{person} won.']\ngroups: {k: {a: [A]}}", "groups.k: needs two groups"),
        ("templates: ['{person} won.']\ngroups: {k: {a: [A], b: [B, C]}}", "1 of a, 2 of b"),
        ("templates: ['{person} won.']\ngroups: {k: {a: [], b: []}}", "0 of a, 0 of b"),
        ("templates: ['{person} won.']\ngroups: {k: {a: [A], b: B}}", "groups.k.b"),
        ("templates: ['{person} won.']\ngroups: {k: {a: [A], b: [no]}}", "groups.k.b.0"),
        ("- one", "expected keys and values"),
    ],
)
def test_what_is_wrong_with_a_file_is_told(tmp_path: Path, text: str, words: str):
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(UserError) as e:
        probe.read_templates(str(file))
    assert words in str(e.value)
    assert "mine.yaml" in str(e.value)


def test_a_file_that_is_not_there_is_told_with_one_that_is(tmp_path: Path):
    with pytest.raises(UserError, match=r"no such file; one to copy is .*default\.yaml"):
        probe.read_templates(str(tmp_path / "none.yaml"))


# ---------------------------------------------------------------- the command


TONES = {"warm": "The film is a warm and clever delight.", "dull": "A dull and empty mess."}


@pytest.fixture(scope="module")
def divided(tmp_path_factory: pytest.TempPathFactory, trained: Path) -> Path:
    """A model whose border lies between two texts, the rest as training left it."""
    from safetensors.numpy import load_file, save_file

    path = shutil.copytree(trained, tmp_path_factory.mktemp("divided") / "model")
    engine = TorchEngine(path, "tiny", threads=0)
    logits = [engine.predict([engine.encode([text])[0].ids])[0] for text in TONES.values()]
    weights = load_file(path / "model.safetensors")
    weights["classifier.bias"] -= np.mean(logits, axis=0)
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    return path


@pytest.fixture
def folder(tmp_path: Path, tiny: Task, divided: Path) -> RunFolder:
    """A run with this model and a card of ours."""
    made = artifacts.create(str(tmp_path / "runs"), Run("tiny", tiny, "laptop", Target()), "r-1")
    shutil.copytree(divided, tmp_path / "runs/r-1/model")
    text = "# r-1\n\n<!-- probe -->\nNot probed yet.\n<!-- end of probe -->\n"
    made.write_text("model/README.md", card.sealed(text))
    return made


@pytest.fixture
def words(tmp_path: Path) -> Path:
    """Templates with two terms that the model tells apart, and two that are the same."""
    groups = {"tone": {k: [v] for k, v in TONES.items()}, "none": {"x": ["a"], "y": ["a"]}}
    file = tmp_path / "mine.yaml"
    file.write_text(
        yaml.safe_dump({"templates": ["{person}"] * 3, "groups": groups}, sort_keys=False)
    )
    return file


def command(*args: str) -> int:
    with pytest.raises(SystemExit) as e:
        cli.main(["probe", *args])
    return int(e.value.code or 0)


def test_what_flips_is_over_the_limit_and_told(
    folder: RunFolder, words: Path, capsys: pytest.CaptureFixture[str]
):
    code = command("--model", f"{folder.path}/model", "--templates", str(words), "--json")
    seen = capsys.readouterr()
    assert code == 1
    assert "tone: warm / dull: 100.0% of labels flip, over --max-flips 5.0%" in seen.err
    result = json.loads(seen.out)
    assert [(p["a"], p["flips"]) for p in result["pairs"]] == [("warm", 1.0), ("x", 0.0)]
    assert result["over"] == ["warm / dull"]


def test_a_run_keeps_it_and_its_card_and_report_show_it(folder: RunFolder, words: Path):
    at_most = ("--max-flips", "1")
    storage = f"target.ray.storage={folder.path.rpartition('/')[0]}"
    assert command("--model", "r-1", "--templates", str(words), *at_most, storage) == 0
    assert folder.read("probe.json")["file"] == "mine.yaml"
    assert folder.read_text("probe.svg") == folder.read_text("model/probe.svg")
    text = folder.read_text("model/README.md")
    assert card.is_ours(text)
    assert "Not probed" not in text
    assert "| warm / dull | 3 | 100.0 (100.0..100.0) |" in text
    page = folder.read_text("report.html")
    assert "<h2>Probe" in page
    assert "warm / dull</td><td>3</td>" in page


def test_a_card_that_a_person_changed_is_left_alone(folder: RunFolder, words: Path):
    theirs = folder.read_text("model/README.md").replace("# r-1", "# My model")
    folder.write_text("model/README.md", theirs)
    command("--model", f"{folder.path}/model", "--templates", str(words))
    assert folder.read_text("model/README.md") == theirs
    assert not folder.has("model/probe.svg")
    assert folder.has("probe.json")


def test_a_folder_that_is_named_gets_it_in_place_of_the_run(
    folder: RunFolder, words: Path, tmp_path: Path
):
    out = tmp_path / "new/deep"
    command("--model", str(folder.path), "--templates", str(words), "-o", str(out))
    assert {p.name for p in out.iterdir()} == {"probe.json", "probe.svg"}
    assert not folder.has("probe.json")


def test_a_model_from_elsewhere_is_only_read(trained: Path, words: Path, tmp_path: Path):
    model = shutil.copytree(trained, tmp_path / "elsewhere")
    before = sorted(p.name for p in tmp_path.rglob("*"))
    assert command("--model", str(model), "--templates", str(words), "--max-flips", "1") == 0
    assert sorted(p.name for p in tmp_path.rglob("*")) == before


def test_a_file_that_cannot_be_used_ends_with_2(
    folder: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "bad.yaml").write_text("templates: []\ngroups: {}")
    assert command("--model", str(folder.path), "--templates", str(tmp_path / "bad.yaml")) == 2
    assert "templates" in capsys.readouterr().err

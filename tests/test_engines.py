"""Which engine serves: the gate on really broken engines, the choice, and where it is kept."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import negate_logits, reviews

from workloads import engines, gate, replica, samples
from workloads.config import Target, TargetServe, UserError
from workloads.engine import Encoded, TorchEngine, load
from workloads.engines import FP32, INT8, choose, ready

LIMITS = TargetServe(streams=1)
MANY = [text for text, _ in reviews(80)]


def quiet(line: str) -> None:
    pass


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture(autouse=True)
def _here_and_fast(monkeypatch: pytest.MonkeyPatch) -> None:
    """Measures in this process, for hundredths of a second."""

    def prepare(*args: Any) -> Any:
        lines: list[str] = []
        engines.measure(*args, lines.append)
        return iter(lines)

    monkeypatch.setattr(gate, "SLICE_S", 0.02)
    monkeypatch.setattr(engines, "prepare", prepare)


@pytest.fixture
def measured(served: Path, tmp_path: Path) -> Path:
    """A copy of it, to be changed."""
    return shutil.copytree(served, tmp_path / "model")


@pytest.fixture
def foreign(trained: Path, tmp_path: Path) -> Path:
    """A model that no run of ours made."""
    return no_runs(trained, tmp_path / "foreign")


def no_runs(trained: Path, folder: Path) -> Path:
    """A copy without what a run leaves beside the model."""
    shutil.copytree(trained, folder)
    shutil.rmtree(folder / "serving")
    (folder / "workloads.json").unlink()
    return folder


@pytest.fixture(scope="module")
def cached(trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A home, not to be changed, in which such a model has been measured without texts."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gate, "SLICE_S", 0.02)
        patch.setenv("XDG_CACHE_HOME", str(home))
        engines.measure(no_runs(trained, home / "foreign"), "foreign", 1, [], quiet)
    return home


@pytest.fixture
def known(foreign: Path, cached: Path, tmp_path: Path) -> Path:
    """A model of others, and a cache of this test's own in which its figures are."""
    shutil.copytree(cached / "workloads", tmp_path / "cache" / "workloads")
    return foreign


def only(folder: Path) -> dict[str, Any]:
    """The one record in engines.json."""
    (record,) = json.loads((folder / "engines.json").read_text()).values()
    return record


def test_training_leaves_rows_and_golden_requests(trained: Path, prepared: Any) -> None:
    known = samples.read(trained)
    assert known is not None
    assert len(known.validation) == len(prepared.held_out)
    assert sorted(known.labels) == sorted(prepared.held_out.labels)
    assert 0 < len(known.calibration) <= samples.CALIBRATION
    golden = json.loads((trained / "serving" / "golden.json").read_text())["requests"]
    assert {g["label"] for g in golden} <= {"good", "bad"}
    assert samples.golden_problem(TorchEngine(trained, "tiny"), trained) is None


def test_golden_requests_tell_another_model(trained: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    other = shutil.copytree(trained, tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    turned = {k: -v if k.startswith("classifier") else v for k, v in weights.items()}
    save_file(turned, other / "model.safetensors", {"format": "pt"})
    problem = samples.golden_problem(TorchEngine(other, "other"), trained)
    assert problem is not None
    assert "golden requests are answered otherwise; the first: " in problem


class Hairsbreadth:
    """An engine that is sure of "good" and gives "bad" to every tenth text by next to nothing."""

    def encode(self, texts: list[str]) -> list[Encoded]:
        return [Encoded([int(text)], False) for text in texts]

    def predict(self, rows: list[list[int]]) -> np.ndarray:
        return np.array([[1, 0] if row[0] % 10 else [0, 0.001] for row in rows], np.float32)

    def decode(self, logits: np.ndarray) -> list[dict[str, str]]:
        return [{"label": ["good", "bad"][int(logits.argmax())]}]


def test_what_a_model_is_not_sure_of_is_not_golden(tmp_path: Path) -> None:
    engine: Any = Hairsbreadth()
    samples.write_golden(engine, [str(i) for i in range(100)], tmp_path)
    golden = json.loads((tmp_path / "golden.json").read_text())["requests"]
    assert len(golden) == 45
    assert {one["label"] for one in golden} == {"good"}


def test_an_engine_that_would_be_refused_where_it_serves_is_not_chosen(
    measured: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gate, "MOST_DISAGREEMENT", 1.0)
    (measured / "engines.json").unlink()
    negate_logits(measured / "serving" / "networks" / "int8" / "model.xml")
    choice = ready(measured, "tiny", TargetServe(streams=1, max_accuracy_drop=1.0))
    assert choice.kind != INT8
    assert re.search(r"not int8: \d+ of \d+ golden requests are answered otherwise", choice.reason)


def test_torch_answers_where_figures_of_before_chose_an_engine_that_errs(measured: Path) -> None:
    file = measured / "engines.json"
    kept = json.loads(file.read_text())
    for record in kept.values():
        record["engines"][INT8] = {"disagreement": 0.0, "gap": 1.0, "rows_per_s": {"1": 1e9}}
    file.write_text(json.dumps(kept))
    negate_logits(measured / "serving" / "networks" / "int8" / "model.xml")
    said: list[str] = []
    opened = replica.open_engine(str(measured), Target(serve=LIMITS), None, said.append)
    assert opened.main.kind == "torch"
    assert "openvino-int8 is not used on this machine" in said[0]


def test_every_candidate_is_checked_and_timed(served: Path) -> None:
    record = only(served)
    expected = {"torch", FP32, INT8} | ({engines.BF16} if engines.has_bf16() else set())
    assert set(record["engines"]) == expected
    for kind, figures in record["engines"].items():
        assert min(figures["rows_per_s"].values()) > 0
        assert kind == "torch" or figures["reference"] == record["engines"]["torch"]["accuracy"]
    assert record["engines"][FP32]["disagreement"] == 0
    assert record["reason"].startswith(f"engine: {record['choice']} (")


def test_the_int8_network_looks_words_up_in_the_file_itself(served: Path) -> None:
    import openvino

    words = json.loads((served / "config.json").read_text())["vocab_size"]
    net = openvino.Core().read_model(served / "serving/networks/int8/model.xml")
    gathers = [op for op in net.get_ops() if op.get_type_name() == "Gather"]
    sources = [op.input_value(0).get_node() for op in gathers]
    (table,) = [one for one in sources if one.get_output_partial_shape(0)[0] == words]
    assert (table.get_type_name(), table.get_element_type()) == ("Constant", openvino.Type.f32)


def test_a_model_that_was_measured_is_still_one_of_transformers(served: Path) -> None:
    from transformers import pipeline

    (answer,) = pipeline("text-classification", model=str(served), device=-1)("dull")
    assert answer["label"] in ("good", "bad")


def test_the_choice_is_kept_and_not_measured_again(
    measured: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "prepare", None)  # calling it would fail
    assert ready(measured, "tiny", LIMITS).kind == only(measured)["choice"]


def test_a_machine_of_another_kind_measures_for_itself(
    measured: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engines, "machine", lambda: ("Another CPU", set()))
    said: list[str] = []
    choice = ready(measured, "tiny", LIMITS, say=said.append)
    assert choice.kind != engines.BF16
    assert "Another CPU" in said[0]
    assert not any("exporting" in line for line in said)
    assert len(json.loads((measured / "engines.json").read_text())) == 2


def broken(folder: Path, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """The exported int8 network with other weights, and no figures yet."""
    (folder / "engines.json").unlink()
    weights = folder / "serving" / "networks" / "int8" / "model.bin"
    weights.write_bytes(change(np.frombuffer(weights.read_bytes(), np.uint8)).tobytes())


@pytest.mark.parametrize(
    "change", [np.zeros_like, lambda w: np.random.default_rng(0).permutation(w)]
)
def test_a_broken_engine_is_not_used(measured: Path, change: Any) -> None:
    broken(measured, change)
    choice = ready(measured, "tiny", LIMITS)
    assert choice.kind != INT8
    assert "not int8: " in choice.reason
    with pytest.raises(UserError, match=r"serve.engine is 'openvino-int8', which cannot be used"):
        ready(measured, "tiny", TargetServe(streams=1, engine=INT8))


def test_half_a_network_is_not_used(measured: Path) -> None:
    broken(measured, lambda weights: weights[: len(weights) // 2])
    assert ready(measured, "tiny", LIMITS).kind != INT8


def test_a_network_that_openvino_does_not_know_is_served_by_torch(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import openvino

    def fails(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("no conversion rule for aten::flip")

    monkeypatch.setattr(openvino, "convert_model", fails)
    folder = shutil.copytree(trained, tmp_path / "model")
    choice = ready(folder, "tiny", LIMITS)
    assert choice.kind == "torch"
    assert "aten::flip" in choice.reason


@pytest.mark.parametrize(("gpus", "engine"), [(1, "auto"), (0, "torch")])
def test_a_gpu_and_those_who_ask_for_torch_get_it_at_once(
    gpus: int, engine: str, tmp_path: Path
) -> None:
    limits = TargetServe.model_validate({"gpus_per_replica": gpus, "engine": engine})
    assert ready(tmp_path, "not even there", limits).kind == "torch"


def test_without_rows_or_texts_nothing_is_rounded(known: Path) -> None:
    choice = ready(known, "foreign", LIMITS)
    assert choice.kind in (FP32, "torch")
    assert "--texts FILE" in choice.reason
    with pytest.raises(UserError, match="--texts FILE"):
        ready(known, "foreign", TargetServe(streams=1, engine=INT8))


def test_texts_of_the_user_stand_for_validation_rows(known: Path) -> None:
    said: list[str] = []
    first = ready(known, "foreign", LIMITS, MANY, said.append)
    assert f"calibrated on {len(MANY)} rows" in " ".join(said)
    assert "of 80 texts" in first.reason or first.kind == "torch"
    # Given once, they need not be given again.
    assert ready(known, "foreign", LIMITS, say=said.append) == first


def test_few_texts_are_refused(foreign: Path) -> None:
    with pytest.raises(UserError, match="give 50 or more"):
        ready(foreign, "foreign", LIMITS, MANY[:49])


def test_what_is_not_ours_to_write_to_goes_to_the_cache(
    cached: Path, known: Path, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    choice = ready(known, "foreign", LIMITS)
    for folder in (known, cached / "foreign"):  # the second is the one that was measured
        assert sorted(p.name for p in folder.iterdir()) == sorted(
            p.name for p in trained.iterdir() if p.name not in ("serving", "workloads.json")
        )
    assert choice.exported is not None
    assert choice.exported.is_relative_to(tmp_path / "cache")
    monkeypatch.setattr(os, "access", lambda *args: False)
    assert engines.places(trained, "tiny")[0].is_relative_to(tmp_path / "cache")
    assert engines.places(trained, "s3://bucket/run/model")[0].is_relative_to(tmp_path / "cache")


def test_two_versions_of_a_model_do_not_share_a_cache(foreign: Path, tmp_path: Path) -> None:
    other = shutil.copytree(foreign, tmp_path / "other")
    assert engines.places(other, "other")[0] == engines.places(foreign, "foreign")[0]
    (other / "config.json").write_text((other / "config.json").read_text() + "\n")
    assert engines.places(other, "other")[0] != engines.places(foreign, "foreign")[0]


@pytest.mark.slow
def test_two_processes_at_once_do_not_break_each_other(trained: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(trained, tmp_path / "model")
    code = f"""
from pathlib import Path
from workloads import engines, export, gate
gate.SLICE_S = 0.02
print("loaded", flush=True)
engines.measure(Path({str(folder)!r}), "tiny", 1, [], print)
"""
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    assert other.stdout.readline() == "loaded\n"
    told: list[str] = []
    engines.measure(folder, "tiny", 1, [], told.append)  # beside the other: each may be the first
    told += other.communicate()[0].splitlines()
    assert other.returncode == 0
    assert sum("exporting" in line for line in told) == 1
    assert only(folder)["engines"][INT8]["rows_per_s"]
    assert sorted(p.name for p in (folder / "serving" / "networks").iterdir()) == [
        *("fp32", "int8", "model.txt", "tokenizer.json")
    ]
    engine = load(folder, "tiny", INT8, folder / "serving" / "networks")
    assert engine.decode(engine.predict([engine.encode(["dull"])[0].ids])[0])


def test_a_preparation_that_dies_leaves_torch_and_the_reason(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(sys, "executable", "/bin/false")
    folder = shutil.copytree(trained, tmp_path / "model")
    choice = ready(folder, "tiny", LIMITS)
    assert choice.kind == "torch"
    assert "ended with 1" in choice.reason


def test_the_quickest_of_those_that_passed_is_chosen() -> None:
    figures = {
        "torch": {"rows_per_s": {"1": 10.0, "8": 20.0}},
        FP32: {"rows_per_s": {"1": 50.0, "8": 30.0}},
        INT8: {"rows_per_s": {"1": 90.0, "8": 90.0}, "disagreement": 0.2},
    }
    record = {"rows": 100, "engines": figures}
    assert choose(record, LIMITS, None).kind == FP32
    assert choose(record, TargetServe(engine="torch"), None).kind == "torch"
    assert choose(record, LIMITS, None).reason == (
        "engine: openvino-fp32 (50 rows/s; torch 20, int8 90; not int8: it disagrees with torch on "
        "20.0% of the rows)"
    )


def test_an_engine_that_this_machine_has_not_is_refused() -> None:
    record = {"rows": 0, "engines": {"torch": {"rows_per_s": {"1": 1.0}}}}
    with pytest.raises(UserError, match="no bfloat16"):
        choose(record, TargetServe(engine="openvino-bf16"), None)


def test_what_embeds_is_near_enough_to_torch_and_the_quickest_of_those() -> None:
    figures = {
        "torch": {"rows_per_s": {"1": 10.0}},
        FP32: {"rows_per_s": {"1": 50.0}, "gap": 2e-7},
        engines.BF16: {"rows_per_s": {"1": 90.0}, "gap": 1.4e-3},
        INT8: {"rows_per_s": {"1": 200.0}, "gap": 3e-2},
    }
    classifier = {"rows": 100, "head": "logits", "engines": figures}
    choice = choose(classifier, LIMITS, None)
    assert (choice.kind, choice.embeds) == (INT8, FP32)
    encoder = classifier | {"head": "embedding"}
    choice = choose(encoder, LIMITS, None)
    assert (choice.kind, choice.embeds) == (FP32, FP32)
    assert "not bf16: its embeddings are up to 1.4e-03 from torch's" in choice.reason
    wider = TargetServe(streams=1, max_embedding_gap=2e-3)
    assert choose(encoder, wider, None).embeds == engines.BF16
    with pytest.raises(UserError, match="serve.max_embedding_gap"):
        choose(encoder, TargetServe(engine="openvino-int8"), None)


def test_other_weights_in_a_folder_that_was_served_are_what_is_served(measured: Path) -> None:
    from safetensors.torch import load_file, save_file

    exact = TargetServe(streams=1, engine="openvino-fp32")
    row = TorchEngine(measured, "tiny").encode(["dull"])[0].ids
    old = load(measured, "tiny", FP32, ready(measured, "tiny", exact).exported).predict([row])
    weights = load_file(measured / "model.safetensors")
    turned = {k: -v if k.startswith("classifier") else v for k, v in weights.items()}
    save_file(turned, measured / "model.safetensors", {"format": "pt"})
    now = load(measured, "tiny", FP32, ready(measured, "tiny", exact).exported).predict([row])
    np.testing.assert_allclose(now, TorchEngine(measured, "tiny").predict([row]), atol=1e-5)
    assert np.abs(now - old).max() > 1e-3

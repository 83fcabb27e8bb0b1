"""What a stage costs: arithmetic, meters, and the estimate beside the actual."""

import json
import os
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from workloads import costs
from workloads.cli import main
from workloads.cluster import Node
from workloads.config import Cost, Target, TargetServe, Task, UserError, figure, load
from workloads.costs import Meter, Used

SPOT = Node({"CPU": 4.0}, {"ray.io/market-type": "spot"})
PLAIN = Node({"CPU": 4.0})


def target(**cost: Any) -> Target:
    return Target.model_validate({"cost": cost, "train": {"workers": 2, "cpus_per_worker": 3}})


def test_what_is_reserved_is_paid_for_and_what_is_used_takes_energy() -> None:
    used = Used(cpu_s=3600)
    told = costs.spent(target(cpu_hour=0.1, watts_per_core=7), "train", 1800, 2, used, [])
    assert told["core_hours"] == {"reserved": 3.0, "used": 1.0}
    assert told["gpu_hours"] == {"reserved": 0.0, "used": 0.0}
    assert (told["money"], told["currency"]) == (0.3, "USD")
    assert told["energy_wh"] == 7.0
    assert "7 W" in told["energy_from"]
    assert "assumed" in told["energy_from"]


def test_gpus_have_their_own_price_and_the_energy_that_their_driver_tells() -> None:
    both = Cost(cpu_hour=0.1, gpu_hour=2)
    assert costs.money(both, core_hours=10, gpu_hours=3) == 7.0
    assert costs.money(Cost(gpu_hour=2), core_hours=10, gpu_hours=3) == 6.0
    told, words = costs.energy(both, Used(cpu_s=720, gpu_s=900, gpu_wh=80))
    assert told == 81.0
    assert "driver" in words
    told, words = costs.energy(both, Used(cpu_s=720, gpu_s=900))
    assert told == 101.0  # 400 W x a quarter of an hour
    assert "400 W x utilisation" in words


def test_without_a_price_there_is_no_money() -> None:
    assert costs.money(Cost(), 1, 0) is None
    assert costs.money(Cost(cpu_hour=1), 1, 1) is None  # of the GPU nobody knows
    assert costs.money(Cost(gpu_hour=2), 1, 0) is None  # of cores neither
    assert costs.money(Cost(cpu_hour=0), 1, 0) == 0
    assert costs.total([{}, {"money": None}]) is None
    assert costs.total([{"money": 0.5}, {"money": None}, {"money": 1.0}]) == 1.5


def test_the_discount_is_for_the_part_that_lies_on_spot_nodes() -> None:
    cheap = target(cpu_hour=1, spot_discount=0.6)
    both = costs.spent(cheap, "tune", 3600, 8, None, [SPOT, PLAIN])
    assert both["money"] == pytest.approx(8 * (1 - 0.5 * 0.6))
    # Training keeps off spot nodes.
    assert costs.spent(cheap, "train", 3600, 2, None, [SPOT, PLAIN])["money"] == 6
    assert costs.saved(cheap, 1800, [SPOT]) == pytest.approx(0.2)


def test_a_replica_costs_an_hour_of_all_cores_that_it_computes_on() -> None:
    limits = TargetServe(cpus_per_replica=0.5)
    told = costs.serving(Cost(cpu_hour=0.36), limits, cores=2, rows_per_s=100)
    assert (told["hour"], told["million"]) == (0.72, 2.0)
    assert "2 USD per million predictions at the 100 rows/s" in costs.serving_words(told)
    unknown = costs.serving(Cost(cpu_hour=0.36), limits, 2, None)
    assert unknown["million"] is None
    assert "million" not in costs.serving_words(unknown)


# ---------------------------------------------------------------- meters


def test_a_meter_counts_what_computes_and_not_what_waits() -> None:
    meter = Meter()
    time.sleep(0.3)
    waited = meter.take()
    end = time.process_time() + 0.3
    while time.process_time() < end:
        pass
    computed = meter.take()
    assert waited.cpu_s < 0.15
    assert 0.3 <= computed.cpu_s < 0.6
    assert computed.gpu_s == 0


def test_a_meter_asks_the_driver_for_the_gpus_that_this_process_may_use(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = tmp_path / "asked"
    script = tmp_path / "nvidia-smi"
    script.write_text(f'#!/bin/sh\necho "$@" >> {asked}\nprintf "60, 300.00\\n20, 100.00\\n"\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    monkeypatch.setattr(costs, "SAMPLE_S", 0.05)
    meter = Meter(gpus=2)
    began = time.monotonic()
    while time.monotonic() < began + 1:
        time.sleep(0.05)
    used, seconds = meter.take(), time.monotonic() - began
    assert "--id=2,3" in asked.read_text()
    meter.stop()
    time.sleep(0.3)  # one look may be under way
    looks = asked.read_text()
    time.sleep(0.3)
    assert asked.read_text() == looks
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    costs.look()
    assert "--id=0\n" in asked.read_text()
    assert 0.5 < used.gpu_s / (2 * 0.4 * seconds) <= 1.1  # two GPUs at 40 %
    assert used.gpu_wh == pytest.approx(used.gpu_s / 0.4 * 200 / 3600)


def test_a_driver_that_tells_no_power_or_nothing() -> None:
    assert costs.mean("97, [N/A]\n") == (0.97, 0.0)
    assert costs.mean("") is None
    assert costs.mean("no devices were found") is None


def test_workers_are_counted_as_often_as_there_were() -> None:
    history = [{"world": 2, "used": Used(10, 4, 1)._asdict()}, {"world": 3, "used": {"cpu_s": 5}}]
    assert costs.of_workers(history) == (2.5, Used(35, 8, 2))
    assert costs.of_workers([{"world": 1}]) == (1, Used())  # of an older version


# ---------------------------------------------------------------- before and after


def test_check_estimates_what_the_run_then_says_beside_what_it_was(
    tiny: Task, tmp_path: Path, capsys: Any
) -> None:
    file = tmp_path / "tiny.yaml"
    file.write_text(yaml.safe_dump(tiny.model_dump(mode="json")))
    storage = f"target.ray.storage={tmp_path / 'runs'}"
    args = ["--task", str(file), storage, "target.cost.cpu_hour=3600", "target.cost.currency=EUR"]
    assert _ends("check", "--json", *args) == 0
    before = json.loads(capsys.readouterr().out)["estimate"]
    assert before["tune"]["money"] > 0
    assert _ends("train", "--run", "one", *args) == 0
    said = capsys.readouterr().out
    told = json.loads((tmp_path / "runs/one/run.json").read_text())
    cost = told["stages"]["train"]["cost"]
    assert told["estimate"] == before
    # A price of 1 for a core's second.
    assert cost["money"] == pytest.approx(3600 * cost["core_hours"]["reserved"], rel=1e-4)
    assert cost["core_hours"]["used"] > 0
    assert f"{figure(cost['money'])} EUR; estimated" in said
    page = (tmp_path / "runs/one/report.html").read_text()
    assert f"{figure(before['train']['money'])} EUR" in page
    assert _ends("runs", "ls", "--storage", str(tmp_path / "runs"), "--json") == 0
    assert json.loads(capsys.readouterr().out)["runs"][0]["cost"] == cost["money"]


def test_check_without_prices_starts_no_measurement(capsys: Any, tmp_path: Path) -> None:
    assert _ends("check", "--json", f"target.ray.storage={tmp_path}") == 0
    assert "estimate" not in json.loads(capsys.readouterr().out)
    assert not list(tmp_path.iterdir())


def _ends(*args: str) -> int:
    with pytest.raises(SystemExit) as done:
        main([*args])
    return int(done.value.code or 0)


def test_prices_are_checked() -> None:
    for wrong in ("cpu_hour=-1", "spot_discount=2", "cpu_hour=.nan", "currency="):
        with pytest.raises(UserError, match=f"target.cost.{wrong.partition('=')[0]}"):
            load("smoke", "laptop", [f"target.cost.{wrong}"])

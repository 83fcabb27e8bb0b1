"""The parts of scripts/bench_serve.py that need no server."""

import io
from pathlib import Path
from typing import Any

import pytest
from conftest import script
from rich.console import Console

bench_serve = script("bench_serve")
TEXTS = ["so good", "so ]==] bad", "é"] * 20


@pytest.fixture
def bench(tmp_path: Path) -> Any:
    return bench_serve.Bench(Path("model"), TEXTS, tmp_path, tmp_path, [1, 16], 5, [])


def measured(rate: float, refused: int = 0) -> dict[str, Any]:
    run = {"rate": rate, "p50_ms": 1.0, "p99_ms": 2.0, "cpu_ms": 0.5, "others": 0.0}
    run |= {"refused": refused, "broken": 0}
    found = {"agreement": 1.0, "others": 0.0, "ready_s": 2.0, "memory_mb": 100.0}
    return {**found, "loads": {1: run, 16: run}, "batch": run}


def shown(bench: Any, servers: dict[str, Any]) -> str:
    told = {"cpu": "a CPU", "cores": 2, "date": "2026-01-01", "rounds": 3}
    console = Console(width=160, file=io.StringIO(), record=True)
    console.print(bench_serve.table(bench, {**told, "servers": servers, "no_server": {}}))
    return console.export_text()


def test_a_server_that_is_not_timed_is_shown_with_its_reason(bench: Any) -> None:
    text = shown(bench, {"litserve": {"rounds": [], "excluded": "not installed: no such wheel"}})
    assert "not timed" in text
    assert "litserve: not installed: no such wheel" in text


def test_the_table_has_medians_their_ratio_and_the_errors(bench: Any) -> None:
    ours = bench_serve.medians([measured(90), measured(300, refused=7), measured(200)])
    base = bench_serve.medians([measured(100)])
    text = shown(bench, {"ours": {"median": ours}, "fastapi-onnx": {"median": base}})
    assert "200/s  2.00x" in text
    assert "7 errors" in text


def test_a_request_of_many_texts_holds_each_text_once(bench: Any) -> None:
    lua = bench_serve.script(bench, bench_serve.CONTENDERS["ours"], 32).read_text()
    assert lua.count('"so good"') == 11  # of 32 texts; the 28 left over fill no request


def test_a_text_cannot_end_its_string_in_the_script(bench: Any) -> None:
    lua = bench_serve.script(bench, bench_serve.CONTENDERS["ours"], 1).read_text()
    assert lua.count("]==]") == lua.count("[==[") == len(TEXTS)


def test_each_way_of_asking_has_its_own_body() -> None:
    assert bench_serve.CONTENDERS["ours"].body(["a"], "m") == {"inputs": "a"}
    assert bench_serve.CONTENDERS["infinity"].body(["a"], "m") == {"input": ["a"]}
    embeds = bench_serve.CONTENDERS["ours-embed"].body(["a"], "m")
    assert embeds == {"input": "a", "model": "m"}


def test_a_missing_wrk_is_told_with_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SystemExit):
        bench_serve.options(["--model", "m", "--texts", "t.csv"])
    assert "apt install wrk" in capsys.readouterr().err

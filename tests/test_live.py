"""What people see while something runs, where there is no terminal."""

import io

import pytest
from conftest import wait_for
from rich.console import Console

from workloads import live


def test_what_takes_long_is_told_while_it_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "LATE_S", 0.01)
    console = Console(file=io.StringIO())
    with live.doing(console, "deploying [1/2]"):
        wait_for(lambda: console.file.getvalue() == "deploying [1/2] ...\n", 20)  # type: ignore


def test_what_is_done_soon_is_not_told() -> None:
    console = Console(file=io.StringIO())
    with live.doing(console, "deploying"):
        pass
    assert console.file.getvalue() == ""  # type: ignore

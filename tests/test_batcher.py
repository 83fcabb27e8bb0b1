"""Who shares a forward pass with whom, and that everybody gets their own answers."""

import asyncio
import threading
import time
from typing import Any

import numpy as np
import pytest

from workloads.batcher import Batcher, OverloadedError, Row


class Engine:
    """Answers a row with its sum; keeps what it was given, and waits while the gate is shut."""

    def __init__(self) -> None:
        self.gate = threading.Event()
        self.gate.set()
        self.batches: list[list[Row]] = []

    def predict(self, rows: list[Row]) -> np.ndarray:
        self.batches.append(rows)
        assert self.gate.wait(10)
        return np.array([[sum(row)] for row in rows])

    def lengths(self) -> list[list[int]]:
        return [[len(row) for row in batch] for batch in self.batches]


def batcher(engine: Any, **limits: Any) -> Batcher:
    wanted = {"streams": 1, "max_rows": 4, "max_tokens": 100, "max_wait_s": 9.0} | limits
    return Batcher(engine.predict, **wanted)


async def behind_a_shut_gate(engine: Engine, ask: Batcher, calls: list[list[Row]]) -> list[Any]:
    """Makes the calls one after the other while the only stream is busy with a row of its own."""
    engine.gate.clear()
    first = asyncio.create_task(ask([[0]]))
    while not engine.batches:
        await asyncio.sleep(0.001)
    tasks = []
    for rows in calls:
        tasks.append(asyncio.create_task(ask(rows)))
        await asyncio.sleep(0)
    engine.gate.set()
    await first
    return await asyncio.gather(*tasks, return_exceptions=True)


def rows(*lengths: int) -> list[Row]:
    return [[1] * length for length in lengths]


def test_callers_get_the_answers_to_their_own_rows_in_order():
    engine = Engine()
    calls = [rows(7, 1, 30), rows(2), rows(30, 29, 28, 1, 1, 1)]
    answers = asyncio.run(behind_a_shut_gate(engine, batcher(engine), calls))
    assert [[int(a[0]) for a in call] for call in answers] == [
        [len(row) for row in call] for call in calls
    ]


def test_a_batch_is_the_oldest_row_and_those_nearest_to_it_in_length():
    engine = Engine()
    calls = [rows(10), rows(50), rows(11), rows(3), rows(9), rows(12), rows(51)]
    asyncio.run(behind_a_shut_gate(engine, batcher(engine, max_tokens=1000), calls))
    assert engine.lengths() == [[1], [9, 10, 11, 12], [3, 50, 51]]


def test_a_batch_stays_under_its_tokens_padding_included():
    engine = Engine()
    calls = [rows(30), rows(40), rows(20), rows(10), rows(200)]
    asyncio.run(behind_a_shut_gate(engine, batcher(engine, max_tokens=90), calls))
    assert engine.lengths() == [[1], [10, 20, 30], [40], [200]]


def test_nobody_waits_for_company_when_a_stream_is_idle():
    engine = Engine()
    ask = batcher(engine, max_wait_s=0)
    asyncio.run(ask(rows(5)))
    assert engine.lengths() == [[5]]


def test_what_the_loop_reads_at_once_goes_together_though_a_stream_is_idle():
    engine = Engine()
    ask = batcher(engine)

    async def four() -> None:
        await ask(rows(1))
        while not ask.idle:
            await asyncio.sleep(0.001)
        await asyncio.gather(*(ask(rows(5)) for _ in range(4)))

    asyncio.run(four())
    assert engine.lengths() == [[1], [5, 5, 5, 5]]


def test_idle_streams_share_what_is_there():
    engine = Engine()
    ask = batcher(engine, streams=2, max_rows=32, max_tokens=10_000)
    asyncio.run(ask(rows(*[5] * 32)))
    assert sum(len(batch) for batch in engine.batches) == 32
    assert len(engine.batches) > 1


def test_of_many_rows_some_stay_behind_for_the_streams_to_go_on_with():
    engine = Engine()
    ask = batcher(engine, max_rows=64, max_tokens=10_000)
    asyncio.run(behind_a_shut_gate(engine, ask, [rows(*[5] * 31)]))
    assert [len(batch) for batch in engine.batches] == [1, 16, 8, 4, 3]


def test_what_would_wait_too_long_is_refused_and_the_rest_is_answered():
    def slow(rows: list[Row]) -> np.ndarray:
        time.sleep(0.01)
        return np.array([[sum(row)] for row in rows])

    async def flood() -> list[Any]:
        ask = Batcher(slow, streams=1, max_rows=4, max_tokens=100, max_wait_s=0.2)
        await ask(rows(5))

        async def caller() -> Any:
            await ask.room()
            return await ask(rows(5))

        return await asyncio.gather(*(caller() for _ in range(500)), return_exceptions=True)

    answers = asyncio.run(flood())
    refused = [a for a in answers if isinstance(a, OverloadedError)]
    assert 0 < len(refused) < 500
    assert all(a.wait_s > 0.1 for a in refused)
    assert {int(a[0][0]) for a in answers if not isinstance(a, Exception)} == {5}


def test_an_engine_that_fails_fails_its_callers_and_goes_on():
    def moody(rows: list[Row]) -> np.ndarray:
        if any(len(row) == 13 for row in rows):
            raise ValueError("unlucky")
        return np.zeros((len(rows), 1))

    ask = Batcher(moody, streams=1, max_rows=1, max_tokens=100, max_wait_s=9)

    async def try_it() -> None:
        with pytest.raises(ValueError, match="unlucky"):
            await ask(rows(5, 13))
        assert len(await ask(rows(5))) == 1

    asyncio.run(try_it())


def test_rows_of_callers_that_have_gone_are_not_computed():
    engine = Engine()
    ask = batcher(engine)

    async def leave() -> None:
        engine.gate.clear()
        first = asyncio.create_task(ask(rows(1)))
        while not engine.batches:
            await asyncio.sleep(0.001)
        gone = asyncio.create_task(ask(rows(2)))
        await asyncio.sleep(0)
        gone.cancel()
        await asyncio.sleep(0)
        engine.gate.set()
        await first
        await ask(rows(3))

    asyncio.run(leave())
    assert engine.lengths() == [[1], [3]]


def test_many_callers_on_several_streams_all_get_their_answers():
    engine = Engine()
    ask = batcher(engine, streams=3, max_rows=8)
    lengths = list(np.random.default_rng(0).integers(1, 60, 2000))

    async def everybody() -> list[Any]:
        return await asyncio.gather(*(ask(rows(n)) for n in lengths))

    answers = asyncio.run(everybody())
    assert [int(a[0][0]) for a in answers] == lengths

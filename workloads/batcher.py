"""Rows of all callers share forward passes, in micro-batches of like length.

Nothing waits for company: a stream that is free takes what is there, so a batch grows only while
all streams are busy. It holds the row that has waited longest and those nearest to it in length:
little of it is padding, and no row is passed over for ever.
"""

import asyncio
import bisect
import contextlib
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

Row = list[int]  # token ids
Predict = Callable[[list[Row]], np.ndarray]  # B rows -> logits (B, C)
FEW = 4  # rows that gain little from more company
LOOK_S = 0.02
MEMORY = 0.9  # of the pace so far that stays in its running mean at each batch


class OverloadedError(Exception):
    """More waits than can be answered in time; `wait_s` is how long that would take."""

    def __init__(self, wait_s: float) -> None:
        super().__init__(f"{wait_s:.2f} s of work wait already")
        self.wait_s = wait_s


class Call:
    """What one caller asks; its answers come together, however its rows are batched."""

    def __init__(self, count: int) -> None:
        self.loop = asyncio.get_running_loop()
        self.done: asyncio.Future[list[np.ndarray]] = self.loop.create_future()
        self.answers: list[np.ndarray] = [np.empty(0)] * count  # logits (C,) each
        self.missing = count

    def put(self, place: int, answer: np.ndarray | BaseException) -> None:
        """One row's answer; in the caller's loop."""
        if self.done.done():  # the caller has gone, or another of its rows has failed
            return
        if isinstance(answer, BaseException):
            self.done.set_exception(answer)
            return
        self.answers[place] = answer
        self.missing -= 1
        if not self.missing:
            self.done.set_result(self.answers)


class Waiting(NamedTuple):
    """A row that waits; sorts by length, then by age."""

    length: int
    number: int
    row: Row
    place: int  # in its call
    call: Call


class Batcher:
    """Runs `predict` in so many threads, one for each stream of an engine.

    A batch has at most `max_rows` rows and, padded, `max_tokens` tokens; a longer row goes alone.
    `answered` is told the lengths of its rows, in a stream's thread.
    """

    def __init__(
        self,
        predict: Predict,
        streams: int,
        max_rows: int,
        max_tokens: int,
        max_wait_s: float,
        answered: Callable[[list[int]], None] = lambda lengths: None,
    ) -> None:
        self.predict, self.streams, self.answered = predict, streams, answered
        self.max_rows, self.max_tokens, self.max_wait_s = max_rows, max_tokens, max_wait_s
        self.lengths: list[Waiting] = []  # sorted
        self.ages: OrderedDict[int, Waiting] = OrderedDict()  # the same, in order of arrival
        self.tokens = 0  # that wait
        self.pace = 0.0  # tokens/s of one stream, lately
        self.arrivals = self.idle = self.running = 0
        self.work = threading.Condition()
        for number in range(streams):
            threading.Thread(target=self._run, name=f"stream-{number}", daemon=True).start()

    async def room(self) -> None:
        """Returns when what waits can be answered in half of `max_wait_s`; raises OverloadedError
        when that is not so for the other half.

        Who is refused at once asks again at once, and refusing would be all that is done.
        """
        end = time.perf_counter() + self.max_wait_s / 2
        while (wait_s := self._wait_s()) > self.max_wait_s / 2:
            if time.perf_counter() > end:
                raise OverloadedError(wait_s)
            await asyncio.sleep(LOOK_S)

    def _wait_s(self) -> float:
        return self.tokens / (self.pace * self.streams) if self.pace else 0.0

    async def __call__(self, rows: list[Row]) -> list[np.ndarray]:
        """Logits (C,) of each row."""
        call = Call(len(rows))
        with self.work:
            for place, row in enumerate(rows):
                self.arrivals += 1
                one = Waiting(len(row), self.arrivals, row, place, call)
                bisect.insort(self.lengths, one)
                self.ages[one.number] = one
                self.tokens += one.length
        # All that the loop has read by now goes together.
        call.loop.call_soon(self._wake)
        return await call.done

    def _wake(self) -> None:
        """Tells idle streams what there is."""
        with self.work:
            if self.lengths:
                self.work.notify(min(len(self.lengths), self.streams))

    def _run(self) -> None:
        """A stream's life."""
        while True:
            with self.work:
                self.idle += 1
                while not self.lengths:
                    self.work.wait()
                self.idle -= 1
                batch = [one for one in self._take() if not one.call.done.done()]
                self.running += len(batch)
            if not batch:  # their callers have gone
                continue
            answers: list[np.ndarray | BaseException]
            began = time.perf_counter()
            try:
                answers = list(self.predict([one.row for one in batch]))
                self.answered([one.length for one in batch])
            except Exception as e:  # the callers' to handle
                answers = [e] * len(batch)
            pace = sum(one.length for one in batch) / (time.perf_counter() - began)
            with self.work:
                self.running -= len(batch)
            self.pace = MEMORY * self.pace + (1 - MEMORY) * pace if self.pace else pace
            self._deliver(batch, answers)

    def _take(self) -> list[Waiting]:
        """The oldest row and those nearest to it in length, as many as fit; under the lock."""
        oldest = next(iter(self.ages.values()))
        low = bisect.bisect_left(self.lengths, oldest)
        high = low + 1
        most = min(self.max_rows, self._share())
        while high - low < most:
            down = oldest.length - self.lengths[low - 1].length if low else math.inf
            up = math.inf
            if high < len(self.lengths):
                longest = self.lengths[high].length
                if (high - low + 1) * longest <= self.max_tokens:
                    up = longest - oldest.length
            if (high - low + 1) * self.lengths[high - 1].length > self.max_tokens:
                down = math.inf
            if down == up == math.inf:
                break
            low, high = (low - 1, high) if down <= up else (low, high + 1)
        batch = self.lengths[low:high]
        del self.lengths[low:high]
        for one in batch:
            del self.ages[one.number]
            self.tokens -= one.length
        return batch

    def _share(self) -> int:
        """Rows of one batch: idle streams get as many, and of many rows half stays behind for the
        streams to go on with while those who get answers now ask again."""
        rows = len(self.lengths)
        half = math.ceil((rows + self.running) / (2 * self.streams))
        return min(math.ceil(rows / (self.idle + 1)), max(FEW, half))

    def _deliver(self, batch: list[Waiting], answers: list[np.ndarray | BaseException]) -> None:
        def put(loop: asyncio.AbstractEventLoop) -> None:
            for one, answer in zip(batch, answers, strict=True):
                if one.call.loop is loop:
                    one.call.put(one.place, answer)

        for loop in {one.call.loop for one in batch}:
            with contextlib.suppress(RuntimeError):  # it has been closed: nobody asks any more
                loop.call_soon_threadsafe(put, loop)

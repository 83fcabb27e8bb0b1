"""A stream into Ray Train: pieces of files -> tokens -> each rank's part of every global batch.

An epoch is the files' pieces, shuffled by (seed, epoch), one after the other; in a piece, rows are
shuffled and those of like length put together, 50 global batches at a time. The counts of the
first pass say at which row of an epoch a piece begins, so it is cut into global batches without
knowing any other. It is dealt out in blocks of one row, a rank's part each, and such blocks go to
the ranks in turn: what is learned does not depend on the width, and a resume begins with the piece
that it stopped in.
"""

import contextlib
import functools
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import ray
import ray.train

from . import checkpoint
from .artifacts import RunFolder
from .config import Train, UserError
from .data import Share, Tokens, steps_per_epoch
from .stream import Plan, cells, dataset, hashes

if TYPE_CHECKING:
    # Not torch: those who read need it not, and would wait two seconds and hold 200 MB for it.
    from .loop import Place

POOL_BATCHES = 50
POOL_ROWS = 16384  # or fewer batches, where they are large


# ---------------------------------------------------------------- a piece, dealt to the ranks


def work(plan: Plan, train: Train, step: int) -> list[dict[str, int]]:
    """The pieces of all epochs from a step on: where in its epoch each begins, and the first row
    that is still to come."""
    first, done = divmod(step, steps_per_epoch(len(plan), train))
    todo = []
    for epoch in range(first, train.epochs):
        at, start = 0, done * train.global_batch if epoch == first else 0
        for i in np.random.default_rng((train.seed, epoch)).permutation(len(plan.pieces)):
            end = at + plan.kept[i]
            if end > max(at, start):
                todo.append({"epoch": epoch, "piece": int(i), "at": at, "start": start})
            at = end
    return todo


def deal(
    item: dict[str, int], plan: Plan, train: Train, tokenizer: str, world: int
) -> Iterator[pa.Table]:
    """A piece as tables of one row, a rank's part of some batches each, rank after rank."""
    at, batch = item["at"], train.global_batch
    for texts, labels in _pools(plan, item["piece"], batch, -at % batch):
        if at + len(texts) > item["start"]:
            ids = _encode(tokenizer, plan.data.max_tokens, texts)
            rng = np.random.default_rng((train.seed, item["epoch"], at))
            order = _order(np.array([len(i) for i in ids]), batch, -at % batch, rng)
            rows = at + np.arange(len(order))
            for rank in range(world):
                mine = rows % batch % world == rank
                columns = _columns([ids[i] for i in order[mine]])
                columns["labels"] = _one_list(labels[i] for i in order[mine])
                columns["batches"] = _one_list(rows[mine] // batch)
                place = {"epoch": item["epoch"], "at": at, "end": at + len(texts), "rank": rank}
                yield pa.table({**columns, **{name: [value] for name, value in place.items()}})
        at += len(texts)


def _columns(ids: list[np.ndarray]) -> dict[str, Any]:
    flat = np.concatenate([*ids, np.array([], np.int32)])
    return {
        "ids": pa.ListArray.from_arrays([0, len(flat)], pa.array(flat)),
        "lengths": _one_list(len(row) for row in ids),
    }


def _one_list(numbers: Any) -> pa.Array:
    return pa.array([list(numbers)], pa.list_(pa.int64()))


def _pools(plan: Plan, number: int, batch: int, head: int) -> Iterator[tuple[list[str], list[int]]]:
    """The rows of a piece to train on: the first pool completes a batch that another piece
    began."""
    texts: list[str] = []
    labels: list[int] = []
    numbers = {label: i for i, label in enumerate(plan.labels)}
    pool = batch * max(1, min(POOL_BATCHES, POOL_ROWS // batch))
    want, seen = head + pool, 0
    for more_texts, more_labels in cells(plan.data, plan.pieces[number]):
        keep = np.flatnonzero(~np.isin(hashes(more_texts, plan.seed), plan.held_out))
        seen += len(keep)
        texts += [more_texts[i] for i in keep]
        labels += [numbers[more_labels[i]] for i in keep]
        while len(texts) >= want:
            yield texts[:want], labels[:want]
            texts, labels, want = texts[want:], labels[want:], pool
    if texts:
        yield texts, labels
    if seen != plan.kept[number]:
        raise UserError(f"{plan.pieces[number].path} has changed while it was trained on")


def _order(lengths: np.ndarray, batch: int, head: int, rng: np.random.Generator) -> np.ndarray:
    """Row numbers of a pool, (n,): shuffled, and in each full batch rows of like length."""
    order = rng.permutation(len(lengths))
    head = min(head, len(order))
    end = head + (len(order) - head) // batch * batch
    middle = order[head:end]
    middle = middle[np.argsort(lengths[middle], kind="stable")].reshape(-1, batch)
    return np.concatenate([order[:head], rng.permutation(middle).ravel(), order[end:]])


@functools.lru_cache(1)
def _fast(tokenizer: str, max_tokens: int) -> Any:
    from tokenizers import Tokenizer

    fast = Tokenizer.from_str(tokenizer)
    fast.enable_truncation(max_tokens)
    fast.no_padding()
    return fast


def _encode(tokenizer: str, max_tokens: int, texts: list[str]) -> list[np.ndarray]:
    """Token ids, cut to `max_tokens`; of a long text only the words that fill them are read."""
    fast, enough = _fast(tokenizer, max_tokens), 12 * max_tokens
    found = []
    for start in range(0, len(texts), 1024):
        whole = texts[start : start + 1024]
        words = [t if len(t) <= enough else t[:enough].rpartition(" ")[0] for t in whole]
        for text, begin, some in zip(whole, words, fast.encode_batch_fast(words), strict=True):
            short = len(begin) < len(text) and len(some) < max_tokens
            ids = fast.encode(text).ids if short else some.ids
            found.append(np.array(ids, np.int32))
    return found


# ---------------------------------------------------------------- into Ray Train, and out of it


@dataclass
class Ingest(ray.train.DataConfig):
    """Deals the stream to as many workers as there are, from the last checkpoint on."""

    plan: Plan
    train: Train
    tokenizer: str
    folder: RunFolder

    def __post_init__(self) -> None:
        super().__init__(enable_shard_locality=False)

    def configure(
        self, datasets: dict[str, Any], world_size: int, *_: Any, **more: Any
    ) -> list[dict[str, Any]]:
        """Called when a group of workers has started; `datasets` only has the stream's name."""
        shared = ray.put((self.plan, self.train, self.tokenizer, world_size))

        def dealt(item: dict[str, Any]) -> Iterator[pa.Table]:
            yield from deal({k: int(v[0]) for k, v in item.items()}, *ray.get(shared))

        todo = work(self.plan, self.train, _last_step(self.folder))
        # After the last step nobody asks for rows, but a dataset has some.
        stream = dataset(todo or work(self.plan, self.train, 0)[:1])
        # What the workers leave; where that is nothing, the reading shares their cores.
        free = int(ray.available_resources().get("CPU", 0))
        stream = stream.map_batches(
            dealt, batch_size=None, num_cpus=min(1, free), concurrency=max(1, free)
        )
        # A block for each row: blocks of like size go to the workers in turn.
        stream.context.target_max_block_size = 1
        stream.context.execution_options.preserve_order = True
        splits = stream.streaming_split(world_size, equal=False)
        return [dict.fromkeys(datasets, split) for split in splits]


def _last_step(folder: RunFolder) -> int:
    """Of the checkpoint that training goes on from; 0 without one."""
    for name in checkpoint.names(folder):
        with contextlib.suppress(checkpoint.DamagedError):  # rank 0 says so, and takes the next too
            return checkpoint.notes(folder, name)["metrics"]["step"]
    return 0


class Reader:
    """A rank's shares of a stream, as loop.train takes them."""

    def __init__(self, shard: Any, rows: int, pad_id: int) -> None:
        self.rows, self.pad_id = rows, pad_id
        self.blocks = self._blocks(shard)
        self.parts: list[tuple[Tokens, np.ndarray]] = []  # and the batch of each row
        self.epoch = self.end = -1
        self.waited_s = 0.0

    def __len__(self) -> int:
        return self.rows

    def shares(self, plan: Train, place: "Place", epoch: int, done: int) -> Iterator[Share]:
        """This rank's part of each global batch of an epoch, without the first `done`."""
        for number in range(done, steps_per_epoch(self.rows, plan)):
            first = number * plan.global_batch
            end = min(first + plan.global_batch, self.rows)
            began = time.perf_counter()
            while self.epoch < epoch or self.end < end:
                self._next(epoch, first, place.rank)
            self.parts = [p for p in self.parts if len(p[1]) and p[1][-1] >= number]
            share = self._share(number, end - first)
            self.waited_s += time.perf_counter() - began
            yield share

    def _blocks(self, shard: Any) -> Iterator[dict[str, Any]]:
        for block in shard.iter_batches(batch_size=None, batch_format="pyarrow"):
            for i in range(len(block)):
                row = block.slice(i, 1)
                lists = ("ids", "lengths", "labels", "batches")
                yield {
                    name: column.flatten().to_numpy() if name in lists else column[0].as_py()
                    for name in row.column_names
                    for column in [row[name].chunk(0)]
                }

    def _next(self, epoch: int, first: int, rank: int) -> None:
        block = next(self.blocks)
        # The first block after a resume may begin before the row that is wanted.
        begin = self.end if self.epoch == epoch else min(first, block["at"])
        fits = (block["epoch"], block["at"]) == (epoch, begin)
        assert fits, f"row {block['at']} of epoch {block['epoch']}, not {begin} of {epoch}"
        assert block["rank"] == rank, f"rank {rank} was dealt what is rank {block['rank']}'s"
        if self.epoch != epoch:
            self.parts = []
        self.epoch, self.end = epoch, block["end"]
        offsets = np.concatenate([[0], np.cumsum(block["lengths"])]).astype(np.int64)
        labels = block["labels"].astype(np.int64)
        self.parts.append((Tokens(block["ids"], offsets, labels, self.pad_id), block["batches"]))

    def _share(self, number: int, size: int) -> Share:
        found = [(tokens, np.flatnonzero(batches == number)) for tokens, batches in self.parts]
        found = [(tokens, mine) for tokens, mine in found if len(mine)]
        if len(found) == 1:
            return Share(found[0][0], found[0][1], size, None)
        tokens = _joined([tokens.take(mine) for tokens, mine in found], self.pad_id)
        return Share(tokens, np.arange(sum(len(mine) for _, mine in found)), size, None)


def _joined(parts: list[Tokens], pad_id: int) -> Tokens:
    """One after the other; a row without meaning where there is none."""
    empty = Tokens(np.array([pad_id], np.int32), np.array([0, 1]), np.array([0]), pad_id)
    parts = parts or [empty]
    lengths = np.concatenate([p.lengths for p in parts])
    return Tokens(
        np.concatenate([p.ids for p in parts]),
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        np.concatenate([p.labels for p in parts]),
        pad_id,
    )

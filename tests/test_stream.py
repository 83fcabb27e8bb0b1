"""Rows that are streamed: each once in every epoch, whatever the files, the width and the place to
go on from; rows that cannot be used are named; a real Ray learns the same from them."""

import gzip
import json
import os
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import changed, processes, reviews, script, wait_for
from rich.console import Console

from workloads import artifacts, ingest, stream
from workloads.config import Data, Run, Target, Task, Train, UserError
from workloads.data import steps_per_epoch
from workloads.loop import Place
from workloads.prepared import prepare

WORDS = sorted({word for text, _ in reviews(100) for word in text.lower().split()})
TOKENIZER = json.dumps(
    {
        "version": "1.0",
        "added_tokens": [],
        "normalizer": {"type": "Lowercase"},
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {
            "type": "WordLevel",
            "vocab": {word: i for i, word in enumerate(["[UNK]", *WORDS])},
            "unk_token": "[UNK]",
        },
    }
)
BOTH = Task.model_validate({"data": {"source": "files", "train": "x", "streaming": True}})


def write(path: Path, rows: list[Any]) -> str:
    """Rows as the path's ending says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"text": text, "label": label}) for text, label in rows]
    table = "\n".join(["text,label", *(f'"{text}",{label}' for text, label in rows)])
    if path.suffix == ".parquet":
        columns = {"text": [t for t, _ in rows], "label": [label for _, label in rows]}
        pq.write_table(pa.table(columns), path, row_group_size=11)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress("\n".join(lines).encode()))
    else:
        path.write_text(table if path.suffix == ".csv" else "\n".join(lines), encoding="utf-8")
    return str(path)


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first pass in this process, and small pieces."""
    monkeypatch.setattr(stream, "PIECE_BYTES", 1000)
    alone = "_on_all_cpus", lambda look, pieces, tell: [look(p) for p in pieces]
    monkeypatch.setattr(stream, *alone)


def survey(folder: Path, **data: Any) -> tuple[Any, stream.Plan]:
    over = {"data.train": str(folder / "rows"), **{f"data.{k}": v for k, v in data.items()}}
    return stream.survey(changed(BOTH, **over), str(folder / "cache"), lambda _: None)


@pytest.fixture
def mixed(tmp_path: Path, here: None) -> Path:
    """100 rows in files of all kinds, in folders."""
    rows = reviews(100)
    for i, name in enumerate(("a.parquet", "b/b.jsonl", "b/c.csv", "d.jsonl.gz")):
        write(tmp_path / "rows" / name, rows[i::4])
    return tmp_path


class Shard:
    """Stands for Ray Data: the blocks of one rank, each W-th of all."""

    def __init__(self, plan: stream.Plan, train: Train, world: int, rank: int, step: int) -> None:
        todo = ingest.work(plan, train, step)
        tables = [t for i in todo for t in ingest.deal(i, plan, train, TOKENIZER, world)]
        self.tables = tables[rank::world]

    def iter_batches(self, **_: Any) -> Any:
        """As Ray's."""
        return iter(self.tables)


def batches(plan: stream.Plan, train: Train, world: int = 1, step: int = 0) -> list[list[Any]]:
    """The rows of each global batch from a step on, put together from the ranks' parts."""
    first, done = divmod(step, steps_per_epoch(len(plan), train))
    ranks = []
    for rank in range(world):
        reader = ingest.Reader(Shard(plan, train, world, rank, step), len(plan), pad_id=0)
        place = Place(rank=rank, world=world)
        spans = [(e, done if e == first else 0) for e in range(first, train.epochs)]
        ranks.append([s for e, d in spans for s in reader.shares(train, place, e, d)])
    return [_together(shares) for shares in zip(*ranks, strict=True)]


def _together(shares: Any) -> list[Any]:
    rows: list[Any] = [None] * shares[0].size
    for rank, share in enumerate(shares):
        assert len(share.tokens) > 0
        parts = [share.tokens.take(np.array([i])) for i in share.mine]
        rows[rank :: len(shares)] = [(tuple(p.ids), int(p.labels[0])) for p in parts]
    return rows


def test_an_epoch_has_every_row_once_and_the_last_batch_is_short(mixed: Path) -> None:
    dataset, plan = survey(mixed)
    assert dataset.train_rows + len(dataset.validation.texts) == 100
    assert len(plan.pieces) > 6
    train = Train(epochs=2, global_batch=8)
    found = batches(plan, train)
    each = steps_per_epoch(len(plan), train)
    assert [len(b) for b in found] == 2 * ([8] * (each - 1) + [len(plan) - 8 * (each - 1)])
    epochs = [Counter(row for b in found[i : i + each] for row in b) for i in (0, each)]
    assert epochs[0] == epochs[1]
    assert sum(epochs[0].values()) == len(plan) == len(epochs[0])
    assert found[:each] != found[each:]


@pytest.mark.parametrize(("world", "step"), [(2, 0), (3, 5), (11, 0), (2, 12), (1, 17)])
def test_width_and_resuming_do_not_change_a_batch(mixed: Path, world: int, step: int) -> None:
    _, plan = survey(mixed)
    train = Train(epochs=2, global_batch=8)
    assert batches(plan, train, world, step) == batches(plan, train)[step:]


def test_rows_of_like_length_share_a_batch_within_a_pool() -> None:
    lengths = np.random.default_rng(0).integers(4, 60, 100)
    order = ingest._order(lengths, 8, 3, np.random.default_rng(1))
    assert sorted(order) == list(range(100))
    full = lengths[order[3:99]].reshape(-1, 8)
    assert np.ptp(full, axis=1).max() < 12
    assert (np.diff(full.min(axis=1)) < 0).any()  # batches themselves are in no order


def test_what_is_held_out_is_never_trained_on(mixed: Path) -> None:
    texts = [text for text, _ in reviews(100)]
    own = write(mixed / "own.jsonl", [*reviews(104)[100:], (texts[7], "good"), (texts[9], "bad")])
    dataset, plan = survey(mixed, validation=own)
    assert (len(plan), dataset.duplicates, len(dataset.validation.texts)) == (98, 2, 6)
    dataset, plan = survey(mixed, validation_fraction=0.3)
    assert 15 < len(dataset.validation.texts) < 45
    assert dataset.duplicates == 0
    assert set(dataset.validation.texts).isdisjoint(dataset.train.texts)


def test_the_only_row_of_a_label_is_trained_on(tmp_path: Path, here: None) -> None:
    for i in range(12):  # by chance one of ten would be held out
        rows = [*reviews(60), (f"something rare {i}", "rare")]
        write(tmp_path / "rows/a.jsonl", rows)
        dataset, plan = survey(tmp_path, validation_fraction=0.4)
        assert dataset.labels == plan.labels == ["bad", "good", "rare"]
        assert "rare" not in dataset.validation.labels
        assert len(plan) + len(dataset.validation.texts) == 61
        tables = [
            t
            for item in ingest.work(plan, Train(epochs=1), 0)
            for t in ingest.deal(item, plan, Train(epochs=1), TOKENIZER, 1)
        ]
        assert sum(len(t["lengths"][0]) for t in tables) == len(plan)


def test_files_that_have_not_changed_are_not_read_twice(
    mixed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, plan = survey(mixed)
    with monkeypatch.context() as patch:
        patch.setattr(stream, "_pass", None)
        again, same = survey(mixed)
    assert again == first
    assert (same.pieces, same.kept) == (plan.pieces, plan.kept)
    write(mixed / "rows/a.parquet", reviews(100)[:88:4])
    assert survey(mixed)[0].fingerprint != first.fingerprint


@pytest.mark.parametrize(
    ("name", "rows", "said"),
    [
        ("b.jsonl", [("fine", "a")] * 40 + [("  ", "b")], "b.jsonl: row 41 .*: 'text' is empty"),
        ("b.parquet", [("fine", 1)] * 30 + [("x", None)], "b.parquet: row 31 .*: 'label' is empty"),
        ("c.csv", [], "c.csv: no column 'text'"),
        ("c.jsonl", [], "c.jsonl: cannot be read: a line is no JSON object"),
        ("c.parquet", [], "c.parquet: cannot be read"),
        ("c.txt", [], "c.txt: a data file ends in"),
        ("d.csv", [("x", "y,a")] * 3, "rows have more fields than the header"),
        ("_c.txt", [], "every row to train on has the label 'a'"),
        (".c", [], "every row to train on has the label 'a'"),
    ],
)
def test_rows_that_cannot_be_used_are_named(
    tmp_path: Path, here: None, name: str, rows: list[Any], said: str
) -> None:
    write(tmp_path / "rows/a.csv", [(text, "a") for text, _ in reviews(40)])
    path = tmp_path / "rows" / name
    if rows:
        write(path, rows)
    else:
        path.write_text("3\n")
    with pytest.raises(UserError, match=said):
        survey(tmp_path)


def test_a_column_that_can_be_no_label_is_told(tmp_path: Path, here: None) -> None:
    rows = [(f"text {i}", f"id-{i // 2}") for i in range(4200)]
    write(tmp_path / "rows/a.jsonl", rows)
    with pytest.raises(UserError, match="different values; at most 2,000 classes"):
        survey(tmp_path)


def test_a_folder_or_pattern_without_files_is_named(tmp_path: Path, mixed: Path) -> None:
    for name in ("nowhere", "rows/*.tsv"):
        with pytest.raises(UserError, match="no such file, nor a folder or pattern"):
            survey(mixed, train=str(tmp_path / name))
    _, found = stream._list(f"{mixed}/rows/*/*.csv")
    assert [i.base_name for i in found] == ["c.csv"]


def test_only_files_are_streamed() -> None:
    with pytest.raises(ValueError, match="data.streaming is true but data.source is 'builtin"):
        Data(streaming=True)


def test_a_stream_is_tokenised_as_rows_in_memory_are(prepared: Any, tiny: Task) -> None:
    some, length = prepared.dataset.train.texts, tiny.data.max_tokens
    words = " ".join(some)
    long = [words, " " * 300 + words, "x" * 300 + words, words.replace(" ", "."), "a " * 300]
    wanted = prepared.tokenizer([*some, *long], truncation=True, max_length=length)["input_ids"]
    tokenizer = prepared.tokenizer.backend_tokenizer.to_str()
    assert [ids.tolist() for ids in ingest._encode(tokenizer, length, [*some, *long])] == wanted


@pytest.mark.parametrize(
    ("cause", "said"),
    [
        ("workloads.config.UserError: a.csv has changed while it was trained on", ": a.csv has"),
        (
            "OSError: AWS Error NETWORK_CONNECTION: no server\n  at x",
            "no server.\nCheck the bucket",
        ),
    ],
)
def test_what_stops_a_training_from_outside_is_told(cause: str, said: str, tmp_path: Path) -> None:
    import ray.train

    from workloads.train import _fit

    class Stops:
        insisting: tuple = ()

        def fit(self) -> None:
            raise ray.train.WorkerGroupError(f"Rank 0:\n{cause}\n", {})

    with pytest.raises(UserError, match="--run one goes on from its last checkpoint") as e:
        _fit(Stops(), artifacts.RunFolder(str(tmp_path), "one"))
    assert said in str(e.value)


# ---------------------------------------------------------------- on a real Ray


@pytest.mark.ray
def test_three_workers_of_which_one_is_killed_learn_what_one_does(
    tmp_path: Path, tiny: Task, laptop: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(3):
        write(tmp_path / f"rows/{i}.parquet", reviews(120)[i::3])
    over = {"data.train": str(tmp_path / "rows"), "data.streaming": True, "model.dropout": 0.0}
    task = changed(tiny, **over, **{"train.epochs": 5, "train.global_batch": 7})
    ready = prepare(task, str(tmp_path / "cache"))
    assert len(ready.stream) + len(ready.held_out) == 120
    soak = script("soak_data")
    with soak.Watch() as watch:
        alone = fit(task, changed(laptop, **{"train.workers": 1}), ready, "stream-1")
    assert {"command", "trainers", "Ray Data"} <= watch.peaks.keys()
    assert sum(watch.peaks.get(kind, 0) for kind in soak.STREAMS) < 2e9
    steps = {"train.workers": 3, "train.checkpoint_every": "9 steps"}
    killer = threading.Thread(target=_kill_one, args=(Path(laptop.ray.storage) / "stream-3",))
    killer.start()
    wide = fit(task, changed(laptop, **steps), ready, "stream-3")
    killer.join()
    assert [m["step"] for m in wide["history"]] == [m["step"] for m in alone["history"]]
    for key in ("loss", "eval_loss"):
        values = [[m[key] for m in result["history"]] for result in (alone, wide)]
        assert values[1] == pytest.approx(values[0], rel=1e-4)


def fit(task: Task, target: Target, ready: Any, name: str) -> dict[str, Any]:
    from workloads import train

    run = Run("tiny", task, "laptop", target)
    folder = artifacts.create(target.ray.storage, run, name)
    return train.fit(run, folder, ready, {}, Console(quiet=True))


def _kill_one(folder: Path) -> None:
    wait_for(lambda: list(folder.glob("train/checkpoints/checkpoint_*/notes.json")))
    os.kill(wait_for(lambda: processes("ray::RayTrainWorker"))[-1], 9)

"""Sources -> rows -> token arrays -> length-grouped padded batches.

Shapes: N rows, B rows in a batch, T tokens (the longest row of the batch), C classes.
"""

import hashlib
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from .config import Data, Train, UserError
from .corpus import docstrings
from .sources import hub_problem, split_revision
from .tables import JSON_LINES, read_file

MOST_CLASSES = 2000  # their confusions are kept with each checkpoint
# With these the hub's library would read whatever lies in the current folder.
_FORMATS = {"csv", "tsv", "json", "jsonl", "parquet", "text", "txt", "arrow", "pandas", "file"}


class Rows(NamedTuple):
    """Texts and their labels, and what to call them in an error."""

    texts: list[str]
    labels: list[str]
    name: str


@dataclass(frozen=True)
class Dataset:
    """What is learned from: both splits, the classes in order, and what was done to the rows."""

    train: Rows
    validation: Rows
    labels: list[str]
    duplicates: int  # rows dropped from train because validation has the same text
    fingerprint: str  # of all texts and labels that are used
    streamed: int | None = None  # training rows in all, where `train` is only a sample of them

    @property
    def train_rows(self) -> int:
        """Rows to train on."""
        return len(self.train.texts) if self.streamed is None else self.streamed

    def summary(self) -> dict[str, Any]:
        """What goes into run.json."""
        return {
            "train_rows": self.train_rows,
            "validation_rows": len(self.validation.texts),
            "labels": self.labels,
            "duplicates_dropped": self.duplicates,
            "fingerprint": self.fingerprint,
        }


@dataclass(frozen=True)
class Tokens:
    """Tokenised rows as three flat arrays, which the object store shares without copying."""

    ids: np.ndarray  # (all tokens,) int32
    offsets: np.ndarray  # (N + 1,) int64: row i is ids[offsets[i]:offsets[i + 1]]
    labels: np.ndarray  # (N,) int64
    pad_id: int

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens per row, (N,) int64."""
        return np.diff(self.offsets)

    def take(self, rows: np.ndarray) -> "Tokens":
        """Only these rows, in this order."""
        ids = [self.ids[self.offsets[r] : self.offsets[r + 1]] for r in rows]
        offsets = np.concatenate([[0], np.cumsum(self.lengths[rows])]).astype(np.int64)
        return replace(self, ids=np.concatenate(ids), offsets=offsets, labels=self.labels[rows])


@dataclass(frozen=True)
class Share:
    """What one rank has of a global batch."""

    tokens: Tokens  # where the rows are; at least one
    mine: np.ndarray  # row numbers in `tokens`; none where ranks are more than rows
    size: int  # rows of the whole global batch
    # (U,) ids that the whole global batch holds, ascending, padding included; None where a rank
    # knows its own rows only.
    words: np.ndarray | None


# ---------------------------------------------------------------- rows


def load(data: Data, seed: int, cache: str) -> Dataset:
    """Reads, checks and splits the rows; `cache` is a folder or URI for the builtin corpus.

    Raises UserError naming the rows that cannot be used.
    """
    train, validation, classes = _read(data, cache)
    if validation is None:
        train, validation = _hold_out(train, data.validation_fraction, seed)
    known = set(train.labels)
    check_known(validation, known, train.name)
    held_out = {text.strip() for text in validation.texts}
    keep = [i for i, text in enumerate(train.texts) if text.strip() not in held_out]
    duplicates = len(train.texts) - len(keep)
    train = Rows([train.texts[i] for i in keep], [train.labels[i] for i in keep], train.name)
    check_left(known - set(train.labels), duplicates, train.name)
    labels = [c for c in classes if c in known] if classes else sorted(known, key=label_order)
    return Dataset(train, validation, labels, duplicates, _fingerprint(train, validation))


def check_known(validation: Rows, known: set[str], name: str) -> None:
    """Raises UserError for validation rows with a label that the training rows do not have."""
    strange = [i for i, label in enumerate(validation.labels) if label not in known]
    if strange:
        names = sorted({validation.labels[i] for i in strange})
        raise UserError(
            f"{validation.name}: {which(strange)}: label {_some(names)} is not in {name}, "
            f"which has {_some(sorted(known))}"
        )


def check_left(lost: set[str], duplicates: int, name: str) -> None:
    """Raises UserError for labels of which validation leaves no row to train on."""
    if lost:
        raise UserError(
            f"{name}: all rows with label {_some(sorted(lost))} have a text that validation has "
            f"too, and are dropped ({duplicates} duplicates); the two splits must differ"
        )


def _read(data: Data, cache: str) -> tuple[Rows, Rows | None, list[str] | None]:
    if data.source == "builtin:docstrings":
        texts, labels = docstrings(cache)
        return Rows(texts, labels, data.source), None, None
    if data.source != "files":
        return _read_hub(data)
    assert data.train is not None  # config's validator
    train = _check(read_file(data.train), data, data.train, least_classes=2)
    validation = None
    if data.validation is not None:
        validation = _check(read_file(data.validation), data, data.validation)
    return train, validation, None


def _check(frame: Any, data: Data, name: str, least_classes: int = 1) -> Rows:
    """A table as Rows; raises UserError naming the rows without a text or a label."""
    check_columns(frame.columns, data, name)
    try:
        texts, labels = (
            [as_text(v) for v in frame[c].astype(object).where(frame[c].notna(), None)]
            for c in (data.text, data.label)
        )
    except (TypeError, ValueError) as e:
        raise UserError(f"{name}: {e}") from None
    return checked(texts, labels, data, name, least_classes)


def checked(
    texts: list[str], labels: list[str], data: Data, name: str, least_classes: int = 1
) -> Rows:
    """Rows; raises UserError naming those without a text or a label."""
    if not texts:
        raise UserError(f"{name}: there are no rows")
    for column, values in ((data.text, texts), (data.label, labels)):
        if bad := [i for i, value in enumerate(values) if not value.strip()]:
            raise UserError(f"{name}: {which(bad)}: '{column}' is empty; fill or remove them")
    if len(set(labels)) < least_classes:
        raise UserError(
            f"{name}: every row has the label '{labels[0]}'; a classifier needs at least two"
        )
    check_count(len(set(labels)), data, name)
    return Rows(texts, labels, name)


def check_count(classes: int, data: Data, name: str) -> None:
    """Raises UserError where what was given as labels has too many values to be some."""
    if classes > MOST_CLASSES:
        raise UserError(
            f"{name}: '{data.label}' has {classes:,} different values; at most {MOST_CLASSES:,} "
            "classes can be told apart here. Is it the column of the labels (task.data.label)?"
        )


def check_columns(columns: Any, data: Data, name: str) -> None:
    """Raises UserError naming the column that a table does not have."""
    for key, column in (("text", data.text), ("label", data.label)):
        if column not in columns:
            raise UserError(
                f"{name}: no column '{column}' (data.{key}); "
                f"there are: {', '.join(map(str, columns))}"
            )


def as_text(value: Any) -> str:
    """A cell as text; '' where it is missing. A column of integers with gaps arrives as floats,
    and one of texts may come as bytes. Raises TypeError for a list or an object."""
    if value is None or (isinstance(value, float) and np.isnan(value)):
        return ""
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, (list, tuple, dict, np.ndarray)):
        raise TypeError(f"a cell is no text but a {type(value).__name__}: {str(value)[:80]}")
    if isinstance(value, (float, np.floating)) and float(value).is_integer():
        value = int(value)
    # A lone surrogate cannot be encoded, and tokenizers refuse it.
    return str(value).encode("utf-8", "replace").decode()


def which(rows: Sequence[int]) -> str:
    """Row numbers in words."""
    shown = ", ".join(str(i + 1) for i in rows[:5])
    more = f" and {len(rows) - 5} more" if len(rows) > 5 else ""
    return f"{'row' if len(rows) == 1 else 'rows'} {shown}{more} (counted from 1, without a header)"


def _some(names: Sequence[str]) -> str:
    return ", ".join(f"'{n}'" for n in names[:5]) + (", ..." if len(names) > 5 else "")


def label_order(label: str) -> tuple[int, int, str]:
    """Integers by value, then strings by alphabet."""
    whole = re.fullmatch(r"-?\d{1,18}", label)
    return (0, int(label), label) if whole else (1, 0, label)


def _fingerprint(*splits: Rows) -> str:
    digest = hashlib.sha256()
    for rows in splits:
        for text, label in zip(rows.texts, rows.labels, strict=True):
            digest.update(f"{len(text)}:{text}{len(label)}:{label}".encode())
        digest.update(b"/")
    return digest.hexdigest()[:16]


def stratified(labels: Sequence[Any] | np.ndarray, count: int, seed: int) -> np.ndarray:
    """`count` row numbers, in order, in which each class has its share and at least one row."""
    _, classes = np.unique(np.asarray(labels), return_inverse=True)
    rng = np.random.default_rng(seed)
    shuffled = rng.permutation(len(classes))
    order = shuffled[np.argsort(classes[shuffled], kind="stable")]
    sizes = np.bincount(classes)
    # Row k of n of its class sits at (k + 1/2) / n: the first `count` of all rows by that are
    # stratified.
    # The first row of each class goes first of all, so that no class is left out.
    rank = np.concatenate([np.arange(n) for n in sizes])
    place = np.where(rank == 0, -1, (rank + 0.5) / np.repeat(sizes, sizes))
    return np.sort(order[np.argsort(place, kind="stable")[:count]])


def _hold_out(rows: Rows, fraction: float, seed: int) -> tuple[Rows, Rows]:
    number = {label: i for i, label in enumerate(sorted(set(rows.labels)))}
    labels = np.asarray([number[label] for label in rows.labels])  # strings would be padded
    _, classes, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    # A class with a single row stays in train.
    can = np.flatnonzero(sizes[classes] > 1)
    if len(can) == 0:
        raise UserError(f"{rows.name}: each label has one row only, so none can be held out")
    count = max(1, round(fraction * len(labels)))
    if count >= len(labels):
        raise UserError(
            f"{rows.name}: data.validation_fraction {fraction} of {len(labels)} rows leaves none "
            "to train on"
        )
    held = can[stratified(labels[can], count, seed)]
    for_training = np.setdiff1d(np.arange(len(labels)), held)
    if lost := sorted(set(rows.labels) - {rows.labels[i] for i in for_training}):
        raise UserError(
            f"{rows.name}: data.validation_fraction {fraction} leaves no training row with label "
            f"{_some(lost)}"
        )
    train, validation = (
        Rows([rows.texts[i] for i in part], [rows.labels[i] for i in part], rows.name)
        for part in (for_training, held)
    )
    return train, validation


# ---------------------------------------------------------------- hub


def _read_hub(data: Data) -> tuple[Rows, Rows | None, list[str] | None]:
    """A dataset of the hub, or of the local cache where the hub does not answer."""
    is_format, is_here = data.source in _FORMATS, Path(data.source).expanduser().exists()
    if is_format or is_here or data.source.endswith((".csv", ".tsv", ".parquet", *JSON_LINES)):
        file = data.train or ("PATH" if is_format else data.source)
        raise UserError(
            f"data.source is '{data.source}', which is no dataset of the hub; for your own files: "
            f"task.data.source=files task.data.train={file}"
        )
    problem = hub_problem()
    import datasets

    if problem:
        datasets.config.HF_HUB_OFFLINE = True
    datasets.disable_progress_bars()
    source, revision = split_revision(data.source)
    try:
        splits = datasets.load_dataset(source, data.subset, revision=revision)
    except (
        Exception
    ) as e:  # the library raises a dozen kinds: each means that these rows cannot be had
        reason = problem or " ".join(str(e).split())
        raise UserError(
            f"dataset '{data.source}' cannot be loaded: {reason}.\n"
            "Use files (task.data.source=files task.data.train=PATH) or the built-in rows "
            "(--task docstrings)"
        ) from None
    train_name = data.train or "train"
    wanted = data.validation or ("validation" if "validation" in splits else None)
    for key, name in (("train", train_name), ("validation", wanted)):
        if name is not None and name not in splits:
            raise UserError(
                f"dataset '{data.source}' has no split '{name}' (data.{key}); "
                f"there are: {', '.join(splits)}"
            )
    train, classes = _hub_rows(splits[train_name], data, f"{source}/{train_name}", 2)
    if wanted is None:
        return train, None, classes
    return train, _hub_rows(splits[wanted], data, f"{source}/{wanted}", 1)[0], classes


def _hub_rows(
    split: Any, data: Data, name: str, least_classes: int
) -> tuple[Rows, list[str] | None]:
    frame = split.select_columns(
        [c for c in (data.text, data.label) if c in split.column_names]
    ).to_pandas()
    classes = getattr(split.features.get(data.label), "names", None)
    if classes:  # integers that stand for names; -1 is the hub's sign for a label kept secret
        frame[data.label] = [classes[i] if i >= 0 else None for i in frame[data.label]]
    return _check(frame, data, name, least_classes), classes


# ---------------------------------------------------------------- tokens and batches


def tokenize(rows: Rows, labels: list[str], tokenizer: Any, max_tokens: int) -> Tokens:
    """All rows as token ids, special tokens included, cut to `max_tokens`."""
    number = {label: i for i, label in enumerate(labels)}
    flat: list[np.ndarray] = []
    lengths = [0]
    for start in range(0, len(rows.texts), 2048):
        batch = rows.texts[start : start + 2048]
        for ids in tokenizer(batch, truncation=True, max_length=max_tokens)["input_ids"]:
            flat.append(np.asarray(ids, dtype=np.int32))
            lengths.append(len(ids))
    return Tokens(
        ids=np.concatenate(flat),
        offsets=np.cumsum(lengths, dtype=np.int64),
        labels=np.asarray([number[label] for label in rows.labels], dtype=np.int64),
        pad_id=tokenizer.pad_token_id or 0,
    )


def steps_per_epoch(rows: int, plan: Train) -> int:
    """Optimizer steps in an epoch; the last batch may be short."""
    return math.ceil(rows / plan.global_batch)


def epoch_batches(tokens: Tokens, batch: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Row numbers of each global batch of an epoch: shuffled, rows of like length together.

    Every row is in exactly one batch; the last may be short. The same on every rank, whatever the
    world size.
    """
    rng = np.random.default_rng((seed, epoch))
    order = rng.permutation(len(tokens))
    lengths = tokens.lengths
    pool = batch * 50  # sorting within pools keeps the order random from epoch to epoch
    batches = []
    for start in range(0, len(order), pool):
        part = order[start : start + pool]
        part = part[np.argsort(lengths[part], kind="stable")]
        batches += [part[i : i + batch] for i in range(0, len(part), batch)]
    # Only a full batch may change places with the short one, or steps would differ between epochs.
    full = [b for b in batches if len(b) == batch]
    short = [b for b in batches if len(b) < batch]
    return [full[i] for i in rng.permutation(len(full))] + short


def eval_batches(tokens: Tokens, batch: int) -> Iterator[np.ndarray]:
    """Row numbers by length, longest first (what does not fit in memory fails at once)."""
    order = np.argsort(-tokens.lengths, kind="stable")
    for start in range(0, len(order), batch):
        yield order[start : start + batch]


def collate(
    tokens: Tokens, rows: np.ndarray, step: int = 1
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows padded to the longest of them: ids (B, T) int64, mask (B, T) int64, labels (B,)
    int64. T is a multiple of `step`, or that of the longest row of all."""
    lengths = tokens.lengths[rows]
    longest = -(-lengths.max() // step) * step
    columns = np.arange(longest if step == 1 else min(longest, tokens.lengths.max()))
    mask = columns < lengths[:, None]
    where = tokens.offsets[rows][:, None] + np.where(mask, columns, 0)
    ids = np.where(mask, tokens.ids[where], tokens.pad_id)
    return ids.astype(np.int64), mask.astype(np.int64), tokens.labels[rows]

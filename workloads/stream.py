"""More rows than memory holds: the files' pieces, and one pass over all of them.

data.streaming: true. The pass counts and checks the rows on all CPUs before anything starts; what
it found is kept in the storage, so nobody waits for it twice. ingest.py takes it from there.
"""

import contextlib
import functools
import hashlib
import io
import itertools
import logging
import pickle
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import ray.data
from pyarrow import fs

from .artifacts import RunFolder
from .config import Data, Task, UserError
from .data import (
    Dataset,
    Rows,
    as_text,
    check_columns,
    check_count,
    check_known,
    check_left,
    checked,
    label_order,
    which,
)
from .sources import filesystem
from .tables import JSON_LINES, check_fields, file_kind, json_object, read_csv

PIECE_BYTES = 8_000_000  # the unit of shuffling and of work
SAMPLE_BYTES = 16_000_000  # of texts for the sweep and a vocabulary
HELD_OUT_BYTES = 5_000_000  # of texts held out where no validation file is given
READ_ROWS = 1024


class Piece(NamedTuple):
    """A part of a file that is read by itself."""

    path: str
    first: int = 0  # row group of a parquet file, byte of plain JSON lines; else the whole file
    last: int = 0


@dataclass
class Found:
    """What the pass saw in a piece."""

    rows: int = 0
    kept: int = 0  # to train on
    labels: Counter[str] = field(default_factory=Counter)  # of those
    digest: int = 0
    empty: dict[str, list[int]] = field(default_factory=dict)  # column -> rows, the first ones
    some: list[tuple[str, str]] = field(default_factory=list)
    held_out: list[tuple[str, str]] = field(default_factory=list)
    problem: str | None = None


@dataclass(frozen=True)
class Plan:
    """All that reading a piece again takes."""

    data: Data
    pieces: list[Piece]
    kept: list[int]  # rows of each piece to train on
    labels: list[str]
    seed: int  # of the split
    held_out: np.ndarray  # hashes of the texts not to train on, sorted uint64

    def __len__(self) -> int:
        return sum(self.kept)


# ---------------------------------------------------------------- the pass over all files


def survey(task: Task, cache: str, tell: Callable[[str], None]) -> tuple[Dataset, Plan]:
    """Counts and checks all rows on all CPUs, or takes what an earlier pass over the same files
    left in `cache`, a folder or URI. Raises UserError naming file and row."""
    data, seed = task.data, task.train.seed
    assert data.train is not None  # config's validator
    files, infos = _list(data.train)
    own = _list(data.validation)[1] if data.validation else []
    key = [(i.path, i.size, str(i.mtime_ns)) for i in (*infos, *own)]
    name = hashlib.sha256(repr([key, data.model_dump(), seed]).encode()).hexdigest()[:16]
    store = RunFolder(*cache.rsplit("/", 1))
    if not store.has(f"stream-{name}.json"):
        _keep(store, f"stream-{name}", *_pass(data, seed, infos, files, tell))
    return _kept(store, f"stream-{name}", data, seed)


def _list(path: str) -> tuple[fs.FileSystem, list[fs.FileInfo]]:
    """The data files of a folder, a pattern, or the one file; in the order of their names."""
    files, inner = filesystem(path)
    top = re.split(r"[*?[]", inner)[0]
    if top != inner:
        top = top.rpartition("/")[0]
    with _reading(path):
        found = [files.get_file_info(top)]
        if found[0].type == fs.FileType.Directory:
            found = files.get_file_info(fs.FileSelector(top, recursive=True))
    found = [i for i in found if i.is_file and not re.match(r"[._]", i.base_name)]
    if top != inner:
        found = [i for i in found if fnmatch(i.path, inner)]
    if not found:
        raise UserError(f"{path}: no such file, nor a folder or pattern with files in it")
    return files, sorted(found, key=lambda i: i.path)


def _cut(files: fs.FileSystem, info: fs.FileInfo) -> tuple[list[Piece], int]:
    """The pieces of a file, and its bytes once they are unpacked."""
    kind = file_kind(info.path)
    if kind == ".parquet":
        with _reading(info.path), files.open_input_file(info.path) as file:
            return _row_groups(info.path, file)
    if kind in JSON_LINES and info.path.lower().endswith(kind):
        starts = range(0, info.size, PIECE_BYTES)
        return [Piece(info.path, s, min(s + PIECE_BYTES, info.size)) for s in starts], info.size
    packed = 1 if info.path.lower().endswith(kind) else 5
    return [Piece(info.path)], info.size * packed


def _row_groups(path: str, file: Any) -> tuple[list[Piece], int]:
    import pyarrow.parquet as pq

    found = pq.ParquetFile(file).metadata
    sizes = [found.row_group(i).total_byte_size for i in range(found.num_row_groups)]
    pieces, first, held = [], 0, 0
    for i, size in enumerate(sizes):
        held += size
        if held >= PIECE_BYTES or i == len(sizes) - 1:
            pieces.append(Piece(path, first, i + 1))
            first, held = i + 1, 0
    return pieces, sum(sizes)


def _pass(
    data: Data, seed: int, infos: list[Any], files: Any, tell: Callable[[str], None]
) -> tuple[list[Piece], list[Found], Rows]:
    """Looks at all pieces at once, and raises what is wrong with them."""
    from concurrent.futures import ThreadPoolExecutor

    assert data.train is not None
    with ThreadPoolExecutor(16) as pool:  # of waiting for a remote storage
        cuts = list(pool.map(functools.partial(_cut, files), infos))
    pieces = [piece for cut, _ in cuts for piece in cut]
    size = max(1, sum(size for _, size in cuts))
    held = _read_all(data) if data.validation else None
    fraction = 0 if held else min(data.validation_fraction, HELD_OUT_BYTES / size)
    known = hashes(held.texts if held else [], seed)
    tell(f"data: a first pass over {len(infos)} file(s), {size / 1e6:,.0f} MB")
    found = _on_all_cpus(_Look(data, seed, known, fraction, SAMPLE_BYTES / size), pieces, tell)
    _complain(pieces, found)
    if len(pieces) > 1 and all(len(f.labels) < 2 for f in found):
        tell("data: warning: the rows are sorted by label, which learns badly; shuffle the files")
    labels = sum((f.labels for f in found), Counter[str]())
    check_count(len(labels), data, str(data.train))
    if held is None:
        _give_back(found, set(labels))
        labels = sum((f.labels for f in found), Counter[str]())
        out = [row for f in found for row in f.held_out]
        held = Rows([t for t, _ in out], [label for _, label in out], data.train)
        if not out:
            raise UserError(f"{data.train}: too few rows to hold some out; give data.validation")
        check_left(set(held.labels) - set(labels), 0, data.train)
    if len(labels) < 2:
        raise UserError(
            f"{data.train}: every row to train on has the label '{min(labels, default='')}'; a "
            "classifier needs at least two"
        )
    check_known(held, set(labels), data.train)
    return pieces, found, held


def _give_back(found: list[Found], trained: set[str]) -> None:
    """Trains on the few rows of a label all of which were to be held out; with a text that others
    have too, that cannot be."""
    out = {(text.strip(), label in trained) for f in found for text, label in f.held_out}
    rare = {text for text, known in out if not known and (text, True) not in out}
    for f in found:
        back = [row for row in f.held_out if row[0].strip() in rare]
        f.held_out = [row for row in f.held_out if row[0].strip() not in rare]
        f.kept += len(back)
        f.labels.update(label for _, label in back)


def _on_all_cpus(
    look: Callable[[Piece], Found], pieces: list[Piece], tell: Callable[[str], None]
) -> list[Found]:
    def one(item: dict[str, Any]) -> dict[str, Any]:
        return {"at": item["at"], "found": pickle.dumps(look(Piece(*pieces[item["at"]])))}

    found: dict[int, Found] = {}
    rows, told = 0, time.monotonic()
    work = [{"at": i} for i in range(len(pieces))]
    for row in dataset(work).map(one).iter_rows():
        found[row["at"]] = pickle.loads(row["found"])
        rows += found[row["at"]].rows
        if time.monotonic() - told > 10:
            told = time.monotonic()
            tell(f"data: {100 * len(found) / len(pieces):.0f}% seen, {rows:,} rows")
    return [found[i] for i in range(len(pieces))]


def dataset(work: list[dict[str, Any]]) -> Any:
    """One task for each piece of work, in order; without bars and logs on the terminal."""
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    return ray.data.from_items(work, override_num_blocks=len(work))


@dataclass(frozen=True)
class _Look:
    """Counts and checks the rows of a piece."""

    data: Data
    seed: int
    known: np.ndarray  # hashes of the texts of a validation file
    held_out: float  # share of the texts, where there is no such file
    some: float

    def __call__(self, piece: Piece) -> Found:
        found = Found()
        try:
            for texts, labels in cells(self.data, piece):
                self._add(found, texts, labels)
        except UserError as e:
            found.problem = str(e)
        return found

    def _add(self, found: Found, texts: list[str], labels: list[str]) -> None:
        for column, values in ((self.data.text, texts), (self.data.label, labels)):
            bad = [found.rows + i for i, value in enumerate(values) if not value.strip()]
            found.empty[column] = found.empty.get(column, []) + bad
        own = hashes(texts, self.seed)
        place = own / 2**64  # a text's, in 0 to 1
        keep = (place >= self.held_out) & ~np.isin(own, self.known)
        rows = list(zip(texts, labels, strict=True))
        found.held_out += [rows[i] for i in np.flatnonzero(place < self.held_out)]
        some = keep & (place < self.held_out + self.some)
        found.some += [rows[i] for i in np.flatnonzero(some)]
        found.labels.update(labels[i] for i in np.flatnonzero(keep))
        found.rows, found.kept = found.rows + len(texts), found.kept + int(keep.sum())
        digests = own * np.uint64(31) + hashes(labels, self.seed)
        found.digest = (found.digest + int(digests.sum(dtype=np.uint64))) % 2**64


def _complain(pieces: list[Piece], found: list[Found]) -> None:
    """Raises UserError for the first file with rows that cannot be used."""
    before = Counter[str]()
    for piece, f in zip(pieces, found, strict=True):
        if f.problem:
            raise UserError(f.problem)
        for column, rows in f.empty.items():
            if rows:
                said = which([before[piece.path] + i for i in rows])
                raise UserError(f"{piece.path}: {said}: '{column}' is empty; fill or remove them")
        before[piece.path] += f.rows
    if not sum(before.values()):
        raise UserError(f"{pieces[0].path if pieces else 'data.train'}: there are no rows")


def _keep(store: RunFolder, name: str, pieces: list[Piece], found: list[Found], held: Rows) -> None:
    """The mark comes last: the JSON file."""
    import pyarrow.parquet as pq

    some = [row for f in found for row in f.some] or [row for f in found for row in f.held_out]
    texts, labels = [t for t, _ in some], [label for _, label in some]
    table = {"text": texts + held.texts, "label": labels + held.labels}
    store.files.create_dir(store.path, recursive=True)
    pq.write_table(pa.table(table), f"{store.path}/{name}.parquet", filesystem=store.files)
    digest = repr([(f.rows, f.digest) for f in found]) + "".join(held.texts)
    known = {
        "pieces": [[*piece, f.kept] for piece, f in zip(pieces, found, strict=True)],
        "labels": sorted(set().union(*(f.labels for f in found)), key=label_order),
        "rows": sum(f.rows for f in found),
        "some": len(some),
        "held_out": sum(len(f.held_out) for f in found),
        "validation": held.name,
        "fingerprint": hashlib.sha256(digest.encode()).hexdigest()[:16],
    }
    store.write(f"{name}.json", known)


def _kept(store: RunFolder, name: str, data: Data, seed: int) -> tuple[Dataset, Plan]:
    import pyarrow.parquet as pq

    known = store.read(f"{name}.json")
    table = pq.read_table(f"{store.path}/{name}.parquet", filesystem=store.files)
    some = known["some"]
    texts, labels = (table[column].to_pylist() for column in ("text", "label"))
    held_out = Rows(texts[some:], labels[some:], known["validation"])
    kept = [piece[-1] for piece in known["pieces"]]
    dataset = Dataset(
        Rows(texts[:some], labels[:some], str(data.train)),
        held_out,
        known["labels"],
        known["rows"] - sum(kept) - known["held_out"],
        known["fingerprint"],
        streamed=sum(kept),
    )
    pieces = [Piece(*piece[:-1]) for piece in known["pieces"]]
    drop = np.unique(hashes(held_out.texts, seed))
    return dataset, Plan(data, pieces, kept, known["labels"], seed, drop)


def hashes(texts: list[str], seed: int) -> np.ndarray:
    """A number for each text, (N,) uint64: the same everywhere, evenly spread."""
    from pandas.util import hash_array

    column = np.array([*(t.strip() for t in texts), None], dtype=object)[:-1]
    return hash_array(column, hash_key=f"{seed:016d}", categorize=False)


# ---------------------------------------------------------------- reading a piece


def _read_all(data: Data) -> Rows:
    """The validation rows, which memory has to hold."""
    assert data.validation is not None
    files, infos = _list(data.validation)
    pieces = [piece for info in infos for piece in _cut(files, info)[0]]
    own = data.model_copy(update={"train": data.validation})
    parts = [part for piece in pieces for part in cells(own, piece)]
    texts, labels = ([value for part in parts for value in part[i]] for i in (0, 1))
    return checked(texts, labels, data, data.validation)


@contextlib.contextmanager
def _reading(path: str) -> Iterator[None]:
    """What goes wrong in reading a file, as a UserError."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, TypeError, KeyError, OSError, pa.ArrowException) as e:
        raise UserError(f"{path}: cannot be read: {' '.join(str(e).split())[:300]}") from None


def cells(data: Data, piece: Piece) -> Iterator[tuple[list[str], list[str]]]:
    """Texts and labels of a piece, some thousand rows at a time."""
    assert data.train is not None
    files, _ = filesystem(data.train)
    kind = file_kind(piece.path)
    read = _parquet if kind == ".parquet" else _json if kind in JSON_LINES else _csv
    with _reading(piece.path):
        for texts, labels in read(files, data, piece):
            yield [as_text(v) for v in texts], [as_text(v) for v in labels]


def _parquet(files: Any, data: Data, piece: Piece) -> Iterator[tuple[list[Any], list[Any]]]:
    import pyarrow.parquet as pq

    with files.open_input_file(piece.path) as file:
        # A buffer: without it a whole row group would be in memory.
        found = pq.ParquetFile(file, buffer_size=1 << 20)
        check_columns(found.schema_arrow.names, data, piece.path)
        for part in found.iter_batches(
            READ_ROWS, range(piece.first, piece.last), [data.text, data.label]
        ):
            yield part[data.text].to_pylist(), part[data.label].to_pylist()


def _json(files: Any, data: Data, piece: Piece) -> Iterator[tuple[list[Any], list[Any]]]:
    lines = _lines(files, piece)
    while part := [json_object(line) for line in itertools.islice(lines, READ_ROWS)]:
        check_columns({key for row in part for key in row}, data, piece.path)
        yield [row.get(data.text) for row in part], [row.get(data.label) for row in part]


def _lines(files: Any, piece: Piece) -> Iterator[bytes]:
    """The lines that begin in a piece; blank ones are left out."""
    if not piece.last:
        with io.BufferedReader(files.open_input_stream(piece.path)) as file:
            yield from (line for line in file if line.strip())
        return
    with io.BufferedReader(files.open_input_file(piece.path)) as file:
        if piece.first:  # a line that begins before it is another piece's
            file.seek(piece.first - 1)
            file.readline()
        while file.tell() < piece.last and (line := file.readline()):
            if line.strip():
                yield line


def _csv(files: Any, data: Data, piece: Piece) -> Iterator[tuple[list[Any], list[Any]]]:
    with files.open_input_stream(piece.path, compression="detect") as file:
        for part in read_csv(file, file_kind(piece.path), chunksize=READ_ROWS):
            check_fields(part, piece.path)
            check_columns(part.columns, data, piece.path)
            yield part[data.text].tolist(), part[data.label].tolist()

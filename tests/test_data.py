"""Rows, splits, tokens and batches; the builtin corpus from its pieces."""

import gzip
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import reviews

from workloads import data
from workloads.config import Data, UserError
from workloads.data import Rows, Tokens

TWO = [("a fine film", "good"), ("a poor film", "bad")]


def files(train: Path | str, validation: Path | str | None = None, **more: Any) -> Data:
    """Where a user's own files are."""
    held_out = None if validation is None else str(validation)
    return Data(source="files", train=str(train), validation=held_out, **more)


def write(
    path: Path, rows: list[tuple[Any, Any]], names: tuple[str, str] = ("text", "label")
) -> Path:
    """Rows as a file of the kind that its name ends in; texts are quoted where there is a csv."""
    kind = path.name.removesuffix(".gz").rpartition(".")[2].lower()
    columns = [list(column) for column in zip(*rows, strict=True)] if rows else [[], []]
    if kind == "parquet":
        pq.write_table(pa.table(dict(zip(names, columns, strict=True))), path)
        return path
    lines = [json.dumps(dict(zip(names, row, strict=True))) for row in rows]
    if kind in ("csv", "tsv"):
        sep = "\t" if kind == "tsv" else ","
        lines = [sep.join(names), *(f'"{text}"{sep}{label}' for text, label in rows)]
    raw = "\n".join([*lines, ""]).encode()
    path.write_bytes(gzip.compress(raw) if path.name.endswith(".gz") else raw)
    return path


def load(source: Data, seed: int = 0) -> data.Dataset:
    """The rows of files; the cache is for the builtin corpus only."""
    return data.load(source, seed, "unused")


def problem(source: Data) -> str:
    """What a user sees of rows that cannot be used."""
    with pytest.raises(UserError) as e:
        load(source)
    return str(e.value)


def tokens(*lengths: int) -> Tokens:
    """Rows of these lengths; row i holds i * 100, i * 100 + 1, ..."""
    rows = [100 * i + np.arange(n) for i, n in enumerate(lengths, start=1)]
    return Tokens(
        ids=np.concatenate(rows).astype(np.int32),
        offsets=np.cumsum([0, *lengths], dtype=np.int64),
        labels=np.arange(len(lengths), dtype=np.int64) % 2,
        pad_id=0,
    )


# ---------------------------------------------------------------- files


@pytest.mark.parametrize(
    "name",
    ["a.csv", "a.tsv", "a.jsonl", "a.ndjson", "a.parquet", "a.csv.gz", "a.jsonl.gz"]
    + ["A.CSV", "A.PARQUET", "a.b.csv"],
)
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, name: str):
    rows = load(files(write(tmp_path / name, reviews(20)), write(tmp_path / f"v{name}", TWO)))
    assert list(zip(rows.train.texts, rows.train.labels, strict=True)) == reviews(20)
    assert list(zip(rows.validation.texts, rows.validation.labels, strict=True)) == TWO
    assert rows.labels == ["bad", "good"]


@pytest.mark.parametrize(
    "names", [("sentence", "sentiment"), ("Text with spaces", "ä"), ("0", "1")]
)
def test_columns_may_have_any_name(tmp_path: Path, names: tuple[str, str]):
    path = write(tmp_path / "rows.csv", reviews(20), names)
    rows = load(files(path, text=names[0], label=names[1]))
    assert rows.labels == ["bad", "good"]


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([10, 9, -1], ["-1", "9", "10"]),
        ([0, 1, 2], ["0", "1", "2"]),
        (["b", "B", "a"], ["B", "a", "b"]),
        (["x", "3", "20"], ["3", "20", "x"]),
        ([True, False], ["False", "True"]),
    ],
)
def test_labels_are_strings_in_order_with_integers_by_value(
    tmp_path: Path, ending: str, labels: list[Any], expected: list[str]
):
    kind = type(labels[0])
    rows = [(f"{text} {i}", kind(label)) for i, label in enumerate(labels) for text in ("a", "b")]
    assert load(files(write(tmp_path / f"rows.{ending}", rows))).labels == expected


@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl", "parquet"])
def test_texts_and_labels_that_look_like_something_else_survive(tmp_path: Path, ending: str):
    texts = ["None", "NA", "007", "nan", "true", "1e5", "null", "2020-01-01", "-"]
    labels = ["01", "NA", "1.50"] * 3
    train = write(tmp_path / f"rows.{ending}", list(zip(texts, labels, strict=True)))
    held_out = write(tmp_path / f"held_out.{ending}", [("1.0", "NA")])
    rows = load(files(train, held_out))
    assert (rows.train.texts, rows.train.labels) == (texts, labels)
    assert (rows.validation.texts, rows.labels) == (["1.0"], ["01", "1.50", "NA"])


@pytest.mark.parametrize("ending", ["csv", "tsv"])
def test_a_byte_order_mark_is_not_a_part_of_the_first_column(tmp_path: Path, ending: str):
    path = write(tmp_path / f"rows.{ending}", reviews(20))
    path.write_bytes("\ufeff".encode() + path.read_bytes())
    assert load(files(path)).labels == ["bad", "good"]


def test_a_quoted_text_may_hold_commas_quotes_and_lines(tmp_path: Path):
    path = tmp_path / "rows.csv"
    path.write_text('text,label\n"one, ""two""\nthree",a\nfour,b\n"five,",a\nsix,b\n')
    rows = load(files(path, validation_fraction=0.5))
    assert sorted(rows.train.texts + rows.validation.texts)[2] == 'one, "two"\nthree'


@pytest.mark.parametrize(
    "rows",
    [
        'text\tlabel\n"Oh, well\tbad\nso good\tgood\nhe said "yes" to it\tgood\nfine\tgood\n',
        'label\ttext\nbad\t"Oh, well\ngood\tso "good" again\nbad\tnot "so" good\n',
    ],
)
def test_rows_that_a_quote_made_one_text_of_are_refused(tmp_path: Path, rows: str):
    path = tmp_path / "rows.tsv"
    path.write_text(rows)
    with pytest.raises(UserError, match="a quote at the beginning makes one text of 'Oh, well"):
        load(files(path))


def test_a_quoted_text_of_a_tsv_may_hold_tabs_and_lines(tmp_path: Path):
    path = tmp_path / "rows.tsv"
    texts = ["one\ttwo\nthree\tfour", "a\tb\tc\nd", "e\nf", "five", "six", "seven"]
    pd.DataFrame({"text": texts, "label": list("ababab")}).to_csv(path, sep="\t", index=False)
    rows = load(files(path, validation_fraction=0.5))
    assert sorted(rows.train.texts + rows.validation.texts) == sorted(texts)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.csv", "text,label\n,x\nb,y\n  ,x\n", "rows 1, 3 (COUNTED): 'text' is empty"),
        ("a.csv", "text,label\na,\nb,y\n", "row 1 (COUNTED): 'label' is empty"),
        ("a.csv", "text,label\na,x\nb\n", "row 2 (COUNTED): 'label' is empty"),
        ("a.csv", "text,label\n" + ",x\n" * 9, "rows 1, 2, 3, 4, 5 and 4 more (COUNTED)"),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text": "b", "label": null}', "row 2 (COUNTED)"),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"label": 2}\n', "'text' is empty"),
        ("a.csv", "texts,label\na,x\n", "no column 'text' (data.text); there are: texts, label"),
        ("a.csv", "text;label\na;x\n", "no column 'text' (data.text); there are: text;label"),
        ("a.tsv", "text\tkind\na\tx\n", "no column 'label' (data.label); there are: text, kind"),
        ("a.csv", "text,label\na,x\nb,x\n", "every row has the label 'x'"),
        ("a.csv", "text,label\n", "there are no rows"),
        ("a.jsonl", "\n", "there are no rows"),
        ("a.csv", "", "cannot be read: "),
        ("a.csv", "text,label\na,x,y\nb,x,y\n", "rows have more fields than the header"),
        ("a.csv", "text,label\na,x\nb,y,z\n", "line 3, saw 3"),
        ("a.csv", 'text,label\n"a,x\nb,y\n', "cannot be read: "),
        ("a.jsonl", '{"text": "a", "label"\n', "cannot be read: "),
        ("a.jsonl", '{"text": "a", "label": 1}\n[1, 2]\n', "a line is no JSON object: b'[1, 2]"),
        ("a.json", '[{"text": "a", "label": 1}]', "write one object a line"),
        ("a.json", '[\n  {"text": "a"}\n]', "write one object a line"),
        ("a.csv", "text,label\na, b,x\nc, d,y\n", "a.csv: rows have more fields than the header"),
        ("a.parquet", "no parquet", "cannot be read: "),
        ("a.csv.gz", "no gzip", "cannot be read: "),
        ("a.txt", "", "a data file ends in .csv, .tsv, .jsonl or .parquet"),
        ("a.xlsx", "", "a data file ends in .csv, .tsv, .jsonl or .parquet"),
        ("a", "", "a data file ends in .csv, .tsv, .jsonl or .parquet"),
    ],
)
def test_rows_that_cannot_be_used_are_named_with_their_file(
    tmp_path: Path, name: str, content: str, expected: str
):
    (tmp_path / name).write_text(content)
    said = problem(files(tmp_path / name))
    assert said.startswith(f"{tmp_path / name}: ")
    assert expected.replace("COUNTED", "counted from 1, without a header") in said


@pytest.mark.parametrize("cell", [["a", "b"], {"a": 1}])
def test_a_cell_that_is_no_text_is_told(tmp_path: Path, cell: Any):
    rows = pa.table({"text": [cell, cell], "label": ["x", "y"]})
    pq.write_table(rows, tmp_path / "a.parquet")
    assert "a.parquet: a cell is no text but a " in problem(files(tmp_path / "a.parquet"))


def test_json_lines_are_read_as_they_are(tmp_path: Path):
    lines = [b'\xef\xbb\xbf{"text": "2020-01-02", "label": 36893488147419103232, "0": null}']
    lines += [b'{"text": true, "label": 1.0}', b'{"label": 3, "text": "\\ud800 x"}']
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    rows = data.read_file(str(tmp_path / "a.jsonl"))
    assert [data.as_text(v) for v in rows["text"]] == ["2020-01-02", "True", "? x"]
    assert [data.as_text(v) for v in rows["label"]] == ["36893488147419103232", "1", "3"]


def test_bytes_and_numbered_columns_of_a_parquet_file_are_read(tmp_path: Path):
    cells = {"0": [f"caf\u00e9 {i}".encode() for i in range(20)], "1": [b"a", b"b"] * 10}
    pq.write_table(pa.table(cells), tmp_path / "a.parquet")
    frame = pd.read_parquet(tmp_path / "a.parquet").rename(columns={"0": 0, "1": 1})
    frame.to_parquet(tmp_path / "b.parquet")
    for name in ("a.parquet", "b.parquet"):
        rows = load(files(tmp_path / name, text="0", label="1"))
        assert rows.labels == ["a", "b"]
        assert {text[:4] for text in rows.train.texts} == {"caf\u00e9"}


def test_a_column_that_can_be_no_label_is_told(tmp_path: Path):
    rows = write(tmp_path / "rows.jsonl", [(f"text {i}", f"id-{i}") for i in range(2001)])
    said = problem(files(rows))
    assert "'label' has 2,001 different values; at most 2,000 classes" in said
    assert "task.data.label" in said


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl"])
def test_a_file_that_is_not_utf8_is_named_with_the_byte(tmp_path: Path, name: str):
    path = write(tmp_path / name, TWO)
    at = path.read_bytes().index(b"film")
    path.write_bytes(path.read_bytes().replace(b"film", "fílm".encode("latin-1")))
    assert problem(files(path)).startswith(f"{path}: not UTF-8 at byte {at + 1}; ")


@pytest.mark.parametrize("column", ["text", "label"])
@pytest.mark.parametrize("kind", ["string", "Int64", "object"])
def test_a_missing_cell_of_a_parquet_file_is_missing(tmp_path: Path, column: str, kind: str):
    cells = {"text": [11, 12, 13], "label": [1, 2, 1]}
    cells[column] = [*cells[column][:2], None]
    frame = pd.DataFrame({k: pd.array(v, dtype="Int64") for k, v in cells.items()})
    frame.astype(kind).to_parquet(tmp_path / "rows.parquet")
    said = problem(files(tmp_path / "rows.parquet"))
    assert f"row 3 (counted from 1, without a header): '{column}' is empty" in said


@pytest.mark.parametrize("key", ["train", "validation"])
def test_a_missing_file_is_named_with_the_place_that_was_looked_at(
    rows_csv: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
):
    monkeypatch.chdir(tmp_path)
    there = str(rows_csv())
    source = files("no.csv") if key == "train" else files(there, "no.csv")
    assert problem(source) == f"no.csv: no such file (looked for {tmp_path}/no.csv)"


def test_a_label_that_only_validation_has_is_named(tmp_path: Path):
    train = write(tmp_path / "train.csv", reviews(20))
    held_out = write(tmp_path / "validation.csv", [*TWO, ("so so", "medium"), ("hm", "odd")])
    said = problem(files(train, held_out))
    assert said.startswith(f"{held_out}: rows 3, 4 (counted from 1, without a header): ")
    assert f"label 'medium', 'odd' is not in {train}, which has 'bad', 'good'" in said


def test_a_path_may_be_a_uri_or_start_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    path = write(tmp_path / "rows.csv", reviews(20))
    prints = {load(files(p)).fingerprint for p in (path, f"file://{path}", "~/rows.csv")}
    assert len(prints) == 1


# ---------------------------------------------------------------- splits


def test_texts_that_validation_has_too_are_dropped_from_train_and_counted(tmp_path: Path):
    train = write(tmp_path / "train.csv", [*reviews(20), ("a fine film ", "good")])
    held_out = write(tmp_path / "validation.csv", [*TWO, reviews(20)[3]])
    rows = load(files(train, held_out))
    assert rows.duplicates == 2
    assert rows.train.texts == [t for i, (t, _) in enumerate(reviews(20)) if i != 3]
    assert rows.validation.texts == [t for t, _ in TWO] + [reviews(20)[3][0]]


def test_the_same_file_for_both_splits_is_refused(rows_csv: Callable[..., Path]):
    said = problem(files(rows_csv(), rows_csv()))
    assert "all rows with label 'bad', 'good'" in said
    assert "the two splits must differ" in said


def test_a_split_depends_on_the_seed_only(rows_csv: Callable[..., Path]):
    source = files(rows_csv(60))
    first, again, other = (load(source, seed).validation.texts for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_a_split_is_stratified_and_holds_every_row_once(rows_csv: Callable[..., Path]):
    rows = load(files(rows_csv(60), validation_fraction=0.2))
    assert Counter(rows.validation.labels) == {"good": 6, "bad": 6}
    assert sorted(rows.train.texts + rows.validation.texts) == sorted(t for t, _ in reviews(60))
    assert rows.duplicates == 0


def test_a_class_with_a_single_row_stays_in_train(tmp_path: Path):
    path = write(tmp_path / "rows.csv", [*reviews(20), ("one of its kind", "rare")])
    for seed in range(5):
        rows = load(files(path, validation_fraction=0.5), seed)
        assert "rare" in rows.train.labels
        assert "rare" not in rows.validation.labels


@pytest.mark.parametrize(
    ("rows", "fraction", "expected"),
    [
        ([("a", "x"), ("b", "y")], 0.5, "each label has one row only"),
        ([("a", "x"), ("b", "x"), ("c", "y"), ("d", "y")], 0.9, "0.9 of 4 rows leaves none"),
        ([(c, c in "ab") for c in "abcdefghij"], 0.8, "leaves no training row with label 'True'"),
    ],
)
def test_a_split_that_leaves_nothing_to_learn_from_is_refused(
    tmp_path: Path, rows: list[tuple[str, Any]], fraction: float, expected: str
):
    path = write(tmp_path / "rows.csv", rows)
    assert expected in problem(files(path, validation_fraction=fraction))


def test_the_fingerprint_changes_with_any_label_text_or_split(tmp_path: Path):
    rows = reviews(20)
    variants = [
        rows,
        [(rows[0][0], "bad"), *rows[1:]],
        [(rows[0][0] + "!", "good"), *rows[1:]],
        rows[:-2],
    ]
    held_out = write(tmp_path / "validation.csv", TWO)
    prints = [
        load(files(write(tmp_path / "train.csv", variant), held_out)).fingerprint
        for variant in [*variants, rows]
    ]
    assert len(set(prints)) == 4
    assert prints[0] == prints[-1]


@pytest.mark.parametrize("count", [4, 5, 11, 40, 103])
def test_a_stratified_part_keeps_every_class(count: int):
    labels = ["a"] * 80 + ["b"] * 20 + ["c"] * 2 + ["d"]
    for seed in range(5):
        rows = data.stratified(labels, count, seed)
        assert list(rows) == sorted(set(rows))
        assert len(rows) == count
        assert {labels[i] for i in rows} == set("abcd")


def test_a_stratified_part_has_each_class_by_its_share():
    labels = [0, 1, 1, 1] * 25
    taken = Counter(labels[i] for i in data.stratified(labels, 40, seed=3))
    assert taken == {0: 10, 1: 30}
    assert len(data.stratified(labels, 1000, seed=3)) == 100


def test_what_goes_into_run_json_is_plain(rows_csv: Callable[..., Path]):
    rows = load(files(rows_csv(40)))
    assert json.loads(json.dumps(rows.summary())) == {
        "train_rows": 36,
        "validation_rows": 4,
        "labels": ["bad", "good"],
        "duplicates_dropped": 0,
        "fingerprint": rows.fingerprint,
    }


# ---------------------------------------------------------------- tokens and batches


@pytest.fixture(scope="module")
def some() -> Tokens:
    """1,003 rows of 1 to 30 tokens."""
    lengths = np.random.default_rng(0).integers(1, 31, 1003)
    return tokens(*map(int, lengths))


@pytest.mark.parametrize("batch", [1, 7, 64, 1003, 5000])
def test_a_row_is_in_exactly_one_batch_of_an_epoch(some: Tokens, batch: int):
    batches = data.epoch_batches(some, batch, seed=1, epoch=0)
    assert sorted(np.concatenate(batches)) == list(range(len(some)))
    *sizes, last = [len(b) for b in batches]
    assert sizes == [batch] * ((len(some) - 1) // batch)
    assert last == len(some) - sum(sizes)


def test_an_epoch_is_the_same_whenever_it_is_asked_for(some: Tokens):
    one, two = (data.epoch_batches(some, 16, seed=1, epoch=3) for _ in range(2))
    assert [list(b) for b in one] == [list(b) for b in two]


@pytest.mark.parametrize(("seed", "epoch"), [(1, 1), (2, 0)])
def test_epochs_and_seeds_differ_in_their_batches(some: Tokens, seed: int, epoch: int):
    first = {frozenset(b.tolist()) for b in data.epoch_batches(some, 16, 1, 0)}
    other = {frozenset(b.tolist()) for b in data.epoch_batches(some, 16, seed, epoch)}
    assert not first & other


def test_rows_of_like_length_share_a_batch(some: Tokens):
    def padded(batches: list[np.ndarray]) -> int:
        return sum(len(b) * int(some.lengths[b].max()) for b in batches)

    grouped = padded(data.epoch_batches(some, 16, 0, 0))
    asis = padded([np.arange(i, min(i + 16, len(some))) for i in range(0, len(some), 16)])
    assert grouped < 1.1 * some.lengths.sum() < asis


def test_the_lengths_of_batches_have_no_order(some: Tokens):
    few = some.take(np.arange(480))  # sorted together, as at most 50 batches are
    longest = [few.lengths[b].max() for b in data.epoch_batches(few, 16, 0, 0)]
    assert longest != sorted(longest)


def test_an_evaluation_sees_every_row_once_longest_first(some: Tokens):
    order = np.concatenate(list(data.eval_batches(some, 16)))
    assert sorted(order) == list(range(len(some)))
    assert list(-some.lengths[order]) == sorted(-some.lengths)


def test_a_batch_is_padded_to_its_longest_row_only():
    ids, mask, labels = data.collate(tokens(2, 9, 3), np.array([2, 0]))
    assert ids.tolist() == [[300, 301, 302], [100, 101, 0]]
    assert mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert labels.tolist() == [0, 0]
    assert {ids.dtype, mask.dtype, labels.dtype} == {np.dtype(np.int64)}


def test_a_batch_holds_the_very_tokens_of_its_rows(some: Tokens):
    batch = data.epoch_batches(some, 16, 0, 0)[5]
    ids, mask, labels = data.collate(some, batch)
    for row, real, kept in zip(batch, ids, mask.astype(bool), strict=True):
        assert list(real[kept]) == list(some.ids[some.offsets[row] : some.offsets[row + 1]])
        assert set(real[~kept]) <= {some.pad_id}
    assert list(labels) == list(some.labels[batch])


def test_some_rows_can_be_taken_in_any_order():
    part = tokens(2, 1, 3).take(np.array([2, 0]))
    assert part.ids.tolist() == [300, 301, 302, 100, 101]
    assert part.lengths.tolist() == [3, 2]
    assert part.labels.tolist() == [0, 0]
    assert len(part) == 2


def test_tokenizing_keeps_rows_in_order_cut_and_with_special_tokens(prepared: Any):
    rows = Rows(["the film is a delight", "bad " * 99], ["good", "bad"], "two")
    made = data.tokenize(rows, ["bad", "good"], prepared.tokenizer, max_tokens=12)
    assert made.lengths.max() == 12
    assert made.labels.tolist() == [1, 0]
    first = prepared.tokenizer.convert_ids_to_tokens(made.ids[: made.offsets[1]])
    assert (first[0], first[-1]) == ("[CLS]", "[SEP]")
    assert prepared.tokenizer.convert_tokens_to_string(first[1:-1]) == rows.texts[0]
    assert made.pad_id == prepared.tokenizer.pad_token_id


# ---------------------------------------------------------------- the hub


def test_rows_of_the_hub_without_a_hub_name_the_way_out():
    said = problem(Data(source="stanfordnlp/sst2@main", text="sentence"))
    assert "dataset 'stanfordnlp/sst2@main' cannot be loaded: HF_HUB_OFFLINE is set" in said
    assert "task.data.source=files task.data.train=PATH" in said
    assert "--task docstrings" in said


@pytest.mark.parametrize(
    ("source", "train", "way"),
    [
        ("csv", None, "PATH"),
        ("json", "mine.jsonl", "mine.jsonl"),
        ("parquet", None, "PATH"),
        ("text", None, "PATH"),
        ("reviews.csv", None, "reviews.csv"),
        ("some/folder", None, "some/folder"),
    ],
)
def test_files_that_are_given_as_a_dataset_of_the_hub_are_told_how(
    source: str, train: str | None, way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "some/folder").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert problem(Data(source=source, train=train)) == (
        f"data.source is '{source}', which is no dataset of the hub; for your own files: "
        f"task.data.source=files task.data.train={way}"
    )


def hub_split(labels: list[int]) -> Any:
    """A split as the hub's library hands it over, with numbers that stand for names."""
    import datasets

    names = datasets.ClassLabel(names=["negative", "positive"])
    features = datasets.Features(
        {"idx": datasets.Value("int64"), "s": datasets.Value("string"), "label": names}
    )
    columns = {"idx": labels, "s": [f"text {i}" for i in range(len(labels))], "label": labels}
    return datasets.Dataset.from_dict(columns, features=features)


def test_the_hub_s_numbers_become_its_names_in_its_order():
    rows, classes = data._hub_rows(hub_split([1, 0, 1]), Data(source="x", text="s"), "x/train", 2)
    assert rows.labels == ["positive", "negative", "positive"]
    assert classes == ["negative", "positive"]


def test_a_split_of_the_hub_whose_labels_are_secret_is_refused():
    with pytest.raises(UserError, match=r"x/test: rows 1, 2 .*'label' is empty"):
        data._hub_rows(hub_split([-1, -1]), Data(source="x", text="s"), "x/test", 1)


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"train": "training"}, "no split 'training' (data.train); there are: train, validation"),
        ({"validation": "dev"}, "no split 'dev' (data.validation); there are: train, validation"),
        ({"label": "stars"}, "x/train: no column 'stars' (data.label); there are: s"),
    ],
)
def test_a_split_or_column_that_the_hub_does_not_have_is_named(
    monkeypatch: pytest.MonkeyPatch, more: dict[str, str], expected: str
):
    splits = {"train": hub_split([0, 1]), "validation": hub_split([1, 0])}
    monkeypatch.setattr("datasets.load_dataset", lambda *_, **__: splits)
    assert expected in problem(Data(source="x", **{"text": "s", **more}))


def test_the_hub_s_own_validation_split_is_used(monkeypatch: pytest.MonkeyPatch):
    asked = []
    train, held_out = hub_split([0, 1, 0, 1, 1]), hub_split([1, 0, 1, 0, 1, 0, 1]).select([5, 6])
    monkeypatch.setattr(
        "datasets.load_dataset",
        lambda *names, **more: (
            asked.append((*names, more)) or {"train": train, "validation": held_out}
        ),
    )
    rows = load(Data(source="a/b@v2", subset="c", text="s"))
    assert asked == [("a/b", "c", {"revision": "v2"})]
    assert rows.labels == ["negative", "positive"]
    assert rows.validation.texts == ["text 5", "text 6"]

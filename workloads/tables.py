"""Data files as tables: csv, tsv, JSON lines and parquet, perhaps packed; what is wrong with one is
said with its name."""

import io
import json
from pathlib import Path
from typing import Any

from .config import UserError
from .sources import filesystem, is_remote

JSON_LINES = (".jsonl", ".ndjson", ".json")


def read_file(path: str) -> Any:
    """A csv, tsv, jsonl or parquet file (perhaps .gz) as a data frame; raises UserError."""
    import pandas as pd

    kind = file_kind(path)
    try:
        with _open(path) as file:
            if kind == ".parquet":
                frame = pd.read_parquet(file)
            elif kind in JSON_LINES:
                lines = (line for line in io.BufferedReader(file) if line.strip())
                rows = [json_object(line) for line in lines]
                if not rows:
                    raise UserError(f"{path}: there are no rows")
                frame = pd.DataFrame(rows, dtype=object)
            else:
                frame = read_csv(file, kind)
                check_fields(frame, path)
    except UserError:
        raise
    except FileNotFoundError:
        web = path.startswith(("http://", "https://"))  # where both are told alike
        what = "no answer, or no such file" if web else "no such file"
        raise UserError(f"{path}: {what}{_looked_for(path)}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 at byte {_bad_byte(path)}; convert it first") from None
    except (ValueError, OSError) as e:  # pandas' and pyarrow's errors are among them
        raise UserError(f"{path}: cannot be read: {' '.join(str(e).split())[:300]}") from None
    frame.columns = frame.columns.map(str)
    return frame


def check_fields(frame: Any, path: str) -> None:
    """Raises UserError for a csv whose first columns pandas took for names of its rows, and for a
    tsv of whose rows it took several for one text, for a quote that the first begins with."""
    import pandas as pd

    if not isinstance(frame.index, pd.RangeIndex):
        raise UserError(f"{path}: rows have more fields than the header; quote texts with commas")
    if file_kind(path) == ".tsv":
        for before in range(frame.shape[1]):
            values = frame.iloc[:, before].dropna()
            for value in values[values.str.contains("\t") & values.str.contains("\n")]:
                if _has_rows(value, before, frame.shape[1] - 1):
                    raise UserError(
                        f"{path}: a quote at the beginning makes one text of {value[:60]!r} and "
                        "what follows; write such texts in quotes, with those inside doubled"
                    )


def _has_rows(value: str, before: int, tabs: int) -> bool:
    """Whether a field after so many others is the end of a row, whole rows, and the beginning of
    one; a text that was quoted for its tabs and line breaks is not."""
    first, *rows, last = (line.count("\t") for line in value.split("\n"))
    return first == tabs - before and last == before and set(rows) <= {tabs}


def json_object(line: bytes) -> dict[str, Any]:
    """A line of a JSON file; raises ValueError."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        row = None
    if not isinstance(row, dict):
        raise ValueError(f"a line is no JSON object: {line[:80]!r}; write one object a line")
    return row


def _bad_byte(path: str) -> int | None:
    with _open(path) as file:
        try:
            file.read().decode()
        except UnicodeDecodeError as e:
            return e.start
    return None


def file_kind(path: str) -> str:
    """The ending that says how a file is read; raises UserError for others."""
    suffixes = [s.lower() for s in Path(path.split("?")[0]).suffixes]
    kind = next((s for s in reversed(suffixes) if s not in (".gz", ".bz2", ".zst")), "")
    if kind not in (".csv", ".tsv", ".parquet", *JSON_LINES):
        raise UserError(f"{path}: a data file ends in .csv, .tsv, .jsonl or .parquet")
    return kind


def read_csv(file: Any, kind: str, **more: Any) -> Any:
    """As strings, and nothing read as missing: 'None', 'NA' and '007' are texts and labels too."""
    import pandas as pd

    sep = "\t" if kind == ".tsv" else ","
    return pd.read_csv(
        file, sep=sep, dtype=str, keep_default_na=False, encoding="utf-8-sig", **more
    )


def _open(path: str) -> Any:
    if path.startswith(("http://", "https://")):
        import fsspec

        return fsspec.open(path, "rb", compression="infer").open()
    files, inner = filesystem(path)
    return (
        files.open_input_stream(inner, compression="detect")
        if not inner.lower().endswith(".parquet")
        else files.open_input_file(inner)
    )


def _looked_for(path: str) -> str:
    return "" if is_remote(path) else f" (looked for {Path(path).expanduser().resolve()})"

"""The builtin rows: docstrings of the installed Python packages, labelled with the package.

Real text on every machine where this is installed, nothing to download.
"""

import ast
import hashlib
import importlib.metadata
import importlib.util
import re
import uuid
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from .sources import filesystem

PACKAGES = ("aiohttp", "datasets", "numpy", "pandas", "pydantic", "ray", "torch", "transformers")
_ROWS_PER_PACKAGE = 1600
_BYTES_PER_PACKAGE = 5_000_000
# Any word that names one of the packages, `torch.nn` and `DataFrame.to_numpy` included.
_MASK = re.compile(rf"[\w.]*(?:{'|'.join(PACKAGES)})[\w.]*", re.IGNORECASE)


def docstrings(cache: str) -> tuple[list[str], list[str]]:
    """First paragraphs of the docstrings of the installed packages; the label is the package.

    Source files are parsed, nothing is imported. The result is kept in `cache`, by the packages'
    versions.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    key = repr([_ROWS_PER_PACKAGE, *((p, importlib.metadata.version(p)) for p in PACKAGES)])
    name = f"docstrings-{hashlib.sha256(key.encode()).hexdigest()[:12]}.parquet"
    files, folder = filesystem(cache)
    path = f"{folder}/{name}"
    if files.get_file_info(path).is_file:
        table = pq.read_table(path, filesystem=files)
        return table["text"].to_pylist(), table["label"].to_pylist()
    texts, labels = _collect_docstrings()
    files.create_dir(folder, recursive=True)
    aside = f"{path}.{uuid.uuid4().hex[:8]}"
    pq.write_table(pa.table({"text": texts, "label": labels}), aside, filesystem=files)
    files.move(aside, path)
    return texts, labels


def _collect_docstrings() -> tuple[list[str], list[str]]:
    files = [(package, path) for package in PACKAGES for path in _sample_files(package)]
    # Large files first, so that no process is left with the largest at the end.
    files.sort(key=lambda f: -f[1].stat().st_size)
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        found = list(pool.map(_paragraphs, [path for _, path in files], chunksize=8))
    owners: dict[str, set[str]] = {}
    for (package, _), paragraphs in zip(files, found, strict=True):
        for text in paragraphs:
            owners.setdefault(text, set()).add(package)
    texts: list[str] = []
    labels: list[str] = []
    for package in PACKAGES:
        # What two packages share says nothing; a hash picks the rest, the same on every machine.
        own = sorted((t for t, who in owners.items() if who == {package}), key=_by_hash)
        texts += own[:_ROWS_PER_PACKAGE]
        labels += [package] * min(len(own), _ROWS_PER_PACKAGE)
    return texts, labels


def _by_hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest()


def _sample_files(package: str) -> list[Path]:
    spec = importlib.util.find_spec(package)  # of a top-level name: imports nothing
    assert spec is not None, package
    assert spec.submodule_search_locations, package
    root = Path(spec.submodule_search_locations[0])
    paths = [p for p in root.rglob("*.py") if "tests" not in p.parts]
    paths.sort(key=lambda p: _by_hash(p.relative_to(root).as_posix()))
    total, chosen = 0, list[Path]()
    for path in paths:
        total += path.stat().st_size
        if total > _BYTES_PER_PACKAGE and chosen:
            break
        chosen.append(path)
    return chosen


def _paragraphs(path: Path) -> list[str]:
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, RecursionError):
        return []  # templates and the like
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    found = []
    for node in ast.walk(tree):
        if isinstance(node, kinds) and (doc := ast.get_docstring(node)):
            text = _MASK.sub("it", " ".join(doc.split("\n\n")[0].split()))
            if len(text.split()) >= 5:
                found.append(text[:1000].encode("utf-8", "replace").decode())
    return found

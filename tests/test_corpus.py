"""The builtin corpus: what is read, what is masked, and that it is kept."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from workloads import corpus

# ---------------------------------------------------------------- the builtin corpus


def test_a_paragraph_is_the_first_of_a_docstring_on_one_line(tmp_path: Path):
    path = tmp_path / "source.py"
    path.write_text(
        '"""The first paragraph of this module\n   goes over two lines.\n\nAnd a second one."""\n'
        'class A:\n    """One two three four five of a class."""\n'
        '    async def f(self):\n        """Of an async method, five words."""\n'
        'def g():\n    """Too short."""\n'
        "x = 'not a docstring, though of seven words'\n"
    )
    assert sorted(corpus._paragraphs(path)) == [
        "Of an async method, five words.",
        "One two three four five of a class.",
        "The first paragraph of this module goes over two lines.",
    ]


@pytest.mark.parametrize(
    "word", ["torch", "torch.nn.Module", "PyTorch", "DataFrame.to_numpy", "ray.get", "Pandas"]
)
def test_the_names_of_the_packages_are_masked(tmp_path: Path, word: str):
    path = tmp_path / "source.py"
    path.write_text(f'"""A tensor of ({word}) is made here."""\n')
    assert corpus._paragraphs(path) == ["A tensor of (it) is made here."]


def test_half_a_character_in_a_docstring_does_not_stop_what_comes_later(tmp_path: Path):
    (tmp_path / "source.py").write_text('"""Four words and half\\ud83d a character."""')
    assert corpus._paragraphs(tmp_path / "source.py") == ["Four words and half? a character."]


@pytest.mark.parametrize(
    "source", [b"def f(:\n", b'"""\xff\xfe five words are in here"""', b"{{ x }}"]
)
def test_a_file_that_is_no_python_has_no_paragraphs(tmp_path: Path, source: bytes):
    (tmp_path / "template.py").write_bytes(source)
    assert corpus._paragraphs(tmp_path / "template.py") == []


@pytest.fixture
def two_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """A corpus of two small packages instead of eight large ones."""
    monkeypatch.setattr(corpus, "PACKAGES", ("aiohttp", "pydantic"))
    monkeypatch.setattr(corpus, "_BYTES_PER_PACKAGE", 300_000)


class NoPool:
    """Does at once what a pool of processes does."""

    def __init__(self, **_: Any) -> None:
        pass

    def __enter__(self) -> "NoPool":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def map(self, what: Callable[..., Any], items: list[Any], chunksize: int) -> Any:
        return map(what, items)


@pytest.mark.usefixtures("two_packages")
def test_the_corpus_is_the_same_each_time_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    shared = tmp_path / "shared.py"
    shared.write_text('"""Five words that two share."""')
    own = corpus._sample_files
    monkeypatch.setattr(corpus, "_sample_files", lambda package: [*own(package), shared])
    cache = f"{tmp_path}/cache/of/it"
    first = corpus.docstrings(cache)
    monkeypatch.setattr(corpus, "ProcessPoolExecutor", NoPool)
    fresh = corpus._collect_docstrings()
    monkeypatch.setattr(corpus, "_collect_docstrings", lambda: pytest.fail("read a second time"))
    kept = corpus.docstrings(f"file://{cache}")
    assert fresh == first == kept
    texts, labels = fresh
    assert min(Counter(labels).values()) > 50
    assert len(set(texts)) == len(texts)
    assert "Five words that two share." not in texts
    assert [p.suffix for p in Path(cache).iterdir()] == [".parquet"]


@pytest.mark.usefixtures("two_packages")
def test_another_version_of_a_package_is_another_corpus(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(corpus, "_collect_docstrings", lambda: (["a"], ["b"]))
    for version in ("1.0", "1.0", "2.0"):
        monkeypatch.setattr(corpus.importlib.metadata, "version", lambda _, v=version: v)
        corpus.docstrings(str(tmp_path))
    assert len(list(tmp_path.iterdir())) == 2

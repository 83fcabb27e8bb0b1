"""Who may import whom (DESIGN section 2), and how large it all may be."""

import ast
import io
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

import workloads

PACKAGE = Path(workloads.__file__).parent
MODULES = sorted(path.stem for path in PACKAGE.glob("*.py"))
ANYTHING = set(MODULES)

# A module and those of ours that it may import, inside functions too.
MAY_IMPORT = {
    "__init__": set(),
    "__main__": {"cli"},
    "config": set(),
    "live": set(),
    "events": {"artifacts", "sources"},
    "tracking": {"config", "artifacts", "sources"},
    "registry": {"config", "artifacts", "tracking"},
    "lost": {"live"},
    "sources": {"config"},
    "corpus": {"sources"},
    "tables": {"config", "sources"},
    "data": {"config", "sources", "corpus", "tables"},
    "manifest": {"__init__"},
    "model": {"config", "sources", "manifest"},
    "words": set(),
    "passes": set(),
    "loop": {"config", "sources", "data", "words", "passes"},
    "stream": {"config", "sources", "data", "tables", "artifacts"},
    "ingest": {"config", "data", "loop", "stream", "artifacts", "checkpoint"},
    "prepared": {"config", "data", "model", "stream"},
    "artifacts": {"config", "sources", "manifest"},
    "costs": {"config", "artifacts", "cluster"},
    "runs": {"config", "artifacts", "costs", "manifest"},
    "checkpoint": {"loop", "artifacts"},
    "evaluation": set(),
    "plots": set(),
    "report": {"config", "artifacts", "evaluation", "explain", "plots", "sources"},
    "card": {"config", "artifacts", "evaluation", "plots", "sources"},
    "probe": {"config", "artifacts", "card", "engine", "live", "plots"}
    | {"replica", "report", "serve"},
    "haproxy": set(),
    "guard": set(),
    "ingress": {"config"},
    "cluster": {"config", "sources", "ingress"},
    "trial": {"config", "costs", "data", "model", "loop"},
    "search": {"config", "artifacts", "live", "trial"},
    "tune": {"config", "data", "artifacts", "cluster", "costs", "model", "prepared", "live"}
    | {"search"}
    | {"trial"},
    "train": {"config", "data", "model", "loop", "artifacts", "cluster", "prepared", "live"}
    | {"checkpoint", "measure", "verdict", "samples", "words", "sources", "ingest", "trainer"}
    | {"card", "costs", "evaluation", "explain", "manifest"},
    "trainer": {"cluster"},
    "engine": {"config", "model", "sources"},
    "explain": {"engine"},
    "samples": {"data", "engine"},
    "export": {"engine", "model", "samples"},
    "gate": {"engine", "samples"},
    "engines": {"config", "sources", "engine", "samples", "export", "gate"},
    "protocols": set(),
    "keys": {"config"},
    "page": set(),
    "openapi": {"protocols"},
    "wire": set(),
    "metrics": set(),
    "api": {"config", "keys", "metrics", "openapi", "page", "protocols", "wire", "__init__"},
    "batcher": set(),
    "replica": {"config", "sources", "artifacts", "engine", "engines", "samples"}
    | {"__init__", "batcher", "api", "explain", "metrics", "protocols", "manifest", "wire"},
    "serve": {"config", "sources", "artifacts", "cluster", "engine", "engines", "keys", "replica"}
    | {"registry"},
    "client": {"config"},
    "upload": {"config"},
    "verdict": {"config", "cluster"},
    "measure": {"config", "data", "model", "loop", "words"},
    "survey": {"config", "sources", "model", "artifacts", "cluster", "prepared", "measure"}
    | {"verdict"},
    "summary": {"config", "artifacts", "cluster", "costs", "live", "model", "prepared"}
    | {"survey", "verdict"},
    "endpoint": {"config", "artifacts", "cluster", "costs", "engines", "keys", "manifest"}
    | {"pipeline", "report", "serve"},
    "package": {"__init__", "config", "endpoint", "engine", "engines", "pipeline", "samples"}
    | {"manifest", "replica", "serve", "sources"},
    "packaged": {"cluster", "config", "keys", "live", "lost", "replica", "serve"},
    "pipeline": ANYTHING,
    "cli": ANYTHING,
}
# Those that may touch Ray. Below cluster there is none; cli asks whether it is running.
RAY = {"cluster", "stream", "ingest", "checkpoint", "trial", "search", "tune", "train", "serve"}
RAY |= {"lost", "trainer", "survey", "upload", "endpoint", "pipeline", "cli"}
RAY |= {"packaged", "replica"}
# What makes --help slow: imported inside functions only, here.
HEAVY = {"ray", "torch", "transformers", "captum", "pandas", "datasets", "pyarrow"}
HEAVY |= {"huggingface_hub", "mlflow", "tensorboardX"}
LIGHT = ("config", "sources", "corpus", "cli", "data", "artifacts", "client", "live")
LIGHT += ("events", "tracking", "registry", "tables")


def imports(module: str, top_level: bool = False) -> Iterator[str]:
    """What a module imports: 'ray' for others' packages, '.config' for ours."""
    tree = ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))
    for node in _nodes(tree, top_level):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is None:  # from . import data, model
            yield from (f".{a.name if a.name in MODULES else '__init__'}" for a in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            yield "." * node.level + node.module.partition(".")[0]


def _nodes(tree: ast.AST, top_level: bool) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        yield node
        if not (top_level and isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))):
            yield from _nodes(node, top_level)


def test_every_module_has_its_line_here():
    assert set(MODULES) == MAY_IMPORT.keys()


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_what_lies_below_it(module: str):
    ours = {name.removeprefix(".") for name in imports(module) if name.startswith(".")}
    assert ours - MAY_IMPORT.get(module, set()) == set()
    assert "workloads" not in set(imports(module))  # relative imports only, which are checked here


@pytest.mark.parametrize("module", sorted(set(MODULES) - RAY))
def test_ray_appears_only_from_cluster_upwards(module: str):
    assert "ray" not in set(imports(module))


@pytest.mark.parametrize("module", LIGHT)
def test_what_help_needs_imports_nothing_heavy(module: str):
    at_import = set(imports(module, top_level=True))
    assert at_import & HEAVY == set()


def test_the_command_line_imports_a_pipeline_only_inside_its_command():
    ours = {name for name in imports("cli", top_level=True) if name.startswith(".")}
    assert ours <= {".config"}


def test_serving_imports_the_model_module_only_where_the_torch_engine_loads():
    assert ".model" not in set(imports("engine", top_level=True))


def test_processes_that_read_a_stream_load_no_torch():
    code = "import sys, workloads.ingest; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def code_lines(module: str) -> int:
    """Lines that hold code: blank ones, comments and docstrings are left out."""
    source = (PACKAGE / f"{module}.py").read_text(encoding="utf-8")
    docs = {
        line
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    empty = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    code = {
        line
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type not in (*empty, tokenize.ENDMARKER)
        for line in range(token.start[0], token.end[0] + 1)
    }
    return len(code - docs)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_fits_on_a_few_screens(module: str):
    # A field and its docstring a line; five options a command, as typer wants them.
    assert code_lines(module) <= {
        "config": 550,
        "cli": 530,
        "train": 440,
        "loop": 360,
        "api": 360,
        "protocols": 330,
    }.get(module, 310)


def test_the_package_stays_small():
    lines = {module: code_lines(module) for module in MODULES}
    assert sum(lines.values()) < 11_300, lines

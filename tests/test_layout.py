"""Who may import whom (DESIGN section 2), and how large it all may be."""

import ast
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
    "sources": {"config"},
    "data": {"config", "sources"},
    "model": {"config", "sources"},
    "loop": {"config", "sources", "data"},
    "prepared": {"config", "data", "model"},
    "artifacts": {"config", "sources", "__init__"},
    "report": {"config", "artifacts"},
    "cluster": {"config", "sources"},
    "tune": {"config", "data", "model", "loop", "artifacts", "cluster", "prepared", "live"},
    "train": {"config", "data", "model", "loop", "artifacts", "cluster", "prepared", "live"},
    "engine": {"config", "model"},
    "api": {"config", "__init__"},
    "serve": {"config", "sources", "artifacts", "cluster", "engine", "api"},
    "client": {"config"},
    "summary": {"config", "cluster", "live"},
    "pipeline": ANYTHING,
    "cli": ANYTHING,
}
# Those that may touch Ray. Below cluster there is none; cli asks whether it is running.
RAY = {"cluster", "tune", "train", "serve", "pipeline", "cli"}
# What makes --help slow: imported inside functions only, here.
HEAVY = {"ray", "torch", "transformers", "pandas", "datasets", "pyarrow", "huggingface_hub"}
LIGHT = ("config", "sources", "cli", "data", "artifacts", "client", "live")


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


@pytest.mark.parametrize("module", MODULES)
def test_a_module_fits_on_a_few_screens(module: str):
    lines = len((PACKAGE / f"{module}.py").read_text(encoding="utf-8").splitlines())
    assert lines <= (600 if module == "config" else 350)


def test_the_package_stays_under_3000_lines():
    lines = {p.name: len(p.read_text().splitlines()) for p in sorted(PACKAGE.rglob("*.py"))}
    assert sum(lines.values()) < 3000, lines

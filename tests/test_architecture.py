"""Who may import whom (the table of CONTRIBUTING.md), read from the source itself."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAPERS = ("nqs", "diffusion", "lm", "geometry", "vision")
MAY = {
    "configs": {"configs"},
    "common": {"common"},
    "optim": {"common", "optim"},
    **{paper: {"common", "optim", paper} for paper in PAPERS},
    "medical": {"common", "optim", "diffusion", "medical"},
    "main.py": {"common"},
}
OURS = set(MAY) - {"main.py"} | {"tests", "benchmarks", "main"}
FILES = [
    p
    for name in MAY
    for p in ([ROOT / name] if name.endswith(".py") else sorted((ROOT / name).rglob("*.py")))
]


def imported(path):
    """(module, at top level) pairs; `from a import b` counts as a and as a.b."""
    tree = ast.parse(path.read_text())
    top = set(ast.iter_child_nodes(tree))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node in top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield node.module, node in top
            yield from ((f"{node.module}.{alias.name}", node in top) for alias in node.names)


def owner(path):
    return path.relative_to(ROOT).parts[0]


def experiments():
    """Modules with `make(config)`, which are named by configs and imported by nobody."""
    for path in FILES:
        tree = ast.parse(path.read_text())
        made = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "make"]
        if made and owner(path) not in ("common", "configs"):
            yield ".".join(path.relative_to(ROOT).with_suffix("").parts)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_obey_the_table(path):
    for module, _ in imported(path):
        first = module.partition(".")[0]
        if first in OURS:
            assert first in MAY[owner(path)], f"{path} imports {module}"
        if owner(path) == "configs":
            assert first in ("configs", "ml_collections"), f"{path} imports {module}"


def test_only_the_lattice_imports_netket():
    users = {
        str(p.relative_to(ROOT))
        for p in FILES
        for m, _ in imported(p)
        if m.partition(".")[0] == "netket"
    }
    assert users == {"nqs/lattice.py"}


def test_nobody_imports_an_experiment():
    found = set(experiments())
    assert "nqs.hubbard" in found
    for path in FILES:
        assert not {m for m, _ in imported(path)} & found, path


def test_nothing_is_heavy_before_the_flags_are_read():
    for name in ("main.py", "common/config.py", "common/errors.py", "common/runtime.py"):
        for module, top in imported(ROOT / name):
            heavy = module.partition(".")[0] in (
                "jax",
                "flax",
                "optax",
                "orbax",
                "netket",
                "matplotlib",
                "scipy",
            )
            assert not (heavy and top), f"{name} imports {module} at its top"


def test_matplotlib_loads_with_a_report_only():
    for path in FILES:
        if owner(path) == "common" and path.name != "plots.py":
            modules = {m.partition(".")[0] for m, _ in imported(path)}
            assert "matplotlib" not in modules, path


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_are_one_idea_long(path):
    assert len(path.read_text().splitlines()) <= 400
    assert ast.get_docstring(ast.parse(path.read_text())), f"{path} has no docstring"


def test_annotations_are_checked_while_tests_run():
    """By the import hook of conftest.py: without it, untrue shapes would pass."""
    import jaxtyping
    import numpy as np

    from nqs import statistics

    with pytest.raises(jaxtyping.TypeCheckError):
        statistics.blocked_error(np.zeros((3, 3)))

"""The structure that docs/design.md describes: who may import whom, and what a request can reach."""

from __future__ import annotations

import ast
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent.parent / "src" / "offramp"

RANKS = [
    "types errors tasks confidence blending streams flight progress augment unfused precision budget economy",
    "splitting graph tracing behaviour torchvision_shim cost caches calibration placement monitoring reservoir "
    "state backends",
    "model observing recording mixtures distillation",
    "candidates search methods choosing fitting evaluation parts cuts tail rebuilding optimizing profiling "
    "merging online_model ladder refresh refitting summary "
    "artifact report",
    "sources cli demo bench __main__",
]
RANK = {name: rank for rank, names in enumerate(RANKS) for name in names.split()}
SPLITTING = {"splitting", "graph", "tracing", "behaviour"}  # one room in four files
NOT_FOR_REQUESTS = {
    "recording",
    "distillation",
    "mixtures",
    "search",
    "candidates",
    "methods",
    "choosing",
    "fitting",
    "refitting",
    "optimizing",
    "profiling",
    "calibration",
    "placement",
}
COUNTS_INPUTS = {"calibration"}  # a model in service asks it how many inputs a refit takes
# Who may import whom among those that nobody else imports.
SHELL = {("cli", room) for room in ("sources", "demo", "bench")}
SHELL |= {("bench", "sources"), ("bench", "demo"), ("__main__", "cli")}
PACKAGE = "__init__"  # the public names, which point everywhere, on first use


def room_of(file: Path, root: Path) -> str:
    """The module or subpackage of offramp that a file belongs to."""
    return file.relative_to(root).parts[0].removesuffix(".py")


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def statements(node: ast.AST) -> Iterator[ast.AST]:
    """Everything below a node but what only type checkers see."""
    for child in ast.iter_child_nodes(node):
        if not is_type_checking(child):
            yield child
            yield from statements(child)
        else:
            assert isinstance(child, ast.If)
            for other in child.orelse:
                yield from statements(other)


def targets(node: ast.AST, siblings: set[str]) -> Iterator[str]:
    """The rooms that one statement imports."""
    if isinstance(node, ast.Import):
        for alias in node.names:
            head, _, rest = alias.name.partition(".")
            if head == "offramp":
                yield rest.split(".")[0] or PACKAGE
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, "imports name the module in full"
        head, _, rest = (node.module or "").partition(".")
        if head == "offramp" and rest:
            yield rest.split(".")[0]
        elif head == "offramp":
            yield from (alias.name if alias.name in siblings else PACKAGE for alias in node.names)


def imports(root: Path) -> dict[str, set[str]]:
    """For each room the others that it imports, at the top or inside functions; not what is for type checkers only."""
    files = sorted(root.rglob("*.py"))
    rooms = {room_of(file, root) for file in files}
    found: dict[str, set[str]] = {room: set() for room in rooms}
    for file in files:
        room = room_of(file, root)
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for node in statements(tree):
            found[room] |= set(targets(node, rooms))
        found[room].discard(room)
    return found


def violations(root: Path) -> list[str]:
    """What contradicts docs/design.md, one line each."""
    graph = imports(root)
    found = [f"{room} has no rank" for room in graph if room not in RANK and room != PACKAGE]
    for room, others in sorted(graph.items()):
        for other in sorted(others):
            problem = wrong(room, other)
            if problem:
                found.append(f"{room} imports {other}: {problem}")
    reached = reachable("model", graph) & NOT_FOR_REQUESTS
    reached |= reachable("online_model", graph) & (NOT_FOR_REQUESTS - COUNTS_INPUTS)
    found += [f"a request reaches {name}" for name in sorted(reached)]
    return found


def wrong(room: str, other: str) -> str:
    if other == PACKAGE:
        return "" if RANK.get(room) == 4 else "the public names are for users and the shell"
    here, there = RANK.get(room), RANK.get(other)
    if here is None or there is None:
        return ""
    if there > here:
        return f"rank {here} imports rank {there}"
    if here == there == 1 and not {room, other} <= SPLITTING:
        return "rooms of rank 1 do not import each other"
    if there == 4 and (room, other) not in SHELL:
        return "nobody imports the shell"
    return ""


def reachable(start: str, graph: dict[str, set[str]]) -> set[str]:
    seen, left = set(), [start]
    while left:
        room = left.pop()
        if room not in seen:
            seen.add(room)
            left += graph[room]
    return seen


def test_imports_go_one_way() -> None:
    assert violations(SOURCE) == []


def test_the_check_sees_all_files_and_real_imports() -> None:
    graph = imports(SOURCE)
    assert set(graph) - {PACKAGE} == set(RANK)
    assert {"caches", "splitting", "cost"} <= graph["model"]
    assert "demo" in graph["cli"], "imports inside functions count"
    assert "splitting" not in graph["cost"], "imports for type checkers do not"


@pytest.mark.parametrize(
    ("file", "line", "expected"),
    [
        ("types.py", "from offramp.model import CachedModel", "types imports model: rank 0 imports rank 2"),
        ("placement.py", "import offramp.calibration", "placement imports calibration: rooms of rank 1"),
        ("cost.py", "from offramp import splitting", "cost imports splitting: rooms of rank 1"),
        ("caches/learned.py", "def f():\n    from offramp.search import Search", "caches imports search: rank 1"),
        ("fitting.py", "from offramp import cli", "fitting imports cli: rank 3 imports rank 4"),
        ("search.py", "from offramp import fit", "search imports __init__: the public names"),
        ("streams.py", "from offramp.recording import record", "a request reaches recording"),
        ("model.py", "if True:\n    import offramp.placement", "a request reaches placement"),
        ("newcomer.py", "import offramp.types", "newcomer has no rank"),
    ],
)
def test_a_planted_violation_is_found(tmp_path: Path, file: str, line: str, expected: str) -> None:
    copied = tmp_path / "offramp"
    shutil.copytree(SOURCE, copied, ignore=shutil.ignore_patterns("__pycache__"))
    with (copied / file).open("a", encoding="utf-8") as planted:
        planted.write(f"\n{line}\n")
    assert any(found.startswith(expected) for found in violations(copied)), violations(copied)


def test_an_import_for_type_checkers_is_allowed(tmp_path: Path) -> None:
    copied = tmp_path / "offramp"
    shutil.copytree(SOURCE, copied, ignore=shutil.ignore_patterns("__pycache__"))
    with (copied / "types.py").open("a", encoding="utf-8") as planted:
        planted.write("\nif TYPE_CHECKING:\n    from offramp.model import CachedModel\n")
    assert violations(copied) == []


# --- effects of an import -------------------------------------------------------------------------


def in_a_fresh_process(code: str) -> None:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr[-2000:]


def test_importing_the_package_or_the_shell_does_not_import_torch() -> None:
    in_a_fresh_process(
        "import sys, offramp\nassert 'torch' not in sys.modules\n"
        "import offramp.cli\nheavy = {'torch', 'numpy', 'scipy'} & set(sys.modules)\nassert not heavy, heavy\n"
    )


def test_imports_change_neither_logging_nor_warnings_nor_torch() -> None:
    modules = sorted(f"offramp.{room}" for room in imports(SOURCE) if room not in (PACKAGE, "__main__"))
    in_a_fresh_process(
        "import importlib, logging, signal, sys, warnings\n"
        "import torch, torch.export, torch.fx, torch.utils.flop_counter, numpy, scipy.stats, safetensors, rich, typer\n"
        "def state():\n"
        "    ours = [logging.getLogger(name) for name in ('', 'offramp', *sys.modules) if name.startswith('offramp')]\n"
        "    root = logging.getLogger()\n"
        "    assert not any(logger.handlers or logger.level or not logger.propagate for logger in ours)\n"
        "    return (list(warnings.filters), list(root.handlers), root.level, signal.getsignal(signal.SIGINT),\n"
        "            torch.get_num_threads(), torch.is_grad_enabled(), torch.get_default_dtype(),\n"
        "            torch.initial_seed(), sys.excepthook, list(sys.path))\n"
        "before = state()\n"
        f"for name in {modules}:\n    importlib.import_module(name)\n"
        "assert state() == before, (before, state())\n"
    )

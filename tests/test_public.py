"""The public names: a list that changes only on purpose."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import offramp

FUNCTIONS = {"evaluate", "fit", "load", "online", "optimize", "profile", "save", "split", "uncached"}
VALUES = {
    *("CachedModel", "Certificate", "Evaluation", "Merging", "OnlineModel", "Plan", "Prediction", "Profile"),
    "RecentCache",
    "Refresh",
    "ResultCache",
}
ERRORS = {
    "ArtifactError",
    "BackendError",
    "InputError",
    "MissingExtraError",
    "OfframpError",
    "SplitError",
    "StorageError",
    "StreamError",
}


def test_the_public_names() -> None:
    assert set(offramp.__all__) == FUNCTIONS | VALUES | ERRORS
    assert all(inspect.isfunction(getattr(offramp, name)) for name in FUNCTIONS)
    assert all(inspect.isclass(getattr(offramp, name)) for name in VALUES | ERRORS)
    assert all(issubclass(getattr(offramp, name), offramp.OfframpError) for name in ERRORS)


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse(Path(str(offramp.__file__)).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.asname for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert seen == set(offramp.__all__)


def test_every_public_name_is_documented() -> None:
    for name in offramp.__all__:
        assert inspect.getdoc(getattr(offramp, name)), f"{name} has no docstring"


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(AttributeError, match=r"no attribute 'cache'; it has .*CachedModel.*split"):
        _ = offramp.cache


def test_names_stay_functions_whatever_is_imported() -> None:
    """A submodule of the same name would take the place of the function once it is imported."""
    code = (
        "import inspect, offramp\n"
        "offramp.fit, offramp.split\n"
        "import offramp.splitting, offramp.fitting, offramp.evaluation, offramp.artifact\n"
        f"assert all(inspect.isfunction(getattr(offramp, name)) for name in {sorted(FUNCTIONS)})\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    modules = {file.stem for file in Path(str(offramp.__file__)).parent.iterdir()}
    assert not modules & set(offramp.__all__), "a module and a public name are called alike"

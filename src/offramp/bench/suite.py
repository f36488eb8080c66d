"""The suite file: which models, data, methods and settings a benchmark runs. docs/bench.md describes it.

All of it is checked here, before anything runs; an unknown key is an error, so that no misspelt one hides behind a
default.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import tomllib
import typing
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offramp.calibration import check_levels
from offramp.errors import InputError
from offramp.methods import METHODS, Method, method_named
from offramp.methods.base import RULES, Rule
from offramp.types import version

READING = {"batch_size": int, "column": str, "transform": str, "size": int, "tokenizer": str, "max_length": int}
SOURCE_KEYS = ("source", "rows", "limit")
MODEL_KEYS = ("name", "model", "data", "certify", "evaluate", *READING)
FULL_MODEL = "full model"


@dataclass(frozen=True)
class DataEntry:
    """One source of inputs: its name as `load_stream` takes it, and which of its rows."""

    source: str
    rows: str | None = None
    limit: int | None = None


@dataclass(frozen=True)
class ModelEntry:
    """A model with its data. certify None: a part of `data` is kept back. reading: options for all of its data."""

    name: str
    model: str
    data: DataEntry
    certify: DataEntry | None
    evaluate: DataEntry
    reading: Mapping[str, Any]
    written: Mapping[str, Any]  # as in the file, for the digest


@dataclass(frozen=True)
class MethodEntry:
    """A method with its hyper-parameters; the label shows those that the file sets."""

    label: str
    method: Method


@dataclass(frozen=True)
class Cell:
    """One line of the results. The full model's own line has neither seed nor method, rule and tolerance."""

    key: str
    model: ModelEntry
    seed: int | None = None
    method: MethodEntry | None = None
    rule: Rule | None = None
    tolerance: float | None = None

    def describe(self) -> dict[str, Any]:
        """The cell's part of its line. JSON."""
        return {
            "key": self.key,
            "model": self.model.name,
            "seed": self.seed,
            "method": FULL_MODEL if self.method is None else self.method.label,
            "parameters": {} if self.method is None else parameters(self.method.method),
            "rule": self.rule,
            "tolerance": self.tolerance,
        }


@dataclass(frozen=True)
class Suite:
    models: tuple[ModelEntry, ...]
    methods: tuple[MethodEntry, ...]
    rules: tuple[Rule, ...] = ("certificate",)
    tolerances: tuple[float, ...] = (0.01,)
    confidence_level: float = 0.95
    batch_sizes: tuple[int, ...] = (1, 32)
    seeds: tuple[int, ...] = (0,)
    time_budget_s: float | None = None
    latency_budget_s: float = 10.0
    device: str | None = None

    @property
    def learning_tolerance(self) -> float:
        """The tolerance that caches are learned for, once for all tolerances: the loosest. What a method fixes for it
        while it learns can be tightened by a choice, not loosened."""
        return max(self.tolerances)

    def cells(self, model: ModelEntry) -> Iterator[Cell]:
        """The model's cells in the order in which they run: its own, then by seed, method, tolerance and rule."""
        yield self._cell(model)
        for seed in self.seeds:
            for method in self.methods:
                for tolerance in self.tolerances:
                    for rule in self.rules:
                        yield self._cell(model, seed, method, rule, tolerance)

    def _cell(
        self,
        model: ModelEntry,
        seed: int | None = None,
        method: MethodEntry | None = None,
        rule: Rule | None = None,
        tolerance: float | None = None,
    ) -> Cell:
        what = [FULL_MODEL] if method is None else [f"seed {seed}", method.label, str(rule), str(tolerance)]
        key = "/".join([model.name, *what])
        return Cell(f"{key}#{self._digest(model, method)}", model, seed, method, rule, tolerance)

    def _digest(self, model: ModelEntry, method: MethodEntry | None) -> str:
        """Of all that a result depends on beside what the key spells out."""
        settings: dict[str, Any] = {
            "offramp": version(),
            "model": model.written,
            "confidence_level": self.confidence_level,
            "batch_sizes": self.batch_sizes,
            "latency_budget_s": self.latency_budget_s,
            "device": self.device,
        }
        if method is not None:
            settings |= {
                "parameters": parameters(method.method),
                "learning_tolerance": self.learning_tolerance,
                "time_budget_s": self.time_budget_s,
            }
        return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:12]


def parameters(method: Method) -> dict[str, Any]:
    """The method's hyper-parameters; the rule is the suite's."""
    given = {field.name: getattr(method, field.name) for field in dataclasses.fields(method) if field.name != "rule"}
    return {
        name: {"name": value.name} | parameters(value) if isinstance(value, Method) else value
        for name, value in given.items()
    }


def read_suite(path: Path) -> Suite:
    """The suite in this file. Raises InputError that says what is wrong and what is known."""
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the suite {path} could not be read: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise InputError(f"the suite {path} is not TOML: {error}") from error
    known = [field.name for field in dataclasses.fields(Suite)]
    _check_keys(document, known, ("models", "methods"), "the suite")
    folder = path.resolve().parent
    models = [_model(entry, folder, number) for number, entry in enumerate(_list(document, "models"), 1)]
    methods = [_method(entry) for entry in _list(document, "methods")]
    _check_distinct([model.name for model in models], "models")
    _check_distinct([method.label for method in methods], "methods")
    given = {name: _SETTINGS[name](document, name) for name in document if name in _SETTINGS}
    suite = Suite(tuple(models), tuple(methods), **given)
    for tolerance in suite.tolerances:
        check_levels(tolerance, suite.confidence_level)
    return suite


# -- models and methods ----------------------------------------------------------------------------


def _model(entry: object, folder: Path, number: int) -> ModelEntry:
    if not isinstance(entry, dict):
        raise InputError(f"a model is written as a table, [[models]]; received {entry!r}")
    where = f"model {entry.get('name', number)!r}"
    _check_keys(entry, MODEL_KEYS, ("name", "model", "data", "evaluate"), where)
    for name in ("name", "model"):
        _typed(entry[name], str, f"`{name}` of {where}")
    reading = {
        name: _typed(entry[name], kind, f"`{name}` of {where}") for name, kind in READING.items() if name in entry
    }
    for name in ("transform", "tokenizer"):
        if name in reading:
            reading[name] = _place(reading[name], folder)
    data = {
        name: _data(entry[name], folder, f"`{name}` of {where}")
        for name in ("data", "certify", "evaluate")
        if name in entry
    }
    for one, other in itertools.combinations(data, 2):
        if data[one] == data[other]:
            raise InputError(
                f"{where} has the same inputs as `{one}` and as `{other}`: {data[one].source}. What is learned, "
                "certified and evaluated on must be different inputs; name another source, or other `rows` of it"
            )
    return ModelEntry(
        entry["name"],
        _place(entry["model"], folder),
        data["data"],
        data.get("certify"),
        data["evaluate"],
        reading,
        entry,
    )


def _data(entry: object, folder: Path, where: str) -> DataEntry:
    if isinstance(entry, dict):
        _check_keys(entry, SOURCE_KEYS, ("source",), where)
        rows, limit = entry.get("rows"), entry.get("limit")
        return DataEntry(
            _place(_typed(entry["source"], str, f"`source` in {where}"), folder),
            None if rows is None else _typed(rows, str, f"`rows` in {where}"),
            None if limit is None else _typed(limit, int, f"`limit` in {where}"),
        )
    return DataEntry(_place(_typed(entry, str, where), folder))


def _place(spec: str, folder: Path) -> str:
    """A relative path in the name of a model or of data is relative to the suite's folder."""
    place, colon, name = spec.rpartition(":")
    if place.endswith(".py"):
        return f"{folder / place}{colon}{name}"
    return spec if colon else str(folder / spec)


def _method(entry: object) -> MethodEntry:
    if isinstance(entry, str):
        return MethodEntry(entry, method_named(entry))
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        raise InputError(
            f"a method is a name or a table with its `name`, such as {{name = {next(iter(METHODS))!r}}}; "
            f"received {entry!r}"
        )
    method = method_named(entry["name"])
    given = {name: value for name, value in entry.items() if name != "name"}
    where = f"method {entry['name']!r}"
    if "rule" in given:
        raise InputError(f"{where} sets its `rule`; rules are set for the whole suite: rules = {list(RULES)}")
    defaults = {name: getattr(method, name) for name in parameters(method)}
    _check_keys(given, list(defaults), (), where)
    hints = typing.get_type_hints(type(method))
    label = ", ".join(f"{name}={value}" for name, value in given.items())
    given = {name: _like(value, defaults[name], hints[name], f"`{name}` of {where}") for name, value in given.items()}
    return MethodEntry(f"{entry['name']}({label})" if label else entry["name"], dataclasses.replace(method, **given))


def _like(value: Any, default: Any, hint: Any, where: str) -> Any:
    """The value in the type of the default, or where that is None in the type that the hint allows beside it."""
    kinds = [kind for kind in typing.get_args(hint) if kind is not type(None)] if default is None else [type(default)]
    if kinds == [Method]:
        return _method(value).method
    if kinds == [tuple] and isinstance(value, list):
        return _as_tuples(value)
    return _typed(value, kinds[0], where)


def _as_tuples(value: Any) -> Any:
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value


# -- values ----------------------------------------------------------------------------------------


def _check_keys(table: Mapping[str, Any], known: Collection[str], needed: Sequence[str], where: str) -> None:
    unknown = [name for name in table if name not in known]
    if unknown:
        raise InputError(f"{where} has the unknown key {unknown[0]!r}; known: {', '.join(known) or 'none'}")
    missing = [name for name in needed if name not in table]
    if missing:
        raise InputError(f"{where} lacks {missing[0]!r}; it needs: {', '.join(needed)}")


def _check_distinct(names: Sequence[str], what: str) -> None:
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise InputError(f"two {what} of the suite are called {twice!r}; each needs a name of its own")


def _typed(value: Any, kind: type, where: str) -> Any:
    whole = isinstance(value, int) and not isinstance(value, bool)
    if kind is float and whole:
        return float(value)
    if not isinstance(value, kind) or (kind in (int, float) and isinstance(value, bool)):
        raise InputError(f"{where} must be {_KINDS.get(kind, f'a {kind.__name__}')}; received {value!r}")
    return value


def _list(document: Mapping[str, Any], name: str) -> list[Any]:
    """A list of the suite that may not be empty."""
    value = document[name]
    if not isinstance(value, list) or not value:
        raise InputError(f"`{name}` must be a list with at least one entry; received {value!r}{_known(name)}")
    return value


def _known(name: str) -> str:
    known = {"methods": METHODS, "rules": RULES, "models": MODEL_KEYS}.get(name, ())
    return f"; known: {', '.join(known)}" if known else ""


def _rules(document: Mapping[str, Any], name: str) -> tuple[Rule, ...]:
    for rule in (rules := _list(document, name)):
        if rule not in RULES:
            raise InputError(f"unknown rule {rule!r}; known: {', '.join(RULES)}")
    return _distinct(rules)


def _numbers(kind: type, least: float) -> Callable[[Mapping[str, Any], str], tuple[Any, ...]]:
    def read(document: Mapping[str, Any], name: str) -> tuple[Any, ...]:
        numbers = [_typed(value, kind, f"each of `{name}`") for value in _list(document, name)]
        if min(numbers) < least:
            raise InputError(f"each of `{name}` must be at least {least:g}; received {min(numbers)}")
        return _distinct(numbers)

    return read


def _distinct(values: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(dict.fromkeys(values))


def _one(kind: type) -> Callable[[Mapping[str, Any], str], Any]:
    return lambda document, name: _typed(document[name], kind, f"`{name}`")


def _seconds(document: Mapping[str, Any], name: str) -> float:
    value: float = _typed(document[name], float, f"`{name}`")
    if not value > 0:
        raise InputError(f"`{name}` must be a positive number of seconds; received {value:g}")
    return value


_KINDS = {str: "a text", int: "a whole number", float: "a number", bool: "true or false", tuple: "a list"}
_SETTINGS: dict[str, Callable[[Mapping[str, Any], str], Any]] = {
    "rules": _rules,
    "tolerances": _numbers(float, 0),
    "confidence_level": _one(float),
    "batch_sizes": _numbers(int, 1),
    "seeds": _numbers(int, 0),
    "time_budget_s": _seconds,
    "latency_budget_s": _seconds,
    "device": _one(str),
}

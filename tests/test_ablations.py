"""benchmarks/ablations.py: every idea is one that the package knows, and all see the same draws."""

from __future__ import annotations

import argparse
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from test_opponents import load, traffic

from offramp.confidence import CONFIDENCES
from offramp.methods.offramp import Offramp
from offramp.placement import OFF, outcomes

OPTIONS = argparse.Namespace(draws=3, seed=0, tolerances=[0.05], ideas=None)


@pytest.fixture(scope="module")
def ablations() -> Any:
    return load("ablations")


def test_every_idea_is_one_change_that_the_package_knows(ablations: Any) -> None:
    names = [idea.name for idea in ablations.IDEAS]
    assert names[0] == ablations.AS_IT_IS
    assert len(set(names)) == len(names)
    for idea in ablations.IDEAS[1:]:
        assert Offramp(**idea.fields) != Offramp() or not idea.fields
        assert idea.confidence in (None, "selector", *CONFIDENCES)
        changes = (bool(idea.fields), idea.seed != 0, not idea.augmented, idea.slow_recording, idea.about_choosing)
        assert sum(changes) == 1, idea.name


def test_ideas_are_chosen_by_the_beginning_of_their_names(ablations: Any) -> None:
    assert [idea.name for idea in ablations.chosen(["no st", "raw"])] == [
        ablations.AS_IT_IS,
        "no student",
        "raw counts for the search",
    ]
    assert len(ablations.chosen(None)) == len(ablations.IDEAS)


def test_raw_counts_are_the_disagreements_themselves(ablations: Any) -> None:
    agreement_KN = np.array([[True, False], [False, False]])
    assert ablations.raw_counts(np.ones((2, 2)), agreement_KN).tolist() == [[0, 1], [1, 1]]


def test_thresholds_per_cache_are_certified_as_a_path(ablations: Any) -> None:
    records, costs = traffic(4000)
    tune, certify, fresh = (records.rows(np.arange(start, 4000, 3)) for start in range(3))
    thresholds_K = ablations.per_cache_path(tune, certify, costs, 0.05)
    assert np.isfinite(thresholds_K).any()
    assert outcomes(certify, thresholds_K)[1].mean() < 0.05
    assert outcomes(fresh, thresholds_K)[1].mean() < 0.07
    wrong = records.rows(np.flatnonzero(~records.agreement_NK.any(axis=1)))
    assert ablations.per_cache_path(tune, wrong, costs, 0.05) == (OFF,) * 3


def test_a_difference_is_taken_draw_by_draw(ablations: Any) -> None:
    one = ablations.Measured([0.5, 0.7], [0.1, 0.1], [0.0, 0.02], [1.0, 1.1])
    base = ablations.Measured([0.4, 0.5], [], [])
    row = ablations.row("here", ablations.IDEAS[1], 0.01, one, base)
    assert (row["draws"], row["cost_mean"]) == (2, pytest.approx(0.6))
    assert row["difference_mean"] == pytest.approx(0.15)
    assert row["difference_se"] == pytest.approx(0.05)
    assert "+0.150 +- 0.050" in ablations.table([row])
    assert "| 1.05 |" in ablations.table([row]), "the 95th percentile of the costs"
    assert "| 44 % | - |" in ablations.table([row]), "of the oracle's saving; and nothing was learned"


def test_the_slowest_of_twenty_requests_without_caches_costs_a_full_run(ablations: Any) -> None:
    records, costs = traffic(400)
    assert ablations.p95(records, (OFF,) * 3, costs) == 1


def test_records_alone_are_enough_for_ideas_about_choosing(ablations: Any, tmp_path: Path) -> None:
    records, costs = traffic(900)
    file = tmp_path / "resnet" / "records" / "offramp.npz"
    file.parent.mkdir(parents=True)
    np.savez(
        file,
        confidence=records.confidence_NK,
        agreement=records.agreement_NK,
        reads=np.array(records.reads_K),
        before=costs.before_K,
        cache=costs.cache_K,
    )
    rows = ablations.run_on_records(argparse.Namespace(**vars(OPTIONS), on=[file]))
    assert [row["idea"] for row in rows] == [
        ablations.AS_IT_IS,
        *(idea.name for idea in ablations.IDEAS if idea.about_choosing and idea.confidence is None),
    ]
    assert {row["on"] for row in rows} == {"resnet"}
    assert rows[0]["difference_se"] == 0
    assert 0 < rows[0]["cost_mean"] < 1


def test_ideas_about_choosing_share_the_caches(ablations: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    learned, decided = list[str](), list[str | None]()
    one = SimpleNamespace(trained=[1], seconds={"learn": 2.0}, candidates=SimpleNamespace(decide_by=decided.append))

    def learn(idea: Any, bench: object) -> object:
        learned.append(idea.name)
        return one

    monkeypatch.setattr(ablations, "learned", learn)
    monkeypatch.setattr(ablations, "said", lambda one: traffic(600))
    options = argparse.Namespace(**vars(OPTIONS) | {"ideas": ["no student", "confidence: margin"]})
    rows = ablations.run(SimpleNamespace(setup=SimpleNamespace(title="here")), options)
    assert learned == [ablations.AS_IT_IS, "no student"]
    assert decided == [None, None, "margin"]
    assert [(row["idea"], row["learn_s"]) for row in rows] == [
        (ablations.AS_IT_IS, 2.0),
        ("no student", 2.0),
        ("confidence: margin", 2.0),
    ]

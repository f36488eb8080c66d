"""What every registered method owes: run over the registry, so that a new method is held to it by being in there."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from toys import TOLERANCE, images, labelled_batches, make_costs, make_records, toy, traffic

import offramp
from offramp.choosing import Learned, choose
from offramp.errors import InputError
from offramp.fitting import learn
from offramp.methods import METHODS, method_named
from offramp.report.wording import promise
from offramp.types import Records

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module", params=METHODS)
def learned(quick: None, request: pytest.FixtureRequest) -> Learned:
    """Each method after its own training, with labels in the stream for those that need them."""
    streams = traffic(labelled_batches(300, 0), labelled_batches(500, 1))
    return learn(toy(), method=request.param, time_budget_s=60, **streams)


def test_names_are_those_of_the_registry_and_sources_are_given() -> None:
    for name in METHODS:
        method = method_named(name)
        assert method.name == name
        assert method.source
        with pytest.raises(InputError, match="unknown rule 'mine'"):
            type(method)(rule="mine")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", METHODS)
def test_the_published_rule_gives_one_threshold_per_cache_and_looks_at_nothing_else(name: str) -> None:
    records, costs = make_records(200, 4, seed=3), make_costs(4, seed=3)
    before = copy.deepcopy(records)
    thresholds = method_named(name).thresholds(records, costs, TOLERANCE)
    assert len(thresholds) == 4
    assert thresholds == method_named(name).thresholds(records, costs, TOLERANCE)
    same(records, before)


def same(records: Records, before: Records) -> None:
    assert (records.agreement_NK == before.agreement_NK).all()
    assert ((records.confidence_NK == before.confidence_NK) | (records.confidence_NK != records.confidence_NK)).all()


def test_candidates_come_in_order_under_their_own_names(learned: Learned) -> None:
    names = [trained.cache.name for trained in learned.trained]
    assert names
    assert len(set(names)) == len(names)
    positions = [trained.position for trained in learned.trained]
    assert positions == sorted(positions)
    assert all(0 <= trained.confidence_N.min() <= trained.confidence_N.max() <= 1 for trained in learned.trained)


def test_under_the_certificate_the_promise_holds_and_misses_are_exact(learned: Learned) -> None:
    cached = choose(learned, tolerance=TOLERANCE, confidence_level=0.95)
    assert cached.certificate.bound <= TOLERANCE
    backbone, x = toy(), images(300, 2)
    prediction, answers = cached.predict(x), backbone(x)
    missed = prediction.left_at_B == cached.exits.index("backbone")
    assert torch.allclose(prediction.output[missed], answers[missed], atol=1e-5)
    assert (prediction.answer_B != answers.argmax(1)).double().mean() <= 3 * TOLERANCE
    assert cached.report()["fit"]["method"] == learned.method.name


def test_the_published_rule_is_measured_and_not_promised(learned: Learned) -> None:
    cached = choose(learned, tolerance=TOLERANCE, confidence_level=0.95, rule="published")
    assert "measured only" in cached.certificate.procedure
    assert learned.method.name in cached.certificate.procedure
    assert cached.certificate.candidates_tested <= 2


def test_what_was_chosen_survives_saving(learned: Learned, tmp_path: Path) -> None:
    cached = choose(learned, tolerance=TOLERANCE, confidence_level=0.95, rule="published")
    offramp.save(cached, tmp_path / "kept")
    loaded, x = offramp.load(tmp_path / "kept", toy()), images(50, 4)
    assert torch.equal(loaded.predict(x).left_at_B, cached.predict(x).left_at_B)
    assert torch.allclose(loaded(x), cached(x), atol=1e-5)


def test_the_backbone_is_left_as_it_was(learned: Learned) -> None:
    state = learned.candidates.split.backbone.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in toy().state_dict().items())
    assert not learned.candidates.split.backbone.training


def test_a_published_rule_beyond_the_tolerance_is_not_reported_as_passed(learned: Learned) -> None:
    cached = choose(learned, tolerance=0.011, confidence_level=0.95, rule="published")
    last = cached.report()["path"][-1]
    assert last["passed"] == (last["bound"] <= 0.011)
    if cached.plan.caches:
        assert cached.certificate.within_tolerance == (cached.certificate.bound <= 0.011)
        assert promise(cached.report()).startswith("With " if cached.certificate.within_tolerance else "Not within")

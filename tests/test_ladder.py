"""Steps that are taken for cost, plans that take each other's place, and what outlives a process."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
from in_service import scripted

from offramp.caches.recent import RecentCache
from offramp.economy import TRIED, WINDOW
from offramp.ladder import BYPASSED, CERTIFIED, EXTENDED, ONE_OFF, RECENT_SEEN, RESTING, TIGHTENED, Ladder, Told
from offramp.model import CachedModel

A, B, END = 0, 1, 2


def ladder(cached: CachedModel | None = None, run_length: float = 1000) -> Ladder:
    return Ladder(scripted(cache_ms=0.05) if cached is None else cached, run_length, 0)


def told(cache: str | None = None, *, agrees: bool = True, plan_agrees: bool = True, plan_exit: int = END) -> Told:
    return Told(cache, 0.9, agrees, plan_agrees, plan_exit, 0.9, True, agrees)


def hits(cache: str, requests: int) -> list[Told]:
    """As sure as the caches of these models are: evenly between one half and one."""
    return [told(cache)._replace(confidence=0.5 + 0.5 * (k + 1) / (requests + 1)) for k in range(requests)]


def heed(watched: Ladder, requests: Sequence[Told]) -> None:
    for request in requests:
        watched.heed(request)


def flood(watched: Ladder, requests: int = 20 * WINDOW) -> None:
    for _ in range(requests):
        if watched.economy.must_rest([END]):
            watched.rest()
            return


def test_caches_that_never_hit_rest_and_answer_nothing() -> None:
    watched = ladder()
    flood(watched)
    assert watched.rung.name == RESTING
    assert watched.rung.answers_from == (math.inf, math.inf)
    assert watched.rung.model.bypasses(1)
    assert watched.steps[-1].reason == "caches cost more than they save"


def test_they_return_when_sampled_requests_show_that_they_pay() -> None:
    watched = ladder()
    before = watched.rung
    flood(watched)
    heed(watched, [told(plan_exit=END)] * (3 * TRIED))
    assert watched.rung.name == RESTING
    heed(watched, [told(plan_exit=A)] * (TRIED - 1))
    assert watched.rung.name == RESTING
    heed(watched, [told(plan_exit=A)] * TRIED)
    assert watched.rung.name == CERTIFIED
    assert watched.rung is watched.top
    assert watched.rung is not before, "calls that were sampled before belong to what is over"


def test_a_rest_does_not_make_the_watch_forget() -> None:
    """Whoever could make caches rest could otherwise keep an alarm from ever being raised."""
    watched = ladder()
    heed(watched, [told("A", agrees=False)] * 2 + [told()] * 5)
    evidence, sampled = watched.monitor.evidence, watched.monitor.sampled
    assert evidence > 0
    flood(watched)
    heed(watched, [told(plan_exit=A)] * TRIED)
    assert watched.rung.name == CERTIFIED
    assert (watched.monitor.evidence, watched.monitor.sampled) == (evidence, sampled)


def test_a_lower_rung_is_returned_to_after_a_rest() -> None:
    watched = ladder()
    heed(watched, hits("A", 50) + hits("B", 50))
    watched.step_back("a test")
    assert watched.rung.name == TIGHTENED
    limits = watched.rung.answers_from
    flood(watched)
    assert watched.rung.name == RESTING
    heed(watched, [told(plan_exit=A)] * TRIED)
    assert (watched.rung.name, watched.rung.answers_from) == (TIGHTENED, limits)
    assert watched.recovery is not None


def test_caches_do_not_return_for_hits_that_their_rung_refuses() -> None:
    watched = ladder()
    heed(watched, hits("A", 50) + hits("B", 50))
    watched.step_back("a test")
    limit = watched.rung.answers_from[A]
    flood(watched)
    refused, kept = (told(plan_exit=A)._replace(plan_confidence=limit + more) for more in (-0.01, 0.01))
    heed(watched, [refused] * (5 * TRIED))
    assert watched.rung.name == RESTING
    heed(watched, [kept] * (2 * TRIED))
    assert watched.rung.name == TIGHTENED


def test_what_is_bypassed_already_does_not_rest() -> None:
    watched = ladder()
    for _ in range(3):
        watched.step_back("a test")
    watched.rest()
    assert watched.rung.name == BYPASSED


def test_another_plan_takes_the_place_of_all_rungs() -> None:
    watched, other = ladder(), scripted(cache_ms=0.05)
    other.certificate = replace(other.certificate, tolerance=0.05)
    for _ in range(3):
        watched.step_back("a test")
    watched.requests = 77
    watched.adopt(other, "a new plan", {"attempt": 1})
    assert (watched.rung.name, watched.rung.model, watched.top.model) == (CERTIFIED, other, other)
    assert watched.tolerance == 0.05
    step = watched.steps[-1]
    assert (step.request, step.before, step.after, step.evidence["attempt"]) == (77, BYPASSED, CERTIFIED, 1)
    assert watched.monitor.sampled == 0


@pytest.mark.parametrize("steps", [0, 1, 2, 3])
def test_rung_and_evidence_outlive_a_process(steps: int) -> None:
    watched = ladder()
    heed(watched, hits("A", 400) + [told("B", agrees=False)] * 2 + hits("B", 100))
    for _ in range(steps):
        watched.step_back("a test")
        heed(watched, [told("A"), told(plan_agrees=False)])
        watched.culprits.append("B")
    document = json.loads(json.dumps(watched.to_json(), allow_nan=False))
    again = ladder()
    again.resume(document)
    assert (again.rung.name, again.rung.answers_from) == (watched.rung.name, watched.rung.answers_from)
    assert again.rung.name == (CERTIFIED, TIGHTENED, ONE_OFF, BYPASSED)[steps]
    assert again.monitor.to_json() == watched.monitor.to_json()
    assert [step.to_json() for step in again.steps] == document["steps"]
    for one in (watched, again):
        heed(one, [told("A", plan_agrees=True)] * 30)
    assert again.monitor.evidence == watched.monitor.evidence, "and both go on alike"
    if watched.recovery is not None and again.recovery is not None:
        assert again.recovery.evidence == watched.recovery.evidence
    assert (again.recovery is None) == (watched.recovery is None) == (steps == 0)


def test_resting_is_not_kept_but_what_it_interrupted_is() -> None:
    watched = ladder()
    heed(watched, [told("A")] * 20)
    flood(watched)
    again = ladder()
    again.resume(json.loads(json.dumps(watched.to_json())))
    assert again.rung.name == CERTIFIED
    assert again.monitor.sampled == 20


def test_evidence_about_another_plan_is_refused_and_changes_nothing() -> None:
    document = ladder().to_json()
    document["monitor"]["caches"] = {"C": document["monitor"]["caches"]["A"]}
    watched = ladder()
    before = watched.rung
    with pytest.raises(ValueError, match="other caches"):
        watched.resume(document)
    assert watched.rung is before


def test_limits_below_the_plans_are_refused() -> None:
    watched = ladder()
    watched.step_back("a test")
    document = watched.to_json() | {"rung": TIGHTENED, "answers_from": [0.1, 0.5]}
    with pytest.raises(ValueError, match="never loosened"):
        ladder().resume(document)


# --- recent answers -------------------------------------------------------------------------------


def with_recents() -> tuple[Ladder, RecentCache]:
    cached = scripted(cache_ms=0.05)
    cached.result_cache = recents = RecentCache()
    recents.answering = True
    return ladder(cached), recents


def test_recent_answers_are_given_only_once_they_are_shown_to_be_good_enough() -> None:
    watched, recents = with_recents()
    assert not recents.answering, "whatever somebody has set"
    heed(watched, [told("A")._replace(extended_agrees=False)] * 500)
    assert watched.rung.name == CERTIFIED
    heed(watched, [told("A")] * 2000)
    assert watched.rung.name == EXTENDED
    assert recents.answering
    assert watched.steps[-1].evidence["evidence"] >= 1000


def test_the_first_alarm_takes_recent_answers_out_and_nothing_else() -> None:
    watched, recents = with_recents()
    heed(watched, [told("A")] * 2000)
    assert watched.rung.name == EXTENDED
    while watched.rung.name == EXTENDED:
        heed(watched, [told("result", agrees=False)])
    assert watched.rung.name == CERTIFIED
    assert watched.rung is watched.top
    assert not recents.answering
    assert watched.extension is not None
    assert watched.extension.evidence == 0, "the way up begins anew"


def test_traffic_without_near_repeats_says_nothing_about_them() -> None:
    watched, _ = with_recents()
    heed(watched, [told("A")._replace(recent=False)] * 5000 + [told("A")] * (RECENT_SEEN - 1))
    assert watched.rung.name == CERTIFIED
    heed(watched, [told("A")] * 2000)
    assert watched.rung.name == EXTENDED
    assert watched.steps[-1].evidence["recent_answers"] >= RECENT_SEEN


@pytest.mark.parametrize("step", ["step_back", "rest", "bypass", "adopt"])
def test_on_no_other_rung_are_recent_answers_given(step: str) -> None:
    watched, recents = with_recents()
    heed(watched, [told("A")] * 2000)
    assert recents.answering
    if step == "adopt":
        other = scripted()
        other.result_cache = recents
        watched.adopt(other, "a new plan")
    elif step == "rest":
        watched.rest()
    else:
        getattr(watched, step)("a test")
    assert not recents.answering

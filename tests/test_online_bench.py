"""benchmarks/online.py: what is pure in it. Streams, arrival times, the ledger, other rules, charts."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from test_opponents import load, traffic

from offramp.monitoring import confidence_sequence
from offramp.placement import outcomes


def pictures(rows: int, *, classes: int = 10, first: int = 0) -> Any:
    """Each picture is of one grey, its number from `first` on."""
    image = (np.arange(first, first + rows) % 256).astype(np.uint8)
    images = np.broadcast_to(image[:, None, None, None], (rows, 3, 32, 32)).copy()
    return load("replay.traffic").Pictures(images, np.arange(rows) % classes, np.arange(rows) % 2 == 0)


# -- streams ---------------------------------------------------------------------------------------


def test_a_sudden_change_is_all_or_nothing() -> None:
    share_N = load("replay.traffic").Schedule(3, 4, 2).share_N()
    assert share_N.tolist() == [0, 0, 0, 1, 1, 1, 1, 0, 0]


def test_a_slow_change_rises_and_falls_in_even_steps() -> None:
    schedule = load("replay.traffic").Schedule(2, 10, 3, ramp=4)
    share_N = schedule.share_N()
    assert len(share_N) == schedule.length == 15
    assert share_N[:2].tolist() == [0, 0]
    assert share_N[2:12].tolist() == [0.25, 0.5, 0.75, 1, 1, 1, 1, 0.75, 0.5, 0.25]
    assert not share_N[12:].any()


def test_a_stream_sends_no_picture_twice_and_changed_ones_only_while_it_changes() -> None:
    replay = load("replay.traffic")
    usual, changed = pictures(100), pictures(100, first=128)
    stream = replay.changing("x", replay.Schedule(40, 60, 30, ramp=20), usual, changed, None, seed=0)
    grey_N = stream.image_N[:, 0, 0, 0]
    assert len(set(grey_N.tolist())) == len(stream) == 130
    assert (grey_N >= 128).tolist() == stream.changed_N.tolist()
    assert not stream.changed_N[:40].any()
    assert not stream.changed_N[100:].any()
    assert 25 <= stream.changed_N.sum() < 55, "60 less about half of both ramps"
    assert grey_N[~stream.changed_N].tolist() == list(range(int((~stream.changed_N).sum()))), "calm ones in their order"
    assert stream.known_N.tolist() == (grey_N % 2 == 0).tolist()
    again = replay.changing("x", replay.Schedule(40, 60, 30, ramp=20), usual, changed, None, seed=0)
    assert np.array_equal(stream.image_N, again.image_N)


def test_too_few_pictures_are_refused_rather_than_sent_again() -> None:
    replay = load("replay.traffic")
    with pytest.raises(ValueError, match="10 calm and 5 changed requests need as many pictures; there are 9 and 5"):
        replay.changing("x", replay.Schedule(10, 5, 0), pictures(9), pictures(5), None, seed=0)


def test_classes_are_picked_by_their_labels() -> None:
    some = load("replay.traffic").of_classes(pictures(20), (2, 3))
    assert some.label_P.tolist() == [2, 3, 2, 3]
    assert some.image_P[:, 0, 0, 0].tolist() == [2, 3, 12, 13]


@pytest.mark.parametrize("kind", ["blur", "noise", "jpeg", "brightness"])
def test_damaged_pictures_are_others_of_the_same_form(kind: str) -> None:
    damage = load("replay.damage")
    image_P = np.random.default_rng(0).integers(0, 256, (3, 3, 32, 32)).astype(np.uint8)
    arrived = damage.damaged(image_P, damage.DAMAGES[kind], np.random.default_rng(1))
    assert (arrived.shape, arrived.dtype) == (image_P.shape, image_P.dtype)
    assert all((after != before).any() for after, before in zip(arrived, image_P, strict=True))
    again = damage.damaged(image_P, damage.DAMAGES[kind], np.random.default_rng(1))
    assert np.array_equal(arrived, again)


# -- when they come --------------------------------------------------------------------------------

TRACE = """TIMESTAMP,ContextTokens,GeneratedTokens
2023-11-16 18:17:59.9799600,4808,10
2023-11-16 18:18:00.4799600,3180,8
2023-11-16 18:18:00.2799600,3180,8
2023-11-16 18:18:02,110,27
"""


def test_arrival_times_are_seconds_that_never_fall(tmp_path: Path) -> None:
    file = tmp_path / "trace.csv"
    file.write_text(TRACE)
    assert load("replay.traffic").arrivals_s(file) == pytest.approx([0, 0.5, 0.5, 2.02004], abs=1e-6)


@pytest.mark.shared
def test_the_traces_of_shared_are_about_an_hour_each() -> None:
    traces = load("replay.service").TRACES
    if not all(file.exists() for file in traces.values()):
        pytest.skip("the traces in ../shared are not there")
    for name, requests in (("code", 8819), ("conv", 19366)):
        at_s = load("replay.traffic").arrivals_s(traces[name])
        assert len(at_s) == requests
        assert 3000 < at_s[-1] < 3700
        assert (np.diff(at_s) >= 0).all()


def test_a_short_trace_begins_anew_and_time_runs_faster() -> None:
    schedule_s = load("replay.traffic").schedule_s
    trace_s = np.array([0.0, 1.0, 3.0])
    assert schedule_s(trace_s, 6, 1.0).tolist() == [0, 1, 3, 4, 6, 7]
    assert schedule_s(trace_s, 6, 2.0).tolist() == [0, 0.5, 1.5, 2, 3, 3.5]
    assert schedule_s(trace_s, 1, 2.0).tolist() == [0]


# -- the ledger ------------------------------------------------------------------------------------


def ledger_of(*stretches: tuple[int, str, int]) -> Any:
    """Stretches of (plan, rung, requests), each request for half the cost."""
    module = load("replay.ledger")
    ledger = module.Ledger()
    for plan, rung, requests in stretches:
        served = module.Served(plan, rung, 2, 0.1, 0.08, 50)
        for number in range(requests):
            ledger.add(served, number, 0.5, 0.0, 0.01)
    return ledger


def test_stretches_and_plans_add_up() -> None:
    module = load("replay.ledger")
    ledger = ledger_of((0, "certified", 40), (0, "tightened", 10), (0, "certified", 20), (1, "certified", 30))
    wrong_N = np.zeros(100, dtype=bool)
    wrong_N[[3, 45, 60, 75, 99]] = True
    rows = module.stretches(ledger, ledger.columns(), wrong_N)
    assert [row["first_request"] for row in rows] == [0, 40, 50, 70]
    assert [row["disagreements"] for row in rows] == [1, 1, 1, 2]
    first, second = module.of_plans(rows)
    assert (first["plan"], first["requests"], first["disagreements"]) == (0, 60, 2)
    assert (second["first_request"], second["requests"]) == (70, 30)
    assert first["saving"] == pytest.approx(0.5)
    assert not any(map(module.broken, [*rows, first, second]))


def test_a_broken_promise_is_seen_at_the_end_and_on_the_way() -> None:
    module = load("replay.ledger")
    often = np.arange(60) % 2 == 0
    assert module.p_above(30, 60, 0.1) < 1e-9
    row = module.stretches(ledger := ledger_of((0, "certified", 60)), ledger.columns(), often)[0]
    assert module.broken(row)
    early = np.concatenate([np.ones(20, dtype=bool), np.zeros(1000, dtype=bool)])
    assert module.p_above(20, 1020, 0.1) > 0.9, "as a whole it looks well"
    lowest = module.lowest_ever(early, 0.95)
    assert lowest == pytest.approx(max(confidence_sequence(n, n, 0.95)[0] for n in range(1, 21)))
    assert lowest > 0.1


def test_the_disagreement_since_a_swap_begins_with_it() -> None:
    module = load("replay.ledger")
    wrong_N = np.array([1, 0, 0, 1, 0, 1], dtype=bool)
    stretch_N = np.array([0, 0, 0, 1, 1, 1])
    assert module.ends(6, 4) == [4, 6]
    assert module.since_swap(stretch_N, wrong_N, [2, 4, 6]) == pytest.approx([0.5, 1.0, 2 / 3])
    assert module.windows(wrong_N, 4) == [0.5, 0.5]


# -- other rules on the same stream ----------------------------------------------------------------


def test_without_the_loop_the_plan_answers_whatever_comes() -> None:
    records, costs = traffic(1500)
    thresholds_K = (0.9, 0.8, 0.7)
    run = load("replay.rivals").unwatched(records, thresholds_K, costs)
    left_N, wrong_N = outcomes(records, thresholds_K)
    assert np.array_equal(run.wrong_N, wrong_N)
    assert (run.cost_N[left_N == 3] > 1).all()


def test_apparate_tunes_anew_on_the_window_before() -> None:
    rivals = load("replay.rivals")
    records, costs = traffic(2000)
    run = rivals.tuned_anew(records, (0.9, 0.8, 0.7), costs, 0.05)
    _, before_N = outcomes(records, (0.9, 0.8, 0.7))
    assert np.array_equal(run.wrong_N[: rivals.WINDOW], before_N[: rivals.WINDOW])
    assert run.changed_at[0] == rivals.WINDOW
    assert all(at % rivals.RETUNED_EVERY == 0 for at in run.changed_at)
    assert run.wrong_N[rivals.WINDOW :].mean() < 0.08
    again = rivals.tuned_anew(records, (0.9, 0.8, 0.7), costs, 0.05)
    assert np.array_equal(run.cost_N, again.cost_N)


def test_after_the_alarm_of_mapies_monitor_the_full_model_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mapie")
    rivals = load("replay.rivals")
    records, costs = traffic(3000)
    run = rivals.monitored(records, (0.0, 0.0, 0.0), costs, 0.01, 1.0, 0)
    (alarm,) = run.changed_at
    assert run.wrong_N[: alarm + 1].sum() > 0
    assert not run.wrong_N[alarm + 1 :].any()
    assert (run.cost_N[alarm + 1 :] == 1).all()
    calm = rivals.monitored(records, (2.0, 2.0, 2.0), costs, 0.01, 1.0, 0)
    assert calm.changed_at == []


# -- what drift.py reads off a run -----------------------------------------------------------------


def step(request: int, reason: str, **evidence: object) -> dict[str, Any]:
    return {"request": request, "reason": reason, "evidence": evidence}


def test_the_delay_counts_from_the_change_on() -> None:
    drift, schedule = load("replay.drift"), load("replay.traffic").Schedule(100, 200, 50)
    wrong_N = np.zeros(350, dtype=bool)
    wrong_N[[10, 120, 130, 180]] = True
    steps = [
        step(40, f"{drift.ALARM} than ...", sampled=30),
        step(150, f"{drift.ALARM} than ...", sampled=25),
        step(170, f"{drift.ALARM} than ...", sampled=3),
    ]
    found = drift.alarmed(steps, schedule, wrong_N, 20)
    assert (found["false_alarms"], found["alarm_request"], found["delay_requests"]) == (1, 150, 50)
    assert (found["delay_sampled"], found["disagreements_until_alarm"]) == (5, 2)
    assert drift.alarmed(steps[:1], schedule, wrong_N, 20)["alarm_request"] is None


def test_a_new_plan_counts_from_its_first_answer() -> None:
    drift, schedule = load("replay.drift"), load("replay.traffic").Schedule(10, 20, 10)
    cost_N, wrong_N, at_s = np.full(40, 0.5), np.zeros(40, dtype=bool), np.arange(40) / 2
    rows = [{"plan": 0, "caches": 2, "first_request": 0}, {"plan": 1, "caches": 0, "first_request": 15}]
    assert drift.renewed(rows, schedule, cost_N, wrong_N, at_s) == {"new_plan_request": None}
    found = drift.renewed([*rows, {"plan": 2, "caches": 1, "first_request": 22}], schedule, cost_N, wrong_N, at_s)
    assert (found["new_plan_after_requests"], found["new_plan_after_s"]) == (12, 6.0)
    assert found["with_new_plan"]["requests"] == 8


def test_false_alarms_are_counted_on_recorded_requests() -> None:
    drift = load("replay.drift")
    records, _ = traffic(1000)
    planned = [SimpleNamespace(name=name, threshold=0.9) for name in "abc"]
    _, wrong_N = outcomes(records, (0.9, 0.9, 0.9))
    options = SimpleNamespace(calm_requests=20_000, run_length=1000, seed=0)

    def alarms(tolerance: float) -> int:
        cached = SimpleNamespace(plan=SimpleNamespace(caches=planned), certificate=SimpleNamespace(tolerance=tolerance))
        found = drift.false_alarms(records, cached, options)
        assert found["disagreement"] == pytest.approx(wrong_N.mean())
        return int(found["alarms"])

    assert alarms(min(2 * float(wrong_N.mean()), 0.5)) <= 20
    assert alarms(float(wrong_N.mean()) / 2) > 20


# -- faults ----------------------------------------------------------------------------------------


def test_an_episode_is_about_the_requests_that_were_answered() -> None:
    siege = load("replay.siege")
    episode = siege.Episode("x", sent=110, unanswered=5, wrong=3, errors=["e"] * 5)
    row = episode.to_json(0.05)
    assert row["p_value"] == pytest.approx(load("replay.ledger").p_above(3, 100, 0.05))
    assert row["checks"] == {"no call raises": False, "within the tolerance": True}
    assert siege.Episode("y", sent=100, wrong=30).to_json(0.05)["checks"]["within the tolerance"] is False


def test_what_was_not_shown_is_said() -> None:
    faults = load("replay.faults")
    rows = [load("replay.siege").Episode("x", sent=10).to_json(0.05)]
    rows[0]["checks"]["it holds"] = False
    text = faults.table({"rows": rows, "failed": ["x: it holds"], "tolerance": 0.05})
    assert "it holds: **no**" in text
    assert "Not shown: x: it holds." in text


def test_the_load_goes_on_when_the_process_is_lost() -> None:
    siege = load("replay.siege")

    class Gone:
        sent = 0

        def send(self, do: str, number: int) -> int:
            self.sent += 1
            if self.sent > 6:
                raise siege.Lost("it ended")
            return number

        def wait(self, number: int) -> dict[str, Any]:
            return {"answer": 1, "left": "backbone", "rung": "certified"}

    run = siege.Run.__new__(siege.Run)
    run.child, run._usual, run.counted, run.full_N = Gone(), iter(range(100)), 0, np.array([1, 0] * 50)
    episode = siege.Episode("x")
    run.load(episode, 50)
    assert (episode.sent, episode.unanswered, run.counted) == (7, 4, 3)
    assert episode.wrong == 1


def test_a_request_costs_what_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    service = load("replay.service")
    monkeypatch.setattr(service, "flop_shares", lambda costs: (np.array([0.0, 0.5]), np.array([0.1, 0.2])))

    def rung(*answers_from: float, bypasses: bool = False) -> Any:
        model = SimpleNamespace(costs=None, bypasses=lambda rows: bypasses, plan=SimpleNamespace(caches=(1, 2)))
        return SimpleNamespace(model=model, answers_from=answers_from)

    assert service.cost_at_exits(rung(0.9, 0.9)).tolist() == pytest.approx([0.1, 0.8, 1.3])
    assert service.cost_at_exits(rung(0.9, np.inf)).tolist() == pytest.approx([0.1, 0.6, 1.1]), "the last is not asked"
    assert service.cost_at_exits(rung(np.inf, np.inf, bypasses=True)).tolist() == [1, 1, 1]


# -- threads and charts ----------------------------------------------------------------------------


def test_answers_are_told_apart_by_all_of_their_rows() -> None:
    threads = load("replay.threads")
    batch = torch.arange(4.0)[:, None]

    def rung(name: str, factor: float) -> Any:
        return SimpleNamespace(name=name, answers_from=(factor,), model=SimpleCall(factor))  # its plan is empty

    class SimpleCall:
        plan = SimpleNamespace(caches=())

        def __init__(self, factor: float) -> None:
            self.factor = factor

        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            return self.factor * x

    mixed = torch.cat([batch[:2], 2 * batch[2:]])
    said = [(0, batch), (0, 2 * batch), (0, 2 * batch), (0, mixed)]
    counts, strange = threads.judged([rung("one", 1.0), rung("two", 2.0)], said, [batch])
    assert (counts, strange) == ({"one: ": 1, "two: ": 2}, 1)


def test_ticks_are_round_and_few() -> None:
    ticks = load("replay.chart").ticks
    assert ticks(100.0) == [0, 20, 40, 60, 80, 100]
    assert ticks(2.0) == pytest.approx([0, 0.5, 1, 1.5, 2])
    assert all(2 <= len(ticks(top)) <= 6 for top in (0.013, 1.7, 42.0, 57_500.0))


def test_a_chart_is_well_formed_and_loads_nothing() -> None:
    chart = load("replay.chart")
    lines = [chart.Line("a < b", [(0, 1.0), (10, 2.0)]), chart.Line("c", [(0, 1.0), (10, 2.0)], "limit", steps=True)]
    text = chart.svg([chart.Panel("of & to", lines, marks=[(5, "here")])] * 3, "requests", columns=2)
    root = ElementTree.fromstring(text)
    assert root.tag.endswith("svg")
    assert "http" not in text.replace("http://www.w3.org/2000/svg", "")
    assert text.count("<polyline") == 6

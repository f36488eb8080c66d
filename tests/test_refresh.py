"""When a model in service learns, from which inputs, and what becomes of a refit that fails."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import models
import pytest
import torch
from torch import Tensor

import offramp.refresh as module
from offramp.artifact import save
from offramp.errors import InputError, OfframpError, StorageError
from offramp.ladder import ALARM, CERTIFIED, TIGHTENED, Rung
from offramp.methods import METHODS, method_named
from offramp.model import CachedModel
from offramp.refresh import CERTIFY, JOB, RESULT, TRAIN, WITHOUT_LABELS, Candidate, Refresh, Refresher, stored
from offramp.reservoir import Reservoir
from offramp.splitting import SplitModel, split
from offramp.streams import Batch

TOLERANCE, ROWS = 0.02, 50
NUMBER = 5  # the column of an input that counts requests


def served(caches: int = 1) -> CachedModel:
    torch.manual_seed(0)
    split_model = split(models.mlp().eval(), torch.randn(4, 6))
    cached = models.cached_model(split_model, [models.learned(split_model.points[0], 3)] * caches, [0.6] * caches)
    cached.certificate = replace(cached.certificate, tolerance=TOLERANCE, bound=0.01, confidence_level=0.95)
    return cached


class Fake:
    """In place of the other process: ends when it is told to, with what it is told."""

    def __init__(self, folder: Path, split_model: SplitModel) -> None:
        self.folder, self.split_model = folder, split_model
        self.job = json.loads((folder / JOB).read_text())
        self.said: dict[str, Any] | Exception | None = None
        self.killed = False

    def running(self) -> bool:
        return self.said is None

    def outcome(self) -> dict[str, Any]:
        assert self.said is not None
        if isinstance(self.said, Exception):
            raise self.said
        return self.said

    def kill(self) -> None:
        self.killed = True

    def succeed(self, **more: Any) -> None:
        cached = served()
        level = {"confidence_level": self.job["confidence_level"]} | more
        cached.certificate = replace(cached.certificate, **level)
        save(cached, self.folder / RESULT)
        self.said = {"certified": True, "tested": True, "cost": 0.4, "cost_now": 1.0, "seconds": 1.0}

    def fail(self, *, tested: bool = True) -> None:
        self.said = {"certified": False, "tested": tested, "reason": "no plan with caches passed", "seconds": 1.0}


class Life:
    """A refresher, the traffic that it sees, and the process that it starts."""

    def __init__(
        self,
        folder: Path,
        policy: Refresh,
        *,
        cached: CachedModel | None = None,
        spent: Callable[[], None] = lambda: None,
    ) -> None:
        self.cached = served(0) if cached is None else cached
        self.reservoir = Reservoir(self.cached.split_model.example, 1 << 16, seed=0)
        self.refresher = Refresher(policy, self.cached, self.reservoir, folder / "refit", spent)
        self.rung = Rung.certified(self.cached)

    def traffic(self, rows: int) -> list[Candidate]:
        """So many requests, one by one, and what was due after each."""
        found = []
        for _ in range(rows):
            x = torch.randn(1, 6)
            x[:, NUMBER] = self.reservoir.seen
            self.reservoir.add(Batch((x,)))
            self.refresher.add(Batch((x,)))
            candidate = self.refresher.tick(self.rung)
            found += [] if candidate is None else [candidate]
        return found

    @property
    def process(self) -> Fake:
        return cast(Fake, self.refresher._process)

    def until_it_fits(self, most: int = 1000) -> None:
        for _ in range(most):
            if self.refresher._process is not None:
                return
            self.traffic(1)
        raise AssertionError(f"no process was started: {self.refresher.report()}")


@pytest.fixture(autouse=True)
def _faked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_Process", Fake)


def policy(**more: Any) -> Refresh:
    return Refresh(**{"train_rows": ROWS, "certify_rows": 30, "drift_rows": 20} | more)


def numbers(batch: Batch) -> list[int]:
    return batch.args[0][:, NUMBER].int().tolist()


# --- from traffic to a candidate ------------------------------------------------------------------


def test_it_learns_from_older_inputs_and_certifies_on_newer_ones(tmp_path: Path) -> None:
    life = Life(tmp_path, policy())
    assert life.traffic(ROWS - 1) == []
    assert not life.refresher.busy
    life.until_it_fits()
    train, certify = (numbers(stored(tmp_path / "refit" / name)) for name in (TRAIN, CERTIFY))
    assert len(train) == len(set(train)) >= ROWS
    assert certify == list(range(max(train) + 1, max(train) + 31)), "all requests that came next"


def test_a_candidate_is_handed_out_once_with_its_evidence(tmp_path: Path) -> None:
    life = Life(tmp_path, policy())
    life.until_it_fits()
    assert life.traffic(5) == []
    life.process.succeed()
    (candidate,) = life.traffic(3)
    assert candidate.cached.plan.caches
    assert candidate.cached.split_model is life.cached.split_model, "nothing is traced again"
    assert candidate.reason == "a new plan: there is more traffic to learn from"
    assert candidate.evidence["attempt"] == 1
    assert candidate.evidence["confidence_level"] == 1 - 0.05 / 2
    assert life.refresher.attempts[-1].outcome == "taken into service"


def test_each_attempt_is_certified_at_the_level_that_the_budget_has_for_it(tmp_path: Path) -> None:
    life = Life(tmp_path, policy(growth=1.01))
    for k in range(1, 5):
        life.until_it_fits(5000)
        assert 1 - life.process.job["confidence_level"] == pytest.approx(0.05 / (k * (k + 1)))
        life.process.fail() if k % 2 else life.process.succeed()
        life.traffic(1)
    assert len(life.refresher.budget.spends) == 4


def test_the_first_plan_may_come_by_a_method_of_its_own_and_the_next_follows_at_once(tmp_path: Path) -> None:
    life = Life(tmp_path, policy(first_method="freeze", growth=1000.0))
    life.until_it_fits()
    assert life.process.job["method"] == "freeze"
    seen = life.reservoir.seen
    life.process.succeed()
    (candidate,) = life.traffic(1)
    life.rung = Rung.certified(candidate.cached)
    life.until_it_fits()
    assert life.process.job["method"] == "offramp"
    assert life.reservoir.seen - seen <= 35, "no more than what certifies had to come"
    life.process.fail()
    life.traffic(2000)
    assert life.refresher._process is None, "from then on as ever"


@pytest.mark.parametrize(("caches", "crashed"), [(1, False), (0, True)])
def test_a_first_method_is_for_models_that_begin_without_caches(tmp_path: Path, caches: int, *, crashed: bool) -> None:
    life = Life(tmp_path, policy(first_method="freeze"), cached=served(caches))
    if crashed:
        life.until_it_fits()
        life.refresher.resume(life.refresher.to_json())
        life.refresher._process = None
    life.until_it_fits()
    assert life.process.job["method"] == "offramp"


def test_a_model_that_came_with_a_certificate_has_spent_that_already(tmp_path: Path) -> None:
    assert Life(tmp_path, policy()).refresher.budget.total == pytest.approx(0.05)
    assert Life(tmp_path, policy(), cached=served(1)).refresher.budget.total == pytest.approx(0.10)


def test_more_traffic_is_learned_from_until_the_reservoir_is_full(tmp_path: Path) -> None:
    life = Life(tmp_path, policy(growth=2.0))
    held = []
    for _ in range(4):
        life.until_it_fits(2000)
        held.append(len(stored(tmp_path / "refit" / TRAIN)))
        life.process.succeed()
        life.traffic(1)
    assert all(later >= 2 * earlier for earlier, later in itertools.pairwise(held))


def test_it_is_done_again_after_a_while(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    life = Life(tmp_path, policy(growth=1e9, every_s=100.0))
    life.until_it_fits()
    life.process.succeed()
    life.traffic(200)
    assert not life.refresher.busy
    now = time.monotonic() + 101
    monkeypatch.setattr(time, "monotonic", lambda: now)
    monkeypatch.setattr(time, "time", lambda: 0.0)  # what the calendar says does not matter
    life.traffic(1)
    assert life.refresher.busy


def test_one_at_a_time(tmp_path: Path) -> None:
    life = Life(tmp_path, policy(train_rows=10_000))
    life.traffic(60)
    assert life.refresher.want("by hand")
    assert not life.refresher.want("and again")
    life.traffic(1)
    assert not life.refresher.want("while inputs are gathered")
    life.until_it_fits()
    assert not life.refresher.want("while it fits")
    life.process.succeed()
    life.traffic(1)
    assert [attempt.reason for attempt in life.refresher.attempts] == ["by hand"]
    assert life.refresher.want("once it is over")


# --- when traffic changes -------------------------------------------------------------------------


def test_an_alarm_waits_for_inputs_of_the_changed_traffic(tmp_path: Path) -> None:
    life = Life(tmp_path, policy(growth=1e9), cached=served(1))
    life.until_it_fits()
    life.process.succeed()
    life.traffic(100)
    alarmed_at = life.reservoir.seen
    life.rung = Rung(TIGHTENED, life.cached.restricted([0.9]), (0.9,))
    life.until_it_fits()
    train, certify = (numbers(stored(tmp_path / "refit" / name)) for name in (TRAIN, CERTIFY))
    assert sum(number >= alarmed_at for number in train) >= 20
    assert min(certify) > max(train)
    assert life.refresher.attempts[-1].reason == ALARM
    assert life.process.job["answers_from"] == [0.9]


def test_what_was_gathered_before_an_alarm_does_not_certify(tmp_path: Path) -> None:
    life = Life(tmp_path, policy(), cached=served(1))
    life.traffic(ROWS + 10)
    assert life.refresher.report()["state"].startswith("gathering")
    alarmed_at = life.reservoir.seen
    life.rung = Rung(TIGHTENED, life.cached.restricted([0.9]), (0.9,))
    life.until_it_fits()
    assert min(numbers(stored(tmp_path / "refit" / CERTIFY))) >= alarmed_at + 20


def test_on_alarm_can_be_switched_off(tmp_path: Path) -> None:
    life = Life(tmp_path, policy(growth=1e9, on_alarm=False), cached=served(1))
    life.until_it_fits()
    life.process.succeed()
    life.traffic(1)
    life.rung = Rung(TIGHTENED, life.cached.restricted([0.9]), (0.9,))
    life.traffic(200)
    assert not life.refresher.busy


# --- what fails changes nothing -------------------------------------------------------------------


def test_what_is_spent_is_on_disk_before_the_process_starts(tmp_path: Path) -> None:
    written: list[int] = []

    def spent() -> None:
        assert life.refresher._process is None
        written.append(len(life.refresher.budget.spends))

    life = Life(tmp_path, policy(), spent=spent)
    life.until_it_fits()
    assert written == [1]


def test_what_tested_nothing_gives_back_what_it_spent(tmp_path: Path) -> None:
    life = Life(tmp_path, policy())
    for tested in (False, True, False):
        life.until_it_fits(5000)
        life.process.fail(tested=tested)
        life.traffic(1)
    assert len(life.refresher.budget.spends) == 1
    assert len(life.refresher.attempts) == 3
    life.until_it_fits(5000)
    assert 1 - life.process.job["confidence_level"] == pytest.approx(0.05 / 6)


def test_without_room_to_write_that_down_nothing_is_started_nor_spent(tmp_path: Path) -> None:
    def full() -> None:
        raise StorageError("could not write state.json: No space left on device")

    life = Life(tmp_path, policy(), spent=full)
    assert life.traffic(200) == []
    assert life.refresher._process is None
    assert life.refresher.budget.spends == ()


@pytest.mark.parametrize("how", ["not certified", "killed", "another level", "beyond the tolerance", "damaged"])
def test_an_attempt_that_fails_brings_no_plan_and_the_next_waits_longer(
    tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    life = Life(tmp_path, policy())
    waits = []
    for _ in range(3):
        life.until_it_fits(5000)
        started = life.reservoir.seen
        if how == "not certified":
            life.process.fail()
        elif how == "killed":
            life.process.said = OfframpError("the refit ended with code -9: it said nothing")
        elif how == "another level":
            life.process.succeed(confidence_level=0.9)
        elif how == "beyond the tolerance":
            life.process.succeed(bound=0.5)
        else:
            life.process.succeed()
            (tmp_path / "refit" / RESULT / "caches.safetensors").write_bytes(b"cut")
        assert life.traffic(1) == []
        assert life.refresher.attempts[-1].outcome not in ("running", "taken into service")
        waits.append(life.refresher._not_before - started)
    assert 1.5 * waits[0] < waits[1] < waits[2] / 1.5
    assert "a refit brought no new plan" in caplog.text


def test_a_folder_that_cannot_be_written_ends_the_attempt(tmp_path: Path) -> None:
    (tmp_path / "refit").write_text("a file where the folder should be")
    life = Life(tmp_path, policy())
    assert life.traffic(100) == []
    assert life.refresher.budget.spends == ()


def test_a_refit_that_does_not_end_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    life = Life(tmp_path, policy(time_budget_s=10.0))
    life.until_it_fits()
    process, began = life.process, time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: began + 690.0)
    life.traffic(1)
    assert not process.killed
    monkeypatch.setattr(time, "monotonic", lambda: began + 710.0)
    assert life.traffic(1) == []
    assert process.killed
    assert life.refresher.attempts[-1].outcome == "it has not ended after 700 s"


def test_closing_ends_the_process(tmp_path: Path) -> None:
    life = Life(tmp_path, policy())
    life.until_it_fits()
    process = life.process
    life.refresher.close()
    life.refresher.close()
    assert process.killed


# --- across a restart -----------------------------------------------------------------------------


def test_what_was_spent_stays_spent_and_what_ran_is_over(tmp_path: Path) -> None:
    life = Life(tmp_path, policy())
    life.until_it_fits()
    document = json.loads(json.dumps(life.refresher.to_json()))
    again = Life(tmp_path, policy())
    again.refresher.resume(document)
    assert again.refresher.budget == life.refresher.budget
    assert again.refresher.attempts[-1].outcome == "ended with the process that it served"
    again.until_it_fits()
    assert 1 - again.process.job["confidence_level"] == pytest.approx(0.05 / 6)


# --- the rest -------------------------------------------------------------------------------------


def test_policies_know_the_methods_that_learn_without_labels() -> None:
    assert list(WITHOUT_LABELS) == [name for name in METHODS if not method_named(name).needs_labels]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"train_rows": 0}, "train_rows is 0; expected a whole number from 1"),
        ({"certify_rows": 0}, "certify_rows is 0"),
        ({"drift_rows": -1}, "drift_rows is -1"),
        ({"keep": 1.5}, "keep is 1.5"),
        ({"growth": 1.0}, "growth is 1.0; expected a factor above 1"),
        ({"cpu_share": 0.0}, "cpu_share is 0.0; expected a share"),
        ({"cpu_share": 1.5}, "cpu_share is 1.5"),
        ({"time_budget_s": 0.0}, "time_budget_s is 0.0"),
        ({"every_s": -1.0}, "every_s is -1.0"),
        ({"method": "gatti"}, "method is 'gatti'; expected the name of a method .* without labels: offramp, gati"),
        ({"first_method": "branchynet"}, "first_method is 'branchynet'"),  # it needs labels, which traffic has not
    ],
)
def test_senseless_policies_are_refused(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Refresh(**wrong)


def test_inputs_are_stored_as_they_are(tmp_path: Path) -> None:
    def keys(batch: Batch) -> dict[str, Tensor]:
        return dict(batch.kwargs)

    batch = Batch((torch.randn(3, 2), torch.arange(3)), {"z": torch.ones(3), "a.b": torch.zeros(3, dtype=torch.bool)})
    module._store(batch, tmp_path / "x")
    again = stored(tmp_path / "x")
    assert all(torch.equal(one, other) for one, other in zip(batch.args, again.args, strict=True))
    assert list(keys(again)) == ["z", "a.b"]
    assert all(torch.equal(value, again.kwargs[name]) for name, value in batch.kwargs.items())


def test_the_report_says_what_is_going_on(tmp_path: Path) -> None:
    life = Life(tmp_path, policy())
    states = [life.refresher.report()["state"]]
    while life.refresher._process is None:
        life.traffic(1)
        states.append(life.refresher.report()["state"])
    assert states[0] == "idle"
    assert "gathering: 3 of 30 newer inputs" in states
    assert states[-1] == "fitting"
    assert json.dumps(life.refresher.report())
    assert life.rung.name == CERTIFIED

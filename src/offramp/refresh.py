"""Learning from traffic while the model serves: when, from which inputs, and by which process.

A refit takes three steps. The recent inputs are copied out of the reservoir: these train. Then come inputs that are
newer than all of them: every request is taken until there are enough; these tune and certify. Then another process
(`offramp.refitting`), within the share of the processor that the user allows, trains, certifies at the level that the
failure budget has for it, and says whether the result is cheaper than what serves now. Only a plan that is certified
and cheaper is handed out; whatever else happens in there is an attempt that failed, and changes nothing.

What a certification may fail with is spent, and on disk, before the process starts: a crash cannot win it back.
"""

from __future__ import annotations

import io
import json
import logging
import math
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch

from offramp.artifact import apart, batch_of, load_onto, save, tensors_of
from offramp.budget import FailureBudget
from offramp.calibration import inputs_needed
from offramp.errors import InputError, OfframpError
from offramp.ladder import ALARM, STEPPED_BACK, Rung, finite
from offramp.model import CachedModel
from offramp.reservoir import Fresh, Reservoir
from offramp.splitting import SplitModel
from offramp.state import write_whole
from offramp.streams import Batch

log = logging.getLogger("offramp")

JOB, EXAMPLE, TRAIN, CERTIFY, OUTCOME, RESULT, CURRENT, LOG = (
    "job.json",
    "example.safetensors",
    "train.safetensors",
    "certify.safetensors",
    "outcome.json",
    "plan",
    "current",
    "log.txt",
)
CERTIFY_SHARE = 0.6  # of the newer inputs, about, that certify; the others tune. Some are repeats
WITHOUT_LABELS = ("offramp", "gati", "selfxit", "approximate_key", "freeze")  # methods; this process imports none
KEPT_ATTEMPTS = 50
SHOWN = ("budget", "attempts")  # in a report
MOST_BACKOFF = 6  # doublings of the wait after failures
PATIENCE, SPARE_S = 10.0, 600.0  # a refit is ended after so many times its budget, and this


@dataclass(frozen=True, kw_only=True)
class Refresh:
    """When and how a model in service learns from its traffic.

    train_rows: recent inputs that a first refit takes at the least. growth: it is done again once that many times as
    many are held, until the reservoir is full. on_alarm: also when the ladder has stepped back; then `drift_rows`
    requests are waited for, to learn from. every_s: also so many seconds after the last; None: never. certify_rows:
    newer inputs that tune and certify; None: enough for a plan that disagrees by half of the tolerance. After an
    attempt that failed twice as many requests are waited for as after the one before.

    cpu_share: of all processors, the most that the refit takes on average. time_budget_s, method, seed: as in `fit`; a
    refit that takes much longer than its budget is ended. first_method: of the first refit of a model that has no
    caches yet, such as "freeze", which trains nothing, so that some plan comes early; the refit by `method` follows at
    once, certified from what the first has left of the budget. keep: earlier plans that `roll_back` can return to.
    """

    train_rows: int = 1_000
    certify_rows: int | None = None
    drift_rows: int = 1_000
    growth: float = 3.0
    on_alarm: bool = True
    every_s: float | None = None
    cpu_share: float = 0.5
    time_budget_s: float = 300.0
    method: str = "offramp"
    first_method: str | None = None
    seed: int = 0
    keep: int = 3

    def __post_init__(self) -> None:
        numbers = {"train_rows": 1, "drift_rows": 0, "keep": 0, "seed": 0} | (
            {} if self.certify_rows is None else {"certify_rows": 1}
        )
        for name, least in numbers.items():
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise InputError(f"{name} is {value!r}; expected a whole number from {least}")
        if not self.growth > 1:
            raise InputError(f"growth is {self.growth!r}; expected a factor above 1, such as 3")
        if not 0 < self.cpu_share <= 1:
            raise InputError(f"cpu_share is {self.cpu_share!r}; expected a share of all processors, such as 0.5")
        for name in ("time_budget_s", "every_s"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise InputError(f"{name} is {value!r}; expected a positive number of seconds")
        _check_method("method", self.method)
        if self.first_method is not None:
            _check_method("first_method", self.first_method)


def _check_method(field: str, name: object) -> None:
    """Now, not when a refit that has waited for its inputs fails."""
    if name not in WITHOUT_LABELS:
        raise InputError(
            f"{field} is {name!r}; expected the name of a method that learns from traffic without labels: "
            f"{', '.join(WITHOUT_LABELS)}"
        )


class Candidate(NamedTuple):
    """A certified plan that is cheaper than what serves, and on what evidence."""

    cached: CachedModel
    reason: str
    evidence: dict[str, Any]


@dataclass(frozen=True)
class Attempt:
    """One refit: why, from how many inputs, at which level, and what became of it."""

    number: int
    reason: str
    at: str
    request: int
    train_rows: int
    certify_rows: int
    confidence_level: float
    outcome: str = "running"
    seconds: float | None = None
    detail: Mapping[str, Any] | None = None


class Refresher:
    """Decides when to learn, and has it done. `tick` is called by one thread; `add` and `want` by any.

    observed: whether the reservoir holds observed requests (`offramp.observing`) instead of inputs; then all numbers of
    inputs are those of such requests. folder: of the job that runs. spent: called once a certification has been spent
    from the budget; it must have that on disk when it returns, and whatever it raises ends the attempt before it
    begins.
    """

    def __init__(
        self,
        policy: Refresh,
        cached: CachedModel,
        reservoir: Reservoir,
        folder: Path,
        spent: Callable[[], None],
        *,
        observed: bool = False,
    ) -> None:
        self.policy, self._reservoir, self._folder, self._spent = policy, reservoir, folder, spent
        self._observed = observed
        certificate = cached.certificate
        self.tolerance = certificate.tolerance
        allowance = 1 - certificate.confidence_level
        self.budget = FailureBudget(allowance, before=allowance if cached.plan.caches else 0.0)
        self.attempts: list[Attempt] = []
        self._held_at_last, self._failures, self._not_before = 0, 0, 0
        self._last = self._began = time.monotonic()
        self._wanted: str | None = None
        self._lock = threading.Lock()  # of `_wanted`
        self._reason = ""
        self._snapshot_at: int | None = None  # requests seen when the reservoir is to be copied out
        self._fresh: Fresh | None = None
        self._process: _Process | None = None

    # -- from the calls ----------------------------------------------------------------------------

    def add(self, batch: Batch) -> None:
        """What the reservoir got too."""
        if (fresh := self._fresh) is not None and not fresh.full:
            fresh.add(batch)

    def want(self, reason: str) -> bool:
        """Ask for a refit; whether it will begin: none is under way, and none has been asked for."""
        with self._lock:
            if self._wanted is not None or self.busy:
                return False
            self._wanted = reason
            return True

    @property
    def busy(self) -> bool:
        """Whether inputs are gathered, or a process runs."""
        return self._snapshot_at is not None or self._fresh is not None or self._process is not None

    # -- step by step ------------------------------------------------------------------------------

    def tick(self, serving: Rung) -> Candidate | None:
        """Do what is due; a candidate, once there is one. Never raises: an attempt that fails is logged."""
        try:
            return self._tick(serving)
        except Exception as error:
            self._fail(f"{type(error).__name__}: {error}")
            return None

    def _tick(self, serving: Rung) -> Candidate | None:
        if self._process is not None:
            return self._harvest(self._process)
        alarmed = self.policy.on_alarm and serving.name in STEPPED_BACK
        if self.busy and alarmed and self._reason != ALARM:  # what was gathered is from before the traffic changed
            self._plan_for(ALARM)
        elif self._fresh is not None:
            if self._fresh.full:
                self._begin(self._fresh.inputs(), serving)
        elif self._snapshot_at is not None:
            if self._reservoir.seen >= self._snapshot_at:
                self._snapshot()
        elif (reason := self._due(alarmed=alarmed)) is not None:
            self._plan_for(reason)
        return None

    def _plan_for(self, reason: str) -> None:
        """Inputs are gathered from now on, or once there are enough of the changed traffic."""
        self._reason, self._fresh = reason, None
        self._snapshot_at = self._reservoir.seen + (self.policy.drift_rows if reason == ALARM else 0)

    def _due(self, *, alarmed: bool) -> str | None:
        """Why it is time to learn; None where it is not."""
        with self._lock:
            wanted, self._wanted = self._wanted, None
        if wanted is not None:
            return wanted
        if self._reservoir.seen < self._not_before:
            return None
        if alarmed:
            return ALARM
        held, policy = self._reservoir.different, self.policy
        if held >= max(policy.train_rows, policy.growth * self._held_at_last):
            return "there is more traffic to learn from"
        waited_s = time.monotonic() - self._last
        if policy.every_s is not None and waited_s >= policy.every_s and held >= policy.train_rows:
            return f"{waited_s:.0f} s since the last"
        return None

    def _snapshot(self) -> None:
        """Copy out what trains; from here on all requests are newer."""
        level = 1 - self.budget.next_probability()
        rows = self.policy.certify_rows or math.ceil(
            inputs_needed(self.tolerance, level, self.tolerance / 2) / CERTIFY_SHARE
        )
        shutil.rmtree(self._folder, ignore_errors=True)
        self._folder.mkdir(parents=True)
        self._held_at_last = self._reservoir.different
        _store(self._reservoir.requests(), self._folder / TRAIN)
        self._snapshot_at, self._fresh = None, Fresh(rows)

    def _begin(self, newer: Batch, serving: Rung) -> None:
        """Everything is there: spend what the certification may fail with, and start the process."""
        level, certify_rows = 1 - self.budget.next_probability(), len(newer)
        _store(newer, self._folder / CERTIFY)
        self._fresh = None
        split_model, method = serving.model.split_model, self._method(serving)
        if serving.model.plan.caches:
            save(serving.model, self._folder / CURRENT)
        if self._observed:
            _store(split_model.example, self._folder / EXAMPLE)
        job = {
            "tolerance": self.tolerance,
            "confidence_level": level,
            "answers_from": finite(serving.answers_from),
            "device": str(split_model.device),
            "observed": self._observed,
            "cpu_share": self.policy.cpu_share,
            "time_budget_s": self.policy.time_budget_s,
            "method": method,
            "seed": self.policy.seed + len(self.attempts),
        }
        write_whole(self._folder / JOB, json.dumps(job).encode())
        now = datetime.now(UTC).isoformat(timespec="seconds")
        attempt = Attempt(
            1 + max((one.number for one in self.attempts), default=0),
            self._reason,
            now,
            self._reservoir.seen,
            self._held_at_last,
            certify_rows,
            level,
        )
        before = self.budget
        self.budget = self.budget.spent(self._reason, now)
        try:
            self._spent()
        except OfframpError:
            self.budget = before  # nobody has looked at these inputs
            raise
        self.attempts = [*self.attempts, attempt][-KEPT_ATTEMPTS:]
        if method != self.policy.method:
            self._held_at_last = 0  # the next need not wait for more traffic
        self._process, self._began = _Process(self._folder, split_model), time.monotonic()

    def _method(self, serving: Rung) -> str:
        if self.policy.first_method is not None and not self.attempts and not serving.model.plan.caches:
            return self.policy.first_method
        return self.policy.method

    def _harvest(self, process: _Process) -> Candidate | None:
        if process.running():
            limit_s = PATIENCE * self.policy.time_budget_s + SPARE_S
            if time.monotonic() - self._began > limit_s:
                self._fail(f"it has not ended after {limit_s:.0f} s")
            return None
        self._process, attempt = None, self.attempts[-1]
        outcome = process.outcome()
        if not outcome["tested"]:
            self.budget = self.budget.returned()
        if not outcome["certified"]:
            self._fail(outcome["reason"], outcome)
            return None
        model = load_onto(self._folder / RESULT, process.split_model)
        if model.certificate.confidence_level != attempt.confidence_level or not model.certificate.within_tolerance:
            raise OfframpError(f"its certificate is not the one that was asked for: {model.certificate}")
        self._conclude("taken into service", outcome)
        self._failures = 0
        evidence = {"attempt": attempt.number, "confidence_level": attempt.confidence_level, **outcome}
        return Candidate(model, f"a new plan: {attempt.reason}", evidence)

    def _fail(self, why: str, detail: Mapping[str, Any] | None = None) -> None:
        """The attempt is over, whatever step it was at. The next waits longer."""
        log.warning("a refit brought no new plan: %s", why)
        if self._process is not None:
            self._process.kill()
        if self.attempts and self.attempts[-1].outcome == "running":
            self._conclude(why, detail)
        self._snapshot_at = self._fresh = self._process = None
        gathered = self.policy.certify_rows or inputs_needed(self.tolerance, 0.95, self.tolerance / 2)
        self._not_before = self._reservoir.seen + gathered * 2 ** min(self._failures, MOST_BACKOFF)
        self._failures += 1
        self._last = time.monotonic()

    def _conclude(self, outcome: str, detail: Mapping[str, Any] | None) -> None:
        seconds = None if detail is None else detail.get("seconds")
        self.attempts[-1] = replace(self.attempts[-1], outcome=outcome, seconds=seconds, detail=detail)
        self._last = time.monotonic()

    # -- the rest ----------------------------------------------------------------------------------

    def close(self) -> None:
        """End the process, if one runs."""
        if self._process is not None:
            self._process.kill()
            self._process = None

    def to_json(self) -> dict[str, Any]:
        return {
            "budget": self.budget.to_json(),
            "attempts": [asdict(attempt) for attempt in self.attempts],
            "held_at_last": self._held_at_last,
            "failures": self._failures,
            "wait": max(0, self._not_before - self._reservoir.seen),
        }

    def resume(self, document: Mapping[str, Any]) -> None:
        """Go on where `to_json` was written. A refit that was under way then is over; what it spent is spent."""
        self.budget = FailureBudget.from_json(document["budget"])
        attempts = [Attempt(**attempt) for attempt in document["attempts"]]
        over = "ended with the process that it served"
        self.attempts = [replace(one, outcome=over) if one.outcome == "running" else one for one in attempts]
        interrupted = any(one.outcome == "running" for one in attempts)
        self._held_at_last = 0 if interrupted else document["held_at_last"]
        self._failures, self._not_before = document["failures"], self._reservoir.seen + document["wait"]

    def report(self) -> dict[str, Any]:
        state = "idle"
        if self._process is not None:
            state = "fitting"
        elif self._fresh is not None:
            state = f"gathering: {len(self._fresh)} of {self._fresh.rows} newer inputs"
        elif self._snapshot_at is not None:
            state = "waiting for inputs to learn from"
        return {"state": state, "running": self.busy, **{k: v for k, v in self.to_json().items() if k in SHOWN}}


# -- the other process -----------------------------------------------------------------------------


class _Process:
    """A refit in a process of its own. It ends when this one does: it watches its standard input."""

    def __init__(self, folder: Path, split_model: SplitModel) -> None:
        self.split_model, self._folder = split_model, folder
        # What this process can import, that one can; its own script is not run again, as multiprocessing would.
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
        with (folder / LOG).open("wb") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "offramp.refitting", str(folder)],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
            )
        # Through a pipe to a child of our own, so that nothing that can be unpickled ever lies on a disk.
        sent = io.BytesIO()
        torch.save(split_model.backbone, sent)
        data = sent.getbuffer()
        assert self._process.stdin is not None
        with suppress(BrokenPipeError):  # it has ended, and its log says why
            self._process.stdin.write(len(data).to_bytes(8, "little"))
            self._process.stdin.write(data)
            self._process.stdin.flush()

    @property
    def pid(self) -> int:
        return self._process.pid

    def running(self) -> bool:
        return self._process.poll() is None

    def outcome(self) -> dict[str, Any]:
        """What it said at its end. OfframpError when it ended otherwise."""
        code = self._process.wait()
        self._close()
        try:
            outcome: dict[str, Any] = json.loads((self._folder / OUTCOME).read_text())
        except (OSError, ValueError):
            lines = (self._folder / LOG).read_text(errors="replace").strip().splitlines()
            said = lines[-1] if lines else "it said nothing"
            raise OfframpError(f"the refit ended with code {code}: {said}") from None
        return outcome

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()
        self._close()

    def _close(self) -> None:
        if self._process.stdin is not None:
            with suppress(BrokenPipeError):
                self._process.stdin.close()


def _store(batch: Batch, file: Path) -> None:
    write_whole(file, safetensors.torch.save(apart(tensors_of("inputs", batch))))


def stored(file: Path) -> Batch:
    """What `_store` wrote."""
    return batch_of("inputs", safetensors.torch.load(file.read_bytes()))

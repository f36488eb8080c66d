"""A serving process under load that is broken, killed and started again: what faults.py does it with."""

from __future__ import annotations

import argparse
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import common
import numpy as np
from numpy.typing import NDArray

from offramp.model import BACKBONE
from offramp.placement import outcomes
from replay import truth
from replay.ledger import TEST_LEVEL, p_above
from replay.service import case, fitted, fitted_folder, others, tell
from replay.traffic import calm

CALLERS = 4
PATIENCE_S = 120.0
LOST_S = 1.0  # how much of the counts a killed process may lose
KILLED_LOAD = 10**6  # requests: more than come until it is killed
POLICY = {"train_rows": 10**9, "time_budget_s": 120.0}  # refits are asked for


class Lost(Exception):
    """The process is gone, or says nothing."""


class Child:
    """The serving process, from here. Killed by its own number only."""

    def __init__(self, arguments: Sequence[str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "replay.child", *arguments],
            cwd=common.ROOT / "benchmarks",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        self._answers: dict[int, SimpleQueue[Any]] = {0: SimpleQueue()}
        self._next = 0
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            said = json.loads(line)
            self._answers[said["id"]].put(said["said"])

    def send(self, do: str, **arguments: Any) -> int:
        """The number under which it will answer. Lost when it is gone."""
        self._next += 1
        self._answers[self._next] = SimpleQueue()
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({"id": self._next, "do": do, "with": arguments}) + "\n")
            self._process.stdin.flush()
        except OSError as error:
            raise Lost(str(error)) from error
        return self._next

    def wait(self, number: int) -> Any:
        deadline = time.monotonic() + PATIENCE_S
        while time.monotonic() < deadline:
            try:
                said = self._answers[number].get(timeout=0.2)
            except Empty:
                if self._process.poll() is None or self._reader.is_alive():
                    continue
                if self._answers[number].empty():
                    raise Lost(f"it ended with {self._process.returncode}") from None
                said = self._answers[number].get()
            del self._answers[number]
            return said
        raise Lost(f"it has not answered for {PATIENCE_S:.0f} s")

    def do(self, do: str, **arguments: Any) -> Any:
        return self.wait(self.send(do, **arguments))

    def kill(self) -> None:
        os.kill(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._reader.join()

    def close(self) -> None:
        if self._process.poll() is None:
            self.do("close")
            assert self._process.stdin is not None
            self._process.stdin.close()
            self._process.wait(PATIENCE_S)


@dataclass
class Episode:
    """What came of the requests since something was broken, and what was to be shown."""

    name: str
    sent: int = 0
    unanswered: int = 0  # were under way when the process was killed
    wrong: int = 0
    errors: list[str] = field(default_factory=list)
    left: Counter[str] = field(default_factory=Counter)
    rungs: Counter[str] = field(default_factory=Counter)
    checks: dict[str, bool] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def to_json(self, tolerance: float) -> dict[str, Any]:
        answered = self.sent - self.unanswered - len(self.errors)
        p_value = p_above(self.wrong, answered, tolerance) if answered else 1.0
        self.checks |= {"no call raises": not self.errors, "within the tolerance": p_value > TEST_LEVEL}
        return {
            "fault": self.name,
            "requests": self.sent,
            "unanswered": self.unanswered,
            "errors": self.errors[:5],
            "disagreements": self.wrong,
            "p_value": p_value,
            "by_caches": sum(n for name, n in self.left.items() if name != BACKBONE),
            "rungs": dict(self.rungs),
            "checks": self.checks,
            "notes": self.notes,
        }


class Run:
    """The child, its folder, and the requests that it is sent."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options, self.folder, self.state = options, folder, folder / "state"
        bench = case(options)
        cached = fitted(bench, options)
        stream = calm("under load", others(bench, options).rows(slice(0, options.load)))
        tell(f"what the full model says to {len(stream)} requests")
        records = truth.records(cached, stream, bench.inputs, options.workdir)
        self.full_N: NDArray[np.int64] = np.asarray(records.backbone_answer_N)
        left_N, _ = outcomes(records, tuple(planned.threshold for planned in cached.plan.caches))
        misses = left_N == len(cached.plan.caches)
        # The flood comes from the last of them, so that the others are requests like any.
        self._usual = itertools.cycle(range(options.load * 3 // 4))
        self._missing = itertools.cycle(np.flatnonzero(misses[options.load * 3 // 4 :]) + options.load * 3 // 4)
        self.tolerance = cached.certificate.tolerance
        np.savez(folder / "pictures.npz", images=stream.image_N)
        self.episodes = list[Episode]()
        self.counted = 0  # requests that were answered since the life began
        self.start()

    def start(self) -> None:
        """A new process on the same folder; `began` is what it says first."""
        self.child = Child(
            [
                *("--pictures", str(self.folder / "pictures.npz")),
                *("--fitted", str(fitted_folder(self.options))),
                *("--state", str(self.state)),
                *("--policy", json.dumps(POLICY | self.options.policy)),
                *("--shadow", str(self.options.shadow)),
                *("--callers", str(CALLERS)),
            ]
        )
        self.began = self.child.wait(0)
        self.counted = self.began.get("requests", self.counted)

    def episode(self, name: str) -> Episode:
        tell(f"-- {name}")
        self.episodes.append(Episode(name))
        return self.episodes[-1]

    def load(self, episode: Episode, requests: int | None = None, *, missing: bool = False) -> None:
        """So many requests, CALLERS at a time. Where the process is lost, those under way are counted as unanswered."""
        numbers = self._missing if missing else self._usual
        waiting = deque[tuple[int, int]]()
        try:
            for picture in itertools.islice(numbers, requests or self.options.episode):
                episode.sent += 1
                waiting.append((int(picture), self.child.send("ask", number=int(picture))))
                if len(waiting) >= CALLERS:
                    self._take(episode, waiting)
            while waiting:
                self._take(episode, waiting)
        except Lost:
            episode.unanswered += len(waiting) + 1

    def _take(self, episode: Episode, waiting: deque[tuple[int, int]]) -> None:
        picture, asked = waiting.popleft()
        said = self.child.wait(asked)
        self.counted += 1
        if "error" in said:
            episode.errors.append(said["error"])
            return
        episode.wrong += int(said["answer"] != self.full_N[picture])
        episode.left[said["left"]] += 1
        episode.rungs[said["rung"]] += 1

    def report(self) -> dict[str, Any]:
        report: dict[str, Any] = self.child.do("report")
        return report

    def killed_and_again(self, episode: Episode, *, damage: Callable[[], None] | None = None) -> None:
        """Kill -9 while requests are under way, with an accident on the disk before the next start."""
        before = self.report()
        timer = threading.Timer(self.options.kill_after_s, self.child.kill)
        timer.start()
        began, counted = time.monotonic(), self.counted
        self.load(episode, KILLED_LOAD)
        timer.join()
        rate = (self.counted - counted) / (time.monotonic() - began)
        if damage is not None:
            damage()
        counted = self.counted
        self.start()
        if "error" in self.began:
            return
        lost = counted - self.began["requests"]
        episode.notes.append(f"plan {before['plan']} before, {self.began['plan']} after; {lost} counts lost")
        episode.checks["no more than the last second of counts is lost"] = lost <= LOST_S * rate + 2 * CALLERS
        self.counted = self.began["requests"]

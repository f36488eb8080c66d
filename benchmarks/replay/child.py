"""The process that serves in faults.py: `python -m replay.child`, one JSON line in, one out.

It answers requests by the number of a picture, on several threads, and does to itself what the benchmark asks for. It
is killed and started again, so all that has to outlive it is in its state folder.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from datetime import tzinfo as TimeZone
from pathlib import Path
from typing import Any

import numpy as np
import torch

import offramp
from offramp import ladder, refresh
from offramp.model import CachedModel
from offramp.online_model import OnlineModel
from offramp.refresh import Candidate
from replay.service import importable_zoo

PAUSE_S = 0.02  # between two swaps


class Server:
    """A model in service, and what may be done to it. Every `do_...` takes and returns JSON."""

    def __init__(self, options: argparse.Namespace) -> None:
        zoo = importable_zoo()
        with np.load(options.pictures) as kept:
            self.images = kept["images"]
        self.inputs = lambda image: zoo.normalize(torch.from_numpy(image), "cifar10")
        self.cached = offramp.load(options.fitted, zoo.resnet18_cifar10())
        self.model: OnlineModel = offramp.online(
            self.cached,
            shadow=options.shadow,
            seed=options.seed,
            state=options.state,
            refresh=offramp.Refresh(**json.loads(options.policy)),
        )
        self._real_time, self._swapping = time.time, threading.Event()

    def do_ask(self, number: int) -> dict[str, Any]:
        rung = self.model.rung
        try:
            said = self.model.predict(self.inputs(self.images[number : number + 1]))
        except Exception as error:
            return {"error": f"{type(error).__name__}: {error}"}
        exits = rung.model.exits
        left = exits[int(said.left_at_B)] if int(said.left_at_B) < len(exits) else "?"
        return {"answer": int(said.answer_B), "left": left, "rung": rung.name}

    def do_report(self) -> dict[str, Any]:
        self.model.settle()
        return self.model.report()

    def do_close(self) -> None:
        self._swapping.clear()
        self.model.close()

    # -- faults ------------------------------------------------------------------------------------

    @torch.no_grad()
    def do_nan(self) -> None:
        """All caches that serve lose their weights, in the middle of it."""
        caches = self.model.rung.model.caches
        for tensor in (*caches.parameters(), *caches.buffers()):
            if tensor.is_floating_point():
                tensor.fill_(float("nan"))

    def do_disk(self, *, full: bool) -> None:
        """No file may grow beyond nothing: what a full disk does, for this process and those that it starts."""
        _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0 if full else hard, hard))

    def do_refresh(self, times: int) -> list[bool]:
        """Ask for so many refits at once; which of them will begin."""
        gate = threading.Barrier(times)

        def ask() -> bool:
            gate.wait()
            return self.model.refresh("asked for by the benchmark")

        with ThreadPoolExecutor(times) as pool:
            return [future.result() for future in [pool.submit(ask) for _ in range(times)]]

    def do_kill_refit(self) -> bool:
        """Whether there was one."""
        process = None if self.model._refresher is None else self.model._refresher._process
        if process is None:
            return False
        os.kill(process.pid, signal.SIGKILL)
        return True

    def do_clock(self, hours: float) -> None:
        """Wall clocks jump; clocks that only measure durations do not."""

        class Jumped(datetime):
            @classmethod
            def now(cls, tz: TimeZone | None = None) -> Any:
                return datetime.now(tz) + timedelta(hours=hours)

        time.time = lambda: self._real_time() + 3600 * hours
        ladder.datetime = refresh.datetime = Jumped  # type: ignore[misc]

    def do_swap_on(self) -> None:
        """Another plan and back, again and again, until this process is killed."""
        self._swapping.set()
        threading.Thread(target=self._swap, daemon=True).start()

    def _swap(self) -> None:
        other = stricter(self.cached)
        while self._swapping.is_set():
            self.model._adopt(Candidate(other, "a stricter plan", {}))
            time.sleep(PAUSE_S)
            self.model.roll_back("the benchmark goes back")
            time.sleep(PAUSE_S)

    def do_first_plan(self) -> None:
        """The plan that the life began with, whatever serves."""
        self.model._adopt(Candidate(self.cached, "the first plan again", {}))

    def do_restore(self) -> None:
        self.model.restore("asked for by the benchmark")


def stricter(cached: CachedModel) -> CachedModel:
    """The same caches, each of which answers when it is twice as sure. What they answer is not a subset of what the
    plan's did, so its certificate does not cover it; here it is only to be another plan."""
    planned = tuple(dataclasses.replace(one, threshold=1 - (1 - one.threshold) / 2) for one in cached.plan.caches)
    return CachedModel(
        cached.split_model,
        list(cached.caches),  # type: ignore[arg-type]
        dataclasses.replace(cached.plan, caches=planned),
        cached.certificate,
        cached.costs,
        task=cached.task,
        summary=cached.summary,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("pictures", "fitted", "state"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--policy", default="{}")
    parser.add_argument("--shadow", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--callers", type=int, default=4)
    options = parser.parse_args()
    torch.set_num_threads(1)
    writing = threading.Lock()

    def tell(number: int, said: Any) -> None:
        with writing:
            sys.stdout.write(json.dumps({"id": number, "said": said}) + "\n")
            sys.stdout.flush()

    try:
        server = Server(options)
    except offramp.OfframpError as error:
        tell(0, {"error": f"{type(error).__name__}: {error}"})
        return
    tell(0, {"plan": server.model.report()["plan"], "requests": server.model.report()["requests"]})
    with ThreadPoolExecutor(options.callers) as pool:
        for line in sys.stdin:
            asked = json.loads(line)
            act: Callable[..., Any] = getattr(server, f"do_{asked['do']}")
            pool.submit(lambda act=act, asked=asked: tell(asked["id"], act(**asked["with"])))
    server.model.close()


if __name__ == "__main__":
    main()

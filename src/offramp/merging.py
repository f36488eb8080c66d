"""The misses of several calls at once, run on together.

Behind a cache a batch has few rows left, and a stage that is mostly fixed cost is no faster for them than for many. So
calls that come from several threads may wait for each other there. The first to wait at a split point leads: after the
wait it runs all of them to the end, in its own thread, while the others sleep. There is no thread beside the callers'.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
import torch

from offramp.errors import InputError
from offramp.flight import Flight
from offramp.model import CachedModel, as_call
from offramp.types import CostTable


class _Gathering:
    """Flights that run on together, once it is closed."""

    def __init__(self) -> None:
        self.flights: list[Flight] = []
        self.rows = 0
        self.closed = False
        self.over = threading.Event()
        self.error: Exception | None = None


class Merging:
    """A cached model that several threads call at once: same call, same output; misses of concurrent calls merge.

    A call waits at the first split point with caches where that pays by the model's cost table: where running its rows
    alone takes over `max_wait_ms` (milliseconds) more than as a part of the largest batch that was measured. It
    waits no longer than that, nor when `max_rows` are together, nor when no other call is on its way to join. Where the
    table says that nothing is saved, calls run as they would without this.

    The certificate is the model's own: it holds for one row and for many. A call with inputs that do not fit fails
    alone, before it joins; an error while rows run together is raised in every call concerned. Calls that the plan
    bypasses, and all calls of a model with a result cache, go to the model as they are. On a GPU all callers must use
    one stream, as they do by default.
    """

    def __init__(self, cached: CachedModel, *, max_wait_ms: float = 2.0, max_rows: int = 64) -> None:
        if not isinstance(cached, CachedModel):
            raise InputError(f"received a {type(cached).__name__}; expected the CachedModel that fit() or load() gives")
        if not 0 <= max_wait_ms < float("inf"):
            raise InputError(f"max_wait_ms is {max_wait_ms}; expected milliseconds, 0 or more")
        if max_rows < 2:
            raise InputError(f"max_rows is {max_rows}; expected at least 2, the rows of two calls")
        self.cached, self.max_wait_ms, self.max_rows = cached, max_wait_ms, max_rows
        points, rows = {cache.point for cache in cached.plan.caches}, range(1, max_rows)
        self._pays = [  # at each split point the numbers of rows that wait there
            {n for n in rows if point.name in points and saved_ms(cached.costs, point.position, n) > max_wait_ms}
            for point in cached.split_model.points
        ]
        self._changed = threading.Condition()  # guards what follows
        self._moving = 0  # calls that may still join a gathering
        self._gatherings: dict[int, _Gathering] = {}  # by split point, those that can be joined

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's. Raises InputError when the arguments do not fit."""
        cached, batch = self.cached, as_call(args, kwargs)
        if cached.result_cache is not None or not len(batch) or cached.bypasses(len(batch)):
            return cached(*args, **kwargs)
        with torch.no_grad():
            flight = self._fly(cached.depart(batch))
        return cached.split_model.unflatten((flight.logits(),))

    def _fly(self, flight: Flight) -> Flight:
        """Alone as far as that pays, then with others."""
        at = None
        with self._changed:
            self._moving += 1
        try:
            at = self._alone(flight)
        finally:
            with self._changed:  # in one step: whoever sees that nobody moves has seen everybody who joined
                self._moving -= 1
                gathering, leads = (None, False) if at is None else self._join(at, flight)
                self._changed.notify_all()
        if at is None or gathering is None:
            return flight
        if leads:
            self._lead(at, gathering)
        gathering.over.wait()
        if gathering.error is not None:
            raise gathering.error
        if flight.waiting:  # whoever led was interrupted
            self._finish(at, flight)
        return flight

    def _alone(self, flight: Flight) -> int | None:
        """The split point to wait at, or None when all rows are answered."""
        for position in range(len(self._pays)):
            self.cached.ask_caches(position, flight)
            if not flight.waiting:
                return None
            if len(flight.waiting) in self._pays[position]:
                if len(flight.waiting) < len(flight.rows):
                    flight.compact()
                return position
            self.cached.run_stage(position, flight)
        return None

    def _join(self, position: int, flight: Flight) -> tuple[_Gathering, bool]:
        """The gathering at a split point, and whether this flight leads it."""
        gathering = self._gatherings.get(position)
        if gathering is not None and gathering.rows + len(flight.rows) > self.max_rows:
            self._close(position, gathering)
            gathering = None
        leads = gathering is None
        gathering = self._gatherings.setdefault(position, gathering or _Gathering())
        gathering.flights.append(flight)
        gathering.rows += len(flight.rows)
        if gathering.rows == self.max_rows:
            self._close(position, gathering)
        return gathering, leads

    def _close(self, position: int, gathering: _Gathering) -> None:
        gathering.closed = True
        if self._gatherings.get(position) is gathering:
            del self._gatherings[position]

    def _lead(self, position: int, gathering: _Gathering) -> None:
        try:
            with self._changed:
                try:
                    self._changed.wait_for(lambda: gathering.closed or not self._moving, self.max_wait_ms / 1000)
                finally:
                    self._close(position, gathering)
            self._run(position, gathering.flights)
        except Exception as error:
            gathering.error = error
        finally:
            gathering.over.set()

    def _run(self, position: int, flights: list[Flight]) -> None:
        if len(flights) == 1:
            self._finish(position, flights[0])
            return
        # Whichever mode the callers are in, each can use what is made outside of inference mode.
        with torch.inference_mode(mode=False), torch.no_grad():
            together = Flight.merged(flights)
            self._finish(position, together)
            together.part(flights)

    def _finish(self, position: int, flight: Flight) -> None:
        """From behind the caches of a split point to the end."""
        self.cached.run_stage(position, flight)
        for later in range(position + 1, len(self._pays)):
            self.cached.ask_caches(later, flight)
            self.cached.run_stage(later, flight)


def saved_ms(table: CostTable, position: int, rows: int) -> float:
    """What these rows take alone from a split point to the end, above their part of the largest batch measured."""
    sizes = sorted(table.backbone.time_ms)
    times_ms = [table.stages_ms(size, position) for size in sizes]
    return float(np.interp(rows, sizes, times_ms) - rows * times_ms[-1] / sizes[-1])

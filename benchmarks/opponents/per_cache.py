"""Every cache tuned by itself, as where a paper has no joint rule (SelfXit's and GATI's threshold per cache)."""

from __future__ import annotations

from offramp.methods.published import loosest_thresholds
from offramp.placement import NEVER, CacheCosts, Thresholds
from offramp.types import Records
from opponents.rules import Rule, on_all, paying


def thresholds(records: Records, costs: CacheCosts, tolerance: float) -> Thresholds:
    """(K,) for each cache the loosest threshold at which at most `tolerance` of its own hits differ.

    What earlier caches take away is not looked at. Caches that do not pay are left off.
    """
    alone_K = loosest_thresholds(records, tolerance)
    return paying(records, tuple(min(threshold, NEVER) for threshold in alone_K), costs)  # NEVER: others may read it


RULE = Rule(
    "every cache tuned alone",
    "Each cache's own hits within the tolerance on the inputs that it was tuned on, as measured.",
    on_all(thresholds),
)

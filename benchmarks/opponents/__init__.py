"""What a user would deploy instead of offramp, one file each: built from the same traffic, measured on the same rows.

OPPONENTS take the full model's place; RULES only set the thresholds of caches that are already trained. Optional
packages (extra `bench`) are imported where they are used: an opponent that is not installed fails alone, when built.
"""

from __future__ import annotations

from opponents import apparate, eager, earlyon, mapie, onnxruntime, openvino, per_cache, smaller, student
from opponents.base import Built, Case, Opponent
from opponents.rules import Rule

__all__ = ["OPPONENTS", "RULES", "Built", "Case", "Opponent", "Rule"]

OPPONENTS: tuple[Opponent, ...] = (
    *eager.OPPONENTS,
    *onnxruntime.OPPONENTS,
    *openvino.OPPONENTS,
    *smaller.OPPONENTS,
    *student.OPPONENTS,
    *earlyon.OPPONENTS,
)
RULES: tuple[Rule, ...] = (apparate.RULE, mapie.RULE, per_cache.RULE)

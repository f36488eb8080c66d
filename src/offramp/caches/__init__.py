"""Caches: what sits at a split point and may answer in the backbone's place. One file per kind."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from offramp.caches.base import Cache
from offramp.caches.learned import CacheShape, LearnedCache
from offramp.caches.nearest import NearestCache
from offramp.caches.reduction import Reduction, reduction_for
from offramp.caches.result import KeyCache
from offramp.confidence import Selector

__all__ = [
    "KINDS",
    "Cache",
    "CacheShape",
    "KeyCache",
    "LearnedCache",
    "NearestCache",
    "Reduction",
    "build_cache",
    "reduction_for",
]

KINDS: dict[str, type[Cache]] = {cache.kind: cache for cache in (LearnedCache, NearestCache, KeyCache)}


def build_cache(description: Mapping[str, Any]) -> Cache:
    """The cache that `describe` described, with fresh weights, in eval mode; KeyError or TypeError if malformed."""
    cache = KINDS[description["type"]].described(description)
    features = description["selector_features"]
    cache.use_confidence(description["confidence"], None if features is None else Selector(features))
    return cache.eval()

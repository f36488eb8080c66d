"""The kinds of cache. A cache sits at a split point and may answer; others call it an early-exit head."""

from __future__ import annotations

from offramp.caches.learned import CacheShape, LearnedCache, build_cache, reduction_for

__all__ = ["CacheShape", "LearnedCache", "build_cache", "reduction_for"]

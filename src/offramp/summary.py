"""What a fit found, as one JSON document: the part of `CachedModel.report()` that only the fit can know."""

from __future__ import annotations

import base64
import io
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from offramp.augment import is_image
from offramp.calibration import Verdict, upper_bound
from offramp.candidates import Candidates, Trained
from offramp.cost import flop_shares
from offramp.evaluation import costs_at_exits
from offramp.model import CachedModel
from offramp.placement import CacheCosts, Candidate, oracle_cost, outcomes
from offramp.recording import CERTIFY, TUNE
from offramp.streams import Batch
from offramp.types import CostTable, LatencyRatio, Records, version

log = logging.getLogger("offramp")

SAMPLES = 8
RELIABILITY_BINS = 10


@dataclass(frozen=True)
class Findings:
    """What `choosing.choose` worked out on its way."""

    trained: Sequence[Trained]
    path: Sequence[Candidate]
    certify_errors_M: Sequence[int]
    verdict: Verdict
    chosen: Candidate
    latency: Sequence[LatencyRatio]
    seconds: dict[str, float]
    time_budget_s: float | None
    to_text: Callable[[Tensor], str] | None = None  # a row of token ids -> its text, where the stream knows


def summarise(candidates: Candidates, cached: CachedModel, costs: CostTable, found: Findings) -> dict[str, Any]:
    """The document's parts, JSON throughout; `costs` covers all candidates. tests/test_report.py shows its form."""
    backbone = candidates.split.backbone
    certify = candidates.records(found.trained, CERTIFY) if cached.plan.caches else None
    leaves = _leaves(cached, found, certify)
    return {
        "offramp": version(),
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "backbone": {
            "name": type(backbone).__name__,
            "parameters": costs.backbone.parameters,
            "flops": costs.backbone.flops,
            "fingerprint": candidates.split.fingerprint,
        },
        "points": [
            {"name": point.name, "shape": list(point.shape), "depth": point.depth} for point in candidates.split.points
        ],
        "leaves": leaves,
        "cost": {
            "estimated_share": cached.plan.estimated_cost,
            "flops_share": float(sum(leaf["share"] * leaf["cost"] for leaf in leaves)),
            "measured": [
                {"batch_size": ratio.batch_size, "full_ms": ratio.full_mean_ms, "cached_ms": ratio.cached_mean_ms}
                for ratio in found.latency
            ],
        },
        "caches": _caches(candidates, costs, found),
        "path": _path(cached, found),
        "oracle_cost": None if certify is None else _oracle(cached, found, certify),
        "samples": _samples(candidates, cached, found),
        "fit": {
            "inputs": candidates.recording.counts(),
            "seconds": dict(found.seconds),
            "seed": candidates.seed,
            "time_budget_s": found.time_budget_s,
            "device": costs.device,
            "threads": costs.threads,
        },
        "advice": found.verdict.advice,
    }


def _left_at(cached: CachedModel, found: Findings, certify: Records | None) -> NDArray[np.int64]:
    """(certification inputs,) index into `cached.exits`."""
    if certify is None:
        return np.zeros(found.verdict.n, np.int64)
    left_at, _ = outcomes(certify, found.chosen.thresholds_K)
    names = [trained.cache.name for trained in found.trained]
    exit_of = [cached.exits.index(name) if name in cached.exits else -1 for name in names] + [len(cached.exits) - 1]
    return np.array(exit_of)[left_at]


def _flop_costs(cached: CachedModel) -> CacheCosts:
    return CacheCosts(*flop_shares(cached.costs))


def _leaves(cached: CachedModel, found: Findings, certify: Records | None) -> list[dict[str, Any]]:
    """certify: what the candidates said about the certification inputs; None where the plan has no caches."""
    share = np.bincount(_left_at(cached, found, certify), minlength=len(cached.exits))
    share = share / max(1, share.sum())
    cost = costs_at_exits(_flop_costs(cached))
    points = [planned.point for planned in cached.plan.caches] + ["output"]
    return [
        {"name": name, "point": point, "share": float(s), "cost": float(c)}
        for name, point, s, c in zip(cached.exits, points, share, cost, strict=True)
    ]


def _caches(candidates: Candidates, costs: CostTable, found: Findings) -> list[dict[str, Any]]:
    if not found.trained:
        return []
    records = candidates.records(found.trained, TUNE)
    out = []
    for k, trained in enumerate(found.trained):
        cache, part = trained.cache, costs.caches[k]
        threshold = found.chosen.thresholds_K[k] if found.chosen.thresholds_K else np.inf
        out.append(
            {
                "name": cache.name,
                "point": cache.point,
                "enabled": bool(np.isfinite(threshold)),
                "reads": cache.reads,
                "parameters": part.parameters,
                "bytes": part.parameter_bytes,
                "flops_share": part.flops / costs.backbone.flops if costs.backbone.flops else 0.0,
                "agreement": float(records.agreement_NK[:, k].mean()),
                "auroc": {name: _number(value) for name, value in trained.auroc.items()},
                "confidence": cache.confidence_name,
                "threshold": float(threshold) if np.isfinite(threshold) else None,
                "reliability": _reliability(records.confidence_NK[:, k], records.agreement_NK[:, k]),
                "training": {"steps": trained.log.steps, "seconds": trained.log.seconds},
            }
        )
    return out


def _reliability(confidence_N: NDArray[Any], agreement_N: NDArray[np.bool_]) -> list[dict[str, float]]:
    """Mean confidence and agreement of about equally filled bins."""
    order = np.argsort(confidence_N)
    return [
        {"confidence": float(confidence_N[rows].mean()), "agreement": float(agreement_N[rows].mean()), "n": len(rows)}
        for rows in np.array_split(order, RELIABILITY_BINS)
        if len(rows)
    ]


def _path(cached: CachedModel, found: Findings) -> list[dict[str, Any]]:
    n, level, tolerance = found.verdict.n, cached.certificate.confidence_level, cached.certificate.tolerance
    bounds_M = [upper_bound(int(errors), n, level) for errors in found.certify_errors_M]
    return [
        {
            "disagreement": candidate.disagreement,
            "cost": candidate.cost,
            "certified_errors": int(errors),
            "bound": bound,
            "passed": i <= found.verdict.index and bound <= tolerance,
            "chosen": candidate is found.chosen,
        }
        for i, (candidate, errors, bound) in enumerate(zip(found.path, found.certify_errors_M, bounds_M, strict=True))
    ]


def _oracle(cached: CachedModel, found: Findings, certify: Records) -> float:
    """FLOPs share if each certification input left at the first enabled cache that agrees."""
    enabled = [k for k, threshold in enumerate(found.chosen.thresholds_K) if np.isfinite(threshold)]
    return oracle_cost(certify.agreement_NK[:, enabled], _flop_costs(cached))


def _samples(candidates: Candidates, cached: CachedModel, found: Findings) -> dict[str, Any]:
    """A few tuning inputs that leave first, and a few that go all the way: pictures or texts, where inputs are such."""
    batch = candidates.recording.sample.to(candidates.split.device)
    inputs = candidates.split.activation(0, candidates.split.flatten(batch)).cpu()
    as_shown = _as_shown(inputs, found.to_text)
    if not cached.plan.caches or as_shown is None:
        return {"kind": None, "first": [], "last": []}
    kind, shown = as_shown
    answer, left, sure = _predicted(cached, batch)
    order = np.lexsort((-sure, left))

    def show(row: int) -> dict[str, Any]:
        return {
            kind: shown(row),
            "left_at": cached.exits[left[row]],
            "answer": int(answer[row]),
            "confidence": float(sure[row]),
        }

    return {
        "kind": kind,
        "first": [show(int(row)) for row in order[:SAMPLES]],
        "last": [show(int(row)) for row in order[::-1][:SAMPLES]],
    }


def _predicted(cached: CachedModel, batch: Batch) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Answer, exit and confidence of each row, in batches of a size at which the plan is not bypassed."""
    sizes = [size for size in cached.costs.backbone.time_ms if not cached.bypasses(size)]
    with torch.inference_mode():
        chunks = [batch.rows(slice(start, start + max(sizes))) for start in range(0, len(batch), max(sizes))]
        said = [cached.predict(*chunk.args, **chunk.kwargs) for chunk in chunks]
    columns = ([one.answer_B, one.left_at_B, one.confidence_B] for one in said)
    answer, left, sure = (torch.cat(column).cpu().numpy() for column in zip(*columns, strict=True))
    return answer, left, sure


def _as_shown(inputs: Tensor, to_text: Callable[[Tensor], str] | None) -> tuple[str, Callable[[int], str]] | None:
    """How to show an input to a person: ("image", row -> PNG in base64) or ("text", row -> words); None if neither."""
    floating = inputs.is_floating_point()
    if is_image(tuple(inputs.shape[1:]), floating=floating):
        return "image", lambda row: _png(inputs[row].float().numpy())
    if not floating and inputs.ndim == 2:
        return "text", lambda row: _as_text(inputs[row], to_text)
    return None


def _as_text(ids_L: Tensor, to_text: Callable[[Tensor], str] | None) -> str:
    try:
        return _token_ids(ids_L) if to_text is None else to_text(ids_L)
    except Exception:  # a sample for show must not cost the user a fit
        log.exception("the stream's `to_text` failed; the report shows token ids")
        return _token_ids(ids_L)


def _token_ids(ids_L: Tensor) -> str:
    """The ids themselves, without the padding at the end: what there is to show without a tokenizer."""
    ids = ids_L.tolist()
    while len(ids) > 1 and ids[-1] == ids[-2]:
        ids.pop()
    return "token ids " + " ".join(map(str, ids))


def _png(image_CHW: NDArray[Any]) -> str:
    """Base64 of a PNG of the image, stretched to the full range of brightness."""
    low, high = image_CHW.min(), image_CHW.max()
    pixels = ((image_CHW - low) / max(high - low, 1e-6) * 255).astype(np.uint8)
    pixels = np.repeat(pixels[:1], 3, axis=0) if len(pixels) != 3 else pixels
    return base64.b64encode(_encode_png(pixels.transpose(1, 2, 0))).decode()


def _encode_png(pixels_HWC: NDArray[np.uint8]) -> bytes:
    """By hand: it saves a dependency on an image library."""
    import struct
    import zlib

    height, width, _ = pixels_HWC.shape
    raw = b"".join(b"\x00" + row.tobytes() for row in pixels_HWC)

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    out = io.BytesIO()
    out.write(b"\x89PNG\r\n\x1a\n")
    out.write(chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)))
    out.write(chunk(b"IDAT", zlib.compress(raw, 9)))
    out.write(chunk(b"IEND", b""))
    return out.getvalue()


def _number(value: float) -> float | None:
    return None if np.isnan(value) else float(value)

"""The summary of a fit: every number against the cached model itself or a slow loop."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import math
import struct
import zlib
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from test_candidates import candidates_of, make_costs, make_point
from torch import Tensor, nn

from offramp import recording as recording_module
from offramp.caches import CacheShape
from offramp.calibration import Verdict, upper_bound
from offramp.candidates import Candidates, Trained
from offramp.distillation import Recipe
from offramp.model import BACKBONE, CachedModel, Prediction
from offramp.placement import OFF, Candidate
from offramp.recording import CERTIFY, TUNE, record
from offramp.splitting import split
from offramp.streams import Batch
from offramp.summary import RELIABILITY_BINS, SAMPLES, Findings, _as_shown, _png, _reliability, _samples, summarise
from offramp.tasks import Classification
from offramp.types import Certificate, CostTable, LatencyRatio, PartCost, Plan, PlannedCache

LEVEL = 0.9


class Brightest(nn.Module):
    """The answer is mostly the brightest quarter of the image."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.first(x))
        y = torch.relu(self.second(y))
        means = nn.functional.adaptive_avg_pool2d(x, 2).flatten(1)
        logits: Tensor = 8 * means + self.head(y.mean((2, 3)))
        return logits


def images(count: int) -> Tensor:
    """Half precision holds them exactly, so a recording gives back what the backbone was asked about."""
    generator = torch.Generator().manual_seed(0)
    quarters = torch.randn(count, 1, 2, 2, generator=generator).repeat_interleave(4, 2).repeat_interleave(4, 3)
    return (quarters + 0.5 * torch.randn(count, 1, 8, 8, generator=generator)).half().float()


def in_flops(costs: CostTable, candidates: Candidates, trained: list[Trained]) -> CostTable:
    """The table with these caches."""
    time_ms = costs.backbone.time_ms
    parts = tuple(PartCost(t.cache.name, candidates.flops_of(t.cache), 7, 28, time_ms) for t in trained)
    return dataclasses.replace(costs, caches=parts, cache_points=tuple(t.position for t in trained))


def certificate_of(errors: int, n: int) -> Certificate:
    return Certificate(0.2, LEVEL, n, errors, upper_bound(errors, n, LEVEL), "by hand", 3, "", "", "2026-01-01")


@dataclasses.dataclass
class Fit:
    """The pieces that a fit has at its end, made by hand: three candidates, the middle one off."""

    candidates: Candidates
    cached: CachedModel
    costs: CostTable
    found: Findings

    @property
    def document(self) -> dict[str, Any]:
        return summarise(self.candidates, self.cached, self.costs, self.found)


@pytest.fixture(scope="module")
def learned() -> tuple[Candidates, list[Trained], CostTable]:
    torch.manual_seed(0)
    backbone = Brightest().eval()
    x = images(600)
    split_model = split(backbone, x[:4], points=["first", "second"])
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(recording_module, "ASKED_ROWS", 0)
        recording = record(split_model, Classification(), [x], None, seed=0)
    costs = make_costs(split_model.points)
    candidates = candidates_of(split_model, recording, costs, seed=5)
    student = candidates.build(split_model.points[0], CacheShape("student", 8))
    pooled = candidates.build(split_model.points[1], CacheShape("mlp", 8))
    reader = candidates.build(split_model.points[2], CacheShape("mlp", 16), student)
    candidates.train_round("all", [student, pooled, reader], lambda _: Recipe(1200, 32, learning_rate=4e-3), None)
    trained = candidates.ordered()
    return candidates, trained, in_flops(costs, candidates, trained)


@pytest.fixture(scope="module")
def fit(learned: tuple[Candidates, list[Trained], CostTable]) -> Fit:
    candidates, trained, costs = learned
    tune, certify = candidates.records(trained, TUNE), candidates.records(trained, CERTIFY)
    n = len(certify)
    path, errors_M = [Candidate((OFF,) * 3, 0.0, 1.0, (0.0,) * 3)], [0]
    for number, quantile in enumerate((0.9, 0.7, 0.4, 0.1)):
        first, _, last = np.quantile(tune.confidence_NK, quantile, axis=0).tolist()
        path.append(Candidate((first, OFF, last), 0.01 * number, 0.9 - 0.1 * number, (0.3, 0.0, 0.2)))
        errors_M.append(2 * number)
    verdict = Verdict(3, errors_M[3], n, upper_bound(errors_M[3], n, LEVEL), 5, "more inputs")
    chosen = path[3]
    kept = [0, 2]
    plan = Plan(
        tuple(
            PlannedCache(trained[k].cache.name, trained[k].cache.point, chosen.thresholds_K[k], "by hand", 0.2)
            for k in kept
        ),
        estimated_cost=chosen.cost,
    )
    served = in_flops(make_costs(candidates.split.points), candidates, [trained[k] for k in kept])
    cached = CachedModel(
        candidates.split,
        [trained[k].cache for k in kept],
        plan,
        certificate_of(errors_M[3], n),
        served,
        task=Classification(),
        summary={},
    )
    latency = (LatencyRatio(8, 0.5, 0.5, 0.5, 2.0, 1.0),)
    found = Findings(trained, path, errors_M, verdict, chosen, latency, {"train": 3.0}, 60.0)
    return Fit(candidates, cached, costs, found)


@pytest.fixture(scope="module")
def fit_without_caches(fit: Fit) -> Fit:
    """The same candidates, of which nothing could be enabled."""
    costs = make_costs(fit.candidates.split.points)
    plan, certificate = Plan(reason="nothing pays"), certificate_of(0, fit.found.verdict.n)
    cached = CachedModel(fit.candidates.split, [], plan, certificate, costs, task=Classification(), summary={})
    return Fit(fit.candidates, cached, fit.costs, dataclasses.replace(fit.found, chosen=fit.found.path[0]))


def certify_images(candidates: Candidates) -> Tensor:
    rows = candidates.recording.index(CERTIFY)
    return torch.from_numpy(np.array(candidates.recording.features[0][rows])).float()


# --- where requests leave ---------------------------------------------------------------------------


def test_the_leaves_are_where_the_cached_model_sends_the_certification_inputs(fit: Fit) -> None:
    leaves = fit.document["leaves"]
    assert sum(leaf["share"] for leaf in leaves) == pytest.approx(1)
    left_at_N = fit.cached.predict(certify_images(fit.candidates)).left_at_B
    counted = [float((left_at_N == k).double().mean()) for k in range(3)]
    assert min(counted) > 0, "some should leave everywhere, or little is shown"
    assert [leaf["share"] for leaf in leaves] == pytest.approx(counted)
    assert [leaf["name"] for leaf in leaves] == ["input/student8x1", "second/mlp16x1", BACKBONE]
    assert [leaf["point"] for leaf in leaves] == ["input", "second", "output"]


def test_a_leaf_costs_the_stages_and_look_ups_until_there(fit: Fit) -> None:
    document, costs = fit.document, fit.cached.costs
    flops = [stage.flops for stage in costs.stages]
    spent, by_hand = 0.0, []
    for cache, position in zip(costs.caches, costs.cache_points, strict=True):
        spent += cache.flops
        by_hand.append((sum(flops[:position]) + spent) / sum(flops))
    by_hand.append((sum(flops) + spent) / sum(flops))
    assert [leaf["cost"] for leaf in document["leaves"]] == pytest.approx(by_hand)
    mean = sum(leaf["share"] * cost for leaf, cost in zip(document["leaves"], by_hand, strict=True))
    assert document["cost"]["flops_share"] == pytest.approx(mean)


def test_the_oracle_leaves_at_the_first_enabled_cache_that_agrees(fit: Fit) -> None:
    x = certify_images(fit.candidates)
    with torch.no_grad():
        full_N = fit.candidates.split.backbone(x).argmax(1)
    rows = fit.candidates.recording.index(CERTIFY)
    agrees_NK = [(fit.found.trained[k].on(rows).argmax(1) == full_N).tolist() for k in (0, 2)]
    costs = [leaf["cost"] for leaf in fit.document["leaves"]]
    spent = [costs[0] if first else costs[1] if second else costs[2] for first, second in zip(*agrees_NK, strict=True)]
    assert fit.document["oracle_cost"] == pytest.approx(np.mean(spent))


def test_without_caches_everything_leaves_at_the_backbone(fit_without_caches: Fit) -> None:
    document = fit_without_caches.document
    assert document["leaves"] == [{"name": BACKBONE, "point": "output", "share": 1.0, "cost": 1.0}]
    assert document["cost"]["flops_share"] == 1.0
    assert document["oracle_cost"] is None
    assert document["samples"] == {"kind": None, "first": [], "last": []}
    assert [cache["enabled"] for cache in document["caches"]] == [False] * 3
    assert [step["chosen"] for step in document["path"]] == [True, False, False, False, False]


def test_a_fit_that_trained_nothing_has_a_summary_too(fit_without_caches: Fit) -> None:
    nothing = Candidate((), 0.0, 1.0, ())
    verdict = Verdict(0, 0, fit_without_caches.found.verdict.n, 0.0, 1, "")
    found = dataclasses.replace(
        fit_without_caches.found,
        trained=[],
        path=[nothing],
        certify_errors_M=[0],
        verdict=verdict,
        chosen=nothing,
        latency=(),
    )
    costs = make_costs(fit_without_caches.candidates.split.points)
    document = summarise(fit_without_caches.candidates, fit_without_caches.cached, costs, found)
    assert (document["caches"], document["cost"]["measured"], document["oracle_cost"]) == ([], [], None)
    assert sum(leaf["share"] for leaf in document["leaves"]) == 1


# --- the caches -------------------------------------------------------------------------------------


def test_each_cache_tells_what_it_is_and_how_it_did_on_tune(fit: Fit) -> None:
    tune = fit.candidates.recording.index(TUNE)
    full_N = fit.candidates.recording.logits_NC[tune].argmax(1)
    caches = fit.document["caches"]
    assert [cache["enabled"] for cache in caches] == [True, False, True]
    assert [cache["reads"] for cache in caches] == [None, None, "input/student8x1"]
    for k, (cache, trained) in enumerate(zip(caches, fit.found.trained, strict=True)):
        threshold = fit.found.chosen.thresholds_K[k]
        assert cache["threshold"] == (threshold if math.isfinite(threshold) else None)
        assert cache["agreement"] == pytest.approx((trained.on(tune).argmax(1).numpy() == full_N).mean())
        assert cache["flops_share"] == pytest.approx(fit.costs.caches[k].flops / fit.costs.backbone.flops)
        assert cache["training"]["steps"] == trained.log.steps == 37
        assert (cache["parameters"], cache["bytes"]) == (7, 28)


def test_reliability_bins_hold_all_tuning_rows(fit: Fit) -> None:
    tune = fit.candidates.recording.index(TUNE)
    for cache in fit.document["caches"]:
        bins = cache["reliability"]
        assert len(bins) == RELIABILITY_BINS
        assert sum(one["n"] for one in bins) == len(tune)
        assert max(one["n"] for one in bins) - min(one["n"] for one in bins) <= 1
        assert sum(one["n"] * one["agreement"] for one in bins) / len(tune) == pytest.approx(cache["agreement"])
        confidences = [one["confidence"] for one in bins]
        assert confidences == sorted(confidences)
        assert confidences[0] < confidences[-1]


def test_fewer_rows_than_bins_leave_no_empty_bin() -> None:
    bins = _reliability(np.array([0.9, 0.5, 0.7]), np.array([True, False, True]))
    assert bins == [
        {"confidence": 0.5, "agreement": 0.0, "n": 1},
        {"confidence": 0.7, "agreement": 1.0, "n": 1},
        {"confidence": 0.9, "agreement": 1.0, "n": 1},
    ]


# --- the path of plans ------------------------------------------------------------------------------


def test_bounds_on_the_path_are_those_of_the_calibration(fit: Fit) -> None:
    path = fit.document["path"]
    n = len(fit.candidates.recording.index(CERTIFY))
    assert [step["certified_errors"] for step in path] == [0, 0, 2, 4, 6]
    assert [step["bound"] for step in path] == [upper_bound(errors, n, LEVEL) for errors in (0, 0, 2, 4, 6)]
    assert [step["passed"] for step in path] == [True, True, True, True, False]
    assert [step["chosen"] for step in path] == [False, False, False, True, False]
    assert [step["disagreement"] for step in path] == [one.disagreement for one in fit.found.path]


# --- the document -----------------------------------------------------------------------------------


def test_the_document_is_strict_json_with_every_part(fit: Fit, fit_without_caches: Fit) -> None:
    """A NaN, such as the AUROC of a cache that never disagrees, would make it unreadable elsewhere."""
    never_wrong = dataclasses.replace(fit.found.trained[0], auroc={"margin": math.nan, "entropy": 0.75})
    found = dataclasses.replace(fit.found, trained=[never_wrong, *fit.found.trained[1:]])
    document = summarise(fit.candidates, fit.cached, fit.costs, found)
    assert json.loads(json.dumps(document, allow_nan=False)) == document
    assert document["caches"][0]["auroc"] == {"margin": None, "entropy": 0.75}
    assert json.loads(json.dumps(fit_without_caches.document, allow_nan=False)).keys() == document.keys()


def test_the_document_says_what_was_fitted_on_what(fit: Fit) -> None:
    document = fit.document
    assert document["backbone"]["name"] == "Brightest"
    assert document["backbone"]["fingerprint"] == fit.candidates.split.fingerprint
    assert [point["name"] for point in document["points"]] == ["input", "first", "second"]
    assert sum(document["fit"]["inputs"][part] for part in ("train", "tune", "certify")) == 600
    assert (document["fit"]["seed"], document["fit"]["time_budget_s"]) == (5, 60.0)
    assert document["fit"]["seconds"] == {"train": 3.0}
    assert document["cost"]["measured"] == [{"batch_size": 8, "full_ms": 2.0, "cached_ms": 1.0}]
    assert document["advice"] == "more inputs"
    document["fit"]["seconds"]["choose"] = 1.0
    assert "choose" not in fit.found.seconds, "what the fit adds is its own"


# --- samples ----------------------------------------------------------------------------------------


def test_the_first_samples_left_earlier_than_the_last(fit: Fit) -> None:
    samples = fit.document["samples"]
    assert samples["kind"] == "image"
    first, last = ([fit.cached.exits.index(one["left_at"]) for one in samples[part]] for part in ("first", "last"))
    assert len(first) == len(last) == SAMPLES
    assert max(first) < min(last)
    assert first == sorted(first)
    assert last == sorted(last, reverse=True)


def test_a_sample_shows_its_own_image_and_answer(fit: Fit) -> None:
    batch = fit.candidates.recording.sample
    prediction = fit.cached.predict(*batch.args)
    by_image = {_png(image.numpy()): row for row, image in enumerate(batch.args[0])}
    assert len(by_image) == len(batch)
    samples = fit.document["samples"]
    for one in (*samples["first"], *samples["last"]):
        row = by_image[one["image"]]
        assert one["left_at"] == fit.cached.exits[prediction.left_at_B[row]]
        assert one["answer"] == int(prediction.answer_B[row])
        assert one["confidence"] == float(prediction.confidence_B[row])
    assert {one["confidence"] for one in samples["last"]} == {1.0}, "the backbone's own answer is sure"
    sure = [one["confidence"] for one in samples["first"]]
    assert sure == sorted(sure, reverse=True), "the surest of those that leave first"


def samples_of(inputs: Tensor, *, to_text: Callable[[Tensor], str] | None = None) -> dict[str, Any]:
    """Samples of these inputs where the first half leaves at the cache, surer from row to row, the others do not."""
    rows = len(inputs)
    left_at = (torch.arange(rows) >= rows // 2).long()
    sure = torch.where(left_at == 0, torch.linspace(0.5, 0.9, rows), torch.ones(rows))
    row_of = {tuple(row.flatten().tolist()): number for number, row in enumerate(inputs)}

    def predict(x: Tensor) -> Prediction:
        of = torch.tensor([row_of[tuple(row.flatten().tolist())] for row in x])
        return Prediction(of, left_at[of], sure[of], None)

    cached = SimpleNamespace(
        plan=SimpleNamespace(caches=("one",)),
        exits=("one", BACKBONE),
        costs=SimpleNamespace(backbone=SimpleNamespace(time_ms={1: None, 5: None, 8: None})),
        bypasses=lambda size: size == 8,
        predict=predict,
    )
    batch = Batch((inputs,))
    split_model = SimpleNamespace(
        points=(make_point("input", 0, tuple(inputs.shape[1:]), 0.0, inputs.dtype),),
        device=torch.device("cpu"),
        flatten=lambda batch: batch.tensors,
        activation=lambda position, live: live[0],
    )
    candidates = SimpleNamespace(split=split_model, recording=SimpleNamespace(sample=batch))
    found = SimpleNamespace(to_text=to_text)
    return _samples(cast(Candidates, candidates), cast(CachedModel, cached), cast(Findings, found))


def test_inputs_that_are_neither_images_nor_token_ids_have_no_samples() -> None:
    for inputs in (torch.zeros(4, 6), torch.zeros(4, 5, 16), torch.zeros(4, 3, 5, 16, dtype=torch.int64)):
        assert samples_of(inputs) == {"kind": None, "first": [], "last": []}


def test_samples_go_from_where_requests_leave_first_and_last_inwards() -> None:
    """Twelve texts, of which six leave at the cache: a list of eight has two of the others at its end."""
    ids = torch.arange(24).view(12, 2)
    samples = samples_of(ids, to_text=lambda row: f"text {int(row[0]) // 2}")
    assert samples["kind"] == "text"
    assert SAMPLES == 8
    assert [one["left_at"] for one in samples["first"]] == ["one"] * 6 + [BACKBONE] * 2
    assert [one["left_at"] for one in samples["last"]] == [BACKBONE] * 6 + ["one"] * 2
    assert [one["text"] for one in samples["first"][:6]] == [f"text {row}" for row in (5, 4, 3, 2, 1, 0)]
    assert [one["text"] for one in samples["last"][6:]] == ["text 0", "text 1"], "the least sure"


def test_samples_tell_where_requests_leave_also_where_large_batches_are_bypassed(fit: Fit) -> None:
    plan = dataclasses.replace(fit.cached.plan, bypass_batch_sizes=(32,))
    cached = CachedModel(
        fit.candidates.split,
        [fit.found.trained[k].cache for k in (0, 2)],
        plan,
        fit.cached.certificate,
        fit.cached.costs,
        task=Classification(),
        summary={},
    )
    samples = summarise(fit.candidates, cached, fit.costs, fit.found)["samples"]
    assert samples["first"][0]["left_at"] != BACKBONE


def test_token_ids_are_shown_as_the_text_they_stand_for() -> None:
    ids = torch.tensor([[7, 3, 0, 0], [5, 5, 0, 0]])
    shown = _as_shown(ids, lambda ids_L: "-".join(map(str, ids_L.tolist())))
    assert shown is not None
    kind, show = shown
    assert (kind, show(1)) == ("text", "5-5-0-0")
    without_tokenizer = _as_shown(ids, None)
    assert without_tokenizer is not None
    assert without_tokenizer[1](0) == "token ids 7 3 0", "padding is cut to one"


# --- pictures ---------------------------------------------------------------------------------------


def decoded(text: str) -> NDArray[np.uint8]:
    """The pixels of a PNG with 8 bits per channel, no filter and no interlacing, checked chunk by chunk."""
    data = base64.b64decode(text)
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    chunks, at = {}, 8
    while at < len(data):
        (length,), kind = struct.unpack(">I", data[at : at + 4]), data[at + 4 : at + 8]
        body = data[at + 8 : at + 8 + length]
        assert struct.unpack(">I", data[at + 8 + length : at + 12 + length]) == (zlib.crc32(kind + body),)
        chunks[kind] = body
        at += 12 + length
    width, height, depth, colours, *rest = struct.unpack(">IIBBBBB", chunks[b"IHDR"])
    assert (list(chunks), depth, colours, rest) == ([b"IHDR", b"IDAT", b"IEND"], 8, 2, [0, 0, 0])
    rows = np.frombuffer(zlib.decompress(chunks[b"IDAT"]), np.uint8).reshape(height, 1 + 3 * width)
    assert not rows[:, 0].any()
    return rows[:, 1:].reshape(height, width, 3)


PICTURE = np.random.default_rng(0).integers(0, 256, (3, 9, 13)).astype(np.float32)
PICTURE[0, 0, 0], PICTURE[2, 8, 12] = 0, 255


@pytest.mark.parametrize(("low", "scale"), [(0.0, 1.0), (-2.0, 4.0)])
def test_a_colour_picture_comes_back_stretched_to_full_brightness(low: float, scale: float) -> None:
    pixels = decoded(_png((low + scale * PICTURE / 255).astype(np.float32)))
    assert np.abs(pixels.astype(int) - PICTURE.transpose(1, 2, 0)).max() <= 1  # rounding
    assert (pixels.min(), pixels.max()) == (0, 255)


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_other_numbers_of_channels_show_the_first_in_grey(channels: int) -> None:
    first = PICTURE[0]
    others = np.full((channels - 1, 9, 13), first.mean(), np.float32)
    pixels = decoded(_png(np.concatenate([first[None], others])))
    assert pixels.shape == (9, 13, 3)
    assert (pixels == pixels[:, :, :1]).all()
    stretched = (first - first.min()) / (first.max() - first.min()) * 255
    assert np.abs(pixels[:, :, 0] - stretched).max() <= 1  # rounding


def test_a_picture_of_one_brightness_is_black() -> None:
    assert not decoded(_png(np.full((1, 4, 5), 3.7, np.float32))).any()


def test_pillow_reads_the_same_pixels() -> None:
    image = pytest.importorskip("PIL.Image")
    text = _png(PICTURE)
    opened = image.open(io.BytesIO(base64.b64decode(text)))
    assert opened.mode == "RGB"
    assert np.array_equal(np.asarray(opened), decoded(text))

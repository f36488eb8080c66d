"""Freeze Inference: its thresholds against slow rules, and whole fits on a toy backbone."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_candidates import candidates_of
from torch import Tensor, nn
from toys import TOLERANCE, slow_threshold, traffic, wide

from offramp.artifact import load, save
from offramp.caches.nearest import CLASS_LEVEL, NEVER, ClassThresholds, NearestCache
from offramp.candidates import Candidates
from offramp.choosing import Learned, choose
from offramp.errors import InputError
from offramp.fitting import fit, learn
from offramp.methods import METHODS, method_named
from offramp.methods import freeze as module
from offramp.methods.freeze import CLASS_ROWS, Freeze, class_thresholds
from offramp.model import CachedModel
from offramp.placement import OFF, CacheCosts
from offramp.recording import TUNE
from offramp.types import FloatArray, Records

CLASSES = 4
NO_COSTS = CacheCosts(np.zeros(2), np.zeros(2))

pytestmark = pytest.mark.usefixtures("quick")


def images(count: int, seed: int) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randn(count, 4, 10, 10, generator=random) + torch.randn(count, 4, 1, 1, generator=random)


@pytest.fixture(scope="module")
def backbone() -> nn.Module:
    return wide(channels=CLASSES, cells=1)


def streams() -> dict[str, Any]:
    return traffic(images(500, 0).split(100), images(600, 1).split(100))


@pytest.fixture(scope="module")
def learned(quick: None, backbone: nn.Module) -> Learned:
    return learn(backbone, **streams(), method="freeze")


def again(learned: Learned, method: Freeze, *, seed: int = 0) -> Candidates:
    """What this method learns from the same recording."""
    before = learned.candidates
    candidates = candidates_of(before.split, before.recording, before.costs, seed=seed)
    method.learn(candidates, TOLERANCE)
    return candidates


# --- slow rules -------------------------------------------------------------------------------------


def said(seed: int, rows: int = 400, *, ties: bool = False) -> Records:
    """Two caches; the more confident, the likelier to agree; answers of unequal frequency."""
    random = np.random.default_rng(seed)
    confidence = random.random((rows, 2))
    if ties:
        confidence = confidence.round(1)
    answer = np.minimum(random.geometric(0.6, (rows, 2)) - 1, CLASSES - 1)  # the last is rare
    agreement = random.random((rows, 2)) < 0.6 + 0.4 * confidence - 0.1 * (answer == 1)
    return Records(confidence, answer, agreement, np.zeros(rows, int), (-1, -1))


def slow_column(records: Records, k: int, answer: int | None = None) -> tuple[list[float], list[bool]]:
    kept = [n for n in range(len(records)) if answer is None or records.answer_NK[n, k] == answer]
    return [float(records.confidence_NK[n, k]) for n in kept], [bool(records.agreement_NK[n, k]) for n in kept]


def one_cache(records: Records) -> Records:
    return Records(
        records.confidence_NK[:, :1],
        records.answer_NK[:, :1],
        records.agreement_NK[:, :1],
        records.backbone_answer_N,
        (-1,),
    )


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("tolerance", [0.0, 0.02, 0.1, 0.3])
def test_a_threshold_per_layer_is_the_smallest_within_the_tolerance(tolerance: float, *, ties: bool) -> None:
    for seed in range(5):
        records = said(seed, ties=ties)
        expected = tuple(slow_threshold(*slow_column(records, k), tolerance) for k in range(2))
        assert Freeze(per_class=False).thresholds(records, NO_COSTS, tolerance) == expected


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("tolerance", [0.0, 0.02, 0.1, 0.3])
def test_a_threshold_per_class_is_the_smallest_within_the_tolerance(tolerance: float, *, ties: bool) -> None:
    for seed in range(5):
        records = one_cache(said(seed, ties=ties))
        expected = []
        for answer in range(CLASSES):
            scores, agrees = slow_column(records, 0, answer)
            if len(scores) < CLASS_ROWS:
                scores, agrees = slow_column(records, 0)
            expected.append(min(slow_threshold(scores, agrees, tolerance), NEVER))
        assert class_thresholds(records, CLASSES, tolerance).tolist() == expected


def test_a_rare_class_goes_by_the_threshold_of_the_layer() -> None:
    records = one_cache(said(0))
    rare = np.bincount(records.answer_NK[:, 0], minlength=CLASSES + 1) < CLASS_ROWS
    found = class_thresholds(records, CLASSES + 1, 0.1)
    assert rare.tolist() == [False, False, False, True, True]
    assert set(found[rare]) == {slow_threshold(*slow_column(records, 0), 0.1)}


def test_nan_is_in_no_threshold() -> None:
    records = one_cache(said(0))
    records.confidence_NK[::3] = np.nan
    clean = records.rows(~np.isnan(records.confidence_NK[:, 0]))
    assert np.array_equal(class_thresholds(records, CLASSES, 0.1), class_thresholds(clean, CLASSES, 0.1))


@pytest.mark.parametrize("seed", range(5))
def test_one_threshold_on_the_rescaled_score_is_the_rule_per_class(seed: int) -> None:
    """The published decision, row by row, on inputs that the thresholds were not fitted on."""
    tuned, fresh = (one_cache(said(seed + more)) for more in (0, 100))
    threshold_C = class_thresholds(tuned, CLASSES, 0.15)
    rescale = ClassThresholds("vote", torch.from_numpy(threshold_C))

    def rescaled(records: Records) -> FloatArray:
        score_N, answer_N = (torch.from_numpy(x[:, 0]) for x in (records.confidence_NK, records.answer_NK))
        rescaled_N: Tensor = rescale(score_N.float(), answer_N)
        return rescaled_N.double().numpy()[:, None]

    seen = Records(rescaled(tuned), tuned.answer_NK, tuned.agreement_NK, tuned.backbone_answer_N, (-1,))
    (threshold,) = Freeze().thresholds(seen, NO_COSTS, 0.15)
    hits = rescaled(fresh)[:, 0] >= threshold
    scores, answers = fresh.confidence_NK[:, 0].astype(np.float32), fresh.answer_NK[:, 0]
    own = [float(np.float32(threshold_C[answer])) for answer in answers]
    slow = [score >= limit for score, limit in zip(scores.tolist(), own, strict=True)]
    disagreed = [
        not a for a, h in zip(tuned.agreement_NK[:, 0], rescaled(tuned)[:, 0] >= CLASS_LEVEL, strict=True) if h
    ]
    assert disagreed.count(True) / len(disagreed) <= 0.15, "else the layer as a whole is tightened"
    assert threshold == CLASS_LEVEL
    assert hits.tolist() == slow
    assert 0 < sum(slow) < len(slow)


def test_class_thresholds_are_tightened_together_and_never_loosened() -> None:
    records = said(3)
    strict, loose = (Freeze().thresholds(records, NO_COSTS, tolerance) for tolerance in (0.02, 0.9))
    assert min(strict) > CLASS_LEVEL
    smallest = np.where(records.confidence_NK >= CLASS_LEVEL, records.confidence_NK, 2).min(0)
    assert loose == tuple(smallest)


# --- whole fits -------------------------------------------------------------------------------------


def test_the_method_is_known_by_its_name() -> None:
    assert method_named("freeze") == Freeze()
    assert METHODS["freeze"].endswith(":Freeze")


def test_a_fit_is_certified_and_saved(backbone: nn.Module, tmp_path: Path) -> None:
    cached = fit(backbone, **streams(), method="freeze")
    assert cached.plan.caches
    assert cached.certificate.bound <= TOLERANCE
    assert cached.certificate.procedure.startswith("fixed-sequence")
    assert cached.report()["fit"]["method"] == "freeze"
    fresh = images(300, 2)
    assert (cached(fresh).argmax(1) != backbone(fresh).argmax(1)).double().mean() <= 0.1
    assert_same_from_disk(cached, backbone, tmp_path)


def assert_same_from_disk(cached: CachedModel, backbone: nn.Module, folder: Path) -> None:
    save(cached, folder / "model")
    fresh = images(100, 3)
    before, after = cached.predict(fresh), load(folder / "model", backbone).predict(fresh)
    assert torch.equal(before.left_at_B, after.left_at_B)
    assert torch.equal(before.output, after.output)
    assert torch.equal(before.confidence_B, after.confidence_B)


def test_a_fit_by_the_published_rule(backbone: nn.Module, tmp_path: Path) -> None:
    cached = fit(backbone, **streams(), method=Freeze(rule="published", per_class=False))
    measured = "measured only: thresholds by the published rule of freeze, exact binomial bound"
    assert cached.certificate.procedure == measured
    assert {planned.confidence for planned in cached.plan.caches} == {"vote"}
    assert_same_from_disk(cached, backbone, tmp_path)


@pytest.mark.parametrize("per_class", [False, True])
@pytest.mark.parametrize("confidence", ["vote", "distance"])
def test_each_layer_of_the_published_rule_is_within_the_tolerance(
    learned: Learned, confidence: Any, *, per_class: bool
) -> None:
    """On tune, each cache by itself; one that is off has no threshold that would do."""
    method = Freeze(confidence=confidence, per_class=per_class)
    candidates = again(learned, method)
    records = candidates.records(candidates.trained, TUNE)
    thresholds_K = method.thresholds(records, NO_COSTS, TOLERANCE)
    assert min(thresholds_K) < OFF
    for k, threshold in enumerate(thresholds_K):
        assert candidates.trained[k].cache.confidence_name == confidence + "_by_class" * per_class
        scores, agrees = slow_column(records, k)
        hits = [agreed for score, agreed in zip(scores, agrees, strict=True) if score >= threshold]
        assert hits.count(False) <= TOLERANCE * len(hits)
        if threshold == OFF and not per_class:
            assert slow_threshold(scores, agrees, TOLERANCE) == OFF


def test_class_thresholds_of_a_fit_are_those_of_the_slow_rule(learned: Learned) -> None:
    plain = again(learned, Freeze(per_class=False))
    for trained, bare in zip(learned.trained, plain.trained, strict=True):
        records = plain.records([bare], TUNE)
        expected = []
        for answer in range(CLASSES):
            column = slow_column(records, 0, answer)
            enough = len(column[0]) >= CLASS_ROWS
            expected.append(min(slow_threshold(*(column if enough else slow_column(records, 0)), TOLERANCE), NEVER))
        assert isinstance(trained.cache, NearestCache)
        assert trained.cache.class_thresholds is not None
        assert trained.cache.class_thresholds.threshold_C.tolist() == expected
        assert not math.isnan(trained.auroc["vote_by_class"])


def test_one_learning_serves_both_rules_and_other_tolerances(learned: Learned) -> None:
    for tolerance in (0.03, 0.2):
        certified, published = (
            choose(learned, tolerance=tolerance, confidence_level=0.95, rule=rule)
            for rule in ("certificate", "published")
        )
        assert certified.certificate.bound <= tolerance
        assert all(planned.threshold >= CLASS_LEVEL for planned in published.plan.caches)


@pytest.mark.parametrize(
    "method",
    [
        Freeze(store="centroids", confidence="distance", centroids=2),
        Freeze(feature="projected", width=4, whiten=True, points=50),
        Freeze(feature="raw", neighbours=3, points=50, per_class=False),
    ],
)
def test_every_store_has_the_form_that_was_asked_for(learned: Learned, method: Freeze) -> None:
    candidates = again(learned, method)
    assert [one.position for one in candidates.trained] == list(range(len(candidates.split.points)))
    for trained in candidates.trained:
        assert isinstance(trained.cache, NearestCache)
        assert trained.cache.shape == method.shape()
        assert trained.cache.kept == (2 * CLASSES if method.store == "centroids" else 50)
        assert trained.cache.seen == len(candidates.train_rows)


def test_the_same_seed_gives_the_same_stores(learned: Learned) -> None:
    states = [
        [trained.cache.state_dict() for trained in again(learned, Freeze(points=40), seed=seed).trained]
        for seed in (0, 0, 1)
    ]

    def same(first: int, second: int) -> bool:
        pairs = zip(states[first], states[second], strict=True)
        return all(torch.equal(one[name], other[name]) for one, other in pairs for name in one)

    assert same(0, 1)
    assert not same(0, 2)


def test_stores_are_spread_evenly_and_no_more_than_so_many(learned: Learned, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_POINTS", 3)
    last = learned.candidates.split.points[-1].position
    assert [trained.position for trained in again(learned, Freeze()).trained] == [0, round(last / 2), last]


def test_a_stop_keeps_the_stores_that_there_are(learned: Learned, monkeypatch: pytest.MonkeyPatch) -> None:
    add = Candidates.add

    def stopping(self: Candidates, *arguments: Any) -> None:
        add(self, *arguments)
        self.stop.requested = len(self.trained) == 2

    monkeypatch.setattr(Candidates, "add", stopping)
    assert len(again(learned, Freeze()).trained) == 2


def test_no_store_begins_when_the_time_is_up(learned: Learned, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Candidates, "time_left", property(lambda self: 1.0))
    assert again(learned, Freeze()).trained == []


class Reads(nn.Module):
    """Token ids in, so that the input has no distances."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.body = nn.Embedding(20, 32), nn.Sequential(*(nn.Linear(32, 32) for _ in range(4)))
        self.head = nn.Linear(32, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.body(self.embedding(ids)).mean(1))
        return logits


def test_token_ids_get_no_store() -> None:
    torch.manual_seed(0)
    ids = list(torch.randint(0, 20, (1000, 6)).split(100))
    learned = learn(Reads().eval(), **(streams() | {"stream": ids[:5], "certify": ids[5:]}), method=Freeze())
    assert [trained.position for trained in learned.trained] == list(range(1, len(learned.candidates.split.points)))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("rule", "mine", "unknown rule 'mine'"),
        ("store", "rows", "store is 'rows'"),
        ("confidence", "entropy", "score is 'entropy'"),
        ("neighbours", 0, "neighbours is 0"),
    ],
)
def test_hyper_parameters_that_make_no_sense_are_refused(field: str, value: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Freeze(**{field: value})  # type: ignore[arg-type]

"""Approximate keys: whole fits on a toy backbone, and the dynamic form with its estimate of its own error."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from toys import TOLERANCE, traffic, wide

from offramp.artifact import load, save
from offramp.caches import KeyCache
from offramp.choosing import Learned, choose
from offramp.distillation import Recipe
from offramp.errors import InputError
from offramp.fitting import fit, learn
from offramp.methods import METHODS, method_named
from offramp.methods.approximate_key import MATCH, ApproximateKey, AutoRefresh, replay
from offramp.methods.base import Method, Rule
from offramp.methods.offramp import Offramp
from offramp.model import BACKBONE
from offramp.placement import OFF, CacheCosts
from offramp.recording import TRAIN
from offramp.search import Search
from offramp.splitting import SplitPoint
from offramp.types import Records


def images(count: int, seed: int) -> Tensor:
    """Skewed traffic: quarters as bright as one of 60 patterns says, the first patterns most often, and some noise."""
    patterns = torch.randn(60, 1, 2, 2, generator=torch.Generator().manual_seed(99)).repeat_interleave(8, 2)
    random = np.random.default_rng(seed)
    chosen = patterns.repeat_interleave(8, 3)[torch.from_numpy(random.zipf(1.3, count) % 60)]
    return chosen + 0.02 * torch.from_numpy(random.standard_normal(chosen.shape).astype(np.float32))


@pytest.fixture(autouse=True, scope="module")
def quick(quick: None) -> Iterator[None]:
    """Short trainings and few copies as well."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Search, "recipe", lambda self, cache: Recipe(rows=600, batch_size=64, learning_rate=4e-3))
        patched.setattr("offramp.recording.ASKED_ROWS", 400)
        yield


@pytest.fixture(scope="module")
def backbone() -> nn.Module:
    return wide(channels=1, cells=2)


def streams() -> dict[str, Any]:
    return traffic(images(300, 0).split(100), images(600, 1).split(100))


@pytest.fixture(scope="module")
def learned(backbone: nn.Module) -> Learned:
    return learn(backbone, method="approximate_key", **streams())


# --- the frozen form ------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["certificate", "published"])
def test_both_rules_give_a_model_that_saves_and_keeps_to_the_tolerance(
    learned: Learned, backbone: nn.Module, rule: Rule, tmp_path: Path
) -> None:
    cached = choose(learned, tolerance=TOLERANCE, confidence_level=0.9, rule=rule)
    assert cached.plan.caches
    assert cached.report()["fit"]["method"] == "approximate_key"
    assert cached.certificate.procedure.startswith("measured only" if rule == "published" else "fixed-sequence")
    if rule == "published":
        assert [planned.threshold for planned in cached.plan.caches] == [MATCH]
    else:
        assert cached.certificate.bound <= TOLERANCE
    fresh = images(500, 2)
    prediction = cached.predict(fresh)
    hits = prediction.left_at_B != cached.exits.index(BACKBONE)
    with torch.no_grad():
        expected = backbone(fresh).argmax(1)
    assert hits.double().mean() > 0.5
    assert (prediction.answer_B != expected).double().mean() < 2 * TOLERANCE
    save(cached, tmp_path / "model")
    again = load(tmp_path / "model", backbone).predict(fresh)
    assert torch.equal(again.output, prediction.output)
    assert torch.equal(again.left_at_B, prediction.left_at_B)


def test_by_name_in_a_whole_fit(backbone: nn.Module) -> None:
    cached = fit(backbone, method="approximate_key", confidence_level=0.9, **streams())
    assert cached.plan.caches
    assert all(isinstance(cache, KeyCache) for cache in cached.caches)
    assert isinstance(method_named("approximate_key"), ApproximateKey)
    assert "approximate_key" in METHODS


def test_every_resolution_is_a_candidate_and_decides_by_agreement(learned: Learned) -> None:
    caches = [trained.cache for trained in learned.trained]
    assert [cache.name for cache in caches] == ["input/key8x4", "input/key4x4", "input/key4x2", "input/key2x4"]
    assert {cache.confidence_name for cache in caches} == {"agreement"}
    assert all(cache.selector is None for cache in caches)
    assert learned.candidates.confidence is None, "what it was before"


def test_augmented_copies_are_not_counted(learned: Learned) -> None:
    recording = learned.candidates.recording
    originals = np.flatnonzero((recording.part_N == TRAIN) & (recording.copy_N == 0))
    assert recording.copy_N.sum() > 0
    for trained in learned.trained:
        cache = trained.cache
        assert isinstance(cache, KeyCache)
        again = KeyCache("again", "input", cache.activation_shape, 4, grid=cache.grid, levels=cache.levels)
        again.fill(recording.features[0], originals, recording.logits_NC[originals].argmax(1), 1 << 20)
        assert torch.equal(cache.key_S, again.key_S)
        assert torch.equal(cache.rate_S, again.rate_S)


def test_a_table_and_the_caches_behind_it_share_one_certificate(backbone: nn.Module) -> None:
    learned = learn(
        backbone, method=ApproximateKey(behind=Offramp(), grids=((4, 2), (2, 4)), max_bytes=160), **streams()
    )
    names = [trained.cache.name for trained in learned.trained]
    assert names[:2] == ["input/key4x2", "input/key2x4"]
    assert len(names) > 4
    cached = choose(learned, tolerance=TOLERANCE, confidence_level=0.9)
    assert cached.certificate.bound <= TOLERANCE
    tables, behind = learned.trained[:2], learned.trained[2:]
    assert all(isinstance(trained.cache, KeyCache) and len(trained.cache.key_S) == 10 for trained in tables)
    assert {trained.cache.kind for trained in behind} == {"learned"}


def test_a_backbone_of_token_ids_gets_prefixes() -> None:
    point = SplitPoint("ids", 0, (12,), torch.long, ((12,),), 96, 0.0)
    caches = list(ApproximateKey()._caches(point, 3))
    assert [(cache.grid, cache.levels) for cache in caches] == [(12, 0), (8, 0), (4, 0)]
    floating = SplitPoint("x", 0, (6,), torch.float32, ((6,),), 24, 0.0)
    assert [(cache.grid, cache.levels) for cache in ApproximateKey()._caches(floating, 3)] == [(6, 8), (4, 8)]


def test_the_published_rule_takes_the_match_that_pays_most_within_the_tolerance() -> None:
    """Four resolutions: the surest hits least often; the loosest would hit most, but disagrees too often."""
    hit_NK = np.arange(100)[:, None] < np.array([20, 50, 60, 90])
    agreement_NK = np.arange(100)[:, None] >= np.array([0, 2, 5, 30])
    confidence_NK = np.where(hit_NK, 0.7, 0.0)
    answer_N = np.zeros(100, np.int64)
    records = Records(confidence_NK, np.zeros((100, 4), np.int64), agreement_NK, answer_N, (-1,) * 4)
    costs = CacheCosts(np.zeros(4), np.full(4, 0.01))
    method = ApproximateKey(rule="published")
    assert method.thresholds(records, costs, 0.05) == (OFF, OFF, MATCH, OFF)
    assert method.thresholds(records, costs, 0.04) == (OFF, MATCH, OFF, OFF)
    assert method.thresholds(records, costs, 0.001) == (MATCH, OFF, OFF, OFF)
    assert method.thresholds(records, costs, 0.5) == (OFF, OFF, OFF, MATCH)
    assert method.thresholds(records, CacheCosts(np.zeros(4), np.full(4, 0.95)), 0.5) == (OFF,) * 4


def test_a_match_is_a_hit_in_single_precision_too() -> None:
    """Thresholds are compared with float32 confidences: one that rounds to 0 would let every miss answer."""
    assert bool((torch.tensor([0.5, 1e-5, 0.0]) >= MATCH).tolist() == [True, True, False])


def test_what_cannot_go_together_is_refused() -> None:
    with pytest.raises(InputError, match="knows keys alone; take rule='certificate'"):
        ApproximateKey(rule="published", behind=Offramp())

    class Labelled(Offramp):
        name = "labelled"
        needs_labels = True

    with pytest.raises(InputError, match="learns without labels, labelled behind it does not"):
        ApproximateKey(behind=Labelled())
    assert isinstance(ApproximateKey(), Method)


# --- the dynamic form -----------------------------------------------------------------------------


def stream(requests: int, seed: int, *, keys: int = 60, unstable: float = 0.1) -> tuple[NDArray[Any], NDArray[Any]]:
    """Skewed keys; a third of them have a second answer in this share of the requests, and all of them drift once."""
    random = np.random.default_rng(seed)
    key_N = random.zipf(1.3, requests) % keys
    second_N = (key_N % 3 == 0) & (random.random(requests) < unstable)
    return key_N, key_N % 5 + second_N + 2 * (np.arange(requests) > requests // 2) * (key_N % 7 == 0)


def test_the_estimate_is_unbiased_and_its_standard_error_right() -> None:
    key_N, answer_N = stream(1500, 0)
    runs = [replay(key_N, answer_N, AutoRefresh(capacity=40, seed=seed)) for seed in range(300)]
    apart = np.array([run.estimated_error - run.true_error for run in runs])
    true = np.mean([run.true_error for run in runs])
    assert true > 0.01, "there should be something to estimate"
    assert abs(apart.mean()) <= 3 * apart.std() / math.sqrt(len(runs))
    assert apart.std() / math.sqrt(len(runs)) < 0.1 * true, "or the test shows nothing"
    mean_variance = np.mean([run.standard_error**2 for run in runs])
    assert math.sqrt(mean_variance) == pytest.approx(apart.std(), rel=0.2)


def test_counting_audits_without_their_weights_would_be_wrong() -> None:
    """The planted error: back-off makes audits of stable keys rare, so plain shares overstate the error."""
    key_N, answer_N = stream(1500, 0)
    apart = []
    for seed in range(100):
        refresh = AutoRefresh(capacity=40, seed=seed)
        true = replay(key_N, answer_N, refresh).true_error
        apart.append(refresh.disagreements / refresh.audits * (refresh.hits - refresh.audits) / 1500 - true)
    assert abs(np.mean(apart)) > 10 * np.std(apart) / math.sqrt(len(apart))


def test_back_off_makes_stable_keys_almost_free() -> None:
    requests = 20_000
    stable = replay(np.zeros(requests), np.zeros(requests), AutoRefresh(capacity=1))
    assert stable.audit_rate * requests < 60  # about log(20,000) / log(1.5)
    assert stable.hit_rate > 0.99
    assert (stable.true_error, stable.estimated_error, stable.standard_error) == (0, 0, 0)
    alternating = replay(np.zeros(requests), np.arange(requests) % 2, AutoRefresh(capacity=1))
    assert alternating.audit_rate > 0.3


def test_a_larger_factor_audits_less_and_a_bounded_gap_more() -> None:
    key_N, answer_N = stream(4000, 1, unstable=0.0)

    def audits(**options: float) -> float:
        return replay(key_N, answer_N, AutoRefresh(capacity=100, **options)).audit_rate  # type: ignore[arg-type]

    assert audits(beta=2.0) < audits() < audits(max_gap=8.0)
    assert audits(max_gap=8.0) > 0.1
    assert audits(max_gap=1.0) == pytest.approx(1 - 60 / 4000, abs=0.01), "every hit"


def test_a_disagreement_replaces_the_answer_and_resets_the_gap() -> None:
    refresh = AutoRefresh(capacity=2, max_gap=1.0)
    said = iter([1, 1, 2, 2])
    assert [refresh.answer("a", lambda: next(said)) for _ in range(4)] == [1, 1, 2, 2]
    assert (refresh.requests, refresh.hits, refresh.audits, refresh.disagreements) == (4, 3, 3, 1)
    assert refresh.error == 0.0, "an audited hit gets the model's answer"
    backing_off = AutoRefresh(capacity=1, beta=4.0)
    for answer in (1, 1, 1):
        backing_off.answer("a", lambda answer=answer: answer)  # type: ignore[misc]
    entry = backing_off._entries["a"]
    assert entry.gap >= 4
    while entry.answer == 1:
        backing_off.answer("a", lambda: 7)
    assert (entry.answer, entry.gap) == (7, 1.0)
    assert backing_off.error > 0


def test_a_full_store_forgets_what_was_used_longest_ago() -> None:
    refresh = AutoRefresh(capacity=2)

    def known(key: str) -> bool:
        before = refresh.hits
        refresh.answer(key, lambda: 0)
        return refresh.hits > before

    assert [known(key) for key in "abacab"] == [False, False, True, False, True, False]


def test_a_replay_adds_up() -> None:
    key_N, answer_N = stream(3000, 2)
    refresh = AutoRefresh(capacity=20, seed=1)
    run = replay(key_N, answer_N, refresh)
    assert run.requests == 3000
    assert run.hit_rate + run.audit_rate == pytest.approx(refresh.hits / 3000)
    assert run.estimated_error == refresh.error
    assert 0 < run.true_error < run.hit_rate


def test_keys_of_recorded_inputs_can_be_replayed(learned: Learned) -> None:
    recording, cache = learned.candidates.recording, learned.trained[-1].cache
    assert isinstance(cache, KeyCache)
    rows = np.flatnonzero(recording.copy_N == 0)
    key_N = cache.keys(torch.from_numpy(recording.features[0][rows])).numpy()
    run = replay(key_N, recording.logits_NC[rows].argmax(1), AutoRefresh(capacity=1000))
    assert run.hit_rate > 0.5
    assert run.true_error < TOLERANCE


@pytest.mark.parametrize(
    "options", [{"capacity": 0}, {"beta": 1.0}, {"beta": math.inf}, {"beta": math.nan}, {"max_gap": 0.5}]
)
def test_a_refresh_that_cannot_work_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="expected room for at least one key, a finite factor above 1"):
        AutoRefresh(**({"capacity": 5} | options))


def test_a_stream_that_does_not_fit_is_refused() -> None:
    for key_N, answer_N in (
        (np.zeros(3), np.zeros(4)),
        (np.zeros(0), np.zeros(0)),
        (np.zeros((2, 2)), np.zeros((2, 2))),
    ):
        with pytest.raises(InputError, match="expected one key and one answer per request"):
            replay(key_N, answer_N, AutoRefresh(capacity=5))
    used = AutoRefresh(capacity=5)
    replay(np.zeros(3), np.zeros(3), used)
    with pytest.raises(InputError, match="3 requests behind it"):
        replay(np.zeros(3), np.zeros(3), used)

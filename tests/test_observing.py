"""What is kept of requests whose inputs may not be kept, and the recording that becomes of it."""

from __future__ import annotations

import models
import numpy as np
import pytest
import torch
from test_candidates import candidates_of

from offramp.caches import CacheShape
from offramp.cost import measure
from offramp.methods import method_named
from offramp.observing import Observer, cost_of, logits_of
from offramp.recording import CERTIFY, TRAIN, TUNE, record, recording_of
from offramp.refitting import Continued
from offramp.splitting import SplitModel, split
from offramp.streams import Batch
from offramp.tasks import Classification


@pytest.fixture
def split_model() -> SplitModel:
    torch.manual_seed(0)
    return split(models.PlainCNN().eval(), Batch((models.images(4),)))


def observed(split_model: SplitModel, rows: int, seed: int) -> Batch:
    return Observer(split_model, Classification())(Batch((models.images(rows, seed),)), torch.linspace(0, 1, rows))


def test_an_observed_request_is_a_recorded_one_without_its_input(split_model: SplitModel) -> None:
    x = models.images(40, 1)
    one = Observer(split_model, Classification())(Batch((x,)), torch.linspace(0, 1, 40))
    recorded = record(split_model, Classification(), [x], None, seed=0, bfloat16=False)
    assert len(one.args) == len(split_model.points) - 1 + 3
    for mine, theirs in zip(one.args, recorded.features[1:], strict=False):
        assert np.array_equal(mine.numpy(), theirs[:40])
    assert np.array_equal(logits_of(one).numpy(), recorded.logits_NC[:40])
    assert cost_of(one) == pytest.approx(0.5)


def test_equal_requests_are_known_by_their_digests_and_nobody_else_can_guess_them(split_model: SplitModel) -> None:
    x, observe = models.images(6, 1), Observer(split_model, Classification())
    again = observe(Batch((x[[0, 0, 5]],)), torch.zeros(3)).args[-3]
    assert torch.equal(again[0], again[1])
    assert torch.equal(observe(Batch((x,)), torch.zeros(6)).args[-3][5], again[2])
    assert not torch.equal(again[0], again[2])
    other = Observer(split_model, Classification())
    assert not torch.equal(other(Batch((x,)), torch.zeros(6)).args[-3][0], again[0])


def test_one_lot_trains_and_the_newer_one_tunes_and_certifies(split_model: SplitModel) -> None:
    observe = Observer(split_model, Classification())
    train, newer = models.images(100, 1), torch.cat([models.images(10, 1), models.images(190, 2)])
    recording = recording_of(
        split_model, observe(Batch((train,)), torch.ones(100)), observe(Batch((newer,)), torch.ones(200)), seed=3
    )
    assert recording.index(TRAIN).tolist() == list(range(100))
    assert len(recording) == 290, "what trained does not certify"
    assert recording.dropped_duplicates == 10
    tune, certify = recording.index(TUNE), recording.index(CERTIFY)
    assert len(tune) + len(certify) == 190
    assert 0.2 < len(tune) / 190 < 0.5
    assert not recording.has_inputs
    assert recording.separate


@pytest.mark.parametrize("method", ["offramp", "gati", "freeze", "selfxit", "approximate_key"])
def test_methods_do_without_the_input(split_model: SplitModel, method: str) -> None:
    recording = recording_of(split_model, observed(split_model, 120, 1), observed(split_model, 120, 2), seed=0)
    costs = measure(split_model, batch_sizes=(1,), budget_s=0.1)
    candidates = candidates_of(split_model, recording, costs)
    at_input = candidates.build(split_model.points[0], CacheShape("student", 8)).eval()
    reader = candidates.build(split_model.points[1], CacheShape("linear"), at_input).eval()
    alone = candidates.build(split_model.points[2], CacheShape("linear")).eval()
    Continued(base=method_named(method), serving=[at_input, reader, alone]).learn(candidates, 0.05)
    tried = [trained.cache for trained in candidates.trained]
    assert alone in tried, "it serves already"
    assert at_input not in tried
    assert reader not in tried
    candidates.trained = [trained for trained in candidates.trained if trained.cache is not alone]
    assert all(trained.position > 0 for trained in candidates.trained)
    assert bool(candidates.trained) == (method != "approximate_key")

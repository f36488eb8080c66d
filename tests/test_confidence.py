"""Confidence scores: in [0, 1], higher where the answer is clearer, and never a hit when something is NaN."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from offramp.confidence import CONFIDENCES, Selector, auroc, entropy, margin, max_softmax, statistics


def logits(rows: int = 50, classes: int = 4, scale: float = 3.0) -> Tensor:
    return scale * torch.randn(rows, classes, generator=torch.Generator().manual_seed(rows + classes))


def test_scores_by_hand() -> None:
    p = torch.tensor([[0.7, 0.2, 0.1]])
    assert float(max_softmax(p.log())) == pytest.approx(0.7)
    assert float(margin(p.log())) == pytest.approx(0.5)
    expected = 1 + sum(q * math.log(q) for q in (0.7, 0.2, 0.1)) / math.log(3)
    assert float(entropy(p.log())) == pytest.approx(expected)


@pytest.mark.parametrize("name", CONFIDENCES)
@pytest.mark.parametrize("classes", [1, 2, 10])
def test_scores_lie_between_0_and_1(name: str, classes: int) -> None:
    score_B = CONFIDENCES[name](torch.cat([logits(classes=classes), 1e4 * logits(5, classes), torch.zeros(1, classes)]))
    assert score_B.shape == (56,)
    assert bool(((score_B >= -1e-6) & (score_B <= 1 + 1e-6)).all()), score_B


@pytest.mark.parametrize("name", CONFIDENCES)
def test_a_clearer_answer_scores_higher(name: str) -> None:
    score_B = CONFIDENCES[name](torch.tensor([[0.0, 0, 0], [1.0, 0, 0], [3.0, 0, 0], [9.0, 0, 0]]))
    assert bool((score_B.diff() > 0).all())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", [*CONFIDENCES, "selector"])
def test_bad_logits_reach_no_threshold(name: str, bad: float) -> None:
    x = torch.tensor([[1.0, bad, 0.0], [2.0, 0.0, 0.0]])
    selector = Selector(4)
    selector.weight.fill_(0.5)
    score_B = selector(x, None) if name == "selector" else CONFIDENCES[name](x)
    assert (score_B >= 0).tolist() == [False, True]


def test_scores_of_a_row_do_not_depend_on_the_others() -> None:
    x, read = logits(), logits(classes=4, scale=1.0)
    for score in (*CONFIDENCES.values(), lambda rows: statistics(rows, read[: len(rows)])[:, -1]):
        torch.testing.assert_close(score(x)[:3], score(x[:3]))  # type: ignore[no-untyped-call]


def test_statistics_by_hand() -> None:
    p, read = torch.tensor([[0.7, 0.2, 0.1]]), torch.tensor([[0.3, 0.6, 0.1]])
    own = statistics(p.log(), None)[0].tolist()
    assert own == pytest.approx([math.log(0.7), math.log(0.3), math.log(0.7 / 0.2), float(entropy(p.log()))], abs=1e-5)
    both = statistics(p.log(), read.log())[0].tolist()
    assert both == pytest.approx([*own, math.log(0.3), math.log(0.4), 0.0], abs=1e-5)
    assert statistics(p.log(), p.log())[0, -1] == 1


def test_statistics_stay_finite_when_the_cache_is_certain() -> None:
    x = torch.tensor([[100.0, 0, 0], [1e6, 0, 0]])
    assert bool(statistics(x, x).isfinite().all())


def test_the_selector_learns_what_agrees() -> None:
    """P(agree) rises with the first column only; the fitted scores must follow it and be calibrated on average."""
    random = torch.Generator().manual_seed(0)
    x_NF = torch.randn(2000, 4, generator=random) * torch.tensor([1.0, 5.0, 0.1, 1.0]) + 3
    chance_N = torch.sigmoid(2 * (x_NF[:, 0] - 3) + 1)
    agreement_N = torch.rand(2000, generator=random) < chance_N
    selector = Selector.fitted(x_NF, agreement_N)
    score_N = selector.score(x_NF)
    torch.testing.assert_close(
        score_N,
        1 / (1 + torch.exp(-((x_NF - selector.mean) / selector.scale * selector.weight).sum(1) - selector.bias)),
    )
    assert float((score_N - chance_N).abs().mean()) < 0.05
    assert float(score_N.mean()) == pytest.approx(float(agreement_N.double().mean()), abs=0.01)
    again = Selector.fitted(x_NF, agreement_N)
    assert all(torch.equal(one, other) for one, other in zip(selector.buffers(), again.buffers(), strict=True))


@pytest.mark.parametrize("agrees", [True, False])
def test_the_selector_survives_one_sided_and_constant_data(*, agrees: bool) -> None:
    selector = Selector.fitted(torch.ones(20, 4), torch.full((20,), agrees))
    assert all(bool(buffer.isfinite().all()) for buffer in selector.buffers())
    score = float(torch.sigmoid(selector.bias))
    assert (score > 0.9) == agrees


def test_a_fresh_selector_scores_one_half() -> None:
    assert Selector(4)(logits(), None).tolist() == [0.5] * 50
    assert Selector(7)(logits(), logits()).shape == (50,)


def test_auroc_counts_pairs() -> None:
    random = np.random.default_rng(0)
    score_N, agrees_N = random.integers(0, 6, 40) / 5, random.random(40) < 0.6
    pairs = [(a > b) + 0.5 * (a == b) for a in score_N[agrees_N] for b in score_N[~agrees_N]]
    assert auroc(score_N, agrees_N) == pytest.approx(np.mean(pairs))
    assert auroc(np.array([0.1, 0.9]), np.array([False, True])) == 1
    assert math.isnan(auroc(score_N, np.ones(40, dtype=bool)))

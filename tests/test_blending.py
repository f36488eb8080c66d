"""What a cache says and what it reads: the blend, and how its two weights are found."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from offramp import blending
from offramp.blending import blended, fit_blend

CLASSES = 4


def draw(rows: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Two opinions and answers drawn from a pool of both, at 0.7 of the first and 1.3 of the second."""
    random = torch.Generator().manual_seed(seed)
    own_NC, read_NC = (2 * torch.randn(rows, CLASSES, generator=random) for _ in range(2))
    p_NC = blended(own_NC, read_NC, (0.7, 1.3)).softmax(1)
    return own_NC, read_NC, torch.multinomial(p_NC, 1, generator=random).squeeze(1)


def test_a_blend_is_a_weighted_sum_of_log_probabilities() -> None:
    own_BC, read_BC = torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 3.0]])
    expected = 0.5 * own_BC + 2 * read_BC.log_softmax(1)
    torch.testing.assert_close(blended(own_BC, read_BC, (0.5, 2.0)), expected)


def test_nothing_that_is_read_is_out_of_the_question() -> None:
    very_sure = torch.tensor([[-1e30, 1e30]])
    logits_BC = blended(torch.zeros(1, 2), very_sure, (1.0, 1.0))
    assert logits_BC.tolist() == [[blending.FLOOR, 0.0]]


def test_the_weights_that_the_answers_were_drawn_with_are_found() -> None:
    assert fit_blend(*draw(4096)) == pytest.approx([0.7, 1.3], abs=0.1)


def test_no_others_make_the_answers_more_likely() -> None:
    own_NC, read_NC, answer_N = draw(300)
    own, read = fit_blend(own_NC, read_NC, answer_N)

    def loss(own: float, read: float) -> float:
        ridge = blending.RIDGE * ((own - 1) ** 2 + read**2)
        return float(F.cross_entropy(blended(own_NC, read_NC, (own, read)), answer_N) + ridge)

    for more_own, more_read in ((0.05, 0.0), (-0.05, 0.0), (0.0, 0.05), (0.0, -0.05)):
        assert loss(own, read) < loss(own + more_own, read + more_read)


def test_where_every_answer_is_right_the_weights_stay_finite() -> None:
    own_NC = 20.0 * torch.eye(CLASSES)
    blend = fit_blend(own_NC, torch.zeros(CLASSES, CLASSES), torch.arange(CLASSES))
    assert blend == pytest.approx([1.0, 0.0], abs=0.01)


def test_what_says_nothing_has_no_weight() -> None:
    own_NC, _, _ = draw(2000)
    answer_N = torch.multinomial(own_NC.softmax(1), 1, generator=torch.Generator().manual_seed(1)).squeeze(1)
    noise_NC = torch.randn(2000, CLASSES, generator=torch.Generator().manual_seed(2))
    assert fit_blend(own_NC, noise_NC, answer_N) == pytest.approx([1.0, 0.0], abs=0.1)

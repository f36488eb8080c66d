"""How a cache weighs what it says itself and what it reads: two numbers, once both caches are trained.

Learning to read on the inputs that the earlier cache was trained on teaches too much trust: there it is right more
often, and surer, than it will be in service (docs/experiments.md has how much). So a cache learns as if it read
nothing, and what weighs the two is fitted on tuning inputs, which neither has seen, as in stacking (Wolpert 1992,
"Stacked generalization"). The blend is a logarithmic opinion pool: a weighted sum of log-probabilities.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from offramp.types import FloatArray

FLOOR = -10.0  # of log-probabilities that are read: no answer is out of the question
RIDGE = 1e-3  # towards a cache by itself: where every answer is right, nothing else would hold the weights

# The weights of a cache's own logits and of those that it reads. Plain numbers suit every runtime: a quantiser of
# INT8 cannot follow weights that are picked from a tensor.
Blend = tuple[float, float]
ALONE: Blend = 1.0, 0.0


def blended(own_BC: Tensor, read_BC: Tensor, blend: Blend) -> Tensor:
    """(B, C) logits of a cache from its own and from those that it reads."""
    own, read = blend
    return own * own_BC + read * read_BC.log_softmax(-1).clamp(min=FLOOR)


def fit_blend(own_NC: Tensor, read_NC: Tensor, answer_N: Tensor) -> Blend:
    """The weights whose blend finds the backbone's answers most likely."""
    from scipy.optimize import minimize

    own_NC, read_NC = own_NC.double(), read_NC.double().log_softmax(-1).clamp(min=FLOOR)
    start = np.array(ALONE)

    def loss_and_gradient(weights: FloatArray) -> tuple[float, FloatArray]:
        log_p_NC = (weights[0] * own_NC + weights[1] * read_NC).log_softmax(-1)
        error_NC = log_p_NC.exp()
        error_NC[torch.arange(len(answer_N)), answer_N] -= 1
        gradient = [float((error_NC * part_NC).sum(1).mean()) for part_NC in (own_NC, read_NC)]
        loss = float(F.nll_loss(log_p_NC, answer_N))
        away = weights - start
        return loss + RIDGE * float(away @ away), np.array(gradient) + 2 * RIDGE * away

    own, read = minimize(loss_and_gradient, start, jac=True, method="BFGS").x.tolist()
    return own, read

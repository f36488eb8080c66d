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

SUREST = 10.0  # log-probabilities that are read end there, so that no answer is out of the question
RIDGE = 1e-3  # towards a cache by itself: where every answer is right, nothing else would hold the weights


def blended(own_BC: Tensor, read_BC: Tensor, weights_2: Tensor) -> Tensor:
    """(B, C) logits of a cache from its own and from those that it reads."""
    return weights_2[0] * own_BC + weights_2[1] * read_BC.log_softmax(-1).clamp(min=-SUREST)


def fit_blend(own_NC: Tensor, read_NC: Tensor, answer_N: Tensor) -> Tensor:
    """(2,) the weights whose blend finds the backbone's answers most likely."""
    from scipy.optimize import minimize

    own_NC, read_NC = own_NC.double(), read_NC.double()

    def loss_and_gradient(weights: np.ndarray) -> tuple[float, np.ndarray]:
        weights_2 = torch.tensor(weights, requires_grad=True)
        loss = F.cross_entropy(blended(own_NC, read_NC, weights_2), answer_N)
        loss = loss + RIDGE * ((weights_2[0] - 1) ** 2 + weights_2[1] ** 2)
        (gradient_2,) = torch.autograd.grad(loss, weights_2)
        return loss.item(), gradient_2.numpy()

    return torch.from_numpy(minimize(loss_and_gradient, [1.0, 0.0], jac=True, method="BFGS").x).float()

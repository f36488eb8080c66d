"""How sure a cache is of its answer: (B, C) logits -> (B,) numbers in [0, 1].

What matters is ranking, not calibration: the score should tell the answers that agree with the backbone's from those
that do not ("EEFP", arXiv 2508.21495; Jazbec et al. 2024), measured by AUROC on the tuning inputs. Besides the three
classic scores there is a learned one, after GATI's selector (arXiv 2101.07344, section 4.2): a logistic model of
P(agree) over a few statistics of the cache's logits and of the logits that the cache reads.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from offramp.types import BoolArray, FloatArray


def max_softmax(logits_BC: Tensor) -> Tensor:
    """Largest class probability."""
    return logits_BC.softmax(-1).amax(-1)


def margin(logits_BC: Tensor) -> Tensor:
    """Largest minus second largest class probability."""
    top = logits_BC.softmax(-1).topk(min(2, logits_BC.shape[-1]), dim=-1).values
    return top[:, 0] - top[:, -1] if top.shape[1] > 1 else top[:, 0]


def entropy(logits_BC: Tensor) -> Tensor:
    """One minus the entropy of the class probabilities over its maximum log C (BranchyNet, arXiv 1709.01686)."""
    log_p = logits_BC.log_softmax(-1)
    return 1 + (log_p.exp() * log_p).sum(-1) / math.log(max(logits_BC.shape[-1], 2))


CONFIDENCES: dict[str, Callable[[Tensor], Tensor]] = {
    "max_softmax": max_softmax,
    "margin": margin,
    "entropy": entropy,
}


def statistics(logits_BC: Tensor, read_BC: Tensor | None) -> Tensor:
    """(B, 4) or, with the logits of an earlier cache, (B, 7): what the selector looks at."""
    log_p = logits_BC.log_softmax(-1)
    top = log_p.topk(min(2, log_p.shape[-1]), dim=-1)
    best, second = top.values[:, 0], top.values[:, -1]
    # log(1 - p) spreads out the confident end, where the decision is taken.
    doubt = torch.log1p(-best.exp().clamp(max=1 - 1e-6))
    columns = [best, doubt, best - second, entropy(logits_BC)]
    if read_BC is not None:
        read_log_p = read_BC.log_softmax(-1)
        answer = top.indices[:, :1]
        columns += [
            read_log_p.gather(1, answer).squeeze(1),
            torch.log1p(-read_log_p.amax(-1).exp().clamp(max=1 - 1e-6)),
            (read_BC.argmax(-1) == answer.squeeze(1)).to(log_p.dtype),
        ]
    return torch.stack(columns, dim=1)


class Selector(nn.Module):
    """P(agree) = sigmoid(w . standardised statistics + b). Hit or miss is decided on it alone."""

    mean: Tensor
    scale: Tensor
    weight: Tensor
    bias: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("scale", torch.ones(features))
        self.register_buffer("weight", torch.zeros(features))
        self.register_buffer("bias", torch.zeros(()))

    def forward(self, logits_BC: Tensor, read_BC: Tensor | None) -> Tensor:
        return self.score(statistics(logits_BC, read_BC))

    def score(self, x_BF: Tensor) -> Tensor:
        """(B,) P(agree) from these statistics, as `statistics` gives them."""
        return torch.sigmoid((x_BF - self.mean) / self.scale @ self.weight + self.bias)

    @classmethod
    def fitted(cls, x_NF: Tensor, agreement_N: Tensor, l2: float = 1e-2) -> Selector:
        """Ridge logistic regression by Newton's method on standardised columns; deterministic, a dozen steps."""
        x_NF, target_N = x_NF.double(), agreement_N.double()
        mean, scale = x_NF.mean(0), x_NF.std(0, correction=0).clamp(min=1e-6)
        design = torch.cat([(x_NF - mean) / scale, torch.ones(len(x_NF), 1, dtype=torch.float64)], dim=1)
        ridge = torch.full((design.shape[1],), l2 * len(design), dtype=torch.float64)
        ridge[-1] = 1e-6
        beta = torch.zeros(design.shape[1], dtype=torch.float64)
        for _ in range(25):
            p_N = torch.sigmoid(design @ beta)
            gradient = design.T @ (p_N - target_N) + ridge * beta
            hessian = (design.T * (p_N * (1 - p_N)).clamp(min=1e-6)) @ design + torch.diag(ridge)
            step = torch.linalg.solve(hessian, gradient)
            beta = beta - step.clamp(-4, 4)
            if step.abs().max() < 1e-8:
                break
        selector = cls(x_NF.shape[1])
        for name, value in (("mean", mean), ("scale", scale), ("weight", beta[:-1]), ("bias", beta[-1])):
            getattr(selector, name).copy_(value)
        return selector


def auroc(confidence_N: FloatArray, agreement_N: BoolArray) -> float:
    """Probability that an agreeing answer ranks above a disagreeing one; ties count half. NaN if one side is empty."""
    from scipy.stats import rankdata

    positives = int(np.sum(agreement_N))
    negatives = len(agreement_N) - positives
    if positives == 0 or negatives == 0:
        return float("nan")
    ranks = rankdata(confidence_N)
    return float((ranks[agreement_N].sum() - positives * (positives + 1) / 2) / (positives * negatives))

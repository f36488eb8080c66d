"""Fixtures that several test modules share."""

from __future__ import annotations

from collections.abc import Iterator

import models
import pytest
import torch

from offramp import choosing, fitting
from offramp.cost import flop_shares
from offramp.splitting import SplitModel, split


@pytest.fixture(scope="module")
def cnn() -> SplitModel:
    torch.manual_seed(0)
    return split(models.ResidualNet().eval(), models.images(4))


@pytest.fixture(scope="module")
def quick() -> Iterator[None]:
    """No copies, short measurements, and costs that do not depend on them: the code, not the saving."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("offramp.recording.ASKED_ROWS", 0)
        patched.setattr(fitting, "STAGES_S", 0.1)
        patched.setattr(fitting, "CACHES_S", 0.1)
        patched.setattr(choosing, "LATENCY_S", 0.05)
        patched.setattr(choosing, "shares", lambda costs, weight_flops: flop_shares(costs))
        patched.setattr(choosing, "never_slower", lambda plan, latency: plan)
        yield

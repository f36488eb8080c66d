"""BranchyNet: its branches, its grid against brute force, whole fits with and without labels, joint fine-tuning."""

from __future__ import annotations

import copy
import dataclasses
import itertools
from typing import Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from toys import images, labelled_batches, make_costs, make_records, slow_outcome, toy, traffic

from offramp.caches import CacheShape, LearnedCache
from offramp.choosing import Learned, choose
from offramp.distillation import Recipe
from offramp.errors import InputError, SplitError, StreamError
from offramp.fitting import fit, learn
from offramp.methods import branchynet
from offramp.methods.branchynet import BranchyNet, finetune_jointly
from offramp.placement import OFF
from offramp.recording import TUNE
from offramp.splitting import split
from offramp.streams import Batch

METHOD = BranchyNet(depths=(0.0, 0.9), convolutions=(2, 1), epochs=12, learning_rate=1e-2)
TRAFFIC = traffic(labelled_batches(300, 0), labelled_batches(500, 1))

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture(scope="module")
def learned(quick: None) -> Learned:
    return learn(toy(), method=METHOD, **TRAFFIC)


def shifted_batches() -> list[tuple[Tensor, Tensor]]:
    """Labels that the backbone gets wrong everywhere."""
    return [(x, (labels + 1) % 4) for x, labels in labelled_batches(300, 0)]


# --- the rule -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_the_published_rule_is_that_of_the_whole_grid(seed: int) -> None:
    """Every combination of thresholds on the entropy, walked through request by request."""
    grid = (0.05, 0.1, 0.2, 0.4)
    records, costs = make_records(40, 3, seed), make_costs(3, seed)
    plans = list(itertools.product(*[[OFF, *(float(np.float32(1 - share)) for share in grid)]] * 3))
    outcomes = [slow_outcome(records, plan, costs) for plan in plans]
    for tolerance in (0.02, 0.1, 0.25):
        found = BranchyNet(grid=grid).thresholds(records, costs, tolerance)
        assert found in plans
        cost, wrong = slow_outcome(records, found, costs)
        assert wrong <= tolerance
        assert cost == pytest.approx(min(cost for cost, wrong in outcomes if wrong <= tolerance))


def test_the_default_grid_is_as_fine_as_the_papers() -> None:
    grid = BranchyNet().grid
    assert 11 <= len(grid) <= 17
    assert list(grid) == sorted(grid)
    records, costs = make_records(50, 2, 0), make_costs(2, 0)
    records.agreement_NK[:] = True
    records.confidence_NK[:] = 0.0
    found = BranchyNet().thresholds(records, costs, 0.1)
    assert [threshold for threshold in found if threshold < OFF] == [0.0], "the loosest lets everything through"


# --- what is learned ----------------------------------------------------------------------------------


def test_branches_sit_where_they_should_and_decide_by_entropy(learned: Learned) -> None:
    first, second = (cast(LearnedCache, trained.cache) for trained in learned.trained)
    points = learned.candidates.split.points
    assert (first.point, second.point) == (points[1].name, points[3].name)
    assert first.shape == CacheShape("layers", convolutions=((32, 3, 1), (32, 3, 1)))
    assert second.shape == CacheShape("layers", hidden=(32,)), "a vector has no positions"
    assert {trained.cache.confidence_name for trained in learned.trained} == {"entropy"}
    recording, tune = learned.candidates.recording, learned.candidates.recording.index(TUNE)
    assert recording.label_N is not None
    for trained in learned.trained:
        assert (trained.on(tune).argmax(1).numpy() == recording.label_N[tune]).mean() > 0.85


def test_branches_learn_the_labels_and_not_the_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Labels that contradict the backbone everywhere. Augmented copies, of which it answers some, have none."""
    monkeypatch.setattr("offramp.recording.ASKED_ROWS", 600)
    method = dataclasses.replace(METHOD, depths=(0.0,), convolutions=(1,))
    learned = learn(toy(), method=method, **TRAFFIC | {"stream": shifted_batches()})
    recording, rows = learned.candidates.recording, learned.candidates.recording.index(TUNE)
    assert recording.counts()["augmented_copies"] == 600
    assert learned.trained[0].log.steps == method.epochs * 300 // 64
    answer_N = learned.trained[0].on(rows).argmax(1).numpy()
    assert ((answer_N - 1) % 4 == recording.logits_NC[rows].argmax(1)).mean() > 0.8


@pytest.mark.parametrize(
    ("depths", "expected"),
    [
        ((0.0, 0.3), [1]),  # nearest to both: one branch, that of the first
        ((0.8, 0.45), [2, 3]),
        ((), []),
    ],
)
def test_each_depth_gets_the_nearest_point(learned: Learned, depths: tuple[float, ...], expected: list[int]) -> None:
    method = BranchyNet(depths=depths, convolutions=tuple(range(2, 2 + len(depths))))
    branches = method.branches(learned.candidates.split)
    assert [point.position for point, _ in branches] == expected
    if expected == [1]:
        assert len(branches[0][1].convolutions) == 2


def test_as_many_convolutions_as_depths() -> None:
    with pytest.raises(InputError, match="1 depths and 2 numbers of convolutions"):
        BranchyNet(depths=(0.1,))


# --- whole fits ---------------------------------------------------------------------------------------


def test_fit_by_name_certifies(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(branchynet, "Recipe", lambda **given: Recipe(**given | {"rows": 640}))
    backbone = toy()
    cached = fit(backbone, method="branchynet", **TRAFFIC)
    assert cached.report()["fit"]["method"] == "branchynet"
    assert cached.certificate.bound <= 0.05
    assert cached.certificate.procedure.startswith("fixed-sequence")


def test_the_published_rule_makes_a_model(learned: Learned) -> None:
    cached = choose(learned, tolerance=0.05, confidence_level=0.95, rule="published")
    assert cached.certificate.procedure.startswith("measured only")
    assert cached.plan.caches
    grid = {float(np.float32(1 - share)) for share in METHOD.grid}
    assert all(planned.threshold in grid and planned.confidence == "entropy" for planned in cached.plan.caches)
    assert cached.plan.estimated_disagreement <= 0.05


def test_without_labels_it_is_refused_before_anything_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offramp.fitting.split", lambda *_: pytest.fail("the backbone was split"))
    unlabelled = list(images(300, 0).split(100))
    with pytest.raises(InputError, match="'branchynet' trains on labels, and the stream has none"):
        fit(toy(), method="branchynet", **TRAFFIC | {"stream": unlabelled})


def test_labels_in_one_of_two_streams_are_not_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("offramp.fitting.split", lambda *_: pytest.fail("the backbone was split"))
    unlabelled = list(images(500, 1).split(100))
    with pytest.raises(InputError, match="the certification stream has none"):
        fit(toy(), method="branchynet", **TRAFFIC | {"certify": unlabelled})


# --- joint fine-tuning --------------------------------------------------------------------------------


def everything(module: nn.Module) -> dict[str, Any]:
    state = {name: value.clone() for name, value in module.state_dict().items()}
    flags = [(value.requires_grad, value.grad) for value in module.parameters()]
    return {"state": state, "flags": flags, "modes": [part.training for part in module.modules()]}


def unchanged(before: dict[str, Any], after: dict[str, Any]) -> bool:
    same = all(torch.equal(value, after["state"][name]) for name, value in before["state"].items())
    return same and before["flags"] == after["flags"] and before["modes"] == after["modes"]


class Deep(nn.Module):
    """Its answers go through all of its weights; some are frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(
            *(nn.Sequential(nn.Conv2d(c, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()) for c in (1, 8, 8))
        )
        self.head = nn.Sequential(nn.Dropout(0.5), nn.Flatten(), nn.Linear(8 * 64, 4))
        self.blocks[0].requires_grad_(requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.blocks(x))
        return logits


def deep() -> nn.Module:
    torch.manual_seed(1)
    return Deep().eval()


def test_the_copy_learns_and_the_original_stays_bit_for_bit() -> None:
    backbone = deep()
    before, random = everything(backbone), torch.random.get_rng_state()
    tuned = finetune_jointly(backbone, shifted_batches(), METHOD, epochs=8, learning_rate=5e-3, progress=False)
    assert torch.equal(random, torch.random.get_rng_state())
    assert unchanged(before, everything(backbone))
    assert not any(module.training for module in tuned.modules())
    assert [value.requires_grad for value in tuned.parameters()] == [v.requires_grad for v in backbone.parameters()]
    assert all(value.grad is None for value in tuned.parameters())
    fresh, labels = (torch.cat(part) for part in zip(*labelled_batches(300, 5), strict=True))
    assert float((tuned(fresh).argmax(1) == (labels + 1) % 4).double().mean()) > 0.7
    theirs = dict(tuned.named_parameters())
    assert all(not torch.equal(value, theirs[name]) for name, value in backbone.named_parameters()), "frozen ones too"
    ours = dict(backbone.named_buffers())
    assert all(torch.equal(ours[name], value) for name, value in tuned.named_buffers()), "running statistics stay"
    split(tuned, fresh[:4])


def test_the_same_seed_gives_the_same_copy() -> None:
    def weights(seed: int) -> list[Tensor]:
        return list(finetune_jointly(deep(), shifted_batches(), epochs=1, seed=seed, progress=False).parameters())

    first, same, other = weights(0), weights(0), weights(1)
    assert all(torch.equal(a, b) for a, b in zip(first, same, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_the_loss_is_the_weighted_sum_over_all_exits() -> None:
    """One step's loss by hand: the branches' logits and the backbone's own, before the step."""
    (x, labels), *_ = shifted_batches()
    batch = Batch((x,), {}, labels)
    joint = branchynet._Joint(deep(), batch, METHOD, learning_rate=1e-3, seed=0)
    backbone = joint.split.backbone
    assert list(joint.branches) == [1, 3], "behind the first block and the last"
    with torch.no_grad():
        first = cast(nn.Sequential, backbone.blocks)[:1](x)
        last = cast(nn.Sequential, backbone.blocks)(x)
        logits = [joint.branches[1](first), joint.branches[3](last), backbone(x)]
        weighted = [weight * F.cross_entropy(one, labels) for weight, one in zip((1.0, 0.3, 0.3), logits, strict=True)]
    assert joint.step(batch) == pytest.approx(float(sum(weighted)), rel=1e-5)


def test_gradients_reach_the_backbone_through_its_branches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(branchynet, "OTHER_WEIGHT", 0.0)
    backbone = deep()
    tuned = finetune_jointly(backbone, shifted_batches(), METHOD, epochs=1, progress=False)
    changed = {
        name.split(".")[1] if "blocks" in name else "head"
        for (name, value), other in zip(backbone.named_parameters(), tuned.parameters(), strict=True)
        if not torch.equal(value, other)
    }
    assert changed == {"0"}, "the first branch sits behind the first block"


def test_gradients_are_not_rounded_to_half_precision() -> None:
    reduction = branchynet._Unrounded(2)
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    (1e-9 * reduction(x)).sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.full_like(x, 1e-9 / 4), rtol=1e-5, atol=0)


def test_a_fine_tuned_copy_can_be_fitted() -> None:
    tuned = finetune_jointly(toy(), labelled_batches(300, 0), METHOD, epochs=1, progress=False)
    cached = fit(tuned, method=dataclasses.replace(METHOD, rule="published"), **TRAFFIC)
    fresh = images(50, 7)
    assert cached(fresh).shape == tuned(fresh).shape


@pytest.mark.parametrize(
    ("stream", "error", "words"),
    [
        (list(images(20, 0).split(10)), InputError, "on labels, and the stream has none"),
        (iter(labelled_batches(100, 0)), InputError, "read only once, and 3 epochs read it 3 times"),
        ([(images(10, 0), torch.full((10,), 4))], InputError, "labels go from 4 to 4; expected .* 0 to 3"),
        ([], StreamError, "empty"),
    ],
)
def test_streams_that_cannot_be_fine_tuned_on(stream: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        finetune_jointly(toy(), stream, epochs=3, progress=False)


def test_backbones_that_cannot_be_fine_tuned() -> None:
    with pytest.raises(SplitError, match="train mode"):
        finetune_jointly(copy.deepcopy(toy()).train(), labelled_batches(100, 0), progress=False)
    flat = nn.Sequential(nn.Flatten(), nn.Linear(64, 4)).eval()
    with pytest.raises(InputError, match="Sequential has no split point behind its input"):
        finetune_jointly(flat, labelled_batches(100, 0), progress=False)
    with pytest.raises(InputError, match="Flatten has no parameters"):
        finetune_jointly(nn.Flatten().eval(), labelled_batches(100, 0), progress=False)

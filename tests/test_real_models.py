"""Real pretrained networks and real images, from ../shared: skipped, with the reason, where that folder is absent."""

from __future__ import annotations

import importlib.util
import io
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from offramp.caches import CacheShape, LearnedCache, reduction_for
from offramp.cost import measure, measure_caches
from offramp.model import CachedModel
from offramp.splitting import split
from offramp.tasks import Classification
from offramp.types import Certificate, Plan, PlannedCache

SHARED = Path(__file__).resolve().parents[2] / "shared"
ROWS = 24

pytestmark = [
    pytest.mark.slow,
    pytest.mark.shared,
    pytest.mark.skipif(not SHARED.exists(), reason="needs the data and models in ../shared"),
]


@pytest.fixture(scope="module")
def zoo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("zoo", SHARED / "models" / "zoo.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    """(ROWS, 3, 32, 32) uint8 of the CIFAR-10 test file."""
    parquet = pytest.importorskip("pyarrow.parquet")
    image = pytest.importorskip("PIL.Image")
    numpy = pytest.importorskip("numpy")
    cells = parquet.read_table(SHARED / "data" / "cifar10" / "test.parquet")["image"].slice(0, ROWS).to_pylist()
    arrays = [numpy.asarray(image.open(io.BytesIO(cell["bytes"])).convert("RGB")) for cell in cells]
    return torch.from_numpy(numpy.stack(arrays).transpose(0, 3, 1, 2).copy())


@pytest.mark.parametrize(
    ("builder", "side"), [("resnet18_cifar10", 32), ("resnet56_cifar100", 32), ("mobilenet_v2_imagenet", 128)]
)
def test_a_real_network_keeps_its_answers(zoo: ModuleType, pictures: Tensor, builder: str, side: int) -> None:
    """With caches that are looked up and never hit, and with a cache that takes some rows out of the batch."""
    backbone = getattr(zoo, builder)()
    x = torch.nn.functional.interpolate(zoo.normalize(pictures, "cifar10"), size=(side, side))
    parts = split(backbone, x[:4])
    point = parts.points[len(parts.points) // 2]
    torch.manual_seed(0)
    with torch.inference_mode():
        expected = backbone(x)
    reduction = reduction_for(point.shape, is_input=False)
    shape = CacheShape("mlp", 16)
    cache = LearnedCache("middle", point.name, shape, point.shape, expected.shape[1], reduction=reduction).eval()
    costs = measure_caches(measure(parts, batch_sizes=(1, 8), budget_s=0.5), parts, [cache], budget_s=0.2)

    def cached(threshold: float) -> CachedModel:
        plan = Plan((PlannedCache("middle", point.name, threshold, "max_softmax", 0.0),))
        certificate = Certificate(0.01, 0.95, 0, 0, 0.0, "none", 0, parts.fingerprint, "", "")
        return CachedModel(parts, [cache], plan, certificate, costs, task=Classification(), summary={})

    torch.testing.assert_close(cached(2.0)(x), expected, rtol=1e-3, atol=1e-3)
    sure = cached(0.0).predict(x).confidence_B
    some = cached(float(sure.median())).predict(x)
    stayed = some.left_at_B == 1
    assert 0 < int(stayed.sum()) < ROWS
    torch.testing.assert_close(some.output[stayed], expected[stayed], rtol=1e-3, atol=1e-3)

"""Back ends: one contract for all of them, and what is particular to each.

A runtime or a compiler that is not there skips its tests. Whatever runs a compiler is `slow`.
"""

from __future__ import annotations

import functools
import itertools
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from models import MaskedEncoder, ResidualNet
from torch import Tensor, nn

from offramp.backends import BACKENDS, Backend, Part, backend_named, check
from offramp.backends.base import Job
from offramp.backends.part import Program
from offramp.caches import CacheShape, LearnedCache, Reduction
from offramp.errors import BackendError, InputError
from offramp.splitting import split

COMPILERS = ("compile", "aotinductor")
NAMES = [pytest.param(name, marks=pytest.mark.slow if name in COMPILERS else ()) for name in BACKENDS]
INT8 = [name for name, backend in BACKENDS.items() if "int8" in backend.precisions]
HALF = [
    pytest.param(name, marks=pytest.mark.slow if name in COMPILERS else ())
    for name, backend in BACKENDS.items()
    if "bfloat16" in backend.precisions
]


def usable(name: str) -> Backend:
    backend = backend_named(name)
    if missing := backend.missing():
        pytest.skip(f"{name}: {missing}")
    return backend


class Mixed(nn.Module):
    """All that a part may meet: token ids, a mask and a spare value that are handed through, an image, and outputs of
    several types, one of them twice and one a view."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.linear, self.convolution = nn.Embedding(20, 8), nn.Linear(8, 3), nn.Conv2d(2, 3, 3)

    def forward(self, ids: Tensor, mask: Tensor, image: Tensor, spare: Tensor) -> tuple[Tensor, ...]:
        words = self.embedding(ids).masked_fill(~mask[:, 0, :, None], 0.0).sum(1)
        logits = self.linear(words) + self.convolution(torch.relu(image)).mean((2, 3))
        return mask, logits, logits.argmax(-1), logits, spare, image.flatten(1)


def mixed_inputs(rows: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 20, (rows, 5), generator=generator)
    mask = torch.rand(rows, 1, 5, generator=generator) > 0.3
    image = torch.randn(rows, 2, 6, 4, generator=generator)
    return ids, mask, image, torch.randn(rows, 7, generator=generator)


def mixed() -> Mixed:
    torch.manual_seed(0)
    return Mixed().eval().requires_grad_(requires_grad=False)


@pytest.fixture(scope="module", params=NAMES)
def part(request: pytest.FixtureRequest) -> Iterator[Part]:
    """`mixed` on one back end after the other."""
    backend = usable(request.param)
    built = backend.build(mixed(), mixed_inputs(3))
    yield built
    built.close()


def tensors(output: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (output,) if isinstance(output, Tensor) else output


# --- the contract -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [0, 1, 2, 3, 8, 33])
def test_any_number_of_rows_gets_the_modules_own_answer(part: Part, rows: int) -> None:
    inputs = mixed_inputs(rows, seed=rows)
    difference = check(part, mixed(), [inputs])
    assert difference.within, difference
    for one, other in zip(tensors(part(*inputs)), mixed()(*inputs), strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)


def test_any_layout_in_memory_is_taken(part: Part) -> None:
    ids, mask, image, spare = mixed_inputs(8)
    layouts = [
        tuple(tensor[::2] for tensor in (ids, mask, image, spare)),
        (ids.T.contiguous().T, mask, image.contiguous(memory_format=torch.channels_last), spare),
        (ids, mask, image.transpose(2, 3).contiguous().transpose(2, 3), spare),
        (ids, mask[:1].expand(8, 1, 5), image[:1].expand(8, 2, 6, 4), spare[:, :1].expand(8, 7)),
    ]
    difference = check(part, mixed(), layouts)
    assert difference.within, difference


def test_what_is_handed_through_comes_back_as_it_is(part: Part) -> None:
    inputs = mixed_inputs(4)
    outputs = tensors(part(*inputs))
    assert outputs[0] is inputs[1]
    assert outputs[4] is inputs[3]
    assert outputs[1] is outputs[3]


def test_a_later_call_leaves_earlier_outputs_and_all_inputs_alone(part: Part) -> None:
    first = mixed_inputs(4)
    before = [tensor.clone() for tensor in first]
    outputs = tensors(part(*first))
    copies = [tensor.clone() for tensor in outputs]
    for rows in (4, 9, 2, 4):
        part(*mixed_inputs(rows, seed=1))
    assert all(torch.equal(one, other) for one, other in zip(outputs, copies, strict=True))
    assert all(torch.equal(one, other) for one, other in zip(first, before, strict=True))


def test_gradients_and_inference_mode_change_nothing(part: Part) -> None:
    ids, mask, image, spare = mixed_inputs(4)
    logits = tensors(part(ids, mask, image.requires_grad_(), spare))[1]
    assert not logits.requires_grad
    with torch.inference_mode():
        inside = tensors(part(ids.clone(), mask.clone(), image.clone(), spare))[1]
        assert torch.equal(inside, logits)


def test_threads_may_call_at_the_same_time(part: Part) -> None:
    inputs = [mixed_inputs(4, seed=seed) for seed in range(4)]
    expected = [tensors(part(*given))[1] for given in inputs]
    wrong: list[int] = []

    def work(number: int) -> None:
        outputs = [tensors(part(*inputs[number]))[1] for _ in range(20)]
        wrong.extend(number for output in outputs if not torch.allclose(output, expected[number], atol=1e-5))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_inputs_that_do_not_fit_are_refused(part: Part) -> None:
    ids, mask, image, spare = mixed_inputs(2)
    for wrong in (
        (ids, mask, image),
        (ids.float(), mask, image, spare),
        (ids, mask, image[:, :, :5], spare),
        (ids, mask, image, spare[:1]),
        (ids, mask, image, spare[0, 0]),
    ):
        with pytest.raises(InputError, match=r"was built for \('batch', 5\) int64, .* on cpu; received "):
            part(*wrong)


def test_a_part_says_what_it_is_and_costs(part: Part) -> None:
    assert part.bytes > 0
    assert part.build_s > 0
    assert (part.precision, part.static_rows) == ("float32", None)
    assert repr(part).startswith(f"Part({part.backend}, float32, any number of rows of ('batch', 5) int64, ")


@pytest.mark.parametrize("name", NAMES)
def test_a_fixed_number_of_rows(name: str) -> None:
    backend = usable(name)
    net = nn.Sequential(nn.Linear(4, 3), nn.ReLU()).eval()
    part = backend.build(net, (torch.randn(5, 4),), static_rows=1)
    assert isinstance(part(torch.randn(1, 4)), Tensor), "of the module's own form"
    assert check(part, net, [(torch.randn(1, 4),)]).within
    with pytest.raises(InputError, match="built for exactly 1 rows; received 2"):
        part(torch.randn(2, 4))
    part.close()
    with pytest.raises(InputError, match="was closed; build it again"):
        part(torch.randn(1, 4))


@pytest.mark.parametrize("name", HALF)
def test_bfloat16_gives_the_modules_own_types(name: str) -> None:
    backend = usable(name)
    module, inputs = mixed(), mixed_inputs(8)
    part = backend.build(module, inputs, precision="bfloat16")
    outputs, expected = tensors(part(*inputs)), module(*inputs)
    assert [tensor.dtype for tensor in outputs] == [tensor.dtype for tensor in expected]
    assert torch.allclose(outputs[1], expected[1], atol=5e-2)
    assert not torch.equal(outputs[1], expected[1]), "it computed in float32"


# --- the package --------------------------------------------------------------------------------------------


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(InputError, match=r"unknown backend 'tvm'; known: eager, compile, aotinductor, onnxruntime"):
        backend_named("tvm")
    with pytest.raises(InputError, match=r"eager knows no precision 'int4'; known: float32, bfloat16"):
        BACKENDS["eager"].build(mixed(), mixed_inputs(2), precision="int4")


def test_nothing_is_imported_before_it_is_used() -> None:
    code = (
        "import sys, offramp.backends\n"
        "runtimes = {'onnxruntime', 'onnx', 'onnxscript', 'openvino', 'nncf', 'torch._inductor'} & set(sys.modules)\n"
        "[backend.missing() for backend in offramp.backends.BACKENDS.values()]\n"
        "assert not runtimes, runtimes\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=300)


@pytest.mark.parametrize(("name", "extra"), [("onnxruntime", "onnxruntime"), ("openvino", "openvino")])
def test_a_missing_runtime_says_what_to_install(name: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda module: None)
    assert str(BACKENDS[name].missing()).endswith(f"not installed; run: pip install 'offramp[{extra}]'")
    with pytest.raises(BackendError, match=f"{name} cannot be used here: .* not installed"):
        BACKENDS[name].build(mixed(), mixed_inputs(2))


@pytest.mark.parametrize("name", COMPILERS)
def test_a_missing_compiler_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert "no C++ compiler found (no-such-compiler)" in str(BACKENDS[name].missing())


class Failing(Backend):
    name = "failing"

    def missing(self) -> None:
        return None

    def program(self, job: Job) -> Program:
        raise RuntimeError("Check 'false' failed:\n\n  no such operator")


class Wrong(Failing):
    stored_bytes = 0

    def program(self, job: Job) -> Program:
        return self

    def __call__(self, inputs: Sequence[Tensor], /) -> Sequence[Tensor]:
        return [inputs[0].double()]


def test_what_fails_to_build_says_what_was_tried() -> None:
    net, example = nn.Linear(4, 3).eval(), (torch.randn(2, 4),)
    with pytest.raises(
        BackendError,
        match=r"failing cannot run Linear in float32; tried it for any number of rows of \('batch', 4\) float32: "
        r"RuntimeError: Check 'false' failed: no such operator\. Take another",
    ):
        Failing().build(net, example)
    with pytest.raises(
        BackendError, match=r"it gives \(1, 4\) torch.float64 where \('batch', 3\) float32 was expected"
    ):
        Wrong().build(net, example)


class InPlace(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.relu_()


class Listed(nn.Module):
    def forward(self, x: Tensor) -> list[Tensor]:
        return [x]


class Summed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.sum(0)


@pytest.mark.parametrize(
    ("module", "rows", "message"),
    [
        (nn.Linear(4, 3).train(), 2, r"in train mode \(the part itself\)"),
        (nn.Linear(4, 3).eval(), 0, r"tensors of shapes \[\(0, 4\)\]; expected the same rows"),
        (InPlace().eval(), 2, "changes its inputs in place"),
        (Listed().eval(), 2, "returns a list; expected a tensor or a tuple"),
        (Summed().eval(), 2, r"shapes \[\(4,\)\] for 2 rows"),
    ],
)
def test_modules_of_another_form_are_refused(module: nn.Module, rows: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        BACKENDS["eager"].build(module, (torch.randn(rows, 4),))


def test_a_module_that_only_hands_through_needs_no_runtime() -> None:
    part = Failing().build(nn.Identity().eval(), (torch.randn(2, 4),))
    x = torch.randn(3, 4)
    assert part(x) is x


def test_eager_shares_the_weights_and_casts_them_once() -> None:
    module, inputs = mixed(), mixed_inputs(8)
    exact, half = (BACKENDS["eager"].build(module, inputs, precision=p) for p in ("float32", "bfloat16"))
    with torch.autocast("cpu", torch.bfloat16):
        expected = module(*inputs)
    assert torch.equal(tensors(half(*inputs))[1], expected[1].float())
    cast = [*module.linear.parameters(), *module.convolution.parameters()]
    assert exact.bytes - half.bytes == 2 * sum(parameter.numel() for parameter in cast)
    with torch.no_grad():
        module.linear.bias.add_(1)
    assert torch.equal(tensors(exact(*inputs))[1], module(*inputs)[1])


# --- the difference -----------------------------------------------------------------------------------------


class Returns(nn.Module):
    def __init__(self, *outputs: Tensor) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(output + 0 * x[:, :1].to(output.dtype) for output in self.outputs)


@pytest.mark.parametrize(
    ("received", "expected", "absolute", "relative", "within"),
    [
        ([1.0, 200.0], [1.0, 200.01], 0.01, 0.01 / 200.01, True),
        ([1.0, 200.0], [1.03, 200.0], 0.03, 0.03 / 200, False),
        ([float("-inf"), 1.0], [float("-inf"), 1.0], 0.0, 0.0, True),
        ([float("nan"), 1.0], [float("nan"), 1.0], 0.0, 0.0, True),
        ([float("nan"), 1.0], [0.0, 1.0], float("inf"), float("inf"), False),
        ([1.0, 2.0], [float("inf"), 2.0], float("inf"), float("inf"), False),
        ([3, 4], [3, 5], 1.0, 1 / 5, False),
    ],
)
def test_the_difference(
    received: list[float], expected: list[float], absolute: float, relative: float, within: bool
) -> None:
    x = torch.ones(1, 2)
    part = BACKENDS["eager"].build(Returns(torch.tensor([received])).eval(), (x,))
    difference = check(part, Returns(torch.tensor([expected])).eval(), [(x,)])
    assert difference.absolute == pytest.approx(absolute, rel=1e-3)
    assert difference.relative == pytest.approx(relative, rel=1e-3)
    assert difference.within is within


def test_the_difference_is_the_largest_of_all_inputs_and_needs_some() -> None:
    linear, other = (nn.Linear(4, 3).eval().requires_grad_(requires_grad=False) for _ in range(2))
    part = BACKENDS["eager"].build(linear, (torch.randn(2, 4),))
    difference = check(part, other, [(torch.zeros(1, 4),), (torch.ones(1, 4) * 100,)])
    largest = (linear(torch.ones(4) * 100) - other(torch.ones(4) * 100)).abs().max()
    assert difference.absolute == pytest.approx(float(largest), rel=1e-4)
    with pytest.raises(InputError, match="at least one tuple"):
        check(part, linear, [])


# --- stages and caches --------------------------------------------------------------------------------------


def stages(net: nn.Module, *example: Tensor) -> list[tuple[nn.Module, tuple[Tensor, ...]]]:
    """The stages of a backbone with their live values."""
    cut = split(net.eval(), example)
    live, found = cut.flatten(cut.example), []
    for stage in cut.stages:
        found.append((stage, live))
        live = stage(*live)
    return found


@functools.cache
def parts_to_try() -> dict[str, tuple[nn.Module, tuple[Tensor, ...]]]:
    torch.manual_seed(0)
    image, ids = torch.randn(4, 3, 16, 16), torch.randint(0, 50, (4, 7))
    mask = (torch.arange(7) < torch.tensor([[7], [5], [6], [3]])).long()
    residual, encoder = stages(ResidualNet(), image), stages(MaskedEncoder(), ids, mask)
    found = {"first of residual": residual[0], "third of residual": residual[3], "last of residual": residual[-1]}
    found |= {"first of encoder": encoder[0], "second of encoder": encoder[1], "last of encoder": encoder[-1]}
    shapes = (CacheShape("mlp", 16), Reduction(8)), (CacheShape("student", 16), Reduction())
    for (shape, reduction), reads in itertools.product(shapes, (None, "a")):
        cache = LearnedCache("b", "input", shape, (3, 16, 16), 5, reduction=reduction, reads=reads).eval()
        cache.blend = (0.8, 0.6)
        found[f"{shape.kind} that reads {reads}"] = cache, (image, torch.randn(4, 5)) if reads else (image,)
    words = LearnedCache("c", "input", CacheShape("transformer", 32), (7,), 5, reduction=Reduction(), vocabulary=50)
    found["transformer on token ids"] = words.eval(), (ids,)
    return found


TRIED = [f"{which} of residual" for which in ("first", "third", "last")]
TRIED += [f"{which} of encoder" for which in ("first", "second", "last")]
TRIED += [f"{kind} that reads {reads}" for kind in ("mlp", "student") for reads in (None, "a")]
TRIED += ["transformer on token ids"]
SOME = ["third of residual", "second of encoder", "mlp that reads a", "student that reads None"]


class Behind(nn.Module):
    """A cache behind its reduction."""

    def __init__(self, cache: LearnedCache) -> None:
        super().__init__()
        self.cache = cache.eval()
        self.training = False

    def forward(self, feature: Tensor, *read_BC: Tensor) -> Tensor:
        return self.cache.from_feature(feature, *read_BC)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "tried"),
    # A library takes half a minute to compile, from the graph that "compile" starts from.
    [(name, tried) for name in BACKENDS for tried in (SOME if name == "aotinductor" else TRIED)],
)
def test_stages_and_caches_are_exact_in_float32(name: str, tried: str) -> None:
    backend = usable(name)
    module, live = parts_to_try()[tried]
    if name == "openvino" and isinstance(module, LearnedCache):  # it would leave the rounding of the reduction out
        live = (module.reduction(live[0]), *live[1:])
        module = Behind(module)
    part = backend.build(module, live)
    inputs = [tuple(torch.cat([tensor] * 3)[:rows] for tensor in live) for rows in (1, 2, 4, 11)]
    difference = check(part, module, inputs)
    assert difference.within, difference


@pytest.mark.slow
@pytest.mark.parametrize("tried", SOME)
@pytest.mark.parametrize("name", INT8)
def test_stages_and_caches_are_near_in_int8(name: str, tried: str) -> None:
    backend = usable(name)
    module, live = parts_to_try()[tried]
    calibration = [tuple(tensor.roll(shift, 0) for tensor in live) for shift in range(4)]
    part = backend.build(module, live, precision="int8", calibration=calibration)
    difference = check(part, module, [live])
    assert 0 < difference.relative < 0.2, difference
    fixed = backend.build(module, live, precision="int8", static_rows=2, calibration=calibration)
    assert check(fixed, module, [tuple(tensor[:2] for tensor in live)]).relative < 0.2
    if "encoder" not in tried:
        with pytest.raises(InputError, match="int8 is calibrated on inputs of the part, and there are none of 1"):
            backend.build(module, live, precision="int8")


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILERS)
def test_two_parts_of_one_kind_do_not_share_a_program(name: str) -> None:
    backend = usable(name)
    torch.manual_seed(0)
    nets, example = [nn.Linear(4, 3).eval() for _ in range(2)], (torch.randn(2, 4),)
    parts = [backend.build(net, example) for net in nets]
    torch._dynamo.reset()
    assert all(check(part, net, [example]).within for part, net in zip(parts, nets, strict=True))
    assert not check(parts[0], nets[1], [example]).within


@pytest.mark.slow
def test_a_library_leaves_no_files_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend = usable("aotinductor")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))  # meant to stay: the compiler's own cache
    part = backend.build(nn.Linear(4, 3).eval(), (torch.randn(2, 4),))
    part.close()
    assert {path.name for path in tmp_path.iterdir()} <= {"cache"}


# --- side effects -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_building_says_nothing_and_leaves_logging_alone(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    backend = usable(name)
    root = logging.getLogger()
    before = (list(root.handlers), list(root.filters), root.level, logging.getLoggerClass())
    net, example = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU()).eval(), (torch.randn(2, 2, 5, 5),)
    backend.build(net, example, precision="int8", calibration=[example])
    assert (list(root.handlers), list(root.filters), root.level, logging.getLoggerClass()) == before
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["onnxruntime", "openvino"])
def test_nothing_is_reported_to_the_makers_of_a_runtime(name: str, tmp_path: Path) -> None:
    """Their telemetry begins with files in the user's home."""
    usable(name)
    code = (
        "import torch\nfrom torch import nn\nfrom offramp.backends import BACKENDS\n"
        "net, example = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU()).eval(), (torch.randn(2, 2, 5, 5),)\n"
        f"BACKENDS[{name!r}].build(net, example, precision='int8', calibration=[example])\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "CI"} | {"HOME": str(tmp_path)}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=600, env=environment)
    assert list(tmp_path.rglob("*")) == []

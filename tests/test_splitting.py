"""Splitting: every kind of backbone is cut into stages that give its own answers, or refused with the reason."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import models
import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim
from torch.utils import _pytree as pytree

from offramp.errors import InputError, OfframpError, SplitError
from offramp.graph import friendly_name
from offramp.splitting import SplitModel, fingerprint, prove, split
from offramp.streams import Batch, as_batch
from offramp.torchvision_shim import import_torchvision


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def images(rows: int = 6) -> Tensor:
    return torch.randn(rows, 3, 16, 16)


def sentences(rows: int = 6, length: int = 9) -> dict[str, Tensor]:
    """Token ids with a mask that differs from row to row."""
    lengths = torch.randint(2, length + 1, (rows, 1))
    mask = (torch.arange(length) < lengths).long()
    return {"input_ids": torch.randint(1, 50, (rows, length)), "attention_mask": mask}


def randomised(model: nn.Module) -> nn.Module:
    """In eval mode, with batch statistics that are not the initial ones."""
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_()
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
    return model.eval()


def names(model: SplitModel) -> list[str]:
    return [point.name for point in model.points]


def tensors_of(output: object) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def check_stages(model: SplitModel, raw: object) -> None:
    """On fresh inputs: any number of rows, every other row dropped at every point, a single row from there on."""
    batch = as_batch(raw, model.backbone)
    with torch.inference_mode():
        for rows in (len(batch), 5, 1):
            part = batch.rows(slice(0, rows))
            expected = tensors_of(model.backbone(*part.args, **part.kwargs))
            received = tensors_of(model.run(part))
            assert len(received) == len(expected)
            torch.testing.assert_close(received, expected)
        full = tensors_of(model.run(batch))
        for position in range(1, len(model.points)):
            kept = torch.arange(len(batch))
            live = model.flatten(batch)
            for number, stage in enumerate(model.stages):
                if number == position:
                    kept = kept[::2]
                    live = tuple(value.index_select(0, kept) for value in live)
                live = stage(*live)
            torch.testing.assert_close(list(live), [leaf[kept] for leaf in full])


# --- what can be split -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "raw", "expected"),
    [
        (models.PlainCNN, images(), ["input", "features.1", "features.5", "features.7"]),
        (models.ResidualNet, images(), ["input", "stem", "layers.0", "layers.1", "layers.2"]),
        (models.mlp, torch.randn(6, 6), ["input", "1", "3"]),
        (models.MaskedEncoder, sentences(), ["input", "layers.0", "layers.1"]),
    ],
    ids=["plain-cnn", "residual-net", "mlp", "masked-encoder"],
)
def test_split_points_have_the_names_a_person_knows(
    make: Callable[[], nn.Module], raw: object, expected: list[str]
) -> None:
    model = split(randomised(make()), raw)
    assert model.method == "export"
    assert names(model) == expected
    check_stages(model, raw)


def test_points_describe_what_crosses_them() -> None:
    model = split(randomised(models.MaskedEncoder()), sentences())
    assert [point.position for point in model.points] == list(range(len(model.stages)))
    first = model.points[names(model).index("layers.0")]
    assert first.shape == (10, 16)
    assert first.dtype == torch.float32
    assert sorted(first.live_shapes) == [(1, 10, 10), (10, 16)], "the hidden state and the mask"
    assert first.live_bytes == 4 * 10 * 16 + 10 * 10, "float32 activation and one byte per mask entry"
    depths = [point.depth for point in model.points]
    assert depths[0] == 0
    assert depths == sorted(depths)
    assert depths[-1] < 0.98


def test_activation_is_the_boundary_module_output() -> None:
    backbone = randomised(models.MaskedEncoder())
    seen: list[Tensor] = []
    backbone.get_submodule("layers.1").register_forward_hook(lambda _m, _a, output: seen.append(output))
    raw = sentences()
    model = split(backbone, raw)
    seen.clear()
    backbone(**raw)
    live = model.flatten(as_batch(raw))
    assert torch.equal(model.activation(0, live), raw["input_ids"])
    position = names(model).index("layers.1")
    for stage in model.stages[:position]:
        live = stage(*live)
    torch.testing.assert_close(model.activation(position, live), seen[0])


def test_min_share_thins_the_points_out() -> None:
    backbone = randomised(models.ResidualNet())
    depths = [point.depth for point in split(backbone, images(), min_share=0.2).points]
    assert all(later - earlier >= 0.2 for earlier, later in pairwise(depths)), depths
    with pytest.raises(InputError, match="min_share"):
        split(backbone, images(), min_share=1.5)


def test_points_given_by_the_user_are_used() -> None:
    backbone = randomised(models.ResidualNet())
    model = split(backbone, images(), points=["layers.2", "stem"])
    assert names(model) == ["input", "stem", "layers.2"]
    with pytest.raises(InputError, match=r"no module named 'layer.9'.*layers\.2"):
        split(backbone, images(), points=["layer.9"])


def test_activations_changed_in_place_are_not_changed_for_the_caller() -> None:
    backbone = models.WritesInPlace().eval()
    raw = torch.randn(6, 6)
    before = raw.clone()
    model = split(backbone, raw, points=["blocks.0", "blocks.1", "blocks.2"])
    assert torch.equal(raw, before), "split() changed the example"
    live: tuple[Tensor, ...] = model.flatten(as_batch(raw))
    with torch.inference_mode():
        for stage in model.stages:
            held = [value.clone() for value in live]
            following = stage(*live)
            assert all(map(torch.equal, held, live)), "a stage changed the live values that were passed to it"
            live = following
        torch.testing.assert_close(live[0], backbone(before.clone()))


@pytest.mark.parametrize("rows", [1, 2, 3, 9])
def test_any_number_of_example_rows_will_do(rows: int) -> None:
    model = split(randomised(models.ResidualNet()), images(rows))
    assert 2 <= len(model.example) <= 4
    assert len(model.points) > 3
    check_stages(model, images(7))


def test_splitting_inside_inference_mode_works() -> None:
    with torch.inference_mode():
        model = split(randomised(models.PlainCNN()), images())
        assert len(model.points) == 4
        check_stages(model, images())


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.first = nn.Embedding(20, 8), nn.LSTM(8, 8, batch_first=True)
        self.second, self.head = nn.LSTM(8, 8, batch_first=True), nn.Linear(8, 3)

    def forward(self, ids: Tensor) -> Tensor:
        hidden = self.second(self.first(self.tokens(ids))[0])[0]
        logits: Tensor = self.head(hidden[:, -1])
        return logits


def test_lstms_are_counted_and_cut() -> None:
    raw = torch.randint(0, 20, (6, 7))
    model = split(Recurrent().eval(), raw)
    assert names(model)[:2] == ["input", "first"]
    assert model.points[1].depth == pytest.approx(0.5, abs=0.02)
    check_stages(model, raw)


class Folds(nn.Module):
    """Folds a dimension into the batch: between the folds there is nothing but places where one cannot cut."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        folded = self.first(x.reshape(-1, 6))
        logits: Tensor = self.second(folded).reshape(x.shape[0], -1)
        return logits


def test_a_value_that_a_point_cannot_carry_is_named() -> None:
    raw = torch.randn(4, 2, 6)
    assert names(split(Folds().eval(), raw)) == ["input"], "no legal place: only the input is left"
    with pytest.raises(SplitError, match=r"cannot cut behind `first`.*its rows are not the batch's"):
        split(Folds().eval(), raw, points=["first"])


def test_nothing_is_printed_when_tracing_fails(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SplitError):
        split(models.Branches().eval(), torch.randn(4, 6))
    assert capsys.readouterr().out == "", "stdout belongs to the caller"


def test_channels_last_inputs_run() -> None:
    backbone = randomised(models.PlainCNN())
    model = split(backbone, images())
    batch = as_batch(images(4).contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(model.run(batch), backbone(*batch.args))


def test_arguments_may_be_passed_by_name_or_position() -> None:
    raw = sentences()
    model = split(randomised(models.MaskedEncoder()), raw)
    by_position = Batch((raw["input_ids"], raw["attention_mask"]))
    other_order = Batch((), {"attention_mask": raw["attention_mask"], "input_ids": raw["input_ids"]})
    assert torch.equal(model.run(by_position), model.run(as_batch(raw)))
    assert torch.equal(model.run(other_order), model.run(as_batch(raw)))


def test_a_batch_is_brought_into_the_form_of_the_example() -> None:
    fresh = sentences(3)
    for raw in (sentences(), tuple(sentences().values())):
        model = split(randomised(models.MaskedEncoder()), raw)
        for batch in (Batch(tuple(fresh.values())), Batch((), dict(reversed(fresh.items())))):
            formed = model.like_example(batch)
            assert (len(formed.args), list(formed.kwargs)) == (len(model.example.args), list(model.example.kwargs))
            assert all(map(torch.equal, formed.tensors, fresh.values()))
        with pytest.raises(InputError, match="expected"):
            model.like_example(Batch((fresh["input_ids"].float(), fresh["attention_mask"])))


@dataclasses.dataclass
class Opaque:
    value: Tensor


@pytest.mark.parametrize(
    "form",
    [
        lambda logits, _features: logits,
        lambda logits, features: (logits, features),
        lambda logits, features: [features, logits, None, "note"],
        lambda logits, features: {"logits": logits, "all": (features, None)},
        models.Named,
    ],
    ids=["tensor", "tuple", "list-with-constants", "nested-dict", "named-tuple"],
)
def test_the_output_type_is_restored(form: Callable[[Tensor, Tensor], object]) -> None:
    backbone = models.Wrapped(form).eval()
    model = split(backbone, torch.randn(5, 6))
    raw = torch.randn(7, 6)
    expected, received = backbone(raw), model.run(as_batch(raw))
    assert type(received) is type(expected)
    assert pytree.tree_structure(received) == pytree.tree_structure(expected)
    check_stages(model, raw)


def test_an_output_without_tensors_is_refused() -> None:
    with pytest.raises(SplitError, match="returns a Opaque in which no tensors"):
        split(models.Wrapped(lambda logits, _: Opaque(logits)).eval(), torch.randn(4, 6))


def test_an_output_that_is_not_one_answer_per_row_is_refused() -> None:
    with pytest.raises(SplitError, match="one answer per row"):
        split(models.Wrapped(lambda logits, _: (logits, logits.mean())).eval(), torch.randn(4, 6))


# --- the backbone is shared and untouched ----------------------------------------------------------------------


def test_parameters_are_shared_never_copied() -> None:
    backbone = randomised(models.ResidualNet())
    model = split(backbone, images())
    own = {tensor.data_ptr() for tensor in (*backbone.parameters(), *backbone.buffers())}
    used = [tensor for stage in model.stages for tensor in (*stage.parameters(), *stage.buffers())]
    assert {tensor.data_ptr() for tensor in used} <= own
    assert len({id(parameter) for parameter in used}) >= len(list(backbone.parameters()))
    with torch.no_grad():
        backbone.get_parameter("head.weight").zero_()
    assert model.run(as_batch(images())).std(0).max() < 1e-6, "a change of the backbone must reach the stages"


def state(backbone: nn.Module) -> tuple[Any, ...]:
    tensors = {**dict(backbone.named_parameters()), **dict(backbone.named_buffers())}
    return (
        {name: (id(tensor), tensor.clone(), tensor.requires_grad) for name, tensor in tensors.items()},
        [part.training for part in backbone.modules()],
        [(len(part._forward_hooks), len(part._forward_pre_hooks)) for part in backbone.modules()],
        [sorted(vars(part)) for part in backbone.modules()],
        torch.get_rng_state(),
    )


@pytest.mark.parametrize(
    ("make", "raw"),
    [
        (models.ResidualNet, images()),
        (models.Branches, torch.randn(4, 6)),
        (models.MixesRows, torch.randn(4, 6)),
        (models.NoisyDropout, torch.randn(4, 6)),
        (models.CountsCalls, torch.randn(4, 6)),
    ],
    ids=["split", "untraceable", "mixes-rows", "random", "changes-buffers"],
)
def test_the_backbone_is_the_same_before_and_after(make: Callable[[], nn.Module], raw: Tensor) -> None:
    backbone = randomised(make())
    backbone.register_forward_hook(lambda *_: None)
    before = state(backbone)
    try:
        split(backbone, raw)
    except SplitError:
        assert make is not models.ResidualNet
    after = state(backbone)
    for name, (identity, value, grad) in before[0].items():
        assert after[0][name][0] == identity, f"{name} was replaced"
        assert torch.equal(after[0][name][1], value), f"{name} was changed"
        assert after[0][name][2] == grad
    assert all(map(lambda a, b: bool((a == b).all()) if isinstance(a, Tensor) else a == b, before[1:], after[1:]))


def test_fingerprints_tell_weights_and_models_apart() -> None:
    backbone = randomised(models.PlainCNN())
    same, other = copy.deepcopy(backbone), copy.deepcopy(backbone)
    with torch.no_grad():
        other.get_parameter("head.bias")[0] += 1e-3
    assert split(backbone, images()).fingerprint == split(same, images(2)).fingerprint
    assert split(backbone, images()).fingerprint != split(other, images()).fingerprint
    assert re.fullmatch("[0-9a-f]{64}", fingerprint(backbone))
    assert fingerprint(backbone) != fingerprint(randomised(models.mlp()))


def test_fingerprint_takes_every_type_of_tensor() -> None:
    module = nn.Module()
    module.register_buffer("halves", torch.zeros(3, dtype=torch.bfloat16))
    module.register_buffer("flag", torch.tensor(True))
    module.register_buffer("empty", torch.zeros(0))
    assert len(fingerprint(module)) == 64


# --- the ladder ------------------------------------------------------------------------------------------------


@torch.library.custom_op("offramp_tests::twice", mutates_args=())
def twice(x: Tensor) -> Tensor:
    """An operation that torch.export cannot follow: it says nothing about the shape of its result."""
    return x * 2


class UsesCustomOp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        x = self.relu(twice(self.first(x)))
        rows = x.shape[0]
        x = self.relu(self.second(x).reshape(rows, 2, x.size(1) // 2)).flatten(1)
        logits: Tensor = self.third(x)
        return logits if scale is None else logits * scale


def test_fx_serves_where_export_fails() -> None:
    model = split(UsesCustomOp().eval(), torch.randn(4, 6))
    assert model.method == "fx"
    assert "relu" in names(model) or "second" in names(model), names(model)
    check_stages(model, torch.randn(6, 6))


def test_strict_export_serves_where_the_simple_way_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    export = torch.export.export

    def no_simple_export(*args: Any, strict: bool, **kwargs: Any) -> Any:
        if not strict:
            raise RuntimeError("planted")
        return export(*args, strict=True, **kwargs)

    monkeypatch.setattr(torch.export, "export", no_simple_export)
    model = split(randomised(models.MaskedEncoder()), sentences())
    assert model.method == "export-strict"
    assert "layers.1" in names(model), "strict export must give the same names"
    check_stages(model, sentences())


def test_a_sequential_is_cut_between_children_that_cannot_be_traced() -> None:
    backbone = nn.Sequential(nn.Linear(6, 6), nn.Sequential(models.Branches(), nn.ReLU()), nn.Linear(3, 2)).eval()
    model = split(backbone, torch.randn(4, 6))
    assert model.method == "sequential"
    assert names(model)[0] == "input"
    assert len(model.points) > 1
    check_stages(model, torch.randn(6, 6))


def test_named_modules_are_taken_as_they_are() -> None:
    backbone = models.BranchesInside().eval()
    model = split(backbone, torch.randn(4, 6), points=["stem", "middle"])
    assert (model.method, names(model)) == ("sequential", ["input", "stem", "middle"])
    check_stages(model, torch.randn(6, 6))


# --- what is refused -------------------------------------------------------------------------------------------


def test_train_mode_is_refused() -> None:
    with pytest.raises(SplitError, match=r"train mode \(the model itself, .*model\.eval\(\)"):
        split(models.PlainCNN(), images())
    partly = models.PlainCNN().eval()
    partly.dropout.train()
    with pytest.raises(SplitError, match=r"train mode \(dropout\)"):
        split(partly, images())


def test_active_dropout_is_refused() -> None:
    with pytest.raises(SplitError, match=r"answered the same inputs differently.*dropout"):
        split(models.NoisyDropout().eval(), torch.randn(4, 6))


@pytest.mark.parametrize(
    "raw", [torch.randn(4, 6), torch.zeros(3, 6), torch.ones(1, 6)], ids=["random", "zeros", "one"]
)
def test_answers_that_depend_on_other_rows_are_refused(raw: Tensor) -> None:
    with pytest.raises(SplitError, match="depend on the other rows of the batch"):
        split(models.MixesRows().eval(), raw)


def test_a_model_with_a_memory_is_refused() -> None:
    with pytest.raises(SplitError, match=r"changes its own buffers when it is called \(calls\)"):
        split(models.CountsCalls().eval(), torch.randn(4, 6))


def test_inputs_that_do_not_fit_are_refused() -> None:
    with pytest.raises(InputError, match=r"does not accept the example inputs, \(4, 7\) float32"):
        split(models.mlp().eval(), torch.randn(4, 7))
    with pytest.raises(InputError, match=r"does not accept the example inputs.*as `pixels`"):
        split(randomised(models.PlainCNN()), {"pixels": images()})
    with pytest.raises(InputError, match="has no rows"):
        split(models.mlp().eval(), torch.randn(0, 6))
    with pytest.raises(InputError, match=r"the backbone is a function"):
        split(lambda x: x, torch.randn(4, 6))  # type: ignore[arg-type]


def test_a_model_that_cannot_be_traced_is_explained_by_its_line(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SplitError) as caught:
        split(models.Branches().eval(), torch.randn(4, 6))
    message = str(caught.value)
    assert "Branches cannot be traced" in message
    assert "models.py:" in message
    assert "if x.abs().max() > 1e9:" in message, message
    assert "export:" in message
    assert "fx:" in message
    assert capfd.readouterr() == ("", ""), "torch's own words on it are not shown"


def test_batches_that_do_not_fit_are_refused() -> None:
    model = split(randomised(models.MaskedEncoder()), sentences())
    raw = sentences()
    with pytest.raises(InputError, match=r"`input_ids` has shape \(6, 12\).*\('batch', 9\)"):
        model.flatten(as_batch(sentences(length=12)))
    with pytest.raises(InputError, match=r"type float32; expected .* int64"):
        model.flatten(as_batch({**raw, "input_ids": raw["input_ids"].float()}))
    with pytest.raises(InputError, match="missing a required argument"):
        model.flatten(as_batch({"input_ids": raw["input_ids"]}))


def test_a_wrong_stage_does_not_pass_the_proof() -> None:
    model = split(randomised(models.ResidualNet()), images())

    class Shifted(nn.Module):
        def __init__(self, stage: nn.Module) -> None:
            super().__init__()
            self.stage = stage

        def forward(self, *live: Tensor) -> tuple[Tensor, ...]:
            return tuple(value + 0.01 for value in self.stage(*live))

    class Mixing(Shifted):
        def forward(self, *live: Tensor) -> tuple[Tensor, ...]:
            return tuple(value - value.mean(0) for value in self.stage(*live))

    stages = model.stages
    model.stages = (*stages[:-1], Shifted(stages[-1]))
    with pytest.raises(SplitError, match="do not give the model's own answer"):
        prove(model)
    model.stages = (*stages[:-1], Mixing(stages[-1]))
    with pytest.raises(SplitError, match="depend on the other rows"):
        prove(model)


# --- exported programs -----------------------------------------------------------------------------------------


def test_a_pt2_file_is_split(tmp_path: Path) -> None:
    backbone = randomised(models.ResidualNet())
    program = torch.export.export(backbone, (images(3),), dynamic_shapes=({0: Dim("batch")},))
    torch.export.save(program, tmp_path / "model.pt2")
    model = split(torch.export.load(tmp_path / "model.pt2"), images())
    assert model.method == "export"
    assert {"layers.0", "layers.1"} <= set(names(model)), names(model)
    raw = images()
    torch.testing.assert_close(model.run(as_batch(raw)), backbone(raw))
    check_stages(model, raw)


def test_a_pt2_file_with_a_fixed_batch_is_explained() -> None:
    program = torch.export.export(randomised(models.PlainCNN()), (images(3),))
    with pytest.raises(SplitError, match=r"batches of the size it was exported with.*dynamic_shapes"):
        split(program, images())


def test_a_program_exported_in_train_mode_is_refused() -> None:
    program = torch.export.export(models.PlainCNN(), (images(3),), dynamic_shapes=({0: Dim("batch")},))
    with pytest.raises(OfframpError, match=r"dropout|buffers"):
        split(program, images())


# --- names -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("paths", "blocks", "lists", "expected"),
    [
        (
            ["encoder", "encoder.layer.2", "encoder.layer.2.output"],
            ["encoder", "encoder.layer.2"],
            [],
            "encoder.layer.2",
        ),
        (["layer1", "layer1.1", "layer1.1.relu"], ["layer1", "layer1.1"], [], "layer1.1"),
        (["features", "features.10"], ["features"], ["features"], "features.10"),
        (["stem", "stem.2"], ["stem"], [], "stem"),
        (["features.3", "features.3.2"], ["features", "features.3"], ["features"], "features.3"),
        (["block_a", "block_a.mlp", "block_a.mlp.4"], ["block_a", "block_a.mlp"], [], "block_a"),
    ],
)
def test_friendly_names(paths: list[str], blocks: list[str], lists: list[str], expected: str) -> None:
    assert friendly_name(paths, blocks, lists) == expected


# --- models of transformers ------------------------------------------------------------------------------------

SMALL = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
PIXELS = {"pixel_values": torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(0))}


def vision() -> Any:
    """torchvision, in a state in which transformers and timm can import it; None when it is not installed."""
    return import_torchvision() if importlib.util.find_spec("torchvision") else None


def hugging_face(family: str) -> tuple[nn.Module, dict[str, Tensor], str]:
    """A tiny model of the family, inputs for it, and the name of a split point that a person would expect."""
    vision()
    hf = pytest.importorskip("transformers", reason="transformers is not installed (extra `hf`)")
    if family == "resnet":
        config = hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 2], layer_type="basic")
        return hf.ResNetForImageClassification(config).eval(), PIXELS, "encoder.stages.1.layers.0"
    if family == "vit":
        config = hf.ViTConfig(image_size=32, patch_size=8, **SMALL)
        return hf.ViTForImageClassification(config).eval(), PIXELS, "layers.1"
    if family == "convnext":
        config = hf.ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 2], num_stages=2)
        return hf.ConvNextForImageClassification(config).eval(), PIXELS, "encoder.stages.1.layers.0"
    if family == "bert":
        config = hf.BertConfig(vocab_size=50, **SMALL)
        return hf.BertForSequenceClassification(config).eval(), sentences(), "encoder.layer.1"
    if family == "distilbert":
        config = hf.DistilBertConfig(vocab_size=50, dim=16, n_layers=3, n_heads=2, hidden_dim=32)
        return hf.DistilBertForSequenceClassification(config).eval(), sentences(), "transformer.layer.1"
    if family == "yolos":
        config = hf.YolosConfig(image_size=[32, 32], patch_size=8, num_detection_tokens=4, **SMALL)
        return hf.YolosForObjectDetection(config).eval(), PIXELS, "encoder.layer.1"
    trunk = hf.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", out_features=["stage2"]
    )
    config = hf.DetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone=None,
        backbone_config=trunk,
        d_model=16,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=256,
        decoder_ffn_dim=512,
        num_queries=8,
    )
    return hf.DetrForObjectDetection(config).eval(), PIXELS, "decoder.layers.0"


@pytest.mark.parametrize("family", ["resnet", "vit", "convnext", "bert", "distilbert", "yolos", "detr"])
def test_models_of_transformers_are_split(family: str) -> None:
    backbone, raw, expected = hugging_face(family)
    model = split(backbone, raw)
    assert model.method == "export"
    assert any(name.endswith(expected) for name in names(model)), names(model)
    check_stages(model, raw)
    output = model.run(as_batch(raw))
    assert type(output) is type(backbone(**raw)), "a ModelOutput must come back as one"
    assert output.logits.shape[0] == 6


def test_masks_of_fresh_sentences_are_carried_and_compacted() -> None:
    backbone, raw, _ = hugging_face("bert")
    model = split(backbone, raw)
    middle = next(point for point in model.points if point.name.endswith("encoder.layer.1"))
    assert len(middle.live_shapes) == 2, "the hidden state and the mask"
    check_stages(model, sentences(11))


# --- torchvision and timm --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["torchvision:resnet18", "timm:vit_tiny_patch16_224"])
def test_vision_models_are_split(name: str) -> None:
    torchvision = vision()
    if torchvision is None:
        pytest.skip("torchvision is not installed (extra `vision`)")
    if name.startswith("timm"):
        timm = pytest.importorskip("timm")
        backbone = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, num_classes=4, depth=3)
        expected = "blocks.1"
    else:
        backbone, expected = torchvision.models.resnet18(num_classes=4), "layer3.0"
    model = split(backbone.eval(), torch.randn(4, 3, 32, 32))
    assert expected in names(model), names(model)
    check_stages(model, torch.randn(6, 3, 32, 32))

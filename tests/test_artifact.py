"""Artefacts: what is saved comes back, what is damaged or foreign is refused, saving is all or nothing."""

from __future__ import annotations

import copy
import errno
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from offramp import artifact
from offramp.artifact import load, save
from offramp.caches import CacheShape, LearnedCache, Reduction
from offramp.confidence import Selector
from offramp.errors import ArtifactError, InputError, StorageError
from offramp.model import CachedModel
from offramp.splitting import split
from offramp.tasks import Classification
from offramp.types import Certificate, CostTable, PartCost, Plan, PlannedCache, RoutingCost, Timing

FEATURES, CLASSES = 6, 4
SUMMARY = {"tolerance": 0.02, "rates": [0.5, 0.25]}


def make_backbone(seed: int = 0, width: int = 16) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [
        nn.Linear(FEATURES, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, CLASSES),
    ]
    return nn.Sequential(*layers).eval()


def make_cache(name: str, point: str, features: int, reads: str | None = None) -> LearnedCache:
    shape = CacheShape("mlp", width=8)
    cache = LearnedCache(name, point, shape, (features,), CLASSES, reduction=Reduction(), reads=reads).eval()
    if reads is not None:
        cache.blend = (0.8, 0.6)
        selector = Selector(7)
        selector.weight.copy_(torch.randn(7))
        cache.use_confidence("selector", selector)
    return cache


def make_costs(stages: int, caches: int) -> CostTable:
    def part(name: str) -> PartCost:
        return PartCost(name, 100.0, 10, 40, {1: Timing(1.0, 0.9, 1.1), 8: Timing(2.0, 1.9, 2.1 / 3)})

    routing = tuple(RoutingCost(0.01, 0.02, 0.001) for _ in range(stages))
    parts = tuple(part(f"s{k}") for k in range(stages))
    return CostTable("cpu", 2, part("backbone"), parts, routing, tuple(map(part, "ab"[:caches])), (0, 1)[:caches])


def make_cached(backbone: nn.Module, *, caches: int = 2, points: list[str] | None = None) -> CachedModel:
    split_model = split(backbone, torch.randn(4, FEATURES), points=points)
    second = split_model.points[1]
    made = [make_cache("a", "input", FEATURES), make_cache("b", second.name, second.shape[0], reads="a")][:caches]
    planned = tuple(PlannedCache(c.name, c.point, 0.3, c.confidence_name, 0.25) for c in made)
    plan = Plan(planned, 0.01, 0.6, (8,) if caches else (), "" if caches else "nothing pays")
    certificate = Certificate(
        0.02, 0.95, 500, 3, 0.0154, "fixed sequence", 7, split_model.fingerprint, "f" * 64, "2026-01-01"
    )
    costs = make_costs(len(split_model.stages), caches)
    return CachedModel(split_model, made, plan, certificate, costs, task=Classification(), summary=SUMMARY)


@pytest.fixture(scope="module")
def backbone() -> nn.Sequential:
    return make_backbone()


@pytest.fixture(scope="module")
def cached(backbone: nn.Sequential) -> CachedModel:
    return make_cached(backbone)


@pytest.fixture(scope="module")
def without_caches(backbone: nn.Sequential) -> CachedModel:
    return make_cached(backbone, caches=0)


@pytest.fixture
def saved(cached: CachedModel, tmp_path: Path) -> Path:
    save(cached, tmp_path / "model")
    return tmp_path / "model"


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def edit(folder: Path, change: Callable[[dict[str, Any]], object], *, seal: bool = False) -> None:
    """Change the manifest of an artefact; with `seal`, as a program that knows the format would."""
    file = folder / artifact.MANIFEST
    manifest = json.loads(file.read_text())
    change(manifest)
    if seal:
        manifest[artifact.SEAL] = artifact._seal(manifest)
    file.write_text(json.dumps(manifest))


def rewrite_weights(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of an artefact, checksums included."""
    tensors = safetensors.torch.load_file(folder / artifact.WEIGHTS)
    change(tensors)
    data = safetensors.torch.save(tensors)
    (folder / artifact.WEIGHTS).write_bytes(data)
    sums = {"file": artifact.WEIGHTS, "bytes": len(data), "sha256": artifact._sha256(data)}
    edit(folder, lambda manifest: manifest.update(weights=sums), seal=True)


def assert_same_answers(one: CachedModel, other: CachedModel) -> None:
    for rows in (1, 5, 8):
        x = torch.randn(rows, FEATURES, generator=torch.Generator().manual_seed(rows))
        a, b = one.predict(x), other.predict(x)
        assert torch.equal(a.output, b.output)
        assert torch.equal(a.left_at_B, b.left_at_B)
        assert torch.equal(a.confidence_B, b.confidence_B)


# --- round trip -----------------------------------------------------------------------------------


def test_a_saved_model_comes_back_equal(cached: CachedModel, backbone: nn.Module, saved: Path) -> None:
    loaded = load(saved, copy.deepcopy(backbone))
    assert (loaded.plan, loaded.certificate, loaded.costs) == (cached.plan, cached.certificate, cached.costs)
    assert (loaded.task, loaded.summary, loaded.exits) == (cached.task, cached.summary, cached.exits)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert not any(module.training for module in loaded.modules())
    assert_same_answers(cached, loaded)


def test_saving_what_was_loaded_writes_the_same(backbone: nn.Module, saved: Path, tmp_path: Path) -> None:
    save(load(saved, backbone), tmp_path / "again")
    first, second = (json.loads((folder / artifact.MANIFEST).read_text()) for folder in (saved, tmp_path / "again"))
    for key in ("plan", "certificate", "caches", "costs", "split", "weights", "task", "summary"):
        assert first[key] == second[key], key


def test_a_plan_without_caches_can_be_saved(without_caches: CachedModel, backbone: nn.Module, tmp_path: Path) -> None:
    save(without_caches, tmp_path / "none")
    loaded = load(tmp_path / "none", backbone)
    assert loaded.plan.reason == "nothing pays"
    assert_same_answers(without_caches, loaded)


def test_points_that_were_chosen_by_name_are_found_again(backbone: nn.Module, tmp_path: Path) -> None:
    default = [point.name for point in split(backbone, torch.randn(4, FEATURES)).points]
    cached = make_cached(backbone, points=["3"])
    names = [point.name for point in cached.split_model.points]
    assert names != default
    save(cached, tmp_path / "named")
    loaded = load(tmp_path / "named", backbone)
    assert [point.name for point in loaded.split_model.points] == names
    assert_same_answers(cached, loaded)


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.body, self.head = (
            nn.Embedding(9, FEATURES),
            nn.Linear(FEATURES, 16),
            nn.Linear(16, CLASSES),
        )

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        mean_BF = (self.embed(ids) * mask[..., None]).sum(1)
        return self.head(self.body(mean_BF).relu())  # type: ignore[no-any-return]


def test_keyword_inputs_of_whole_numbers_are_kept(tmp_path: Path) -> None:
    backbone = Named().eval()
    inputs = {"ids": torch.arange(12).reshape(4, 3) % 9, "mask": torch.ones(4, 3)}
    split_model = split(backbone, inputs)
    certificate = Certificate(0.02, 0.95, 1, 0, 0.0, "none", 0, split_model.fingerprint, "", "")
    costs = make_costs(len(split_model.stages), 0)
    cached = CachedModel(split_model, [], Plan(), certificate, costs, task=Classification(), summary={})
    save(cached, tmp_path / "named")
    loaded = load(tmp_path / "named", backbone)
    assert torch.equal(loaded.split_model.example.kwargs["ids"], inputs["ids"])
    assert torch.equal(loaded(**inputs), cached(**inputs))


def test_weights_keep_their_type_and_shared_ones_are_saved_twice(backbone: nn.Module, tmp_path: Path) -> None:
    cached = make_cached(backbone, caches=1)
    cached.caches.double()
    linear = next(module for module in cached.caches.modules() if isinstance(module, nn.Linear))
    assert linear.bias is not None
    linear.bias = nn.Parameter(linear.weight.detach()[:, 0], requires_grad=False)
    save(cached, tmp_path / "double")
    loaded = load(tmp_path / "double", backbone)
    for key, value in cached.caches.state_dict().items():
        assert torch.equal(loaded.caches.state_dict()[key], value)
        assert loaded.caches.state_dict()[key].dtype == value.dtype


def test_loading_touches_neither_the_backbone_nor_the_random_state(backbone: nn.Module, saved: Path) -> None:
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    state = torch.get_rng_state()
    load(saved, backbone)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())
    assert not any(module._forward_hooks for module in backbone.modules())


def test_the_folder_holds_two_files_and_at_most_four_inputs(saved: Path) -> None:
    assert sorted(os.listdir(saved)) == [artifact.WEIGHTS, artifact.MANIFEST]
    tensors = safetensors.torch.load_file(saved / artifact.WEIGHTS)
    assert tensors["example.args.0"].shape == (4, FEATURES)
    manifest = json.loads((saved / artifact.MANIFEST).read_text())
    assert manifest["format_version"] == 2
    assert manifest["versions"]["torch"] == torch.__version__
    assert manifest["split"]["points"][0] == {"name": "input", "shape": [FEATURES]}
    assert str(saved) not in (saved / artifact.MANIFEST).read_text()


def test_summaries_of_numpy_values_and_odd_keys_are_saved(
    without_caches: CachedModel, backbone: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = {1: 0.5, 8: 1.0, 32: 2}
    summary = {"auroc": np.float64("nan"), "rates": np.arange(2), "by_size": sizes, "t": (1,)}
    monkeypatch.setattr(without_caches, "summary", summary)
    save(without_caches, tmp_path / "model")
    loaded = load(tmp_path / "model", backbone).summary
    assert math.isnan(loaded.pop("auroc"))
    assert loaded == {"rates": [0, 1], "by_size": {"1": 0.5, "8": 1.0, "32": 2}, "t": [1]}


@pytest.mark.parametrize("summary", [{"model": object()}, {(1, 2): 3}])
def test_a_summary_without_json_form_is_refused_before_anything_is_written(
    cached: CachedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, summary: dict[Any, Any]
) -> None:
    monkeypatch.setattr(cached, "summary", summary)
    with pytest.raises(InputError, match="the summary of the cached model cannot be saved as JSON: "):
        save(cached, tmp_path / "model")
    assert os.listdir(tmp_path) == []


# --- damage ---------------------------------------------------------------------------------------


def test_a_missing_artefact_or_file(backbone: nn.Module, saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"nowhere/manifest\.json is missing$"):
        load(tmp_path / "nowhere", backbone)
    (saved / artifact.WEIGHTS).unlink()
    with pytest.raises(ArtifactError, match=r"caches\.safetensors is missing$"):
        load(saved, backbone)


def test_a_file_that_cannot_be_read(backbone: nn.Module, saved: Path) -> None:
    (saved / artifact.WEIGHTS).unlink()
    (saved / artifact.WEIGHTS).mkdir()
    with pytest.raises(ArtifactError, match=r"caches\.safetensors cannot be read: Is a directory"):
        load(saved, backbone)


@pytest.mark.parametrize("kept", [0, 1, 100, -1])
def test_a_cut_off_manifest(backbone: nn.Module, saved: Path, kept: int) -> None:
    file = saved / artifact.MANIFEST
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(ArtifactError, match=r"manifest\.json is not valid JSON: it is damaged or cut off"):
        load(saved, backbone)


def test_a_manifest_of_something_else(backbone: nn.Module, saved: Path) -> None:
    for text in ("[]", "{}", '{"format": "other", "format_version": 1}'):
        (saved / artifact.MANIFEST).write_text(text)
        with pytest.raises(ArtifactError, match=r"manifest\.json is not the manifest of an offramp artefact"):
            load(saved, backbone)


@pytest.mark.parametrize("kept", [0, 7, -1])
def test_cut_off_weights(backbone: nn.Module, saved: Path, kept: int) -> None:
    file = saved / artifact.WEIGHTS
    data = file.read_bytes()
    file.write_bytes(data[:kept])
    message = rf"caches\.safetensors is cut off: it has {len(data[:kept])} bytes, {len(data)} were saved; copy"
    with pytest.raises(ArtifactError, match=message):
        load(saved, backbone)


@pytest.mark.parametrize("place", [0.0, 0.1, 0.5, 0.999])
def test_one_flipped_bit_of_the_weights(backbone: nn.Module, saved: Path, place: float) -> None:
    file = saved / artifact.WEIGHTS
    data = bytearray(file.read_bytes())
    data[int(place * len(data))] ^= 1
    file.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"caches\.safetensors is damaged: its checksum is not the one in manifest"):
        load(saved, backbone)


def test_weights_that_are_no_safetensors(backbone: nn.Module, saved: Path) -> None:
    data = b"not a safetensors file"
    (saved / artifact.WEIGHTS).write_bytes(data)
    sums = {"file": artifact.WEIGHTS, "bytes": len(data), "sha256": artifact._sha256(data)}
    edit(saved, lambda manifest: manifest.update(weights=sums), seal=True)
    with pytest.raises(ArtifactError, match=r"caches\.safetensors is not a safetensors file"):
        load(saved, backbone)


def test_every_single_number_and_word_of_the_manifest_is_guarded(backbone: nn.Module, saved: Path) -> None:
    edits: list[Callable[[dict[str, Any]], object]] = [
        lambda m: m["plan"]["caches"][0].update(threshold=0.29),
        lambda m: m["plan"].update(bypass_batch_sizes=[]),
        lambda m: m["certificate"].update(tolerance=0.01),
        lambda m: m["certificate"].pop("n"),
        lambda m: m["caches"][1].update(reads=None),
        lambda m: m["costs"]["stages"][0]["time_ms"]["1"].update(median_ms=0.5),
        lambda m: m["split"].update(fingerprint="0" * 64),
        lambda m: m["weights"].update(sha256="0" * 64),
        lambda m: m.update(created="never"),
        lambda m: m.pop("summary"),
        lambda m: m.pop(artifact.SEAL),
    ]
    original = (saved / artifact.MANIFEST).read_text()
    for change in edits:
        edit(saved, change)
        with pytest.raises(
            ArtifactError, match=r"manifest\.json was changed after it was saved: the plan, certificate"
        ):
            load(saved, backbone)
        (saved / artifact.MANIFEST).write_text(original)
    edit(saved, lambda _: None)  # another layout of the same JSON is no change
    load(saved, backbone)


def test_a_newer_format_says_to_upgrade(backbone: nn.Module, saved: Path) -> None:
    edit(saved, lambda manifest: manifest.update(format_version=3, plan="of another kind"))
    message = r"was written by a newer offramp \(format 3\), this one reads 2: upgrade offramp"
    with pytest.raises(ArtifactError, match=message):
        load(saved, backbone)


def test_an_older_format_says_to_fit_again(backbone: nn.Module, saved: Path) -> None:
    edit(saved, lambda manifest: manifest.update(format_version=1, plan="of another kind"))
    message = r"was written by an older offramp \(format 1\), this one reads 2: fit again"
    with pytest.raises(ArtifactError, match=message):
        load(saved, backbone)


@pytest.mark.parametrize("version", [None, "1", 0, 1.0, True])
def test_a_nonsense_format_version(backbone: nn.Module, saved: Path, version: object) -> None:
    edit(saved, lambda manifest: manifest.update(format_version=version), seal=True)
    with pytest.raises(ArtifactError, match=f"is damaged: its format_version is {version!r}"):
        load(saved, backbone)


def test_weights_that_do_not_fit_the_caches(backbone: nn.Module, saved: Path) -> None:
    pristine = contents(saved)
    cases: list[tuple[Callable[[dict[str, Tensor]], object], str]] = [
        (
            lambda t: t.pop("caches.1.head.bias"),
            r"does not fit cache 'b': head.bias has shape none, \(4,\) is needed",
        ),
        (
            lambda t: t.update({"caches.0.more": torch.ones(2)}),
            r"cache 'a': more has shape \(2,\), none is needed",
        ),
        (
            lambda t: t.update({"caches.0.head.bias": torch.ones(3)}),
            r"head.bias has shape \(3,\), \(4,\) is needed",
        ),
        (lambda t: t.update({"caches.2.head.bias": torch.ones(3)}), "holds weights of more than 2 caches"),
    ]
    for change, message in cases:
        rewrite_weights(saved, change)
        with pytest.raises(ArtifactError, match=message):
            load(saved, backbone)
        for name, data in pristine.items():
            (saved / name).write_bytes(data)


def test_a_cache_of_an_unknown_kind(backbone: nn.Module, saved: Path) -> None:
    edit(saved, lambda manifest: manifest["caches"][0]["shape"].update(kind="crystal"), seal=True)
    with pytest.raises(ArtifactError, match=r"a cache of the artefact in .* cannot be built: KeyError: 'crystal'"):
        load(saved, backbone)


def test_decisions_that_make_no_model(backbone: nn.Module, saved: Path) -> None:
    edit(saved, lambda manifest: manifest["plan"].update(caches=[]), seal=True)
    with pytest.raises(ArtifactError, match="does not make a cached model: InputError: the caches"):
        load(saved, backbone)


# --- another backbone -----------------------------------------------------------------------------


def test_other_weights_are_told_apart_by_fingerprint(cached: CachedModel, saved: Path) -> None:
    other = make_backbone(seed=1)
    mine = cached.split_model.fingerprint[:12]
    theirs = split(other, torch.randn(4, FEATURES)).fingerprint[:12]
    message = rf"to another backbone: it was made for {mine}, this one is {theirs}. Load the weights .* fit again\.$"
    with pytest.raises(ArtifactError, match=message):
        load(saved, other)


def test_one_changed_weight_is_enough(backbone: nn.Sequential, saved: Path) -> None:
    changed = copy.deepcopy(backbone)
    with torch.no_grad():
        next(changed.parameters())[0, 0] += 1e-3
    with pytest.raises(ArtifactError, match="belongs to another backbone"):
        load(saved, changed)


def test_another_architecture(saved: Path) -> None:
    with pytest.raises(ArtifactError, match="belongs to another backbone: it was made for"):
        load(saved, make_backbone(width=12))
    with pytest.raises(ArtifactError, match="belongs to another backbone: this one cannot be split as the saved one"):
        load(saved, nn.Linear(FEATURES + 1, CLASSES).eval())


def test_a_backbone_that_is_cut_elsewhere(backbone: nn.Module, saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifact, "split", lambda model, example, **_: split(model, example, points=["0"]))
    with pytest.raises(ArtifactError, match=r"another backbone: it was cut at .*, this one is cut at .*'0'"):
        load(saved, backbone)


def test_another_version_of_torch_is_mentioned(saved: Path) -> None:
    edit(saved, lambda manifest: manifest["versions"].update(torch="2.0.0"), seal=True)
    with pytest.raises(ArtifactError, match=r"fit again \(it was saved with torch 2\.0\.0, this is torch "):
        load(saved, make_backbone(seed=1))


def test_the_backbone_must_be_where_it_is_asked_for(backbone: nn.Module, saved: Path) -> None:
    load(saved, backbone, device="cpu")
    with pytest.raises(InputError, match=r"load\(device='cuda:1'\) but the backbone is on cpu; move it first with"):
        load(saved, backbone, device="cuda:1")


# --- saving is all or nothing ---------------------------------------------------------------------


def full_disk(file: Path, data: bytes) -> None:
    file.write_bytes(data[: len(data) // 2])
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))


def no_permission(file: Path, _: bytes) -> None:
    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(file))


@pytest.mark.parametrize(
    ("writer", "reason"), [(full_disk, "No space left on device"), (no_permission, "Permission denied")]
)
def test_a_failed_write_leaves_nothing(
    cached: CachedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, writer: object, reason: str
) -> None:
    monkeypatch.setattr(artifact, "_write", writer)
    with pytest.raises(StorageError, match=rf"cannot save to {tmp_path / 'model'}: {reason}; nothing was written$"):
        save(cached, tmp_path / "model")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("writer", [full_disk, no_permission])
def test_a_failed_write_keeps_the_old_artefact(
    without_caches: CachedModel, saved: Path, monkeypatch: pytest.MonkeyPatch, writer: object
) -> None:
    before = contents(saved)
    monkeypatch.setattr(artifact, "_write", writer)
    with pytest.raises(StorageError, match=r"; what was there is unchanged$"):
        save(without_caches, saved)
    assert os.listdir(saved.parent) == ["model"]
    assert contents(saved) == before


@pytest.mark.parametrize("failing", [1, 2])
@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()])
def test_an_interrupted_replacement_keeps_the_old_artefact(
    without_caches: CachedModel,
    saved: Path,
    monkeypatch: pytest.MonkeyPatch,
    failing: int,
    error: BaseException,
) -> None:
    before = contents(saved)
    rename, calls = artifact._rename, []

    def breaking(source: Path, destination: Path) -> None:
        calls.append(destination)
        if len(calls) == failing:
            raise error
        rename(source, destination)

    monkeypatch.setattr(artifact, "_rename", breaking)
    with pytest.raises(StorageError if isinstance(error, OSError) else KeyboardInterrupt):
        save(without_caches, saved)
    assert len(calls) == failing
    assert os.listdir(saved.parent) == ["model"]
    assert contents(saved) == before


def test_the_old_artefact_is_complete_until_the_new_one_is(
    without_caches: CachedModel, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = contents(saved)
    rename, seen = artifact._rename, []

    def watching(source: Path, destination: Path) -> None:
        seen.append(contents(source))
        rename(source, destination)

    monkeypatch.setattr(artifact, "_rename", watching)
    save(without_caches, saved)
    assert seen[0] == before
    assert set(seen[1]) == {artifact.MANIFEST, artifact.WEIGHTS}
    assert os.listdir(saved.parent) == ["model"]
    assert contents(saved) == seen[1]


def test_a_save_that_was_killed_between_two_renames_is_explained(backbone: nn.Module, saved: Path) -> None:
    saved.rename(saved.parent / ".model.0123abcd.old")
    message = r"is missing; a save was interrupted and left the artefact in \.model\.0123abcd\.old: rename"
    with pytest.raises(ArtifactError, match=message):
        load(saved, backbone)


def test_files_are_flushed_before_the_rename(
    cached: CachedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    rename = artifact._rename

    def noted(source: Path, destination: Path) -> None:
        events.append("rename")
        rename(source, destination)

    monkeypatch.setattr(os, "fsync", lambda _: events.append("flush"))
    monkeypatch.setattr(artifact, "_rename", noted)
    save(cached, tmp_path / "model")
    assert events == [
        "flush",
        "flush",
        "flush",
        "rename",
        "flush",
    ]  # two files, their folder; then its parent


@pytest.mark.parametrize(
    ("files", "listed"),
    [({"notes.txt"}, "notes.txt"), ({"manifest.json"}, "manifest.json"), ({"a", *"bcdefg"}, "a, b, c, d, e")],
)
def test_a_folder_of_other_things_is_not_replaced(
    cached: CachedModel, tmp_path: Path, files: set[str], listed: str
) -> None:
    for name in files:
        (tmp_path / name).write_text("precious")
    message = rf"the folder is not an offramp artefact \(it holds {listed}\) and would be lost; choose another path"
    with pytest.raises(StorageError, match=message):
        save(cached, tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == files


def test_an_artefact_with_a_file_of_somebody_else_is_not_replaced(cached: CachedModel, saved: Path) -> None:
    (saved / "notes.txt").write_text("precious")
    with pytest.raises(StorageError, match=r"it holds caches\.safetensors, manifest\.json, notes\.txt"):
        save(cached, saved)


def test_a_file_is_not_replaced(cached: CachedModel, tmp_path: Path) -> None:
    (tmp_path / "model").write_text("precious")
    with pytest.raises(StorageError, match=r"it is a file; an artefact is a folder"):
        save(cached, tmp_path / "model")
    with pytest.raises(StorageError, match=r"cannot save to .*/below: .*; nothing was written$"):
        save(cached, tmp_path / "model" / "below")
    assert (tmp_path / "model").read_text() == "precious"


def test_empty_and_missing_folders_a_link_and_a_damaged_artefact_are_fine(
    cached: CachedModel, backbone: nn.Module, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    save(cached, tmp_path / "empty")
    save(cached, str(tmp_path / "not" / "there" / "yet"))
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    (tmp_path / "empty" / artifact.MANIFEST).write_text("damaged")
    save(cached, tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    for folder in (tmp_path / "empty", tmp_path / "not" / "there" / "yet"):
        assert set(contents(folder)) == {artifact.MANIFEST, artifact.WEIGHTS}
    assert_same_answers(cached, load(tmp_path / "link", backbone))

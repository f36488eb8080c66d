"""Mixtures: what images they are, that the backbone is asked about just these, and who learns from them."""

from __future__ import annotations

import copy
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from test_candidates import candidates_of, image_recording, make_costs
from test_distillation import Ticks
from torch import Tensor, nn

from offramp import mixtures as module
from offramp.augment import is_image
from offramp.caches import CacheShape
from offramp.candidates import Candidates
from offramp.distillation import Recipe, Stop
from offramp.errors import StorageError
from offramp.mixtures import Mixer, Mixtures, pasted_share, suits_mixing
from offramp.recording import TRAIN, Recording, record
from offramp.search import Search
from offramp.splitting import SplitModel, split
from offramp.tasks import Classification

COUNT = 200


@pytest.fixture(scope="module")
def model() -> SplitModel:
    torch.manual_seed(0)
    stages = [nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1), nn.ReLU()]
    stages += [nn.Flatten(), nn.Linear(4 * 16 * 12, 5)]
    return split(nn.Sequential(*stages).eval(), torch.rand(4, 3, 16, 12))


@pytest.fixture(scope="module")
def recording(model: SplitModel) -> Recording:
    images = torch.randn(COUNT, 3, 16, 12, generator=torch.Generator().manual_seed(1))
    return record(model, Classification(), [images], None, seed=0)


def originals(recording: Recording) -> NDArray[np.intp]:
    """Train rows that are no augmented copies."""
    return np.flatnonzero((recording.part_N == TRAIN) & (recording.copy_N == 0))


def mixer(model: SplitModel, recording: Recording, *, seed: int = 0, bfloat16: bool = True, **options: Any) -> Mixer:
    return Mixer(model, Classification(), recording, originals(recording), seed=seed, bfloat16=bfloat16, **options)


def asked(mixer: Mixer) -> Mixtures:
    return mixer.ask(stopped=lambda: False, progress=Ticks())


# --- the images -----------------------------------------------------------------------------------


def parts(mixtures: Mixtures, parity: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(mixture, first, second, share) of the sums or of the pasted ones."""
    index: NDArray[np.intp] = np.arange(parity, len(mixtures.share_M), 2)
    index = index[mixtures.pair_M2[index, 0] != mixtures.pair_M2[index, 1]]  # an image with itself is that image
    first, second = (torch.from_numpy(mixtures.inputs[rows]).float() for rows in mixtures.pair_M2[index].T)
    return mixtures.images(index), first, second, torch.from_numpy(mixtures.share_M[index])


def test_even_ones_are_weighted_sums(model: SplitModel, recording: Recording) -> None:
    mixed, first, second, share = parts(asked(mixer(model, recording)), 0)
    weight = share.view(-1, 1, 1, 1)
    torch.testing.assert_close(mixed, weight * first + (1 - weight) * second)


def test_odd_ones_have_a_rectangle_of_the_second_in_them(model: SplitModel, recording: Recording) -> None:
    mixed, first, second, share = parts(asked(mixer(model, recording)), 1)
    of_first = (mixed == first).all(1)
    assert ((mixed - second).abs().amax(1)[~of_first] < 1e-5).all()
    for pixels_HW, kept in zip(~of_first, share.double().tolist(), strict=True):
        rows, columns = pixels_HW.any(1), pixels_HW.any(0)
        assert torch.equal(pixels_HW, rows[:, None] & columns[None, :]), "a rectangle"
        assert int(rows.sum()) == round(16 * (1 - kept) ** 0.5), "of the shape of the image"
        assert int(columns.sum()) == round(12 * (1 - kept) ** 0.5)
        assert all(int((side.diff(prepend=side.new_zeros(1)) == 1).sum()) <= 1 for side in (rows.int(), columns.int()))
    assert len({tuple(pixels.nonzero()[0].tolist()) for pixels in ~of_first if pixels.any()}) > 10, "anywhere"


def test_a_rectangle_may_be_nothing_or_everything() -> None:
    for corner in (0.0, 0.5, 1.0):
        outside = pasted_share(torch.tensor([1.0, 0.0]), torch.full((2, 2), corner), 9, 8)
        assert outside.shape == (2, 9, 8)
        assert outside[0].eq(1).all()
        assert outside[1].eq(0).all()


def test_shares_are_even_and_partners_come_from_all_rows_given(model: SplitModel, recording: Recording) -> None:
    one = mixer(model, recording)
    mixtures = asked(one)
    assert set(np.unique(mixtures.pair_M2)) <= set(originals(recording))
    assert np.histogram(mixtures.share_M, 4, (0, 1))[0].min() > len(mixtures.share_M) / 8
    again, other = asked(mixer(model, recording)), asked(mixer(model, recording, seed=1))
    assert np.array_equal(again.pair_M2, mixtures.pair_M2)
    assert torch.equal(again.logits_MC, mixtures.logits_MC)
    assert not np.array_equal(other.pair_M2, mixtures.pair_M2)


# --- what the backbone says -----------------------------------------------------------------------


def test_the_logits_are_the_backbones_about_these_images(model: SplitModel, recording: Recording) -> None:
    mixtures = asked(mixer(model, recording, bfloat16=False))
    with torch.inference_mode():
        said = model.backbone(mixtures.images(np.arange(len(mixtures.share_M))))
    torch.testing.assert_close(mixtures.logits_MC, said)
    assert np.array_equal(mixtures.numbers, np.arange(len(mixtures.share_M)))


def test_what_caches_read_of_them_is_kept_as_it_is_of_recorded_inputs(model: SplitModel, recording: Recording) -> None:
    mixtures = asked(mixer(model, recording, bfloat16=False, keep=[1, 2]))
    some = np.array([0, 3, 130, 200])
    again = record(model, Classification(), [mixtures.images(some)], None, seed=0, bfloat16=False)
    assert set(mixtures.features) == {1, 2}
    for position, kept in mixtures.features.items():
        assert kept.shape == (len(mixtures.share_M), *recording.features[position].shape[1:])
        assert kept.dtype == recording.features[position].dtype
        np.testing.assert_array_equal(kept[some], again.features[position][: len(some)])
        torch.testing.assert_close(mixtures.at(position, some), torch.from_numpy(kept[some]).float())
    torch.testing.assert_close(mixtures.at(0, some), mixtures.images(some))


def test_there_are_so_many_per_row_and_no_more_than_the_most(
    model: SplitModel, recording: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = mixer(model, recording)
    assert one.count == module.PER_ROW * len(originals(recording))
    monkeypatch.setattr(module, "MOST", 30)
    progress = Ticks()
    assert len(mixer(model, recording).ask(stopped=lambda: False, progress=progress).logits_MC) == 30
    assert progress.done == 30
    assert one.estimated_seconds() > 0


def test_a_stop_ends_the_asking_with_what_was_said(
    model: SplitModel, recording: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_BATCH", 32)
    stop = Stop()
    one = mixer(model, recording)
    mixtures = one.ask(stopped=lambda: stop.requested, progress=Ticks(stop, after=2))
    assert np.array_equal(mixtures.numbers, np.arange(64))
    assert len(mixtures.share_M) == one.count


def test_what_the_backbone_has_no_answer_to_is_left_out(
    model: SplitModel, recording: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = mixer(model, recording)
    say = told._said

    def failing(images_BCHW: Tensor, *, bfloat16: bool) -> dict[Any, Tensor]:
        said = say(images_BCHW, bfloat16=bfloat16)
        said[None][::3, 0] = torch.nan
        return said

    monkeypatch.setattr(told, "_said", failing)
    mixtures = told.ask(stopped=lambda: False, progress=Ticks())
    assert 0 < len(mixtures.numbers) < told.count
    assert mixtures.logits_MC[mixtures.numbers].isfinite().all()


@pytest.mark.parametrize("wanted", [True, False])
def test_bfloat16_is_used_where_answers_stay_what_they_are(
    model: SplitModel, recording: Recording, monkeypatch: pytest.MonkeyPatch, *, wanted: bool
) -> None:
    monkeypatch.setattr(module, "has_fast_bfloat16", lambda device: True)
    asked_fast = asked(mixer(model, recording, bfloat16=wanted)).logits_MC
    exact = asked(mixer(model, recording, bfloat16=False)).logits_MC
    assert torch.equal(asked_fast, exact) is not wanted
    torch.testing.assert_close(asked_fast, exact, atol=0.05, rtol=0.05)
    monkeypatch.setattr("offramp.recording.FAITHFUL", 1.1)
    assert torch.equal(asked(mixer(model, recording, bfloat16=True)).logits_MC, exact)


def test_a_backbone_that_fails_in_bfloat16_answers_in_its_own_precision(
    model: SplitModel, recording: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "has_fast_bfloat16", lambda device: True)
    failing = mixer(model, recording)
    say = failing._said

    def in_float32_only(images_BCHW: Tensor, *, bfloat16: bool) -> dict[Any, Tensor]:
        if bfloat16:
            raise RuntimeError("not implemented for 'BFloat16'")
        return say(images_BCHW, bfloat16=False)

    monkeypatch.setattr(failing, "_said", in_float32_only)
    assert torch.equal(asked(failing).logits_MC, asked(mixer(model, recording, bfloat16=False)).logits_MC)


def test_they_suit_images_that_were_recorded_and_nothing_else(model: SplitModel, recording: Recording) -> None:
    assert is_image((3, 16, 12), floating=True)
    assert suits_mixing(model, recording)
    flat = split(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval(), torch.rand(4, 6))
    vectors = record(flat, Classification(), [torch.rand(60, 6)], None, seed=0)
    assert not suits_mixing(flat, vectors)


# --- who learns from them -------------------------------------------------------------------------


def candidates(model: SplitModel, recording: Recording, **options: Any) -> Candidates:
    return candidates_of(model, recording, make_costs(model.points), **options)


RECIPE = Recipe(rows=256, batch_size=16, mixtures=True)


def test_students_see_rows_and_mixtures_alike(model: SplitModel, recording: Recording) -> None:
    made = candidates(model, recording)
    made.mix(made.mixer(bfloat16=True))
    assert made.mixtures is not None
    cache = made.build(model.points[0], CacheShape("student", 8))
    training = made._training(cache, RECIPE)
    train, count = made.train_rows, len(made.mixtures.logits_MC)
    numbers = np.concatenate([train, len(recording) + np.arange(count)])
    assert np.array_equal(np.sort(training.rows.rows), numbers)
    some = np.array([train[0], train[5], len(recording), len(recording) + 7])
    feature, target = training.examples.feature(some), training.examples.target(some)
    torch.testing.assert_close(feature[:2], torch.from_numpy(recording.features[0][train[[0, 5]]]).float())
    torch.testing.assert_close(feature[2:], made.mixtures.images(np.array([0, 7])))
    torch.testing.assert_close(target[:2], torch.from_numpy(recording.logits_NC[train[[0, 5]]]))
    torch.testing.assert_close(target[2:], made.mixtures.logits_MC[[0, 7]])


def test_a_recipe_without_them_sees_none(model: SplitModel, recording: Recording) -> None:
    made = candidates(model, recording)
    made.mix(made.mixer(bfloat16=True))
    cache = made.build(model.points[0], CacheShape("student", 8))
    plain = made._training(cache, Recipe(rows=256, batch_size=16))
    assert np.array_equal(plain.rows.rows, made.train_rows)


def test_a_fit_in_a_workdir_asks_once(
    model: SplitModel, recording: Recording, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "new"
    first = candidates(model, recording, workdir=folder)
    first.mix(first.mixer(bfloat16=True, keep=[1]))
    again = candidates(model, recording, workdir=folder)
    with monkeypatch.context() as patched:
        patched.setattr(Mixer, "_said", lambda *_, **__: pytest.fail("asked again"))
        known = again.mixer(bfloat16=True, keep=[1])
        assert known.estimated_seconds() == 0
        again.mix(known)
    anew = candidates(model, recording)
    anew.mix(anew.mixer(bfloat16=True, keep=[1]))
    assert again.mixtures is not None
    assert anew.mixtures is not None
    assert torch.equal(again.mixtures.logits_MC, anew.mixtures.logits_MC)
    np.testing.assert_array_equal(again.mixtures.features[1], anew.mixtures.features[1])
    assert np.array_equal(again.mixtures.pair_M2, anew.mixtures.pair_M2)
    assert again.mixer(bfloat16=True, keep=[1, 2]).estimated_seconds() > 0, "what is read elsewhere is not known"
    logits, feature = sorted(folder.iterdir(), key=lambda path: "logits" not in path.name)
    whole = logits.read_bytes()
    logits.write_bytes(whole[:50])
    assert again.mixer(bfloat16=True, keep=[1]).estimated_seconds() > 0, "damaged: asked again"
    logits.write_bytes(whole)
    feature.unlink()
    assert again.mixer(bfloat16=True).estimated_seconds() == 0
    assert again.mixer(bfloat16=True, keep=[1]).estimated_seconds() > 0


@pytest.mark.parametrize("in_workdir", [True, False])
def test_a_full_disk_is_told_once_and_leaves_nothing(
    model: SplitModel, recording: Recording, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, in_workdir: bool
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_all", full)
    made = candidates(model, recording, workdir=tmp_path if in_workdir else None)
    with pytest.raises(StorageError, match="what the backbone says about mixtures.*No space left") as raised:
        made.mix(made.mixer(bfloat16=True, keep=[1]))
    assert str(raised.value).count("could not write") == 1
    assert not list(tmp_path.iterdir())


def test_what_was_said_in_one_fit_is_for_the_same_mixtures_only(
    model: SplitModel, recording: Recording, tmp_path: Path
) -> None:
    first = candidates(model, recording, workdir=tmp_path)
    first.mix(first.mixer(bfloat16=True))
    turned = copy.copy(recording)
    turned.keys_N = recording.keys_N[::-1]
    other_model = copy.copy(model)
    other_model.fingerprint = "another"
    for other in (
        candidates(model, recording, workdir=tmp_path, seed=1),
        candidates(model, turned, workdir=tmp_path),
        candidates(other_model, recording, workdir=tmp_path),
    ):
        assert other.mixer(bfloat16=True).estimated_seconds() > 0
    assert first.mixer(bfloat16=False).estimated_seconds() > 0


def test_what_was_only_begun_is_not_kept(model: SplitModel, recording: Recording, tmp_path: Path) -> None:
    stopped = candidates(model, recording, workdir=tmp_path)
    stopped.stop.requested = True
    stopped.mix(stopped.mixer(bfloat16=True))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("seconds", "mixed"),
    [(None, True), (1000.0, True), (20.5, True), (19.5, False)],  # asking takes 10 of them, half of the student 10
)
def test_they_are_asked_for_where_the_student_has_half_of_its_training_as_well(
    model: SplitModel, recording: Recording, monkeypatch: pytest.MonkeyPatch, seconds: float | None, *, mixed: bool
) -> None:
    monkeypatch.setattr(Mixer, "estimated_seconds", lambda self: 10.0)
    monkeypatch.setattr(Candidates, "seconds_for", lambda self, cache, recipe: 20.0)
    search = Search(candidates(model, recording), tolerance=0.05)
    student = search.candidates.build(model.points[0], CacheShape("student", 8))
    left = search._after_mixing(search._mixer([student]), [student], seconds)
    assert (search.candidates.mixtures is not None) is mixed
    assert search.recipe(student).mixtures is mixed
    assert left == seconds or (mixed and left is not None and seconds is not None and left < seconds)


def test_what_an_earlier_run_has_asked_is_there_before_trainings_are_estimated(
    model: SplitModel, recording: Recording, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that a student which that run has trained on mixtures is found, however little time there is now."""
    for asked_before in (False, True):
        search = Search(candidates(model, recording, workdir=tmp_path), tolerance=0.05)
        monkeypatch.setattr(Candidates, "seconds_for", lambda self, cache, recipe: 100.0)
        monkeypatch.setattr(Candidates, "train_round", lambda *_: None)
        search.candidates.deadline = time.monotonic() + 2
        search.run()
        assert (search.candidates.mixtures is not None) is asked_before
        search.candidates.mix(search.candidates.mixer(bfloat16=True))


def test_without_students_and_where_they_are_not_wanted_nothing_is_asked(
    model: SplitModel, recording: Recording
) -> None:
    unwanted = Search(candidates(model, recording), tolerance=0.05, mixtures=False)
    student = unwanted.candidates.build(model.points[0], CacheShape("student", 8))
    wanted = Search(candidates(model, recording), tolerance=0.05)
    for search, students in ((unwanted, [student]), (wanted, [])):
        assert search._mixer(students) is None
        assert search._after_mixing(None, students, None) is None
        assert search.candidates.mixtures is None


def test_students_and_trunks_train_on_them(model: SplitModel, recording: Recording) -> None:
    search = Search(candidates(model, recording), tolerance=0.05)
    made = search.candidates
    caches = [
        made.build(model.points[position], CacheShape(kind, 8))  # type: ignore[arg-type]
        for position, kind in ((0, "student"), (1, "conv"), (2, "conv"), (1, "mlp"))
    ]
    assert not any(search.recipe(cache).mixtures for cache in caches)
    made.mix(made.mixer(bfloat16=True, keep=[1]))
    assert [search.recipe(cache).mixtures for cache in caches] == [True, True, False, False], "where these were kept"


def test_trunks_see_what_the_backbone_makes_of_mixtures(model: SplitModel, recording: Recording) -> None:
    made = candidates(model, recording)
    made.mix(made.mixer(bfloat16=True, keep=[1]))
    assert made.mixtures is not None
    training = made._training(made.build(model.points[1], CacheShape("conv", 8)), RECIPE)
    some = np.array([made.train_rows[0], len(recording), len(recording) + 7])
    feature = training.examples.feature(some)
    torch.testing.assert_close(feature[:1], torch.from_numpy(recording.features[1][some[:1]]).float())
    torch.testing.assert_close(feature[1:], torch.from_numpy(made.mixtures.features[1][[0, 7]]).float())
    assert feature.is_contiguous(memory_format=torch.channels_last)


def test_what_trunks_will_read_is_kept(
    model: SplitModel, recording: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = Search(candidates(model, recording), tolerance=0.05)
    points = [model.points[position] for position in (2, 1)]
    trunks = [search.candidates.build(point, CacheShape("conv", 8)) for point in points]
    monkeypatch.setattr(search, "_trunks", lambda reader: iter(trunks))
    mixing = search._mixer([search.candidates.build(model.points[0], CacheShape("student", 8))])
    assert mixing is not None
    assert set(asked(mixing).features) == {1, 2}


def test_images_of_a_recording_by_hand_can_be_mixed() -> None:
    """Of one channel and one size of pixel, as `test_candidates` has them."""
    recording = image_recording(40)
    mixtures = Mixtures(
        recording.features[0],
        np.array([[0, 1], [2, 3]]),
        np.array([0.25, 0.5], np.float32),
        np.zeros((2, 2), np.float32),
        torch.zeros(2, 4),
        {},
    )
    assert mixtures.images(np.array([1])).shape == (1, 1, 8, 8)

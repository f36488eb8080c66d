"""Recording: the parts, what is on disk, and that nothing recorded is lost however it ends."""

from __future__ import annotations

import copy
import errno
import hashlib
import os
import tempfile
import tracemalloc
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from models import ResidualNet, mlp
from torch import Tensor, nn

from offramp import recording as module
from offramp.errors import InputError, StorageError, StreamError
from offramp.recording import CERTIFY, TRAIN, TUNE, Recording, RecordingInterrupted, record
from offramp.splitting import SplitModel, split
from offramp.tasks import Classification

X = torch.randn(400, 6, generator=torch.Generator().manual_seed(1))
OTHER = torch.randn(300, 6, generator=torch.Generator().manual_seed(2))
SPLIT: dict[nn.Module, SplitModel] = {}


class Counting:
    """A split model whose first stage counts the rows that it is run on."""

    def __init__(self, model: SplitModel) -> None:
        self.rows = 0
        first = model.stages[0]

        class Stage(nn.Module):
            def forward(stage, *live: Tensor) -> object:
                self.rows += len(live[0])
                return first(*live)

        self.model = copy.copy(model)
        self.model.stages = (Stage(), *model.stages[1:])


@pytest.fixture(scope="module")
def backbone() -> nn.Module:
    torch.manual_seed(0)
    return mlp().eval()


def counting(backbone: nn.Module) -> Counting:
    if backbone not in SPLIT:  # tracing takes longer than all the rest
        SPLIT[backbone] = split(backbone, X[:4])
    return Counting(SPLIT[backbone])


def run(
    counted: Counting,
    stream: Iterable[object] | Recording,
    certify: Iterable[object] | None = None,
    *,
    seed: int = 0,
    workdir: Path | None = None,
    time_limit_s: float | None = None,
    bfloat16: bool = False,
) -> Recording:
    return record(
        counted.model,
        Classification(),
        stream,
        certify,
        seed=seed,
        workdir=workdir,
        time_limit_s=time_limit_s,
        bfloat16=bfloat16,
    )


def then(error: BaseException, *batches: Tensor) -> Iterator[Tensor]:
    yield from batches
    raise error


def same(one: Recording, other: Recording) -> bool:
    return (
        one.keys_N.tobytes() == other.keys_N.tobytes()
        and np.array_equal(one.part_N, other.part_N)
        and np.array_equal(one.logits_NC, other.logits_NC)
        and all(np.array_equal(a, b) for a, b in zip(one.features, other.features, strict=True))
    )


def test_records_answers_and_half_precision_features(backbone: nn.Module) -> None:
    recorded = run(counting(backbone), [(X[:300], torch.arange(300)), (X[300:], torch.arange(300, 400))])
    with torch.no_grad():
        assert np.allclose(recorded.logits_NC, backbone(X).numpy(), atol=1e-5)
    assert {feature.dtype for feature in recorded.features} == {np.dtype(np.float16)}
    assert recorded.label_N is not None
    assert recorded.label_N.tolist() == list(range(400))
    shares = [len(recorded.index(part)) / 400 for part in (TRAIN, TUNE, CERTIFY)]
    assert shares == pytest.approx([0.6, 0.15, 0.25], abs=0.08)


def test_duplicates_are_never_on_two_sides(backbone: nn.Module) -> None:
    recorded = run(counting(backbone), [X, X])
    assert np.array_equal(recorded.part_N[:400], recorded.part_N[400:])
    separate = run(counting(backbone), [X], [torch.cat([X[:50], OTHER])])
    assert separate.dropped_duplicates == 50
    train, held_out = separate.keys_N[separate.part_N == TRAIN], separate.keys_N[separate.part_N != TRAIN]
    assert (len(train), len(held_out)) == (400, 300)
    assert not set(train.tolist()) & set(held_out.tolist())


def test_dealt_again_moves_only_held_out_rows_and_keeps_their_shares(backbone: nn.Module) -> None:
    recorded = run(counting(backbone), [X])
    for seed in (0, 1):
        again = recorded.dealt_again(seed)
        assert np.array_equal(again.index(TRAIN), recorded.index(TRAIN))
        assert len(again.index(TUNE)) / (len(again.index(TUNE)) + len(again.index(CERTIFY))) == pytest.approx(
            0.35, abs=0.15
        )
        tune = {bytes(key) for key in again.keys_N[again.index(TUNE)]}
        assert len(again.sample) > 5
        assert set(again.sample.row_keys()) <= tune, "rows for timing and for show are still tuning rows"
    assert not np.array_equal(again.part_N, recorded.part_N)


def test_without_a_workdir_no_file_has_a_name(
    backbone: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    seen: list[list[str]] = []

    def watching() -> Iterator[Tensor]:
        for batch in X.split(100):
            yield batch
            seen.append(os.listdir(tmp_path))

    run(counting(backbone), watching())
    assert seen == [[]] * 4


@pytest.mark.parametrize("use_workdir", [False, True])
def test_a_broken_stream_keeps_what_was_recorded_and_resumes(
    backbone: nn.Module,
    tmp_path: Path,
    use_workdir: bool,
) -> None:
    workdir = tmp_path if use_workdir else None
    whole = run(counting(backbone), X.split(50))
    with pytest.raises(StreamError, match="broke at batch 3: ValueError: torn. Recording stopped after 150") as caught:
        run(counting(backbone), then(ValueError("torn"), *X[:150].split(50)), workdir=workdir)
    recorded = caught.value.recorded
    assert isinstance(recorded, Recording)
    assert np.array_equal(recorded.logits_NC, whole.logits_NC[:150])
    again = counting(backbone)
    if use_workdir:
        assert same(run(again, X.split(70), workdir=workdir), whole)
        assert again.rows == 250
    else:
        assert run(again, recorded) is recorded
        assert again.rows == 0


def test_an_interruption_is_still_a_keyboard_interrupt(backbone: nn.Module) -> None:
    with pytest.raises(KeyboardInterrupt, match="error.recorded") as caught:
        run(counting(backbone), then(KeyboardInterrupt(), X[:128]))
    assert isinstance(caught.value, RecordingInterrupted)
    assert len(caught.value.recorded) == 128


def test_a_recording_taken_over_gets_the_certification_stream(backbone: nn.Module) -> None:
    with pytest.raises(StreamError) as caught:
        run(counting(backbone), [X], then(ValueError(), OTHER[:100]))
    recorded = caught.value.recorded
    assert isinstance(recorded, Recording)
    again = counting(backbone)
    assert same(run(again, recorded, [OTHER]), run(counting(backbone), [X], [OTHER]))
    assert again.rows == 200


def test_a_recording_of_another_backbone_is_refused(backbone: nn.Module) -> None:
    recorded = run(counting(backbone), [X])
    with pytest.raises(InputError, match="made with another backbone"):
        run(counting(mlp().eval()), recorded)


class Normed(nn.Module):
    """Answers NaN for an input of zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(X.shape[1], 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.linear(x / x.abs().sum(1, keepdim=True))
        return out


def test_inputs_the_backbone_fails_on_keep_what_was_recorded(backbone: nn.Module) -> None:
    with pytest.raises(StreamError, match="fails on inputs near number 400: InputError: .*expected") as caught:
        run(counting(backbone), [X], [OTHER[:, :5]])
    assert len(caught.value.recorded) == 400  # type: ignore[arg-type]
    with pytest.raises(StreamError, match="answers NaN or infinity"):
        run(counting(Normed().eval()), [X, torch.zeros_like(X)])


def held_bytes(backbone: nn.Module, rows: int) -> int:
    """The most memory of Python and numpy while this many rows are recorded, as many again to certify on."""
    counted, generator = counting(backbone), torch.Generator().manual_seed(0)

    def stream() -> Iterator[Tensor]:
        for _ in range(rows // 100):
            yield torch.randn(100, 6, generator=generator)

    tracemalloc.start()
    try:
        run(counted, stream(), stream())
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def test_memory_grows_by_the_digests_alone(backbone: nn.Module) -> None:
    held_bytes(backbone, 200)  # what is imported and cached on the first use
    small, large = held_bytes(backbone, 1000), held_bytes(backbone, 4000)
    assert (large - small) / (2 * 3000) < 45, "bytes per recorded row; a set of digests takes more"


def test_digests_are_counted_as_a_counter_does() -> None:
    random = np.random.default_rng(0)
    keys = [random.integers(2, size=16).astype(np.uint8).tobytes()[:n] + bytes(16 - n) for n in (1, 2, 3, 16) * 20]
    digests, slow = module._Digests(np.frombuffer(b"".join(keys), module.KEY)), Counter(keys)
    asked = [*keys, *keys, bytes(16), b"\xff" * 16, *(key[:-1] + b"\x02" for key in keys)]
    assert [key in digests for key in asked] == [key in slow for key in asked]
    for key in asked:
        assert digests.take(key) is (slow[key] > 0)
        slow[key] -= slow[key] > 0
    assert bytes(16) not in module._Digests()


def test_a_fingerprint_is_that_of_the_sorted_digests(backbone: nn.Module) -> None:
    recorded = run(counting(backbone), [X])
    for part in (TRAIN, TUNE, CERTIFY):
        keys = sorted(bytes(key) for key in recorded.keys_N[recorded.part_N == part])
        assert recorded.fingerprint(part) == hashlib.sha256(b"".join(keys)).hexdigest()


def test_a_part_is_cut_by_the_shares() -> None:
    keys = [hashlib.blake2b(bytes([i]), digest_size=16).digest() for i in range(200)]
    for shares in (module.SHARES_ONE_STREAM, module.SHARES_CERTIFY_STREAM, (1.0, 0.0, 0.0)):
        for key in keys:
            entropy = [7, int.from_bytes(key[:8], "little")]
            share = np.random.SeedSequence(entropy).generate_state(1)[0] / 2**32
            slow = sum(bool(share >= edge) for edge in np.cumsum(shares)[:-1])
            assert module.part_of(key, 7, shares) == slow


def test_an_empty_stream(backbone: nn.Module) -> None:
    with pytest.raises(StreamError, match="the stream is empty"):
        run(counting(backbone), [])


@pytest.mark.parametrize("use_workdir", [False, True])
def test_a_full_disk_keeps_what_was_recorded(
    backbone: nn.Module,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    use_workdir: bool,
) -> None:
    written = module.write_all
    calls = 0

    def fills_up(file: object, data: bytes) -> None:
        nonlocal calls
        calls += 1
        if calls > 13:
            written(file, data[: len(data) // 2])  # type: ignore[arg-type]
            raise OSError(errno.ENOSPC, "No space left on device")
        written(file, data)  # type: ignore[arg-type]

    workdir = tmp_path if use_workdir else None
    whole = run(counting(backbone), [X])
    monkeypatch.setattr(module, "write_all", fills_up)
    with pytest.raises(StorageError, match="No space left on device.*Free some space") as caught:
        run(counting(backbone), [X], workdir=workdir)
    recorded = caught.value.recorded
    assert isinstance(recorded, Recording)
    assert np.array_equal(recorded.logits_NC, whole.logits_NC[:128])
    if use_workdir:
        monkeypatch.undo()
        again = counting(backbone)
        assert same(run(again, [X], workdir=workdir), whole)
        assert again.rows == 272
        assert np.array_equal(recorded.logits_NC, whole.logits_NC[:128])  # the first call's is still readable


def test_a_workdir_that_cannot_be_made(backbone: nn.Module, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="could not write the recording to"):
        run(counting(backbone), [X], workdir=tmp_path / "file")


def test_a_stream_in_another_order_or_cut_short_is_refused(backbone: nn.Module, tmp_path: Path) -> None:
    run(counting(backbone), [X], workdir=tmp_path)
    with pytest.raises(StreamError, match=r"differs from the one recorded .*input 0 onwards.*Switch shuffling off"):
        run(counting(backbone), [X.flip(0)], workdir=tmp_path)
    with pytest.raises(StreamError, match="ends after 100 inputs"):
        run(counting(backbone), [X[:100]], workdir=tmp_path)


def test_what_does_not_belong_to_this_call_is_recorded_afresh(backbone: nn.Module, tmp_path: Path) -> None:
    run(counting(backbone), [X], workdir=tmp_path)
    torch.manual_seed(5)
    for counted, seed in ((counting(mlp().eval()), 0), (counting(backbone), 3)):
        assert len(run(counted, [X], seed=seed, workdir=tmp_path)) == 400
        assert counted.rows == 400


@pytest.mark.parametrize("damage", ["short column", "broken journal"])
def test_damaged_files_are_recorded_afresh(backbone: nn.Module, tmp_path: Path, damage: str) -> None:
    whole = run(counting(backbone), [X], workdir=tmp_path)
    whole_logits = np.array(whole.logits_NC)
    folder = tmp_path / "recording"
    if damage == "short column":
        os.remove(folder / "logits.bin")
    else:
        (folder / "journal.json").write_text('{"rows": 4')
    counted = counting(backbone)
    assert np.array_equal(run(counted, [X], workdir=tmp_path).logits_NC, whole_logits)
    assert counted.rows == 400


def test_rows_behind_the_journal_are_cut_off(backbone: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(RecordingInterrupted):
        run(counting(backbone), then(KeyboardInterrupt(), X[:128]), workdir=tmp_path)
    for name in ("logits", "part", "consumed_stream"):
        with (tmp_path / "recording" / f"{name}.bin").open("ab") as file:
            file.write(b"torn")
    assert same(run(counting(backbone), [X], workdir=tmp_path), run(counting(backbone), [X]))


def test_a_stream_cut_by_time_is_not_read_further_on_resuming(backbone: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(RecordingInterrupted) as caught:
        certify = then(KeyboardInterrupt(), torch.cat([X[:10], OTHER[:90]]))
        run(counting(backbone), X.split(100), certify, workdir=tmp_path, time_limit_s=0)
    assert len(caught.value.recorded) == 190
    again = counting(backbone)
    certify = iter([torch.cat([X[:10], OTHER])])
    recorded = run(again, X.split(100), certify, workdir=tmp_path)
    assert len(recorded) == 400
    assert again.rows == 210
    assert recorded.dropped_duplicates == 10


def test_copies_are_asked_once_and_free_augmentations_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    images = torch.rand(60, 3, 16, 16)
    model = ResidualNet(width=4).eval()
    monkeypatch.setattr(module, "ASKED_ROWS", 80)
    first = Counting(split(model, images[:4]))
    recorded = run(first, [images], workdir=tmp_path)
    copies = recorded.counts()["augmented_copies"]
    assert copies == 80 // len(recorded.index(TRAIN)[recorded.copy_N[recorded.index(TRAIN)] == 0]) * (
        len(recorded.index(TRAIN)) - copies
    )
    assert not (recorded.copy_N[recorded.part_N != TRAIN]).any()
    again = Counting(split(model, images[:4]))
    resumed = run(again, [images], workdir=tmp_path)
    assert again.rows == 0
    assert same(resumed, recorded)
    assert resumed.free_augmentations == recorded.free_augmentations


# --- bfloat16 -------------------------------------------------------------------------------------


@pytest.fixture
def amx(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU that multiplies bfloat16 in hardware."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True}, raising=False)


class Telling(nn.Module):
    """A stage that notes the types of what it is given, and may refuse one."""

    def __init__(self, stage: nn.Module, refused: torch.dtype | None = None) -> None:
        super().__init__()
        self.stage, self.refused, self.given = stage, refused, set[torch.dtype]()

    def forward(self, *live: Tensor) -> object:
        self.given.add(live[0].dtype)
        if live[0].dtype == self.refused:
            raise TypeError(f"{self.refused} is not for this stage")
        return self.stage(*live)


@pytest.mark.usefixtures("amx")
def test_only_train_rows_are_run_in_bfloat16(backbone: nn.Module) -> None:
    batches = [
        (rows, torch.arange(start, start + 100)) for start, rows in zip(range(0, 400, 100), X.split(100), strict=True)
    ]
    exact = run(counting(backbone), batches)
    recorded = run(counting(backbone), batches, bfloat16=True)
    assert recorded.keys_N.tobytes() == exact.keys_N.tobytes(), "rows are in the order of the stream"
    assert recorded.label_N is not None
    assert recorded.label_N.tolist() == list(range(400))
    columns = [(recorded.logits_NC, exact.logits_NC), *zip(recorded.features, exact.features, strict=True)]
    train = recorded.part_N == TRAIN
    for column, (low, full) in enumerate(columns):
        assert np.array_equal(low[~train], full[~train]), "what is tuned and certified on is the backbone's own"
        assert np.allclose(low, full, atol=0.05)
        assert np.array_equal(low[train], full[train]) == (column == 1), "all but the inputs"
    assert (recorded.logits_NC.argmax(1) == exact.logits_NC.argmax(1)).mean() > 0.98


@pytest.mark.usefixtures("amx")
def test_a_backbone_that_loses_its_answers_in_bfloat16_is_run_as_it_is() -> None:
    torch.manual_seed(0)
    model = mlp().eval()
    *_, last = model.modules()
    assert isinstance(last, nn.Linear)
    with torch.no_grad():
        last.bias.add_(1000)  # the next number of bfloat16 is 1004
    assert same(run(counting(model), [X], bfloat16=True), run(counting(model), [X]))


@pytest.mark.usefixtures("amx")
def test_a_backbone_that_fails_in_bfloat16_is_run_as_it_is(backbone: nn.Module) -> None:
    counted = counting(backbone)
    *others, last = counted.model.stages
    telling = Telling(last, refused=torch.bfloat16)
    counted.model.stages = (*others, telling)
    recorded = run(counted, X.split(100), bfloat16=True)
    assert telling.given == {torch.float32, torch.bfloat16}, "it was tried"
    assert same(recorded, run(counting(backbone), X.split(100)))


@pytest.mark.usefixtures("amx")
def test_rows_that_become_nan_in_bfloat16_alone_are_run_as_they_are(backbone: nn.Module) -> None:
    counted = counting(backbone)
    *others, last = counted.model.stages

    class Overflowing(nn.Module):
        def forward(self, live: Tensor) -> object:
            later = live.dtype == torch.bfloat16 and counted.rows > 200
            return last(live * torch.nan if later else live)

    counted.model.stages = (*others, Overflowing())
    recorded, exact = run(counted, X.split(100), bfloat16=True), run(counting(backbone), X.split(100))
    assert np.array_equal(recorded.logits_NC[100:], exact.logits_NC[100:])
    assert not np.array_equal(recorded.logits_NC, exact.logits_NC)


@pytest.mark.usefixtures("amx")
def test_an_interrupted_recording_goes_on_in_the_same_precision(backbone: nn.Module, tmp_path: Path) -> None:
    with pytest.raises(RecordingInterrupted):
        run(counting(backbone), then(KeyboardInterrupt(), *X[:200].split(100)), workdir=tmp_path, bfloat16=True)
    resumed = run(counting(backbone), X.split(100), workdir=tmp_path, bfloat16=True)
    assert same(resumed, run(counting(backbone), X.split(100), bfloat16=True))
    assert not same(resumed, run(counting(backbone), X.split(100)))


def test_without_such_hardware_everything_is_as_the_backbone_computes_it(
    backbone: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
    assert same(run(counting(backbone), X.split(100), bfloat16=True), run(counting(backbone), X.split(100)))

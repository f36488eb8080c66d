"""Streams: every accepted form becomes one, labels are set aside, and what does not fit is named."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from models import MaskedEncoder, mlp
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from offramp.errors import InputError, StreamError
from offramp.streams import as_batch, read_stream

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(6)


def test_labels_of_a_tuple_and_a_mapping_are_set_aside() -> None:
    for raw in ((X, LABELS), [X, LABELS], {"input": X, "labels": LABELS}, {"input": X, "label": LABELS}):
        batch = as_batch(raw, mlp())
        assert batch.labels_B is LABELS
        assert len(batch.tensors) == 1
        assert batch.rows(slice(2, 4)).labels_B is not None


def test_no_label_reaches_the_backbone_where_both_keys_are_given() -> None:
    assert list(as_batch({"input": X, "labels": LABELS, "label": LABELS}).kwargs) == ["input"]


def test_two_arguments_are_not_mistaken_for_labels() -> None:
    ids = torch.ones(2, 5, dtype=torch.long)
    assert as_batch((ids, ids), MaskedEncoder()).labels_B is None
    assert as_batch((ids, ids, torch.ones(2, dtype=torch.long)), MaskedEncoder()).labels_B is not None


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ("text", "received a str"),
        ((X, ["a"]), "received a tuple of Tensor, list"),
        ((), "no input tensors"),
        ({"labels": LABELS}, "no input tensors"),
        ({"input": X, "name": "a"}, "these are not: name"),
        ((X, X[:2]), "share their first dimension"),
        (torch.tensor(1.0), "share their first dimension"),
        (X / 0, "NaN or infinity"),
        ({"input": X, "labels": X}, "labels must be a vector"),
    ],
)
def test_what_is_no_batch_is_named(raw: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        as_batch(raw, mlp())


def test_digests_tell_rows_apart_and_know_duplicates() -> None:
    keys = as_batch(torch.cat([X, X[:1]]).bfloat16()).row_keys()
    assert keys[0] == keys[-1]
    assert len(set(keys)) == 6
    one, other = {"a": X, "b": 2 * X}, {"b": 2 * X, "a": X}
    assert as_batch(one).row_keys() == as_batch(other).row_keys()


@pytest.mark.parametrize("stream", [X, {"input": X}, "text", 3])
def test_what_is_no_stream_is_refused(stream: object) -> None:
    with pytest.raises(InputError, match="a stream must yield batches; received a"):
        next(read_stream(stream))  # type: ignore[arg-type]


def test_a_loader_and_a_generator_give_the_same_batches() -> None:
    loader = DataLoader(TensorDataset(X, LABELS), batch_size=4)
    for stream in (loader, ((x, y) for x, y in loader)):
        batches = list(read_stream(stream, mlp()))
        assert [len(batch) for batch in batches] == [4, 2]
        assert batches[1].labels_B is not None


def test_empty_batches_are_skipped() -> None:
    assert [len(batch) for batch in read_stream([X[:0], X, X[:0]])] == [6]


@pytest.mark.parametrize(
    "second", [X[:, :3], X.double(), {"input": X}], ids=["other shape", "other type", "other argument"]
)
def test_mixed_rows_are_refused_with_the_number_of_the_batch(second: object) -> None:
    with pytest.raises(StreamError, match=r"batch 1 of the stream has rows of .*the first batch had \(4,\) float32"):
        list(read_stream([X, second]))


def test_a_stream_that_breaks_names_batch_and_reason() -> None:
    def breaks() -> Iterator[Tensor]:
        yield X
        raise OSError("unplugged")

    with pytest.raises(StreamError, match="broke at batch 1: OSError: unplugged"):
        list(read_stream(breaks()))
    with pytest.raises(StreamError, match="batch 1 of the stream: .*NaN"):
        list(read_stream([X, X * float("nan")]))

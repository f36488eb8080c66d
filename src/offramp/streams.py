"""A stream is anything that yields batches. Here each batch is brought into one form and checked.

A batch is a tensor, a tuple or list of tensors (the positional arguments of the backbone), or a mapping (its keyword
arguments). Labels are recognised, set aside and never shown to the backbone: the key `labels` or `label` of a mapping,
or the last element of a tuple that has one element more than `forward` requires and is a vector of integers.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from offramp.errors import InputError, StreamError

LABEL_KEYS = ("labels", "label")


@dataclass(frozen=True)
class Batch:
    """Arguments for one call of the backbone; every tensor has the batch as its first dimension."""

    args: tuple[Tensor, ...] = ()
    kwargs: Mapping[str, Tensor] = field(default_factory=dict)
    labels_B: Tensor | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return (*self.args, *self.kwargs.values())

    def __len__(self) -> int:
        return self.tensors[0].shape[0]

    def rows(self, index: Tensor | slice) -> Batch:
        """The rows that `index` (positions, a mask or a slice) selects."""
        return Batch(
            tuple(tensor[index] for tensor in self.args),
            {name: tensor[index] for name, tensor in self.kwargs.items()},
            None if self.labels_B is None else self.labels_B[index],
        )

    def to(self, device: torch.device | str) -> Batch:
        return Batch(
            tuple(tensor.to(device) for tensor in self.args),
            {name: tensor.to(device) for name, tensor in self.kwargs.items()},
            self.labels_B,
        )

    def passing(self, tensor: Tensor) -> Batch:
        """This tensor passed as the only one of this batch is, as the same type."""
        tensor = tensor.to(self.tensors[0].dtype)
        return Batch((tensor,)) if self.args else Batch((), {next(iter(self.kwargs)): tensor})

    def row_keys(self, secret: bytes = b"") -> list[bytes]:
        """A 16-byte digest of each row's inputs: equal for exact duplicates, and only for those. secret: without which
        nobody can find out whether an input that they guess has this digest."""
        ordered = (*self.args, *(self.kwargs[name] for name in sorted(self.kwargs)))
        columns = [tensor.detach().cpu().contiguous() for tensor in ordered]
        keys = []
        for row in range(len(self)):
            digest = hashlib.blake2b(digest_size=16, key=secret)
            for column in columns:
                digest.update(column[row].reshape(-1).view(torch.uint8).numpy().data)
            keys.append(digest.digest())
        return keys


def as_batch(raw: object, backbone: nn.Module | None = None) -> Batch:
    """One item of a stream as a Batch. Raises InputError when it is none of the accepted forms."""
    batch = _parse(raw, backbone)
    if not batch.tensors:
        raise InputError("a batch holds no input tensors; expected a tensor, a tuple of tensors or a dict of tensors")
    sizes = {tensor.shape[0] if tensor.ndim else None for tensor in batch.tensors}
    if len(sizes) != 1 or None in sizes:
        shapes = [tuple(tensor.shape) for tensor in batch.tensors]
        raise InputError(f"the tensors of a batch must share their first dimension (the batch); received {shapes}")
    for tensor in batch.tensors:
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
            raise InputError(
                f"a batch of shape {tuple(tensor.shape)} contains NaN or infinity; clean or drop such inputs first"
            )
    labels = batch.labels_B
    if labels is not None and not _are_labels(labels, batch.tensors[0]):
        raise InputError(
            f"labels must be a vector with one whole number per row; received {tuple(labels.shape)} "
            f"{_name(labels.dtype)} for {len(batch)} rows. Leave labels of another kind out: they are not needed."
        )
    return batch


def concatenated(batches: Sequence[Batch]) -> Batch:
    """The rows of all these batches as one, without labels."""
    args = tuple(torch.cat(column) for column in zip(*(batch.args for batch in batches), strict=True))
    names = list(batches[0].kwargs)
    return Batch(args, {name: torch.cat([batch.kwargs[name] for batch in batches]) for name in names})


def check_stream(stream: object) -> None:
    """Raises InputError for what is no stream, without reading any of it."""
    if isinstance(stream, (Tensor, Mapping, str)) or not isinstance(stream, Iterable):
        raise InputError(
            f"a stream must yield batches; received a {type(stream).__name__}. Pass a DataLoader or a list of batches; "
            "for one tensor of all inputs use `tensor.split(128)`."
        )


def read_stream(stream: Iterable[object], backbone: nn.Module | None = None) -> Iterator[Batch]:
    """The stream's batches, each checked against the first. Errors name the number of the batch (from 0)."""
    check_stream(stream)
    expected: list[tuple[str, tuple[int, ...], torch.dtype]] | None = None
    iterator: Iterator[object] | None = None
    number = 0
    while True:
        try:
            iterator = iter(stream) if iterator is None else iterator
            raw = next(iterator)
        except StopIteration:
            return
        except Exception as error:
            raise StreamError(f"the stream broke at batch {number}: {type(error).__name__}: {error}") from error
        try:
            batch = as_batch(raw, backbone)
        except InputError as error:
            raise StreamError(f"batch {number} of the stream: {error}") from error
        form = _form(batch)
        if expected is not None and form != expected:
            raise StreamError(
                f"batch {number} of the stream has rows of {_describe(form)}, the first batch had "
                f"{_describe(expected)}; all rows must have one shape and type: pad, resize or bucket them first."
            )
        expected = form
        number += 1
        if len(batch):
            yield batch


def _parse(raw: object, backbone: nn.Module | None) -> Batch:
    if isinstance(raw, Tensor):
        return Batch((raw,))
    if isinstance(raw, Mapping):
        kwargs = {str(name): value for name, value in raw.items() if isinstance(value, Tensor)}
        if len(kwargs) != len(raw):
            other = sorted(str(name) for name, value in raw.items() if not isinstance(value, Tensor))
            raise InputError(f"the values of a batch must be tensors; these are not: {', '.join(other)}")
        labels = [kwargs.pop(key) for key in LABEL_KEYS if key in kwargs]
        return Batch((), kwargs, labels[0] if labels else None)
    if isinstance(raw, (tuple, list)) and all(isinstance(value, Tensor) for value in raw):
        tensors: tuple[Tensor, ...] = tuple(raw)
        if len(tensors) == _required_arguments(backbone) + 1 and _are_labels(tensors[-1], tensors[0]):
            return Batch(tensors[:-1], {}, tensors[-1])
        return Batch(tensors)
    received = type(raw).__name__
    if isinstance(raw, (tuple, list)):
        received += f" of {', '.join(sorted({type(value).__name__ for value in raw}))}"
    raise InputError(f"a batch must be a tensor, a tuple of tensors or a dict of tensors; received a {received}")


def _required_arguments(backbone: nn.Module | None) -> int:
    if backbone is None:
        return 1
    parameters: list[Any] = list(inspect.signature(backbone.forward).parameters.values())
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    required = [p for p in parameters if p.kind in positional and p.default is inspect.Parameter.empty]
    return max(1, len(required))


def _are_labels(candidate: Tensor, inputs: Tensor) -> bool:
    integers = not candidate.is_floating_point() and not candidate.is_complex()
    return candidate.ndim == 1 and integers and inputs.ndim > 0 and len(candidate) == len(inputs)


def _form(batch: Batch) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
    """Name (empty for a positional argument), shape of a row and type of each tensor, in a fixed order."""
    named = [*(("", tensor) for tensor in batch.args), *sorted(batch.kwargs.items(), key=lambda item: item[0])]
    return [(name, tuple(tensor.shape[1:]), tensor.dtype) for name, tensor in named]


def _describe(form: list[tuple[str, tuple[int, ...], torch.dtype]]) -> str:
    return ", ".join(f"{name} {shape} {_name(dtype)}".strip() for name, shape, dtype in form)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")

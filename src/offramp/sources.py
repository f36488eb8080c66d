"""Models and data by name, for the shell: `resnet.py:build`, a transformers folder, a parquet file, a folder of images.

Everything is read from local files. A data source is re-iterable and decodes one batch at a time. Images come out as
float NCHW in [0, 1] unless a transform (`file.py:callable`, uint8 NCHW batch -> model input) says otherwise; text
goes through a tokenizer and is padded to one length. A column or array named `label` or `labels` becomes the labels.
"""

from __future__ import annotations

import importlib
import importlib.util
import io
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from offramp.errors import InputError, MissingExtraError, StreamError
from offramp.streams import LABEL_KEYS

MODEL_FORMS = (
    "`file.py:callable`, `package.module:callable`, a transformers folder, a `.pt2` file, `timm:NAME` or "
    "`torchvision:NAME`"
)
DATA_FORMS = "a .parquet file, a folder of images, a .npy or .npz file, or `file.py:callable`"
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})


@dataclass(frozen=True)
class DataOptions:
    """How a data source is read.

    column: the parquet column to read (default: `image`, `text`, or the only one that fits).
    transform: `file.py:callable`, uint8 NCHW batch of images (or batch of an array) -> model input.
    size: images are resized to size x size. tokenizer: a local folder. max_length: tokens per text.
    rows: `START:STOP`, as in a slice: one file can serve as two disjoint sources. limit: at most so many of them.
    """

    batch_size: int = 64
    column: str | None = None
    transform: str | None = None
    size: int | None = None
    tokenizer: str | None = None
    max_length: int = 128
    rows: str | None = None
    limit: int | None = None


# ---------------------------------------------------------------------------------------------------------- models


def load_model(spec: str) -> nn.Module:
    """The model that `spec` names, in evaluation mode. Raises InputError with the accepted forms."""
    for prefix, load in (("timm:", _timm_model), ("torchvision:", _torchvision_model)):
        if spec.startswith(prefix):
            return load(spec.removeprefix(prefix)).eval()
    path = Path(spec)
    if path.is_dir():
        return _transformers_model(path).eval()
    if path.suffix == ".pt2":
        return _exported_model(path)
    if ":" in spec:
        model = _named_callable(spec, "model")()
        if not isinstance(model, nn.Module):
            raise InputError(f"{spec} returned a {type(model).__name__}; expected a torch.nn.Module")
        return model.eval()
    raise InputError(f"no model at {spec!r}; expected {MODEL_FORMS}")


def _timm_model(name: str) -> nn.Module:
    from offramp.torchvision_shim import import_torchvision

    import_torchvision()  # timm needs it, and the repair must come first
    try:
        import timm
    except ImportError as error:
        raise _missing("timm models need timm", "vision") from error
    try:
        model: nn.Module = timm.create_model(name, pretrained=True)
    except (RuntimeError, ValueError) as error:
        raise InputError(f"timm could not make {name!r}: {error}") from error
    except OSError as error:
        raise _no_weights(f"timm:{name}", error) from error
    return model


def _torchvision_model(name: str) -> nn.Module:
    from offramp.torchvision_shim import import_torchvision

    torchvision = import_torchvision()
    try:
        model: nn.Module = torchvision.models.get_model(name, weights="DEFAULT")
    except (ValueError, KeyError) as error:
        raise InputError(f"torchvision has no model {name!r}: {error}") from error
    except OSError as error:
        raise _no_weights(f"torchvision:{name}", error) from error
    return model


def _no_weights(spec: str, error: OSError) -> InputError:
    return InputError(
        f"the weights of {spec} could not be read or downloaded: {error}. Without a connection pass "
        "`file.py:callable`, a function that loads the model from local files."
    )


def _transformers_model(folder: Path) -> nn.Module:
    config = folder / "config.json"
    if not config.is_file():
        raise InputError(
            f"the folder {folder} has no config.json; expected a saved transformers model, or {MODEL_FORMS}"
        )
    architectures = json.loads(config.read_text(encoding="utf-8")).get("architectures") or []
    kinds = ("ForImageClassification", "ForSequenceClassification")
    kind = next((kind for kind in kinds if any(name.endswith(kind) for name in architectures)), None)
    if kind is None:
        raise InputError(
            f"{config} names the architectures {architectures}; expected one that ends with {' or '.join(kinds)}. "
            "For another kind of model pass `file.py:callable`, a function that loads it."
        )
    _repair_torchvision()
    try:
        import transformers
    except ImportError as error:
        raise _missing("a transformers folder needs transformers", "hf") from error
    model: nn.Module = getattr(transformers, f"AutoModel{kind}").from_pretrained(folder, local_files_only=True)
    return model


def _repair_torchvision() -> None:
    """transformers imports torchvision where it finds it, and fails with it; without it, it does well."""
    if importlib.util.find_spec("torchvision") is not None:
        from offramp.torchvision_shim import import_torchvision

        import_torchvision()


def _exported_model(path: Path) -> nn.Module:
    if not path.is_file():
        raise InputError(f"no such file: {path}; expected a model saved by torch.export.save")
    try:
        module = torch.export.load(str(path)).module(check_guards=False)
    except Exception as error:
        raise InputError(f"{path} could not be read as a model saved by torch.export.save: {error}") from error
    for part in module.modules():
        part.training = False  # the mode is written into its operations; `eval()` is not allowed on it
    return module


# ------------------------------------------------------------------------------------------------------------ data


class Source(Protocol):
    """A data source: how many rows it has (None: unknown), and the raw rows of a range, batch by batch."""

    def __len__(self) -> int: ...

    def read(self, start: int, stop: int, batch_size: int) -> Iterator[object]: ...


class Stream:
    """The batches of a source: can be iterated any number of times, holds no decoded data.

    to_text: a row of token ids -> the text that it stands for, for the report's samples; None where inputs are no text.
    """

    def __init__(self, source: Source, options: DataOptions) -> None:
        start, stop = _row_range(options)
        self._source = source
        self._start = start
        self._stop = min(stop, len(source))
        self._batch_size = options.batch_size
        self.to_text = getattr(source, "to_text", None)
        if self._stop <= self._start:
            raise StreamError(
                f"rows {options.rows or 'all'} (limit {options.limit}) of {len(source)} leave nothing to read"
            )

    def __iter__(self) -> Iterator[object]:
        return self._source.read(self._start, self._stop, self._batch_size)

    @property
    def rows(self) -> int:
        return self._stop - self._start


def load_stream(spec: str, options: DataOptions | None = None) -> Iterable[object]:
    """The batches that `spec` names: a re-iterable stream. Raises InputError with the accepted forms."""
    options = options or DataOptions()
    path = Path(spec)
    if path.is_dir():
        return Stream(_ImageFolder(path, _image_decoder(options)), options)
    if path.is_file() and path.suffix in _FILE_SOURCES:
        return Stream(_FILE_SOURCES[path.suffix](path, options), options)
    if path.suffix in _FILE_SOURCES:
        raise InputError(f"no such file: {path}")
    if ":" in spec:
        return _CalledStream(_named_callable(spec, "data"), spec, options)
    raise InputError(f"no data at {spec!r}; expected {DATA_FORMS}")


class _CalledStream:
    """What a user's callable returns; called anew for every pass, so that a generator function works too."""

    def __init__(self, call: Callable[[], object], spec: str, options: DataOptions) -> None:
        self._call = call
        self._spec = spec
        self._start, self._stop = _row_range(options)

    def __iter__(self) -> Iterator[object]:
        batches = self._call()
        if not isinstance(batches, Iterable):
            raise InputError(
                f"{self._spec} returned a {type(batches).__name__}; expected something that yields batches"
            )
        position = 0
        for batch in batches:
            if position >= self._stop:
                return
            rows = _batch_rows(batch)
            first, last = max(self._start - position, 0), min(self._stop - position, rows)
            position += rows
            if first < last:
                yield batch if (first, last) == (0, rows) else _cut(batch, slice(first, last))


class _ImageFolder:
    """Image files below a folder, in the order of their names. Names of subfolders are not taken for labels."""

    def __init__(self, folder: Path, decode: Callable[[Sequence[Any]], object]) -> None:
        self._files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
        self._decode = decode
        if not self._files:
            raise InputError(f"the folder {folder} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")

    def __len__(self) -> int:
        return len(self._files)

    def read(self, start: int, stop: int, batch_size: int) -> Iterator[object]:
        for first in range(start, stop, batch_size):
            yield self._decode([path.read_bytes() for path in self._files[first : min(first + batch_size, stop)]])


class _Parquet:
    """One image or text column of a parquet file, with its labels where it has a column of that name."""

    def __init__(self, path: Path, options: DataOptions) -> None:
        try:
            import pyarrow.parquet
        except ImportError as error:
            raise _missing("reading parquet needs pyarrow", "data") from error
        self._path = path
        self._open = pyarrow.parquet.ParquetFile
        try:
            file = self._open(path)
        except (OSError, ValueError) as error:
            raise InputError(f"{path} could not be read as parquet: {error}") from error
        self._rows = int(file.metadata.num_rows)
        self._column, text = _pick_column(file.schema_arrow, options.column, path)
        self._label = next((key for key in LABEL_KEYS if key in file.schema_arrow.names and key != self._column), None)
        self.to_text: Callable[[Tensor], str] | None = None
        if text:
            self._decode, self.to_text = _text_decoder(options)
        else:
            self._decode = _image_decoder(options)

    def __len__(self) -> int:
        return self._rows

    def read(self, start: int, stop: int, batch_size: int) -> Iterator[object]:
        columns = [self._column] + ([self._label] if self._label else [])
        position = 0
        for table in self._open(self._path).iter_batches(batch_size=batch_size, columns=columns):
            first, last = max(start - position, 0), min(stop - position, len(table))
            position += len(table)
            if first < last:
                yield self._batch(table.slice(first, last - first))
            if position >= stop:
                return

    def _batch(self, table: Any) -> object:
        values = table.column(self._column).to_pylist()
        inputs = self._decode([value["bytes"] if isinstance(value, Mapping) else value for value in values])
        if self._label is None:
            return inputs
        labels = torch.tensor(table.column(self._label).to_pylist(), dtype=torch.int64)
        return {**inputs, "labels": labels} if isinstance(inputs, Mapping) else (inputs, labels)


class _Arrays:
    """A .npy array (memory-mapped), or the arrays of a .npz: one is the input, several are keyword arguments."""

    def __init__(self, path: Path, options: DataOptions) -> None:
        try:
            loaded = np.load(path, mmap_mode="r" if path.suffix == ".npy" else None, allow_pickle=False)
            arrays = (
                {"input": loaded} if isinstance(loaded, np.ndarray) else {name: loaded[name] for name in loaded.files}
            )
        except (OSError, ValueError) as error:
            raise InputError(f"{path} could not be read as numpy arrays: {error}") from error
        self._labels = next((arrays.pop(key) for key in LABEL_KEYS if key in arrays), None)
        self._arrays = arrays
        self._transform = None if options.transform is None else _named_callable(options.transform, "transform")
        lengths = {name: array.shape[0] if array.ndim else None for name, array in arrays.items()}
        if len(set(lengths.values())) != 1 or None in lengths.values():
            raise InputError(f"the arrays of {path} must share their first dimension (the rows); received {lengths}")
        self._rows = int(next(iter(arrays.values())).shape[0])

    def __len__(self) -> int:
        return self._rows

    def read(self, start: int, stop: int, batch_size: int) -> Iterator[object]:
        for first in range(start, stop, batch_size):
            rows = slice(first, min(first + batch_size, stop))
            tensors = {name: self._tensor(array[rows]) for name, array in self._arrays.items()}
            labels = None if self._labels is None else torch.from_numpy(np.array(self._labels[rows], dtype=np.int64))
            if len(tensors) > 1:
                yield tensors if labels is None else {**tensors, "labels": labels}
            else:
                (inputs,) = tensors.values()
                yield inputs if labels is None else (inputs, labels)

    def _tensor(self, rows: np.ndarray[Any, Any]) -> Tensor:
        tensor = torch.from_numpy(np.array(rows))
        if self._transform is not None:
            return _transformed(self._transform, tensor)
        if tensor.dtype == torch.uint8:
            return tensor.float() / 255
        return tensor.float() if tensor.dtype == torch.float64 else tensor


_FILE_SOURCES: dict[str, Callable[[Path, DataOptions], Source]] = {
    ".parquet": _Parquet,
    ".npy": _Arrays,
    ".npz": _Arrays,
}


# -------------------------------------------------------------------------------------------------------- decoding


def _image_decoder(options: DataOptions) -> Callable[[Sequence[Any]], object]:
    """Encoded images -> model input: RGB, resized if asked, then the transform or float in [0, 1]."""
    try:
        from PIL import Image
    except ImportError as error:
        raise _missing("reading images needs pillow", "data") from error
    transform = None if options.transform is None else _named_callable(options.transform, "transform")
    side = options.size

    def pixels(data: bytes) -> np.ndarray[Any, Any]:
        image = Image.open(io.BytesIO(data)).convert("RGB")
        if side is not None and image.size != (side, side):
            image = image.resize((side, side), Image.Resampling.BILINEAR)
        return np.asarray(image)

    def decode(encoded: Sequence[bytes]) -> Tensor:
        images = [pixels(data) for data in encoded]
        shapes = sorted({image.shape[:2] for image in images})
        if len(shapes) > 1:
            raise StreamError(
                f"images of one batch differ in height and width: {shapes[:4]}; set a size (`--size 128`)"
            )
        batch = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()
        return batch.float() / 255 if transform is None else _transformed(transform, batch)

    return decode


def _text_decoder(options: DataOptions) -> tuple[Callable[[Sequence[Any]], object], Callable[[Tensor], str]]:
    """Texts -> input_ids and attention_mask, padded or cut to one length; and a row of input_ids -> text."""
    if options.tokenizer is None:
        raise InputError("a text column needs a tokenizer: pass its folder (`--tokenizer FOLDER`)")
    if not Path(options.tokenizer).is_dir():
        raise InputError(f"no such folder: {options.tokenizer}; expected a saved tokenizer")
    _repair_torchvision()
    try:
        import transformers
    except ImportError as error:
        raise _missing("a tokenizer needs transformers", "hf") from error
    tokenizer = transformers.AutoTokenizer.from_pretrained(options.tokenizer, local_files_only=True)

    def decode(texts: Sequence[str]) -> dict[str, Tensor]:
        encoded = tokenizer(
            list(texts), padding="max_length", truncation=True, max_length=options.max_length, return_tensors="pt"
        )
        return {name: tensor for name, tensor in encoded.items() if isinstance(tensor, Tensor)}

    def to_text(ids_L: Tensor) -> str:
        return str(tokenizer.decode(ids_L.tolist(), skip_special_tokens=True))

    return decode, to_text


def _transformed(transform: Callable[..., object], batch: Tensor) -> Tensor:
    result = transform(batch)
    if not isinstance(result, Tensor) or result.ndim == 0 or len(result) != len(batch):
        received = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
        raise StreamError(f"the transform returned {received}; expected a tensor with the batch's {len(batch)} rows")
    return result


def _pick_column(schema: Any, wanted: str | None, path: Path) -> tuple[str, bool]:
    """The column to read and whether it holds text. Bytes and structs with a field `bytes` are images."""
    import pyarrow.types as kinds

    def is_text(kind: Any) -> bool:
        return bool(kinds.is_string(kind) or kinds.is_large_string(kind))

    def is_image(kind: Any) -> bool:
        binary = kinds.is_binary(kind) or kinds.is_large_binary(kind)
        return bool(binary or (kinds.is_struct(kind) and kind.get_field_index("bytes") >= 0))

    readable = {field.name: is_text(field.type) for field in schema if is_text(field.type) or is_image(field.type)}
    described = ", ".join(f"{field.name} ({field.type})" for field in schema)
    if wanted is not None:
        if wanted not in readable:
            raise InputError(f"{path} has no image or text column {wanted!r}; its columns: {described}")
        return wanted, readable[wanted]
    for name in ("image", "text"):
        if name in readable:
            return name, readable[name]
    if len(readable) == 1:
        return next(iter(readable.items()))
    raise InputError(f"which column of {path} holds the inputs? Pass `--column NAME`; its columns: {described}")


# ---------------------------------------------------------------------------------------------------------- shared


def _row_range(options: DataOptions) -> tuple[int, int]:
    if options.batch_size < 1:
        raise InputError(f"the batch size must be at least 1; received {options.batch_size}")
    start, stop = 0, sys.maxsize
    if options.rows is not None:
        left, colon, right = options.rows.partition(":")
        if not colon or not all(part == "" or part.isdecimal() for part in (left, right)):
            raise InputError(f"rows must look like START:STOP, for example 0:5000 or 5000: ; received {options.rows!r}")
        start, stop = int(left or 0), int(right or sys.maxsize)
    if options.limit is not None:
        if options.limit < 1:
            raise InputError(f"the limit must be at least 1; received {options.limit}")
        stop = min(stop, start + options.limit)
    return start, stop


def _batch_rows(batch: object) -> int:
    while not isinstance(batch, Tensor):
        if isinstance(batch, Mapping) and batch:
            batch = next(iter(batch.values()))
        elif isinstance(batch, Sequence) and batch and not isinstance(batch, str):
            batch = batch[0]
        else:
            raise InputError(f"a batch must hold tensors; received a {type(batch).__name__}")
    return len(batch)


def _cut(batch: Any, rows: slice) -> object:
    if isinstance(batch, Mapping):
        return {name: value[rows] for name, value in batch.items()}
    return batch[rows] if isinstance(batch, Tensor) else tuple(value[rows] for value in batch)


def _named_callable(spec: str, role: str) -> Callable[..., Any]:
    """`file.py:name` or `package.module:name`. A path with a drive letter keeps its colon: the last one counts."""
    place, _colon, name = spec.rpartition(":")
    if not place or not name.isidentifier():
        raise InputError(f"{role} {spec!r} is not understood; expected `file.py:callable` or `package.module:callable`")
    module = _module_from_file(Path(place)) if place.endswith(".py") else _module_by_name(place, role)
    found = getattr(module, name, None)
    if not callable(found):
        names = sorted(key for key, value in vars(module).items() if callable(value) and not key.startswith("_"))
        raise InputError(f"{place} has no callable {name!r}; it has: {', '.join(names) or 'none'}")
    call: Callable[..., Any] = found
    return call


def _module_from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise InputError(f"no such file: {path}")
    path = path.resolve()
    name = f"_offramp_user_{path.stem}_{abs(hash(str(path))):x}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise InputError(f"{path} could not be loaded as Python")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.insert(0, str(path.parent))  # a script's own folder, as when Python runs it
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise InputError(f"{path} broke while it was loaded: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(str(path.parent))
    return module


def _module_by_name(name: str, role: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise InputError(f"the {role}'s module {name!r} could not be imported: {error}") from error


def _missing(purpose: str, extra: str) -> MissingExtraError:
    return MissingExtraError(f"{purpose}, which is not installed; run: pip install 'offramp[{extra}]'")

"""Models and data by name: every form, read twice, and what is said when something is wrong."""

from __future__ import annotations

import builtins
import io
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from offramp.errors import InputError, MissingExtraError, StreamError
from offramp.sources import DataOptions, Stream, load_model, load_stream
from offramp.streams import Batch, read_stream

USER_CODE = """
import torch
from torch import nn

def build():
    return nn.Sequential(nn.Flatten(), nn.Dropout(), nn.Linear(12, 3))

def wrong():
    return "not a model"

def batches():
    for start in (0, 4, 8):
        yield torch.arange(start, start + 4).float().view(4, 1), torch.arange(start, start + 4)

def half(images_u8):
    assert images_u8.dtype == torch.uint8
    return images_u8.float() / 510

def shorten(images):
    return images[:1].float()
"""


@pytest.fixture
def code(tmp_path: Path) -> Path:
    path = tmp_path / "mine.py"
    path.write_text(USER_CODE)
    return path


def _png(value: int, side: int = 2, format: str = "PNG") -> bytes:
    image = pytest.importorskip("PIL.Image")
    buffer = io.BytesIO()
    image.fromarray(np.full((side, side, 3), value, dtype=np.uint8)).save(buffer, format=format)
    return buffer.getvalue()


def _write_parquet(path: Path, columns: dict[str, Any]) -> Path:
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    parquet.write_table(pa.table(columns), path, row_group_size=3)
    return path


def _read(stream: Iterable[object]) -> list[Batch]:
    return list(read_stream(stream))


def _inputs(stream: Iterable[object]) -> Tensor:
    return torch.cat([batch.tensors[0] for batch in _read(stream)])


def _labels(stream: Iterable[object]) -> list[int]:
    return [int(label) for batch in _read(stream) for label in (() if batch.labels_B is None else batch.labels_B)]


# --- models ---


def test_model_from_a_file_is_in_evaluation_mode(code: Path) -> None:
    model = load_model(f"{code}:build")
    assert isinstance(model, nn.Sequential)
    assert not model.training


def test_model_from_a_module(code: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(code.parent)
    assert isinstance(load_model("mine:build"), nn.Sequential)


def test_model_from_a_pt2_file(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    program = torch.export.export(
        model, (torch.randn(4, 3),), dynamic_shapes=({0: torch.export.Dim("batch", min=1, max=64)},)
    )
    torch.export.save(program, tmp_path / "model.pt2")
    x = torch.randn(5, 3)
    loaded = load_model(str(tmp_path / "model.pt2"))
    torch.testing.assert_close(loaded(x), model(x))
    assert not any(part.training for part in loaded.modules())


@pytest.mark.parametrize("kind", ["image", "text"])
def test_model_from_a_transformers_folder(tmp_path: Path, kind: str) -> None:
    transformers = pytest.importorskip("transformers")
    if kind == "image":
        config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], num_labels=3)
        saved = transformers.ResNetForImageClassification(config)
    else:
        config = transformers.BertConfig(
            vocab_size=30, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, num_labels=3
        )
        saved = transformers.BertForSequenceClassification(config)
    saved.save_pretrained(tmp_path)
    model = load_model(str(tmp_path))
    assert type(model) is type(saved)
    assert not model.training


def test_torchvision_and_timm_names_go_through_the_shim(monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[str] = []

    def get_model(name: str, weights: str) -> nn.Module:
        called.append(f"{name} {weights}")
        if name == "nothing":
            raise ValueError("Unknown model nothing")
        return nn.Linear(2, 2)

    shim = types.ModuleType("offramp.torchvision_shim")
    fake = types.SimpleNamespace(models=types.SimpleNamespace(get_model=get_model))
    monkeypatch.setattr(shim, "import_torchvision", lambda: fake, raising=False)
    monkeypatch.setitem(sys.modules, "offramp.torchvision_shim", shim)
    assert not load_model("torchvision:resnet18").training
    assert called == ["resnet18 DEFAULT"]
    with pytest.raises(InputError, match="torchvision has no model 'nothing'"):
        load_model("torchvision:nothing")

    timm = types.ModuleType("timm")
    monkeypatch.setattr(
        timm, "create_model", lambda name, pretrained: nn.Linear(len(name), int(pretrained)), raising=False
    )
    monkeypatch.setitem(sys.modules, "timm", timm)
    assert not load_model("timm:resnet10t").training


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("nothing", "no model at 'nothing'; expected `file.py:callable`"),
        ("nothing.py:build", "no such file: nothing.py"),
        ("nothing.pt2", "no such file: nothing.pt2"),
        ("{code}:missing", "has no callable 'missing'; it has: .*build"),
        ("{code}:wrong", "returned a str; expected a torch.nn.Module"),
        ("{code}:", "is not understood"),
        ("no.such.package:build", "'no.such.package' could not be imported"),
        ("{folder}", "has no config.json"),
    ],
)
def test_model_errors_say_what_to_do(code: Path, tmp_path: Path, spec: str, message: str) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(InputError, match=message):
        load_model(spec.format(code=code, folder=empty))


def test_transformers_folder_of_another_task_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"architectures": ["LlamaForCausalLM"]}')
    with pytest.raises(InputError, match=r"LlamaForCausalLM.*expected one that ends with ForImageClassification"):
        load_model(str(tmp_path))


def test_broken_user_file_is_named_with_its_error(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("1 / 0")
    with pytest.raises(InputError, match=r"broken\.py broke while it was loaded: ZeroDivisionError"):
        load_model(f"{tmp_path / 'broken.py'}:build")


# --- data ---


@pytest.mark.parametrize("as_struct", [True, False])
def test_parquet_images_with_labels(tmp_path: Path, *, as_struct: bool) -> None:
    images = [_png(25 * value) for value in range(8)]
    column = [{"bytes": image, "path": "x"} for image in images] if as_struct else images
    path = _write_parquet(tmp_path / "data.parquet", {"image": column, "label": list(range(8)), "note": ["n"] * 8})
    stream = load_stream(str(path), DataOptions(batch_size=3))
    for _pass in range(2):
        x = _inputs(stream)
        assert x.shape == (8, 3, 2, 2)
        assert x.dtype == torch.float32
        torch.testing.assert_close(x[:, 0, 0, 0] * 255, torch.arange(8.0) * 25)
        assert _labels(stream) == list(range(8))


@pytest.mark.parametrize(
    ("rows", "limit", "expected"),
    [
        ("2:5", None, [2, 3, 4]),
        ("5:", None, [5, 6, 7]),
        (":2", None, [0, 1]),
        (None, 3, [0, 1, 2]),
        ("4:", 2, [4, 5]),
        ("6:99", 9, [6, 7]),
    ],
)
@pytest.mark.parametrize("form", ["parquet", "npz", "callable", "folder"])
def test_rows_and_limit_select_the_same_in_every_form(
    tmp_path: Path, form: str, rows: str | None, limit: int | None, expected: list[int]
) -> None:
    spec = _eight_rows(tmp_path, form)
    stream = load_stream(spec, DataOptions(batch_size=3, rows=rows, limit=limit))
    for _pass in range(2):
        x = _inputs(stream).flatten(1)[:, 0]
        assert [round(255 * float(value)) for value in x] == expected


def _eight_rows(folder: Path, form: str) -> str:
    if form == "parquet":
        return str(
            _write_parquet(folder / "x.parquet", {"image": [_png(i) for i in range(8)], "label": list(range(8))})
        )
    if form == "npz":
        np.savez(folder / "x.npz", x=np.arange(8, dtype=np.uint8).reshape(8, 1, 1, 1), label=np.arange(8))
        return str(folder / "x.npz")
    if form == "folder":
        (folder / "images" / "deep").mkdir(parents=True)
        for i in range(8):
            (folder / "images" / "deep" / f"{i}.png").write_bytes(_png(i))
        (folder / "images" / "readme.txt").write_text("not an image")
        return str(folder / "images")
    (folder / "stream.py").write_text(
        "import torch\ndef batches():\n    for s in (0, 5):\n        r = torch.arange(s, min(s + 5, 8))\n"
        "        yield {'x': r.float().view(-1, 1) / 255, 'labels': r}\n"
    )
    return f"{folder / 'stream.py'}:batches"


def test_callable_keeps_labels_and_can_be_read_again(code: Path) -> None:
    stream = load_stream(f"{code}:batches", DataOptions(rows="3:9"))
    assert _labels(stream) == _labels(stream) == [3, 4, 5, 6, 7, 8]


def test_parquet_is_decoded_batch_by_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    opened: list[object] = []
    real: Callable[..., Any] = Image.open

    def noticed(file: object) -> Any:
        opened.append(file)
        return real(file)

    monkeypatch.setattr(Image, "open", noticed)
    path = _write_parquet(tmp_path / "x.parquet", {"image": [_png(i) for i in range(12)]})
    iterator: Iterator[object] = iter(load_stream(str(path), DataOptions(batch_size=2)))
    assert opened == []
    next(iterator)
    assert len(opened) == 2


def test_size_and_transform(tmp_path: Path, code: Path) -> None:
    path = _write_parquet(tmp_path / "x.parquet", {"image": [_png(100, side=2), _png(100, side=5)]})
    with pytest.raises(StreamError, match=r"differ in height and width: .*`--size 128`"):
        _read(load_stream(str(path)))
    x = _inputs(load_stream(str(path), DataOptions(size=4, transform=f"{code}:half")))
    assert x.shape == (2, 3, 4, 4)
    torch.testing.assert_close(x, torch.full_like(x, 100 / 510))


def test_transform_must_keep_the_rows(tmp_path: Path, code: Path) -> None:
    path = _write_parquet(tmp_path / "x.parquet", {"image": [_png(1), _png(2)]})
    with pytest.raises(
        StreamError, match=r"the transform returned \(1, 3, 2, 2\); expected a tensor with the batch's 2 rows"
    ):
        _read(load_stream(str(path), DataOptions(transform=f"{code}:shorten")))


def test_text_is_padded_to_one_length(tmp_path: Path) -> None:
    folder = _save_tokenizer(tmp_path / "tokenizer")
    path = _write_parquet(tmp_path / "x.parquet", {"text": ["good", "bad good film"], "label": [1, 0]})
    stream = load_stream(str(path), DataOptions(tokenizer=str(folder), max_length=6))
    assert isinstance(stream, Stream)
    assert stream.to_text is not None
    (batch,) = _read(stream)
    assert [stream.to_text(ids) for ids in batch.kwargs["input_ids"]] == ["good", "bad good film"]
    assert set(batch.kwargs) >= {"input_ids", "attention_mask"}
    assert batch.kwargs["input_ids"].shape == (2, 6)
    assert batch.kwargs["attention_mask"].sum(1).tolist() == [3, 5]
    assert batch.labels_B is not None
    assert batch.labels_B.tolist() == [1, 0]
    with pytest.raises(InputError, match="needs a tokenizer"):
        load_stream(str(path))


def _save_tokenizer(folder: Path) -> Path:
    transformers = pytest.importorskip("transformers")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "film"]
    vocabulary = {word: index for index, word in enumerate(words)}
    transformers.BertTokenizer(vocab=vocabulary).save_pretrained(folder)
    return folder


def test_arrays(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.full((5, 3), 2.0))
    assert getattr(load_stream(str(tmp_path / "a.npy")), "to_text", "") is None
    assert _inputs(load_stream(str(tmp_path / "a.npy"))).dtype == torch.float32
    np.savez(
        tmp_path / "b.npz",
        input_ids=np.ones((5, 3), dtype=np.int64),
        attention_mask=np.ones((5, 3), dtype=np.int64),
        labels=np.arange(5),
    )
    (batch,) = _read(load_stream(str(tmp_path / "b.npz")))
    assert set(batch.kwargs) == {"input_ids", "attention_mask"}
    assert batch.labels_B is not None


def test_arrays_are_never_unpickled(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(InputError, match="could not be read as numpy arrays"):
        load_stream(str(tmp_path / "a.npy"))


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("nothing.parquet", DataOptions(), "no such file: nothing.parquet"),
        ("nothing", DataOptions(), "no data at 'nothing'; expected a .parquet file, a folder of images"),
        ("{npy}", DataOptions(rows="5"), "rows must look like START:STOP"),
        ("{npy}", DataOptions(rows="-3:"), "rows must look like START:STOP"),
        ("{npy}", DataOptions(limit=0), "limit must be at least 1"),
        ("{npy}", DataOptions(batch_size=0), "batch size must be at least 1"),
        (
            "{parquet}",
            DataOptions(column="n"),
            r"no image or text column 'n'; its columns: a \(binary\), b \(binary\), n \(int64\)",
        ),
        ("{parquet}", DataOptions(), "which column .* holds the inputs"),
        ("{empty}", DataOptions(), "holds no images"),
    ],
)
def test_data_errors_say_what_to_do(tmp_path: Path, spec: str, options: DataOptions, message: str) -> None:
    np.save(tmp_path / "a.npy", np.zeros((4, 2), dtype=np.float32))
    _write_parquet(tmp_path / "a.parquet", {"a": [b"1"], "b": [b"2"], "n": [3]})
    (tmp_path / "empty").mkdir()
    places = {"npy": tmp_path / "a.npy", "parquet": tmp_path / "a.parquet", "empty": tmp_path / "empty"}
    with pytest.raises(InputError, match=message):
        load_stream(spec.format(**places), options)


def test_empty_selection_is_an_error(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((4, 2), dtype=np.float32))
    with pytest.raises(StreamError, match=r"rows 9: .* of 4 leave nothing to read"):
        load_stream(str(tmp_path / "a.npy"), DataOptions(rows="9:"))


@pytest.mark.parametrize(
    ("package", "extra", "call"),
    [
        ("pyarrow", "data", lambda folder: load_stream(str(folder / "a.parquet"))),
        ("PIL", "data", lambda folder: load_stream(str(folder))),
        ("transformers", "hf", lambda folder: load_model(str(folder))),
    ],
)
def test_missing_extras_name_the_install_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, extra: str, call: Callable[[Path], object]
) -> None:
    (tmp_path / "a.parquet").touch()
    (tmp_path / "config.json").write_text('{"architectures": ["ResNetForImageClassification"]}')
    real = builtins.__import__

    def refuse(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == package:
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(MissingExtraError, match=rf"pip install 'offramp\[{extra}\]'"):
        call(tmp_path)

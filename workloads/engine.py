"""The torch engine: load a text classifier once, encode texts, predict a batch, decode logits to
scores.

Letters: B texts, T tokens of the longest, C classes. No HTTP and no Ray here.
"""

import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from .config import UserError

Function = Literal["softmax", "sigmoid", "none"]


class Info(NamedTuple):
    """What there is to know of a model without loading it."""

    labels: list[str]
    max_tokens: int
    multi_label: bool
    notes: dict[str, Any]  # workloads.json; {} for a model from elsewhere


class Encoded(NamedTuple):
    """One text as token ids, and whether it was cut to fit."""

    ids: list[int]
    truncated: bool


def read_info(folder: Path, name: str) -> Info:
    """Reads a model folder's JSON files; raises UserError when it is not a text classifier."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kinds = config.get("architectures") or []
    if not any(kind.endswith("ForSequenceClassification") for kind in kinds):
        raise UserError(
            f"{name} is not a text classifier (its architecture is "
            f"{', '.join(kinds) or 'not given'}). "
            f"Train one on it: workloads train task.model.pretrained={name}"
        )
    path = folder / "workloads.json"
    notes = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    named = config.get("id2label") or {}
    labels = [named[key] for key in sorted(named, key=int)] or ["LABEL_0", "LABEL_1"]
    limit = int(config.get("max_position_embeddings", 512))
    if "roberta" in config.get("model_type", ""):
        limit -= 2  # its positions start after the padding's
    return Info(
        labels,
        min(notes.get("max_tokens", 512), limit),
        config.get("problem_type") == "multi_label_classification" or len(labels) == 1,
        notes,
    )


class TorchEngine:
    """A classifier in memory, in fp32: answers do not depend on who shares the batch."""

    def __init__(self, folder: Path, name: str, device: str = "cpu", threads: int = 1) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        from .model import quiet

        quiet()
        torch.set_num_threads(threads)
        self.info = read_info(folder, name)
        self.device = device
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        net = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
        self.net = net.to(device).eval()
        self.predict([self.encode(["warm up"])[0].ids])

    def encode(self, texts: list[str]) -> list[Encoded]:
        """Token ids of each text, cut to the model's limit."""
        batch = self.tokenizer(texts, truncation=True, max_length=self.info.max_tokens)
        return [
            Encoded(ids, bool(encoding.overflowing))
            for ids, encoding in zip(batch["input_ids"], batch.encodings, strict=True)
        ]

    @torch.inference_mode()
    def predict(self, rows: list[list[int]]) -> np.ndarray:
        """Logits (B, C) float32 of B rows of token ids, padded together."""
        longest = max(map(len, rows))
        ids = torch.full((len(rows), longest), self.tokenizer.pad_token_id or 0)  # (B, T) int64
        mask = torch.zeros_like(ids)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = 1
        logits = self.net(input_ids=ids.to(self.device), attention_mask=mask.to(self.device)).logits
        return logits.float().cpu().numpy()

    def decode(
        self, logits: np.ndarray, function: Function | None = None, top_k: int | None = None
    ) -> list[dict[str, Any]]:
        """Labels with scores, best first, of one row of logits (C,)."""
        scores = apply(function or ("sigmoid" if self.info.multi_label else "softmax"), logits)
        best = np.argsort(-scores, kind="stable")[:top_k]
        return [{"label": self.info.labels[i], "score": float(scores[i])} for i in best]


def apply(function: Function, logits: np.ndarray) -> np.ndarray:
    """Scores (C,) of logits (C,)."""
    wide = logits.astype(np.float64)
    if function == "none":
        return wide
    if function == "sigmoid":
        return 1 / (1 + np.exp(-wide))
    shifted = np.exp(wide - wide.max())
    return shifted / shifted.sum()

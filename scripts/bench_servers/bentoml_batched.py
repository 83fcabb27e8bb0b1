"""BentoML with its adaptive batching around a transformers model.

BENCH_MODEL=FOLDER bentoml serve bentoml_batched:Classifier --host 127.0.0.1 --port PORT
"""

import os

import bentoml
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer


@bentoml.service(workers=1, traffic={"timeout": 120, "max_concurrency": 1000})
class Classifier:
    """One worker; BentoML joins the lists of several requests."""

    def __init__(self) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(os.environ["BENCH_MODEL"])
        self.net = AutoModelForSequenceClassification.from_pretrained(os.environ["BENCH_MODEL"])
        self.net.eval()

    @bentoml.api(batchable=True, max_batch_size=32, max_latency_ms=100_000)
    @torch.inference_mode()
    def predict(self, inputs: list[str]) -> list[dict]:
        """The best label of each text."""
        batch = self.tokenizer(inputs, padding=True, truncation=True, return_tensors="pt")
        best = self.net(**batch).logits.softmax(-1).max(-1)
        found = zip(best.values.tolist(), best.indices.tolist(), strict=True)
        return [{"label": self.net.config.id2label[i], "score": score} for score, i in found]

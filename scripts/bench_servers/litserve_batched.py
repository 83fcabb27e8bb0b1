"""LitServe with its dynamic batching around a transformers model."""

import sys

import litserve
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer


class Classifier(litserve.LitAPI):
    """LitServe collects requests into lists; `predict` sees all their texts at once."""

    def setup(self, device: str) -> None:
        """Loads the model."""
        self.tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
        self.net = AutoModelForSequenceClassification.from_pretrained(sys.argv[1]).eval()

    def decode_request(self, request: dict) -> list[str]:
        """One text or several."""
        return [request["inputs"]] if isinstance(request["inputs"], str) else request["inputs"]

    @torch.inference_mode()
    def predict(self, requests: list[list[str]]) -> list[list[dict]]:
        """The best label of each text of each request."""
        texts = [text for request in requests for text in request]
        batch = self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        best = self.net(**batch).logits.softmax(-1).max(-1)
        named = self.net.config.id2label
        found = zip(best.values.tolist(), best.indices.tolist(), strict=True)
        answers = iter([{"label": named[i], "score": score} for score, i in found])
        return [[next(answers) for _ in request] for request in requests]


if __name__ == "__main__":
    api = Classifier(max_batch_size=16, batch_timeout=0.005, api_path="/predict")
    server = litserve.LitServer(api, accelerator="cpu", timeout=120)
    server.run(host="127.0.0.1", port=int(sys.argv[2]), generate_client_file=False)

"""The engines: load a model once, encode texts, predict a batch, decode logits to scores.

A model has heads: "logits" if it is a text classifier, and always "embedding", the pooled last
hidden state of length 1. Letters: B texts, T tokens of the longest, C classes, D values of an
embedding. No HTTP and no Ray here. The OpenVINO engines
import neither torch nor transformers: a replica is ready sooner and takes less memory. What they
load is made by `engines.ready`.
"""

import json
import math
import os
import threading
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal, NamedTuple

import numpy as np

from .config import UserError
from .sources import load_tokenizer

Function = Literal["softmax", "sigmoid", "none"]
Head = Literal["logits", "embedding"]
FP32, BF16, INT8 = "openvino-fp32", "openvino-bf16", "openvino-int8"
NETWORKS = {FP32: "fp32", BF16: "fp32", INT8: "int8"}  # folders of what is exported
EXPORTED_TOKENIZER = "tokenizer.json"
OFTEN = 100  # times that a row came alone with one length
MOST_LENGTHS, SPARE_BYTES = 4, 300_000_000  # for networks of one length
NETWORK_BYTES = 16_000_000  # that one takes whatever its weights do
CARD_CHARACTERS = 50_000


class Info(NamedTuple):
    """What there is to know of a model without loading it."""

    labels: list[str]  # none: it only embeds
    max_tokens: int
    multi_label: bool
    notes: dict[str, Any]  # workloads.json; {} for a model from elsewhere
    pad_id: int
    dimensions: int = 0  # of an embedding
    pooling: Literal["mean", "cls"] = "mean"
    vocabulary: int = 0
    card: str | None = None  # the start of README.md

    @property
    def head(self) -> Head:
        """What it is for."""
        return "logits" if self.labels else "embedding"


class Encoded(NamedTuple):
    """One text as token ids, and whether it was cut to fit."""

    ids: list[int]
    truncated: bool


Encoder = Callable[[list[str]], list[Encoded]]


def read_info(folder: Path, name: str) -> Info:
    """Reads a model folder's JSON files; raises UserError when it is neither a text classifier nor
    an encoder of texts."""
    config = _json(folder / "config.json")
    kinds = config.get("architectures") or []
    classifies = any(kind.endswith("ForSequenceClassification") for kind in kinds)
    if not classifies and not any(kind.endswith("Model") for kind in kinds):
        raise UserError(
            f"{name} neither classifies texts nor embeds them (its architecture is "
            f"{', '.join(kinds) or 'not given'}). "
            f"Train a classifier on it: workloads train task.model.pretrained={name}"
        )
    if config.get("auto_map"):
        _check_code(config, name)
    notes = _json(folder / "workloads.json")
    named = config.get("id2label") or {}
    labels = [named[key] for key in sorted(named, key=int)] or ["LABEL_0", "LABEL_1"]
    return Info(
        labels if classifies else [],
        _max_tokens(folder, config, notes),
        config.get("problem_type") == "multi_label_classification" or len(labels) == 1,
        notes,
        config.get("pad_token_id") or 0,
        config.get("hidden_size") or config.get("dim") or 0,
        _pooling(folder, name),
        config.get("vocab_size") or 0,
        _card(folder),
    )


def _check_code(config: dict[str, Any], name: str) -> None:
    from transformers import CONFIG_MAPPING

    if config.get("model_type") not in CONFIG_MAPPING:
        raise UserError(
            f"{name} needs code of its own (auto_map in its config.json), which is not run here: "
            "it could do anything. Models of the kinds that transformers has can be served"
        )


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as e:
        raise UserError(f"{file} is damaged: {e}. Copy or download the model again") from None
    if not isinstance(found, dict):
        raise UserError(f"{file} is damaged: {type(found).__name__} instead of keys and values")
    return found


def _card(folder: Path) -> str | None:
    file = folder / "README.md"
    if not file.is_file():
        return None
    with file.open(encoding="utf-8", errors="replace") as text:
        return text.read(CARD_CHARACTERS)


def _max_tokens(folder: Path, config: dict[str, Any], notes: dict[str, Any]) -> int:
    limit = int(config.get("max_position_embeddings", 512))
    if "roberta" in config.get("model_type", ""):
        limit -= 2  # its positions start after the padding's
    own = notes.get("max_tokens") or _json(folder / "sentence_bert_config.json").get(
        "max_seq_length"
    )
    return min(own or 512, limit)


def _pooling(folder: Path, name: str) -> Literal["mean", "cls"]:
    """As sentence-transformers' files say."""
    config = _json(folder / "1_Pooling" / "config.json")
    chosen = [key for key, on in config.items() if key.startswith("pooling_mode_") and on is True]
    if chosen in ([], ["pooling_mode_mean_tokens"]):
        return "mean"
    if chosen == ["pooling_mode_cls_token"]:
        return "cls"
    raise UserError(
        f"{name} pools its embeddings with {', '.join(chosen)}; here is mean and cls only"
    )


class Engine(ABC):
    """A model in memory. Any number of threads may use it at once."""

    kind: str
    streams: int  # so many threads get the most out of it
    info: Info
    encoder: Encoder
    limit: int  # of `pad`

    def encode(self, texts: list[str]) -> list[Encoded]:
        """Token ids of each text, cut to the model's limit."""
        return self.encoder(texts)

    @abstractmethod
    def predict(self, rows: list[list[int]], head: Head | None = None) -> np.ndarray:
        """Logits (B, C) or embeddings (B, D), float32, of B rows of token ids, padded together; by
        default what the model is for. The GIL is free meanwhile."""

    def decode(
        self, logits: np.ndarray, function: Function | None = None, top_k: int | None = None
    ) -> list[dict[str, Any]]:
        """Labels with scores, best first, of one row of logits (C,)."""
        function = function or ("sigmoid" if self.info.multi_label else "softmax")
        scores = apply(function, logits.tolist())
        best = sorted(zip(self.info.labels, scores, strict=True), key=_score, reverse=True)
        return [{"label": label, "score": score} for label, score in best[:top_k]]


def _score(pair: tuple[str, float]) -> float:
    return pair[1]


def apply(function: Function, logits: list[float]) -> list[float]:
    """Scores (C,) of logits (C,). Plain floats: for a few classes numpy takes longer."""
    if function == "none":
        return logits
    if function == "sigmoid":
        halves = [(x > 0, math.exp(-abs(x))) for x in logits]  # never overflows
        return [(1 if positive else small) / (1 + small) for positive, small in halves]
    highest = max(logits)
    shifted = [math.exp(x - highest) for x in logits]
    total = sum(shifted)
    return [x / total for x in shifted]


class TorchEngine(Engine):
    """transformers on a GPU, in bf16 where the chip has it, or on a CPU in fp32: there answers do
    not depend on who shares the batch."""

    kind = "torch"

    def __init__(
        self,
        folder: Path,
        name: str,
        device: str = "cpu",
        threads: int = 1,
        precision: str = "fp32",
    ) -> None:
        import torch
        from transformers import AutoModel, AutoModelForSequenceClassification

        from . import model

        model.quiet()
        if threads:
            torch.set_num_threads(threads)
        self.info = read_info(folder, name)
        self.device = device
        # A GPU is kept from building its plans anew for every length.
        self.limit = self.info.max_tokens if device == "cuda" else 0
        dtype, _ = model.precision(precision, device)
        self.streams = 1
        self.tokenizer = load_tokenizer(folder, name)
        self.encoder = transformers_encoder(self.tokenizer, self.info.max_tokens)
        # With scaled_dot_product_attention, where transformers has it for this network.
        kind = AutoModelForSequenceClassification if self.info.labels else AutoModel
        net = kind.from_pretrained(folder, dtype=dtype, trust_remote_code=False)
        self.net = net.to(device).eval()
        self.predict([self.encode(["warm up"])[0].ids])

    def predict(self, rows: list[list[int]], head: Head | None = None) -> np.ndarray:
        """Logits (B, C) or embeddings (B, D)."""
        import torch

        from . import model

        ids, mask = (
            torch.from_numpy(a).to(self.device) for a in pad(rows, self.info.pad_id, self.limit)
        )
        with torch.inference_mode():
            if (head or self.info.head) == "logits":
                found = self.net(input_ids=ids, attention_mask=mask).logits.float()
            else:
                found = model.embedded(self.net, ids, mask, self.info.pooling)
            return found.cpu().numpy()


class OpenvinoEngine(Engine):
    """An exported model on a CPU: `streams` forward passes at once, one thread each. The network
    of a head is set up when it is first asked for."""

    def __init__(
        self,
        folder: Path,
        name: str,
        kind: str,
        exported: Path,
        streams: int,
        spare_bytes: int = SPARE_BYTES,
        head: Head | None = None,
    ) -> None:
        self.kind, self.streams = kind, streams
        self.info = read_info(folder, name)
        # Every exact length would cost the time of a few passes at first, and megabytes for ever.
        self.limit = self.info.max_tokens
        tokenizer = exported / EXPORTED_TOKENIZER
        self.encoder = (
            fast_encoder(tokenizer)
            if tokenizer.is_file()
            else transformers_encoder(load_tokenizer(folder, name), self.info.max_tokens)
        )
        self.file = exported / NETWORKS[kind] / "model.xml"
        self.spare_bytes = spare_bytes
        self.networks: dict[str, Network] = {}
        self.making = threading.Lock()
        self.predict([self.encode(["warm up"])[0].ids], head)

    def predict(self, rows: list[list[int]], head: Head | None = None) -> np.ndarray:
        """Logits (B, C) or embeddings (B, D)."""
        ids, mask = pad(rows, self.info.pad_id, self.limit)
        return self._network(head or self.info.head)(ids, mask)

    def _network(self, head: Head) -> "Network":
        if head not in self.networks:
            with self.making:
                if head not in self.networks:
                    precision = "bf16" if self.kind == BF16 else "f32"
                    made = Network(self.file, head, precision, self.streams, self.spare_bytes)
                    self.networks[head] = made
        return self.networks[head]


class Network:
    """One head of an exported model.

    It takes every shape, and setting it up for another one than the last takes half as long as a
    row. So the lengths that rows come alone with often soon get networks of their own, in
    `spare_bytes` of memory.
    """

    def __init__(
        self, file: Path, head: Head, precision: str, streams: int, spare_bytes: int
    ) -> None:
        import openvino

        self.tensor, self.core, self.precision = openvino.Tensor, openvino.Core(), precision
        whole = self.core.read_model(file)  # whoever changes the file changes nothing here
        result = whole.output(head).get_node()
        self.network = openvino.Model([result], whole.get_parameters(), head)
        net = self._compile(self.network, streams)
        self.free: SimpleQueue[Any] = SimpleQueue()
        for _ in range(streams):
            self.free.put(net.create_infer_request())
        size = file.with_suffix(".bin").stat().st_size + NETWORK_BYTES
        self.to_make = min(MOST_LENGTHS, spare_bytes // size)  # networks of one length
        self.seen: Counter[int] = Counter()  # rows alone, by padded length
        self.fixed: dict[int, Any] = {}  # by length: requests that are free

    def _compile(self, net: Any, streams: int) -> Any:
        limits = {"NUM_STREAMS": streams, "INFERENCE_NUM_THREADS": streams}
        return self.core.compile_model(
            net, "CPU", {**limits, "INFERENCE_PRECISION_HINT": self.precision}
        )

    def __call__(self, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        """(B, T) int64 twice -> (B, C or D) float32."""
        length = ids.shape[1]
        if len(ids) == 1 and (request := self.fixed.pop(length, None)):
            try:
                return self._infer(request, ids, mask)
            finally:
                self.fixed[length] = request
        if len(ids) == 1 and self.to_make > 0:
            self._notice(length)
        request = self.free.get()
        try:
            return self._infer(request, ids, mask)
        finally:
            self.free.put(request)

    def _infer(self, request: Any, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
        # Half of what infer((ids, mask)) itself costs.
        request.set_input_tensor(0, self.tensor(ids, shared_memory=True))
        request.set_input_tensor(1, self.tensor(mask, shared_memory=True))
        request.infer()
        return request.get_output_tensor(0).data.copy()

    def _notice(self, length: int) -> None:
        """Has a network made beside the requests once a length has been seen often."""
        self.seen[length] = times = self.seen[length] + 1
        if times == OFTEN:
            self.to_make -= 1
            threading.Thread(target=self._make, args=(length,), daemon=True).start()

    def _make(self, length: int) -> None:
        net = self.network.clone()
        net.reshape(dict.fromkeys(range(2), (1, length)))
        self.fixed[length] = self._compile(net, 1).create_infer_request()


def load(
    folder: Path,
    name: str,
    kind: str = "torch",
    exported: Path | None = None,
    streams: int = 1,
    device: str = "cpu",
    precision: str = "auto",
    spare_bytes: int = SPARE_BYTES,
    head: Head | None = None,
) -> Engine:
    """The engine of that kind: torch, or openvino-fp32, -bf16 or -int8 of an `exported` folder;
    with `head` ready for it, by default for what the model is for."""
    if kind == "torch":
        return TorchEngine(folder, name, device, streams, precision if device == "cuda" else "fp32")
    assert exported is not None
    return OpenvinoEngine(folder, name, kind, exported, streams, spare_bytes, head)


def pad(rows: list[list[int]], pad_id: int, limit: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Token ids and mask, both (B, T) int64. With a limit, T is one of a few lengths up to it:
    kernels are made and kept for each shape."""
    lengths = [len(row) for row in rows]
    longest = padded(max(lengths), limit)
    ids = np.full((len(rows), longest), pad_id, dtype=np.int64)
    mask = np.zeros((len(rows), longest), dtype=np.int64)
    for i, row in enumerate(rows):
        ids[i, : lengths[i]] = row
        mask[i, : lengths[i]] = 1
    return ids, mask


def padded(longest: int, limit: int) -> int:
    """The T of a batch whose longest row is so long."""
    if not limit:
        return longest
    step = max(8, 1 << longest.bit_length() >> 4)  # an eighth at most beyond 64
    return min(max(limit, longest), -(-longest // step) * step)


def fast_encoder(file: Path) -> Encoder:
    """Encodes as the exported tokenizer does, which knows where to cut."""
    # Its threads would be as many as the machine has cores, whatever the replica may use.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))

    def encode(texts: list[str]) -> list[Encoded]:
        return [Encoded(e.ids, bool(e.overflowing)) for e in tokenizer.encode_batch_fast(texts)]

    return encode


def transformers_encoder(tokenizer: Any, max_tokens: int) -> Encoder:
    """Encodes as transformers does."""

    def encode(texts: list[str]) -> list[Encoded]:
        batch = tokenizer(texts, truncation=True, max_length=max_tokens)
        if not batch.encodings:  # not one of the tokenizers library
            whole = tokenizer(texts)["input_ids"]
            pairs = zip(batch["input_ids"], whole, strict=True)
            return [Encoded(ids, len(ids) < len(all_ids)) for ids, all_ids in pairs]
        return [
            Encoded(ids, bool(encoding.overflowing))
            for ids, encoding in zip(batch["input_ids"], batch.encodings, strict=True)
        ]

    return encode

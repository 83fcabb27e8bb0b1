"""Writes a classifier as OpenVINO networks in fp32 and int8, and its tokenizer as it is used.

    OUT/tokenizer.json  fp32/model.xml  fp32/model.bin  int8/model.xml  int8/model.bin

torch, openvino and nncf are imported here, by nothing that answers users.
"""

import contextlib
import logging
import shutil
import sys
import uuid
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .engine import BF16, EXPORTED_TOKENIZER, FP32, INT8, TorchEngine
from .model import embedded
from .samples import Rows, Samples

# OpenVINO and NNCF would report each conversion to their maker unasked, in some thirty messages of
# a process each. They do without this package, and then tell nobody.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]


class _Heads(torch.nn.Module):
    """All that a model answers, of two inputs: where it takes token types too, they are all zeros.

    Networks for one head are cut out of this one; they have their weights in common.
    """

    def __init__(self, engine: TorchEngine) -> None:
        super().__init__()
        self.net, self.info = engine.net, engine.info

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> dict[str, Any]:
        """(B, T) int64 twice -> logits (B, C), if there are classes, and embeddings (B, D)."""
        both, pooling = (input_ids, attention_mask), self.info.pooling
        with _first_token_only(self.net) if pooling == "cls" else contextlib.nullcontext():
            found = {"embedding": embedded(self.net, *both, pooling)}
        if self.info.labels:
            with _first_token_only(self.net):
                found["logits"] = self.net(input_ids=both[0], attention_mask=both[1]).logits
        return found


class _FirstTokenLayer(torch.nn.Module):
    """A BERT layer's output for the first token alone, which is all that a classifier and
    cls-pooling read of the last layer: its queries and its feed-forward part need no other."""

    def __init__(self, layer: torch.nn.Module) -> None:
        super().__init__()
        self.layer: Any = layer

    def forward(self, hidden: torch.Tensor, mask: torch.Tensor | None, *_: Any, **__: Any) -> Any:
        """(B, T, D) -> (B, 1, D)."""
        attention = self.layer.attention.self

        def heads(x: torch.Tensor) -> torch.Tensor:  # (B, T, D) -> (B, heads, T, D / heads)
            shape = (x.shape[0], -1, attention.num_attention_heads, attention.attention_head_size)
            return x.view(*shape).transpose(1, 2)

        first = hidden[:, :1]
        seen = torch.nn.functional.scaled_dot_product_attention(
            heads(attention.query(first)),
            heads(attention.key(hidden)),
            heads(attention.value(hidden)),
            attn_mask=None if mask is None else mask[:, :, :1],
        )
        seen = seen.transpose(1, 2).reshape(first.shape)
        return self.layer.feed_forward_chunk(self.layer.attention.output(seen, first))


@contextlib.contextmanager
def _first_token_only(net: Any) -> Iterator[None]:
    """The last layer of a BERT without what nobody reads: the same answers."""
    if type(net).__name__ not in ("BertForSequenceClassification", "BertModel"):
        yield
        return
    layers = net.base_model.encoder.layer
    last = layers[-1]
    layers[-1] = _FirstTokenLayer(last)
    try:
        yield
    finally:
        layers[-1] = last


def export(
    engine: TorchEngine, out: Path, known: Samples | None, say: Callable[[str], None]
) -> dict[str, str]:
    """Writes what is not there yet; returns the engines that cannot be, with the reason."""
    try:
        out.mkdir(parents=True, exist_ok=True)
        write_tokenizer(engine.tokenizer, engine.info.max_tokens, out / EXPORTED_TOKENIZER)
        if not (out / "fp32").is_dir():
            say("engines: exporting to OpenVINO")
            _aside(out / "fp32", lambda folder: _convert(engine, folder))
    except Exception as e:  # a network or an operation that OpenVINO does not know
        reason = f"OpenVINO cannot take this network: {' '.join(str(e).split())[:200]}"
        return dict.fromkeys((FP32, BF16, INT8), reason)
    if known is None:
        return {INT8: "there is nothing to calibrate and check it on (--texts FILE)"}
    try:
        if not (out / "int8").is_dir():
            say(f"engines: quantising to int8, calibrated on {len(known.calibration)} rows")
            _aside(out / "int8", lambda folder: _quantise(out / "fp32", folder, known.calibration))
    except Exception as e:
        return {INT8: f"cannot be quantised: {' '.join(str(e).split())[:200]}"}
    return {}


def _aside(final: Path, write: Callable[[Path], None]) -> None:
    """A folder written aside, then renamed; one that somebody else has made meanwhile stays."""
    aside = final.with_name(f".{final.name}.{uuid.uuid4().hex[:8]}")
    aside.mkdir()
    try:
        write(aside)
        aside.rename(final)
    except OSError:
        if not final.is_dir():
            raise
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def write_tokenizer(tokenizer: Any, max_tokens: int, file: Path) -> None:
    """The tokenizer that transformers makes of a model's files, which need not be the one in
    their tokenizer.json, with its cut; nothing where it is not of the tokenizers library."""
    if file.is_file() or not hasattr(tokenizer, "backend_tokenizer"):
        return
    tokenizer("", truncation=True, max_length=max_tokens)
    aside = file.with_name(f".{file.name}.{uuid.uuid4().hex[:8]}")
    aside.write_text(tokenizer.backend_tokenizer.to_str(), encoding="utf-8")
    aside.replace(file)


def _convert(engine: TorchEngine, folder: Path) -> None:
    import openvino

    ids = torch.full((2, 7), engine.info.pad_id)  # (B, T) int64
    mask = torch.tensor([[1] * 7, [1] * 5 + [0] * 2])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net = openvino.convert_model(
            _Heads(engine),
            example_input={"input_ids": ids, "attention_mask": mask},
            input=[(name, [-1, -1], openvino.Type.i64) for name in ("input_ids", "attention_mask")],
        )
    openvino.save_model(net, folder / "model.xml", compress_to_fp16=False)


def _quantise(source: Path, folder: Path, rows: Rows) -> None:
    """Post-training quantisation with activations' ranges from these rows."""
    import nncf
    import openvino

    nncf.set_log_level(logging.ERROR)
    # By length: a network of open shape is set up anew for every other one.
    ids = [np.asarray([row], dtype=np.int64) for row in sorted(rows, key=len)]  # (1, T)
    quantised = nncf.quantize(
        openvino.Core().read_model(source / "model.xml"),
        nncf.Dataset([(one, np.ones_like(one)) for one in ids]),
        model_type=nncf.ModelType.TRANSFORMER,
        subset_size=len(ids),
        # Tables that are looked up gain nothing, and would be turned back in memory of their own.
        ignored_scope=nncf.IgnoredScope(types=["Gather"], validate=False),
    )
    openvino.save_model(quantised, folder / "model.xml", compress_to_fp16=False)

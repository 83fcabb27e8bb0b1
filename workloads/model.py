"""Builds the text classifier and its tokenizer: from a pretrained model, or from scratch.

The driver prepares a `Base` once; trials and workers build from it without a file or a hub, so
nothing but the
driver needs to see the model's folder.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors import SafetensorError

from .config import Model, UserError
from .manifest import base_digest
from .sources import load_tokenizer, model_folder, pinned


@dataclass(frozen=True)
class Base:
    """What a classifier is built from: its configuration and, if it is pretrained, its weights."""

    config: dict[str, Any]  # of transformers, labels included
    weights: dict[str, np.ndarray] | None  # float32; without a head that does not fit
    pretrained: str | None = None  # its name, with the commit where it comes from the hub
    digest: str | None = None  # of the pretrained model's files

    @property
    def layers(self) -> int:
        """How many layers there are to choose from."""
        return int(self.config.get("num_hidden_layers") or self.config["n_layers"])


def quiet() -> None:
    """Keeps transformers' bars and advice off the terminal."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def prepare(model: Model, labels: list[str], texts: list[str], max_tokens: int) -> tuple[Base, Any]:
    """The base and the tokenizer of a task; from scratch, `texts` make the vocabulary.

    Raises UserError where the model cannot be had or does not fit the task.
    """
    quiet()
    if model.pretrained is None:
        return _scratch(model, labels, texts, max_tokens)
    folder = model_folder(model.pretrained)
    return _pretrained(model, labels, folder, max_tokens)


def _scratch(
    model: Model, labels: list[str], texts: list[str], max_tokens: int
) -> tuple[Base, Any]:
    from transformers import BertConfig

    tokenizer = train_tokenizer(texts, model.vocab_size)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=model.hidden,
        num_hidden_layers=model.layers or 2,
        num_attention_heads=model.heads,
        intermediate_size=4 * model.hidden,
        max_position_embeddings=max(512, max_tokens),
        initializer_range=0.02 * (768 / model.hidden) ** 0.5,  # BERT's 0.02, scaled to the width
        pad_token_id=tokenizer.pad_token_id,
        architectures=["BertForSequenceClassification"],
        **_label_maps(labels),
    )
    return Base(config.to_dict(), None), tokenizer


def train_tokenizer(texts: list[str], vocab_size: int) -> Any:
    """A lower-casing WordPiece tokenizer, learned from the texts."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import BertTokenizer

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    pieces = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    pieces.normalizer = normalizers.BertNormalizer(lowercase=True)
    pieces.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    seen = {c for text in texts for c in pieces.normalizer.normalize_str(text) if not c.isspace()}
    trainer = trainers.WordPieceTrainer(
        vocab_size=vocab_size,
        # All "##x" of one character first, in order: the trainer would number them as its hash
        # table comes, another way each time, and break ties between merges by these numbers.
        special_tokens=[*special, *(f"##{c}" for c in sorted(seen))],
        continuing_subword_prefix="##",
        show_progress=False,
    )
    pieces.train_from_iterator(texts, trainer)
    return BertTokenizer(vocab=pieces.get_vocab(), model_max_length=512)


def _pretrained(model: Model, labels: list[str], folder: Path, max_tokens: int) -> tuple[Base, Any]:
    from transformers import AutoConfig, AutoModelForSequenceClassification

    try:
        # Without the last, transformers asks on a terminal whether it may run a model's own code.
        ours: Any = {"trust_remote_code": False}
        config = AutoConfig.from_pretrained(folder, **_label_maps(labels), **ours)
        tokenizer = load_tokenizer(folder, str(model.pretrained))
        net, info = AutoModelForSequenceClassification.from_pretrained(
            folder,
            config=config,
            dtype=torch.float32,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **ours,
        )
    except UserError:
        raise
    except (OSError, ValueError, KeyError, SafetensorError) as e:
        raise UserError(
            f"model.pretrained '{model.pretrained}' cannot be loaded as a text classifier: "
            f"{' '.join(str(e).split())[:300]}"
        ) from None
    positions = getattr(config, "max_position_embeddings", max_tokens)
    # RoBERTa and its kin count positions from behind that of the padding.
    table = getattr(getattr(net.base_model, "embeddings", None), "position_embeddings", None)
    if (padding := getattr(table, "padding_idx", None)) is not None:
        positions -= padding + 1
    if max_tokens > positions:
        raise UserError(
            f"data.max_tokens is {max_tokens} but model.pretrained '{model.pretrained}' "
            f"reads {positions} at most"
        )
    # A new or misfitting head is left out: it is drawn from the task's seed instead.
    new = {key if isinstance(key, str) else key[0] for key in _not_loaded(info)}
    weights = {k: v.numpy() for k, v in net.state_dict().items() if k not in new}
    name, digest = pinned(str(model.pretrained), folder), base_digest(folder)
    base = Base(config.to_dict(), weights, name, digest)
    check_layers(model.layers or 0, base)
    return base, tokenizer


def _not_loaded(info: dict[str, Any]) -> Iterator[Any]:
    yield from info["missing_keys"]
    yield from info["mismatched_keys"]


def _label_maps(labels: list[str]) -> dict[str, Any]:
    return {"id2label": dict(enumerate(labels)), "label2id": {n: i for i, n in enumerate(labels)}}


def check_layers(layers: int, base: Base) -> None:
    """Raises UserError for more layers than a pretrained model has: they would be random."""
    if base.weights is not None and layers > base.layers:
        raise UserError(
            f"model.layers is {layers} but model.pretrained '{base.pretrained}' has {base.layers}"
        )


def build(base: Base, model: Model, seed: int) -> torch.nn.Module:
    """The classifier of this task in fp32 on the CPU, dropout and depth as the task says.

    Its forward takes input_ids (B, T) and attention_mask (B, T), and returns logits (B, C).
    """
    from transformers import AutoConfig, AutoModelForSequenceClassification

    quiet()
    check_layers(model.layers or 0, base)
    tree = dict(base.config)
    config = AutoConfig.for_model(tree.pop("model_type"), **tree)
    config.num_hidden_layers = model.layers or base.layers
    for name in (
        *("hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"),  # BERT
        *("dropout", "attention_dropout", "seq_classif_dropout"),  # DistilBERT
    ):
        if hasattr(config, name):
            setattr(config, name, model.dropout)
    config.dtype = torch.float32
    torch.manual_seed(seed)
    # On CPUs torch's fused attention is slower than the plain one for short texts.
    attention = "sdpa" if torch.cuda.is_available() else "eager"
    net = AutoModelForSequenceClassification.from_config(config, attn_implementation=attention)
    if base.weights is not None:
        own = net.state_dict()
        fitting = {k: torch.tensor(v) for k, v in base.weights.items() if k in own}
        net.load_state_dict(fitting, strict=False)
    return net


def save(net: torch.nn.Module, tokenizer: Any, folder: Path) -> None:
    """Writes what plain transformers loads: config, safetensors, tokenizer."""
    quiet()
    net.save_pretrained(folder)  # type: ignore[operator]
    tokenizer.save_pretrained(folder)


@functools.cache
def bf16_in_hardware(device: str) -> tuple[bool, str]:
    """Whether a device computes in bfloat16 itself, and how that is known."""
    if device == "cuda":
        name = torch.cuda.get_device_name()
        major, _ = torch.cuda.get_device_capability()
        return major >= 8, f"{name}, compute capability {major}.x"
    found = [
        k
        for k, v in getattr(torch.cpu, "get_capabilities", dict)().items()
        if v and k in _BF16_FLAGS
    ]
    return bool(found), f"this CPU has {' and '.join(found) or 'none of ' + ', '.join(_BF16_FLAGS)}"


_BF16_FLAGS = ("avx512_bf16", "amx_bf16", "arm_bf16")


def check_device(device: str) -> None:
    """Raises UserError where this torch cannot use the device at all, whatever the nodes have."""
    if device == "cuda" and torch.version.cuda is None and torch.version.hip is None:
        raise UserError(
            f"device is 'cuda' but torch {torch.__version__} is a build without CUDA: pip install "
            f"--force-reinstall torch=={torch.__version__.partition('+')[0]} on every node (on "
            "Linux PyPI has the CUDA build), or give target.device=cpu"
        )


_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def precision(wanted: str, device: str) -> tuple[torch.dtype, str]:
    """The dtype of the arithmetic and why: auto takes bf16 where the chip has it."""
    # fp32 means fp32: products are rounded to TF32 only where the target says so.
    torch.set_float32_matmul_precision("high" if wanted == "tf32" else "highest")
    if wanted != "auto":
        return _DTYPES.get(wanted, torch.float32), f"{wanted} (as the target says)"
    has, why = bf16_in_hardware(device)
    return (torch.bfloat16, f"bf16 ({why})") if has else (torch.float32, f"fp32 ({why})")


def embedded(
    net: Any, ids: torch.Tensor, mask: torch.Tensor, pooling: Literal["mean", "cls"]
) -> torch.Tensor:
    """(B, T) int64 twice -> embeddings (B, D) float32 of length 1: the mean of the last hidden
    states of a text, or its first one, as sentence-transformers has them."""
    hidden = net.base_model(input_ids=ids, attention_mask=mask).last_hidden_state.float()
    seen = mask.unsqueeze(-1).to(hidden.dtype)
    pooled = (hidden * seen).sum(1) / seen.sum(1) if pooling == "mean" else hidden[:, 0]
    return torch.nn.functional.normalize(pooled, dim=1)

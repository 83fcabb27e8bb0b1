"""Word embeddings trained by the rows in use: what comes out is AdamW on the whole table."""

import copy
from typing import Any

import numpy as np
import pytest
import torch

from workloads import loop, model, words
from workloads.config import Model, Train


def drift(decay: float, least: float, steps: int = 300) -> float:
    """The largest difference between rows in use and torch's AdamW on all, words drawn as in a
    language, gradients between `least` and 1."""
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    whole = torch.nn.Parameter(torch.randn(200, 8))
    some = words.Words(whole.detach().clone(), decay)
    plain = torch.optim.AdamW([whole], lr=1.0, weight_decay=decay)
    odds = 1 / np.arange(1, 201)
    for step in range(steps):
        plain.param_groups[0]["lr"] = rate = 1e-2 * (1 - step / steps)
        used = np.unique(rng.choice(200, 20, p=odds / odds.sum()))
        leaf = some.use(used).rows
        leaf.grad = torch.randn(len(used), 8) * 10 ** rng.uniform(np.log10(least), 0)
        whole.grad = torch.zeros_like(whole)
        whole.grad[torch.from_numpy(used)] = leaf.grad
        plain.step()
        some.step(rate)
    some.settle()
    moments = plain.state[whole]
    assert torch.allclose(some.m, moments["exp_avg"], atol=1e-6)
    assert torch.allclose(some.v, moments["exp_avg_sq"], atol=1e-6)
    return float((some.table - whole).abs().max())


@pytest.mark.parametrize("decay", [0.0, 0.5])
def test_rows_in_use_end_where_adamw_on_the_whole_table_ends(decay: float):
    assert drift(decay, least=1e-3) < 2e-5


def test_nothing_is_kept_of_steps_long_past(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(words, "_FORGETS", 50)
    assert drift(0.5, least=1e-3) < 2e-5


def test_gradients_as_small_as_adamws_epsilon_hardly_matter():
    assert drift(0.5, least=1e-8) < 2e-3


def trained(
    prepared: Any, evaluations: int = 4, **start: Any
) -> tuple[list[float], dict[str, Any]]:
    """The losses of a short training of a BERT and its last state, copied."""
    tiny = Model(hidden=16, heads=2, layers=1, vocab_size=200, dropout=0)
    net = model.build(prepared.base, tiny, seed=0)
    plan = Train(epochs=4, global_batch=8, lr=3e-3, evals_per_epoch=1)
    losses = []
    for point in loop.train(net, prepared.rows, prepared.held_out, plan, loop.Place(), **start):
        losses.append(point.metrics["eval_loss"])
        if len(losses) == evaluations:
            break
    return losses, copy.deepcopy(point.state())


def as_a_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU."""
    monkeypatch.setattr(loop, "_words", lambda *args: None)


def near(one: dict[str, Any], other: dict[str, Any]) -> None:
    for name, weight in other["model"].items():
        if "key.bias" not in name:  # its gradient is rounding and nothing else
            assert torch.allclose(one["model"][name], weight, atol=2e-5), name
    for moment in "mv":
        assert torch.allclose(one["words"][moment], other["words"][moment], atol=1e-6)
    assert one["words"]["steps"] == other["words"]["steps"] > 0
    assert one["optimizer"].keys() == other["optimizer"].keys()
    assert one["optimizer"]["state"].keys() == other["optimizer"]["state"].keys()


def test_a_bert_trained_by_the_words_in_use_is_the_bert_of_plain_adamw(
    prepared: Any, monkeypatch: pytest.MonkeyPatch
):
    losses, state = trained(prepared)
    as_a_whole(monkeypatch)
    plain_losses, plain = trained(prepared)
    assert losses == pytest.approx(plain_losses, abs=1e-5)
    near(state, plain)


def test_a_checkpoint_of_either_way_goes_on_in_the_other(
    prepared: Any, monkeypatch: pytest.MonkeyPatch
):
    ends = []
    for first_whole in (False, True):
        with monkeypatch.context() as patch:
            if first_whole:
                as_a_whole(patch)
            state = trained(prepared, evaluations=2)[1]
        with monkeypatch.context() as patch:
            if not first_whole:
                as_a_whole(patch)
            ends.append(trained(prepared, start=state)[1])
    near(*ends)
    near(trained(prepared)[1], ends[0])

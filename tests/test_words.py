"""Word embeddings trained by the rows in use: what comes out is AdamW on the whole table."""

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


def trained(prepared: Any, **start: Any) -> tuple[list[float], dict[str, Any]]:
    """The losses of a short training of a BERT and its last state."""
    tiny = Model(hidden=16, heads=2, layers=1, vocab_size=200, dropout=0)
    net = model.build(prepared.base, tiny, seed=0)
    plan = Train(epochs=4, global_batch=8, lr=3e-3, evals_per_epoch=1)
    points = list(loop.train(net, prepared.rows, prepared.held_out, plan, loop.Place(), **start))
    return [p.metrics["eval_loss"] for p in points], points[-1].state()


def test_a_bert_trained_by_the_words_in_use_is_the_bert_of_plain_adamw(
    prepared: Any, monkeypatch: pytest.MonkeyPatch
):
    losses, state = trained(prepared)
    monkeypatch.setattr(loop, "table_of", lambda net: None)
    plain_losses, plain = trained(prepared)
    assert losses == pytest.approx(plain_losses, abs=1e-5)
    for name, weight in plain["model"].items():
        if "key.bias" not in name:  # its gradient is rounding and nothing else
            assert torch.allclose(state["model"][name], weight, atol=2e-5), name
    assert "words" in state
    assert "words" not in plain

"""The table of word embeddings, trained by the rows that a batch holds: the others are neither sent
between workers nor touched, and catch up when they are next needed.

A batch of 64 short texts holds some 600 of BERT's 30,522 words, but the table is most of a small
model: its gradient would be nearly all of the all-reduce and of AdamW's work. What comes out is
what AdamW gives on the whole table, up to rounding: a row whose gradient is zero for some steps
moves by a known multiple of m / sqrt(v), so all of them are made up for at once.

Letters: V words of the vocabulary, U words of a batch, H width.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist

BETA1, BETA2, EPS = 0.9, 0.999, 1e-8  # torch's AdamW
_FORGETS = 1000  # steps after which all rows catch up: bounds what is remembered of each step
_ABSOLUTE = ("bert", "distilbert", "electra")  # positions do not depend on which ids are padding


class InUse(NamedTuple):
    """The words of a batch, and a leaf that takes their gradient."""

    ids: np.ndarray  # (U,) ascending
    rows: torch.Tensor  # (U, H)


class Words:
    """AdamW (Loshchilov & Hutter 2019) on the rows of a table (V, H) that are used.

    `use` before a step makes a leaf of the batch's rows, `step` moves them, `settle` brings the
    whole table up to date: before anybody reads it.
    """

    def __init__(self, table: torch.nn.Parameter, weight_decay: float) -> None:
        self.table, self.decay = table, weight_decay
        self.m, self.v = torch.zeros_like(table), torch.zeros_like(table)
        self.steps = 0
        self.last = np.zeros(len(table), np.int64)  # (V,) the step up to which a row is right
        self._forget()

    def _forget(self) -> None:
        # A row that is right up to step first + i is right now as
        # shrink[i] * row - moved[i] * m / (sqrt(v) + eps[i] / moved[i]).
        self.first, self.shrink = self.steps, np.ones(1)
        self.moved, self.eps = np.zeros(1), np.zeros(1)

    def state(self) -> dict[str, Any]:
        """What resuming needs beside the table itself."""
        self.settle()
        return {"m": self.m, "v": self.v, "steps": self.steps}

    def load(self, state: dict[str, Any]) -> None:
        """Goes on from a `state`; the table has been loaded with the rest of the model."""
        self.m.copy_(state["m"])
        self.v.copy_(state["v"])
        self.steps = state["steps"]
        self.last[:] = self.steps
        self._forget()

    def use(self, words: np.ndarray) -> InUse:
        """The rows of some words, in ascending order."""
        self._catch_up(words)
        self.ids, self.words = words, _on(self.table.device, words)
        self.rows = self.table.detach()[self.words].requires_grad_()
        return InUse(words, self.rows)

    @torch.no_grad()
    def share_gradient(self, world: int) -> None:
        """The mean over the ranks, as DDP does it for the rest of the model."""
        assert self.rows.grad is not None
        if world > 1:
            dist.all_reduce(self.rows.grad.div_(world))

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One step of AdamW on the rows in use; the others note what they have missed."""
        self.steps += 1
        t, grad, shrink = self.steps, self.rows.grad, 1 - lr * self.decay
        assert grad is not None
        m = self.m[self.words].lerp_(grad, 1 - BETA1)
        v = self.v[self.words].mul_(BETA2).addcmul_(grad, grad, value=1 - BETA2)
        denominator = (v / (1 - BETA2**t)).sqrt_().add_(EPS)
        row = self.rows.detach().mul_(shrink)
        row.addcdiv_(m, denominator, value=-lr / (1 - BETA1**t))
        for whole, part in ((self.table, row), (self.m, m), (self.v, v)):
            whole[self.words] = part
        self.last[self.ids] = t
        ago = t - self.first - np.arange(len(self.moved))
        size = np.sqrt((1 - BETA2**t) / BETA2**ago)  # of sqrt(v) then, to what AdamW made of it
        move = lr / (1 - BETA1**t) * BETA1**ago * size
        self.moved = np.append(self.moved * shrink + move, 0.0)
        self.eps = np.append(self.eps * shrink + move * size * EPS, 0.0)
        self.shrink = np.append(self.shrink * shrink, 1.0)
        if t - self.first >= _FORGETS:
            self.settle()

    def settle(self) -> None:
        """All rows catch up."""
        self._catch_up(np.flatnonzero(self.last < self.steps))
        self._forget()

    @torch.no_grad()
    def _catch_up(self, words: np.ndarray) -> None:
        words = words[self.last[words] < self.steps]
        if len(words) == 0:
            return
        ago = self.steps - self.last[words]
        step = self.last[words] - self.first
        at = _on(self.table.device, words)
        factors = np.stack(
            [
                self.shrink[step],
                self.moved[step],
                BETA1**ago,
                BETA2**ago,
                np.where(self.moved[step] > 0, self.eps[step] / self.moved[step].clip(1e-99), EPS),
            ]
        ).astype(np.float32)
        shrink, moved, fade_m, fade_v, eps = _on(self.table.device, factors)[:, :, None]  # (U, 1)
        m, v = self.m[at], self.v[at]
        self.table[at] = shrink * self.table[at] - moved * m / (v.sqrt() + eps)
        self.m[at], self.v[at] = fade_m * m, fade_v * v
        self.last[words] = self.steps


def _on(device: torch.device, array: np.ndarray) -> torch.Tensor:
    """A GPU is not waited for."""
    tensor = torch.from_numpy(array)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def moments(
    optimizer: torch.optim.Optimizer, words: Words | None, table: torch.nn.Parameter | None
) -> dict[str, Any]:
    """The state of AdamW: the same whether the table is trained by the rows in use, or as a whole
    in the optimizer's last group."""
    state = optimizer.state_dict()
    if words:
        return {"optimizer": state, "words": words.state()}
    if table is None:
        return {"optimizer": state}
    *groups, last = state["param_groups"]
    (number,) = last["params"]
    own = state["state"].pop(number)
    return {
        "optimizer": {"state": state["state"], "param_groups": groups},
        "words": {"m": own["exp_avg"], "v": own["exp_avg_sq"], "steps": int(own["step"])},
    }


def load_moments(
    optimizer: torch.optim.Optimizer, words: Words | None, start: dict[str, Any]
) -> None:
    """Goes on from `moments` of either way."""
    state, own = start["optimizer"], start.get("words")
    if words:
        words.load(start["words"])
    elif own:
        groups = state["param_groups"]
        number = sum(len(group["params"]) for group in groups)
        step = torch.tensor(float(own["steps"]))
        mine = {"step": step, "exp_avg": own["m"], "exp_avg_sq": own["v"]}
        state = {
            "state": {**state["state"], number: mine},
            "param_groups": [*groups, {**groups[0], "params": [number]}],
        }
    optimizer.load_state_dict(state)


def table_of(net: Any) -> torch.nn.Parameter | None:
    """The table of a BERT; None for a model whose forward needs the ids themselves."""
    if getattr(getattr(net, "config", None), "model_type", "") not in _ABSOLUTE:
        return None
    return net.get_input_embeddings().weight


def set_aside(net: Any) -> torch.nn.Parameter | None:
    """The table, which AdamW and DDP are now to leave alone."""
    table = table_of(net)
    if table is not None:
        table.requires_grad_(False)
    return table

"""The rows and the model of a task, made ready once on the driver and shared by all stages of a
run."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

from . import data, model
from .config import Task


class Prepared(NamedTuple):
    """What trials and workers need (base, rows, held_out) and what the driver keeps."""

    dataset: data.Dataset
    tokenizer: Any
    base: model.Base
    rows: data.Tokens  # of a stream a sample
    held_out: data.Tokens
    stream: Any = None  # stream.Plan, where the rows are streamed

    def checkpoint_bytes(self, task: Task) -> int:
        """Size of a checkpoint: the weights and Adam's two moments of each, in float32."""
        net = model.build(replace(self.base, weights=None), task.model, seed=0)
        return 3 * 4 * sum(p.numel() for p in net.parameters())


def prepare(task: Task, cache: str, tell: Callable[[str], None] = lambda _: None) -> Prepared:
    """Reads, checks and tokenises the rows, and loads the base model; raises UserError.

    Rows that are streamed need a Ray that has started; `tell` hears how far the pass over them is.
    """
    plan = None
    if task.data.streaming:
        from .stream import survey

        dataset, plan = survey(task, cache, tell)
    else:
        dataset = data.load(task.data, task.train.seed, cache)
    base, tokenizer = model.prepare(
        task.model, dataset.labels, dataset.train.texts, task.data.max_tokens
    )
    rows, held_out = (
        data.tokenize(split, dataset.labels, tokenizer, task.data.max_tokens)
        for split in (dataset.train, dataset.validation)
    )
    return Prepared(dataset, tokenizer, base, rows, held_out, plan)

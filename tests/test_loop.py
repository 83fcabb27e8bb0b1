"""The training loop: the same maths whatever the width, the rows in memory, or a break."""

import copy
import io
import math
import multiprocessing
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from torch.nn.parallel import DistributedDataParallel

from workloads import loop, model, words
from workloads.config import Model, Train
from workloads.data import Tokens, collate
from workloads.loop import Place, Point
from workloads.passes import Passes

# 54 rows are 7 batches of 8, the last of 6. Every step is evaluated, so that every loss is seen.
PLAN = Train(epochs=2, global_batch=8, lr=3e-3, evals_per_epoch=1000)
TRAINING = {"epoch", "step", "steps", "lr", "loss", "samples_per_s", "tokens_per_s", "padding_pct"}
SCORES = {"eval_loss", "eval_accuracy", "eval_f1"}


def fresh(prepared: Any, dropout: float = 0.0, seed: int = 0) -> torch.nn.Module:
    """A tiny BERT of 1 layer, 16 wide."""
    tiny = Model(hidden=16, heads=2, layers=1, vocab_size=200, dropout=dropout)
    return model.build(prepared.base, tiny, seed)


def run(
    prepared: Any,
    net: torch.nn.Module,
    plan: Train = PLAN,
    place: Place | None = None,
    **start: Any,
) -> list[Point]:
    """All points of a training, states not taken."""
    return list(loop.train(net, prepared.rows, prepared.held_out, plan, place or Place(), **start))


@pytest.fixture(scope="module")
def plain(prepared: Any) -> list[Point]:
    """A training of PLAN from seed 0, without dropout."""
    return run(prepared, fresh(prepared))


def column(points: list[Point], key: str) -> list[float]:
    return [p.metrics[key] for p in points if key in p.metrics]


def taken(state: dict[str, Any]) -> dict[str, Any]:
    """A state as it comes back from a checkpoint file."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


class Bag(torch.nn.Module):
    """The mean of a row's embeddings, then a matrix: a classifier that a rank makes in no time."""

    def __init__(self, pieces: int, kind: str = "bert") -> None:
        super().__init__()
        torch.manual_seed(5)
        self.config = SimpleNamespace(num_labels=2, model_type=kind)
        self.embed, self.head = torch.nn.Embedding(pieces, 8), torch.nn.Linear(8, 2)

    def get_input_embeddings(self) -> torch.nn.Embedding:
        return self.embed

    def forward(
        self,
        attention_mask: torch.Tensor,
        input_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> SimpleNamespace:
        mask = attention_mask[..., None].float()
        seen = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        return SimpleNamespace(logits=self.head((seen * mask).sum(1) / mask.sum(1)))


class Fixed(torch.nn.Module):
    """Says the same of every row: the logits are a weight, through a function."""

    def __init__(self, logits: list[float], through: Any = torch.clone) -> None:
        super().__init__()
        self.config = SimpleNamespace(num_labels=len(logits))
        self.weight, self.through = torch.nn.Parameter(torch.tensor(logits)), through

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SimpleNamespace:
        return SimpleNamespace(logits=self.through(self.weight).expand(len(input_ids), -1))


def rows_of(lengths: list[int], labels: list[int], pieces: int = 50) -> Tokens:
    """Rows of random tokens."""
    ids = np.random.default_rng(0).integers(1, pieces, sum(lengths)).astype(np.int32)
    offsets = np.cumsum([0, *lengths], dtype=np.int64)
    return Tokens(ids, offsets, np.asarray(labels, dtype=np.int64), pad_id=0)


# ---------------------------------------------------------------- learning


def test_a_tiny_model_learns_to_tell_reviews_apart(prepared: Any):
    plan = Train(epochs=8, global_batch=8, lr=1e-2)
    points = run(prepared, fresh(prepared), plan)
    assert points[-1].metrics["eval_accuracy"] == 1.0
    assert points[-1].metrics["loss"] < 0.5 * points[0].metrics["loss"]


def test_one_seed_gives_one_training(prepared: Any):
    losses, ends = [], []
    for _ in range(2):
        net = fresh(prepared, dropout=0.3)
        points = run(prepared, net)
        losses.append(column(points, "loss") + column(points, "eval_loss"))
        ends.append(torch.cat([p.flatten() for p in net.parameters()]))
    assert losses[0] == losses[1]
    assert torch.equal(ends[0], ends[1])


def test_another_seed_gives_another_order(prepared: Any, plain: list[Point]):
    other = run(prepared, fresh(prepared), PLAN.model_copy(update={"seed": 1}))
    assert not set(column(plain, "loss")) & set(column(other, "loss"))


def test_every_step_and_seed_has_a_dropout_of_its_own(prepared: Any):
    # All rows are one and the weights stand still: only dropout makes a difference.
    row = prepared.rows.take(np.zeros(8, dtype=np.int64))
    losses = []
    for seed in (0, 1):
        plan = Train(epochs=4, global_batch=8, lr=1e-12, seed=seed)
        points = loop.train(fresh(prepared, dropout=0.5), row, row, plan, Place())
        losses += column(list(points), "loss")
    assert len(set(losses)) == 8


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_dropout_drops_in_training_only(prepared: Any, plain: list[Point], dropout: float):
    scores, *_ = loop.evaluate(fresh(prepared, dropout), prepared.held_out, Place())
    assert scores == loop.evaluate(fresh(prepared), prepared.held_out, Place())[0]
    net = fresh(prepared, dropout)
    first = next(loop.train(net, prepared.rows, prepared.held_out, PLAN, Place()))
    assert (first.metrics["loss"] == plain[0].metrics["loss"]) == (dropout == 0)


# ---------------------------------------------------------------- going on after a break


@pytest.mark.parametrize("evals", [1, 1000])
def test_a_resumed_training_goes_on_as_if_there_had_been_no_break(prepared: Any, evals: int):
    plan = PLAN.model_copy(update={"evals_per_epoch": evals})
    place, whole = Place(checkpoint_steps=3), fresh(prepared, dropout=0.3)
    points, states = [], []
    for point in loop.train(whole, prepared.rows, prepared.held_out, plan, place):
        points.append(point)
        states.append(taken(point.state()))
    for i in {0, 2, len(points) // 2, len(points) - 1}:
        net = fresh(prepared, dropout=0.3, seed=99)
        rest = run(prepared, net, plan, place, start=states[i])
        for key in ("step", "loss", "lr", "padding_pct", *SCORES):
            assert column(rest, key) == column(points[i + 1 :], key)
        assert [p.confusion for p in rest] == [p.confusion for p in points[i + 1 :]]
        assert all(map(torch.equal, net.parameters(), whole.parameters()))


def test_a_state_is_not_made_before_it_is_asked_for(prepared: Any):
    net = fresh(prepared)
    point = next(loop.train(net, prepared.rows, prepared.held_out, PLAN, Place()))
    with torch.no_grad():
        net.classifier.bias.fill_(5.0)
    assert set(point.state()["model"]["classifier.bias"].tolist()) == {5.0}


# ---------------------------------------------------------------- width


@pytest.mark.parametrize("max_batch", [1, 3])
def test_accumulation_does_not_change_the_maths(prepared: Any, plain: list[Point], max_batch: int):
    parts = run(prepared, fresh(prepared), place=Place(max_batch=max_batch))
    for key in ("loss", "eval_loss"):
        assert column(parts, key) == pytest.approx(column(plain, key), abs=1e-5)


# 25 rows in batches of 8: a batch does not divide by 3, and the last, of 1 row, leaves ranks
# without any.
WIDE_ROWS = rows_of([3 + i % 7 for i in range(25)], [i % 2 for i in range(25)])
WIDE_PLAN = Train(epochs=2, global_batch=8, lr=1e-2, evals_per_epoch=2)


def passes_of(net: torch.nn.Module) -> Passes:
    """On a CPU, in fp32."""
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    return Passes(net, "cpu", torch.float32, scaler, print)


def wide(net: torch.nn.Module, rank: int, world: int) -> dict[str, Any]:
    """Two gradients and a training on one of so many ranks: every loss, and how it ended."""
    place = Place(rank=rank, world=world, max_batch=2, checkpoint_steps=3, log_s=1e9)
    gradients = []
    table = words.Words(words.set_aside(loop._bare(net)), 0.0)
    for batch in (np.arange(8), np.arange(24, 25)):
        net.zero_grad()
        used = np.unique(collate(WIDE_ROWS, batch)[0])
        share = loop.Share(WIDE_ROWS, batch[place.rank :: place.world], len(batch), used)
        leaf = table.use(used)
        loop._backward(passes_of(net), share, place, loop.Meter(), leaf)
        table.share_gradient(world)
        gradients += [
            leaf.rows.grad,
            *(p.grad.clone() for p in net.parameters() if p.requires_grad),
        ]
    points = list(loop.train(net, WIDE_ROWS, WIDE_ROWS, WIDE_PLAN, place))
    return {
        "gradients": gradients,
        "steps": column(points, "step"),
        "loss": column(points, "loss"),
        "eval_loss": column(points, "eval_loss"),
        "padding": column(points, "padding_pct"),
        "confusion": points[-1].confusion,
        "answers": points[-1].answers.tolist(),
        "state": points[-1].state(),
    }


def one_rank(rank: int, folder: str) -> None:
    """Trains at a width of 3 and then of 2, and leaves what it saw."""
    torch.set_num_threads(1)
    for world in (3, 2):
        if rank < world:
            dist.init_process_group(
                "gloo",
                init_method=f"file://{folder}/meet{world}",
                rank=rank,
                world_size=world,
                timeout=timedelta(seconds=30),
            )
            net = Bag(50)
            words.set_aside(net)  # before DDP looks
            seen = wide(DistributedDataParallel(net), rank, world)
            torch.save(seen, f"{folder}/{world}-{rank}.pt")
            dist.destroy_process_group()


@pytest.fixture(scope="module")
def widths(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[int, int], dict[str, Any]]:
    """(world, rank) -> what that rank saw."""
    folder = tmp_path_factory.mktemp("ranks")
    # Ranks fork from a process that has imported what DDP needs, and nothing else.
    multiprocessing.get_context("forkserver").set_forkserver_preload(["torch._dynamo", __name__])
    torch.multiprocessing.start_processes(
        one_rank, (str(folder),), nprocs=3, start_method="forkserver"
    )
    seen = {(w, r): torch.load(f"{folder}/{w}-{r}.pt") for w in (2, 3) for r in range(w)}
    return {(1, 0): wide(Bag(50), 0, 1), **seen}


@pytest.mark.parametrize("world", [2, 3])
def test_width_never_changes_a_gradient(widths: dict[Any, Any], world: int):
    # Adam hardly notices a factor; so this is not seen in the losses.
    for alone, first in zip(widths[1, 0]["gradients"], widths[world, 0]["gradients"], strict=True):
        assert alone.abs().max() > 0
        assert torch.allclose(first, alone, atol=1e-7)


@pytest.mark.parametrize("world", [2, 3])
def test_width_never_changes_the_maths(widths: dict[Any, Any], world: int):
    alone, first = widths[1, 0], widths[world, 0]
    # 3 is a checkpoint between two evaluations, 1 the first look
    assert alone["steps"] == [1, 2, 3, 4, 6, 8]
    for key in ("loss", "eval_loss"):
        assert first[key] == pytest.approx(alone[key], abs=1e-5)
    assert first["confusion"] == alone["confusion"]
    assert first["answers"] == [pytest.approx(row, abs=1e-5) for row in alone["answers"]]
    for name, weight in alone["state"]["model"].items():
        assert torch.allclose(first["state"]["model"][name], weight, atol=1e-5), name


@pytest.mark.parametrize("world", [2, 3])
def test_all_ranks_stop_at_the_same_steps_with_the_same_weights(widths: dict[Any, Any], world: int):
    ranks = [widths[world, rank] for rank in range(world)]
    for other in ranks[1:]:
        assert other["steps"] == ranks[0]["steps"] == widths[1, 0]["steps"]
        assert other["eval_loss"] == ranks[0]["eval_loss"]
        assert other["confusion"] == ranks[0]["confusion"]
        weights = ranks[0]["state"]["model"]
        assert all(torch.equal(w, weights[n]) for n, w in other["state"]["model"].items())


def test_a_state_of_many_ranks_is_that_of_one(widths: dict[Any, Any]):
    start = copy.deepcopy(widths[3, 0]["state"])
    assert start["step"] == 8
    plan = WIDE_PLAN.model_copy(update={"epochs": 3})
    points = list(loop.train(Bag(50), WIDE_ROWS, WIDE_ROWS, plan, Place(), start))
    assert column(points, "step") == [10, 12]


@pytest.mark.parametrize(
    ("batch", "world", "max_batch", "expected"),
    [
        (64, 1, 32, 2),
        (64, 2, 32, 1),
        (64, 3, 32, 1),
        (65, 2, 32, 2),
        (8, 16, 1, 1),
        (100, 1, 7, 15),
    ],
)
def test_what_does_not_fit_in_memory_is_accumulated(
    batch: int, world: int, max_batch: int, expected: int
):
    assert loop.accumulation(batch, world, max_batch) == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_learns_nearly_the_same(
    prepared: Any, plain: list[Point], dtype: torch.dtype
):
    half = run(prepared, fresh(prepared), place=Place(dtype=dtype))
    assert column(half, "loss") == pytest.approx(column(plain, "loss"), abs=0.05)
    assert column(half, "loss") != column(plain, "loss")


# ---------------------------------------------------------------- the optimizer


def test_weight_decay_is_on_matrices_only(prepared: Any):
    net = fresh(prepared)
    optimizer = loop._adamw(net, Train(weight_decay=0.5))
    decays = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    small = {n for n, p in net.named_parameters() if decays[id(p)] == 0}
    assert small == {n for n, _ in net.named_parameters() if "LayerNorm" in n or n.endswith("bias")}
    assert set(decays.values()) == {0.0, 0.5}
    assert len(decays) == len(list(net.parameters()))


@pytest.mark.parametrize(
    ("warmup", "expected"),
    [
        (0.0, {1: 14, 2: 13, 14: 1}),
        (0.5, {1: 2, 7: 14, 8: 14, 9: 12, 14: 2}),
        (1.0, {1: 1, 7: 7, 14: 14}),
    ],
)
def test_the_rate_rises_from_nothing_and_falls_to_nothing(
    prepared: Any, warmup: float, expected: dict[int, int]
):
    plan = PLAN.model_copy(update={"warmup": warmup, "lr": 0.014})
    rates = column(run(prepared, Bag(300), plan), "lr")
    assert len(rates) == 14
    for step, thousandths in expected.items():
        assert rates[step - 1] == pytest.approx(thousandths / 1000), step


def test_a_gradient_is_clipped():
    rows = rows_of([3] * 8, [0] * 8)
    plan = Train(epochs=1, global_batch=8, lr=0.1, warmup=0, weight_decay=0, grad_clip=1e-12)
    net = Fixed([0.0, 0.0])
    list(loop.train(net, rows, rows, plan, Place()))
    # Adam's step depends on the size of a gradient only where that is far below its epsilon, 1e-8.
    assert net.weight.abs().max() < 1e-4


# ---------------------------------------------------------------- points and metrics


def test_a_point_comes_at_every_evaluation_and_checkpoint(prepared: Any):
    plan = PLAN.model_copy(update={"evals_per_epoch": 2})
    points = run(prepared, Bag(300), plan, Place(checkpoint_steps=5))
    assert [(p.metrics["step"], p.evaluated, p.checkpoint_due) for p in points] == [
        (4, True, False),
        (5, False, True),
        (7, True, False),
        (10, False, True),
        (11, True, False),
        (14, True, True),
    ]


def test_points_for_people_to_see_change_nothing_else(prepared: Any):
    plan = PLAN.model_copy(update={"evals_per_epoch": 1})
    few = run(prepared, Bag(300), plan)
    many = run(prepared, Bag(300), plan, Place(log_steps=2))
    assert column(many, "step") == [2, 4, 6, 7, 8, 10, 12, 14]
    assert column([p for p in many if p.evaluated], "loss") == column(few, "loss")
    assert column(many, "eval_loss") == column(few, "eval_loss")
    assert [p.checkpoint_due for p in many] == [False] * 7 + [True]


def test_slow_steps_are_seen_one_by_one(prepared: Any):
    plan = PLAN.model_copy(update={"evals_per_epoch": 1})
    assert len(run(prepared, Bag(300), plan, Place(log_s=1e-9))) == 14
    assert column(run(prepared, Bag(300), plan, Place(log_s=1e9)), "step") == [1, 7, 14]


def test_a_point_has_all_metrics_and_scores_only_after_an_evaluation(prepared: Any):
    plan = PLAN.model_copy(update={"evals_per_epoch": 1})
    points = run(prepared, fresh(prepared), plan, Place(checkpoint_steps=5))
    for point in points:
        scores = SCORES if point.evaluated else set()
        assert point.metrics.keys() == TRAINING | {"memory_mb"} | scores
        assert all(math.isfinite(value) for value in point.metrics.values())
        assert 0 <= point.metrics["padding_pct"] < 50
        assert min(point.metrics[k] for k in ("samples_per_s", "tokens_per_s", "memory_mb")) > 0
    assert [p.metrics["epoch"] for p in points] == [0.7143, 1.0, 1.4286, 2.0]
    assert {p.metrics["steps"] for p in points} == {14}


def test_a_loss_is_the_mean_over_the_rows_since_the_last_evaluation(prepared: Any):
    plan = PLAN.model_copy(update={"evals_per_epoch": 1})
    each = column(run(prepared, Bag(300)), "loss")
    epochs = column(run(prepared, Bag(300), plan), "loss")
    sizes = [8] * 6 + [6]
    assert epochs[0] == pytest.approx(np.average(each[:7], weights=sizes))
    assert epochs[1] == pytest.approx(np.average(each[7:], weights=sizes))


def test_a_batch_larger_than_all_rows_is_one_step_an_epoch(prepared: Any):
    plan = Train(epochs=3, global_batch=1000, evals_per_epoch=5)
    assert column(run(prepared, Bag(300), plan), "step") == [1, 2, 3]


def test_padding_is_the_share_of_tokens_that_are_none():
    rows = rows_of([2, 6, 4], [0, 1, 0])
    plan = Train(epochs=1, global_batch=3)
    point = next(loop.train(Bag(50), rows, rows, plan, Place()))
    assert point.metrics["padding_pct"] == pytest.approx(100 * 6 / 18, abs=0.01)


# ---------------------------------------------------------------- evaluation


@pytest.mark.parametrize(
    ("confusion", "accuracy", "f1"),
    [
        ([[3, 1], [2, 4]], 7 / 10, (6 / 9 + 8 / 11) / 2),
        ([[5, 0], [5, 0]], 1 / 2, (10 / 15 + 0) / 2),  # a class that is never predicted
        ([[2, 0, 0], [0, 3, 1], [0, 0, 0]], 5 / 6, (1 + 6 / 7 + 0) / 3),  # one without rows
        ([[2, 0, 0], [0, 3, 0], [0, 0, 0]], 1.0, 1.0),  # one with neither
    ],
)
def test_accuracy_and_f1_are_those_made_by_hand(
    confusion: list[list[int]], accuracy: float, f1: float
):
    scores = loop.classification_scores(np.array(confusion))
    assert scores["eval_accuracy"] == pytest.approx(accuracy)
    assert scores["eval_f1"] == pytest.approx(f1)


def test_a_confusion_has_true_classes_in_rows_and_predicted_ones_in_columns():
    rows = rows_of([2, 3, 4, 5], [0, 0, 0, 2])
    scores, confusion, answers = loop.evaluate(Fixed([0.0, 1.0, 0.0]), rows, Place(max_batch=3))
    assert confusion == [[0, 3, 0], [0, 0, 0], [0, 1, 0]]
    assert answers == pytest.approx(np.array([[1, math.e / (2 + math.e)]] * 4))
    assert scores["eval_loss"] == pytest.approx(math.log(2 + math.e))


def test_an_evaluation_does_not_depend_on_the_batch(prepared: Any):
    net = fresh(prepared)
    run(prepared, net)
    whole, table, answers = loop.evaluate(net, prepared.rows, Place(max_batch=1000))
    assert np.sum(table) == len(prepared.rows)
    for max_batch in (1, 5, 32):
        parts, other, same = loop.evaluate(net, prepared.rows, Place(max_batch=max_batch))
        assert parts == pytest.approx(whole, abs=1e-6)
        assert other == table
        assert same == pytest.approx(answers, abs=1e-6)


# ---------------------------------------------------------------- divergence


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number_ends_training_with_advice(value: float):
    rows = rows_of([3] * 20, [0, 1] * 10)
    plan = Train(epochs=1, global_batch=8, lr=0.25, grad_clip=7.5)
    with pytest.raises(loop.DivergedError) as e:
        list(loop.train(Fixed([value, 0.0]), rows, rows, plan, Place()))
    said = str(e.value)
    assert "at step 3 of 3" in said
    assert "lower train.lr (0.25) or train.grad_clip (7.5)" in said


def test_a_last_step_that_ruins_the_weights_is_not_a_success():
    # The loss of sqrt(0) is a number; its gradient is not, nor are the weights after the step.
    rows = rows_of([3] * 8, [0, 1] * 4)
    net = Fixed([0.0, 0.0], through=lambda weight: (weight * 0).sqrt())
    with pytest.raises(loop.DivergedError):
        list(loop.train(net, rows, rows, Train(epochs=1, global_batch=8), Place()))


# ---------------------------------------------------------------- memory


class Narrow(Bag):
    """Has no memory for more than so many rows at once, with gradients."""

    def __init__(self, most: int, said: str = "DefaultCPUAllocator: not enough memory") -> None:
        super().__init__(50)
        self.most, self.said = most, said

    def forward(self, attention_mask: torch.Tensor, **inputs: torch.Tensor) -> SimpleNamespace:
        out = super().forward(attention_mask, **inputs)
        if len(attention_mask) > self.most and torch.is_grad_enabled():
            raise RuntimeError(self.said)
        return out


def test_what_does_not_fit_is_halved_once_and_changes_no_result():
    told: list[str] = []
    place = Place(max_batch=6, tell=told.append)
    points = list(loop.train(Narrow(4), WIDE_ROWS, WIDE_ROWS, WIDE_PLAN, place))
    whole = list(loop.train(Bag(50), WIDE_ROWS, WIDE_ROWS, WIDE_PLAN, Place()))
    for key in ("loss", "eval_loss"):
        assert column(points, key) == pytest.approx(column(whole, key), rel=1e-5)
    assert [line[:74] for line in told] == [
        "warning: 6 rows do not fit into memory at once; going on with 3 and more a"
    ]


@pytest.mark.parametrize("place", [Place(max_batch=6), Place(max_batch=6, world=2)])
def test_what_does_not_fit_in_halves_or_among_ranks_names_the_key_to_lower(place: Place):
    share = loop.Share(WIDE_ROWS, np.arange(8), 8, np.arange(50))
    with pytest.raises(loop.NoRoomError, match=r"rows .* lower target.train.max_batch_per_worker"):
        loop._backward_that_fits(passes_of(Narrow(1)), share, place, loop.Meter(), None)


def test_another_error_is_not_taken_for_a_lack_of_memory():
    with pytest.raises(RuntimeError, match="another"):
        list(loop.train(Narrow(1, "another"), WIDE_ROWS, WIDE_ROWS, WIDE_PLAN, Place()))

"""What only a GPU can show: every precision learns the same, real lack of its memory is survived,
stages share it, a replica answers from it."""

import gc
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Command, write_csv
from test_loop import PLAN, column, fresh, run, taken

from workloads import loop, model, passes
from workloads.config import Model, Train
from workloads.engine import TorchEngine
from workloads.loop import Place

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]


def on_gpu(prepared: Any, dtype: torch.dtype = torch.float32, **place: Any) -> list[loop.Point]:
    return run(prepared, fresh(prepared).cuda(), place=Place("cuda", dtype, **place))


def test_a_gpu_gives_the_losses_of_a_cpu(prepared: Any):
    cpu, gpu = run(prepared, fresh(prepared)), on_gpu(prepared)
    for key in ("loss", "eval_loss"):
        assert column(gpu, key) == pytest.approx(column(cpu, key), abs=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_learns_nearly_the_same_on_a_gpu(prepared: Any, dtype: torch.dtype):
    half, whole = on_gpu(prepared, dtype), on_gpu(prepared)
    assert column(half, "loss") == pytest.approx(column(whole, "loss"), abs=0.05)
    assert column(half, "loss") != column(whole, "loss")


def test_recorded_passes_learn_what_kernels_one_by_one_learn(
    prepared: Any, monkeypatch: pytest.MonkeyPatch
):
    recorded: list[Any] = []
    real = passes.Passes._record
    monkeypatch.setattr(
        passes.Passes, "_record", lambda self, batch: (recorded.append(batch), real(self, batch))
    )

    monkeypatch.setattr(passes, "_OFTEN", 2)

    def losses() -> list[float]:  # with dropout, and two micro-batches a step
        net = fresh(prepared, dropout=0.1).cuda()
        return column(run(prepared, net, place=Place("cuda", max_batch=5)), "loss")

    graphs = losses()
    assert len(recorded) >= 2
    monkeypatch.setattr(passes, "_OFTEN", 10**9)
    assert graphs == pytest.approx(losses(), rel=1e-3)


class Waits(torch.nn.Module):
    """A net that asks the GPU for a number in its forward pass."""

    def __init__(self, net: torch.nn.Module) -> None:
        super().__init__()
        self.net, self.config = net, net.config

    def forward(self, **inputs: torch.Tensor) -> Any:
        assert inputs["attention_mask"].sum().item() > 0
        return self.net(**inputs)

    def get_input_embeddings(self) -> Any:
        return self.net.get_input_embeddings()  # type: ignore[operator]


def test_a_net_that_cannot_be_recorded_is_trained_all_the_same(prepared: Any):
    told: list[str] = []
    place = Place("cuda", tell=told.append)
    points = run(prepared, Waits(fresh(prepared)).cuda(), place=place)
    assert column(points, "loss") == pytest.approx(column(on_gpu(prepared), "loss"), rel=1e-3)
    assert [line[:14] for line in told] == ["no CUDA graphs"]


def test_a_checkpoint_of_a_gpu_goes_on_on_a_cpu(prepared: Any):
    place = Place("cuda", checkpoint_steps=7)
    points = loop.train(fresh(prepared).cuda(), prepared.rows, prepared.held_out, PLAN, place)
    state = next(taken(point.state()) for point in points if point.checkpoint_due)
    on_cpu = torch.load(_saved(state), weights_only=True, map_location="cpu")
    resumed = run(prepared, fresh(prepared, seed=9), start=on_cpu)
    whole = run(prepared, fresh(prepared))
    assert column(resumed, "loss") == pytest.approx(column(whole, "loss")[7:], abs=1e-3)


def _saved(state: dict[str, Any]) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return file


def test_a_training_in_fp16_goes_on_from_a_checkpoint_with_its_scale(prepared: Any):
    place = Place("cuda", torch.float16, checkpoint_steps=7)
    points = loop.train(fresh(prepared).cuda(), prepared.rows, prepared.held_out, PLAN, place)
    unbroken, state = [], None
    for point in points:
        if point.checkpoint_due and state is None:
            state = taken(point.state())
        unbroken.append(point)
    assert state is not None
    resumed = run(prepared, fresh(prepared, seed=9).cuda(), place=place, start=state)
    assert column(resumed, "loss") == pytest.approx(column(unbroken, "loss")[7:], abs=1e-2)
    assert state["scaler"]["scale"] > 1


def test_rows_that_a_gpu_has_no_memory_for_are_halved_and_learn_the_same(prepared: Any):
    plan = Train(epochs=1, global_batch=54, lr=3e-3)
    large = Model(hidden=256, heads=4, layers=4, vocab_size=200, dropout=0.0)
    told: list[str] = []

    def losses(max_batch: int) -> tuple[list[float], int]:
        """And the memory that it took, bytes."""
        gc.collect()  # graphs of other tests
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        net = model.build(prepared.base, large, seed=0).cuda()
        place = Place("cuda", max_batch=max_batch, tell=told.append)
        return column(run(prepared, net, plan, place), "loss"), torch.cuda.max_memory_allocated()

    losses(54)  # what is set up once
    free, all_bytes = losses(54)
    _, half_bytes = losses(27)
    total = torch.cuda.get_device_properties(0).total_memory
    assert told == []
    try:
        torch.cuda.set_per_process_memory_fraction((all_bytes + half_bytes) / 2 / total)
        assert losses(54)[0] == pytest.approx(free, rel=1e-4)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert ["54 rows do not fit" in line for line in told] == [True]


def test_a_replica_on_a_gpu_answers_as_one_on_a_cpu(trained: Path):
    texts = ["a warm and clever delight", "a dull and empty mess", "", "word " * 500]
    logits = []
    for device in ("cpu", "cuda"):
        engine = TorchEngine(trained, "tiny", device, precision="auto")
        logits.append(engine.predict([row.ids for row in engine.encode(texts)]))
    assert logits[1] == pytest.approx(logits[0], abs=0.05)
    assert (np.argmax(logits[1], 1) == np.argmax(logits[0], 1)).all()


@pytest.mark.ray
@pytest.mark.parametrize(
    ("precision", "workers"),
    [("bf16", "1"), ("fp16", "[1, 2]"), ("tf32", "[1, 2]")],  # the command itself, or a worker
)
def test_trials_share_a_gpu_and_training_takes_it(tmp_path: Path, precision: str, workers: str):
    rows = write_csv(tmp_path / "reviews.csv", 60)
    args = [
        *("run", "--stages", "tune,train", "--task", "smoke", "--target", "gpu-cluster", "--json"),
        *("task.data.source=files", f"task.data.train={rows}", "task.tune.trials=4"),
        *("target.ray.address=null", f"target.ray.storage={tmp_path}"),
        *(f"target.train.workers={workers}", "target.train.cpus_per_worker=1"),
        f"target.precision={precision}",
    ]
    result = Command(tmp_path, *args).result()
    assert result["eval_accuracy"] >= 0

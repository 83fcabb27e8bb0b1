"""The forward and backward pass of a micro-batch; on a GPU recorded as a CUDA graph and replayed.

Launching the kernels of a small BERT one by one takes ten times as long as running them. A graph
stands for one shape, so rows are padded to a few lengths there.

Letters: B rows of a micro-batch, T tokens, C classes, U words in use, H width.
"""

from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

STEP = 8  # tokens: lengths on a GPU are multiples of it
_OFTEN = 5  # times that a shape is seen before it is worth a graph


class Batch(NamedTuple):
    """What a pass reads, on the net's device."""

    ids: torch.Tensor  # (B, T) int64; positions in `rows`, if there are some
    mask: torch.Tensor  # (B, T) int64
    labels: torch.Tensor  # (B,) int64


class _Graph(NamedTuple):
    graph: torch.cuda.CUDAGraph
    batch: Batch
    scale: torch.Tensor
    loss: torch.Tensor


class Passes:
    """Passes of one net that is in training."""

    def __init__(
        self,
        net: torch.nn.Module,
        device: str,
        dtype: torch.dtype,
        scaler: torch.amp.GradScaler,
        tell: Callable[[str], None],
    ) -> None:
        self.net, self.device, self.dtype, self.scaler = net, device, dtype, scaler
        self.tell = tell
        # Among ranks the gradients are exchanged within the backward pass.
        self.on_one_gpu = self.may_record = device == "cuda" and not hasattr(net, "no_sync")
        self.seen: Counter[torch.Size] = Counter()
        self.graphs: dict[torch.Size, _Graph] = {}
        self.pool = torch.cuda.graph_pool_handle() if self.on_one_gpu else None

    def forget_gradients(self) -> None:
        """Before a step. Those that a graph adds to stay where they are."""
        for parameter in self.net.parameters():
            if not self.on_one_gpu:
                parameter.grad = None
            elif parameter.requires_grad and parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        if self.on_one_gpu:
            torch._foreach_zero_([p.grad for p in self.net.parameters() if p.grad is not None])

    def backward(
        self, batch: Batch, scale: float, rows: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Adds the gradient of the loss, summed over the rows and times `scale`; returns the sum.

        `rows` (U, H) stands for the net's own word embeddings, if these are set aside.
        """
        shape = batch.ids.shape
        self.seen[shape] += 1
        if self.may_record and self.seen[shape] == _OFTEN:
            self._try_to_record(batch)
        if shape not in self.graphs:
            return self._run(batch, scale, rows)
        graph = self.graphs[shape]
        for mine, theirs in zip(graph.batch, batch, strict=True):
            mine.copy_(theirs)
        graph.scale.fill_(scale)
        graph.graph.replay()
        return graph.loss

    def _run(
        self, batch: Batch, scale: float | torch.Tensor, rows: torch.Tensor | None = None
    ) -> torch.Tensor:
        logits = forward(self.net, batch, self.dtype, rows)
        loss = F.cross_entropy(logits, batch.labels, reduction="sum")
        self.scaler.scale(loss * scale).backward()
        return loss.detach()

    def _try_to_record(self, batch: Batch) -> None:
        try:
            self._record(batch)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as e:  # a net that waits for the GPU inside its forward pass
            self.may_record = False
            self.tell(f"no CUDA graphs, kernel by kernel: {str(e).splitlines()[0]}")

    def _record(self, batch: Batch) -> None:
        """As torch's notes on CUDA graphs have it: after a warm-up on a stream of its own."""
        mine = Batch(*(tensor.clone() for tensor in batch))
        scale = torch.zeros((), device=self.device)  # the warm-up adds nothing
        generator = torch.cuda.get_rng_state()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._run(mine, scale)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=side):
            loss = self._run(mine, scale)
        torch.cuda.set_rng_state(generator)  # dropout is the same with and without
        self.graphs[batch.ids.shape] = _Graph(graph, mine, scale, loss)


def forward(
    net: torch.nn.Module, batch: Batch, dtype: torch.dtype, rows: torch.Tensor | None = None
) -> torch.Tensor:
    """Logits (B, C) float32."""
    words = (
        {"input_ids": batch.ids}
        if rows is None
        else {"inputs_embeds": F.embedding(batch.ids, rows)}
    )
    # Each weight is used once, so nothing is gained by keeping it in the other precision.
    device, low = batch.ids.device.type, dtype != torch.float32
    with torch.autocast(device, dtype, enabled=low, cache_enabled=False):
        logits = net(**words, attention_mask=batch.mask).logits
    return logits.float()


def moved(arrays: tuple[np.ndarray, ...], device: str) -> Batch:
    """On the device; a GPU copies from pinned memory while it still computes the batch before."""
    tensors = [torch.from_numpy(a) for a in arrays]
    if device == "cuda":
        tensors = [t.pin_memory().to(device, non_blocking=True) for t in tensors]
    return Batch(*tensors)

"""Why a text got its label: what each of its tokens adds to the label's logit.

Integrated gradients: Sundararajan et al. 2017, Axiomatic Attribution for Deep Networks,
https://arxiv.org/abs/1703.01365, as captum (https://captum.ai) computes them, by the word
embeddings of the model in fp32. The baseline is the text with padding in place of all its tokens;
the special ones around them stay, and so do positions and mask. What the tokens add sums up to
what the logit gains over the baseline's, but for the completeness gap, which shrinks with steps.

Letters: B inputs, T tokens, D values of an embedding, C classes. No HTTP and no Ray here; torch
and captum are imported when a model is loaded.
"""

import asyncio
import importlib
import inspect
import itertools
import os
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from .engine import TorchEngine

Tree = dict[str, Any]

STEPS, FEWEST_STEPS = 50, 8
BATCH_TOKENS = 1024  # of inputs that are computed together: they bound the memory
LIMIT_S = 10.0  # for one text
# From asking to the answer, waiting included: HAProxy asks another replica after 20 s.
ANSWER_S = 17.0
WAITING = 2  # who may wait beside the one that is answered
NICE = 19  # the least; Ray starts its workers with 15
NEEDS = ("torch", "transformers", "captum")
REPORTED, REPORT_STEPS, REPORT_S = 4, 32, 5.0
LEAST_SHARE = 0.05  # of the most that one word adds: what adds less is not marked


class CannotError(Exception):
    """This model, or any on this machine, cannot be explained."""


class TooLongError(Exception):
    """The text, with so many steps, takes more time than there is."""


class BusyError(Exception):
    """Others have asked before, and too many wait."""


class Explainer:
    """A text classifier in fp32 that tells why; for one thread at a time."""

    def __init__(self, folder: Path, name: str, device: str = "cpu", threads: int = 0) -> None:
        """Takes seconds. Raises CannotError where torch, captum or the weights are missing."""
        try:
            torch, *_ = [importlib.import_module(needed) for needed in NEEDS]
            rounding = torch.get_float32_matmul_precision()
            self.engine = TorchEngine(folder, name, device, threads)
            torch.set_float32_matmul_precision(rounding)  # as the process had it: tf32, perhaps
        except (ImportError, OSError):
            raise CannotError(
                f"an explanation needs {', '.join(NEEDS)} and the model's weights, and a package "
                "that computes without torch has none of them: serve the model itself, or make "
                "its package with target.serve.engine=torch"
            ) from None
        if "inputs_embeds" not in inspect.signature(self.engine.net.forward).parameters:
            raise CannotError("the model's network takes no embeddings in place of tokens")
        self.engine.net.requires_grad_(False)  # only that of the embeddings is wanted

    def __call__(
        self,
        text: str,
        label: str | None = None,
        steps: int | None = None,
        limit_s: float = LIMIT_S,
    ) -> Tree:
        """The explanation of a label, by default of the one that the model gives: as JSON has it,
        and /explain answers it. Offsets are in characters (code points) of the text. By default
        50 steps, or as many as can be made in time.

        Raises CannotError, and TooLongError after `limit_s`.
        """
        import torch

        began = time.perf_counter()
        encoding, info = self._encoded(text), self.engine.info
        special = torch.tensor(encoding.special_tokens_mask, dtype=torch.bool)
        ids = torch.tensor(encoding.ids)
        both = torch.stack([ids, ids.where(special, info.pad_id)]).to(self.engine.device)
        with torch.no_grad():
            embeddings = self.engine.net.get_input_embeddings()(both)  # (2, T, D)
            logits = self._logits(embeddings).double().cpu()  # (2, C)
        steps = steps or _affordable(time.perf_counter() - began, limit_s)
        number = info.labels.index(label) if label is not None else int(logits[0].argmax())
        adds = self._attributed(embeddings, number, steps, limit_s)
        gains = float(logits[0, number] - logits[1, number])
        gap = abs(sum(adds) - gains)
        scores = {one["label"]: one["score"] for one in self.engine.decode(logits[0])}
        return {
            "label": info.labels[number],
            "score": scores[info.labels[number]],
            "method": "integrated gradients of the label's logit by the word embeddings, captum "
            + importlib.import_module("captum").__version__,
            "baseline": f"{self._padding()} in place of each token",
            "steps": steps,
            "completeness_gap": {
                "absolute": _short(gap),
                "relative": _short(gap / abs(gains)) if abs(gains) > 1e-9 else None,
            },
            "tokens": _tokens(encoding, adds),
            "truncated": bool(encoding.overflowing),
        }

    def _encoded(self, text: str) -> Any:
        """As the engines encode it, with offsets."""
        engine = self.engine
        batch = engine.tokenizer([text], truncation=True, max_length=engine.info.max_tokens)
        if not batch.encodings:  # not one of the tokenizers library
            raise CannotError("the model's tokenizer does not tell where in a text its tokens are")
        return batch.encodings[0]

    def _padding(self) -> str:
        return self.engine.tokenizer.convert_ids_to_tokens(self.engine.info.pad_id)

    def _logits(self, embeddings: Any) -> Any:
        """(B, T, D) -> (B, C), all tokens seen."""
        import torch

        mask = torch.ones(embeddings.shape[:2], dtype=torch.int64, device=embeddings.device)
        return self.engine.net(inputs_embeds=embeddings, attention_mask=mask).logits

    def _attributed(self, pair: Any, number: int, steps: int, limit_s: float) -> list[float]:
        """What each token adds (T,) to a class's logit, of the embeddings of a text and of its
        baseline (2, T, D)."""
        from captum.attr import IntegratedGradients

        end = time.perf_counter() + limit_s

        def forward(embeddings: Any) -> Any:
            if time.perf_counter() > end:
                raise TooLongError(
                    f"{pair.shape[1]} tokens and {steps} steps take more than the {limit_s:.0f} s "
                    "of an explanation here: fewer steps, or a shorter text"
                )
            return self._logits(embeddings)

        at_once = max(1, BATCH_TOKENS // pair.shape[1])
        found = IntegratedGradients(forward).attribute(
            pair[:1], pair[1:], target=number, n_steps=steps, internal_batch_size=at_once
        )
        return found[0].detach().double().sum(-1).tolist()


def _affordable(pair_s: float, limit_s: float) -> int:
    """Steps for half of the time, where a text and its baseline took so long forward: a step is
    one of them forward, and backward for twice that."""
    return max(FEWEST_STEPS, min(STEPS, int(limit_s / 2 / (1.5 * pair_s))))


def _tokens(encoding: Any, adds: list[float]) -> list[Tree]:
    """Those of the text itself. `word` numbers the words that the tokenizer cuts into pieces."""
    every = zip(
        *(encoding.tokens, encoding.offsets, encoding.word_ids, adds),
        encoding.special_tokens_mask,
        strict=True,
    )
    found: list[Tree] = []
    last, word = None, -1
    for token, (start, end), of, score, special in every:
        if special:
            continue
        word += of is None or of != last
        last = of
        place = {"token": token, "word": word, "start": start, "end": end}
        found.append({**place, "score": _short(score)})
    return found


def _short(number: float) -> float:
    """Six digits: the rest is rounding."""
    return float(f"{number:.6g}")


# ---------------------------------------------------------------- behind a server


class Line:
    """Explains one text at a time, in a thread that lets all other work go first; few wait.

    `load` makes the explainer when it is first asked for.
    """

    def __init__(self, load: Callable[[], Explainer]) -> None:
        self.load, self.asked = load, 0
        self.explainer: Explainer | None = None
        self.thread = ThreadPoolExecutor(1, "explain", _give_way)

    async def __call__(self, text: str, label: str, steps: int | None) -> Tree:
        """Raises BusyError where too many wait or the answer does not come in time, and what
        Explainer raises."""
        if self.asked > WAITING:
            raise BusyError(f"one explanation is made, and {WAITING} wait")
        self.asked += 1
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(ANSWER_S):
                return await loop.run_in_executor(self.thread, self._explain, text, label, steps)
        except TimeoutError:
            raise BusyError(f"no explanation within {ANSWER_S:g} s") from None
        finally:
            self.asked -= 1

    def _explain(self, text: str, label: str, steps: int | None) -> Tree:
        if self.explainer is None:
            self.explainer = self.load()
        return self.explainer(text, label, steps)


def _give_way() -> None:
    """Predictions come before this thread, and before those that torch starts from it."""
    if sys.platform == "linux":  # elsewhere it would be the whole process
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)


# ---------------------------------------------------------------- in the report


def of_rows(
    folder: Path,
    texts: Sequence[str],
    truth: Sequence[str],
    labels: Sequence[str],
    answers: np.ndarray | None,
    tell: Callable[[str], None],
) -> Tree:
    """Explanations of a few of N rows for the report, with the answers (N, 2) that a model gave
    them: its class and its probability. {} where there are none; a line where something goes wrong:
    no training is lost for it."""
    found = list[Tree]()
    try:
        if answers is None:
            return {}
        explainer, began = Explainer(folder, folder.name), time.perf_counter()
        for i in telling([labels[int(one)] for one in answers[:, 0]], truth, answers[:, 1]):
            left_s = began + REPORT_S - time.perf_counter()
            if found and left_s <= 0:
                break
            label = labels[int(answers[i, 0])]
            made = explainer(texts[i], label, REPORT_STEPS, max(left_s, 1.0))
            read = max((one["end"] for one in made["tokens"]), default=0)
            text = texts[i][:read] if made["truncated"] else texts[i]
            found.append({"text": text, "truth": truth[i], **made})
    except Exception as e:  # whatever torch thinks of this network or machine
        why = " ".join(str(e).split())[:200] or type(e).__name__
        tell(f"train: the report explains {len(found)} answers: {why}")
    return {"rows": found} if found else {}


def telling(given: Sequence[str], truth: Sequence[str], sure: np.ndarray) -> list[int]:
    """Which rows tell most of a model: the mistakes that it is surest of, then what it is surest
    of at all."""
    order = np.argsort(-sure, kind="stable").tolist()
    wrong = [i for i in order if given[i] != truth[i]]
    right = [i for i in order if given[i] == truth[i]]
    return [*wrong[: REPORTED - 1], *right[:1]]


def words(tokens: list[Tree]) -> list[tuple[int, int, float]]:
    """Where each word starts and ends, and what its pieces add together."""
    found = []
    for _, pieces in itertools.groupby(tokens, lambda one: one["word"]):
        every = list(pieces)
        ends = min(one["start"] for one in every), max(one["end"] for one in every)
        found.append((*ends, sum(one["score"] for one in every)))
    return found


def marked(text: str, tokens: list[Tree]) -> list[tuple[str, float]]:
    """A text in pieces, each with what it adds as a share of the most that one of its words adds,
    or takes: -1 to 1; 0 between words, and where it is next to nothing."""
    most = max((abs(score) for *_, score in words(tokens)), default=0) or 1
    found, at = list[tuple[str, float]](), 0
    for start, end, score in words(tokens):
        if end <= at:  # one character in several words: the first of them has it
            continue
        share = score / most
        found += [(text[at:start], 0.0)] if start > at else []
        found.append((text[max(at, start) : end], share if abs(share) >= LEAST_SHARE else 0.0))
        at = end
    return [*found, (text[at:], 0.0)] if at < len(text) else found

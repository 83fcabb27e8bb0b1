"""Task (what to learn) and Target (where, how wide): typed, frozen, loaded from YAML, overridden by
dotted keys.

No key lives in both files, so nothing is merged and nothing has precedence. Every message a user
sees for a bad
config is made here; the heavy libraries are not imported.
"""

import difflib
import math
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StrictInt,
    ValidationError,
    model_validator,
)


class UserError(ValueError):
    """What the user can put right: shown without a traceback, exit code 2."""


class Interrupted(Exception):  # noqa: N818  (not an error)
    """Ctrl-C, once what it means has been said: exit code 130."""


class Section(BaseModel):
    """A part of a config file: unknown keys are refused, and nothing changes after loading."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False
    )

    @model_validator(mode="before")
    @classmethod
    def _no_bools(cls, values: Any) -> Any:
        # YAML reads yes, no, on and off as bools, which pydantic would take for 1 and 0.
        for key, value in values.items() if isinstance(values, dict) else ():
            field = cls.model_fields.get(key)
            if isinstance(value, bool) and (field is None or field.annotation is not bool):
                raise ValueError(f"{key} is {value}; YAML reads yes, no, on and off so: quote it")
        return values


Metric = Literal["eval_accuracy", "eval_f1", "eval_loss"]


# ---------------------------------------------------------------- Task: what to learn


class Model(Section):
    """The network: a pretrained one, or a BERT built from scratch."""

    pretrained: str | None = None
    """Hub id (`ID@REVISION` pins one), local folder, `package:NAME/PATH`, or null for a BERT from
    scratch."""
    layers: int | None = Field(None, ge=1, le=48)
    """Keep the first N layers of the pretrained model (null = all); from scratch: how many (null =
    2)."""
    hidden: int = Field(128, ge=8, le=4096)
    """Width; from scratch only."""
    heads: int = Field(2, ge=1, le=64)
    """Attention heads; from scratch only."""
    vocab_size: int = Field(8000, ge=100, le=200_000)
    """Pieces in the WordPiece vocabulary trained on the training texts; from scratch only."""
    dropout: float = Field(0.1, ge=0, lt=1)
    """Dropout everywhere in the network, the classifier included."""

    @model_validator(mode="after")
    def _scratch_keys(self) -> "Model":
        if self.pretrained is None:
            if self.hidden % self.heads:
                raise ValueError(
                    f"model.hidden is {self.hidden}, which model.heads ({self.heads}) does not "
                    "divide"
                )
            return self
        for key in ("hidden", "heads", "vocab_size"):
            if getattr(self, key) != type(self).model_fields[key].default:
                raise ValueError(
                    f"model.{key} is {getattr(self, key)} but model.pretrained is "
                    f"'{self.pretrained}', which fixes it; leave model.{key} out"
                )
        return self


class Data(Section):
    """The rows: where they come from and which columns count."""

    source: str = "builtin:docstrings"
    """`builtin:docstrings`, `files`, or the id of a dataset on the hub (`ID@REVISION` pins one)."""
    subset: str | None = None
    """Configuration of a hub dataset, such as sst2 of nyu-mll/glue."""
    train: str | None = None
    """files: path or URL (csv, tsv, jsonl, parquet); streamed, a folder or a pattern (*) too. Hub:
    the split's name (null = train)."""
    validation: str | None = None
    """Like train. null: the hub's validation split if there is one, else a stratified part of
    train."""
    text: str = "text"
    """Column with the text."""
    label: str = "label"
    """Column with the label, a string or an integer."""
    max_tokens: int = Field(64, ge=4, le=8192)
    """Longer texts are cut."""
    validation_fraction: float = Field(0.1, gt=0, lt=1)
    """Share of each class held out when there is no validation split."""
    streaming: bool = False
    """files: for more rows than memory holds. They are read again in every epoch, and shuffled
    within parts of files; what is held out is chosen by the text, some 5 MB at most."""

    @model_validator(mode="after")
    def _files(self) -> "Data":
        if self.streaming and self.source != "files":
            raise ValueError(
                f"data.streaming is true but data.source is '{self.source}'; only files stream"
            )
        if self.source == "files" and not self.train:
            raise ValueError("data.source is 'files' but data.train is null; give a path or URL")
        if self.source.startswith("builtin:"):
            if self.source != "builtin:docstrings":
                raise ValueError(
                    f"data.source is '{self.source}'; the one that is built in is "
                    "'builtin:docstrings'"
                )
            for key in ("train", "validation", "subset"):
                if getattr(self, key) is not None:
                    raise ValueError(
                        f"data.{key} is '{getattr(self, key)}' but data.source is "
                        "'builtin:docstrings'; for your own files set data.source to 'files'"
                    )
        return self


class Train(Section):
    """The optimisation: all that decides which weights come out."""

    epochs: int = Field(3, ge=1, le=10_000)
    """Passes over the training rows."""
    global_batch: int = Field(64, ge=1, le=1_000_000)
    """Rows per optimizer step over all workers together."""
    lr: float = Field(3e-4, gt=0, le=10)
    """Peak learning rate of AdamW."""
    weight_decay: float = Field(0.01, ge=0, le=10)
    """Decay of matrices; biases and norms are left alone."""
    warmup: float = Field(0.1, ge=0, le=1)
    """Share of the steps in which the rate rises from 0; then it falls to 0."""
    grad_clip: float = Field(1.0, gt=0)
    """Largest norm of the gradient."""
    evals_per_epoch: int = Field(1, ge=1, le=1000)
    """How often the validation rows are looked at."""
    metric: Metric = "eval_accuracy"
    """Which evaluation is the best one, whose weights are exported."""
    seed: int = Field(0, ge=0, le=2**31 - 1)
    """Seeds the weights, the order of rows, dropout and the splits."""


class Between(Section):
    """A number between two bounds."""

    draw: Literal["uniform", "loguniform"]
    low: float
    high: float

    @model_validator(mode="after")
    def _order(self) -> "Between":
        if self.low >= self.high:
            raise ValueError(f"low is {self.low} but high is {self.high}; low must be smaller")
        if self.draw == "loguniform" and self.low <= 0:
            raise ValueError(f"draw is 'loguniform' but low is {self.low}; it must be above 0")
        return self

    @property
    def corners(self) -> list[Any]:
        """The values that must be valid for all that can be drawn to be."""
        # One in between that is not round: a key that takes whole numbers only refuses it.
        return [self.low, self.low + (self.high - self.low) / math.pi, self.high]


class Whole(Section):
    """A whole number from low to high, both included."""

    draw: Literal["int"]
    low: int
    high: int

    @model_validator(mode="after")
    def _order(self) -> "Whole":
        if self.low >= self.high:
            raise ValueError(f"low is {self.low} but high is {self.high}; low must be smaller")
        return self

    @property
    def corners(self) -> list[Any]:
        """The values that must be valid for all that can be drawn to be."""
        return [self.low, self.high]


class Choice(Section):
    """One of the listed values."""

    draw: Literal["choice"]
    values: list[Any] = Field(min_length=1)

    @property
    def corners(self) -> list[Any]:
        """The values that must be valid for all that can be drawn to be."""
        return self.values


Draw = Annotated[Between | Whole | Choice, Field(discriminator="draw")]

# The rows are tokenised once and shared by all trials, and tune.* says how long each runs.
_READ_WITH = ("model.pretrained", "model.vocab_size")
_NOT_DRAWN = (*_READ_WITH, "train.epochs", "train.evals_per_epoch")
# What may change in mid-trial: not the shape of the network, the steps of an epoch or the seed.
_MUTABLE = ("train.lr", "train.weight_decay", "train.warmup", "train.grad_clip", "model.dropout")


class TaskTune(Section):
    """The sweep: how much is tried, on how little."""

    trials: int | None = Field(None, ge=1, le=1_000_000)
    """How many combinations; null with search: grid, which runs all."""
    train_rows: int = Field(4000, ge=2)
    """A stratified part of the training rows: what stage 1 is for."""
    epochs: int = Field(2, ge=1, le=10_000)
    """Epochs of a trial."""
    evals_per_epoch: int = Field(2, ge=1, le=1000)
    """Every evaluation is reported, and is a chance to stop a poor trial early."""
    search: Literal["random", "grid", "optuna"] = "optuna"
    """How combinations are proposed."""
    scheduler: Literal["fifo", "asha", "median", "pbt"] = "asha"
    """asha stops the worse half at 1, 2, 4, ... evaluations, median what is below the median of the
    others so far; pbt lets the worst go on from the weights of the best, with values near theirs;
    fifo lets all finish."""
    metric: Metric = "eval_accuracy"
    """What makes a trial the best one."""
    space: dict[str, Draw] = Field(default_factory=dict)
    """Dotted path into this file -> how to draw it."""
    points: list[dict[str, Any]] = []
    """What to try first: values of tune.space's paths; what is left out is as the task has it."""
    max_predict_ms: float | None = Field(None, gt=0)
    """A trial whose model takes longer for one text, on what the trial has, is stopped and never
    the best."""
    confirm_seeds: int = Field(3, ge=1, le=100)
    """The best few are run again until each has so many seeds, from train.seed up, and the best
    mean wins; 1, or where train.seed is drawn: the best single trial wins."""

    @model_validator(mode="after")
    def _fits(self) -> "TaskTune":
        if self.scheduler == "pbt" and self.search == "optuna":
            raise ValueError(
                "tune.scheduler is 'pbt', which changes what was drawn, but tune.search is "
                "'optuna', which learns from it; set tune.search to 'random'"
            )
        if self.scheduler == "pbt" and not self.space:
            raise ValueError("tune.scheduler is 'pbt' but tune.space is empty: nothing to change")
        for path in self.space:
            if self.scheduler == "pbt" and path not in _MUTABLE:
                raise ValueError(
                    f"tune.scheduler is 'pbt' but tune.space draws '{path}', which cannot change "
                    f"in mid-trial; {', '.join(_MUTABLE)} can"
                )
        if self.points and (self.trials or 0) < len(self.points):
            raise ValueError(
                f"tune.points has {len(self.points)} points but tune.search is 'grid', which tries "
                "its own"
                if self.search == "grid"
                else f"tune.points has {len(self.points)} points but tune.trials is {self.trials}"
            )
        return self

    @model_validator(mode="after")
    def _search(self) -> "TaskTune":
        if self.search != "grid":
            if self.trials is None:
                raise ValueError(
                    f"tune.search is '{self.search}' but tune.trials is null; say how many"
                )
            return self
        for path, draw in self.space.items():
            if not isinstance(draw, Choice):
                raise ValueError(
                    f"tune.search is 'grid' but tune.space '{path}' draws '{draw.draw}'; "
                    "a grid takes draw: choice"
                )
        if self.trials is not None:
            raise ValueError(
                f"tune.search is 'grid', which runs all {self._combinations} combinations, but "
                f"tune.trials is {self.trials}; set tune.trials to null"
            )
        return self

    @property
    def num_trials(self) -> int:
        """How many combinations the sweep runs."""
        if self.trials is not None:
            return self.trials
        return self._combinations

    @property
    def _combinations(self) -> int:
        return math.prod(len(draw.corners) for draw in self.space.values())

    @property
    def deepest(self) -> int:
        """The most layers that a trial may have; 0 where none are drawn."""
        drawn = self.space["model.layers"].corners if "model.layers" in self.space else []
        tried = [point["model.layers"] for point in self.points if "model.layers" in point]
        return max((int(value) for value in [*drawn, *tried] if value is not None), default=0)

    @property
    def num_evals(self) -> int:
        """How many evaluations a trial has that is not stopped early."""
        return self.epochs * self.evals_per_epoch

    @property
    def num_candidates(self) -> int:
        """How many of the best are run again with other seeds: a growing, but ever smaller part."""
        if self.confirm_seeds == 1 or "train.seed" in self.space:
            return 0
        return min(self.num_trials, max(2, min(4, self.num_trials // 8)))


class Task(Section):
    """WHAT to learn: model, data, training, search space. Names no machine."""

    model: Model = Model()
    data: Data = Data()
    train: Train = Train()
    tune: TaskTune = TaskTune(trials=8)

    @model_validator(mode="after")
    def _space(self) -> "Task":
        for path, draw in self.tune.space.items():
            if path in _NOT_DRAWN or not path.startswith(("model.", "train.")):
                raise ValueError(f"tune.space: '{path}' cannot be drawn; model.* and train.* can")
            for value in draw.corners:
                try:
                    self.patched({path: value})
                except UserError as e:
                    raise ValueError(f"tune.space: {e}") from None
        for i, point in enumerate(self.tune.points):
            if strange := point.keys() - self.tune.space.keys():
                raise ValueError(
                    f"tune.points[{i}] has '{min(strange)}', which tune.space does not draw"
                )
            try:
                self.patched(point)
            except UserError as e:
                raise ValueError(f"tune.points[{i}]: {e}") from None
        return self

    def patched(self, params: dict[str, Any]) -> "Task":
        """This task with dotted paths replaced; raises UserError where the result is not a Task."""
        tree = self.model_dump(exclude={"tune"})
        for path, value in params.items():
            _set(tree, path, value, Task, "task")
        task = _validate(Task, tree, "task")
        return task.model_copy(update={"tune": self.tune})


# ---------------------------------------------------------------- Target: where and how wide

Placement = Literal["SPREAD", "PACK", "STRICT_SPREAD", "STRICT_PACK"]


class Ray(Section):
    """The cluster and the storage that its nodes share."""

    address: str | None = None
    """null starts Ray here (or joins RAY_ADDRESS, as a submitted job does); auto or HOST:PORT
    joins."""
    storage: str = "runs"
    """Folder or URI of the runs; on a joined cluster absolute or a URI that every node reaches."""


def _selector(labels: dict[str, str]) -> dict[str, str]:
    for key, value in labels.items():
        if not re.fullmatch(r"!?(in\(\s*[\w.-]+(\s*,\s*[\w.-]+)*\s*\)|\w[\w.-]*)", value):
            raise ValueError(
                f"the label selector {key}: {value!r} is none; give VALUE, !VALUE, in(A, B) or "
                "!in(A, B)"
            )
    return labels


Selector = Annotated[dict[str, str], AfterValidator(_selector)]


class TargetTune(Section):
    """What one trial gets."""

    cpus_per_trial: float = Field(1, gt=0)
    gpus_per_trial: float = Field(0, ge=0)
    """0.25 packs four trials on a GPU."""
    concurrent_trials: int | None = Field(None, ge=1)
    """null: as many as fit."""
    time_budget_s: float | None = Field(None, gt=0)
    """Stop the sweep after this long and keep the best so far."""
    max_failures: int = Field(2, ge=0)
    """How often a trial that fails is tried again."""
    placement: Placement = "SPREAD"
    """Anywhere: trials do not talk to each other."""
    label_selector: Selector = {}
    """Nodes that trials may use, by their Ray labels; all, spot nodes too, if empty."""


class TargetTrain(Section):
    """The workers of the DDP job."""

    workers: int | Annotated[list[StrictInt], Field(min_length=2, max_length=2)] = 1
    """How many, or [min, max] to grow and shrink with the cluster."""
    cpus_per_worker: float | None = Field(1, gt=0)
    """null: all of this machine's, shared by the workers; 1 on a cluster that is joined."""
    gpus_per_worker: float = Field(0, ge=0)
    max_batch_per_worker: int = Field(32, ge=1)
    """Rows in memory at once; what the global batch has beyond that becomes gradient
    accumulation."""
    checkpoint_every: int | str = 1
    """Epochs, or '200 steps'."""
    keep_checkpoints: int = Field(2, ge=1)
    """How many of the best checkpoints stay; the latest two always do."""
    max_failures: int = Field(3, ge=0)
    """How often training goes on from the last checkpoint after a worker is lost."""
    grow_check_s: float = Field(60, ge=1)
    """How often an elastic job looks for room for more workers; it takes them by going on from its
    last checkpoint."""
    placement: Placement = "PACK"
    """Near each other: gradients cross the network every step."""
    label_selector: Selector = {"ray.io/market-type": "!spot"}
    """Nodes that workers may use: none that may be taken away, unless asked. On GPUs of several
    types the workers take one type."""

    @model_validator(mode="after")
    def _workers(self) -> "TargetTrain":
        low, high = self.width
        if not 1 <= low <= high:
            raise ValueError(f"train.workers is {self.workers}; give N or [min, max], from 1 up")
        if not re.fullmatch(r"[1-9]\d*( steps| epochs?)?", str(self.checkpoint_every)):
            raise ValueError(
                f"train.checkpoint_every is {self.checkpoint_every!r}; give epochs (2) or '200 "
                "steps'"
            )
        return self

    @property
    def width(self) -> tuple[int, int]:
        """Fewest and most workers."""
        if isinstance(self.workers, int):
            return self.workers, self.workers
        return self.workers[0], self.workers[1]

    def checkpoint_steps(self, steps_per_epoch: int) -> int:
        """Optimizer steps between two checkpoints."""
        count, _, unit = str(self.checkpoint_every).partition(" ")
        return int(count) * (1 if unit == "steps" else steps_per_epoch)


EngineKind = Literal["auto", "torch", "openvino-fp32", "openvino-bf16", "openvino-int8"]


class Replicas(Section):
    """How many copies of the model answer."""

    min: int = Field(1, ge=0)
    """0: none while nobody asks; whoever asks first then waits for one to start."""
    max: int = Field(1, ge=1)
    idle_s: float = Field(600, ge=1)
    """A replica that was one too many for so long is stopped."""

    @model_validator(mode="after")
    def _order(self) -> "Replicas":
        if self.min > self.max:
            raise ValueError(
                f"serve.replicas.min is {self.min} but serve.replicas.max is {self.max}"
            )
        return self


class TargetServe(Section):
    """The deployment and its limits."""

    replicas: Replicas = Replicas()
    cpus_per_replica: float = Field(0.5, gt=0)
    """Fractions leave room to start a new replica before the old one stops."""
    gpus_per_replica: float = Field(0, ge=0)
    max_replicas_per_node: int | None = Field(None, ge=1, le=100)
    """1 = survive the loss of a node."""
    label_selector: Selector = {"ray.io/market-type": "!spot"}
    """Nodes that replicas may use; the head only when no other has room."""
    engine: EngineKind = "auto"
    """What computes on a CPU; auto: the quickest of those whose answers are good enough, measured
    when a model is first served on a kind of machine. A GPU has torch."""
    max_accuracy_drop: float = Field(0.005, ge=0, le=1)
    """An engine whose accuracy on the validation rows is lower than torch's in fp32 by more than
    this is not used."""
    max_embedding_gap: float = Field(0.001, ge=0, le=2)
    """An engine is not used for embeddings, whose length is 1, if any value of theirs differs by
    more than this from torch's in fp32. bf16 mostly needs 0.002 and is twice as fast."""
    ingress: Literal["auto", "haproxy", "proxy"] = "auto"
    """How requests reach the replicas of a Ray that is started here: HAProxy, where Ray brings it
    (Linux), or Ray's own proxy. A cluster that is joined has what its nodes were started with."""
    name: str | None = Field(None, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,100}$")
    """What OpenAI's and Triton's clients call the model; null: its run's, folder's or hub's name,
    which is another one after an --update."""
    host: str = "127.0.0.1"
    """0.0.0.0 answers everybody who can reach the machine, and asks for API keys."""
    port: int = Field(8000, ge=1, le=65535)
    api_keys_file: str | None = None
    """API keys, one a line, beside those in WORKLOADS_API_KEYS; read by the command, which passes
    on their hashes."""
    tls_certfile: str | None = None
    """A certificate (PEM, with its chain), on every node: Ray's own proxy then speaks https."""
    tls_keyfile: str | None = None
    """Its private key."""
    streams: int | None = Field(None, ge=1, le=1024)
    """Forward passes at once on a CPU, a core each; null: all cores where only one replica can be
    on a machine, else cpus_per_replica."""
    max_batch: int | None = Field(None, ge=1, le=4096)
    """Most texts of all callers in one forward pass; null: 8 on a CPU, 64 on a GPU."""
    max_wait_s: float = Field(0.4, gt=0, le=60)
    """A request that would wait longer is refused with 429."""
    max_inputs: int = Field(256, ge=1)
    """Most texts in one request; more is refused with 413."""
    max_body_bytes: int = Field(1_000_000, ge=100)
    """Largest request; more is refused with 413."""
    max_request_tokens: int = Field(65_536, ge=16)
    """Most tokens of all texts of a request, each cut to what the model takes; more is refused
    with 413."""
    max_header_bytes: int = Field(16_384, ge=1024, le=60_000)
    """Largest headers of a request; more is refused with 431."""
    max_read_s: float = Field(30, gt=0, le=3600)
    """A request that takes longer to arrive is refused with 408."""
    access_log: bool = False
    """A line of JSON for each request, without anything that it holds, in a file beside the
    replica's log."""

    @model_validator(mode="after")
    def _reach(self) -> "TargetServe":
        if ":" in self.host:
            told = "IPv6 is not served; give 127.0.0.1, 0.0.0.0 or a name"
            raise ValueError(f"serve.host is '{self.host}': {told}")
        both = {"tls_certfile": self.tls_certfile, "tls_keyfile": self.tls_keyfile}
        there = [key for key, value in both.items() if value is not None]
        if len(there) == 1:
            (missing,) = both.keys() - set(there)
            raise ValueError(f"serve.{there[0]} is given but serve.{missing} is not")
        if there and self.ingress == "haproxy":
            raise ValueError(
                "serve.tls_certfile is given but serve.ingress is 'haproxy', which has no TLS here;"
                " use proxy, or a terminator before it (clusters/README.md)"
            )
        return self


class Cost(Section):
    """What the hardware costs: every stage then says what it will and did cost."""

    cpu_hour: float | None = Field(None, ge=0)
    """Price of a core for an hour; null: not told."""
    gpu_hour: float | None = Field(None, ge=0)
    """Price of a GPU for an hour, with what its machine costs beyond its cores."""
    currency: str = Field("USD", min_length=1, max_length=8)
    spot_discount: float = Field(0, ge=0, le=1)
    """Share of the price that nodes labelled ray.io/market-type=spot save."""
    watts_per_core: float = Field(5, ge=0)
    """Assumed of a core that computes; its machine's TDP over its cores."""
    watts_per_gpu: float = Field(400, ge=0)
    """Assumed of a fully used GPU whose driver does not tell its power."""

    @property
    def priced(self) -> bool:
        """Whether there is any price."""
        return self.cpu_hour is not None or self.gpu_hour is not None


class Tracking(Section):
    """Where runs are told of, beside their folders."""

    mlflow: str | None = None
    """http://HOST:PORT of an MLflow server that is told of trials and training, gets the model and
    has those that `serve --model models:/NAME@ALIAS` takes; null: none."""

    @model_validator(mode="after")
    def _address(self) -> "Tracking":
        # Said without what was given: it may have a password in it, which run.json would show too.
        if self.mlflow and not re.fullmatch(r"https?://[^\s/?#@]+(/[^\s?#@]*)?", self.mlflow):
            raise ValueError(
                "tracking.mlflow takes the address of a server, http://HOST:PORT; a name and a "
                "password are MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
            )
        return self


class Target(Section):
    """WHERE and how wide. Changes nothing that is learned."""

    ray: Ray = Ray()
    device: Literal["cpu", "cuda"] = "cpu"
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = "auto"
    """auto: bf16 where the chip has it in hardware. GPUs only: tf32 (fp32 whose products are
    rounded to 10 bits), fp16 (with a scaled loss, for chips older than bf16)."""
    tune: TargetTune = TargetTune()
    train: TargetTrain = TargetTrain()
    serve: TargetServe = TargetServe()
    cost: Cost = Cost()
    tracking: Tracking = Tracking()

    @model_validator(mode="after")
    def _gpus(self) -> "Target":
        if self.device == "cpu" and self.precision in ("tf32", "fp16"):
            raise ValueError(
                f"precision is '{self.precision}' but device is 'cpu'; a CPU has fp32 and bf16"
            )
        needs = {
            "tune.gpus_per_trial": self.tune.gpus_per_trial,
            "train.gpus_per_worker": self.train.gpus_per_worker,
        }
        for key, gpus in needs.items():
            if self.device == "cuda" and not gpus:
                raise ValueError(f"device is 'cuda' but {key} is 0")
        needs["serve.gpus_per_replica"] = self.serve.gpus_per_replica
        for key, gpus in needs.items():
            if gpus > 1 and gpus % 1:
                raise ValueError(f"{key} is {gpus:g}; above 1 it is a whole number")
            if self.device == "cpu" and gpus:
                raise ValueError(f"device is 'cpu' but {key} is {gpus:g}")
        return self


class Run(NamedTuple):
    """A resolved task and target, and the names they were asked for by."""

    task_name: str
    task: Task
    target_name: str
    target: Target


# ---------------------------------------------------------------- loading


def config_dirs() -> list[Path]:
    """Where a bare name is looked up: here, in the checkout, in the installed package."""
    package = Path(__file__).parent
    found = [Path("configs"), package.parent / "configs", package / "configs"]
    return [d for d in dict.fromkeys(p.resolve() for p in found) if d.is_dir()]


def list_configs(kind: str) -> dict[str, Path]:
    """Name -> file of the tasks or targets that a bare name reaches."""
    found: dict[str, Path] = {}
    for folder in config_dirs():
        for path in sorted((folder / kind).glob("*.yaml")):
            found.setdefault(path.stem, path)
    return found


def find_config(kind: str, name: str) -> Path:
    """The file behind a name or a path; raises UserError when there is none."""
    if name.endswith((".yaml", ".yml", ".json")) or os.sep in name:
        path = Path(name).expanduser()
        if path.is_file():
            return path
        raise UserError(f"--{kind[:-1]} {name}: no such file (looked for {path.resolve()})")
    known = list_configs(kind)
    if name in known:
        return known[name]
    raise UserError(
        f"--{kind[:-1]} {name}: no such name{_did_you_mean(name, known)}; there are: "
        f"{', '.join(known) or 'none'} (a path ends in .yaml)"
    )


def load(
    task: str,
    target: str,
    overrides: list[str] | None = None,
    stored: dict[str, Any] | None = None,
) -> Run:
    """Both files with the overrides (`task.train.lr=1e-4`) applied; raises UserError.

    `stored` is the task of an existing run, which then stands for the task's file.
    """
    trees = {
        "task": stored or _read_yaml(find_config("tasks", task)),
        "target": _read_yaml(find_config("targets", target)),
    }
    kinds: dict[str, type[Section]] = {"task": Task, "target": Target}
    for item in overrides or []:
        path, equals, text = item.partition("=")
        root, _, rest = path.partition(".")
        if not equals or root not in trees or not rest:
            homes = [home for home, kind in kinds.items() if root in kind.model_fields]
            hint = "".join(f"; did you mean {home}.{item}?" for home in homes)
            raise UserError(
                f"'{item}': an override is task.KEY=VALUE or target.KEY=VALUE, "
                f"as in task.train.lr=1e-4{hint}"
            )
        _set(trees[root], rest, _parse_value(path, text), kinds[root], root)
    return Run(
        Path(task).stem,
        _validate(Task, trees["task"], "task"),
        Path(target).stem,
        _validate(Target, trees["target"], "target"),
    )


def load_patch(path: str) -> dict[str, Any]:
    """A Task patch such as tune/best.json, as dotted paths; raises UserError."""
    if not Path(path).is_file():
        raise UserError(f"--params {path}: no such file")
    params = flat(_read_yaml(Path(path)))
    if other := [p for p in params if p in _READ_WITH or not p.startswith(("model.", "train."))]:
        raise UserError(
            f"--params {path}: {', '.join(other)}: decides what is read, before anything is "
            f"trained; give it as task.{other[0]}=VALUE"
        )
    return params


def read_section(kind: type[Any], path: Path) -> Any:
    """A YAML file as a section; raises UserError naming the keys that are wrong."""
    return _validate(kind, _read_yaml(path), str(path))


def flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested keys as dotted paths; tune.space keeps its own dotted keys."""
    out: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            out.update(flat(value, path + "."))
        else:
            out[path] = value
    return out


def nested(params: dict[str, Any]) -> dict[str, Any]:
    """Dotted paths as nested keys: the inverse of `flat`."""
    tree: dict[str, Any] = {}
    for path, value in params.items():
        *parents, last = path.split(".")
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = value
    return tree


def figure(value: float) -> str:
    """An amount for people, to three digits or more and never with an exponent."""
    if abs(value) >= 10:
        return f"{value:,.2f}".removesuffix(".00")
    words = f"{value:.3g}"
    return f"{float(words):.12f}".rstrip("0").rstrip(".") if "e" in words else words


def changed_keys(a: dict[str, Any], b: dict[str, Any]) -> list[str]:
    """Dotted paths at which two dumped configs differ."""
    x, y = flat(a), flat(b)
    return sorted(k for k in x.keys() | y.keys() if x.get(k) != y.get(k))


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError) as e:  # of what looks like a date and is none
        raise UserError(f"{path}: not YAML: {' '.join(str(e).split())}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"{path}: expected keys and values, found {type(tree).__name__}")
    return tree


def _parse_value(path: str, text: str) -> Any:
    try:
        return text if text.endswith(":") else yaml.safe_load(text)  # :: would be a mapping
    except (yaml.YAMLError, ValueError) as e:
        raise UserError(f"{path}={text}: not a YAML value: {' '.join(str(e).split())}") from None


def _set(tree: dict[str, Any], path: str, value: Any, kind: type[Section], root: str) -> None:
    """Sets a dotted path in a raw tree, naming the nearest key where a part of it does not
    exist."""
    node, section, where = tree, kind, root
    keys = path.split(".")
    for i, key in enumerate(keys):
        if key not in section.model_fields:
            raise UserError(_no_such_key(where, key, section))
        inner = section.model_fields[key].annotation
        if i == len(keys) - 1:
            node[key] = value
            return
        if not (isinstance(inner, type) and issubclass(inner, Section)):
            # tune.space: what follows is a task path of its own.
            if key == "space":
                node[key] = {**(node.get(key) or {}), ".".join(keys[i + 1 :]): value}
                return
            raise UserError(f"{where}.{key}: is a value, it has no key '{keys[i + 1]}'")
        node = node.setdefault(key, {})
        if not isinstance(node, dict):
            raise UserError(f"{where}.{key}: expected keys and values, found {node!r}")
        section, where = inner, f"{where}.{key}"


def _validate(kind: type[Any], tree: dict[str, Any], root: str) -> Any:
    try:
        return kind.model_validate(tree)
    except ValidationError as e:
        raise UserError("\n".join(_explain(err, kind, root) for err in e.errors())) from None


_TAGS = ("uniform", "loguniform", "int", "choice", "str", "list[int]")


def _explain(err: Any, kind: type[Section], root: str) -> str:
    """One pydantic error as one line: what was wrong, what would be right."""
    # The tag of a union's member is no key.
    loc = [p for p in map(str, err["loc"]) if p not in _TAGS]
    where = ".".join([root, *loc])
    if err["type"] == "extra_forbidden":
        section: Any = kind
        for part in loc[:-1]:
            field = getattr(section, "model_fields", {}).get(part)
            section = field.annotation if field else None
        return _no_such_key(".".join([root, *loc[:-1]]), loc[-1], section)
    if err["type"] == "value_error":
        message = err["msg"].removeprefix("Value error, ")
        # Most messages name their keys in full, from the section's top on; those of a draw and of
        # _no_bools do not know where they are.
        knows = not loc or "." in message.partition(" ")[0]
        return f"{root}: {message}" if knows else f"{where}.{message}"
    message = err["msg"][0].lower() + err["msg"][1:]
    return f"{where}: {message}, got {err['input']!r}"


def _no_such_key(where: str, key: str, section: Any) -> str:
    known = list(getattr(section, "model_fields", {}))
    hint = _did_you_mean(key, known) or (f"; there are: {', '.join(known)}" if known else "")
    return f"{where}.{key}: no such key{hint}"


def _did_you_mean(name: str, known: Any) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean '{near[0]}'?" if near else ""

"""Ray Train without habits that cost people time: on one machine, on many networks, at Ctrl-C."""

import os
import signal
import threading
from dataclasses import dataclass
from typing import Any

import psutil
import ray
import ray.train
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.torch.config import _TorchBackend
from ray.train.v2._internal.execution.scaling_policy import FixedScalingPolicy

from . import cluster


class Backend(_TorchBackend):
    """Gradients cross the network that Ray uses.

    gloo by itself takes the interface that the host's own name resolves to: on many Linux machines
    that is loopback, where no other node answers.
    """

    def on_start(self, worker_group: Any, backend_config: Any) -> None:
        worker_group.execute(_use_rays_interface)
        super().on_start(worker_group, backend_config)


@dataclass
class Torch(TorchConfig):
    """torch.distributed over the network that Ray uses."""

    @property
    def backend_cls(self) -> type[Backend]:
        return Backend


def _use_rays_interface() -> None:
    address = ray.util.get_node_ip_address()
    for name, addresses in psutil.net_if_addrs().items():
        if any(a.address == address for a in addresses):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)


class Alone(FixedScalingPolicy):
    """Asks nobody for machines: spares the start of an actor that has none to give."""

    def after_controller_start(self, train_run_context: Any) -> None:
        return

    def _maybe_send_resource_request(self) -> None:
        return


class Trainer(TorchTrainer):
    """Without habits of Train that cost people time."""

    insisting: list[threading.Timer] = []

    def _initialize_and_run_controller(self, **given: Any) -> Any:
        this: Any = self  # the declared type is that of Train V1
        joined = cluster.joins(this.train_loop_config["target"])
        if type(given["scaling_policy"]) is FixedScalingPolicy and not (joined or this.datasets):
            given["scaling_policy"] = Alone(this.scaling_config)
        return TorchTrainer._initialize_and_run_controller(this, **given)  # type: ignore[attr-defined]

    def _register_sigint_handler(self, controller: Any) -> None:
        """Ctrl-C ends it at once: Train's own handler lasts half a minute and ends with 1. An
        exception that is raised while Ray's code holds the main thread is lost now and then: it is
        raised again until it arrives."""

        def stop(*_: object) -> None:
            timer = threading.Timer(2, os.kill, (os.getpid(), signal.SIGINT))
            timer.start()
            self.insisting.append(timer)
            raise KeyboardInterrupt

        signal.signal(signal.SIGINT, stop)

    def _create_default_callbacks(self) -> list[Any]:
        """No actor for Ray Data where it is not used. And a Ray started here has no dashboard; the
        cleaner of placement groups asks it at the end of a training and waits 12 s for the
        answer."""
        this: Any = self  # the declared type is that of Train V1
        without = set() if this.datasets else {"DatasetsCallback"}
        if not cluster.joins(this.train_loop_config["target"]):
            without.add("PlacementGroupCleanerCallback")
        callbacks = TorchTrainer._create_default_callbacks(this)  # type: ignore[attr-defined]
        return [c for c in callbacks if type(c).__name__ not in without]

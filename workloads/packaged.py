"""Serves the model of a package from its serve.yaml, on a Ray of its own, until Ctrl-C or SIGTERM:
what `start` runs.

    HOST=127.0.0.1 PORT=8000 python -m workloads.packaged serve.yaml

Neither the command line nor what only training needs is imported.
"""

import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import yaml
from pydantic import ValidationError
from rich.console import Console

from . import cluster, keys, replica, serve
from .config import UserError
from .live import say
from .lost import Watch


def read(file: Path, environment: Mapping[str, str]) -> serve.AppArgs:
    """What serve.yaml says, at the HOST and PORT of the environment if they are given; raises
    UserError."""
    try:
        made = yaml.safe_load(file.read_text(encoding="utf-8"))
        args, http = made["applications"][0]["args"], made["http_options"]
        limits = args["target"]["serve"]
        limits["host"] = environment.get("HOST") or http["host"]
        limits["port"] = environment.get("PORT") or http["port"]
        args["model"] = str(file.parent.resolve() / args["model"])
        return serve.AppArgs.model_validate(args)
    except (OSError, yaml.YAMLError, LookupError, TypeError, ValidationError) as e:
        raise UserError(f"{file} (with HOST and PORT of the environment): {e}") from None


def access(args: serve.AppArgs, environment: Mapping[str, str]) -> keys.Access:
    """Who may ask, as serve.yaml and the environment say; raises UserError where strangers could
    without a key."""
    limits = args.target.serve
    hashes = list(dict.fromkeys([*args.keys, *keys.read(limits, environment)]))
    found = keys.Access(hashes, args.insecure or environment.get("INSECURE") == "1")
    keys.check(limits.host, found)
    return found


def run(args: serve.AppArgs, who: keys.Access, console: Console) -> None:
    """Serves until it is told to stop, and answers first what was accepted."""
    limits = args.target.serve
    cluster.check_port(limits.host, limits.port)
    cluster.preflight(args.target, ["serve"])
    try:
        _stop_when_told()
        say(console, "starting Ray")
        cluster.connect(args.target)
        _stop_when_told()  # Ray has a handler of its own
        Watch(console, lambda: "Start it again").start()
        say(console, serve.choose(args, lambda line: say(console, line)).reason)
        try:
            url = serve.deploy(args.model, args.target, args.texts, who)
        except UserError:
            replica.open_engine(args.model, args.target, None, print)  # may say it more clearly
            raise
        say(console, f"ingress: {serve.ingress_kind()}")
        say(console, f"ready: {url}  (docs: {url}/docs)")
        while True:  # a signal ends it; one that came just before signal.pause() would be missed
            time.sleep(1)
    except KeyboardInterrupt:
        say(console, "stopping: what was accepted is answered first")
        import ray

        if ray.is_initialized():
            serve.down(keep_serve=True)  # which ends with Ray
            ray.shutdown()


def _stop_when_told() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)


def main() -> None:
    """The command."""
    os.environ.pop("RAY_ADDRESS", None)
    try:
        args = read(Path(sys.argv[1]), os.environ)
        run(args, access(args, os.environ), Console())
    except UserError as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()

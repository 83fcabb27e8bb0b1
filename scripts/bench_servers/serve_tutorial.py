"""Ray Serve the way its tutorial does it: a deployment that calls a transformers pipeline."""

import signal
import sys

import ray
from ray import serve
from starlette.requests import Request
from transformers import pipeline


@serve.deployment
class Classifier:
    """One replica with the defaults."""

    def __init__(self, model: str) -> None:
        self.classifier = pipeline("text-classification", model=model, truncation=True)

    async def __call__(self, request: Request) -> list[dict]:
        """The best label of each text."""
        return self.classifier((await request.json())["inputs"])


ray.init("local", include_dashboard=False, _node_ip_address="127.0.0.1", log_to_driver=False)
serve.start(http_options={"host": "127.0.0.1", "port": int(sys.argv[2])})
serve.run(Classifier.bind(sys.argv[1]), route_prefix="/predict")
signal.pause()

"""Plain FastAPI around onnxruntime int8 without batching: the reference.

One process a core, one onnxruntime thread each, handlers in FastAPI's threads: of {1, 2} processes,
{1, 2} threads and {async, threaded} handlers on two cores, this had much the lowest p99 at 64
connections. Async handlers gave the same rate there and 7-20 % more at 16.
"""

import os
import sys

import uvicorn
from fastapi import FastAPI
from int8_model import Int8Model
from pydantic import BaseModel


class Ask(BaseModel):
    """One text or several."""

    inputs: str | list[str]


def make_app() -> FastAPI:
    """The app of one process."""
    classifier, app = Int8Model(sys.argv[1], sys.argv[3], threads=1), FastAPI()

    @app.post("/predict", response_model=None)
    def predict(ask: Ask) -> list[list[dict]]:
        """Labels with scores of each text."""
        texts = [ask.inputs] if isinstance(ask.inputs, str) else ask.inputs
        return [classifier.classify(text) for text in texts]

    return app


if __name__ == "__main__":
    port, quiet = int(sys.argv[2]), {"log_level": "warning", "access_log": False}
    uvicorn.run("fastapi_onnx:make_app", factory=True, port=port, workers=os.cpu_count(), **quiet)

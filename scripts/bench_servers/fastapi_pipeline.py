"""Plain FastAPI around a transformers pipeline: what most people write first."""

import sys

import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from transformers import pipeline

model, port = sys.argv[1], int(sys.argv[2])
classifier = pipeline("text-classification", model=model, truncation=True)
app = FastAPI()


class Ask(BaseModel):
    """One text or several."""

    inputs: str | list[str]


@app.post("/predict")
def predict(ask: Ask) -> list[dict]:
    """The best label of each text."""
    return classifier(ask.inputs)


uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning", access_log=False)

"""Pictures of the page at GET /, by headless Chromium: light, dark, narrow, and a table; or of a
run's report.

python scripts/screenshots.py FOLDER                             # of a model made up for it
python scripts/screenshots.py FOLDER --url http://127.0.0.1:8000 # of a server that runs
python scripts/screenshots.py FOLDER --report runs/NAME/report.html
"""

import argparse
import contextlib
import math
import re
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from playwright.sync_api import Browser, Page, sync_playwright
from starlette.types import ASGIApp

from workloads import api, openapi, protocols
from workloads.config import TargetServe

WORDS = {
    "aiohttp": "request session client server websocket cookie http",
    "datasets": "dataset split shard stream builder rows",
    "numpy": "array matrix axis values sort inverse eigenvalues element-wise",
    "pandas": "dataframe values sort index column series label rows",
    "pydantic": "field validate schema model alias",
    "ray": "actor cluster node task worker remote",
    "torch": "tensor gradient cuda matrix inverse module",
    "transformers": "tokenizer token model pretrained attention",
}
LINES = (
    "Sort the values along an axis.",
    "Compute the inverse of a matrix.",
    "Return the eigenvalues of a square array.",
    "Split a string into tokens for a pretrained model.",
    "Move the module's parameters to a CUDA device.",
    "Group rows of a DataFrame by the values of a column.",
    "Start an actor on another node of the cluster.",
    "Validate a field before the model is built.",
    "Keep the cookies of a client session.",
)
LOOKS: tuple[tuple[str, int, Any], ...] = (
    ("light", 1200, "light"),
    ("dark", 1200, "dark"),
    ("narrow", 320, "light"),
)
CARD = """---
widget:
  - text: Sort the values along an axis.
  - text: Group the rows by the values of a column.
---
# Which library is this docstring from?

A small BERT, trained from scratch on the docstrings of eight Python libraries.
"""


async def classify(texts: list[str], parameters: protocols.Parameters) -> protocols.Scored:
    """By the words of each label."""
    rows = []
    for text in texts:
        words = text.lower().replace(".", "").replace("'s", "").split()
        hits = {
            k: sum(w in v.split() for w in words) - 0.1 * i
            for i, (k, v) in enumerate(WORDS.items())
        }
        total = sum(math.exp(1.6 * x) for x in hits.values())
        best = sorted(((math.exp(1.6 * x) / total, k) for k, x in hits.items()), reverse=True)
        rows.append([{"label": k, "score": p} for p, k in best][: parameters.top_k])
    return protocols.Scored(rows, [])


async def explain(text: str, asked: protocols.ExplainParameters) -> protocols.Explained:
    """The words of the label add to it, those of other labels take from it."""
    found = await classify([text], protocols.Parameters())
    best, tokens = found.scores[0][0], []
    for number, match in enumerate(re.finditer(r"\w+|[^\w\s]", text)):
        hits = [label for label, words in WORDS.items() if match[0].lower() in words.split()]
        adds = 1.6 * (best["label"] in hits) or -0.7 * bool(hits)
        place = {"token": match[0], "word": number, "start": match.start(), "end": match.end()}
        tokens.append({**place, "score": adds or 0.02})
    return protocols.Explained({**openapi.EXPLAINED, **best, "tokens": tokens}, [])


async def embed(given: list[Any]) -> protocols.Embedded:
    """Vectors of length 1."""
    vectors = np.random.default_rng(0).normal(size=(len(given), 8)).astype("float32")
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return protocols.Embedded(list(vectors), [], len(given))


def example_app() -> ASGIApp:
    """The server's own app over those functions."""
    labels = sorted(WORDS)
    model = protocols.Model("docstrings-20261122-184123", labels, 128, 256, classify, embed)
    model = model._replace(explain=explain)
    notes = {"eval_accuracy": 0.7479, "eval_f1": 0.7478, "eval_loss": 0.8888}
    about = {"model": model.name, "labels": labels, "max_tokens": 96, "dimensions": 128}
    about |= {"engine": "openvino-int8", "notes": notes, "card": CARD}
    return api.make_app(model, about, TargetServe())


@contextlib.contextmanager
def serving(app: ASGIApp) -> Iterator[str]:
    """The address of an app that answers, in a thread, while the block runs."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
        thread = threading.Thread(target=server.run, args=([sock],), daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{sock.getsockname()[1]}"
        server.should_exit = True
        thread.join(10)


@contextlib.contextmanager
def chromium() -> Iterator[Browser]:
    """The system's own, headless; root may not use its sandbox."""
    with sync_playwright() as playwright:
        path = shutil.which("chromium")
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


def opened(browser: Browser, url: str, width: int, scheme: Any) -> Page:
    """The page in a window of its own."""
    page = browser.new_page(
        viewport={"width": width, "height": 800},
        color_scheme=scheme,
        reduced_motion="reduce",  # pictures of what is there at the end
        device_scale_factor=1.5,
    )
    page.goto(url)
    page.locator("#facts dt").first.wait_for()
    return page


def take(browser: Browser, url: str, folder: Path) -> None:
    """All pictures."""
    for name, width, scheme in LOOKS:
        page = opened(browser, url, width, scheme)
        page.locator(".tag").first.click()  # the first answer takes longer
        page.locator("#bars li").first.wait_for()
        page.locator("#text").fill(LINES[0])
        page.locator("#text").press("Control+Enter")
        page.wait_for_timeout(500)
        page.mouse.move(0, 0)
        page.screenshot(path=folder / f"{name}.png", full_page=True)
        page.get_by_role("button", name="Why?").click()
        page.locator("#marked").wait_for()
        page.screenshot(path=folder / f"why-{name}.png", full_page=True)
    page = opened(browser, url, 1200, "light")
    page.get_by_label("Many texts").check()
    page.locator("#lines").fill("\n".join(LINES))
    page.get_by_role("button", name="Classify all").click()
    page.get_by_role("button", name="Download CSV").wait_for()
    page.screenshot(path=folder / "table.png", full_page=True)


def take_report(browser: Browser, file: Path, folder: Path) -> None:
    """A run's report, from its top to its end."""
    for name, width, scheme in LOOKS:
        page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
        page.goto(file.resolve().as_uri())
        page.screenshot(path=folder / f"report-{name}.png", full_page=True)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--url")
    parser.add_argument("--report", type=Path)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    if args.report:
        with chromium() as browser:
            take_report(browser, args.report, args.folder)
        return
    with chromium() as browser, contextlib.ExitStack() as stack:
        take(browser, args.url or stack.enter_context(serving(example_app())), args.folder)


if __name__ == "__main__":
    main()

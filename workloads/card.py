"""The model card: model/README.md, as Hugging Face's hub reads it, from what training knows.

Its last line holds a hash of all above it. A card that a person has changed no longer matches, is
theirs from then on, and is never written over. The layout follows Mitchell et al. 2019, Model Cards
for Model Reporting, https://arxiv.org/abs/1810.03993.
"""

import hashlib
import re
from functools import partial
from pathlib import Path
from typing import Any

from . import plots
from .artifacts import RunFolder
from .config import figure
from .evaluation import BINS, MATRIX_CLASSES, confused_pairs
from .sources import short_name, without_secrets

Tree = dict[str, Any]

FILE, PLOT = "README.md", "reliability.svg"
LEAST_ROWS = 30  # of a class, to say something of it
_BEGIN, _END = "<!-- probe -->", "<!-- end of probe -->"
_SEAL = re.compile(r"<!-- made by workloads; sha256 ([0-9a-f]{64}) -->\n?\Z")


def write(model: Path, folder: RunFolder, notes: Tree, training: Tree, found: Tree) -> None:
    """Puts the card and its plot into a saved model's folder; a card of the run's former model that
    a person has changed is kept instead.

    `training` is the metrics of the checkpoint with workers, seconds and base; `found` what
    `evaluation.evaluate` says, or {}.
    """
    text = text_of(folder)
    if not text or is_ours(text):
        text = render(folder.read("run.json"), notes, training, found)
    (model / FILE).write_text(text, encoding="utf-8")
    if found:
        draw = partial(plots.reliability, found["calibration"])
        (model / PLOT).write_text(plots.svg(draw, plots.ALONE), encoding="utf-8")


def text_of(folder: RunFolder) -> str:
    """The card of a run's model, or nothing."""
    return folder.read_text(f"model/{FILE}") if folder.has(f"model/{FILE}") else ""


def render(run: Tree, notes: Tree, training: Tree, found: Tree) -> str:
    """The card's text."""
    import jinja2
    from huggingface_hub import ModelCard

    task, labels = notes["task"], notes["data"]["labels"]
    base = training["base"] and _public(training["base"])
    data = task["data"]
    files = [_public(file) for file in (data["train"], data["validation"]) if file]
    pages = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    pages.filters.update(cell=cell, figure=figure)
    text = Path(__file__).with_name("card.md.j2").read_text("utf-8")
    page = pages.from_string(text).render(
        head=_head(notes, training["base"]).to_yaml(),
        name=notes["run"],
        labels=labels,
        task=task,
        data=notes["data"],
        base=base,
        source=" and ".join(files) if data["source"] == "files" else data["source"],
        training=training,
        run=run,
        found=found,
        bins=BINS,
        most=MATRIX_CLASSES,
        pairs=confused_pairs(labels, found["confusion"]) if found else [],
        few=[one["label"] for one in found.get("classes", []) if one["rows"] < LEAST_ROWS],
        least=LEAST_ROWS,
        probe=f"{_BEGIN}\nNot probed yet: `workloads probe --model PATH/OF/THIS/FOLDER` swaps "
        f"terms for groups of people in templates and counts the labels that flip.\n{_END}",
    )
    return sealed(str(ModelCard(page)))


def _head(notes: Tree, base: str | None) -> Any:
    """What the hub sorts models by."""
    from huggingface_hub import EvalResult, ModelCardData

    source = notes["task"]["data"]["source"]
    hub = source != "files" and not source.startswith("builtin:")
    where = {"task_type": "text-classification", "dataset_type": source, "dataset_name": source}
    where["dataset_split"] = "validation"
    if notes["task"]["data"]["subset"]:
        where["dataset_config"] = notes["task"]["data"]["subset"]
    kinds = {"accuracy": "Accuracy", "f1": "Macro F1", "calibration_error": "ECE"}
    results = [
        EvalResult(metric_type=kind, metric_name=name, metric_value=round(value, 6), **where)
        for kind, name in kinds.items()
        if (value := notes.get(f"eval_{kind}")) is not None
    ]
    # What a page to try it on, the hub's or ours, puts into its box. Users' rows are their own.
    docstrings = source == "builtin:docstrings"
    return ModelCardData(
        widget=[{"text": "Compute the inverse of a matrix."}] if docstrings else None,
        language="en" if docstrings else None,  # of users' texts nobody has said it
        library_name="transformers",
        pipeline_tag="text-classification",
        tags=["text-classification", "workloads"],
        base_model=_public(base) if base and _is_hub_id(base) else None,
        datasets=[source] if hub else None,
        metrics=["accuracy", "f1"],
        model_name=notes["run"],
        eval_results=results,
    )


def _is_hub_id(name: str | None) -> bool:
    return name is not None and "@" in name and "://" not in name and not Path(name).is_dir()


def _public(name: str) -> str:
    """A model's or file's name without this machine's folders, and without a commit."""
    if _is_hub_id(name) or name.startswith("package:"):
        return short_name(name)
    return without_secrets(name).rstrip("/").rpartition("/")[2]


def cell(text: str) -> str:
    """What users named, as plain text in a Markdown table."""
    plain = re.sub(r"([\\`|<>*\[\]_~&])", r"\\\1", " ".join(str(text).split()))
    # At its start these would begin a list or a heading.
    return re.sub(r"^(\d*)([-+#.)])(?=[#\s]|$)", r"\1\\\2", plain)


def sealed(text: str) -> str:
    """With the hash that says it is ours."""
    body = _SEAL.sub("", text).rstrip("\n") + "\n\n"
    return f"{body}<!-- made by workloads; sha256 {_sha256(body)} -->\n"


def is_ours(text: str) -> bool:
    """Whether nobody has changed a card since it was written."""
    seal = _SEAL.search(text)
    return seal is not None and seal[1] == _sha256(text[: seal.start()])


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def with_probe(text: str, section: str) -> str:
    """Our card with what a probe found in place of what it had of one."""
    before, _, rest = text.partition(_BEGIN)
    return sealed(f"{before}{_BEGIN}\n{section}\n{_END}{rest.partition(_END)[2]}")

"""Writes a folder that serves a model elsewhere, without this project: by `docker build`, or by
`pip install -r requirements.txt` and one command.

    DIR/  model/ wheels/ requirements.txt serve.yaml start Dockerfile README.md

It has one engine's networks, and the weights only where torch is that engine. No time or path is
written: the same model gives the same bytes again on one machine. Where a model is measured or
exported anew, timings and networks may differ.
"""

import base64
import hashlib
import importlib.metadata
import json
import re
import shlex
import shutil
import sys
import uuid
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from . import __version__, engines, manifest, samples
from .config import Target, UserError
from .endpoint import read_texts
from .engine import EXPORTED_TOKENIZER, NETWORKS, Info, TorchEngine
from .pipeline import Job, trained_run
from .sources import short_name

ALWAYS = ("ray[serve]", "numpy", "prometheus-client", "pydantic", "pyyaml", "rich")
OPENVINO, TORCH = ("openvino", "tokenizers"), ("torch", "transformers", "captum")
TEMPLATES = Path(__file__).parent / "packaging"
# A model's own files, but for its weights; others' notes and licences go with it.
MODEL_FILES = (
    "*.json",
    "*.txt",
    "*.model",
    "*.md",
    "*.svg",
    "LICENSE*",
    "NOTICE*",
    "1_Pooling/*.json",
)
WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
EXAMPLE = "The last chapter was worth waiting for."
_WHEEL_TIME = (1980, 1, 1, 0, 0, 0)  # the first that a zip file knows


def make(job: Job, model: str | None, texts: str | None, out: str) -> dict[str, Any]:
    """Packs a model (of --run, of the newest run, or any) into a folder that is not there yet;
    raises UserError."""
    final = Path(out).expanduser().absolute()
    check_free(final, out)
    lines = read_texts(texts)
    from . import replica, serve

    target = job.run.target
    located, info = serve.locate(model or trained_run(job), job.storage, target.tracking.mlflow)
    folder = replica.fetch(located)
    with job.doing("choosing the engine"):
        choice = engines.ready(folder, located, target.serve, lines, job.say, light=True)
    job.say(choice.reason)
    name = info.notes.get("run") or short_name(located)
    aside = final.with_name(f".{final.name}.{uuid.uuid4().hex[:8]}")
    try:
        aside.mkdir(parents=True)
        job.say(f"package: copying the model and {' and '.join(sorted(kinds(choice)))}")
        copy_model(folder, aside / "model", name, choice)
        if lines and info.labels and not (folder / "serving" / "golden.json").is_file():
            job.say("package: asking torch for golden answers")
            torch = TorchEngine(folder, located, threads=0)
            samples.write_golden(torch, lines, aside / "model" / "serving")
        pinned = pins(needs(choice))
        _write_others(aside, target, pinned, write_wheel(aside / "wheels", needs(choice)))
        example = ask(aside / "model", target, info, job.say)
        about = {"name": name, "info": info, "choice": choice, "target": target, **example}
        about["packed"] = engines.packed(aside / "model")
        about["golden"] = (aside / "model" / "serving" / "golden.json").is_file()
        _render(aside, "README.md", **about, image=image(name), python=python())
        _set_modes(aside)
        aside.rename(final)
    except OSError as e:
        raise UserError(f"-o {out}: cannot be written: {e}") from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    size = sum(file.stat().st_size for file in final.rglob("*") if file.is_file())
    job.say(f"package: {final} ({size / 1e6:,.1f} MB, {len(pinned)} pinned requirements)")
    job.say(f"next: see {final / 'README.md'}: docker build, or pip and ./start")
    return {
        "stage": "package",
        "folder": str(final),
        "run": info.notes.get("run"),
        "model": located,
        "engine": choice.kind,
        "engine_reason": choice.reason,
        "labels": info.labels,
        "requirements": pinned,
        "bytes": size,
    }


def check_free(final: Path, out: str) -> None:
    """Raises UserError where there is something that would be overwritten."""
    if final.is_dir() and not any(final.iterdir()):
        return
    if final.exists() or final.is_symlink():
        what = "is a folder with files in it" if final.is_dir() else "is there, and is no folder"
        raise UserError(f"-o {out}: {what}; give one that is empty or not there yet")


def image(name: str) -> str:
    """A name that docker takes."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "model"


def python() -> str:
    """The Python that the versions were tested with."""
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def kinds(choice: engines.Choice) -> set[str]:
    """The engines that the package has."""
    return {choice.kind, choice.embeds}


# ---------------------------------------------------------------- the model


def copy_model(folder: Path, out: Path, name: str, choice: engines.Choice) -> None:
    """The files of a model that its engines read, and what was chosen."""
    patterns = [*MODEL_FILES, *(weights(folder) if "torch" in kinds(choice) else [])]
    found = [file for pattern in patterns for file in folder.glob(pattern)]
    for file in [*found, *folder.glob("serving/golden.json")]:
        if file.name != "engines.json":
            _copy(file, out / file.relative_to(folder))
    networks = {NETWORKS[kind] for kind in kinds(choice) if kind in NETWORKS}
    if networks:
        assert choice.exported is not None
        exported = [file for inner in networks for file in choice.exported.glob(f"{inner}/model.*")]
        for file in [*exported, *choice.exported.glob(EXPORTED_TOKENIZER)]:
            _copy(file, out / "serving" / "networks" / file.relative_to(choice.exported))
    notes = out / "workloads.json"
    known = json.loads(notes.read_text(encoding="utf-8")) if notes.is_file() else {}
    # What /readyz and /v1/models call it; and its weights may not be in here.
    digest = manifest.model_digest(folder, known.get("digest"))
    _write_json(notes, {"run": name} | known | {"digest": digest})
    engines.pack(folder, out, choice)


def weights(folder: Path) -> Iterable[str]:
    """Patterns of the files with the weights: safetensors where there are any."""
    return next(([p] for p in WEIGHTS if any(folder.glob(p))), [])


def ask(model: Path, target: Target, info: Info, say: engines.Say) -> dict[str, str]:
    """An example text and what the packed model answers; raises UserError where that is not what
    it should be. A package for GPUs is not asked: this machine may have none."""
    golden = model / "serving" / "golden.json"
    requests = (
        json.loads(golden.read_text(encoding="utf-8"))["requests"] if golden.is_file() else []
    )
    text = requests[0]["text"] if requests else EXAMPLE
    path, answer = ("/predict" if info.labels else "/embed"), ""
    if not target.serve.gpus_per_replica:
        from .replica import open_engine

        say("package: asking the packed model")
        opened = open_engine(str(model), target, None, say)
        ids = [row.ids for row in opened.main.encode([text])]
        vector = opened.embedding().predict(ids, "embedding")[0]
        answer = f"[[{', '.join(f'{x:.3f}' for x in vector[:3])}, ...]]"
        if info.labels:
            best = opened.main.decode(opened.main.predict(ids)[0])[0]
            answer = f'[[{{"label": "{best["label"]}", "score": {best["score"]:.3f}}}, ...]]'
    body = shlex.quote(json.dumps({"inputs": text}, ensure_ascii=False))
    return {"path": path, "body": body, "answer": answer}


# ---------------------------------------------------------------- what it needs


def needs(choice: engines.Choice) -> list[str]:
    """What serving imports, with this engine."""
    found = list(ALWAYS)
    if any(kind in NETWORKS for kind in kinds(choice)):
        found += OPENVINO
        if choice.exported and not (choice.exported / EXPORTED_TOKENIZER).is_file():
            found.append("transformers")  # whose tokenizer has no other form
    return found + (list(TORCH) if "torch" in kinds(choice) else [])


def pins(wanted: list[str]) -> list[str]:
    """`NAME==VERSION` of all that these requirements bring, as installed here."""
    todo, found = [Requirement(one) for one in wanted], dict[str, str]()
    seen: set[tuple[str, str]] = set()
    while todo:
        one = todo.pop()
        name = canonicalize_name(one.name)
        for extra in {"", *one.extras} - {extra for had, extra in seen if had == name}:
            seen.add((name, extra))
            try:
                installed = importlib.metadata.distribution(name)
            except importlib.metadata.PackageNotFoundError:
                raise UserError(
                    f"{name} is not installed here, so its version cannot be pinned: "
                    f"pip install '{one}'"
                ) from None
            # A build's own label (2.13.0+cpu) is not in every index.
            found[name] = installed.version.partition("+")[0]
            more = [Requirement(text) for text in installed.requires or []]
            todo += [m for m in more if m.marker is None or m.marker.evaluate({"extra": extra})]
    return [f"{name}=={version}" for name, version in sorted(found.items())]


def write_wheel(folder: Path, wanted: list[str]) -> str:
    """This package as a wheel that asks for no more than serving does; returns its file's name."""
    version = f"{__version__}+serving"
    info = f"workloads-{version}.dist-info"
    versions = dict(pin.split("==") for pin in pins(wanted))
    asks = [f"{one}=={versions[canonicalize_name(Requirement(one).name)]}" for one in wanted]
    files = {
        f"workloads/{file.name}": file.read_bytes()
        for file in sorted(Path(__file__).parent.glob("*.*"))
        if file.suffix in (".py", ".html")
    }
    metadata = ["Metadata-Version: 2.1", "Name: workloads", f"Version: {version}"]
    metadata += [f"Requires-Dist: {one}" for one in asks]
    files[f"{info}/METADATA"] = _lines(metadata)
    wheel = ["Wheel-Version: 1.0", "Generator: workloads", "Root-Is-Purelib: true"]
    files[f"{info}/WHEEL"] = _lines([*wheel, "Tag: py3-none-any"])
    script = "workloads-haproxy = workloads.haproxy:main"
    files[f"{info}/entry_points.txt"] = _lines(["[console_scripts]", script])
    record = [f"{name},sha256={_digest(raw)},{len(raw)}" for name, raw in files.items()]
    files[f"{info}/RECORD"] = _lines([*record, f"{info}/RECORD,,"])
    folder.mkdir()
    file = folder / f"workloads-{version}-py3-none-any.whl"
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as zipped:
        for name, raw in files.items():
            entry = zipfile.ZipInfo(name, _WHEEL_TIME)
            entry.external_attr = 0o644 << 16
            zipped.writestr(entry, raw, zipfile.ZIP_DEFLATED)
    return file.name


def _lines(lines: list[str]) -> bytes:
    return ("\n".join(lines) + "\n").encode()


def _digest(raw: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(raw).digest()).rstrip(b"=").decode()


# ---------------------------------------------------------------- the other files


def _write_others(out: Path, target: Target, pinned: list[str], wheel: str) -> None:
    from .serve import config_file

    text = "# pip install -r requirements.txt, in this folder\n"
    lines = [*pinned, f"./wheels/{wheel}"]
    (out / "requirements.txt").write_text(text + "\n".join(lines) + "\n", encoding="utf-8")
    made = yaml.safe_dump(config_file("./model", target, []), sort_keys=False, allow_unicode=True)
    said = "# What ./start reads; `serve deploy` takes it too, once the model's path is absolute.\n"
    (out / "serve.yaml").write_text(said + made, encoding="utf-8")
    _render(out, "Dockerfile", python=python())
    for name in ("start", ".dockerignore"):
        _render(out, name)


def _render(out: Path, file: str, **about: Any) -> None:
    import jinja2

    template = (TEMPLATES / file.lstrip(".")).read_text(encoding="utf-8")
    made = jinja2.Template(
        template, undefined=jinja2.StrictUndefined, trim_blocks=True, keep_trailing_newline=True
    )
    (out / file).write_text(made.render(**about), encoding="utf-8")


def _copy(file: Path, to: Path) -> None:
    to.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(file, to)


def _write_json(file: Path, tree: dict[str, Any]) -> None:
    file.write_text(json.dumps(tree, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _set_modes(out: Path) -> None:
    """Readable for the container's user, whatever the files were here."""
    for path in [out, *out.rglob("*")]:
        path.chmod(0o755 if path.is_dir() or path.name == "start" else 0o644)

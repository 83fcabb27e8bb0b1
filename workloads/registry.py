"""Models of an MLflow registry: of one version, without code and without pickles.

A version is brought to the storage of the runs once, which every node reaches: replicas need
neither MLflow nor its server, and stay at their version when an alias moves.
"""

import hashlib
import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .artifacts import RunFolder
from .config import UserError
from .tracking import FILES, asking, connect


def is_registered(model: str) -> bool:
    """Whether a name is one of a registry."""
    return model.startswith("models:/")


def fetched(model: str, storage: str, mlflow: str | None) -> str:
    """models:/NAME@ALIAS or models:/NAME/VERSION -> the folder of that version in the storage,
    which all nodes reach; downloaded once. Raises UserError naming what there is."""
    form = re.fullmatch(r"models:/([^/:]+?)(?:@([^/@]+)|/(\d+))", model)
    if form is None:
        raise UserError(f"{model}: give models:/NAME@ALIAS or models:/NAME/VERSION")
    uri = mlflow or os.environ.get("MLFLOW_TRACKING_URI")
    if uri is None or not uri.startswith(("http://", "https://")):
        raise UserError(
            f"{model} is a name of an MLflow registry, but nothing says where that is: "
            "target.tracking.mlflow=http://HOST:PORT, or MLFLOW_TRACKING_URI"
        )
    client = connect(uri)
    with asking(f"{model}: {uri}"):
        version = _version(client, uri, model, *form.groups())
    # A registry that was emptied counts from 1 again.
    what = json.dumps([version.name, version.version, version.source, version.creation_timestamp])
    key = hashlib.sha256(what.encode()).hexdigest()[:8]
    name = re.sub(r"[^\w.-]", "_", version.name)
    folder = RunFolder(storage, f".registry/{name}-{version.version}-{key}")
    if not folder.has_model():
        with tempfile.TemporaryDirectory() as files:
            with asking(f"{model}: {uri}"):
                _download(client, uri, version, Path(files))
            folder.put_model(Path(files))
    return f"{folder.uri}/model"


def _version(
    client: Any, uri: str, model: str, name: str, alias: str | None, number: str | None
) -> Any:
    from mlflow.exceptions import MlflowException

    try:
        if alias:
            return client.get_model_version_by_alias(name, alias)
        return client.get_model_version(name, number)
    except MlflowException as e:
        if e.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            raise
    there = {one.name: one for one in client.search_registered_models(max_results=1000)}
    if name not in there:
        known = ", ".join(sorted(there)[:20]) or "none"
        raise UserError(f"{model}: {uri} has no model '{name}'; there are: {known}")
    versions = sorted(int(one.version) for one in client.search_model_versions(f"name='{name}'"))
    aliases = client.get_registered_model(name).aliases
    known = ", ".join([*(f"@{one}" for one in aliases), *(f"/{one}" for one in versions[-20:])])
    hint = f"; an alias is given on {uri}/#/models/{name}" if alias else ""
    raise UserError(f"{model}: there is none; of {name} there are: {known or 'none'}{hint}")


def _download(client: Any, uri: str, version: Any, out: Path) -> None:
    """Weights as safetensors, configuration, tokenizer and notes; nothing else is even asked
    for."""
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    where = client.get_model_version_download_uri(version.name, version.version)
    store = get_artifact_repository(where, tracking_uri=uri, registry_uri=uri)
    paths = list(_files_of(store))
    inner = {path: path for path in paths}
    if "config.json" not in inner:  # as MLflow lays out what it saves of transformers
        inner = {path: re.sub("^(model|components/tokenizer)/", "", path) for path in paths}
    taken = {path: to for path, to in inner.items() if FILES.fullmatch(to)}
    if "config.json" not in taken.values() or not any(p.endswith(".safetensors") for p in taken):
        raise UserError(
            f"models:/{version.name}/{version.version} has no config.json with safetensors, and "
            "weights of other kinds, which can run code, are not taken; it has: "
            f"{', '.join(sorted(paths)[:20]) or 'nothing'}"
        )
    with tempfile.TemporaryDirectory() as raw:
        for path, to in taken.items():
            (out / to).parent.mkdir(parents=True, exist_ok=True)
            shutil.move(store.download_artifacts(path, raw), out / to)
    notes = out / "workloads.json"
    known = json.loads(notes.read_text(encoding="utf-8")) if notes.is_file() else {}
    about = known | {"registered": f"models:/{version.name}/{version.version}"}
    notes.write_text(json.dumps(about, indent=2, ensure_ascii=False), encoding="utf-8")


def _files_of(store: Any, path: str | None = None) -> Iterator[str]:
    for one in store.list_artifacts(path):
        if one.is_dir:
            yield from _files_of(store, one.path)
        else:
            yield one.path

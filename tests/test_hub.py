"""Models of a hub: of one commit, without code and without pickles. The hub is a small server of
this machine that speaks the part of the protocol that huggingface_hub asks for."""

import hashlib
import http.server
import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import changed

pytestmark = pytest.mark.slow
CHECKOUT = Path(__file__).parent.parent
COMMITS = ["1" * 40, "2" * 40]


class Hub:
    """Repositories by name, each a list of folders: its commits, the newest last."""

    def __init__(self) -> None:
        self.repos: dict[str, list[Path]] = {}
        self.asked: list[str] = []
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_HEAD(self) -> None:
                self.do_GET()

            def do_GET(self) -> None:
                hub.asked.append(self.path)
                status, headers, body = hub.answer(self.path.partition("?")[0])
                self.send_response(status)
                for key, value in {**headers, "Content-Length": str(len(body))}.items():
                    self.send_header(key, value)
                self.end_headers()
                if self.command == "GET":
                    self.wfile.write(body)

            def log_message(self, *_: Any) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers, body."""
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"] and (folders := self.repos.get("/".join(parts[2:4]))):
            asked = parts[-1] if parts[-1] in COMMITS else COMMITS[len(folders) - 1]
            folder = folders[COMMITS.index(asked)]
            files = [{"rfilename": f.name} for f in folder.iterdir() if f.is_file()]
            told = {"id": "/".join(parts[2:4]), "sha": asked, "siblings": files, "tags": []}
            if "tree" in parts:
                told = [self.entry(folder / f["rfilename"]) for f in files]  # type: ignore[assignment]
            return 200, {"Content-Type": "application/json"}, json.dumps(told).encode()
        if (
            len(parts) == 5
            and parts[2] == "resolve"
            and (found := self.repos.get("/".join(parts[:2])))
        ):
            file = found[COMMITS.index(parts[3])] / parts[4]
            if file.is_file():
                body = file.read_bytes()
                tag = hashlib.sha1(body).hexdigest()
                return 200, {"ETag": f'"{tag}"', "X-Repo-Commit": parts[3]}, body
        return 404, {"X-Error-Code": "EntryNotFound"}, b""

    def entry(self, file: Path) -> dict[str, Any]:
        oid = hashlib.sha1(file.read_bytes()).hexdigest()
        return {"type": "file", "path": file.name, "size": file.stat().st_size, "oid": oid}


@pytest.fixture
def hub() -> Iterator[Hub]:
    one = Hub()
    yield one
    one.server.shutdown()


def ask(hub: Hub, home: Path, *line: str) -> subprocess.CompletedProcess[str]:
    """Runs Python in a process that knows this hub only: where it is, is read at import."""
    env = {
        "HF_ENDPOINT": hub.url,
        "HF_HOME": str(home / "hf"),
        "XDG_CACHE_HOME": str(home / "cache"),
        "PATH": str(Path(sys.executable).parent),
        "PYTHONPATH": str(CHECKOUT),
        "HF_HUB_DISABLE_XET": "1",
    }
    return subprocess.run(
        [sys.executable, *line], env=env, cwd=home, capture_output=True, text=True, timeout=120
    )


def located(hub: Hub, home: Path, name: str = "owner/name") -> subprocess.CompletedProcess[str]:
    """What is served under that name."""
    return ask(
        hub, home, "-c", f"from workloads import serve; print(serve.locate({name!r}, '.')[0])"
    )


def test_what_is_served_stays_at_the_commit_that_it_was_deployed_with(
    hub: Hub, untrained: Path, tmp_path: Path
) -> None:
    hub.repos["owner/name"] = [untrained]
    first = located(hub, tmp_path)
    assert first.stdout.strip() == f"owner/name@{COMMITS[0]}", first.stderr
    newer = shutil.copytree(untrained, tmp_path / "newer")
    (newer / "README.md").write_text("changed by its owner")
    hub.repos["owner/name"].append(newer)
    for asked, commit in ((first.stdout.strip(), COMMITS[0]), ("owner/name", COMMITS[1])):
        assert located(hub, tmp_path, asked).stdout.strip() == f"owner/name@{commit}"


def test_weights_that_can_run_code_are_not_even_fetched(
    hub: Hub, untrained: Path, tmp_path: Path
) -> None:
    pickled = shutil.copytree(untrained, tmp_path / "pickled")
    (pickled / "model.safetensors").rename(pickled / "pytorch_model.bin")
    hub.repos["owner/name"] = [pickled]
    done = located(hub, tmp_path)
    assert "there are no safetensors on the hub" in done.stderr
    assert not [path for path in hub.asked if path.endswith(".bin")]


def test_code_of_a_model_is_neither_fetched_nor_run(
    hub: Hub, untrained: Path, tmp_path: Path
) -> None:
    with_code = shutil.copytree(untrained, tmp_path / "with-code")
    config = json.loads((with_code / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "code.Config"}}
    (with_code / "config.json").write_text(json.dumps(config))
    (with_code / "code.py").write_text("open('ran', 'w')")
    hub.repos["owner/name"] = [with_code]
    done = located(hub, tmp_path)
    assert "needs code of its own" in done.stderr
    assert not [path for path in hub.asked if path.endswith(".py")]
    assert not list(tmp_path.rglob("ran"))


@pytest.mark.slow
def test_a_run_goes_on_with_the_commit_that_it_began_with(
    hub: Hub, tiny: Any, untrained: Path, tmp_path: Path
) -> None:
    hub.repos["owner/name"] = [untrained]
    task = changed(tiny, **{"train.epochs": 1}).model_dump() | {
        "model": {"pretrained": "owner/name"}
    }
    (tmp_path / "task.json").write_text(json.dumps(task))
    line = ["-m", "workloads", "train", "--json", "--task", "task.json", "--run", "one"]
    line += ["target.train.workers=1"]
    done = ask(hub, tmp_path, *line)
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "one"
    (run / "train" / "metrics.json").unlink()  # as if it had not come to its end
    shutil.rmtree(run / "model")
    hub.repos["owner/name"].append(shutil.copytree(untrained, tmp_path / "newer"))
    hub.asked.clear()
    done = ask(hub, tmp_path, *line)
    assert done.returncode == 0, done.stderr
    assert json.loads((run / "run.json").read_text())["pretrained"] == f"owner/name@{COMMITS[0]}"
    assert not [path for path in hub.asked if COMMITS[1] in path]

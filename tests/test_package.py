"""The folder that `workloads package` writes, and what is served from it without this project."""

import base64
import csv
import functools
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from conftest import Command, free_port, negate_logits, reviews, wait_for

from workloads import engines, keys, package, packaged, replica
from workloads.cli import main
from workloads.config import Target, TargetServe, UserError
from workloads.engine import BF16, FP32, INT8, load
from workloads.serve import AppArgs

pytestmark = pytest.mark.slow
KEY = "k" * 32
# What a package must do without: a Python that has none of it is the one that serves in tests.
ABSENT = ("torch", "transformers", "captum", "datasets", "nncf", "optuna", "matplotlib", "pandas")
ABSENT += ("pyarrow",)
BLOCKER = f"""
import sys
class Blocker:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {ABSENT}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Blocker())
"""


def pack(model: Path, out: Path, *more: str) -> Path:
    """Packs a model as the command does; the fixture's engines were measured with one stream."""
    line = ["package", "--model", str(model), "-o", str(out), "target.serve.streams=1", *more]
    with pytest.raises(SystemExit) as done:
        main(line)
    assert (done.value.code or 0) == 0
    return out


@pytest.fixture(scope="module")
def packed(served: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A package of the tiny model; not to be changed."""
    return pack(served, tmp_path_factory.mktemp("packed") / "out", "target.serve.engine=auto")


@pytest.fixture(scope="module")
def elsewhere(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a Python that has the package's wheel, and not what serving needs not."""
    home = tmp_path_factory.mktemp("elsewhere")
    (wheel,) = (packed / "wheels").iterdir()
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index"]
    subprocess.run([*pip, "--target", str(home / "site"), str(wheel)], check=True)
    (home / "blocked").mkdir()
    (home / "blocked" / "sitecustomize.py").write_text(BLOCKER)
    clean = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    path = os.pathsep.join([str(home / "blocked"), str(home / "site")])
    return clean | {"PYTHONPATH": path, "PYTHON": sys.executable}


def lines(folder: Path) -> list[str]:
    text = (folder / "requirements.txt").read_text(encoding="utf-8")
    return [line for line in text.splitlines() if not line.startswith("#")]


def test_the_folder_has_all_that_serves_and_no_more(packed: Path) -> None:
    chosen = engines.packed(packed / "model")
    networks = {package.NETWORKS[kind] for kind in (chosen["kind"], chosen["embeds"])}
    found = {str(f.relative_to(packed)) for f in packed.rglob("*") if f.is_file()}
    model = {"config.json", "tokenizer.json", "tokenizer_config.json", "workloads.json"}
    model |= {"serving/golden.json", "serving/packaged.json", "serving/networks/tokenizer.json"}
    model |= {f"serving/networks/{n}/model.{e}" for n in networks for e in ("xml", "bin")}
    others = {"requirements.txt", "serve.yaml", "start", "Dockerfile", ".dockerignore", "README.md"}
    (wheel,) = (packed / "wheels").iterdir()
    assert found == {f"model/{f}" for f in model} | others | {f"wheels/{wheel.name}"}


def test_requirements_are_pinned_to_what_is_installed_here(packed: Path) -> None:
    *pins, wheel = lines(packed)
    assert (packed / wheel).is_file()
    for pin in pins:
        name, version = pin.split("==")
        assert importlib.metadata.version(name).partition("+")[0] == version
    names = {pin.split("==")[0] for pin in pins}
    assert {"ray", "openvino", "tokenizers", "uvicorn", "httptools", "numpy"} <= names
    assert names & {*ABSENT, "workloads"} == set()


def test_extras_and_markers_of_requirements_count() -> None:
    assert "httptools==" not in " ".join(package.pins(["uvicorn"]))
    assert "httptools==" in " ".join(package.pins(["uvicorn[standard]"]))
    assert "tomli==" not in " ".join(package.pins(["huggingface_hub"]))  # for Python before 3.11
    with pytest.raises(UserError, match="not-there is not installed here"):
        package.pins(["not-there"])


def test_torch_is_asked_for_where_it_is_the_engine(served: Path, tmp_path: Path) -> None:
    out = pack(served, tmp_path / "out", "target.serve.engine=torch")
    names = {line.split("==")[0] for line in lines(out)}
    assert {"torch", "transformers", "safetensors"} <= names
    assert "openvino" not in names
    assert (out / "model" / "model.safetensors").is_file()
    assert not (out / "model" / "serving" / "networks").exists()


def test_torch_is_left_out_even_where_it_is_a_little_quicker() -> None:
    figures: dict[str, Any] = {"rows_per_s": {"1": 100}, "disagreement": 0, "gap": 0}
    slower = {**figures, "rows_per_s": {"1": 90}}
    record = {"head": "logits", "engines": {"torch": figures, FP32: slower}}
    assert engines.choose(record, TargetServe(), None).kind == "torch"
    light = engines.choose(record, TargetServe(), None, light=True)
    assert (light.kind, light.embeds) == (FP32, FP32)
    unfit = {"head": "logits", "engines": {"torch": figures, FP32: {"problem": "no"}}}
    assert engines.choose(unfit, TargetServe(), None, light=True).kind == "torch"


def test_the_wheel_is_one_that_pip_takes_and_its_record_is_true(
    packed: Path, elsewhere: dict[str, str]
) -> None:
    (file,) = (packed / "wheels").iterdir()
    with zipfile.ZipFile(file) as wheel:
        (record,) = (name for name in wheel.namelist() if name.endswith("/RECORD"))
        rows = list(csv.reader(wheel.read(record).decode().splitlines()))
        assert {row[0] for row in rows} == set(wheel.namelist())
        for name, digest, size in rows:
            if name != record:
                raw = wheel.read(name)
                found = base64.urlsafe_b64encode(hashlib.sha256(raw).digest()).decode()
                assert (digest, size) == (f"sha256={found.rstrip('=')}", str(len(raw)))
        metadata = wheel.read(record.replace("RECORD", "METADATA")).decode()
    asked = re.findall(r"^Requires-Dist: ([^=]+)==", metadata, re.M)
    assert sorted(asked) == sorted([*package.ALWAYS, *package.OPENVINO])
    code = "import workloads.packaged as p; print(p.__file__)"
    found = subprocess.run(
        [sys.executable, "-c", code], env=elsewhere, cwd="/", capture_output=True, text=True
    )
    assert found.stdout.strip().startswith(elsewhere["PYTHONPATH"].split(os.pathsep)[1])
    missing = subprocess.run([sys.executable, "-c", "import torch"], env=elsewhere, check=False)
    assert missing.returncode == 1  # or the test that serves would show nothing


def test_the_same_model_gives_the_same_bytes(packed: Path, served: Path, tmp_path: Path) -> None:
    again = pack(served, tmp_path / "again")
    files = {f.relative_to(packed) for f in packed.rglob("*")}
    assert files == {f.relative_to(again) for f in again.rglob("*")}
    for file in files:
        one, other = packed / file, again / file
        assert one.stat().st_mode == other.stat().st_mode
        assert one.is_dir() or one.read_bytes() == other.read_bytes(), file


def test_a_package_can_be_packed_again(packed: Path, tmp_path: Path) -> None:
    again = pack(packed, tmp_path / "again")
    assert engines.packed(again / "model") == engines.packed(packed / "model")
    assert (again / "README.md").read_text() == (packed / "README.md").read_text()


def test_another_user_may_read_it_whatever_the_model_was(packed: Path) -> None:
    for path in packed.rglob("*"):
        wanted = 0o755 if path.is_dir() or path.name == "start" else 0o644
        assert path.stat().st_mode & 0o777 == wanted, path


def test_the_readme_shows_an_example_and_what_it_answers(packed: Path) -> None:
    text = (packed / "README.md").read_text(encoding="utf-8")
    golden = json.loads((packed / "model" / "serving" / "golden.json").read_text())["requests"]
    assert json.dumps({"inputs": golden[0]["text"]}) in text
    assert f'[[{{"label": "{golden[0]["label"]}", "score": ' in text
    assert "good" in text
    assert "bad" in text
    assert engines.packed(packed / "model")["reason"] in text
    assert "{{" not in text
    assert "{%" not in text


def test_the_image_serves_as_nobody_in_particular(packed: Path) -> None:
    text = (packed / "Dockerfile").read_text()
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    assert f"FROM python:{version}-slim" in text
    copied = re.findall(r"^COPY (.*) \S+$", text, re.M)
    wanted = {line.strip("!/\n") for line in (packed / ".dockerignore").open() if line[0] == "!"}
    assert set(" ".join(copied).split()) == wanted
    assert all((packed / name).exists() for name in wanted)
    assert text.index("pip install") < text.index("\nUSER 1000") < text.index("\nCMD ")
    check = re.search(r"HEALTHCHECK.*\\\n +CMD (\[.*\])", text)
    assert check is not None
    compile(json.loads(check[1])[2], "HEALTHCHECK", "exec")


@pytest.mark.parametrize("there", ["folder", "file"])
def test_what_is_there_is_never_overwritten(
    there: str, served: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    kept = out / "mine.txt" if there == "folder" else out
    kept.parent.mkdir(exist_ok=True)
    kept.write_text("mine")
    with pytest.raises(SystemExit) as done:
        main(["package", "--model", str(served), "-o", str(out)])
    assert done.value.code == 2
    assert "give one that is empty or not there yet" in capsys.readouterr().err
    assert [f for f in tmp_path.rglob("*") if f.is_file()] == [kept]
    assert kept.read_text() == "mine"


def test_an_empty_folder_is_taken(served: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert (pack(served, tmp_path / "out") / "start").is_file()
    assert [f.name for f in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("model", ["./no-such-model", "package:not_installed/model"])
def test_a_model_that_is_not_there_leaves_nothing(
    model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as done:
        main(["package", "--model", model, "-o", str(tmp_path / "out")])
    assert done.value.code == 2
    assert "error: " in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_package_that_was_killed_is_not_under_its_name(
    served: Path, tmp_path: Path, command: Callable[..., Command]
) -> None:
    model = shutil.copytree(served, tmp_path / "model")
    (model / "serving" / "golden.json").unlink()  # asking torch for others takes seconds
    (tmp_path / "texts.txt").write_text("\n".join(text for text, _ in reviews(60)))
    line = ["--model", str(model), "-o", "out", "--texts", "texts.txt", "target.serve.streams=1"]
    going = command("package", *line)
    wait_for(lambda: going.process.poll() is not None or list(tmp_path.glob(".out.*/model/*")))
    going.kill()
    assert going.process.returncode == -signal.SIGKILL, going.err.read_text()
    assert not (tmp_path / "out").exists()


def test_texts_give_a_model_from_elsewhere_golden_answers(served: Path, tmp_path: Path) -> None:
    model = shutil.copytree(served, tmp_path / "model")
    (model / "serving" / "golden.json").unlink()
    texts = [text for text, _ in reviews(60)]
    (tmp_path / "texts.txt").write_text("\n".join(texts))
    out = pack(model, tmp_path / "out", "--texts", str(tmp_path / "texts.txt"))
    golden = json.loads((out / "model" / "serving" / "golden.json").read_text())["requests"]
    torch = load(served, "tiny")
    assert len(golden) >= 30
    for one in golden:
        assert one["text"] in texts
        logits = torch.predict([torch.encode([one["text"]])[0].ids])
        assert torch.decode(logits[0])[0]["label"] == one["label"]


def test_json_is_one_object(
    served: Path, tmp_path: Path, command: Callable[..., Command], packed: Path
) -> None:
    line = ["--model", str(served), "-o", "out", "target.serve.streams=1", "--json"]
    result = command("package", *line).result()
    assert result["folder"] == str(tmp_path / "out")
    assert result["engine"] == engines.packed(packed / "model")["kind"]
    assert [*result["requirements"]] == lines(packed)[:-1]


# ---------------------------------------------------------------- on another machine


def written(folder: Path, kind: str, embeds: str) -> Path:
    (folder / "serving").mkdir(parents=True, exist_ok=True)
    record = {"kind": kind, "embeds": embeds, "reason": "engine: it", "cpu": "Z80"}
    (folder / "serving" / "packaged.json").write_text(json.dumps(record))
    return folder


def test_the_choice_of_the_package_holds_and_says_where_it_was_made(tmp_path: Path) -> None:
    choice = engines.ready(written(tmp_path, INT8, FP32), "m", TargetServe())
    assert (choice.kind, choice.embeds, choice.spare) == (INT8, FP32, FP32)
    assert choice.reason == "engine: it; as packaged on Z80"
    assert choice.exported == tmp_path / "serving" / "networks"
    assert not list(engines.missing(tmp_path, "m", TargetServe()))


def test_a_cpu_without_bf16_computes_in_fp32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = written(tmp_path, BF16, BF16)
    monkeypatch.setattr(engines, "machine", lambda: ("new", {"avx512_bf16"}))
    assert engines.ready(folder, "m", TargetServe()).kind == BF16
    monkeypatch.setattr(engines, "machine", lambda: ("old", {"avx2"}))
    choice = engines.ready(folder, "m", TargetServe())
    assert (choice.kind, choice.embeds, choice.spare) == (FP32, FP32, None)
    assert "no bfloat16" in choice.reason


def test_an_engine_that_was_not_packed_is_told(tmp_path: Path) -> None:
    folder = written(tmp_path, BF16, BF16)
    assert engines.ready(folder, "m", TargetServe(engine=FP32)).kind == FP32
    with pytest.raises(UserError, match="which this package lacks"):
        engines.ready(folder, "m", TargetServe(engine="torch"))


def test_an_engine_that_answers_otherwise_here_is_replaced(served: Path, tmp_path: Path) -> None:
    folder = written(shutil.copytree(served, tmp_path / "model"), INT8, FP32)
    said: list[str] = []
    opened = replica.open_engine(str(folder), Target(), None, said.append)
    assert (opened.main.kind, said) == (INT8, [])
    negate_logits(folder / "serving" / "networks" / "int8" / "model.xml")
    opened = replica.open_engine(str(folder), Target(), None, said.append)
    assert opened.main.kind == FP32
    assert opened.embedding() is opened.main
    assert "golden requests are answered otherwise" in said[0]
    written(folder, INT8, INT8)  # nothing else was packed
    with pytest.raises(UserError, match="is not served with openvino-int8"):
        replica.open_engine(str(folder), Target(), None, said.append)


# ---------------------------------------------------------------- what `start` runs


def test_serve_yaml_is_read_with_the_environments_host_and_port(packed: Path) -> None:
    file = packed / "serve.yaml"
    args = packaged.read(file, {})
    assert args.model == str(packed / "model")
    assert (args.target.serve.host, args.target.serve.port) == ("127.0.0.1", 8000)
    args = packaged.read(file, {"HOST": "0.0.0.0", "PORT": "8123"})
    assert (args.target.serve.host, args.target.serve.port) == ("0.0.0.0", 8123)
    with pytest.raises(UserError, match="PORT"):
        packaged.read(file, {"PORT": "none"})


@pytest.mark.parametrize("text", ["", "applications: []", "a: [", None])
def test_a_serve_yaml_that_is_none_is_told(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "serve.yaml").write_text(text)
    with pytest.raises(UserError, match=r"serve\.yaml"):
        packaged.read(tmp_path / "serve.yaml", {})


def test_strangers_need_a_key_unless_told_otherwise() -> None:
    def access(host: str, environment: dict[str, str], **said: Any) -> keys.Access:
        target = Target(serve=TargetServe(host=host))
        return packaged.access(AppArgs(model="m", target=target, **said), environment)

    outside, key = "0.0.0.0", "k" * 32
    assert access("127.0.0.1", {}) == keys.EVERYBODY
    assert len(access(outside, {"WORKLOADS_API_KEYS": key}).hashes) == 1
    assert access(outside, {"INSECURE": "1"}).insecure
    assert access(outside, {}, insecure=True).insecure
    known = access(outside, {"WORKLOADS_API_KEYS": key}, keys=["a" * 64])
    assert (len(known.hashes), known.hashes[0]) == (2, "a" * 64)
    for environment in ({}, {"WORKLOADS_API_KEYS": ""}, {"INSECURE": "0"}):
        with pytest.raises(UserError, match="WORKLOADS_API_KEYS"):
            access(outside, environment)


def test_an_image_has_a_name_that_docker_takes() -> None:
    assert package.image("Owner/Re_views.2") == "owner-re-views-2"


@pytest.fixture
def started(
    packed: Path, elsewhere: dict[str, str], tmp_path: Path
) -> Iterator[tuple[str, subprocess.Popen[bytes], Path]]:
    """A copy of the package at another place, served as its README says."""
    folder = shutil.copytree(packed, tmp_path / "moved")
    port, log = free_port(), tmp_path / "log"
    with log.open("w") as out:
        process = subprocess.Popen(
            [str(folder / "start")],
            cwd="/",
            env=elsewhere | {"PORT": str(port), "WORKLOADS_API_KEYS": KEY},
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    yield f"http://127.0.0.1:{port}", process, log
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.ray
@pytest.mark.slow
def test_a_package_serves_without_torch_and_this_checkout(
    started: tuple[str, subprocess.Popen[bytes], Path], packed: Path, served: Path
) -> None:
    url, process, log = started
    ready = lambda: process.poll() is not None or "\nready: " in log.read_text()  # noqa: E731
    wait_for(ready)
    assert process.poll() is None, log.read_text()
    head = {"Authorization": f"Bearer {KEY}"}
    kind = engines.packed(packed / "model")["kind"]
    about = httpx.get(f"{url}/readyz", headers=head, timeout=60).json()
    assert (about["engine"], about["model"]) == (kind, about["model"].rpartition("/")[2])
    golden = json.loads((packed / "model" / "serving" / "golden.json").read_text())["requests"]
    texts = [request["text"] for request in golden]
    assert httpx.post(f"{url}/predict", json={"inputs": texts}, timeout=60).status_code == 401
    ask = functools.partial(httpx.post, headers=head, timeout=60)
    answers = ask(f"{url}/predict", json={"inputs": texts}).json()
    assert [answer[0]["label"] for answer in answers] == [request["label"] for request in golden]
    engine = load(served, "tiny", kind, served / "serving" / "networks")
    for text, answer in zip(texts, answers, strict=True):
        own = engine.decode(engine.predict([engine.encode([text])[0].ids])[0])
        assert answer[0]["score"] == pytest.approx(own[0]["score"], abs=0.01)
    vectors = ask(f"{url}/embed", json={"inputs": texts[:2]}).json()
    torch = load(served, "tiny")
    wanted = torch.predict([row.ids for row in torch.encode(texts[:2])], "embedding")
    assert vectors == [pytest.approx(row, abs=2e-3) for row in wanted.tolist()]
    why = ask(f"{url}/explain", json={"inputs": texts[0]})
    assert (why.status_code, "target.serve.engine=torch" in why.json()["error"]) == (400, True)
    process.send_signal(signal.SIGTERM)
    assert process.wait(120) == 0, log.read_text()
    assert "Traceback" not in log.read_text()
    with pytest.raises(httpx.TransportError):
        httpx.get(f"{url}/healthz", timeout=5)


def test_serve_yaml_has_the_limits_that_were_asked_for(served: Path, tmp_path: Path) -> None:
    flags = ["target.serve.max_inputs=3", "target.serve.port=8100"]
    out = pack(served, tmp_path / "out", *flags, "target.serve.api_keys_file=/of/this/machine")
    made = yaml.safe_load((out / "serve.yaml").read_text())
    assert made["http_options"] == {"host": "127.0.0.1", "port": 8100}
    args = packaged.read(out / "serve.yaml", {})
    assert args.target.serve.max_inputs == 3
    assert args.target.serve.api_keys_file is None
    assert args.target.serve.port == 8100

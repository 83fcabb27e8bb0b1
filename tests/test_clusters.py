"""What holds for clusters/ without any outside schema: scripts/check_manifests has those."""

import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from workloads import config, ingress
from workloads.cli import app

ROOT = Path(__file__).parent.parent
CLUSTERS = ROOT / "clusters"
FILES = sorted(path.relative_to(CLUSTERS) for path in CLUSTERS.rglob("*.yaml"))
LAUNCHER = [path for path in FILES if len(path.parts) == 1]
CLOUD = [path for path in LAUNCHER if path.stem != "on-prem"]
RAY_KINDS = {"raycluster", "rayjob-tune", "rayjob-train", "rayservice"}
IMAGE = "ghcr.io/example/workloads:0.1"


def load(path: Path | str) -> Any:
    """All documents of a file under clusters/; the one, where there is one."""
    documents = list(yaml.safe_load_all((CLUSTERS / path).read_text(encoding="utf-8")))
    return documents[0] if len(documents) == 1 else documents


def values(tree: Any, key: str) -> list[Any]:
    """Everything under this key, at any depth."""
    if isinstance(tree, list):
        return [found for item in tree for found in values(item, key)]
    if not isinstance(tree, dict):
        return []
    here = [tree[key]] if key in tree else []
    return here + [found for item in tree.values() for found in values(item, key)]


def clusters_of(name: str) -> Any:
    """The part of a KubeRay file that is a cluster."""
    spec = load(f"kuberay/{name}.yaml")["spec"]
    return spec.get("rayClusterSpec") or spec.get("rayClusterConfig") or spec


def check_command(words: list[str]) -> None:
    """The words after `workloads` are a command line, and its task and target load."""
    group: Any = get_command(app)
    params = group.commands[words[0]].make_context(words[0], words[1:]).params
    if "target" in params:
        config.load(params.get("task") or "docstrings", params["target"], params["overrides"])


def readme_commands() -> list[list[str]]:
    """The words after `workloads`, or scripts/STAGE.py, in each command of clusters/README.md."""
    text = (CLUSTERS / "README.md").read_text(encoding="utf-8")
    blocks = "".join(re.findall(r"```bash\n(.*?)```", text, re.DOTALL)).replace("\\\n", " ")
    found = []
    for line in blocks.splitlines():
        # A quoted command is one of `ray exec`.
        match = re.search(r"(?:^|\s|')workloads ([a-z].*)|scripts/(\w+)\.py -- (.*)", line)
        if match and match[1] and match[1].split()[0] in get_command(app).commands:  # type: ignore[attr-defined]
            found.append(shlex.split(match[1].replace("'", ""), comments=True))
        elif match and match[2]:
            found.append([match[2], *shlex.split(match[3], comments=True)])
    return found


# ---------------------------------------------------------------- the cluster launcher


@pytest.mark.parametrize("path", LAUNCHER, ids=str)
def test_ray_accepts_the_launcher_file(path: Path) -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(load(path)))


@pytest.mark.parametrize("path", LAUNCHER, ids=str)
def test_what_is_copied_to_the_nodes_is_in_the_checkout(path: Path) -> None:
    mounts = load(path)["file_mounts"]
    assert mounts.pop("~/.ray/auth_token") == "~/.ray/auth_token"
    for remote, local in mounts.items():
        assert (ROOT / local).exists()
        assert remote == f"~/workloads/{local}"
    assert {"pyproject.toml", "workloads", "configs", "scripts"} <= set(mounts.values())


@pytest.mark.parametrize("path", LAUNCHER, ids=str)
def test_every_launched_ray_asks_for_a_token_and_keeps_its_threads(path: Path) -> None:
    cluster = load(path)
    commands = [*cluster["head_start_ray_commands"], *cluster["worker_start_ray_commands"]]
    starts = [c for c in commands if "ray start" in c]
    assert len(starts) == 2
    for command in starts:
        assert "RAY_AUTH_MODE=token ray start" in command
        assert command.startswith("unset OMP_NUM_THREADS")


@pytest.mark.parametrize("path", [*LAUNCHER, Path("docker/compose.yaml")], ids=str)
def test_the_dashboard_is_on_loopback(path: Path) -> None:
    text = (CLUSTERS / path).read_text(encoding="utf-8")
    assert re.findall(r"--dashboard-host=(\S+)", text) == ["127.0.0.1"]


@pytest.mark.parametrize("path", CLOUD, ids=str)
def test_clouds_tune_on_spot_machines_and_keep_the_head_empty(path: Path) -> None:
    types = load(path)["available_node_types"]
    assert types["head"]["resources"] == {"CPU": 0}
    assert types["spot"]["labels"]["ray.io/market-type"] == "spot"
    assert types["on_demand"]["labels"]["ray.io/market-type"] == "on-demand"
    spot = str(types["spot"]["node_config"]).lower()
    assert "spot" in spot
    assert "spot" not in str(types["on_demand"]["node_config"]).lower()


@pytest.mark.parametrize("path", CLOUD, ids=str)
def test_the_machines_that_stay_hold_the_target_from_the_start(path: Path) -> None:
    from workloads import cluster

    target = config.load("docstrings", f"{path.stem[-3:]}-cluster").target
    types = load(path)["available_node_types"]
    machine = cluster.Node({"CPU": 8.0, "GPU": 1.0}, types["on_demand"]["labels"])
    there = [machine] * types["on_demand"]["min_workers"]
    assert not any(cluster.misfit(ask, there) for ask in cluster.asks(target, ["train", "serve"]))


def test_aws_files_differ_in_machines_only() -> None:
    cpu, gpu = load("aws-cpu.yaml"), load("aws-gpu.yaml")
    for key in ("file_mounts", "setup_commands", "head_start_ray_commands", "rsync_exclude"):
        assert cpu[key] == gpu[key]


# ---------------------------------------------------------------- KubeRay


@pytest.mark.parametrize("name", sorted(RAY_KINDS))
def test_every_cluster_on_kubernetes_asks_for_a_token(name: str) -> None:
    cluster = clusters_of(name)
    assert cluster["authOptions"]["mode"] == "token"
    assert cluster["rayVersion"] == "2.60.0"
    assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


@pytest.mark.parametrize("name", sorted(RAY_KINDS))
def test_the_network_policy_covers_every_pod(name: str) -> None:
    cluster = clusters_of(name)
    for group in [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]:
        assert group["template"]["metadata"]["labels"]["workloads/ray"] == "true"
    ray, serve, _redis = load("kuberay/networkpolicy.yaml")
    assert ray["spec"]["podSelector"]["matchLabels"] == {"workloads/ray": "true"}
    assert all(rule["from"] for rule in ray["spec"]["ingress"])  # nothing from everywhere
    assert serve["spec"]["ingress"] == [{"ports": [{"port": 8000}]}]


def test_the_sweep_is_on_spot_nodes_and_the_training_is_not() -> None:
    def markets(name: str) -> set[str]:
        groups = clusters_of(name)["workerGroupSpecs"]
        return {group["labels"]["ray.io/market-type"] for group in groups}

    assert markets("rayjob-tune") == {"spot"}
    assert markets("rayjob-train") == markets("rayservice") == {"on-demand"}


@pytest.mark.parametrize("stage", ["tune", "train"])
def test_a_job_runs_a_command_of_ours_and_cleans_up(stage: str) -> None:
    spec = load(f"kuberay/rayjob-{stage}.yaml")["spec"]
    python, _m, package, *words = shlex.split(spec["entrypoint"])
    assert (python, package, words[0]) == ("python", "workloads", stage)
    check_command(words)
    rules = spec["deletionStrategy"]["deletionRules"]
    ends = {r["condition"]["jobStatus"] for r in rules if r["policy"] == "DeleteCluster"}
    assert ends == {"SUCCEEDED", "FAILED"}


def test_the_service_is_what_print_config_prints_with_two_replicas_on_different_nodes() -> None:
    from ray.serve.schema import ServeDeploySchema

    from workloads.serve import config_file

    spec = load("kuberay/rayservice.yaml")["spec"]
    served = yaml.safe_load(spec["serveConfigV2"])
    (application,) = ServeDeploySchema.model_validate(served).applications
    target = config.Target.model_validate(application.args["target"])
    assert served == config_file(application.args["model"], target, [])
    assert target.serve.max_replicas_per_node == 1
    (group,) = spec["rayClusterConfig"]["workerGroupSpecs"]
    assert 2 <= target.serve.replicas.min < group["minReplicas"]
    # It listens for everybody: every pod that may build it has the keys.
    for pod in (spec["rayClusterConfig"]["headGroupSpec"], group):
        (container,) = pod["template"]["spec"]["containers"]
        assert [one["name"] for one in container["env"]] == ["WORKLOADS_API_KEYS"]


# ---------------------------------------------------------------- Akash and Docker


def test_akash_shows_serve_to_the_world_and_nothing_else() -> None:
    for path in ("akash/ray-cluster.yaml", "akash/serve.yaml"):
        services = load(path)["services"].values()
        ports = [e for s in services for e in s.get("expose", [])]
        public = [e["port"] for e in ports if any(to.get("global") for to in e["to"])]
        assert public == [8000]
        assert all("RAY_AUTH_MODE=token" in service["env"] for service in services)
        assert all("shm" in service["params"]["storage"] for service in services)


def test_akash_serves_with_a_command_of_ours() -> None:
    service = load("akash/serve.yaml")["services"]["serve"]
    program, *words = [*service["command"], *service["args"]]
    assert program == "workloads"
    check_command(words)


def test_compose_publishes_serve_on_this_machine_only() -> None:
    services = load("docker/compose.yaml")["services"]
    assert services["head"]["ports"] == ["127.0.0.1:8000:8000"]
    assert "ports" not in services["worker"]
    for service in services.values():
        assert service["environment"]["RAY_AUTH_MODE"] == "token"
        assert service["secrets"] == ["auth_token"]


def test_the_image_is_built_without_root_from_what_the_checkout_has() -> None:
    text = (CLUSTERS / "docker/Dockerfile").read_text(encoding="utf-8")
    assert re.findall(r"^USER (.*)", text, re.MULTILINE) == ["1000"]
    allowed = (ROOT / ".dockerignore").read_text(encoding="utf-8")
    for sources in re.findall(r"^COPY (?!--from)(.*) \S+$", text, re.MULTILINE):
        for source in sources.split():
            assert (ROOT / source).exists()
            assert re.search(rf"^!{re.escape(source)}/?$", allowed, re.MULTILINE)


# ---------------------------------------------------------------- all of them


def test_every_image_is_pinned() -> None:
    text = (CLUSTERS / "docker/Dockerfile").read_text(encoding="utf-8")
    images = re.findall(r"^FROM (\S+)", text, re.MULTILINE)
    for path in FILES:
        images += [image for image in values(load(path), "image") if isinstance(image, str)]
    assert IMAGE in images
    for image in images:
        assert re.search(r":[\w.-]*\d[\w.-]*$", image), image
        assert ("workloads" in image) == (image == IMAGE)


@pytest.mark.parametrize("path", FILES, ids=str)
def test_no_file_holds_a_secret(path: Path) -> None:
    text = re.sub(r"(^|\s)#.*", "", (CLUSTERS / path).read_text(encoding="utf-8"))
    # Names of secrets are followed by nothing, and nothing looks like a key or a token.
    assert not re.findall(r"[A-Z_]*(?:TOKEN|KEY|KEY_ID|SECRET|PASSWORD)[=:][ \t]*\S+", text)
    assert not re.findall(r"(?=[\w+/]*\d)(?=[\w+/]*[A-Za-z])[\w+/]{28,}", text)
    named = [env for env in values(load(path), "env") if isinstance(env[0], dict)]
    assert not [one for env in named for one in env if "value" in one]


@pytest.mark.parametrize("words", readme_commands(), ids=" ".join)
def test_the_commands_of_the_readme_are_ours(words: list[str]) -> None:
    check_command(words)


def test_the_readme_names_every_file() -> None:
    text = (CLUSTERS / "README.md").read_text(encoding="utf-8")
    assert not {path.name for path in FILES if path.name not in text}


def test_a_submitted_job_has_what_it_needs_and_little_else() -> None:
    left_out = (ROOT / ".rayignore").read_text(encoding="utf-8").splitlines()
    assert {"tests/", "clusters/", ".git/"} <= set(left_out)
    assert not {"workloads/", "configs/", "scripts/"} & set(left_out)


def test_the_image_has_the_ingress_that_is_started_here() -> None:
    text = (CLUSTERS / "docker/Dockerfile").read_text(encoding="utf-8")
    told = dict(
        word.split("=", 1) for word in shlex.split(text.replace("\\\n", " ")) if "=" in word
    )
    here: dict[str, str] = {}
    ingress.prepare("auto", here)
    # Those of a machine: free ports, a user's folder, how many files may be open.
    machine = re.compile(r".*(_PORT|_LOC|_PATH|_BASE|_FILE|MAXCONN)")
    shared = {key: value for key, value in here.items() if not machine.fullmatch(key)}
    assert shared.items() >= ingress.HAPROXY.items()
    assert {key: told.get(key) for key in shared} == shared


def test_launched_nodes_have_what_rays_own_proxy_lacks() -> None:
    """setup_node's line for ~/.bashrc, as bash reads it."""
    text = (CLUSTERS / "setup_node").read_text(encoding="utf-8")
    lines = "\n".join(line for line in text.splitlines() if line.startswith("line"))
    here: dict[str, str] = {}
    ingress.prepare("proxy", here)
    assert ingress.GUARD in here
    script = f'{lines}\neval "$line"; env'
    environment = {"PATH": os.environ["PATH"], "HOME": "/nowhere"}
    told = subprocess.run(
        ["bash", "-euc", script], env=environment, capture_output=True, text=True, check=True
    )
    assert {f"{key}={value}" for key, value in here.items()} <= set(told.stdout.splitlines())

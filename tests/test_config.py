"""Task and Target: every shipped file loads, and every message names what to put right."""

from pathlib import Path
from typing import Any

import pytest

from workloads import config
from workloads.config import Target, Task, UserError

TASKS, TARGETS = config.list_configs("tasks"), config.list_configs("targets")


def load(folder: Path, task: str = "", target: str = "", *overrides: str) -> config.Run:
    """Two files made of these texts, loaded."""
    (folder / "mine.yaml").write_text(task, encoding="utf-8")
    (folder / "there.yaml").write_text(target, encoding="utf-8")
    return config.load(f"{folder}/mine.yaml", f"{folder}/there.yaml", list(overrides))


def message(folder: Path, task: str = "", target: str = "", *overrides: str) -> str:
    """What a user sees of two files that do not load."""
    with pytest.raises(UserError) as e:
        load(folder, task, target, *overrides)
    return str(e.value)


def space(draw: str, path: str = "train.lr", **more: str) -> str:
    """A task whose space has one draw."""
    extra = "".join(f"{key}: {value}\n" for key, value in more.items())
    return f"tune:\n  trials: 2\n  space: {{{path}: {draw}}}\n{extra}"


# ---------------------------------------------------------------- what is shipped


def test_the_four_tasks_and_three_targets_are_found():
    assert set(TASKS) >= {"docstrings", "sst2", "csv-example", "smoke"}
    assert set(TARGETS) >= {"laptop", "cpu-cluster", "gpu-cluster"}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("task", TASKS)
def test_every_task_loads_with_every_target(task: str, target: str):
    run = config.load(task, target)
    assert (run.task_name, run.target_name) == (task, target)
    assert isinstance(run.task, Task)
    assert isinstance(run.target, Target)


def test_no_key_of_a_task_is_a_key_of_a_target():
    task, target = config.flat(Task().model_dump()), config.flat(Target().model_dump())
    assert not task.keys() & target.keys()


def test_a_task_is_not_taken_for_a_target():
    with pytest.raises(UserError, match=r"target\.model: no such key"):
        config.load("smoke", str(TASKS["smoke"]))


def test_every_shipped_task_survives_a_dump_as_json():
    for name in TASKS:
        task = config.load(name, "laptop").task
        assert Task.model_validate(task.model_dump(mode="json")) == task


def test_files_that_say_nothing_give_the_defaults(tmp_path: Path):
    run = load(tmp_path, "# nothing yet\n", "")
    assert run.task == Task()
    assert run.target == Target()


def test_a_run_is_called_after_its_files(tmp_path: Path):
    run = load(tmp_path)
    assert (run.task_name, run.target_name) == ("mine", "there")


# ---------------------------------------------------------------- keys


@pytest.mark.parametrize(
    ("task", "target", "override", "expected"),
    [
        ("trian: {lr: 1}", "", [], "task.trian: no such key; did you mean 'train'?"),
        ("train: {epoch: 1}", "", [], "task.train.epoch: no such key; did you mean 'epochs'?"),
        ("tune: {trails: 1}", "", [], "task.tune.trails: no such key; did you mean 'trials'?"),
        ("", "sevre: {}", [], "target.sevre: no such key; did you mean 'serve'?"),
        (
            "",
            "serve: {replicas: {mni: 1}}",
            [],
            "target.serve.replicas.mni: no such key; did you mean 'min'?",
        ),
        ("", "", ["task.trian.lr=1"], "task.trian: no such key; did you mean 'train'?"),
        ("", "", ["task.train.lrr=1"], "task.train.lrr: no such key; did you mean 'lr'?"),
        (
            "",
            "",
            ["target.train.worker=1"],
            "target.train.worker: no such key; did you mean 'workers'?",
        ),
        ("model: {xyz: 1}", "", [], "there are: pretrained, layers, hidden, heads, vocab_size"),
        ("", "", ["target.xyz=1"], "there are: ray, device, precision, tune, train, serve"),
    ],
)
def test_an_unknown_key_is_named_with_the_nearest_one(
    tmp_path: Path, task: str, target: str, override: list[str], expected: str
):
    assert expected in message(tmp_path, task, target, *override)


def test_every_wrong_key_has_its_line(tmp_path: Path):
    lines = message(tmp_path, "trian: {}\nmodel: {layer: 1}\ntrain: {lr: fast}").splitlines()
    assert sorted(line.partition(":")[0] for line in lines) == [
        "task.model.layer",
        "task.train.lr",
        "task.trian",
    ]


# ---------------------------------------------------------------- values


@pytest.mark.parametrize(
    ("task", "expected"),
    [
        ("train: {lr: fast}", "task.train.lr: input should be a valid number"),
        ("train: {epochs: 1.5}", "task.train.epochs: input should be a valid integer"),
        ("train: {epochs: [1]}", "task.train.epochs: input should be a valid integer, got [1]"),
        ("data: {text: 3}", "task.data.text: input should be a valid string, got 3"),
        ("train: 3", "task.train: input should be a valid dictionary"),
        ("tune: {trials: 1, search: hope}", "'random', 'grid' or 'optuna', got 'hope'"),
        ("train: {metric: eval_auc}", "'eval_accuracy', 'eval_f1' or 'eval_loss', got 'eval_auc'"),
    ],
)
def test_a_value_of_the_wrong_type_is_named_with_what_was_found(
    tmp_path: Path, task: str, expected: str
):
    assert expected in message(tmp_path, task)


@pytest.mark.parametrize(
    ("task", "target", "key", "value"),
    [
        ("train: {lr: 0}", "", "task.train.lr", "0"),
        ("train: {lr: -1.0e-3}", "", "task.train.lr", "-0.001"),
        ("train: {lr: .inf}", "", "task.train.lr", "inf"),
        ("train: {lr: .nan}", "", "task.train.lr", "nan"),
        ("train: {epochs: 0}", "", "task.train.epochs", "0"),
        ("train: {warmup: 1.1}", "", "task.train.warmup", "1.1"),
        ("train: {seed: -1}", "", "task.train.seed", "-1"),
        ("model: {dropout: 1}", "", "task.model.dropout", "1"),
        ("model: {layers: 0}", "", "task.model.layers", "0"),
        ("data: {max_tokens: 3}", "", "task.data.max_tokens", "3"),
        ("data: {validation_fraction: 1}", "", "task.data.validation_fraction", "1"),
        ("", "serve: {port: 65536}", "target.serve.port", "65536"),
        ("", "serve: {replicas: {max: 0}}", "target.serve.replicas.max", "0"),
        ("", "tune: {cpus_per_trial: 0}", "target.tune.cpus_per_trial", "0"),
        ("", "device: tpu", "target.device", "'tpu'"),
    ],
)
def test_a_value_out_of_bounds_is_named_with_its_key(
    tmp_path: Path, task: str, target: str, key: str, value: str
):
    said = message(tmp_path, task, target)
    assert said.startswith(f"{key}: input should be ")
    assert said.endswith(f", got {value}")


@pytest.mark.parametrize(
    ("key", "word"),
    [
        ("train.epochs", "yes"),
        ("train.lr", "no"),
        ("model.dropout", "off"),
        ("model.layers", "on"),
        ("data.text", "No"),
    ],
)
def test_a_yes_or_no_is_refused_and_named_in_full(tmp_path: Path, key: str, word: str):
    section, _, field = key.partition(".")
    for said in (
        message(tmp_path, f"{section}: {{{field}: {word}}}"),
        message(tmp_path, "", "", f"task.{key}={word}"),
    ):
        assert "quote it" in said
        assert key in said


def test_a_yes_in_a_list_is_no_number(tmp_path: Path):
    said = message(tmp_path, "", "", "target.train.workers=[yes, 2]")
    assert "target.train.workers.0: input should be a valid integer, got True" in said


def test_a_quoted_yes_is_a_string(tmp_path: Path):
    assert load(tmp_path, "data: {label: 'yes'}").task.data.label == "yes"


@pytest.mark.parametrize("text", ["1e-4", "1.0e-4", "0.0001", "'1e-4'"])
def test_a_rate_may_be_written_in_any_way(tmp_path: Path, text: str):
    assert load(tmp_path, f"train: {{lr: {text}}}").task.train.lr == 1e-4
    assert load(tmp_path, "", "", f"task.train.lr={text}").task.train.lr == 1e-4


def test_a_rate_in_a_list_of_choices_is_a_number_once_drawn(tmp_path: Path):
    task = load(tmp_path, space("{draw: choice, values: [1e-4, 3e-4]}")).task
    drawn = [task.patched({"train.lr": v}).train.lr for v in task.tune.space["train.lr"].corners]
    assert drawn == [1e-4, 3e-4]


# ---------------------------------------------------------------- impossible combinations


@pytest.mark.parametrize(
    ("task", "target", "parts"),
    [
        ("model: {hidden: 100, heads: 3}", "", ["model.hidden is 100", "model.heads (3)"]),
        (
            "model: {pretrained: a/b, hidden: 64}",
            "",
            ["model.hidden is 64", "model.pretrained is 'a/b'", "leave model.hidden out"],
        ),
        (
            "model: {pretrained: a/b, vocab_size: 500}",
            "",
            ["model.vocab_size is 500", "model.pretrained is 'a/b'"],
        ),
        ("data: {source: files}", "", ["data.source is 'files'", "data.train is null"]),
        ("data: {source: 'builtin:x'}", "", ["data.source is 'builtin:x'", "'builtin:docstrings'"]),
        (
            "data: {train: a.csv}",
            "",
            ["data.train is 'a.csv'", "data.source is 'builtin:docstrings'", "to 'files'"],
        ),
        (
            "tune: {search: grid, trials: 3, space: {train.seed: {draw: choice, values: [1, 2]}}}",
            "",
            ["tune.search is 'grid'", "all 2 combinations", "tune.trials is 3", "null"],
        ),
        (
            "tune: {search: grid, space: {train.lr: {draw: uniform, low: 0.1, high: 0.2}}}",
            "",
            ["tune.search is 'grid'", "'train.lr' draws 'uniform'", "draw: choice"],
        ),
        ("tune: {search: random}", "", ["tune.search is 'random'", "tune.trials is null"]),
        ("", "device: cuda", ["device is 'cuda'", "tune.gpus_per_trial is 0"]),
        (
            "",
            "device: cuda\ntune: {gpus_per_trial: 1}",
            ["device is 'cuda'", "train.gpus_per_worker is 0"],
        ),
        (
            "",
            "train: {gpus_per_worker: 0.5}",
            ["device is 'cpu'", "train.gpus_per_worker is 0.5"],
        ),
        ("", "serve: {gpus_per_replica: 1}", ["device is 'cpu'", "serve.gpus_per_replica is 1"]),
        (
            "",
            "serve: {replicas: {min: 3, max: 2}}",
            ["serve.replicas.min is 3", "serve.replicas.max is 2"],
        ),
        ("", "train: {workers: [3, 1]}", ["train.workers is [3, 1]", "[min, max]"]),
        ("", "train: {workers: 0}", ["train.workers is 0"]),
        (
            "",
            "train: {checkpoint_every: often}",
            ["train.checkpoint_every is 'often'", "200 steps"],
        ),
        ("", "train: {checkpoint_every: 0}", ["train.checkpoint_every is 0"]),
    ],
)
def test_an_impossible_combination_names_its_keys_and_values(
    tmp_path: Path, task: str, target: str, parts: list[str]
):
    said = message(tmp_path, task, target)
    assert [part for part in parts if part not in said] == []


def test_a_grid_counts_its_own_trials(tmp_path: Path):
    tune = load(
        tmp_path,
        "tune:\n  search: grid\n  epochs: 3\n  evals_per_epoch: 2\n  space:\n"
        "    train.seed: {draw: choice, values: [1, 2, 3]}\n"
        "    model.layers: {draw: choice, values: [1, 2]}\n",
    ).task.tune
    assert tune.num_trials == 6
    assert tune.num_evals == 6


@pytest.mark.parametrize(
    "key", ["tune.gpus_per_trial", "train.gpus_per_worker", "serve.gpus_per_replica"]
)
def test_more_than_one_gpu_is_a_whole_number_of_them(tmp_path: Path, key: str):
    # Ray refuses 1.5 with a ValueError of its own, in the middle of a run.
    text = "device: cuda\ntune: {gpus_per_trial: 1}\ntrain: {gpus_per_worker: 1}"
    assert load(tmp_path, "", text, f"target.{key}=2").target.device == "cuda"
    said = message(tmp_path, "", text, f"target.{key}=1.5")
    assert key in said
    assert "1.5" in said


def test_a_gpu_target_may_serve_on_cpus(tmp_path: Path):
    text = "device: cuda\ntune: {gpus_per_trial: 0.25}\ntrain: {gpus_per_worker: 1}"
    assert load(tmp_path, "", text).target.serve.gpus_per_replica == 0


# ---------------------------------------------------------------- the search space


@pytest.mark.parametrize(
    ("path", "draw", "parts"),
    [
        ("train.lrr", "{draw: choice, values: [1]}", ["train.lrr: no such key", "'lr'"]),
        ("model.pretrained", "{draw: choice, values: [a]}", ["'model.pretrained' cannot be drawn"]),
        ("train.epochs", "{draw: int, low: 1, high: 3}", ["'train.epochs' cannot be drawn"]),
        ("data.max_tokens", "{draw: int, low: 8, high: 9}", ["'data.max_tokens' cannot be drawn"]),
        ("tune.trials", "{draw: int, low: 8, high: 9}", ["'tune.trials' cannot be drawn"]),
        ("train.lr", "{draw: choice, values: [fast]}", ["train.lr: input", "got 'fast'"]),
        ("train.lr", "{draw: uniform, low: 0, high: 1}", ["train.lr: input", "got 0.0"]),
        ("train.warmup", "{draw: uniform, low: 0.5, high: 2}", ["train.warmup: input", "got 2.0"]),
        ("model.layers", "{draw: int, low: 40, high: 60}", ["model.layers: input", "got 60"]),
        ("model.heads", "{draw: choice, values: [2, 3]}", ["model.hidden is 128", "(3)"]),
        ("model.dropout", "{draw: choice, values: [no, 0.1]}", ["dropout is False"]),
        ("train.lr", "{draw: lognormal, low: 1, high: 2}", ["train.lr", "'lognormal'", "choice"]),
        ("train.lr", "{values: [1]}", ["space.train.lr", "'draw'"]),
        ("train.lr", "{draw: choice, values: []}", ["space.train.lr", "values", "at least 1"]),
        ("train.lr", "{draw: uniform, low: 2, high: 1}", ["train.lr", "low is 2", "high is 1"]),
        ("train.seed", "{draw: int, low: 3, high: 3}", ["train.seed", "low is 3", "high is 3"]),
        ("train.lr", "{draw: loguniform, low: 0, high: 1}", ["train.lr", "low is 0", "above 0"]),
    ],
)
def test_a_space_that_cannot_be_drawn_from_is_refused_by_its_path(
    tmp_path: Path, path: str, draw: str, parts: list[str]
):
    said = message(tmp_path, space(draw, path))
    assert [part for part in parts if part not in said] == []


@pytest.mark.parametrize("draw", ["uniform", "loguniform"])
def test_a_whole_number_is_not_drawn_between_two_bounds_as_a_fraction(tmp_path: Path, draw: str):
    # 1.0 and 6.0 are layers, but what is drawn between them is not.
    said = message(tmp_path, space(f"{{draw: {draw}, low: 1, high: 6}}", "model.layers"))
    assert "model.layers" in said


def test_a_draw_is_validated_against_the_rest_of_the_task(tmp_path: Path):
    said = message(
        tmp_path,
        space("{draw: choice, values: [64]}", "model.hidden", model="{pretrained: a/b}"),
    )
    assert "model.hidden is 64 but model.pretrained is 'a/b'" in said


def test_a_draw_can_be_given_as_an_override(tmp_path: Path):
    override = "task.tune.space.train.lr={draw: choice, values: [1e-3]}"
    for text in ("tune: {trials: 1}", "tune:\n  trials: 1\n  space:\n"):
        task = load(tmp_path, text, "", override).task
        assert list(task.tune.space) == ["train.lr"]


def test_a_patch_changes_its_keys_only():
    task = config.load("docstrings", "laptop").task
    patched = task.patched({"train.lr": 0.5, "model.layers": 1})
    before, after = task.model_dump(), patched.model_dump()
    assert config.changed_keys(before, after) == ["model.layers", "train.lr"]
    assert patched.tune.space == task.tune.space


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"train.lrr": 1}, "task.train.lrr: no such key; did you mean 'lr'?"),
        ({"train.lr.x": 1}, "task.train.lr: is a value, it has no key 'x'"),
        ({"train.lr": -1}, "task.train.lr: input should be greater than 0, got -1"),
        ({"model.heads": 3}, "model.hidden is 128, which model.heads (3) does not divide"),
    ],
)
def test_a_patch_that_gives_no_task_is_refused(params: dict[str, Any], expected: str):
    with pytest.raises(UserError) as e:
        Task().patched(params)
    assert expected in str(e.value)


# ---------------------------------------------------------------- files, names and overrides


@pytest.mark.parametrize("text", ["a: [", "a: b: c", "\ttrain: 1", "{"])
def test_a_file_that_is_not_yaml_is_named(tmp_path: Path, text: str):
    said = message(tmp_path, text)
    assert said.startswith(f"{tmp_path}/mine.yaml: not YAML: ")
    assert "line 1" in said
    assert "\n" not in said


@pytest.mark.parametrize(("text", "found"), [("- 1", "list"), ("word", "str"), ("3", "int")])
def test_a_file_without_keys_is_named(tmp_path: Path, text: str, found: str):
    said = message(tmp_path, text)
    assert said == f"{tmp_path}/mine.yaml: expected keys and values, found {found}"


def test_a_file_that_is_not_utf8_is_named(tmp_path: Path):
    (tmp_path / "latin.yaml").write_bytes("data: {text: é}".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.yaml: not YAML: 'utf-8'"):
        config.load(f"{tmp_path}/latin.yaml", "laptop")


def test_a_missing_file_is_named_with_the_place_that_was_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as e:
        config.load("mine.yaml", "laptop")
    assert str(e.value) == f"--task mine.yaml: no such file (looked for {tmp_path}/mine.yaml)"


@pytest.mark.parametrize(
    ("task", "target", "parts"),
    [
        ("docstring", "laptop", ["--task docstring", "did you mean 'docstrings'?", "sst2"]),
        ("smoke", "labtop", ["--target labtop", "did you mean 'laptop'?", "gpu-cluster"]),
        ("qqq", "laptop", ["--task qqq: no such name; there are: ", "a path ends in .yaml"]),
    ],
)
def test_an_unknown_name_is_answered_with_those_there_are(task: str, target: str, parts: list[str]):
    with pytest.raises(UserError) as e:
        config.load(task, target)
    assert [part for part in parts if part not in str(e.value)] == []


def test_a_config_folder_here_adds_to_the_shipped_ones_and_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "configs/tasks").mkdir(parents=True)
    (tmp_path / "configs/tasks/mine.yaml").write_text("train: {epochs: 7}")
    (tmp_path / "configs/tasks/smoke.yaml").write_text("train: {epochs: 8}")
    monkeypatch.chdir(tmp_path)
    assert config.load("mine", "laptop").task.train.epochs == 7
    assert config.load("smoke", "laptop").task.train.epochs == 8
    assert config.load("docstrings", "laptop").task.train.epochs == 4


@pytest.mark.parametrize(
    "item", ["task.train.lr", "train.lr=1", "task=1", "task.=1", "=1", "", "tasks.train.lr=1"]
)
def test_an_override_that_is_none_is_answered_with_an_example(item: str):
    with pytest.raises(UserError) as e:
        config.load("smoke", "laptop", [item])
    assert str(e.value).startswith(f"'{item}': an override is task.KEY=VALUE")
    assert "task.train.lr=1e-4" in str(e.value)


@pytest.mark.parametrize(
    ("item", "expected"),
    [
        ("task.train.lr={", "task.train.lr={: not a YAML value: "),
        ("task.data.text=2020-13-45", "task.data.text=2020-13-45: not a YAML value: month"),
        ("task.train.lr.x=1", "task.train.lr: is a value, it has no key 'x'"),
        ("task.train.lr=", "task.train.lr: input should be a valid number, got None"),
        ("target.serve.port=http", "target.serve.port: input should be a valid integer"),
        ("target.serve.host=::", "serve.host is '::': IPv6 is not served; give 127.0.0.1, 0.0.0.0"),
        ("target.serve.host=::1", "serve.host is '::1': IPv6 is not served"),
        ("target.serve.host='::'", "serve.host is '::': IPv6 is not served"),
        ("target.device=cuda", "device is 'cuda' but tune.gpus_per_trial is 0"),
    ],
)
def test_an_override_with_a_wrong_value_is_named(item: str, expected: str):
    with pytest.raises(UserError) as e:
        config.load("smoke", "laptop", [item])
    assert expected in str(e.value)


def test_overrides_reach_both_files_and_the_last_one_counts():
    run = config.load(
        "smoke",
        "laptop",
        [
            "task.train.epochs=5",
            "task.train.epochs=6",
            "task.model.layers=null",
            "target.train.workers=[1, 3]",
            "target.serve.replicas.max=4",
        ],
    )
    assert run.task.train.epochs == 6
    assert run.task.model.layers is None
    assert run.target.train.width == (1, 3)
    assert run.target.serve.replicas.max == 4


def test_a_value_may_have_an_equals_sign(tmp_path: Path):
    url = "https://example.org/rows.csv?a=b"
    run = load(tmp_path, "data: {source: files}", "", f"task.data.train={url}")
    assert run.task.data.train == url


# ---------------------------------------------------------------- trees


def test_nested_is_the_inverse_of_flat():
    tree = Task().model_dump()
    assert config.nested(config.flat(tree)) == tree
    paths = {"train.lr": 0.1, "train.epochs": 2, "model.layers": None}
    assert config.flat(config.nested(paths)) == paths


def test_changed_keys_are_those_that_differ():
    a, b = Task().model_dump(), Task().patched({"train.lr": 1e-5}).model_dump()
    assert config.changed_keys(a, a) == []
    assert config.changed_keys(a, b) == ["train.lr"]
    with_space = {"tune": {"space": {"train.lr": {"draw": "choice"}}}}
    assert config.changed_keys({"tune": {"space": {}}}, with_space) == [
        "tune.space",
        "tune.space.train.lr.draw",
    ]


def test_a_config_does_not_change_after_loading():
    run = config.load("smoke", "laptop")
    with pytest.raises(ValueError, match="frozen"):
        run.task.train.lr = 1.0
    with pytest.raises(ValueError, match="frozen"):
        run.target.serve = config.TargetServe()


def test_a_patch_file_is_read_as_dotted_paths(tmp_path: Path):
    path = tmp_path / "best.json"
    path.write_text('{"train": {"lr": 0.001}, "model": {"layers": 1}}')
    patch = config.load_patch(str(path))
    assert patch == {"train.lr": 0.001, "model.layers": 1}
    assert Task().patched(patch).model.layers == 1


def test_a_missing_patch_file_is_named():
    with pytest.raises(UserError, match=r"--params best\.json: no such file"):
        config.load_patch("best.json")


def test_parameters_that_decide_what_is_read_are_refused(tmp_path: Path):
    path = tmp_path / "best.yaml"
    path.write_text("data: {max_tokens: 128}\nmodel: {vocab_size: 300, layers: 1}\n")
    said = r"data\.max_tokens, model\.vocab_size: decides .* as task\.data\.max_tokens=VALUE"
    with pytest.raises(UserError, match=said):
        config.load_patch(str(path))


def test_a_task_knows_the_most_layers_that_it_draws():
    space = {"model.layers": {"draw": "int", "low": 1, "high": 3}}
    plan = config.TaskTune.model_validate({"trials": 4, "space": space})
    assert plan.deepest == 3
    plan = plan.model_copy(update={"points": [{"model.layers": 6}, {}]})
    assert plan.deepest == 6
    assert config.TaskTune(trials=4).deepest == 0


@pytest.mark.parametrize(
    ("every", "steps"), [(1, 50), (3, 150), ("2 epochs", 100), ("1 epoch", 50), ("200 steps", 200)]
)
def test_a_checkpoint_is_due_every_so_many_epochs_or_steps(every: int | str, steps: int):
    train = config.TargetTrain(checkpoint_every=every)
    assert train.checkpoint_steps(steps_per_epoch=50) == steps


def test_a_fixed_width_is_its_own_least_and_most():
    assert config.TargetTrain(workers=3).width == (3, 3)
    assert config.TargetTrain(workers=[2, 8]).width == (2, 8)


def test_every_key_has_a_line_that_explains_it():
    silent = [
        f"{section.__name__}.{name}"
        for section in (config.Model, config.Data, config.Train, config.TaskTune)
        for name, field in section.model_fields.items()
        if not field.description
    ]
    assert silent == []


@pytest.mark.parametrize(
    ("value", "words"),
    [
        *[
            (0, "0"),
            (0.0000123, "0.0000123"),
            (0.5, "0.5"),
            (9.5, "9.5"),
            (15.564, "15.56"),
            (100, "100"),
        ],
        *[
            (1234.56, "1,234.56"),
            (999.6, "999.60"),
            (-0.25, "-0.25"),
            (1e6, "1,000,000"),
            (1e-20, "0"),
        ],
    ],
)
def test_an_amount_is_written_without_an_exponent(value: float, words: str):
    assert config.figure(value) == words

"""Recipes: every preset builds and is what DESIGN says, the large ones take a step, and every field is read."""

import importlib
import pathlib
import re
import types
import typing

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

import sft
from configs import apr, common, direct, sos, sosp
from configs import grpo as rl
from harness.build import build, check_parents, check_targets
from harness.evaluation import report
from harness.rollouts import RolloutPool
from harness.workdir import Workdir, load_best, read_config
from packing import TokenBatch
from solver import DemonstratorConfig
from train_state import OptimizerConfig, make_train_step, state_from_key

ROOT = pathlib.Path(__file__).resolve().parents[1]
RECIPES = sorted(path.stem for path in (ROOT / "configs").glob("*.py") if path.stem != "common")
SUPERVISED = {"apr": apr, "sosp": sosp, "sos": sos, "direct": direct}
PRESETS = ("smoke", "laptop", "desktop", "gpu", "paper")


def leaves(config: ConfigDict, prefix: str = "") -> dict[str, typing.Any]:
    """Dotted name -> value of every field."""
    found = {}
    for name in config:
        value = config[name]
        inner = leaves(value, f"{prefix}{name}.") if isinstance(value, ConfigDict) else {f"{prefix}{name}": value}
        found.update(inner)
    return found


def one_device(module: types.ModuleType, preset: str) -> ConfigDict:
    """A preset with its rows on one of the eight devices."""
    config = module.get_config(preset)
    config.mesh.data = 1
    return config


def recipe(name: str) -> types.ModuleType:
    return importlib.import_module(f"configs.{name}")


# ------------------------------------------------------------------- fields that do not go together


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"mesh.data": 2}, "model.attention='pallas' runs on one device, a GPU, not on 2 of cpu: use 'blocks'"),
        ({"model.head_width": 48}, "model.attention='pallas' needs a power of two from 16 as model.head_width, not 48"),
        ({"model.head_width": 8}, "not 8"),
    ],
)
def test_where_the_kernel_cannot_run(fields, words):
    config = one_device(apr, "smoke")
    config.model.attention = "pallas"
    build(config)
    config.update_from_flattened_dict(fields)
    with pytest.raises(ValueError, match=re.escape(words)):
        build(config)


def test_targets_are_unseen_only_where_no_parameters_met_them():
    config, start = apr.get_config("smoke"), apr.get_config("smoke")
    check_targets(config, start)
    start.problems.unseen_targets = 0.2
    for share in (0.0, 0.1, 0.2):  # the targets of a smaller share are among those of a larger one
        config.problems.unseen_targets = share
        check_targets(config, start)
    config.problems.unseen_targets = 0.3
    with pytest.raises(ValueError, match=r"unseen_targets=0\.3: the run met some of these \(its share is 0\.2\)"):
        check_targets(config, start)
    check_targets(ConfigDict({}), {})  # a task without such a share


def test_parents_wait_or_go_on_as_the_parameters_learned_it():
    config, start = apr.get_config("smoke"), apr.get_config("smoke")
    for here, there in ((-1, -1), (0, 3)):
        config.demonstrator.unjoined, start.demonstrator.unjoined = here, there
        check_parents(config, start)
    with pytest.raises(ValueError, match="unjoined=0: the parameters learned another way to join .it was -1."):
        check_parents(config, {"demonstrator": {}})  # a run from before there was a choice
    check_parents(ConfigDict({}), {})


@pytest.mark.parametrize(
    ("recipe", "changes", "match"),
    [
        (sosp, {"demonstrator.unjoined": 1}, "sosp has no threads to join: unjoined must be -1, not 1"),
        (apr, {"demonstrator.unjoined": -2}, "unjoined=-2 must be"),
        (apr, {"demonstrator.unjoined": 1, "threads.child_returns": "text"}, "child_returns=text shows foreign states"),
    ],
)
def test_parents_that_go_on_where_they_cannot(recipe, changes, match):
    config = recipe.get_config("smoke")
    config.update_from_flattened_dict(changes)
    with pytest.raises(ValueError, match=match):
        build(config)


# ------------------------------------------------------------------- every preset


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", RECIPES)
def test_every_preset_of_every_recipe_is_a_locked_config(name, preset):
    config = recipe(name).get_config(preset)
    assert config.is_locked
    assert config.name == (name if name == "grpo" or preset == "laptop" else f"{name}-{preset}")
    with pytest.raises(AttributeError):
        config.temprature = 1.0


@pytest.mark.parametrize("name", RECIPES)
def test_the_default_preset_is_laptop_and_an_unknown_one_is_refused(name):
    assert leaves(recipe(name).get_config()) == leaves(recipe(name).get_config("laptop"))
    with pytest.raises(ValueError, match="unknown preset 'huge': choose one of smoke, laptop, desktop, gpu, paper"):
        recipe(name).get_config("huge")


@pytest.mark.parametrize("name", RECIPES)
def test_the_header_of_a_recipe_is_its_command(name):
    doc = recipe(name).__doc__ or ""
    commands = {"grpo": r"python grpo\.py\b", "sweep": r"python evaluate\.py --sweep=configs/sweep\.py\b"}
    assert re.search(commands.get(name, rf"python sft\.py --config=configs/{name}\.py\b"), doc)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", SUPERVISED)
def test_every_supervised_preset_builds(name, preset):
    experiment = build(one_device(SUPERVISED[name], preset))
    assert experiment.optimizer
    rollout = experiment.domain.demonstration("train", 0, 0)
    assert rollout.root.calls[0].sampled
    assert experiment.config.demonstrator.method == name


@pytest.mark.parametrize("preset", PRESETS)
def test_methods_are_compared_alike(preset):
    """Same problems, model, tokens and schedule; only the demonstrations differ."""
    base = leaves(apr.get_config(preset))
    for other in (sosp, sos, direct):
        differing = {name for name, value in leaves(other.get_config(preset)).items() if value != base[name]}
        assert all(name in ("name", "init") or name.startswith("demonstrator.") for name in differing)


# ------------------------------------------------------------------- what DESIGN says

# preset: numbers, their range, targets, least and most parameters, context
TABLE = {
    "smoke": (3, (1, 9), (10, 20), 10_000, 200_000, 512),
    "laptop": (3, (1, 20), (10, 50), 800_000, 1_300_000, 512),
    "desktop": (4, (1, 12), (10, 24), 800_000, 9_000_000, 1024),
    "gpu": (4, (1, 99), (10, 100), 10_000_000, 30_000_000, 2048),
    "paper": (4, (1, 99), (10, 100), 227_000_000, 229_000_000, 4096),
}


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_are_those_of_the_design(preset):
    experiment = build(one_device(apr, preset))
    count, numbers, targets, least, most, context = TABLE[preset]
    family = experiment.domain.family
    assert (family.count, (family.low, family.high), (family.target_low, family.target_high)) == (
        count,
        numbers,
        targets,
    )
    assert least <= experiment.parameter_count() <= most
    assert experiment.config.model.context == context


@pytest.mark.parametrize("name", ["apr", "sosp"])
def test_desktop_goes_on_from_the_shipped_laptop_run_of_its_method(name, monkeypatch):
    """So that the methods' starts are alike too: the shipped runs are those of the laptop recipes."""
    monkeypatch.chdir(ROOT)
    experiment = build(one_device(SUPERVISED[name], "desktop"))
    start, laptop = read_config(experiment.config.init), SUPERVISED[name].get_config().to_dict()
    for part, kind in (("demonstrator", DemonstratorConfig), ("optimizer", OptimizerConfig)):
        assert kind(**start[part]) == kind(**laptop[part])  # a field that came later has its default
    for part in ("model", "train", "problems"):
        assert start[part] == {name: value for name, value in laptop[part].items() if name in start[part]}
    load_best(experiment.config.init, experiment.param_shapes())  # raises if it does not fit


def test_the_paper_preset_has_the_papers_parameters():
    """18 layers of attention 4 x 1024^2, SwiGLU 3 x 1024 x 2752 and two scales of 1024, and a last scale."""
    experiment = build(apr.get_config("paper"))
    embedding = 2 * experiment.domain.language.vocab_size * 1024  # and the head, which is not tied
    by_hand = 18 * (4 * 1024**2 + 3 * 1024 * 2752 + 2 * 1024) + 1024
    assert experiment.parameter_count() - embedding == by_hand == 227_709_952  # "228M"


def test_the_paper_preset_has_the_papers_schedule():
    optimizer = apr.get_config("paper").optimizer
    paper = dict(learning_rate=5e-5, end_learning_rate=5e-7, steps=19_000, weight_decay=0.01, clip=1.0)
    assert {name: optimizer[name] for name in paper} == pytest.approx(paper)
    assert (optimizer.beta1, optimizer.beta2) == (0.9, 0.999)
    assert sosp.get_config("paper").demonstrator.token_bin == 512


# ------------------------------------------------------------------- one step of the large presets


def tiny_batch(rows: int, length: int, vocabulary: int) -> TokenBatch:
    """Rows of random ids, all sampled but the first."""
    tokens = np.random.default_rng(0).integers(2, vocabulary, (1, rows, length), np.int32)
    sampled = np.broadcast_to(np.arange(length) > 0, tokens.shape)
    fields: dict[str, np.ndarray] = dict.fromkeys(TokenBatch._fields, np.zeros(tokens.shape, np.float32))
    fields |= {
        "tokens": tokens,
        "positions": np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape),
        "until": np.full(tokens.shape, length, np.int32),
        "sampled": sampled,
        "weight": (sampled / sampled.sum()).astype(np.float32),
    }
    return TokenBatch(**fields)


@pytest.mark.parametrize(
    ("preset", "mesh"), [("gpu", (1, 1, 1)), ("paper", (2, 2, 2))], ids=["gpu", "paper-on-a-2x2x2-mesh"]
)
def test_a_large_preset_takes_a_step(preset, mesh):
    """One of its layers and a fraction of its batch: all else, widths, mesh and bfloat16 included, is as configured."""
    config = apr.get_config(preset)
    config.model.layers = 1
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = mesh
    config.optimizer.warmup_steps = 0
    experiment = build(config)
    optimizer = experiment.optimizer
    state = state_from_key(experiment.model, optimizer, experiment.mesh, jax.random.key(0))
    before = jax.device_get(state.params)
    assert {leaf.dtype for leaf in jax.tree.leaves(before)} == {np.dtype("float32")}
    batch = tiny_batch(4, 16, experiment.domain.language.vocab_size)
    step = make_train_step(experiment.model, optimizer, sft.sft_loss, experiment.mesh)
    state, metrics, _ = step(state, batch)
    assert int(state.step) == 1
    assert float(metrics["loss"]) == pytest.approx(np.log(experiment.domain.language.vocab_size), abs=1)
    assert 0 < float(metrics["grad_norm"]) < 100
    moved = jax.tree.map(lambda old, new: bool((old != np.asarray(new)).any()), before, state.params)
    assert all(jax.tree.leaves(moved))


# ------------------------------------------------------------------- every field is read


def test_every_field_of_a_supervised_recipe_is_read(tmp_path, monkeypatch):
    """Trains and evaluates for a step, watching which fields of which section are asked for."""
    config = apr.get_config("smoke")
    config.update_from_flattened_dict(
        {
            "mesh.data": 1,
            "model.layers": 1,
            "model.context": 128,
            "train.rows": 1,
            "train.micro_rows": 1,
            "train.eval_problems": 1,
            "optimizer.steps": 1,
            "optimizer.warmup_steps": 0,
            "evaluation.problems": 1,
            "sampler.rows": 2,
        }
    )
    sections = {"": config, **{f"{name}.": config[name] for name in config if isinstance(config[name], ConfigDict)}}
    run = Workdir(tmp_path / "run", config)  # before the watch: writing a config is not reading it
    asked: set[tuple[int, str]] = set()
    original = ConfigDict.__getitem__

    def watched(self: ConfigDict, key: str) -> typing.Any:
        asked.add((id(self), key))
        return original(self, key)

    monkeypatch.setattr(ConfigDict, "__getitem__", watched)
    experiment = build(config)
    pool = RolloutPool(experiment)
    sft.train(pool, run)
    params = state_from_key(experiment.model, experiment.optimizer, experiment.mesh, jax.random.key(0)).params
    report(pool, params, experiment.test_set(), tmp_path, 1)
    monkeypatch.undo()
    unread = [
        prefix + name for prefix, section in sections.items() for name in section if (id(section), name) not in asked
    ]
    assert set(unread) <= {"name", "init"}  # workdir and start, read by the command alone


@pytest.mark.parametrize("name", RECIPES)
def test_every_field_is_named_by_the_code(name):
    """A section passed whole reads all of its fields: this finds one that its receiver then ignores."""
    sources = "\n".join(path.read_text() for path in [*ROOT.glob("*.py"), *ROOT.glob("harness/*.py"), *ROOT.glob("countdown/*.py")])
    fields = {dotted.split(".")[-1] for dotted in leaves(recipe(name).get_config())}
    # The demonstrator's range goes by another name, the mesh's axes are keyword arguments.
    elsewhere = {"data", "fsdp", "tensor"}
    missing = {field for field in fields - elsewhere if not re.search(rf'(\.|getattr\(.*"|"){field}\b', sources)}
    assert not missing


def test_presets_cover_the_same_fields():
    for table in (common.PRESETS, rl.PRESETS):
        assert tuple(table) == PRESETS
        fields = [{(section, name) for section in preset for name in preset[section]} for preset in table.values()]
        assert all(found == fields[0] for found in fields)
    assert tuple(apr.BEAMS) == PRESETS


@pytest.mark.parametrize("preset", PRESETS)
def test_logs_and_evaluations_fall_on_the_last_step(preset):
    """So that the last evaluation is of the final parameters without an odd interval before it."""
    config = apr.get_config(preset)
    assert config.optimizer.steps % config.train.eval_every == 0


def test_the_number_limit_covers_single_numbers_of_the_small_presets():
    for preset in ("smoke", "laptop", "desktop"):
        config = apr.get_config(preset)
        assert config.number_limit > max(config.problems.high, config.problems.target_high)
    assert jnp.float32 == jnp.dtype(apr.get_config("laptop").model.dtype)

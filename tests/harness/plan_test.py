"""What `--dry_run` says, against numbers worked out by hand and the compiler's own."""

import json

import jax
import numpy as np
import pytest

import sft
from configs import apr
from harness.build import Parts, build
from harness.plan import (
    cache_bytes,
    flops_per_token,
    matrix_parameters,
    plan,
    sampler_parameter_bytes,
    state_bytes,
)
from harness.rollouts import RolloutPool
from model import ModelConfig
from packing import TokenBatch
from train_state import make_train_step, new_state


def parts_of(mesh: tuple[int, int, int] = (1, 1, 1), **model: int) -> Parts:
    config = apr.get_config("smoke")
    config.mesh.data, config.mesh.fsdp, config.mesh.tensor = mesh
    config.model.update(model)
    config.train.rows = config.train.micro_rows = 8
    config.optimizer.matrices = "adam"  # Muon's own products are many where matrices are large and batches small
    return build(config)


def test_operations_by_hand():
    """Width 2, one layer, two heads of 4 and one kv head, mlp 3, vocabulary 5, ten keys."""
    config = ModelConfig(5, 2, 1, 2, 1, 4, 3, 16, 1e4, True, "float32")
    query, keys, out, mlp, head = 2 * 8, 2 * 2 * 4, 8 * 2, 3 * 2 * 3, 2 * 5
    assert matrix_parameters(config) == query + keys + out + mlp + head == 76
    scores_and_values = 2 * (2 * 2 * 4) * 10  # two products of 2 heads x 4 with ten keys
    assert flops_per_token(config, 10) == 3 * (2 * 76 + scores_and_values) == 1416


def test_the_cache_by_hand():
    """16 rows of 512 ids and a chunk of 128, two layers, two heads of 16, keys and values, four bytes."""
    parts = parts_of()
    assert cache_bytes(parts) == 16 * (512 + 128) * 2 * 2 * 16 * 2 * 4
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), parts.param_shapes())
    runtimes = RolloutPool(parts).runtimes(params, 0.0)
    held = [leaf for runtime in runtimes for leaf in jax.tree.leaves(runtime.engine._history)]
    assert cache_bytes(parts) == sum(leaf.nbytes for leaf in held) // parts.sampler_mesh().size
    assert sampler_parameter_bytes(parts) == sum(
        leaf.nbytes  # every device has all of them
        for runtime in runtimes
        for leaf in jax.tree.leaves(runtime.engine._params)
    )
    with parts.config.unlocked():
        parts.config.grpo = {"temperature": 1.0}  # rollouts at 1, validation at 0
    assert sampler_parameter_bytes(parts) == 2 * 2 * 4 * parts.parameter_count()  # two workers
    assert cache_bytes(parts) == 2 * 16 * (512 + 128) * 2 * 2 * 16 * 2 * 4


def lowered_step(parts: Parts) -> jax.stages.Lowered:
    """One step as the compiler sees it, not run."""
    lowered, original = [], jax.jit

    def jit(function, **options):
        real = original(function, **options)
        return lambda state, batch: lowered.append(real.lower(state, batch))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jax, "jit", jit)
        step = make_train_step(parts.model, parts.optimizer, sft.sft_loss, parts.mesh)
    shape = (1, parts.train.rows, parts.model.config.context)
    kinds = {"tokens": "int32", "positions": "int32", "until": "int32", "sampled": "bool"}
    batch = TokenBatch(**{name: jax.numpy.zeros(shape, kinds.get(name, "float32")) for name in TokenBatch._fields})
    step(jax.eval_shape(lambda p: new_state(parts.optimizer, p), parts.param_shapes()), batch)
    return lowered[0]


def test_operations_and_bytes_are_the_compilers():
    """A wide model and short rows: matrix products are then nearly all there is. Keys: eight blocks see 9 / 16 of T."""
    parts = parts_of(width=256, mlp_width=512, context=128)
    step = lowered_step(parts)
    tokens = parts.train.rows * 128
    expected = tokens * flops_per_token(parts.model.config, 128 * 9 / 16)
    costs, memory = step.cost_analysis(), step.compile().memory_analysis()
    assert costs is not None and memory is not None
    assert costs["flops"] == pytest.approx(expected, rel=0.15)
    batch = tokens * (3 * 4 + 1 + 5 * 4)
    state, _ = state_bytes(parts)
    assert memory.argument_size_in_bytes == pytest.approx(state + batch, rel=0.01)


def test_a_mesh_divides_the_bytes():
    whole, _ = state_bytes(parts_of())
    for mesh in ((1, 8, 1), (1, 4, 2)):
        part, gradients = state_bytes(parts_of(mesh, heads=8, kv_heads=8, head_width=4))
        assert part < 0.3 * whole and gradients < part
    assert state_bytes(parts_of((8, 1, 1)))[0] == whole


def test_the_plan_is_json_and_consistent():
    figures = plan(parts_of())
    assert json.loads(json.dumps(figures)) == figures
    assert figures["tokens_per_step"] == 8 * 512 and figures["flops_per_step"] == figures["flops_per_token"] * 8 * 512


def test_a_dry_run_prints_the_plan_and_leaves_nothing(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ended = command(sft, f"--config={apr.__file__}:smoke", "--dry_run", f"--workdir={tmp_path / 'run'}")
    assert ended.status == 0 and json.loads(ended.out)["parameters"] == 38176
    assert list(tmp_path.iterdir()) == []

"""How many device functions rollouts compile: few on an accelerator, where compiling is dear."""

import jax
import numpy as np
import pytest

from benchmarks.decode import SEED, Replay, demonstrations
from benchmarks.sections import compilations
from configs import apr, common
from decoding import REFILL_ONE_IN, Cache
from harness.build import Parts, build
from parallel_runtime import Runtime
from records import Rollout
from sampler import Sampler, make_buckets
from train_state import init_params

MOST = 12  # functions of an evaluation, of which two fill the cache with zeros and cast the parameters


def tiny(preset: str, **changes: int) -> Parts:
    """The smallest model in which a preset's rows, context and buckets are as they are."""
    config = apr.get_config(preset)
    small = {"width": 16, "layers": 1, "heads": 1, "kv_heads": 1, "head_width": 4, "mlp_width": 4}
    config.update_from_flattened_dict(
        {"mesh.data": 1, **{f"model.{name}": value for name, value in small.items()}, **changes}
    )
    return build(config)


@pytest.mark.parametrize("preset", common.LARGE)
def test_there_are_few_functions_to_compile(preset):
    """Whatever the rollouts are like: the product of the sizes bounds their number."""
    config = tiny(preset).sampler
    sizes = make_buckets(config, config.rows, common.PRESETS[preset]["model"]["context"])
    prefill = len(sizes.prefill_rows) * len(sizes.prefill_lengths) * len(sizes.prefill_slots)
    assert len(sizes.rows) * len(sizes.slots) + prefill <= MOST - 2
    assert (sizes.rows[-1], sizes.slots[-1]) == (config.rows, common.PRESETS[preset]["model"]["context"])


def test_sizes_by_hand():
    gpu = make_buckets(tiny("gpu").sampler, 512, 2048)
    assert gpu == ((16, 128, 512), (1024, 2048), (16, 64), (128,), (0, 2048))
    laptop = make_buckets(tiny("laptop").sampler, 8, 128)
    assert laptop == ((1, 4, 8), (64, 128), (1, 4, 16), (32, 128), (0, 128))


class Counted(Sampler):
    """A sampler without a device: rows draw up to their limit, as long as a burst lasts; it notes the shapes of calls."""

    def _empty(self) -> Cache:
        return Cache((), ())

    def _run_prefill(self, rows: np.ndarray, ids: np.ndarray, slots: int) -> None:
        self.__dict__.setdefault("seen", set()).add((rows.shape, ids.shape, slots))

    def _run_decode(self, rows: np.ndarray, slots: int) -> tuple:
        self.__dict__.setdefault("seen", set()).add((rows.shape, slots))
        limits = np.sort(rows[rows[:, 4] > 0, 4])
        enough = limits[-(-len(limits) // REFILL_ONE_IN) - 1]  # a burst ends when a quarter of its rows are done
        drawn = np.zeros((len(rows), self.config.steps_per_call), np.int32)
        return np.minimum(rows[:, 4], min(enough, self.config.steps_per_call)), drawn, drawn.astype(np.float32)


def run(parts: Parts, sampler: Sampler, rollouts: list[Rollout]) -> None:
    """Rollouts in which every call stops where a demonstration did."""
    replaying = Replay(sampler, rollouts)
    Runtime(replaying, parts.domain.task, parts.limits).run(replaying.requests, SEED)


def test_an_evaluation_of_500_problems_at_gpu_compiles_few_functions():
    """With the lengths of demonstrations. Each shape of a call is a function."""
    parts = tiny("gpu")
    sampler = Counted(parts.model, {}, parts.sampler, (), parts.sampler_mesh())
    run(parts, sampler, demonstrations(parts, 500))
    assert 4 <= len(sampler.__dict__["seen"]) <= MOST - 2


@pytest.mark.slow
def test_each_shape_is_one_compilation():
    """The same count where functions are compiled: those of the shapes, zeros, and the cast of the parameters."""
    parts = tiny("gpu", **{"model.context": 1024, "sampler.rows": 32, "sampler.length_bucket": 512})
    few = demonstrations(parts, 4)
    counted = Counted(parts.model, {}, parts.sampler, (), parts.sampler_mesh())
    run(parts, counted, few)
    params = init_params(parts.model, jax.random.key(0))
    with compilations() as seconds:
        run(parts, Sampler(parts.model, params, parts.sampler, (), parts.sampler_mesh()), few)
    assert len(seconds) == len(counted.__dict__["seen"]) + 2

"""The train step, against one call at a time without packing, AdamW in NumPy, and numbers worked out by hand.

Most tests take plain gradient descent of rate 1, so that the change of the
parameters *is* the gradient, and a loss that uses every per-token field. All of
this is time for compiling, so shapes are few and the compiler is told to hurry.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import random
import typing
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import Array

from model import Decoder, ModelConfig, param_spec
from packing import Segment, TokenBatch, lay_out, places, segments, splice, to_microbatches
from records import Call, Thread, longest_context
from tests.packing_test import random_thread
from train_state import (
    OptimizerConfig,
    TokenStats,
    TrainState,
    init_params,
    make_mesh,
    make_optimizer,
    make_score,
    make_train_step,
    new_state,
    state_from_key,
    token_stats,
)

MODEL = Decoder(ModelConfig(64, 32, 1, 4, 2, 8, 64, context=64, rope_theta=1e4, tied=False, dtype="float32"))
CONFIG = OptimizerConfig(
    matrices="adam",
    learning_rate=0.1,
    end_learning_rate=0.01,
    warmup_steps=2,
    steps=6,
    weight_decay=0.0,
    clip=1.0,
    beta1=0.9,
    beta2=0.99,
    momentum=0.9,
)
ROWS, LENGTH = 8, 64  # of a micro-batch
LONGEST = 20  # no call of the threads trained on here has more ids
Tree = typing.Any


@pytest.fixture(autouse=True, scope="module")
def hurry() -> Iterator[None]:
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def distance_loss(out: TokenStats, batch: TokenBatch) -> tuple[Array, dict[str, Array]]:
    """Not a useful loss, but one that any misplaced weight, advantage or old log-prob changes."""
    off = out.logp - batch.old_logp
    return batch.weight * (batch.advantage * out.logp + 0.1 * off * off), {"off": batch.weight * off}


def sft_loss(out: TokenStats, batch: TokenBatch) -> tuple[Array, dict[str, Array]]:
    return -batch.weight * out.logp, {}


def weight_of(id_: int) -> float:
    return (1 + id_ % 5) / 200


@functools.cache
def threads() -> list[Thread]:
    random_ = random.Random(0)
    found = (random_thread(random_) for _ in range(60))
    return [thread for thread in found if longest_context(thread) <= LONGEST][:20]


def advantage_of(thread: Thread) -> float:
    return next(number for number, other in enumerate(threads()) if other is thread) % 3 - 1.0


def pack(pieces: Sequence[Segment], rows: int = ROWS) -> list[TokenBatch]:
    """Batches of the pieces in the order given, weighted token by token."""
    waiting, batches = list(pieces), []
    while waiting:
        taken = first_fit(waiting, rows)
        batch = lay_out(taken, LENGTH)
        for row, span, segment in places(taken):
            batch.weight[row, span] *= [weight_of(id_) for id_ in segment.tokens]
            batch.advantage[row, span] = advantage_of(segment.thread)
        batches.append(batch)
    return batches


def stack(batches: list[TokenBatch], least: int = 1) -> TokenBatch:
    """Batches [R, T] as micro-batches [M, R, T], at least so many; the rest are empty."""
    empty = TokenBatch(*(np.zeros_like(field) for field in batches[0]))
    fields = zip(*batches, *[empty] * (least - len(batches)), strict=True)
    return TokenBatch(*map(np.stack, fields))


def first_fit(waiting: list[Segment], rows: int, length: int = LENGTH) -> list[list[Segment]]:
    """Takes the pieces that find room, in the order given, each in the first row that has it."""
    taken: list[list[Segment]] = [[] for _ in range(rows)]
    for piece in list(waiting):
        row = next((row for row in taken if sum(map(len, row)) + len(piece) <= length), None)
        if row is not None:
            row.append(piece)
            waiting.pop(next(i for i, other in enumerate(waiting) if other is piece))
    return taken


def whole(length: int = LENGTH) -> list[Segment]:
    return [piece for thread in threads() for piece in segments(thread, length)]


def halves() -> list[TokenBatch]:
    """Two micro-batches, half of the threads in each."""
    return [*pack(whole()[::2]), *pack(whole()[1::2])]


@functools.cache
def initial() -> Tree:
    return jax.device_get(jax.jit(init_params, static_argnums=0)(MODEL, jax.random.key(0)))


def model_outputs(batch: TokenBatch) -> TokenStats:
    return _outputs(MODEL, initial(), batch)


_outputs = jax.jit(token_stats, static_argnums=0)


@functools.cache
def descent(data: int = 1, fsdp: int = 1, tensor: int = 1, loss: typing.Any = distance_loss) -> typing.Any:
    return make_train_step(MODEL, optax.sgd(1.0), loss, make_mesh(data, fsdp, tensor))


def gradient(batch: TokenBatch, *mesh: int, loss: typing.Any = distance_loss) -> tuple[Tree, dict[str, float]]:
    """Gradient and metrics of one step."""
    state, metrics, _ = descent(*mesh, loss=loss)(new_state(optax.sgd(1.0), initial()), batch)
    return jax.tree.map(lambda old, new: old - np.asarray(new), initial(), state.params), jax.device_get(metrics)


def assert_close(a: Tree, b: Tree, tolerance: float = 2e-6) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=tolerance), a, b)


@functools.cache
def unpacked() -> tuple[float, Tree]:
    """Loss and gradient with every call in a row of its own, context first; nothing of `packing` is used."""
    calls = [(thread, number) for thread in threads() for number, call in enumerate(thread.calls) if call.sampled]
    tokens, old = np.zeros((len(calls), LONGEST), np.int32), np.zeros((len(calls), LONGEST), np.float32)
    weight, advantage = np.zeros_like(old), np.zeros_like(old)
    for row, (thread, number) in enumerate(calls):
        call = thread.calls[number]
        ids = Thread((), thread.calls[: number + 1]).ids()
        sampled = slice(len(ids) - len(call.sampled), len(ids))
        tokens[row, : len(ids)] = ids
        old[row, sampled] = call.logprobs
        weight[row, sampled] = [weight_of(id_) for id_ in call.sampled]
        advantage[row, sampled] = advantage_of(thread)
    positions = np.broadcast_to(np.arange(LONGEST, dtype=np.int32), tokens.shape)

    def loss(params: Tree) -> Array:
        logits, _ = MODEL.apply({"params": params}, tokens, positions, np.full_like(tokens, LONGEST))
        logp = jax.nn.log_softmax(logits)[np.arange(len(calls))[:, None], positions[:, 1:] - 1, tokens[:, 1:]]
        off = logp - old[:, 1:]
        return jnp.sum(weight[:, 1:] * (advantage[:, 1:] * logp + 0.1 * off * off))

    value, gradient_ = jax.jit(jax.value_and_grad(loss))(initial())
    return float(value), jax.device_get(gradient_)


# ------------------------------------------------------------------- what must not matter


def shuffled(pieces: list[Segment]) -> list[Segment]:
    return random.Random(1).sample(pieces, len(pieces))


CASES = {
    "one micro-batch": lambda: (stack(pack(whole())), ()),
    "another order": lambda: (stack(pack(shuffled(whole()))), ()),
    "two micro-batches, more padding": lambda: (stack(halves()), ()),
    "an empty micro-batch": lambda: (stack(pack(whole()), least=2), ()),
    "one row per micro-batch": lambda: (to_microbatches(pack(whole())[0], 1), ()),
    "a call at a time": lambda: (stack(pack(whole(LONGEST)), least=2), ()),
    "8 devices": lambda: (stack(pack(whole())), (8, 1, 1)),
    "rows, parameters and heads in parts": lambda: (stack(halves()), (2, 2, 2)),
}


@pytest.mark.parametrize("case", CASES)
def test_the_step_is_that_of_one_call_at_a_time_whatever_the_packing_and_the_mesh(case: str) -> None:
    batch, mesh = CASES[case]()
    (loss, expected), (found, metrics) = unpacked(), gradient(batch, *mesh)
    assert metrics["loss"] == pytest.approx(loss, rel=1e-5)
    assert_close(found, expected)
    assert metrics["grad_norm"] == pytest.approx(float(optax.tree.norm(expected)), rel=1e-5)
    assert metrics["tokens"] == sum(len(call.sampled) for thread in threads() for call in thread.calls)


def test_the_cases_are_what_they_are_called() -> None:
    batches = {name: case()[0] for name, case in CASES.items()}
    assert {name: batch.tokens.shape[0] for name, batch in batches.items()} == {
        "one micro-batch": 1,
        "another order": 1,
        "two micro-batches, more padding": 2,
        "an empty micro-batch": 2,
        "one row per micro-batch": 8,
        "a call at a time": 2,
        "8 devices": 1,
        "rows, parameters and heads in parts": 2,
    }
    assert (batches["one micro-batch"].tokens != batches["another order"].tokens).any()
    assert len(whole(LONGEST)) > len(whole()) == len(threads())


def test_a_micro_batch_of_context_alone_does_not_hide_those_after_it() -> None:
    (batch,) = pack(whole())
    context = batch._replace(sampled=np.zeros_like(batch.sampled), weight=np.zeros_like(batch.weight))
    expected, _ = gradient(stack(pack(whole())))
    found, _ = gradient(stack([context, *pack(whole())]))
    assert_close(found, expected)


def test_a_batch_without_sampled_ids_changes_nothing() -> None:
    empty = lay_out([[]] * ROWS, LENGTH)
    for batch in (stack([empty]), stack([empty], least=2)):
        found, metrics = gradient(batch)
        assert not any(leaf.any() for leaf in jax.tree.leaves(found))
        assert all(value == 0 for value in metrics.values())


def test_split_is_the_same_rows_in_micro_batches() -> None:
    (batch,) = pack(whole())
    for name, field in to_microbatches(batch, 2)._asdict().items():
        assert field.shape == (ROWS // 2, 2, LENGTH)
        np.testing.assert_array_equal(np.concatenate(list(field)), getattr(batch, name))


# ------------------------------------------------------------------- what is trained


class Table:
    """A "model" whose parameters are its logits."""

    def apply(self, variables: dict[str, Array], *_: Array) -> tuple[Array, None]:
        return variables["params"], None


def example() -> TokenBatch:
    """prompt 1 2, sampled 3 4, joined 5 5, sampled 6 with 4 rewound; then a segment of prompt 7 and sampled 8 9."""
    joined, other = [Call(0, [1, 2], [3, 4]), Call(3, [5, 5], [6])], [Call(0, [7], [8, 9])]
    return lay_out([[splice(Thread((), joined)), splice(Thread((), other))]], 12)


def test_outputs_are_those_of_the_logits_before_the_token() -> None:
    batch = example()
    logits = np.random.default_rng(0).normal(size=(1, 12, 10)).astype(np.float32)
    logits[0, 1, 3], logits[0, 2, 4] = 9, -9  # id 3, in column 2, is likely; id 4, in column 3, is not
    out = jax.device_get(_outputs(Table(), logits, batch))
    probs = np.exp(logits[0].astype(np.float64))
    probs /= probs.sum(axis=-1, keepdims=True)
    for column in range(1, 12):
        before = probs[column - 1]
        assert out.logp[0, column] == pytest.approx(math.log(before[batch.tokens[0, column]]), abs=1e-5)
        assert out.entropy[0, column] == pytest.approx(-(before * np.log(before)).sum(), abs=1e-5)
        assert out.is_argmax[0, column] == (before.argmax() == batch.tokens[0, column])
    assert (out.is_argmax[0, 2], out.is_argmax[0, 3]) == (True, False)
    assert (out.logp[0, 0], out.entropy[0, 0], out.is_argmax[0, 0]) == (0, 0, False)


def test_a_model_that_likes_all_ids_alike_is_not_right() -> None:
    """The most likely of equal ids is the first, which is no id that is ever sampled."""
    batch = example()
    assert not _outputs(Table(), jnp.full((1, 12, 10), -3.0), batch).is_argmax[batch.sampled].any()


def test_only_sampled_ids_have_a_gradient() -> None:
    batch = example()

    def loss(logits: Array) -> Array:
        return sft_loss(_outputs(Table(), logits, batch), batch)[0].sum()

    found = jax.jit(jax.grad(loss))(jax.random.normal(jax.random.key(0), (1, 12, 10)))
    trained = np.abs(np.asarray(found))[0].sum(axis=-1) > 0
    assert batch.tokens[0, 1:][trained[:-1]].tolist() == [3, 4, 6, 8, 9]  # column i is what predicts column i + 1
    assert not trained[-1] and trained.sum() == 5


def test_injected_ids_are_context_and_never_targets() -> None:
    def loss(*threads_: Thread) -> float:
        waiting = [splice(thread) for thread in threads_]
        batch = lay_out(first_fit(waiting, ROWS), LENGTH)
        assert not waiting
        return float(sft_loss(model_outputs(batch), batch)[0].sum())

    def joined(sampled: list[int], join: list[int], rest: list[int]) -> Thread:
        return Thread((), [Call(0, [1, 2], [3, *sampled]), Call(3, join, rest)])

    whole_thread, other = loss(joined([4], [5, 6], [7])), Thread((), [Call(0, [8], [9])])
    assert loss(joined([4], [5, 9], [7])) != pytest.approx(whole_thread, rel=1e-5)  # a joined id changes what follows,
    assert loss(joined([4], [5, 6], [])) == loss(joined([4], [5, 9], []))  # but is nothing to be learned itself
    assert loss(joined([4], [5, 6], [7]), other) == pytest.approx(whole_thread + loss(other), rel=1e-6)
    without_spawn = loss(joined([], [5, 6], [7]))
    spawn_alone = loss(joined([4], [], [])) - loss(joined([], [], []))
    assert whole_thread == pytest.approx(without_spawn + spawn_alone, rel=1e-6)  # the spawn block is trained, not seen


def test_metrics_are_sums_and_means_over_sampled_ids() -> None:
    micro = CASES["one row per micro-batch"]()[0]
    batch = TokenBatch(*(field[:, 0] for field in micro))  # the same as one micro-batch
    _, metrics = gradient(micro)
    out, count = jax.device_get(model_outputs(batch)), batch.sampled.sum()
    assert set(metrics) == {"loss", "tokens", "token_accuracy", "entropy", "off", "grad_norm"}
    assert metrics["tokens"] == count
    assert metrics["token_accuracy"] == pytest.approx(out.is_argmax[batch.sampled].mean())
    assert metrics["entropy"] == pytest.approx(out.entropy[batch.sampled].mean(), rel=1e-5)
    assert metrics["off"] == pytest.approx((batch.weight * (out.logp - batch.old_logp)).sum(), rel=1e-4)


def test_scores_are_the_log_probs_of_every_token() -> None:
    batches = halves()
    scores = make_score(MODEL, make_mesh(2, 2, 2))(initial(), stack(batches, least=4))
    for score, batch in zip(scores, batches, strict=False):
        np.testing.assert_allclose(score, model_outputs(batch).logp, rtol=1e-5, atol=1e-5)
    assert scores.shape == (4, ROWS, LENGTH) and not np.asarray(scores)[2:].any()


@pytest.mark.parametrize("batches", [1, 2])
def test_a_step_tells_the_log_probs_that_it_began_with(batches: int) -> None:
    batch = stack(halves()[:batches], least=4 if batches > 1 else 1)
    state = new_state(optax.sgd(1.0), initial())
    after, _, logp = descent(2, 2, 2)(state, batch)
    assert not np.allclose(after.params["embedding"], initial()["embedding"])
    np.testing.assert_allclose(logp, make_score(MODEL, make_mesh(1, 1, 1))(initial(), batch), rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------- optimizer


def run_optimizer(config: OptimizerConfig, params: Tree, gradients: Sequence[Tree]) -> list[Tree]:
    optimizer = make_optimizer(config)
    update, apply = jax.jit(optimizer.update), jax.jit(optax.apply_updates)
    state, seen = jax.jit(optimizer.init)(params), []
    for gradient_ in gradients:
        updates, state = update(gradient_, state, params)
        params = apply(params, updates)
        seen.append(params)
    return seen


def test_the_schedule_in_numbers() -> None:
    """A constant gradient makes every step of Adam as long as the learning rate."""
    seen = run_optimizer(CONFIG, jnp.zeros(()), [jnp.ones(())] * 7)
    lengths = -np.diff([0.0, *map(float, seen)])
    half, root = 0.09 / 2, math.sqrt(0.5)
    cosine = [0.01 + half * (1 + cos) for cos in (1, root, 0, -root, -1)]
    np.testing.assert_allclose(lengths, [0, 0.05, *cosine], atol=1e-6)
    assert lengths[2] == pytest.approx(0.1, rel=1e-5) and lengths[6] == pytest.approx(0.01, rel=1e-5)
    (first,) = run_optimizer(dataclasses.replace(CONFIG, warmup_steps=0), jnp.zeros(()), [jnp.ones(())])
    assert -float(first) == pytest.approx(0.1, rel=1e-5)


def test_the_gradient_is_clipped_by_its_global_norm() -> None:
    """(3, 4) over two leaves has norm 5 and becomes (0.6, 0.8); (0.3, 0.4) stays. By hand, Adam then steps by
    0.05 (0.9 * 0.1 * 0.6 + 0.1 * 0.3) / 0.19 / sqrt((0.99 * 0.01 * 0.36 + 0.01 * 0.09) / 0.0199) in its first part."""
    params = {"a": jnp.zeros(()), "b": jnp.zeros(())}
    gradients = [{"a": jnp.float32(3), "b": jnp.float32(4)}, {"a": jnp.float32(0.3), "b": jnp.float32(0.4)}]
    _, second = run_optimizer(CONFIG, params, gradients)  # the first step has a learning rate of 0
    by_hand = 0.05 * (0.9 * 0.1 * 0.6 + 0.1 * 0.3) / 0.19 / math.sqrt((0.99 * 0.01 * 0.36 + 0.01 * 0.09) / 0.0199)
    assert -float(second["a"]) == pytest.approx(by_hand, rel=1e-5)
    assert float(second["b"]) == pytest.approx(float(second["a"]), rel=1e-5)


def test_weight_decay_shrinks_matrices_only() -> None:
    config = dataclasses.replace(CONFIG, weight_decay=0.1)
    params = {"matrix": jnp.full((1, 2), 2.0), "scale": jnp.full(2, 2.0), "fused": jnp.full((1, 2, 1), 2.0)}
    _, second = run_optimizer(config, params, [jax.tree.map(jnp.zeros_like, params)] * 2)
    np.testing.assert_allclose(second["matrix"], 2 - 0.05 * 0.1 * 2, rtol=1e-6)
    np.testing.assert_allclose(second["fused"], 2 - 0.05 * 0.1 * 2, rtol=1e-6)
    np.testing.assert_array_equal(second["scale"], 2)


def test_six_steps_of_adamw_against_numpy() -> None:
    config = dataclasses.replace(CONFIG, weight_decay=0.03, clip=2.5)
    random_ = np.random.default_rng(0)
    params = {"matrix": random_.normal(size=(3, 4)), "scale": random_.normal(size=4)}
    gradients = [{name: random_.normal(size=leaf.shape) for name, leaf in params.items()} for _ in range(6)]
    expected, first, second = dict(params), dict.fromkeys(params, 0.0), dict.fromkeys(params, 0.0)
    rates = [0, 0.05] + [0.01 + 0.045 * (1 + math.cos(math.pi * step / 4)) for step in range(4)]
    found = run_optimizer(config, jax.tree.map(jnp.float32, params), jax.tree.map(jnp.float32, gradients))
    for step, (rate, gradient_) in enumerate(zip(rates, gradients, strict=True), start=1):
        norm = math.sqrt(sum(float((leaf**2).sum()) for leaf in gradient_.values()))
        assert norm > 2.5
        for name, leaf in gradient_.items():
            leaf = leaf * 2.5 / norm
            first[name], second[name] = 0.9 * first[name] + 0.1 * leaf, 0.99 * second[name] + 0.01 * leaf**2
            move = first[name] / (1 - 0.9**step) / (np.sqrt(second[name] / (1 - 0.99**step)) + 1e-8)
            decay = 0.03 * expected[name] if name == "matrix" else 0.0
            expected[name] = expected[name] - rate * (move + decay)
        assert_close(found[step - 1], expected, 1e-5)


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"steps": 0, "warmup_steps": 0}, "steps=0"),
        ({"warmup_steps": 6}, "warmup_steps=6"),
        ({"warmup_steps": -1}, "warmup_steps=-1"),
        ({"learning_rate": 0.0}, "learning_rate=0"),
        ({"clip": 0.0}, "clip=0"),
        ({"learning_rate": math.nan}, "learning_rate=nan"),
        ({"end_learning_rate": -0.1}, "end_learning_rate"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"beta1": 1.0}, "beta1"),
        ({"beta2": 1.0}, "beta2"),
    ],
)
def test_an_optimizer_that_cannot_train_is_refused(wrong: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(CONFIG, **wrong)  # type: ignore[arg-type]


# ------------------------------------------------------------------- state and mesh

ADAM = make_optimizer(dataclasses.replace(CONFIG, learning_rate=1e-2, end_learning_rate=1e-3, warmup_steps=1, steps=60))


@functools.cache
def adam_step() -> typing.Any:
    return make_train_step(MODEL, ADAM, sft_loss, make_mesh(1, 1, 1))


def fixed_batch() -> TokenBatch:
    batch = lay_out(first_fit([splice(thread) for thread in threads()], 4, 32), 32)
    assert batch.sampled.sum() > 40
    return stack([batch._replace(weight=batch.weight / batch.sampled.sum())])


def test_a_fixed_batch_is_learned_by_heart() -> None:
    state, losses = state_from_key(MODEL, ADAM, make_mesh(1, 1, 1), jax.random.key(1)), []
    for _ in range(60):
        state, metrics, _ = adam_step()(state, fixed_batch())
        losses.append(float(metrics["loss"]))
    assert losses[0] == pytest.approx(math.log(64), rel=0.15)  # at first every id is about as likely
    assert losses[-1] < 0.05 and metrics["token_accuracy"] == 1.0
    assert int(state.step) == 60


def test_two_runs_are_one_run_of_twice_the_length_bit_for_bit() -> None:
    mesh, batch = make_mesh(1, 1, 1), fixed_batch()
    batches = [batch._replace(weight=batch.weight * part) for part in range(1, 7)]

    def run(state: TrainState, part: Sequence[TokenBatch]) -> TrainState:
        for batch in part:
            state, *_ = adam_step()(state, batch)
        return jax.device_get(state)

    once = run(state_from_key(MODEL, ADAM, mesh, jax.random.key(2)), batches)
    half = run(state_from_key(MODEL, ADAM, mesh, jax.random.key(2)), batches[:3])
    twice = run(half, batches[3:])
    assert (half.step, twice.step, once.step) == (3, 6, 6)
    jax.tree.map(np.testing.assert_array_equal, twice, once)


MUON = make_optimizer(dataclasses.replace(CONFIG, matrices="muon"))


@pytest.mark.parametrize("optimizer", [ADAM, MUON])
def test_a_fresh_state_is_the_same_on_every_mesh_and_lives_in_parts(optimizer: optax.GradientTransformation) -> None:
    alone = state_from_key(MODEL, optimizer, make_mesh(1, 1, 1), jax.random.key(3))
    spread = state_from_key(MODEL, optimizer, make_mesh(2, 2, 2), jax.random.key(3))
    assert_close(jax.device_get(alone), jax.device_get(spread), 1e-7)
    stepped, *_ = descent(2, 2, 2)(
        new_state(optax.sgd(1.0), initial()), CASES["rows, parameters and heads in parts"]()[0]
    )

    def check(path: tuple, leaf: Array) -> None:
        named = [*param_spec(path), *[None] * 4]
        expected = tuple(size // (2 if axis else 1) for size, axis in zip(leaf.shape, named, strict=False))
        assert {shard.data.shape for shard in leaf.addressable_shards} == {expected}

    trees = jax.block_until_ready((spread, stepped.params))
    jax.tree.map_with_path(check, trees)
    leaves = jax.tree.leaves(trees)
    assert len(leaves) > 2 * len(jax.tree.leaves(spread.params))
    parts = [leaf.addressable_shards[0].data.size for leaf in leaves]
    assert sum(parts) < 0.4 * sum(leaf.size for leaf in leaves)  # in two parts at least, mostly in four
    assert int(stepped.step) == 1


def test_muon_moves_matrices_along_the_nearest_orthogonal_ones_and_the_rest_by_adam() -> None:
    """From zero momentum the direction is that of the gradient U S V: about U V, whatever S; its size is told."""
    rng = np.random.default_rng(0)
    inputs = {"query": 1, "key": 1, "value": 1, "out": 2, "gate": 1, "up": 1, "down": 1}

    def gradient_of(path: tuple, leaf: Array) -> np.ndarray:
        rows = int(np.prod(leaf.shape[: inputs.get(path[-1].key, 1)]))
        u, s, v = np.linalg.svd(rng.normal(size=leaf.shape).reshape(rows, -1), full_matrices=False)
        return ((u * np.linspace(0.1, 1, len(s))) @ v).reshape(leaf.shape).astype(np.float32)

    grads = jax.tree.map_with_path(gradient_of, initial())
    tame = dataclasses.replace(CONFIG, matrices="muon", warmup_steps=0, clip=1e9, embedding_multiplier=4.0)
    optimizer = make_optimizer(tame)
    updates, _ = optimizer.update(grads, optimizer.init(initial()), initial())
    adam = make_optimizer(dataclasses.replace(tame, matrices="adam"))
    others, _ = adam.update(grads, adam.init(initial()), initial())

    def check(path: tuple, update: Array, grad: Array, other: Array) -> None:
        name = path[-1].key
        if name not in inputs:
            np.testing.assert_allclose(update, 4 * other, rtol=1e-6)
            return
        rows = int(np.prod(grad.shape[: inputs[name]]))
        u, _, v = np.linalg.svd(grad.reshape(rows, -1), full_matrices=False)
        within = u.T @ np.asarray(update).reshape(rows, -1) @ v.T / (-0.1 * 0.2 * max(rows, grad.size // rows) ** 0.5)
        assert (np.diag(within) > 0.6).all() and (np.diag(within) < 1.3).all(), name
        np.testing.assert_allclose(within - np.diag(np.diag(within)), 0, atol=2e-3)

    jax.tree.map_with_path(check, updates, grads, others)


def test_muons_momentum_and_decay() -> None:
    """Two steps with nesterov: the direction of g2 + m (g2 + m g1); decay shrinks matrices alone."""
    config = dataclasses.replace(CONFIG, matrices="muon", warmup_steps=0, clip=1e9, weight_decay=0.5, end_learning_rate=0.1)
    params = {"mlp": {"gate": jnp.eye(3)}, "embedding": jnp.ones((3, 3))}
    optimizer = make_optimizer(config)
    still = jax.tree.map(jnp.zeros_like, params)
    first = {"mlp": {"gate": jnp.diag(jnp.asarray([1.0, 1.0, 0.0]))}, "embedding": still["embedding"]}
    second = {"mlp": {"gate": jnp.diag(jnp.asarray([-1.0, 0.0, 1.0]))}, "embedding": still["embedding"]}
    state = optimizer.init(params)
    updates, state = optimizer.update(first, state, params)
    assert updates["mlp"]["gate"][2, 2] == pytest.approx(-0.1 * 0.5)  # decay alone
    assert not updates["embedding"].any()
    updates, state = optimizer.update(second, state, params)
    # trace after it: 0.9 (1, 1, 0) + (-1, 0, 1) = (-0.1, 0.9, 1); direction: second + 0.9 trace = (-1.09, 0.81, 1.9)
    moved = jnp.diag(updates["mlp"]["gate"]) + 0.1 * 0.5
    assert (jnp.sign(moved) == jnp.asarray([1.0, -1.0, -1.0])).all()
    assert (jnp.abs(moved) > 0.1 * 0.2 * 3**0.5 * 0.6).all()


def test_start_state_takes_the_parameters_and_nothing_else() -> None:
    state = new_state(ADAM, initial())
    assert int(state.step) == 0 and state.params is initial()
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(state.opt_state))


def test_a_mesh_takes_the_devices_it_is_told_to() -> None:
    assert dict(make_mesh(2, 2, 2).shape) == {"data": 2, "fsdp": 2, "tensor": 2}
    assert dict(make_mesh(-1, 2, 1).shape) == {"data": 4, "fsdp": 2, "tensor": 1}
    assert make_mesh(-1, 1, 1).size == 8 and make_mesh(1, 1, 1).size == 1
    devices = make_mesh(2, 1, 2).devices.ravel()
    assert len({device.id for device in devices}) == 4


@pytest.mark.parametrize(
    "shape", [(16, 1, 1), (4, 4, 1), (0, 1, 1), (-2, 1, 1), (-1, 16, 1), (-1, 3, 1), (1, 0, 1), (-1, 0, 1), (1, -1, -1)]
)
def test_a_mesh_that_does_not_fit_is_refused(shape: tuple[int, int, int]) -> None:
    with pytest.raises(ValueError, match=r"mesh of .* does not fit 8 devices"):
        make_mesh(*shape)

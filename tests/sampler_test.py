"""The sampler against a slow oracle: a plain forward over the whole thread for every id, no cache, one thread at a time."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

import decoding
from decoding import SamplerConfig
from model import Decoder, ModelConfig, token_logprobs
from protocols import Completion, PrefillRequest
from sampler import Sampler

CONTEXT, VOCAB, STOP = 144, 11, 1
MODEL = Decoder(
    ModelConfig(
        vocab_size=VOCAB,
        width=16,
        layers=2,
        heads=2,
        kv_heads=1,
        head_width=8,
        mlp_width=24,
        context=CONTEXT,
        rope_theta=1e4,
        tied=True,
        dtype="float32",
    )
)
GREEDY = SamplerConfig(rows=4, steps_per_call=8, length_bucket=72, max_gathered_slots=288, temperature=0.0, top_k=0, top_p=1.0)
DRAWN = SamplerConfig(rows=4, steps_per_call=16, length_bucket=144, max_gathered_slots=576, temperature=1.0, top_k=0, top_p=1.0)
NEAR_TIE = 1e-4
NEVER = [VOCAB]  # no id stops; on several devices an empty list makes the compiler of jax 0.11.2 crash


@functools.cache
def params(seed: int = 0):
    one = jnp.ones((1, 1), jnp.int32)
    drawn = MODEL.init(jax.random.key(seed), one, one, one + 1)["params"]
    return jax.tree.map(lambda leaf: 3 * leaf if leaf.ndim > 1 else leaf, drawn)  # far from uniform


@functools.cache
def forward():
    return jax.jit(MODEL.apply)


def log_softmax(ids: list[int], seed: int = 0) -> np.ndarray:
    """Log-probs [len(ids), V] of the id after each one, by one plain forward over the padded thread."""
    tokens = np.zeros((1, CONTEXT), np.int32)
    tokens[0, : len(ids)] = ids
    until = np.full_like(tokens, CONTEXT)
    logits, _ = forward()({"params": params(seed)}, tokens, np.arange(CONTEXT)[None], until)
    logits = np.asarray(logits[0, : len(ids)], np.float64)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def run(engine: Sampler, fills: list[PrefillRequest]) -> dict[int, Completion]:
    """All fills, keyed by the first word of their keys, in whatever rows are free; `PrefillRequest.row` is overwritten."""
    queue, held, result = list(fills), {}, {}
    while queue or held:
        free = [row for row in range(engine.rows) if row not in held]
        new = [dataclasses.replace(fill, row=row) for row, fill in zip(free, queue, strict=False)]
        queue = queue[len(new) :]
        held.update({fill.row: fill.key[0] for fill in new})
        engine.prefill(new)
        for stopped in engine.decode():
            result[held.pop(stopped.row)] = stopped
    return result


def threads(limit: int) -> list[PrefillRequest]:
    """Threads with prompts of one id, of several chunks, and in between; every other one may draw half as much."""
    random = np.random.default_rng(3)
    return [
        PrefillRequest(0, 0, random.integers(2, VOCAB, length).tolist(), (n, 2**32 - 1 - n), 0, limit // (1 + n % 2))
        for n, length in enumerate((1, 2, 33, 7, 131, 40, 5))
    ]


def check_logprobs(fill: PrefillRequest, stopped: Completion) -> None:
    """The ids' log-probs are those of a training forward."""
    expected = log_softmax(fill.ids + stopped.ids)[len(fill.ids) - 1 : -1]
    np.testing.assert_allclose(
        stopped.logprobs, np.take_along_axis(expected, np.asarray(stopped.ids)[:, None], 1)[:, 0], atol=1e-4
    )


def margin(fill: PrefillRequest, ids: list[int], others: list[int]) -> float:
    """How far the first draw that differs is from the border between two ids, as a share of the distribution."""
    first = next(n for n, (one, other) in enumerate(zip(ids, others, strict=False)) if one != other)
    cumulative = np.exp(log_softmax(fill.ids + ids[:first])[-1]).cumsum()
    u = float(decoding._uniform(jnp.asarray(fill.key, jnp.uint32), jnp.int32(first)))
    return np.abs(cumulative - u).min()


def test_the_margin_of_a_draw_by_hand():
    fill = PrefillRequest(0, 0, [2, 3], (7, 0), 0, 4)
    u = float(decoding._uniform(jnp.asarray((7, 0), jnp.uint32), jnp.int32(0)))
    cumulative = np.exp(log_softmax([2, 3])[-1]).cumsum()
    drawn = int((cumulative > u).argmax())
    assert margin(fill, [drawn], [drawn + 1]) == pytest.approx(min(cumulative[drawn] - u, u - cumulative[drawn - 1]))


def test_greedy_equals_the_oracle():
    fills = threads(limit=30)
    result = run(Sampler(MODEL, params(), GREEDY, [STOP]), fills)
    for fill in fills:
        stopped = result[fill.key[0]]
        ids = list(fill.ids)
        for drawn in stopped.ids:
            logp = log_softmax(ids)[-1]
            assert logp.max() - logp[drawn] < NEAR_TIE
            ids.append(drawn)
        assert STOP not in stopped.ids[:-1]
        assert stopped.ids[-1] == STOP or len(stopped.ids) == fill.max_new_tokens or len(ids) == CONTEXT
        check_logprobs(fill, stopped)
    ends = [result[fill.key[0]].ids[-1] == STOP for fill in fills]
    assert any(ends) and not all(ends)


def test_rows_devices_neighbours_and_order_do_not_matter():
    fills, devices = threads(limit=24), np.asarray(jax.devices())
    expected = run(Sampler(MODEL, params(), DRAWN, NEVER), fills)
    eight, mixed = Mesh(devices, ("data",)), Mesh(devices[:4].reshape(2, 2, 1), ("data", "fsdp", "tensor"))
    others = [
        (Sampler(MODEL, params(), dataclasses.replace(DRAWN, rows=1, steps_per_call=5, length_bucket=72), NEVER), fills[::-1]),
        (Sampler(MODEL, params(), dataclasses.replace(DRAWN, rows=16), NEVER, eight), fills),
        (Sampler(MODEL, params(), dataclasses.replace(DRAWN, rows=7, length_bucket=24, max_gathered_slots=96), NEVER), fills),  # many groups
        (Sampler(MODEL, params(), dataclasses.replace(DRAWN, rows=4), NEVER, mixed), fills[4:] + fills[:4]),
    ]
    ties = 0
    for engine, order in others:
        for number, stopped in run(engine, order).items():
            if stopped.ids != expected[number].ids:
                assert margin(fills[number], stopped.ids, expected[number].ids) < NEAR_TIE
                ties += 1
                continue
            np.testing.assert_allclose(stopped.logprobs, expected[number].logprobs, atol=2e-5)  # rounding of other shapes: 1.2e-5 by jax 0.11.2
    assert ties <= 1  # of 28: a draw within rounding of the border between two ids
    for fill in fills:
        check_logprobs(fill, expected[fill.key[0]])
    assert len({tuple(stopped.ids) for stopped in expected.values()}) == len(fills)


@pytest.mark.parametrize("keep", [3, 12, 20])
def test_rewind_and_extend_equals_starting_over(keep):
    engine = Sampler(MODEL, params(), DRAWN, [])
    prompt, joined = [3, 5, 2, 7, 4, 4, 6, 8, 9, 2], [5, 6, 7]
    engine.prefill([PrefillRequest(1, 0, prompt, (4, 2), 0, 10), PrefillRequest(2, 0, prompt[::-1], (1, 2), 0, 10)])
    drawn = {stopped.row: stopped.ids for stopped in [*engine.decode(), *engine.decode()]}
    whole = prompt + drawn[1]
    fed = engine.counters["prefill_tokens"]
    engine.prefill([PrefillRequest(1, keep, joined, (4, 2), 10, 12)])
    # The join's last id is fed when there is something to draw after it; the row's very last one had not been fed.
    assert engine.counters["prefill_tokens"] - fed == len(joined) - 1 + (keep == len(whole))
    (extended,) = engine.decode()
    engine.prefill([PrefillRequest(0, 0, whole[:keep] + joined, (4, 2), 10, 12)])
    (afresh,) = engine.decode()
    assert extended.ids == afresh.ids
    np.testing.assert_allclose(extended.logprobs, afresh.logprobs, atol=1e-5)
    # The neighbour, idle all the while, still has what it had.
    engine.prefill([PrefillRequest(2, 20, [2], (4, 2), 0, 3), PrefillRequest(3, 0, [*prompt[::-1], *drawn[2], 2], (4, 2), 0, 3)])
    kept, refed = [*engine.decode(), *engine.decode()][:2]
    assert kept.ids == refed.ids
    np.testing.assert_allclose(kept.logprobs, refed.logprobs, atol=1e-5)


def test_draws_depend_on_the_count_and_not_on_the_call():
    engine = Sampler(MODEL, params(), DRAWN, [])
    engine.prefill([PrefillRequest(0, 0, [3, 4], (8, 9), 0, 20)])
    (whole,) = engine.decode()
    engine.prefill([PrefillRequest(1, 0, [3, 4], (8, 9), 0, 7)])
    (first,) = engine.decode()
    engine.prefill([PrefillRequest(3, 0, [3, 4, *first.ids], (8, 9), 7, 13)])
    (second,) = engine.decode()
    assert first.ids + second.ids == whole.ids
    engine.prefill([PrefillRequest(1, 0, [3, 4], (8, 9), 1, 20)])
    (other,) = engine.decode()
    assert other.ids != whole.ids


def test_an_update_of_the_parameters_takes_effect_and_can_be_undone():
    model = Decoder(dataclasses.replace(MODEL.config, layers=1, context=40))
    one = jnp.ones((1, 1), jnp.int32)
    weights = [model.init(jax.random.key(seed), one, one, one + 1)["params"] for seed in range(2)]
    engine = Sampler(model, weights[0], SamplerConfig(4, 8, 40, 160, 1.0, 5, 0.9), [STOP])
    fills = [fill for fill in threads(limit=9) if len(fill.ids) < 40]
    before = run(engine, fills)
    engine.reset()
    engine.update(weights[1])
    after = run(engine, fills)
    assert before[2].logprobs != after[2].logprobs
    engine.update(weights[0])
    assert run(engine, fills) == {key: dataclasses.replace(s, row=s.row) for key, s in before.items()}


def test_counters_and_limits():
    engine = Sampler(MODEL, params(), DRAWN, [])
    assert engine.decode() == []
    result = run(engine, [PrefillRequest(0, 0, [3] * 5, (0, 0), 0, 6), PrefillRequest(0, 0, [4] * 141, (1, 0), 0, 50)])
    assert [len(result[number].ids) for number in range(2)] == [6, 3]  # the limit, the context
    assert engine.counters["decode_tokens"] == 9
    assert engine.counters["prefill_tokens"] == 4 + 140
    assert engine.counters["decode_steps"] == 6
    assert engine.counters["row_steps"] == 4 * 3 + 1 * 3  # both threads in a bucket of 4 rows, then one alone


def test_a_reset_restores_what_an_interrupted_call_took():
    """A call owns the history until it returns: interrupted, it takes it along."""
    engine = Sampler(MODEL, params(), GREEDY, [])
    fill = PrefillRequest(0, 0, [2, 3, 4], (0, 0), 0, 5)
    before = run(engine, [fill])
    for leaf in jax.tree.leaves(engine._history):
        leaf.delete()
    engine.reset()
    assert run(engine, [fill]) == before


FILL = PrefillRequest(0, 0, [2, 3], (0, 0), 0, 4)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(row=4), "no row 4"),
        (dict(row=-1), "no row -1"),
        (dict(keep=1), "cannot keep 1"),
        (dict(keep=-1), "cannot keep -1"),
        (dict(ids=[]), "needs ids"),
        (dict(max_new_tokens=0), "limit of at least 1"),
        (dict(ids=[2] * CONTEXT), "no room"),
        (dict(row=1), "has not stopped"),
    ],
)
def test_impossible_fills_are_refused(change, message):
    engine = Sampler(MODEL, params(), DRAWN, [])
    engine.prefill([PrefillRequest(1, 0, [2], (0, 0), 0, 4)])
    with pytest.raises(ValueError, match=message):
        engine.prefill([dataclasses.replace(FILL, **change)])


@pytest.mark.parametrize(
    "change", [dict(rows=0), dict(steps_per_call=0), dict(length_bucket=0), dict(temperature=-1.0), dict(top_k=-1), dict(top_p=0.0)]
)
def test_impossible_configs_are_refused(change):
    with pytest.raises(ValueError, match=next(iter(change))):
        dataclasses.replace(GREEDY, **change)


def test_rows_must_divide_over_devices_and_top_k_fit_the_vocabulary():
    with pytest.raises(ValueError, match="multiple of the 8 devices"):
        Sampler(MODEL, params(), GREEDY, [], Mesh(np.asarray(jax.devices()), ("data",)))
    with pytest.raises(ValueError, match="top_k=12 exceeds"):
        Sampler(MODEL, params(), dataclasses.replace(GREEDY, top_k=VOCAB + 1), [])


# ------------------------------------------------------------------- the draw

P = np.asarray([0.05, 0.4, 0.2, 0.1, 0.1, 0.15])


def settings(temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> SamplerConfig:
    return dataclasses.replace(GREEDY, temperature=temperature, top_k=top_k, top_p=top_p)


@pytest.mark.parametrize(
    "config, expected",
    [
        (settings(), P),
        (settings(temperature=0.5), P**2 / (P**2).sum()),
        (settings(top_k=2), [0, 2 / 3, 1 / 3, 0, 0, 0]),
        (settings(top_k=4), [0, 0.4 / 0.95, 0.2 / 0.95, 0.1 / 0.95, 0.1 / 0.95, 0.15 / 0.95]),  # a tie stays in
        (settings(top_p=0.39), [0, 1, 0, 0, 0, 0]),
        (settings(top_p=0.7), [0, 0.4 / 0.75, 0.2 / 0.75, 0, 0, 0.15 / 0.75]),
        (settings(top_p=0.8), [0, 0.4 / 0.95, 0.2 / 0.95, 0.1 / 0.95, 0.1 / 0.95, 0.15 / 0.95]),
        (settings(top_k=2, top_p=0.6), [0, 1, 0, 0, 0, 0]),  # 0.4 of 0.6 is two thirds
        (settings(temperature=0.5, top_p=0.6), [0, 1, 0, 0, 0, 0]),  # 0.16 of 0.255
    ],
)
def test_distribution_sampled_from(config, expected):
    logits = jnp.log(jnp.asarray(P, jnp.float32))[None] + 3
    np.testing.assert_allclose(np.exp(decoding.adjusted_logprobs(logits, config))[0], expected, atol=1e-6)


@pytest.mark.parametrize("by_key", [True, False])
def test_draws_follow_the_distribution(by_key):
    count = 20_000
    keys = np.zeros((count, 2), np.uint32)
    number = np.zeros(count, np.int32)
    keys[:, 1], number = (np.arange(count), number) if by_key else (7, np.arange(count))
    logits = jnp.tile(jnp.log(jnp.asarray(P, jnp.float32))[None], (count, 1))
    ids, logp = decoding.sample(logits, jnp.asarray(keys), jnp.asarray(number), settings(temperature=0.7))
    expected = P ** (1 / 0.7) / (P ** (1 / 0.7)).sum()
    seen = np.bincount(ids, minlength=len(P))
    assert ((seen - count * expected) ** 2 / (count * expected)).sum() < 25.7  # chi-square, 5 degrees, p = 1e-4
    pairs = np.histogram2d(ids[:-1], ids[1:], bins=6)[0]
    independent = count * expected[:, None] * expected
    assert ((pairs - independent) ** 2 / independent).sum() < 88  # 35 degrees, p = 1e-6
    np.testing.assert_allclose(logp, np.log(expected)[ids], atol=1e-5)  # of the policy: at its temperature


def test_ids_of_probability_zero_are_never_drawn(monkeypatch):
    logits = jnp.asarray([[-np.inf, 2.0, -np.inf, 1.0, 0.0, -np.inf]])
    for u, expected in [(2**-23, 1), (0.66, 1), (0.67, 3), (0.9, 3), (0.92, 4), (1.0, 4)]:
        monkeypatch.setattr(decoding, "_uniform", lambda key, number, u=u: jnp.float32(u))
        ids, _ = decoding.sample(logits, jnp.zeros((1, 2), jnp.uint32), jnp.zeros(1, jnp.int32), settings())
        assert int(ids[0]) == expected


def test_a_uniform_number_of_zero_does_not_draw_the_first_id(monkeypatch):
    """One in 2^23 of them is zero, and padding comes first: drawn then, it would have some 1e-9 of the draws."""
    logits = jnp.asarray([[-20.0, 2.0, 1.0]])
    monkeypatch.setattr(jax.random, "uniform", lambda key: jnp.float32(0))
    ids, _ = decoding.sample(logits, jnp.zeros((1, 2), jnp.uint32), jnp.zeros(1, jnp.int32), settings())
    assert int(ids[0]) == 2


def test_rounding_does_not_draw_ids_of_probability_zero(monkeypatch):
    """Uniforms at the very steps of the cumulative distribution, which rounding leaves not quite monotone."""
    logits = np.random.default_rng(0).normal(size=999).astype(np.float32)
    logits[::2] = -np.inf
    cumulative = jnp.cumsum(jnp.exp(jax.nn.log_softmax(jnp.asarray(logits)[None])), axis=-1)[0]
    monkeypatch.setattr(decoding, "_uniform", lambda key, number: (cumulative / cumulative.max())[number])
    rows = jnp.arange(999)
    ids, _ = decoding.sample(jnp.tile(logits, (999, 1)), jnp.zeros((999, 2), jnp.uint32), rows, settings())
    assert (np.asarray(ids) % 2 == 1).all()


# ------------------------------------------------------------------- bfloat16


def test_in_bfloat16_the_log_probs_of_sampled_ids_are_the_trainers_within_its_rounding():
    """Reinforcement learning compares the two: their gap must stay far below the clip range of 0.2."""
    model = Decoder(dataclasses.replace(MODEL.config, dtype="bfloat16"))
    fills = [fill for fill in threads(limit=24) if len(fill.ids) + 24 < CONTEXT]
    result = run(Sampler(model, params(), DRAWN, []), fills)
    gaps = []
    for fill in fills:
        done = result[fill.key[0]]
        tokens = np.zeros((1, CONTEXT), np.int32)
        ids = fill.ids + done.ids
        tokens[0, : len(ids)] = ids
        until = np.full_like(tokens, CONTEXT)
        logits, _ = jax.jit(model.apply)({"params": params()}, tokens, np.arange(CONTEXT)[None], until)
        logp = np.asarray(token_logprobs(logits, jnp.asarray(tokens)))[0, len(fill.ids) : len(ids)]
        gaps += np.abs(logp - done.logprobs).tolist()
    assert len(gaps) > 50 and 0 < max(gaps) < 0.1 and np.mean(gaps) < 0.02

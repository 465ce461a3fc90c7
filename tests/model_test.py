"""model.py against a float64 NumPy forward written here, by gradients, and part by part."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

import model
from model import Decoder, ModelConfig, Past

SMALL = ModelConfig(
    vocab_size=53,
    width=24,
    layers=2,
    heads=4,
    kv_heads=2,
    head_width=6,
    mlp_width=40,
    context=32,
    rope_theta=100.0,
    tied=True,
    dtype="float32",
)
T = 21  # no multiple of the query blocks

# Row 0: prompt 0-3, spawn block 4-8, join and the rest 9-13 (positions go back to 4), a second segment, padding.
# Row 1: one segment over the whole row.
UNTIL = np.array([[14] * 4 + [9] * 5 + [14] * 5 + [19] * 5 + [20, 21], [T] * T])
POSITIONS = np.array([[*range(4), *range(4, 9), *range(4, 9), *range(5), 0, 0], [*range(T)]])
VISIBLE = np.array([[[j <= i < until[j] for j in range(T)] for i in range(T)] for until in UNTIL])


def make(config: ModelConfig, seed: int = 0):
    """A decoder, parameters with scales away from 1, and tokens [2, T]."""
    rng = np.random.default_rng(seed)
    decoder = Decoder(config)
    tokens = jnp.asarray(rng.integers(0, config.vocab_size, (2, T)))
    params = jax.jit(decoder.init)(jax.random.key(seed), tokens, POSITIONS, UNTIL)["params"]
    return decoder, jax.tree.map(lambda x: x + 0.1 * rng.standard_normal(x.shape, np.float32), params), tokens


@functools.partial(jax.jit, static_argnums=0)
def apply(decoder: Decoder, params, *args):
    """The decoder, compiled."""
    return decoder.apply({"params": params}, *args)


def forward(params, config: ModelConfig, tokens, positions, visible):
    """Llama for one row in float64 NumPy, head by head."""
    p = jax.tree.map(lambda x: np.asarray(x, np.float64), params)

    def norm(x, scale):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale

    def rope(x):
        half = config.head_width // 2
        out = np.empty_like(x)
        for t, position in enumerate(positions):
            for f in range(half):
                angle = position * config.rope_theta ** (-2 * f / config.head_width)
                a, b = x[t, f], x[t, f + half]
                out[t, f] = a * np.cos(angle) - b * np.sin(angle)
                out[t, f + half] = b * np.cos(angle) + a * np.sin(angle)
        return out

    x = p["embedding"][tokens] * np.sqrt(config.width)
    for layer in range(config.layers):
        attention, mlp = p[f"attention_{layer}"], p[f"mlp_{layer}"]
        h, total = norm(x, p[f"attention_norm_{layer}"]["scale"]), np.zeros_like(x)
        for head in range(config.heads):
            shared = head * config.kv_heads // config.heads
            q, k = rope(h @ attention["query"][:, head]), rope(h @ attention["key"][:, shared])
            scores = np.where(visible, q @ k.T / np.sqrt(config.head_width), -np.inf)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            weights /= weights.sum(-1, keepdims=True)
            total += weights @ (h @ attention["value"][:, shared]) @ attention["out"][head]
        x = x + total
        h = norm(x, p[f"mlp_norm_{layer}"]["scale"])
        gate = h @ mlp["gate"]
        x = x + (gate / (1 + np.exp(-gate)) * (h @ mlp["up"])) @ mlp["down"]
    return norm(x, p["final_norm"]["scale"]) @ (p["embedding"].T if config.tied else p["head"])


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("tied", [True, False])
def test_forward_is_llama(kv_heads, tied):
    config = dataclasses.replace(SMALL, kv_heads=kv_heads, tied=tied)
    decoder, params, tokens = make(config)
    logits, (k, v) = apply(decoder, params, tokens, POSITIONS, UNTIL)
    assert logits.dtype == jnp.float32 and k.shape == v.shape == (2, 2, T, kv_heads, 6)
    for row in range(2):
        expected = forward(params, config, tokens[row], POSITIONS[row], VISIBLE[row])
        np.testing.assert_allclose(logits[row], expected, rtol=1e-4, atol=2e-4)


def test_bfloat16_is_near_float32():
    decoder, params, tokens = make(SMALL)
    half = Decoder(dataclasses.replace(SMALL, dtype="bfloat16"))
    exact, _ = apply(decoder, params, tokens, POSITIONS, UNTIL)
    logits, (k, _) = apply(half, params, tokens, POSITIONS, UNTIL)
    assert logits.dtype == jnp.float32 and k.dtype == jnp.bfloat16
    scale = float(jnp.std(exact))
    assert 1e-4 * scale < float(jnp.sqrt(jnp.mean((logits - exact) ** 2))) < 0.03 * scale

    def loss(params, decoder):
        return model.token_logprobs(apply(decoder, params, tokens, POSITIONS, UNTIL)[0], tokens).sum()

    grad = jax.jit(jax.grad(loss), static_argnums=1)
    grads, exact_grads = grad(params, half), grad(params, decoder)
    assert all(g.dtype == jnp.float32 for g in jax.tree.leaves(grads))
    flat, exact_flat = (jnp.concatenate([g.ravel() for g in jax.tree.leaves(t)]) for t in (grads, exact_grads))
    assert float(flat @ exact_flat / jnp.linalg.norm(flat) / jnp.linalg.norm(exact_flat)) > 0.995


@pytest.mark.parametrize("attend", ["rows", "parts"])
def test_scores_of_bfloat16_are_summed_in_float32(attend):
    """256 and 257, which bfloat16 takes for one number: the weight of the second is e / (1 + e)."""
    q, k, v = (jnp.array(value, jnp.bfloat16) for value in ([[0, 0], [16, 1]], [[16, 0], [16, 1]], [[0, 0], [1, 1]]))
    until = jnp.full((1, 2), 2)
    if attend == "rows":
        o = model.attend_rows(q[None, None, None], k[None, None], v[None, None], until)[0, 0, 0]
    else:
        one = [x[None, :, None] for x in (q, k, v)]
        o = model.attend_parts(one[0], [(one[1], one[2], model.visibility(until))])[0, :, 0]
    np.testing.assert_allclose(o[1].astype(jnp.float32), np.e / (1 + np.e), atol=0.003)


def test_norms_of_bfloat16_are_computed_in_float32():
    """Step by step, as compiled together XLA may keep more bits: the nearest bfloat16 nearly everywhere."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 8, 96)), jnp.bfloat16)
    norm = model.RMSNorm()
    with jax.disable_jit():
        found = jnp.asarray(norm.apply(norm.init(jax.random.key(0), x), x))
    exact = np.asarray(x, np.float64)
    exact /= np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-6)
    assert found.dtype == jnp.bfloat16
    assert np.mean(np.asarray(found) == np.asarray(jnp.asarray(exact, jnp.float32).astype(jnp.bfloat16))) > 0.99


@pytest.mark.parametrize("tied", [True, False])
def test_matrices_cast_beforehand_change_nothing(tied):
    """The sampler casts its copy once, the trainer in every step."""
    decoder, params, tokens = make(dataclasses.replace(SMALL, dtype="bfloat16", tied=tied))
    cast = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16) if leaf.ndim > 1 else leaf, params)
    logits, _ = apply(decoder, params, tokens, POSITIONS, UNTIL)
    np.testing.assert_array_equal(apply(decoder, cast, tokens, POSITIONS, UNTIL)[0], logits)


def test_gradients_flow_only_where_until_lets_them():
    # Untied and with distinct tokens, so that a row of the embedding is touched by one position alone.
    config = dataclasses.replace(SMALL, tied=False)
    decoder, params, _ = make(config)
    tokens = jnp.arange(2 * T).reshape(2, T) % config.vocab_size
    direction = np.random.default_rng(1).standard_normal(config.vocab_size).astype(np.float32)

    def out(embedding):
        logits, _ = apply(decoder, {**params, "embedding": embedding}, tokens, POSITIONS, UNTIL)
        return logits @ direction

    influence = jnp.abs(jax.jit(jax.jacobian(out))(params["embedding"])).sum(-1)  # [2, T, V]
    for row in range(2):
        # In these layouts, as in a tree of threads, what a visible token saw is visible itself.
        np.testing.assert_array_equal(influence[row][:, tokens[row]] > 0, VISIBLE[row])
        assert not np.delete(influence[row], tokens[row], axis=1).any()


@pytest.mark.parametrize("length", [1, 3, 8, 21])
def test_attend_rows_and_its_gradient_are_the_plain_ones(length):
    keys = jax.random.split(jax.random.key(0), 4)
    q = jax.random.normal(keys[0], (2, length, 6, 4))
    k, v = (jax.random.normal(key, (2, length, 3, 4)) for key in keys[1:3])
    direction = jax.random.normal(keys[3], q.shape)
    until = jnp.asarray(np.minimum(UNTIL[:, :length], length))

    def q_RKGTH(q):
        return q.reshape(2, length, 3, 2, 4).transpose(0, 2, 3, 1, 4)

    def blocks(q, k, v):
        o = model.attend_rows(q_RKGTH(q), k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3), until)
        return jnp.sum(o * q_RKGTH(direction)), o.transpose(0, 3, 1, 2, 4).reshape(q.shape)

    def plain(q, k, v):
        o = model.attend_parts(q, [(k, v, model.visibility(until))])
        return jnp.sum(o * direction), o

    grads, o = jax.jit(jax.grad(blocks, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    expected_grads, expected = jax.jit(jax.grad(plain, argnums=(0, 1, 2), has_aux=True))(q, k, v)
    for ours, theirs in zip((o, *grads), (expected, *expected_grads), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_a_token_that_sees_only_itself_copies_its_value():
    v = jax.random.normal(jax.random.key(0), (1, 2, 5, 4))
    until = jnp.arange(1, 6)[None]
    o = model.attend_rows(jnp.ones((1, 2, 3, 5, 4)), jnp.ones((1, 2, 5, 4)), v, until)
    np.testing.assert_allclose(o, np.broadcast_to(np.asarray(v)[:, :, None], o.shape), rtol=1e-6)


@pytest.mark.parametrize("layers_apart", [True, False])
def test_past_parts_equal_one_forward_of_the_whole_sequence(layers_apart):
    """Rows with histories and tails of different lengths and garbage in the slots that are not visible."""
    decoder, params, tokens = make(SMALL)
    whole, (k, v) = apply(decoder, params, tokens, np.tile(np.arange(T), (2, 1)), np.full((2, T), T))
    rng = np.random.default_rng(2)
    history_slots, tail_slots, new = 12, 6, 4  # more slots than tokens
    lengths = [(9, 5), (4, 6)]  # tokens of history and tail, per row

    def part(start, count, slots, row):
        at = np.sort(rng.permutation(slots)[:count])
        visible = np.isin(np.arange(slots), at)
        caches = []
        for x in (k, v):
            cache = rng.standard_normal((SMALL.layers, slots, 2, 6)).astype(np.float32)
            cache[:, at] = x[:, row, start : start + count]
            caches.append(cache)
        return *caches, visible

    rows = [(part(0, h, history_slots, r), part(h, t, tail_slots, r)) for r, (h, t) in enumerate(lengths)]
    past = []
    for which in (0, 1):
        ks, vs, visible = zip(*[row[which] for row in rows], strict=True)
        cache = [jnp.asarray(np.stack(x, axis=1)) for x in (ks, vs)]
        past.append(Past(*(tuple(x) if layers_apart else x for x in cache), jnp.asarray(np.stack(visible))))
    starts = np.array([h + t for h, t in lengths])
    at = starts[:, None] + np.arange(new)
    logits, (new_k, new_v) = apply(
        decoder, params, jnp.take_along_axis(tokens, at, 1), at, np.full((2, new), new), past
    )
    for row in range(2):
        np.testing.assert_allclose(logits[row], whole[row, at[row]], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(new_k[:, row], k[:, row, at[row]], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(new_v[:, row], v[:, row, at[row]], rtol=1e-4, atol=1e-5)


def test_a_past_with_nothing_visible_changes_nothing():
    decoder, params, tokens = make(SMALL)
    expected, _ = apply(decoder, params, tokens, POSITIONS, UNTIL)
    nothing = Past(*[jnp.full((2, 2, 3, 2, 6), 7.0)] * 2, jnp.zeros((2, 3), bool))
    logits, _ = apply(decoder, params, tokens, POSITIONS, UNTIL, [nothing])
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


def test_decoding_never_joins_history_and_tail():
    decoder, params, _ = make(SMALL)
    past = [Past(*[jnp.zeros((2, 2, slots, 2, 6))] * 2, jnp.ones((2, slots), bool)) for slots in (150, 17)]
    one = jnp.zeros((2, 1), int)
    text = apply.lower(decoder, params, one, one, one + 1, past).as_text()
    # 167 = 150 + 17 slots, 168 with the token itself; the parts have their own lengths everywhere.
    assert "x150x" in text and "x17x" in text and "x167x" not in text and "x168x" not in text


def test_token_logprobs_by_hand():
    logits = jnp.log(jnp.array([[[1.0, 3.0], [1.0, 1.0], [9.0, 1.0]]])) + 5.0
    logp = model.token_logprobs(logits, jnp.array([[1, 0, 1]]))
    np.testing.assert_allclose(logp, np.log([[1.0, 0.25, 0.5]]), rtol=1e-5, atol=1e-6)


def test_paper_shape_has_228_million_parameters_beside_the_embedding():
    config = ModelConfig(600, 1024, 18, 16, 16, 64, 2752, 4096, 10000.0, True, "bfloat16")
    one = jnp.zeros((1, 1), int)
    params = jax.eval_shape(Decoder(config).init, jax.random.key(0), one, one, one)["params"]
    sizes = {name: sum(leaf.size for leaf in jax.tree.leaves(leaves)) for name, leaves in params.items()}
    assert sizes.pop("embedding") == 600 * 1024
    matrices = 18 * (4 * 1024 * 1024 + 3 * 1024 * 2752)
    assert sum(sizes.values()) == matrices + (2 * 18 + 1) * 1024
    assert round(matrices / 1e6) == 228


def test_initial_weights_keep_the_scale_of_the_stream():
    """Variance 1 / inputs; the outputs of the 2 L branches add up to about the unit-size embedding."""
    config = dataclasses.replace(SMALL, width=256, heads=8, kv_heads=4, head_width=16, mlp_width=512, tied=False)
    one = jnp.zeros((1, 1), int)
    params = jax.jit(Decoder(config).init)(jax.random.key(0), one, one, one)["params"]
    inputs = {"query": 256, "key": 256, "value": 256, "out": 128 * 4, "gate": 256, "up": 256, "down": 512 * 4}
    for name, leaf in {**params["attention_0"], **params["mlp_1"]}.items():
        np.testing.assert_allclose(jnp.std(leaf), inputs[name] ** -0.5, rtol=0.02)
    np.testing.assert_allclose(jnp.std(params["embedding"]), 256**-0.5, rtol=0.02)


@pytest.mark.parametrize("tied", [True, False])
def test_param_specs_shard_over_a_mesh_and_change_nothing(tied):
    decoder, params, tokens = make(dataclasses.replace(SMALL, tied=tied))
    expected, _ = apply(decoder, params, tokens, POSITIONS, UNTIL)
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()).reshape(2, 2, 2), ("data", "fsdp", "tensor"))
    put = lambda path, x: jax.device_put(x, NamedSharding(mesh, model.param_spec(path)))
    spread = jax.tree.map_with_path(put, params)
    assert spread["attention_0"]["query"].addressable_shards[0].data.shape == (12, 2, 6)
    assert spread["mlp_1"]["down"].addressable_shards[0].data.shape == (20, 12)
    rows = NamedSharding(mesh, PartitionSpec("data"))
    logits, _ = apply(decoder, spread, jax.device_put(tokens, rows), POSITIONS, UNTIL)
    np.testing.assert_allclose(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("vocab_size", 0, "model.vocab_size"),
        ("layers", -1, "model.layers"),
        ("kv_heads", 3, "multiple of model.kv_heads"),
        ("head_width", 7, "even"),
        ("rope_theta", 0.0, "rope_theta"),
        ("dtype", "float16", "float32, bfloat16"),
    ],
)
def test_a_shape_that_cannot_be_built_says_why(field, value, words):
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(SMALL, **{field: value})


def test_rows_longer_than_the_context_are_refused():
    decoder, params, _ = make(SMALL)
    long = jnp.zeros((1, 33), int)
    with pytest.raises(ValueError, match=r"33 tokens do not fit model.context = 32"):
        apply(decoder, params, long, long, long + 1)

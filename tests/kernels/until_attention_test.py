"""The attention kernel against a dense mask, in Pallas's interpreter: outputs, gradients, and what it does not read."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

from kernels import until_attention as kernel
from model import Decoder, ModelConfig

BLOCK, R, K, G, T, H = 16, 5, 2, 2, 72, 16  # 72 is no multiple of 16
PLAIN, PACKED, REWOUND, PADDED, LATE = range(R)


@pytest.fixture(scope="module", autouse=True)
def small_blocks():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernel, "BLOCK", BLOCK)
        yield


def rows() -> np.ndarray:
    """`until` of five rows."""
    until = np.full((R, T), T, np.int32)
    until[PACKED, :21], until[PACKED, 21:50] = 21, 50
    until[REWOUND, 10:45] = 45  # seen by nothing after the join at 45
    until[REWOUND, :60], until[REWOUND, 10:45] = 60, 45
    until[PADDED, :30], until[PADDED, 30:] = 30, np.arange(31, T + 1)
    until[LATE, :48] = 48  # three whole blocks end before the second segment
    return until


def inputs(dtype: str = "float32") -> list:
    rng = np.random.default_rng(0)
    shapes = ((R, K, G, T, H), (R, K, T, H), (R, K, T, H), (R, K, G, T, H))
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def dense(q, k, v, until):
    """Softmax over the keys that the rule allows, written down."""
    i = jnp.arange(T)
    seen = (i[None, None, :] <= i[None, :, None]) & (i[None, :, None] < until[:, None, :])
    scores = jnp.einsum("rkgih,rkjh->rkgij", q.astype(jnp.float32), k.astype(jnp.float32))
    weights = jax.nn.softmax(jnp.where(seen[:, None, None], scores, -jnp.inf))
    return jnp.einsum("rkgij,rkjh->rkgih", weights, v.astype(jnp.float32))


@functools.cache
def both(which: str) -> tuple:
    """(output, gradients of q, k and v) of the kernel or of the dense mask."""
    *qkv, direction = inputs()
    attend = {"kernel": kernel.until_attention, "dense": dense}[which]

    def value(q, k, v):
        out = attend(q, k, v, jnp.asarray(rows()))
        return (out * direction).sum(), out

    gradients, out = jax.jit(jax.grad(value, argnums=(0, 1, 2), has_aux=True))(*qkv)
    return jax.device_get((out, *gradients))


@pytest.mark.parametrize("row", range(R), ids=["plain", "packed", "rewound", "padded", "late"])
@pytest.mark.parametrize("what", range(4), ids=["output", "dq", "dk", "dv"])
def test_the_kernel_is_the_dense_mask(row, what):
    np.testing.assert_allclose(both("kernel")[what][row], both("dense")[what][row], atol=2e-5)


def test_in_bfloat16_the_sums_are_float32():
    """The output is off by the rounding of its inputs and of the probabilities, not of sums over 72 keys."""
    exact = dense(*(x.astype(jnp.float32) for x in inputs("bfloat16")[:3]), jnp.asarray(rows()))
    out = jax.jit(kernel.until_attention)(*inputs("bfloat16")[:3], jnp.asarray(rows()))
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(out.astype(np.float32), exact, atol=0.03)


def test_blocks_in_the_future_and_blocks_that_are_over_are_left_out():
    """Three blocks of four: block 1 ends at 8 at the latest, block 2 is seen by its own queries alone."""
    until = np.asarray([[12, 12, 12, 12, 8, 8, 6, 7, 12, 10, 11, 12]], np.int32)
    assert kernel.visible_blocks(until, 4)[0].tolist() == [
        [True, False, False],
        [True, True, False],
        [True, False, True],
    ]


def test_what_is_left_out_is_not_read():
    """NaN in the keys and values of three blocks that are over does not reach the queries after them."""
    q, k, v, _ = inputs()
    broken = [x.at[LATE, :, :48].set(jnp.nan) for x in (k, v)]
    out = jax.jit(kernel.until_attention)(q, *broken, jnp.asarray(rows()))
    assert np.isnan(out[LATE, :, :, :48]).all()
    np.testing.assert_allclose(out[LATE, :, :, 48:], both("dense")[0][LATE, :, :, 48:], atol=2e-5)


def test_the_kernels_can_be_lowered_for_a_gpu(monkeypatch):
    """All three, in both types. That they are fast, and that a GPU agrees, needs a GPU: `benchmarks.accelerator`."""
    monkeypatch.setattr(kernel, "_interpreted", lambda: False)
    gpu = AbstractMesh((1,), ("gpu",), abstract_device=AbstractDevice("NVIDIA H200", 132, "gpu"))  # jax 0.11 asks for one
    for dtype in ("float32", "bfloat16"):
        *qkv, _ = inputs(dtype)
        value = lambda q, k, v: kernel.until_attention(q, k, v, rows()).astype(jnp.float32).sum()
        with use_abstract_mesh(gpu):
            text = jax.jit(jax.grad(value, argnums=(0, 1, 2))).trace(*qkv).lower(lowering_platforms=("cuda",)).as_text()
        assert [text.count(f'"{name}_kernel"') > 0 for name in ("forward", "query", "key")] == [True] * 3


def test_a_model_with_the_kernel_is_the_model_with_blocks():
    config = ModelConfig(13, 32, 1, 4, 2, 16, 48, T, 1e4, True, "float32")
    rng, until = np.random.default_rng(1), rows()
    tokens, positions = rng.integers(0, 13, until.shape), np.broadcast_to(np.arange(T), until.shape)
    params = jax.jit(Decoder(config).init)(jax.random.key(0), tokens, positions, until)
    logits = []
    for attention in ("blocks", "pallas"):
        model = Decoder(ModelConfig(**{**vars(config), "attention": attention}))
        logits.append(jax.jit(model.apply)(params, tokens, positions, until)[0])
    np.testing.assert_allclose(logits[0], logits[1], atol=1e-4)

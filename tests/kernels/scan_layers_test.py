"""Scanned layers: the same logits and gradients as unrolled ones, from a program that does not grow with them."""

import dataclasses
import typing

import jax
import jax.numpy as jnp
import numpy as np

from model import Decoder, ModelConfig

CONFIG = ModelConfig(13, 16, 3, 4, 2, 8, 24, 16, 1e4, True, "float32")
T = 16
UNTIL = np.array([[9] * 4 + [6] * 2 + [9] * 3 + [T] * 7, [T] * T])
TOKENS = np.random.default_rng(0).integers(0, 13, (2, T))
POSITIONS = np.broadcast_to(np.arange(T), (2, T))


def decoder(scan: bool, layers: int = 3) -> Decoder:
    return Decoder(dataclasses.replace(CONFIG, scan_layers=scan, layers=layers))


def loss(params, model: Decoder) -> tuple:
    logits, (k, _) = model.apply({"params": params}, TOKENS, POSITIONS, UNTIL)
    return jnp.square(jax.nn.logsumexp(logits, axis=-1)).sum() + jnp.square(k).sum(), logits


def test_scanned_layers_are_the_unrolled_ones():
    params = jax.jit(decoder(True).init)(jax.random.key(0), TOKENS, POSITIONS, UNTIL)["params"]
    assert "attention_2" in params and "mlp_norm_0" in params  # stored alike
    found = [jax.jit(jax.grad(loss, has_aux=True), static_argnums=1)(params, decoder(scan)) for scan in (True, False)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), *found)


def operations(scan: bool, layers: int) -> list[str]:
    """Names of all operations of the gradient's program, loops' bodies once."""
    model = decoder(scan, layers)
    params = jax.eval_shape(model.init, jax.random.key(0), TOKENS, POSITIONS, UNTIL)["params"]
    names: list[str] = []

    def walk(jaxpr: typing.Any) -> None:
        for equation in jaxpr.eqns:
            names.append(equation.primitive.name)
            for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns")):
                if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                    walk(inner.jaxpr if hasattr(inner, "jaxpr") else inner)

    walk(jax.make_jaxpr(jax.grad(loss, has_aux=True), static_argnums=1)(params, model).jaxpr)
    return names


def test_the_program_does_not_grow_with_the_layers():
    """Only the stacking of parameters, and the slicing of their gradients, does: some moves of memory per layer."""
    few, many = operations(True, 2), operations(True, 6)
    assert "scan" in few
    computed = ("dot_general", "exp", "mul", "add", "reduce_sum", "transpose", "custom_vjp_call", "scan")
    assert [few.count(name) for name in computed[:-4]] == [many.count(name) for name in computed[:-4]]
    scanned, unrolled = len(many) - len(few), len(operations(False, 6)) - len(operations(False, 2))
    assert few.count("dot_general") > 20 and scanned < 0.15 * unrolled

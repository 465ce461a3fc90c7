"""Layers as one loop on the device: a program that does not grow with their number.

Parameters stay stored layer by layer, under the names NAME_0, NAME_1, ... They are stacked inside the jitted step.
"""

from __future__ import annotations

import functools
import typing
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

Params = typing.Any


def scan_layers(
    layer: Callable, modules: dict[str, Callable], params: Params, count: int, x: Array
) -> tuple[Array, typing.Any]:
    """Runs x through `count` layers; returns it and what they return beside it, stacked.

    `layer(run, x, past)` is one layer, in which `run(name, *inputs)` calls the module of a name. `modules` makes
    them, and `params` holds their parameters.
    """
    own = [{name: params[f"{name}_{i}"] for name in modules} for i in range(count)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *own)

    def run(params: Params, name: str, *inputs: typing.Any) -> typing.Any:
        return modules[name](parent=None).apply({"params": params[name]}, *inputs)

    return jax.lax.scan(lambda x, params: layer(functools.partial(run, params), x, ()), x, stacked)

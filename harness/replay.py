"""Runs the step again at which a run stopped, alone, and says where its numbers stop being finite.

    python sft.py --config=configs/apr.py --replay       # and the flags of the run that stopped
    python grpo.py --replay

  1. Read the parameters before the step, and its batch (`Workdir.save_failed`).
  2. Compute loss and gradient again, with an optimizer that keeps the gradient and changes nothing.
  3. Print the size of each array and of its gradient, and the worst log-prob of each row.
"""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax

from harness.build import Parts
from harness.loop import Stage
from harness.workdir import Workdir
from packing import TokenBatch
from train_state import make_train_step, state_from_params

KEEP_GRADIENT = optax.GradientTransformation(
    lambda params: jax.tree.map(jnp.zeros_like, params),
    lambda gradient, _, params: (jax.tree.map(jnp.zeros_like, gradient), gradient),
)


def replay(parts: Parts, workdir: Workdir, stage: Stage) -> None:
    """Prints what the failed step of a workdir computes. Raises UsageError if no step failed there."""
    number, tree, reason = workdir.load_failed()
    print(reason)
    if "batch" not in tree:
        print("the step came to no update: its rollouts are to blame")
        return
    batch = TokenBatch(**tree["batch"])
    step = make_train_step(parts.model, KEEP_GRADIENT, stage.loss, parts.mesh, stage.temperature)
    state, metrics, logp = step(state_from_params(KEEP_GRADIENT, parts.mesh, tree["params"]), batch)
    gradients = dict(jax.tree.leaves_with_path(state.opt_state))
    for path, leaf in jax.tree.leaves_with_path(state.params):
        name = "/".join(key.key for key in path)
        print(f"{name:<36} array {jnp.linalg.norm(leaf):<12.5g} gradient {jnp.linalg.norm(gradients[path]):.5g}")
    sampled_RT = batch.sampled.reshape(-1, batch.sampled.shape[-1])
    for row, (which, values) in enumerate(zip(sampled_RT, np.asarray(logp).reshape(sampled_RT.shape), strict=True)):
        if which.any():
            print(f"row {row:<32} sampled {which.sum():<10} lowest log-prob {values[which].min():.5g}")
    if all(bool(jnp.isfinite(leaf).all()) for leaf in (metrics["loss"], *gradients.values())):
        print("loss and gradients are finite: the optimizer's update is to blame, or a later one of the step")
    print(json.dumps({"step": number, "loss": float(metrics["loss"]), "grad_norm": float(metrics["grad_norm"])}))

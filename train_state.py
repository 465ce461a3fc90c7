"""The functional training state, and the one step that SFT and GRPO share.

`train_step` takes a state, a `TokenBatch` and a loss, and returns the next state:

  1. per micro-batch: logits, log-probs of the row's own tokens, the loss's value
     per token, and the gradient of their plain sum, added up over micro-batches
     (the batch carries all weights, so a sum is all there is to do);
  2. clip the gradient by its global norm (paper: 1.0);
  3. Muon for the matrices and Adam for the rest, or AdamW for all (paper section 4,
     preset `paper`), with linear warm-up and cosine decay.

SFT and GRPO differ only in the `LossFn` they pass. The state is a pytree and
nothing else is mutable; shardings come from the mesh: rows over ("data", "fsdp"),
parameters over ("fsdp", "tensor").

Deviations from the paper: Muon, which needs about half of AdamW's updates (LOG.md);
weight decay spares norms (with Muon embeddings too), as is usual.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
import typing
from collections.abc import Callable
from typing import Annotated

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from checks import FRACTION, Checked, above, at_least, one_of, require
from model import MATRICES, Decoder, param_spec, token_logprobs
from packing import TokenBatch

ROWS = PartitionSpec(None, ("data", "fsdp"))  # [M, R, T]: micro-batches in turn, rows spread


class TrainState(typing.NamedTuple):
    """Everything that training changes."""

    params: typing.Any
    opt_state: typing.Any
    step: typing.Any  # int32 scalar: updates taken


class TokenStats(typing.NamedTuple):
    """What the model says about the tokens of a batch, each [R, T] and aligned with them."""

    logp: Array  # log-probability of the token given those before it
    entropy: Array  # of the distribution the token was drawn from, nats
    is_argmax: Array  # bool: the token was the most likely one; of equal ones the first is


LossFn = Callable[[TokenStats, TokenBatch], tuple[Array, dict[str, Array]]]
"""(outputs, batch) -> (loss per token [R, T], metrics per token [R, T] to be summed)."""


@dataclasses.dataclass(frozen=True)
class OptimizerConfig(Checked):
    """The optimizer and its schedule. Raises ValueError on values that cannot train."""

    section = "optimizer"
    matrices: Annotated[str, one_of("muon", "adam")]  # for the matrices; embeddings and norms always use Adam
    learning_rate: Annotated[float, above(0)]  # peak
    end_learning_rate: Annotated[float, at_least(0)]  # at the last step
    warmup_steps: Annotated[int, at_least(0)]
    steps: Annotated[int, at_least(1)]
    weight_decay: Annotated[float, at_least(0)]  # of the matrices; with Adam of embeddings too
    clip: Annotated[float, above(0)]  # global norm
    beta1: Annotated[float, FRACTION]
    beta2: Annotated[float, FRACTION]
    momentum: Annotated[float, FRACTION]  # of Muon
    embedding_multiplier: Annotated[float, above(0)] = 1.0  # beside Muon: rate of embeddings and norms / learning_rate

    def check(self) -> None:
        """Checks the schedule."""
        longer = self.steps > self.warmup_steps
        require(longer, f"optimizer.steps={self.steps} must be above optimizer.warmup_steps={self.warmup_steps} >= 0")


NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # Jordan et al. (2024): steepest at 0, so that five rounds are enough
ROUNDS = 5
UPDATE_SIZE = 0.2  # root mean square of an entry of Muon's update: about Adam's, so that they share a rate


def orthogonalize(x_BMN: Array) -> Array:
    """Nearest (semi-)orthogonal matrices, roughly: every singular value is brought to between 0.7 and 1.2.

    Newton-Schulz iteration as in Muon (Jordan et al., 2024), for a stack of matrices with M <= N.
    """
    a, b, c = NEWTON_SCHULZ
    x_BMN = x_BMN / (jnp.linalg.norm(x_BMN, axis=(1, 2), keepdims=True) + 1e-8)
    for _ in range(ROUNDS):
        gram_BMM = x_BMN @ x_BMN.mT
        x_BMN = a * x_BMN + (b * gram_BMM + c * gram_BMM @ gram_BMM) @ x_BMN
    return x_BMN


def orthogonal_updates(updates: typing.Any) -> typing.Any:
    """Every matrix of a tree orthogonalized and scaled to `UPDATE_SIZE` (arXiv 2502.16982).

    Matrices of one shape, or of its transpose, are stacked: on a CPU that is several times faster than one by one.
    """
    leaves, tree = jax.tree.flatten_with_path(updates)
    flat = [leaf.reshape(math.prod(leaf.shape[: MATRICES[path[-1].key]]), -1) for path, leaf in leaves]
    groups = collections.defaultdict(list)
    for number, x in enumerate(flat):
        groups[tuple(sorted(x.shape))].append(number)
    for (_, large), members in groups.items():
        wide = [flat[number].shape[1] == large for number in members]
        stack_BMN = jnp.stack([flat[number] if w else flat[number].T for number, w in zip(members, wide, strict=True)])
        done_BMN = orthogonalize(stack_BMN) * UPDATE_SIZE * large**0.5
        for number, w, x_MN in zip(members, wide, done_BMN, strict=True):
            flat[number] = x_MN if w else x_MN.T
    return jax.tree.unflatten(tree, [x.reshape(leaf.shape) for x, (_, leaf) in zip(flat, leaves, strict=True)])


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
    """Clipping, then Muon or AdamW, with warm-up and cosine decay to `end_learning_rate`."""
    schedule = optax.warmup_cosine_decay_schedule(
        0.0, config.learning_rate, config.warmup_steps, config.steps, config.end_learning_rate
    )
    adam = functools.partial(optax.adamw, b1=config.beta1, b2=config.beta2)
    clip = optax.clip_by_global_norm(config.clip)
    if config.matrices == "adam":
        decays = lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params)  # noqa: E731
        return optax.chain(clip, adam(schedule, weight_decay=config.weight_decay, mask=decays))
    muon = optax.chain(
        optax.trace(config.momentum, nesterov=True),
        optax.stateless(lambda updates, _: orthogonal_updates(updates)),
        optax.add_decayed_weights(config.weight_decay),
        optax.scale_by_learning_rate(schedule),
    )
    kinds = lambda params: jax.tree.map_with_path(  # noqa: E731
        lambda path, _: "muon" if path[-1].key in MATRICES else "adam", params
    )
    rest = adam(lambda step: config.embedding_multiplier * schedule(step), weight_decay=0.0)
    return optax.chain(clip, optax.partition({"muon": muon, "adam": rest}, kinds))


def make_mesh(data: int, fsdp: int, tensor: int) -> Mesh:
    """Mesh over ("data", "fsdp", "tensor"); data = -1 takes what the others leave. ValueError if too large."""
    count, others = jax.device_count(), fsdp * tensor
    fits = min(fsdp, tensor) >= 1 and (count % others == 0 if data == -1 else 1 <= data <= count // others)
    require(fits, f"a mesh of data={data} x fsdp={fsdp} x tensor={tensor} does not fit {count} devices")
    devices = np.asarray(jax.devices()[: count if data == -1 else data * others])
    return Mesh(devices.reshape(-1, fsdp, tensor), ("data", "fsdp", "tensor"))


def state_shardings(mesh: Mesh, optimizer: optax.GradientTransformation, params: typing.Any) -> TrainState:
    """A TrainState of shardings: parameters by `model.param_spec`, their moments alike, the rest replicated."""
    shapes = jax.eval_shape(functools.partial(new_state, optimizer), params)
    return jax.tree.map_with_path(lambda path, _: NamedSharding(mesh, param_spec(path)), shapes)


def init_params(model: Decoder, key: Array) -> typing.Any:
    """Random parameters (float32)."""
    one = jnp.zeros((1, 1), jnp.int32)
    return model.init(key, one, one, one + 1)["params"]


def state_from_key(model: Decoder, optimizer: optax.GradientTransformation, mesh: Mesh, key: Array) -> TrainState:
    """A fresh state, born with its shardings."""

    def create(key: Array) -> TrainState:
        """A state with random parameters."""
        return new_state(optimizer, init_params(model, key))

    shardings = state_shardings(mesh, optimizer, jax.eval_shape(create, key).params)
    return jax.jit(create, out_shardings=shardings)(key)


def new_state(optimizer: optax.GradientTransformation, params: typing.Any) -> TrainState:
    """A state at step 0 with these parameters."""
    return TrainState(params, optimizer.init(params), jnp.int32(0))


def state_from_params(optimizer: optax.GradientTransformation, mesh: Mesh, params: typing.Any) -> TrainState:
    """A state at step 0 on a mesh, from host arrays: how GRPO starts from SFT, and SFT from another run."""
    shardings = state_shardings(mesh, optimizer, params)
    return jax.jit(functools.partial(new_state, optimizer), out_shardings=shardings)(params)


def token_stats(model: Decoder, params: typing.Any, batch: TokenBatch, temperature: float = 1.0) -> TokenStats:
    """Log-prob, entropy and rank of every token of the batch, under the policy of a temperature."""
    logits, _ = model.apply({"params": params}, batch.tokens, batch.positions, batch.until)
    logits = logits / temperature
    fixed = jax.lax.stop_gradient(logits[:, :-1])  # entropy and rank are metrics only: no gradient
    logsum = jax.nn.logsumexp(fixed, axis=-1)
    entropy = logsum - jnp.sum(jnp.exp(fixed - logsum[..., None]) * fixed, axis=-1)
    top = jnp.argmax(fixed, axis=-1) == batch.tokens[:, 1:]
    first = ((0, 0), (1, 0))
    return TokenStats(token_logprobs(logits, batch.tokens), jnp.pad(entropy, first), jnp.pad(top, first))


def make_train_step(
    model: Decoder, optimizer: optax.GradientTransformation, loss_fn: LossFn, mesh: Mesh, temperature: float = 1.0
) -> Callable[[TrainState, TokenBatch], tuple[TrainState, dict[str, Array], Array]]:
    """Compiles `train_step` for a mesh and the policy of a temperature.

    The compiled function takes a state, which it donates, and a batch with fields [M, R, T]. It returns the next
    state, the metrics of the step, and the log-prob [M, R, T] of every token under the old parameters. Metrics:
    loss, grad_norm, tokens (sampled), token_accuracy and entropy (means over sampled tokens), and the sums of what the
    loss reports.
    """

    def loss_sum(params: typing.Any, batch: TokenBatch) -> tuple[Array, tuple[dict[str, Array], Array]]:
        """The loss of a micro-batch [R, T], the sums of its metrics, and the log-prob of every token."""
        out = token_stats(model, params, batch, temperature)
        loss_RT, extra = loss_fn(out, batch)
        sampled = batch.sampled.astype(jnp.float32)
        sums = {"tokens": sampled, "token_accuracy": out.is_argmax * sampled, "entropy": out.entropy * sampled, **extra}
        return loss_RT.sum(), ({name: value.sum() for name, value in sums.items()}, out.logp)

    def train_step(state: TrainState, batches: TokenBatch) -> tuple[TrainState, dict[str, Array], Array]:
        """One update on micro-batches [M, R, T]."""

        def micro(m: Array | int) -> typing.Any:
            """Gradient and sums of micro-batch m, and the log-prob [R, T] of its tokens."""
            batch = TokenBatch(*(field[m] for field in batches))
            (loss, (sums, logp_RT)), grads = jax.value_and_grad(loss_sum, has_aux=True)(state.params, batch)
            return (grads, {"loss": loss, **sums}), logp_RT

        def add(m: Array, so_far: typing.Any) -> typing.Any:
            """Adds micro-batch m to the gradient and the sums so far, and enters its log-probs."""
            total, logp_MRT = so_far
            new, logp_RT = micro(m)
            return jax.tree.map(jnp.add, total, new), logp_MRT.at[m].set(logp_RT)

        if batches.tokens.shape[0] == 1:
            (grads, sums), logp_RT = micro(0)
            logp_MRT = logp_RT[None]
        else:
            zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(micro, 0)[0])
            start = zeros, jnp.zeros(batches.tokens.shape, jnp.float32)
            (grads, sums), logp_MRT = jax.lax.fori_loop(0, _num_nonempty(batches), add, start)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        tokens = jnp.maximum(sums["tokens"], 1)
        means = {name: sums[name] / tokens for name in ("token_accuracy", "entropy")}
        metrics = {**sums, **means, "grad_norm": optax.tree.norm(grads)}
        return TrainState(params, opt_state, state.step + 1), metrics, logp_MRT

    shapes = jax.eval_shape(lambda key: init_params(model, key), jax.random.key(0))
    shardings = state_shardings(mesh, optimizer, shapes)
    compiled = jax.jit(
        train_step,
        donate_argnums=0,
        in_shardings=(shardings, TokenBatch(*[NamedSharding(mesh, ROWS)] * len(TokenBatch._fields))),
        out_shardings=(shardings, *[NamedSharding(mesh, PartitionSpec())] * 2),
    )
    return lambda state, batches: compiled(state, _shard(batches, mesh))


def _shard(batches: TokenBatch, mesh: Mesh) -> TokenBatch:
    """Host arrays [M, R, T], the same in every process, on the devices of the mesh."""
    rows = NamedSharding(mesh, ROWS)
    return TokenBatch(*(jax.make_array_from_callback(field.shape, rows, field.__getitem__) for field in batches))


def _num_nonempty(batches: TokenBatch) -> Array:
    """Number of micro-batches up to the last that trains on anything; `packing.pad_microbatches` adds empty ones."""
    busy_M = jnp.any(batches.sampled, axis=(1, 2))
    return jnp.max(jnp.where(busy_M, jnp.arange(1, busy_M.shape[0] + 1), 0))


def make_score(model: Decoder, mesh: Mesh, temperature: float = 1.0) -> Callable[[typing.Any, TokenBatch], Array]:
    """Compiles (params, batch [M, R, T]) -> log-prob of every token [M, R, T]; empty micro-batches are skipped."""

    def score(params: typing.Any, batches: TokenBatch) -> Array:
        """Log-prob of every token of micro-batches [M, R, T]."""
        used = _num_nonempty(batches)

        def one(m: Array, logp: Array) -> Array:
            """Enters the log-probs of micro-batch m."""
            batch = TokenBatch(*(field[m] for field in batches))
            return logp.at[m].set(token_stats(model, params, batch, temperature).logp)

        return jax.lax.fori_loop(0, used, one, jnp.zeros(batches.tokens.shape, jnp.float32))

    compiled = jax.jit(score, out_shardings=NamedSharding(mesh, PartitionSpec()))
    return lambda params, batches: compiled(params, _shard(batches, mesh))

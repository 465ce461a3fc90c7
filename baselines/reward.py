"""Rewards of partial solutions: exact, learned, or of no use. A step is a line of a direct solution.

  oracle   1 if the target can still be reached from the numbers left, else 0: exact search says so.
  learned  a scalar head on the final hidden state of a decoder at the end of the line.
  random   a number that depends on the text alone.

Training the learned one, the process reward model of REBASE (arXiv 2408.00724):

  1. The policy solves training problems at temperature 1.
  2. Every end of a line is an example, its label the oracle's. Math-Shepherd (arXiv 2312.08935) estimates the same
     label from further samples.
  3. Binary cross-entropy. The head starts at 0, so that it says one half of everything.

The reward model starts as the policy's own decoder, and all of it is trained. A head on the frozen decoder tells less.
Measured once, with 1,500 samples of a policy in mid-training: on validation problems scores rank two states in the
right order in 61 % of cases (linear head, frozen), 65 % (one hidden layer, frozen) or 73 % (all trained).

Deviations from the paper: labels are exact, and the reward model has the policy's size.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import pathlib
import random
import typing
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

import records
import solver
from countdown.grader import Problem, replay
from countdown.language import END_ID, GOAL_TEXT, parse
from countdown.task import Countdown
from harness import files
from harness.build import Parts
from harness.checkpoints import Checkpoints
from harness.cli import Progress, UsageError
from harness.evaluation import fingerprint
from harness.rollouts import RolloutPool
from model import Decoder
from protocols import Request
from records import Call, Grade, Thread

State = tuple[Problem, list[int]]  # a problem, and the ids of its prompt and of some lines
Reward = Callable[[Sequence[State]], list[float]]
ROWS, LENGTH = 64, 16  # rows of a device call, whose length is a multiple of 16 ids
SAMPLES, VALIDATION = 4000, 300  # problems that are sampled for training, and to say how good it is
UPDATES, RATE, LOG_EVERY = 400, 1e-3, 25  # of Adam, whose rate falls to 0


def step_ids(task: Countdown) -> tuple[int, ...]:
    """Ids that end a step: those that end a line, but the goal's line ends with the thread."""
    texts = {i: task.tokenizer.decode([i]) for i in range(task.tokenizer.vocab_size)}
    return (END_ID, *(i for i, text in texts.items() if text.endswith("\n") and text != GOAL_TEXT))


def graded(task: Countdown, problem: Problem, ids: Sequence[int]) -> Grade:
    """The verdict on a solution, prompt included."""
    stop = records.END if ids[-1] == END_ID else records.THREAD_TOKENS
    return task.grade(problem, Thread((), [Call(0, list(ids), stop=stop)]))


def reachable(problem: Problem, text: str) -> bool:
    """Whether the target can still be reached after the lines of a direct solution, the first line its prompt."""
    try:
        _, *lines = parse(text)
    except ValueError:
        return False
    left, error = replay(problem, [line.operation for line in lines])
    if error or any(line.kind != "explore" for line in lines):
        return False
    return left == [problem.target] or solver.solvable(left, problem.target)


def oracle(task: Countdown, states: Sequence[State]) -> list[float]:
    """1 where the target can still be reached, and for a finished solution where it is right; else 0."""
    return [
        float(
            graded(task, problem, ids).correct if ids[-1] == END_ID else reachable(problem, task.tokenizer.decode(ids))
        )
        for problem, ids in states
    ]


def lots(seed: int, states: Sequence[State]) -> list[float]:
    """Numbers in 0..1 that the seed and the ids fix."""
    return [random.Random(f"{seed} {ids}").random() for _, ids in states]


# ------------------------------------------------------------------- the learned reward


class Batch(typing.NamedTuple):
    """Solutions as rows, padded at the end."""

    ids_RT: np.ndarray
    label_RT: np.ndarray  # float32: at the end of a step whether the target can still be reached
    is_end_RT: np.ndarray  # bool: whether a label is there


def start(model: Decoder, params: typing.Any) -> typing.Any:
    """A reward model: the policy's decoder and a head of zeros."""
    return {"decoder": params, "head": {"weight": np.zeros(model.config.width, np.float32), "bias": np.float32(0)}}


def plain(model: Decoder) -> Decoder:
    """The decoder without what is of training on an accelerator alone."""
    return Decoder(dataclasses.replace(model.config, attention="blocks", scan_layers=False))


def logits(model: Decoder, reward: typing.Any, ids_RT: Array) -> Array:
    """Log-odds float32 [R, T] that the target can still be reached, were a step to end at the id."""
    positions_RT = jnp.broadcast_to(jnp.arange(ids_RT.shape[1]), ids_RT.shape)
    until_RT = jnp.full_like(ids_RT, ids_RT.shape[1])
    final = lambda module, _: module.name == "final_norm"  # noqa: E731
    _, seen = model.apply(
        {"params": reward["decoder"]},
        *(ids_RT, positions_RT, until_RT),
        capture_intermediates=final,
        mutable=["intermediates"],
    )
    hidden_RTD = seen["intermediates"]["final_norm"]["__call__"][0].astype(jnp.float32)
    return hidden_RTD @ reward["head"]["weight"] + reward["head"]["bias"]


_logits = jax.jit(logits, static_argnums=0)


def padded(rows: Sequence[Sequence[int]], count: int, context: int) -> np.ndarray:
    """int32 [count, T] with the rows first; T is a multiple of `LENGTH`, or the context."""
    ids_RT = np.zeros((count, min(context, -(-max(map(len, rows)) // LENGTH) * LENGTH)), np.int32)
    for i, ids in enumerate(rows):
        ids_RT[i, : len(ids)] = ids
    return ids_RT


def learned(model: Decoder, reward: typing.Any, states: Sequence[State]) -> list[float]:
    """The probability, as the model sees it, that the target can still be reached. Equal texts are fed once."""
    texts = list(dict.fromkeys(tuple(ids) for _, ids in states))
    found: dict[tuple[int, ...], float] = {}
    for first in range(0, len(texts), ROWS):
        chunk = texts[first : first + ROWS]
        logits_RT = np.asarray(_logits(plain(model), reward, padded(chunk, ROWS, model.config.context)))
        for ids, row in zip(chunk, logits_RT, strict=False):
            found[ids] = float(1 / (1 + np.exp(-row[len(ids) - 1])))
    return [found[tuple(ids)] for _, ids in states]


def examples(pool: RolloutPool, params: typing.Any, problems: Sequence[Problem]) -> Batch:
    """One sample of each problem, with a label at every end of a step."""
    task = typing.cast(Countdown, pool.parts.domain.task)
    ends = {*step_ids(task)}
    requests = [Request(problem, index) for index, problem in enumerate(problems)]
    rollouts = pool.run(params, 1.0, requests, (pool.parts.evaluation.seed,))
    ids_RT = padded([rollout.root.ids() for rollout in rollouts], len(rollouts), pool.parts.model.config.context)
    label_RT, is_end_RT = np.zeros(ids_RT.shape, np.float32), np.zeros(ids_RT.shape, bool)
    for i, rollout in enumerate(rollouts):
        ids, prompt = rollout.root.ids(), len(task.prompt(rollout.problem))
        where = [place for place in range(prompt, len(ids)) if ids[place] in ends]
        is_end_RT[i, where] = True
        label_RT[i, where] = oracle(task, [(rollout.problem, ids[: place + 1]) for place in where])
    return Batch(ids_RT, label_RT, is_end_RT)


def losses(model: Decoder, reward: typing.Any, batch: Batch) -> tuple[Array, Array]:
    """Mean binary cross-entropy over the ends of steps, and the share of them on the right side of one half."""
    logits_RT = logits(model, reward, jnp.asarray(batch.ids_RT))
    entropy_RT = optax.sigmoid_binary_cross_entropy(logits_RT, batch.label_RT)
    count = jnp.maximum(batch.is_end_RT.sum(), 1)
    right_RT = ((logits_RT > 0) == (batch.label_RT > 0)) & batch.is_end_RT
    return (entropy_RT * batch.is_end_RT).sum() / count, right_RT.sum() / count


def fit(
    model: Decoder, reward: typing.Any, batch: Batch, updates: int, on_update: Callable[[int, float, float], None]
) -> typing.Any:
    """The reward model after so many updates of Adam on rows drawn by lot; `on_update` gets loss and accuracy."""
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(optax.cosine_decay_schedule(RATE, updates)))

    @jax.jit
    def update(reward: typing.Any, moments: typing.Any, batch: Batch) -> tuple[typing.Any, ...]:
        """One update."""
        value, gradient = jax.value_and_grad(functools.partial(losses, model), has_aux=True)(reward, batch)
        changes, moments = optimizer.update(gradient, moments)
        return optax.apply_updates(reward, changes), moments, value

    moments, rng = optimizer.init(reward), np.random.default_rng(0)
    for number in range(updates):
        rows = rng.integers(len(batch.ids_RT), size=ROWS)
        reward, moments, value = update(reward, moments, Batch(*(field[rows] for field in batch)))
        on_update(number + 1, *map(float, value))
    return reward


def train(pool: RolloutPool, params: typing.Any, workdir: pathlib.Path, seed: int) -> dict[str, typing.Any]:
    """Trains a reward model on samples of the policy, keeps it in WORKDIR/reward, and says how good it is."""
    parts = pool.parts
    model, domain = plain(parts.model), parts.domain
    batch = examples(pool, params, [domain.problem("train", seed, index) for index in range(SAMPLES)])
    with contextlib.closing(Progress(UPDATES, 0, "update")) as progress:

        def on_update(number: int, loss: float, accuracy: float) -> None:
            """Shows how far it is."""
            every = number % LOG_EVERY == 0
            progress.update(number, f"loss {loss:.4f}  accuracy {accuracy:.4f}" if every else None)

        reward = fit(model, start(model, params), batch, UPDATES, on_update)
    held = examples(pool, params, parts.validation_set()[:VALIDATION])
    loss, accuracy = map(float, jax.jit(losses, static_argnums=0)(model, reward, held))
    good = float(held.label_RT.sum() / held.is_end_RT.sum())
    values = {"parameters": fingerprint(params), "loss": loss, "accuracy": accuracy, "reachable": good}
    folder = Checkpoints(workdir.absolute() / "reward", "params", "result")
    folder.save(UPDATES, reward, values)
    return {"reward": str(workdir / "reward"), **values}


def load(workdir: pathlib.Path, parts: Parts, params: typing.Any) -> typing.Any:
    """The reward model of a policy. Raises UsageError if there is none, or if it is damaged or another policy's."""
    folder = Checkpoints(workdir.absolute() / "reward", "params", "result")
    remedy = f"train one with `python -m baselines.rebase --workdir={workdir} --train_reward`"
    if not folder.steps():
        raise UsageError(f"{workdir} holds no learned reward: {remedy}")
    if wrong := files.damage(folder.path / str(folder.steps()[-1])):
        raise UsageError(f"{wrong}: {remedy}")
    like = jax.tree.map(lambda leaf: np.empty(np.shape(leaf), np.float32), start(parts.model, params))
    reward, values = folder.load(folder.steps()[-1], like)
    if values["parameters"] != fingerprint(params):
        raise UsageError(f"the learned reward in {workdir} is of other parameters than its best: {remedy}")
    return reward

"""Standing one-line breakages of the code, each of which some named test file must catch.

    python -m tests.mutants                # all, one at a time; exit status 1 if one survives
    python -m tests.mutants grpo model     # those whose file or name holds one of these words
    python -m tests.mutants --list

  1. Copy the repository into a temporary folder.
  2. Replace the old text by the new one, and run the test files named for the mutant (-x, the quick tier).
  3. A failing test has caught it, or the code no longer starts. Put the file back.

Before that, the named tests must pass as the code stands.

The list starts with those that once survived. `tests/mutants_test.py` holds every old text to its file, so that a
mutant goes along when the code changes.
"""

from __future__ import annotations

import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
import typing

ROOT = pathlib.Path(__file__).resolve().parents[1]
MINUTES = 10  # a mutant that makes the tests run for ever is caught
SKIPPED = shutil.ignore_patterns(".git", "runs", "__pycache__", ".*_cache", ".venv", ".hypothesis")


class Mutant(typing.NamedTuple):
    """`old`, which occurs once in `file`, becomes `new`; `tests` are arguments of pytest."""

    name: str
    file: str
    old: str
    new: str
    tests: str


GRPO = "tests/grpo_step_test.py"
LOOP = "tests/harness/loop_test.py"
RUNTIME = "tests/parallel_runtime_test.py"
MODEL = "tests/model_test.py"
SAMPLER = "tests/sampler_test.py"
STATE = "tests/train_state_test.py"
PACKING = "tests/packing_test.py"
LOSS = "tests/grpo_test.py"
STATS = "tests/harness/stats_test.py"
SOLVER = "tests/solver_test.py"
TASK = "tests/countdown/task_test.py"
WORKDIR = "tests/harness/workdir_test.py"
FILES = "tests/harness/files_test.py"
EXPORTS = "tests/harness/huggingface_test.py -k bit_for_bit or hand or added or read_back"
SFT = "tests/sft_test.py"

MUTANTS = [
    # Those that survived once.
    Mutant("dropped groups stay", "grpo.py", 'if config.dead_groups != "keep":', 'if config.dead_groups == "refill":', GRPO),
    Mutant("one inner update", "grpo.py", "range(config.updates - 1)", "range(0)", GRPO),
    Mutant("no cap of the weights", "grpo.py", "np.minimum(ratio, config.tis_cap)", "ratio", GRPO),
    Mutant("the sampler's log-probs", "grpo.py", 'if config.old_logp == "trainer":', "if False:", GRPO),
    Mutant("the reference moves", "grpo.py", "self.score(self.reference.params, batch)) if", "self.score(state.params, batch)) if", GRPO),
    Mutant("clipped share of rows", "grpo.py", 'float(metrics["clipped"] / tokens)', 'float(1 - metrics["clipped"] / tokens)', GRPO),
    Mutant("the first of equal bests", "harness/loop.py", 'accuracy >= extra["best"]', 'accuracy > extra["best"]', LOOP),
    Mutant("the worst is best", "harness/loop.py", 'accuracy >= extra["best"]', 'accuracy <= extra["best"] or extra["best"] < 0', LOOP),
    Mutant("infinite goes on", "harness/loop.py", "if not math.isfinite(value)", "if math.isnan(value)", LOOP),
    Mutant("nothing stops", "harness/loop.py", "if bad := [", "if False and [", LOOP),
    Mutant("evicts at half", "parallel_runtime.py", "busy_enough = len(self.active) >= EVICT", "busy_enough = len(self.active) > EVICT", RUNTIME),
    Mutant("scores in bfloat16", "model.py", 's = jnp.einsum("RTKGH,RSKH->RKGTS", q_RTKGH, k_RSKH, preferred_element_type=jnp.float32)', 's = jnp.einsum("RTKGH,RSKH->RKGTS", q_RTKGH, k_RSKH)', MODEL),
    Mutant("scores of blocks in bfloat16", "model.py", 's_GQS = jnp.einsum("GQH,SH->GQS", q_GQH, k_SH, preferred_element_type=jnp.float32)', 's_GQS = jnp.einsum("GQH,SH->GQS", q_GQH, k_SH)', MODEL),
    Mutant("norms in bfloat16", "model.py", "x = x_RTD.astype(jnp.float32)", "x = x_RTD", MODEL),
    Mutant("logits in bfloat16", "model.py", "w_DV.astype(c.dtype), preferred_element_type=jnp.float32)", "w_DV.astype(c.dtype))", MODEL),
    Mutant("rewritten in place", "harness/files.py", 'part = path.with_name(f"{path.name}.{os.getpid()}{PART}")', "part = path", FILES),
    # Not measured before.
    Mutant("a rewind keeps an id too many", "sampler.py", "cached = min(self._rows[fill.row].cached, fill.keep)", "cached = min(self._rows[fill.row].cached, fill.keep + 1)", SAMPLER),
    Mutant("one id too many", "sampler.py", "min(fill.max_new_tokens, self.context - len(ids))", "fill.max_new_tokens", SAMPLER),
    Mutant("the tail of the step before", "decoding.py", "jnp.arange(config.steps_per_call) < burst.step", "jnp.arange(config.steps_per_call) < burst.step - 1", SAMPLER),
    Mutant("positions stand", "decoding.py", "positions_B1 = length_B[:, None] + burst.step", "positions_B1 = length_B[:, None] + 0 * burst.step", SAMPLER),
    Mutant("the limit plus one", "decoding.py", "count_B >= limit_B", "count_B > limit_B", SAMPLER),
    Mutant("one draw per burst", "decoding.py", "key_B2, drawn_B + burst.step, config)", "key_B2, drawn_B, config)", SAMPLER),
    Mutant("zero draws the first", "decoding.py", "return 1 - jax.random.uniform", "return jax.random.uniform", SAMPLER),
    Mutant("impossible ids", "decoding.py", "jnp.where(p_BV > 0, jnp.cumsum(p_BV, axis=-1), -1)", "jnp.cumsum(p_BV, axis=-1)", SAMPLER),
    Mutant("no top-p", "decoding.py", "if config.top_p < 1:", "if config.top_p < 0:", SAMPLER),
    Mutant("log-probs at temperature 1", "decoding.py", "jax.nn.log_softmax(logits_BV / (config.temperature or 1.0))", "jax.nn.log_softmax(logits_BV)", SAMPLER),
    Mutant("old parameters", "sampler.py", "self._params = jax.device_put(cast(params", "self._params = getattr(self, '_params', None) or jax.device_put(cast(params", SAMPLER),
    Mutant("keys of threads alike", "parallel_runtime.py", "request.index, tuple(path))", "request.index)", RUNTIME),
    Mutant("children share all", "parallel_runtime.py", "(live.allowance - live.sampled()) // parts", "live.allowance - live.sampled()", RUNTIME),
    Mutant("nothing is given back", "parallel_runtime.py", "live.allowance += joined.unused", "live.allowance += 0", RUNTIME),
    Mutant("joins the youngest", "parallel_runtime.py", "joined = live.unjoined.pop(0)", "joined = live.unjoined.pop()", RUNTIME),
    Mutant("the rollout ends with its root", "parallel_runtime.py", "if not self.running[live.number]:", "if siblings is None:", RUNTIME),
    Mutant("the join token stays", "parallel_runtime.py", "self._wait(live, len(live.thread.ids()) - 1)", "self._wait(live, len(live.thread.ids()))", RUNTIME),
    Mutant("never late", "records.py", "max(now, running.pop(0)) if", "running.pop(0) if", RUNTIME),
    Mutant("joins one too late", "countdown/asynchronous.py", "if len(self.goals) > self.rules.unjoined:", "if len(self.goals) > self.rules.unjoined + 1:", "tests/countdown/asynchronous_test.py"),
    Mutant("deeper by one", "parallel_runtime.py", "if len(thread.path) // 2 >= limits.depth:", "if len(thread.path) // 2 > limits.depth:", RUNTIME),
    Mutant("one child too many", "parallel_runtime.py", "if len(spawn.prompts) > limits.children:", "if len(spawn.prompts) > limits.children + 1:", RUNTIME),
    Mutant("joins too early", "parallel_runtime.py", "if siblings.waiter and not siblings.running:", "if siblings.waiter and siblings.running <= 1:", RUNTIME),
    Mutant("sees the future", "model.py", "(i[None, None, :] <= i[None, :, None])", "(i[None, None, :] <= i[None, :, None] + 1)", MODEL),
    Mutant("sees what was rewound", "model.py", "((j <= i) & (i < until_T[None, :stop]))", "((j <= i) & (i <= until_T[None, :stop]))", MODEL),
    Mutant("embeddings enter small", "model.py", ".astype(c.dtype) * c.width**0.5", ".astype(c.dtype)", MODEL),
    Mutant("gradient without its mean", "model.py", "checkpoint_name(p_GQS.sum(axis=-1, keepdims=True), KEPT)", "jax.lax.stop_gradient(p_GQS.sum(axis=-1, keepdims=True))", MODEL),
    Mutant("the spawn block stays", "packing.py", "memory = memory[: call.keep]", "memory = memory", PACKING),
    Mutant("context is trained on", "packing.py", "batch.weight[row, span] = calls >= 0", "batch.weight[row, span] = calls >= -1", PACKING),
    Mutant("the advantage everywhere", "packing.py", "segment.advantage * batch.sampled[row, span]", "segment.advantage", PACKING),
    Mutant("until of the row", "packing.py", "np.asarray(segment.until, np.int32) + span.start", "np.asarray(segment.until, np.int32)", PACKING),
    Mutant("one micro-batch less", "train_state.py", "jnp.arange(1, busy_M.shape[0] + 1), 0)", "jnp.arange(0, busy_M.shape[0]), 0)", STATE),
    Mutant("temperature left out", "train_state.py", "logits = logits / temperature", "logits = logits * 1.0", GRPO),
    Mutant("ties are right", "train_state.py", "top = jnp.argmax(fixed, axis=-1) == batch.tokens[:, 1:]", "top = jnp.take_along_axis(fixed, batch.tokens[:, 1:, None], axis=-1)[..., 0] >= fixed.max(axis=-1)", STATE),
    Mutant("decay of norms", "train_state.py", "lambda leaf: leaf.ndim > 1, params)", "lambda leaf: leaf.ndim > 0, params)", STATE),
    Mutant("no clipping", "train_state.py", "clip = optax.clip_by_global_norm(config.clip)", "clip = optax.identity()", STATE),
    Mutant("log-probs that are not looked at", "grpo.py", '"sampled_logprob": float(np.mean(logprobs)),', "", "tests/grpo_train_test.py"),
    Mutant("no spread", "objective.py", "return centred(rewards_PG) / (rewards_PG.std(axis=1, keepdims=True) + 1e-6)", "return centred(rewards_PG)", LOSS),
    Mutant("the larger of the two", "objective.py", "policy = -jnp.minimum(", "policy = -jnp.maximum(", LOSS),
    Mutant("the penalty turned round", "objective.py", "batch.ref_logp - out.logp, 0.0))", "out.logp - batch.ref_logp, 0.0))", LOSS),
    Mutant("clipped below alone", "objective.py", "jnp.clip(ratio, 1 - config.clip_low, 1 + config.clip_high)", "jnp.clip(ratio, 1 - config.clip_low, None)", LOSS),
    Mutant("a call's weight in its rollout", "objective.py", "return 1 / (own.tokens * own.calls * batch.calls),", "return 1 / (own.tokens * batch.calls),", LOSS),
    Mutant("the bonus of the wrong", "objective.py", "earned = right if grade.correct else config.format_reward * bool(grade.answer)", "earned = right if grade.correct else right - 1", LOSS),
    Mutant("structure after its time", "objective.py", "return max(0.0, 1 - (step - 1) / (share * steps))", "return abs(1 - (step - 1) / (share * steps))", LOSS),
    Mutant("children get credit", "objective.py", "return [rollout.root]", "return rollout.threads()", LOSS),
    Mutant("threads weigh by length", "objective.py", "weight = 1 / (own.thread * own.threads * batch.rollouts)", "weight = 1 / (own.tokens * own.threads * batch.rollouts)", LOSS),
    Mutant("away from the advantage", "objective.py", "aim = config.apa_lambda * batch.advantage + batch.ref_logp", "aim = batch.ref_logp - config.apa_lambda * batch.advantage", LOSS),
    Mutant("a rising reward moves the reference", "harness/reference.py", "mean <= self._before", "mean >= self._before", "tests/harness/reference_test.py"),
    Mutant("a mean of all ids", "sft.py", "batch.weight / batch.sampled.sum()", "batch.weight / batch.sampled.size", SFT + " -k weights_of_every_batch"),
    Mutant("division with a rest", "countdown/grader.py", 'and (b == 0 or a % b):', 'and b == 0:', SOLVER),
    Mutant("numbers used twice", "countdown/grader.py", "available.remove(operand)", "available.count(operand)", SOLVER),
    Mutant("unused numbers", "countdown/grader.py", "if len(available) > 1:", "if len(available) > 2:", SOLVER),
    Mutant("any end will do", "countdown/grader.py", "if available[0] != problem.target:", "if False:", SOLVER),
    Mutant("a child twice", "countdown/task.py", "if node in nodes[:i]:", "if False:", TASK),
    Mutant("another's path", "countdown/task.py", "or not parts[1].startswith(first_line):", "or False:", TASK),
    Mutant("a narrower interval", "harness/stats.py", "spread / (4 * n))", "spread / (8 * n))", STATS),
    Mutant("pass with replacement", "harness/stats.py", "math.comb(samples - correct, k) / math.comb(samples, k)", "(1 - correct / samples) ** k", STATS),
    Mutant("votes without an answer", "harness/stats.py", "for vote in votes if vote.grade.answer)", "for vote in votes)", STATS),
    Mutant("the variance of all", "harness/stats.py", "/ max(1, n - 1) / n)", "/ n / n)", STATS),
    Mutant("damage goes unseen", "harness/files.py", "if wanted.get(name) != found.get(name):", "if name not in found:", FILES),
    Mutant("a name twice among the checksums", "harness/files.py", " or json_bytes(wanted) != data:", ":", FILES),
    Mutant("what was added is damage", "harness/files.py", "wanted if added else wanted.keys()", "wanted.keys()", FILES),
    Mutant("rounded arrays stay rounded", "harness/huggingface.py", ' | _read_arrays(folder / EXACT)', "", EXPORTS),
    Mutant("an export that is not read back", "harness/huggingface.py", "if array.tobytes() != flat[name].tobytes():", "if False:", EXPORTS),
    Mutant("unsigned arrays", "harness/huggingface.py", "for name in _check(folder):", "for name in [path.name for path in folder.iterdir() if _check(folder)]:", EXPORTS),
    Mutant("norms of tied models as they are", "harness/llama.py", "1 / root if config.tied else 1.0", "1.0", EXPORTS),
    Mutant("no lock", "harness/files.py", "fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)", "fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)", FILES),
    Mutant("the log keeps what comes after", "harness/workdir.py", 'if line["step"] <= step]', "]", WORKDIR),
    Mutant("one state alone", "harness/checkpoints.py", "KEEP = 2", "KEEP = 1", WORKDIR),
    Mutant("any config.json will do", "harness/workdir.py", "match(config, str(file)", "str((config, str(file))", WORKDIR),
    Mutant("a run begins again over its best", "harness/workdir.py", "if not steps and self._best.steps():", "if False:", WORKDIR),
    Mutant("any change after a failure", "harness/workdir.py", r'return all(re.match(r"optimizer\.(?!matrices)", name) for name in changed) and', "return", WORKDIR),
    Mutant("a change long after a failure", "harness/workdir.py", "and steps[-1:] > saved[-1:]", "and bool(steps)", WORKDIR),
]


def status(tests: str, folder: pathlib.Path) -> int:
    """The status of pytest on some test files in a copy of the repository; 1 if they do not end."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests.split(" ", 2)]
    try:
        return subprocess.run(command, cwd=folder, capture_output=True, timeout=60 * MINUTES).returncode
    except subprocess.TimeoutExpired:
        return 1


def survives(mutant: Mutant, folder: pathlib.Path) -> bool:
    """Whether the tests named for a mutant pass in a copy of the repository where it is applied."""
    file = folder / mutant.file
    text = file.read_text()
    if text.count(mutant.old) != 1:
        raise ValueError(f"{mutant.file} holds {mutant.old!r} {text.count(mutant.old)} times, not once")
    file.write_text(text.replace(mutant.old, mutant.new))
    try:
        return status(mutant.tests, folder) in (0, 5)  # 5: no test was selected
    finally:
        file.write_text(text)


def main(words: list[str]) -> int:
    """Runs the mutants that the words choose; returns the exit status."""
    named = [word for word in words if word != "--list"]
    chosen = [m for m in MUTANTS if not named or any(word in f"{m.file} {m.name}" for word in named)]
    if "--list" in words:
        for mutant in chosen:
            print(f"{mutant.file}: {mutant.name}")
        return 0
    survivors = []
    with tempfile.TemporaryDirectory() as folder:
        copy = pathlib.Path(folder) / "copy"
        shutil.copytree(ROOT, copy, ignore=SKIPPED)
        for tests in dict.fromkeys(mutant.tests for mutant in chosen):
            if status(tests, copy):
                print(f"{tests} does not pass as the code stands: mend that first")
                return 1
        for number, mutant in enumerate(chosen, 1):
            began = time.monotonic()
            alive = survives(mutant, copy)
            survivors += [mutant] * alive
            verdict = "SURVIVES" if alive else "caught"
            print(f"{number}/{len(chosen)} {verdict:8} {mutant.file}: {mutant.name} ({time.monotonic() - began:.0f} s)", flush=True)
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} caught" + "".join(f"\nsurvives: {m.file}: {m.name}" for m in survivors))
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

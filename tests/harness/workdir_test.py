"""Runs on disk: what a workdir refuses and keeps, and bad commands, each one sentence before anything is written."""

import errno
import json
import os
import pathlib
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

import sft
from harness import files, migrate, results, workdir
from harness.cli import Progress, UsageError
from harness.workdir import Workdir

ROOT = pathlib.Path(__file__).resolve().parents[2]
SMOKE = ("--config=configs/apr.py:smoke", "--config.mesh.data=1")


def config(**values: object) -> ConfigDict:
    return ConfigDict({"seed": 0, "model": {"width": 8, "depth": 2}, **values})


def tree(value: float) -> dict[str, jax.Array]:
    return {"w": jnp.full((2, 3), float(value)), "n": jnp.int32(value)}


def contents(path: pathlib.Path) -> dict[str, bytes]:
    """Every file below a path."""
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


# ------------------------------------------------------------------- the directory


def test_a_new_workdir_holds_its_config(tmp_path):
    Workdir(tmp_path / "a" / "b", config())
    assert workdir.read_config(tmp_path / "a" / "b") == json.loads(config().to_json())
    assert workdir.read_config(tmp_path / "a" / "b")["model"] == {"width": 8, "depth": 2}


def test_every_flipped_bit_of_a_config_is_found(tmp_path):
    Workdir(tmp_path, config())
    file, whole = tmp_path / "config.json", workdir.read_config(tmp_path)
    data = file.read_bytes()
    for place in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[place // 8] ^= 1 << place % 8
        file.write_bytes(flipped)
        try:
            assert workdir.read_config(tmp_path) == whole  # as a blank that became a line feed
        except UsageError as error:
            assert "config.json" in str(error) and "restore it" in str(error)


def test_the_same_config_reopens_it(tmp_path):
    Workdir(tmp_path / "run", config()).log(3, {"loss": 1.5})
    Workdir(tmp_path / "run", config()).log(4, {"loss": 1.25})
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"step": 3, "loss": 1.5}, {"step": 4, "loss": 1.25}]


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (config(seed=1), ["seed=0 there, 1 here"]),
        (config(model={"width": 16, "depth": 3}), ["model.width=8 there, 16 here", "model.depth=2 there, 3 here"]),
        (config(extra=True), ["extra"]),
    ],
)
def test_another_config_is_refused_and_nothing_changes(tmp_path, other, words):
    Workdir(tmp_path / "run", config()).log(3, {"loss": 1.5})
    before = contents(tmp_path)
    with pytest.raises(UsageError, match=r"another configuration.*choose another --workdir") as caught:
        Workdir(tmp_path / "run", other)
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)
    assert contents(tmp_path) == before


def test_a_directory_that_is_no_run_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("do not lose me")
    with pytest.raises(UsageError, match="is not empty and holds no run: choose another --workdir"):
        Workdir(tmp_path, config())
    assert contents(tmp_path) == {"thesis.tex": b"do not lose me"}


def test_a_folder_of_someones_unfinished_downloads_is_refused(tmp_path):
    (tmp_path / "debian.iso.part").write_text("mine")
    with pytest.raises(UsageError, match="is not empty and holds no run"):
        Workdir(tmp_path, config())
    assert contents(tmp_path) == {"debian.iso.part": b"mine"}


def test_an_empty_directory_is_taken(tmp_path):
    Workdir(tmp_path, config())
    assert (tmp_path / "config.json").exists()


def test_a_path_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("mine")
    for path in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UsageError, match=r"file.*choose another --workdir"):
            Workdir(path, config())
    assert contents(tmp_path) == {"file": b"mine"}


def test_a_directory_without_write_permission_is_refused(tmp_path, monkeypatch):
    """`os.access` is asked, not the file system: the tests may run as root, whom nothing stops."""
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    with pytest.raises(UsageError, match="cannot be written: choose another --workdir"):
        Workdir(tmp_path / "run", config())
    assert not contents(tmp_path)


@pytest.mark.parametrize("text", ['{"seed": 0, ', "[]", "null", "[" * 9999, "\xff"])
def test_a_config_that_is_no_json_object_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text, "latin-1")
    with pytest.raises(UsageError, match=r"config.json"):
        Workdir(tmp_path, config())
    with pytest.raises(UsageError, match=r"config.json"):
        workdir.read_config(tmp_path)


def test_reading_a_config_that_is_not_there_names_the_command(tmp_path):
    with pytest.raises(UsageError, match=r"no config\.json.*python sft\.py --workdir="):
        workdir.read_config(tmp_path)


# ------------------------------------------------------------------- checkpoints


def test_a_state_comes_back_with_its_extra_data(tmp_path):
    assert Workdir(tmp_path, config()).restore(tree(0)) is None
    Workdir(tmp_path, config()).save(5, tree(1 / 3), {"cursor": [3, 1], "best": 0.1})
    restored = Workdir(tmp_path, config()).restore(tree(0))
    assert restored is not None
    jax.tree.map(np.testing.assert_array_equal, restored[0], tree(1 / 3))
    assert restored[1] == {"cursor": [3, 1], "best": 0.1}


def test_a_run_without_its_checkpoints_is_not_begun_again(tmp_path):
    """A shipped run is one: to train over its log and its best parameters would lose them."""
    run = Workdir(tmp_path, config())
    run.log(3, {"loss": 1.5})
    run.save_best(3, {"w": jnp.zeros(2)}, {})
    before = contents(tmp_path)
    with pytest.raises(UsageError, match="without its checkpoints: choose another --workdir"):
        Workdir(tmp_path, config()).restore(tree(0))
    assert contents(tmp_path) == before


def test_best_parameters_found_again_replace_later_ones(tmp_path):
    """Saved at 20 by a run that then had to go on from the state of 5."""
    run = Workdir(tmp_path, config())
    for step, value in ((20, 1.0), (10, 2.0)):
        run.save_best(step, {"w": jnp.full(2, value)}, {})
    params, result = workdir.load_best(tmp_path, {"w": jnp.zeros(2)})
    assert result["step"] == 10 and params["w"].tolist() == [2.0, 2.0]


def test_the_last_two_states_are_kept_and_the_latest_is_restored(tmp_path):
    run = Workdir(tmp_path, config())
    for step in (5, 10, 15):
        run.save(step, tree(step), {})
    restored = Workdir(tmp_path, config()).restore(tree(0))
    assert restored is not None and int(restored[0]["n"]) == 15
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"10", "15"}


def test_restoring_drops_the_log_after_the_checkpoint(tmp_path):
    run = Workdir(tmp_path, config())
    for step in (1, 2, 2, 3):
        run.log(step, {"loss": step})
    run.save(2, tree(2), {})
    Workdir(tmp_path, config()).restore(tree(0))
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2, 2]


def test_a_run_that_was_killed_before_its_first_checkpoint_forgets_its_log(tmp_path):
    """Of step 0 too, which reinforcement learning validates."""
    Workdir(tmp_path, config()).log(0, {"validation_accuracy": 0.5})
    assert Workdir(tmp_path, config()).restore(tree(0)) is None
    assert (tmp_path / "metrics.jsonl").read_text() == ""


def test_a_kill_while_the_log_is_written_again_loses_none_of_it(tmp_path, monkeypatch):
    run = Workdir(tmp_path, config())
    for step in (1, 2, 3):
        run.log(step, {"loss": step})
    run.save(2, tree(2), {})
    before = (tmp_path / "metrics.jsonl").read_bytes()
    monkeypatch.setattr(os, "replace", lambda *_: pytest.fail("killed"))
    monkeypatch.setattr(pathlib.Path, "write_text", lambda *_: pytest.fail("rewritten in place"))
    with pytest.raises(pytest.fail.Exception, match="killed"):
        Workdir.restore(run, tree(0))
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("line", [b"[1]", b'{"loss": 1}', b'{"step": "1"}', b"\xff", b'{"step": 1', b"", b"[" * 9999])
def test_a_damaged_line_of_the_log_is_named(tmp_path, line):
    run = Workdir(tmp_path, config())
    run.save(2, tree(2), {})
    (tmp_path / "metrics.jsonl").write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 2}\n')
    with pytest.raises(UsageError, match=r"metrics.jsonl, line 2, is damaged: restore the file, or remove that line"):
        run.restore(tree(0))
    assert line in (tmp_path / "metrics.jsonl").read_bytes()


# ------------------------------------------------------------------- damage

DAMAGES = {
    "flipped": lambda data: data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 16]) + data[len(data) // 2 + 1 :],
    "cut": lambda data: data[: len(data) // 2],
    "emptied": lambda data: b"",
    "missing": lambda data: None,
}


def each_damage(folder: pathlib.Path) -> Iterator[pathlib.Path]:
    """Damages every file below a folder in every way, one after another, and mends it again."""
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        data = file.read_bytes()
        for damage in DAMAGES.values():
            if (damaged := damage(data)) is None:
                file.unlink()
            elif damaged == data:
                continue
            else:
                file.write_bytes(damaged)
            yield file
            file.write_bytes(data)


def test_a_damaged_best_is_one_sentence_that_names_file_and_remedy(tmp_path):
    run = Workdir(tmp_path, config())
    for step in (5, 10):
        run.save_best(step, tree(step), {})
    cases = 0
    for file in each_damage(tmp_path / "best" / "10"):
        with pytest.raises(UsageError) as caught:
            workdir.load_best(tmp_path, tree(0))
        named = file.name in str(caught.value) or file.name == files.CHECKSUMS  # whose damage looks like that of others
        assert named and "\n" not in str(caught.value), file
        assert "remove" in str(caught.value) or "harness.migrate" in str(caught.value), file
        cases += 1
    assert cases > 20
    (tmp_path / "best" / "10").rename(tmp_path / "elsewhere")  # the remedy
    assert workdir.load_best(tmp_path, tree(0))[1]["step"] == 5


def test_the_state_before_a_damaged_one_is_used_after_saying_so(tmp_path, capsys):
    run = Workdir(tmp_path, config())
    for step in (5, 10):
        run.save(step, tree(step), {"cursor": step})
        run.log(step, {"loss": 1})
    log = (tmp_path / "metrics.jsonl").read_bytes()
    for file in each_damage(tmp_path / "checkpoints" / "10"):
        (tmp_path / "metrics.jsonl").write_bytes(log)
        restored = run.restore(tree(0))
        assert restored is not None and int(restored[0]["n"]) == restored[1]["cursor"] == 5, file
        told = capsys.readouterr().err
        assert (file.name in told or file.name == files.CHECKSUMS) and told.endswith("going on from the checkpoint before it, 5\n"), told
        (tmp_path / "checkpoints" / "10.damaged").rename(tmp_path / "checkpoints" / "10")  # which it kept
        assert results.read_log(tmp_path / "metrics.jsonl") == [{"step": 5, "loss": 1}]
    (tmp_path / "checkpoints" / "5" / "extra" / "metadata").write_text("{}")
    (tmp_path / "checkpoints" / "10" / "extra" / "metadata").write_text("{}")
    with pytest.raises(UsageError, match=r"5/extra/metadata does not match checksums.json"):
        run.restore(tree(0))


def test_a_state_that_cannot_be_written_leaves_the_last_ones(tmp_path, monkeypatch):
    run = Workdir(tmp_path, config())
    for step in (5, 10):
        run.save(step, tree(step), {})
    before = contents(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(files, "sign", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
        with pytest.raises(UsageError, match=r"15 cannot be written \(.*No space left.*\): make room there and run the same"):
            run.save(15, tree(15), {})
    assert {name: data for name, data in contents(tmp_path).items() if ".part" not in name} == before
    run.save(15, tree(15), {})
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"10", "15"}


def test_a_damaged_state_never_takes_the_place_of_a_good_one(tmp_path):
    """The two that are kept after a damaged one was passed over are good ones."""
    run, folder = Workdir(tmp_path, config()), tmp_path / "checkpoints"
    for step in (40, 60):
        run.save(step, tree(step), {})
    (folder / "60" / "extra" / "metadata").write_text("damaged")
    assert run.restore(tree(0)) is not None
    run.save(45, tree(45), {})
    assert {path.name for path in folder.iterdir()} == {"40", "45", "60.damaged"}
    run.save(50, tree(50), {})
    assert {path.name for path in folder.iterdir()} == {"45", "50", "60.damaged"}


def test_checkpoints_get_checksums_by_migrating_in_an_older_run_alone(tmp_path):
    """In a run of the present format a checkpoint without them is damaged."""
    run = Workdir(tmp_path, config())
    run.save(5, tree(5), {})
    (tmp_path / "checkpoints" / "5" / files.CHECKSUMS).unlink()
    with pytest.raises(UsageError, match=r"checksums.json is missing: copy the run again, or remove"):
        run.restore(tree(0))
    assert migrate.migrate(tmp_path) == []
    (tmp_path / "config.json").write_text(json.dumps(config(model={"temperature": 1.0}, sampler={"temperature": 1.0}).to_dict()))
    assert migrate.migrate(tmp_path) == ["checkpoints/5/checksums.json", "config.json"] and migrate.migrate(tmp_path) == []
    assert run.restore(tree(0)) is not None


def test_of_two_failed_steps_the_later_one_in_time_is_replayed(tmp_path):
    for step, rate in ((55, 1e6), (45, 1e3)):
        run = Workdir(tmp_path, config(optimizer={"learning_rate": rate}))
        run.save_failed(step, {"params": tree(step)}, "loss")
    assert run.load_failed()[0] == 45
    Workdir(tmp_path, config(optimizer={"learning_rate": 1.0}))  # the remedy works again


def test_what_a_kill_left_of_a_replaced_file_goes(tmp_path):
    Workdir(tmp_path, config())
    (tmp_path / "config.json.123.part").write_text("{")
    Workdir(tmp_path, config())
    assert not (tmp_path / "config.json.123.part").exists()


# ------------------------------------------------------------------- a failed step


def test_after_a_failed_step_the_optimizer_alone_may_change_until_the_run_is_past_it(tmp_path):
    old, new = (config(optimizer={"learning_rate": rate, "matrices": "muon"}) for rate in (1e6, 1e-3))
    with pytest.raises(UsageError, match="no step has failed"):
        Workdir(tmp_path, old).load_failed()
    with pytest.raises(UsageError, match="another configuration"):
        Workdir(tmp_path, new)
    Workdir(tmp_path, old).save_failed(3, {"params": tree(1), "batch": {"tokens": np.arange(3)}}, "loss")
    for other in (config(optimizer={"learning_rate": 1e6, "matrices": "adam"}), config(seed=1, optimizer=new.optimizer)):
        with pytest.raises(UsageError, match="another configuration"):
            Workdir(tmp_path, other)
    step, kept, reason = Workdir(tmp_path, new).load_failed()
    assert (step, reason, kept["batch"]["tokens"].tolist()) == (3, "loss", [0, 1, 2])
    jax.tree.map(np.testing.assert_array_equal, kept["params"], tree(1))
    assert workdir.read_config(tmp_path)["optimizer"]["learning_rate"] == 1e-3
    Workdir(tmp_path, old).save(2, tree(1), {})  # a rate that was wrong may be changed again
    Workdir(tmp_path, new).save(3, tree(1), {})
    with pytest.raises(UsageError, match="another configuration"):
        Workdir(tmp_path, old)


def test_a_line_that_a_kill_cut_short_does_not_stop_the_resume(tmp_path):
    run = Workdir(tmp_path, config())
    run.log(1, {"loss": 1})
    run.save(1, tree(1), {})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 2, "lo')
    assert Workdir(tmp_path, config()).restore(tree(0)) is not None
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 1


def test_the_best_parameters_come_back_with_what_they_reached(tmp_path):
    run = Workdir(tmp_path, config())
    for step, accuracy in ((5, 0.25), (10, 0.5), (10, 0.75)):  # the second 10 is a resumed run's, and counts
        run.save_best(step, tree(accuracy), {"validation_accuracy": accuracy})
    params, result = workdir.load_best(tmp_path, tree(0))
    jax.tree.map(np.testing.assert_array_equal, params, tree(0.75))
    assert result == {"validation_accuracy": 0.75, "step": 10}


def test_no_best_parameters_yet(tmp_path):
    Workdir(tmp_path, config())
    with pytest.raises(UsageError, match="holds no checkpoint yet: let its training reach"):
        workdir.load_best(tmp_path, tree(0))


@pytest.mark.parametrize(
    ("like", "words"),
    [
        ({"w": jnp.zeros((2, 4)), "n": jnp.int32(0)}, ["w=[2, 3] there, [2, 4] here"]),
        ({"w": jnp.zeros((2, 3))}, ["n="]),
        ({"w": jnp.zeros((2, 3)), "n": jnp.int32(0), "more": jnp.zeros(1)}, ["more"]),
    ],
)
def test_parameters_of_another_model_are_refused(tmp_path, like, words):
    Workdir(tmp_path, config()).save_best(5, tree(5), {})
    with pytest.raises(UsageError, match=r"does not fit the model.*use its own config") as caught:
        workdir.load_best(tmp_path, like)
    assert all(word in str(caught.value) for word in words)


def test_a_result_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "eval.json"
    workdir.write_json(path, {"n": 1})
    with pytest.raises(TypeError):
        workdir.write_json(path, {"n": object()})
    assert json.loads(path.read_text()) == {"n": 1}


# ------------------------------------------------------------------- progress


def test_progress_off_a_terminal_is_plain_lines(capsys):
    progress = Progress(total=10, start=4, unit="step")
    progress.update(5)
    progress.update(6, "loss 1.0")
    progress.close()
    out, err = capsys.readouterr()
    assert out.startswith("step 6/10  loss 1.0  ") and out.endswith("min left\n") and out.count("\n") == 1
    assert err == ""


def test_a_bar_ends_where_it_was_told_in_whatever_order_lanes_told_it(monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    progress = Progress(total=10, start=4, unit="rollout")
    for step in (5, 7, 6, 10):
        progress.update(step)
    assert progress._bar.n == 10
    progress.close()


# ------------------------------------------------------------------- bad commands


BAD_COMMANDS = {
    "unknown field": (["--config.model.widht=3"], ["model.widht", "width"]),
    "unknown section": (["--config.modle.width=3"], ["modle"]),
    "unknown flag": (["--wrokdir=x"], ["wrokdir"]),
    "wrong type": (["--config.model.width=wide"], ["config.model.width", "wide"]),
    "fraction for a count": (["--config.optimizer.steps=1.5"], ["config.optimizer.steps", "1.5"]),
    "unknown preset": (["--config=configs/apr.py:huge"], ["unknown preset 'huge'", "smoke", "paper"]),
    "unknown recipe": (["--config=configs/nothing.py"], ["configs/nothing.py"]),
    "positional argument": (["configs/apr.py"], ["unexpected argument 'configs/apr.py'", "--name=value"]),
    "empty range": (["--config.problems.low=9", "--config.problems.high=1"], ["range of numbers"]),
    "no solvable problem": (
        ["--config.problems.high=2", "--config.problems.target_low=500", "--config.problems.target_high=600"],
        ["only 0 problems for the heldout split", "widen"],
    ),
    "too few held-out problems": (["--config.evaluation.problems=100000"], ["heldout split, 100000 were asked for"]),
    "no held-out problems": (["--config.evaluation.problems=0"], ["evaluation.problems"]),
    "no validation problems": (["--config.train.eval_problems=0"], ["train.eval_problems"]),
    "context too small for a prompt": (
        ["--config.model.context=8"],
        ["context", "prompt"],
    ),
    "context too small for any demonstration": (
        ["--config.model.context=24"],
        ["model.context", "demonstration"],
    ),
    "no rows": (["--config.train.rows=0"], ["train.rows"]),
    "no micro-batch": (["--config.train.micro_rows=0"], ["train.micro_rows"]),
    "micro-batches that leave rows over": (
        ["--config.mesh.data=1", "--config.train.micro_rows=3"],
        ["train.micro_rows=3", "train.rows=4"],
    ),
    "two budgets": (["--config.budget.children=2", "--config.budget.tokens=9"], ["budget.children=2", "budget.tokens=9", "one"]),
    "a budget that no demonstration states": (["--config.budget.tokens=9"], ["budget.tokens=9", "sosp demonstrated it"]),
    "a negative budget": (["--config.budget.children=-2"], ["budget.children=-2", "at least 0"]),
    "a temperature at which logits overflow": (["--config.sampler.temperature=1e-9"], ["sampler.temperature=1e-09", "0.001"]),
    "an endless view": (["--config.sampler.length_bucket=100000000"], ["sampler.length_bucket=100000000"]),
    "too many feeders": (["--config.train.feeders=100000"], ["train.feeders=100000"]),
    "steps within the warm-up": (["--config.optimizer.steps=5"], ["optimizer.steps=5", "warmup_steps=5"]),
    "no learning": (["--config.optimizer.learning_rate=0.0"], ["learning_rate"]),
    "unknown treatment": (["--config.train.overlong=squeeze"], ["train.overlong", "squeeze", "drop"]),
    "never evaluated": (["--config.train.eval_every=0"], ["train.eval_every"]),
    "never logged": (["--config.train.log_every=0"], ["train.log_every"]),
    "mesh larger than the machine": (["--config.mesh.data=16"], ["mesh", "16", "8 devices"]),
    "mesh of none": (["--config.mesh.fsdp=0"], ["mesh", "fsdp"]),
    "mesh that leaves devices over": (
        ["--config.mesh.data=-1", "--config.mesh.fsdp=3", "--config.train.rows=6", "--config.train.micro_rows=6"],
        ["mesh", "3", "8 devices"],
    ),
    "train rows against devices": (
        ["--config.mesh.data=8", "--config.train.rows=4"],
        ["train.rows=4", "train.micro_rows=2", "multiple", "8 devices"],
    ),
    "sampler rows against devices": (
        ["--config.mesh.data=8", "--config.train.rows=8", "--config.train.micro_rows=8", "--config.sampler.rows=24"],
        ["sampler.rows=24", "multiple", "sampler.workers=2", "8 devices"],
    ),
    "no lanes": (["--config.sampler.workers=0"], ["sampler.workers=0"]),
    "heads against mesh": (
        ["--config.mesh.tensor=4"],
        ["mesh", "tensor", "4"],
    ),
    "temperature": (["--config.sampler.temperature=-1.0"], ["sampler.temperature"]),
    "top_k": (["--config.sampler.top_k=100000"], ["sampler.top_k"]),
    "heads": (["--config.model.heads=3"], ["model.heads", "multiple"]),
    "dtype": (["--config.model.dtype=float8"], ["model.dtype", "float32"]),
    "method": (["--config.demonstrator.method=magic"], ["magic", "apr"]),
    "limits": (["--config.limits.thread_tokens=0"], ["thread_tokens"]),
}


@pytest.mark.parametrize(("arguments", "words"), BAD_COMMANDS.values(), ids=BAD_COMMANDS)
def test_a_bad_command_is_one_sentence_before_anything_is_written(
    command: Callable, tmp_path, monkeypatch, arguments, words
):
    monkeypatch.setattr(sft, "train", lambda *_: pytest.fail("training began"))
    ended = command(sft, *SMOKE, f"--workdir={tmp_path / 'run'}", *arguments)
    assert ended.status == 2, ended
    assert ended.err.startswith("error: ") and ended.err.count("\n") == 1, ended.err
    assert not [word for word in words if word not in ended.err], ended.err
    assert "\\" not in ended.err  # no repr of a message
    assert not (tmp_path / "run").exists()


def test_a_workdir_with_another_run_is_left_as_it_is(smoke_run, tmp_path, command: Callable):
    workdir = shutil.copytree(smoke_run.path, tmp_path / "run")  # other workers read the original
    before = contents(workdir)
    ended = command(sft, *SMOKE, f"--workdir={workdir}", "--config.seed=1")
    assert ended.status == 2, ended
    assert "seed=0 there, 1 here" in ended.err and "--workdir" in ended.err and ended.err.count("\n") == 1
    assert contents(workdir) == before


def test_a_workdir_with_other_files_is_left_as_it_is(command: Callable, tmp_path):
    (tmp_path / "thesis.tex").write_text("do not lose me")
    ended = command(sft, *SMOKE, f"--workdir={tmp_path}")
    assert ended.status == 2, ended
    assert "not empty" in ended.err and ended.err.count("\n") == 1
    assert contents(tmp_path) == {"thesis.tex": b"do not lose me"}


def test_a_workdir_that_cannot_be_made_is_said(command: Callable, tmp_path):
    (tmp_path / "file").write_text("")
    ended = command(sft, *SMOKE, f"--workdir={tmp_path / 'file' / 'run'}")
    assert ended.status == 2, ended
    assert ended.err.startswith("error: ") and "--workdir" in ended.err and ended.err.count("\n") == 1


def test_a_bad_command_in_a_process_of_its_own(environment, tmp_path):
    """The same as above, with the interpreter's own exit status and nothing else on stderr."""
    arguments = [sys.executable, "sft.py", "--config=configs/apr.py:huge", f"--workdir={tmp_path / 'run'}"]
    ended = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800)
    assert ended.returncode == 2
    assert ended.stderr.startswith("error: ") and ended.stderr.count("\n") == 1, ended.stderr
    assert ended.stdout == "" and not (tmp_path / "run").exists()

"""Converts runs of the older format in place: their config.json and eval.json.

    python -m harness.migrate RUN [RUN ...]

The old format kept the temperature of the policy in the model, and had no field `task`. Parameters and logs stay as
they are. A run that is converted already is left alone.
"""

from __future__ import annotations

import json
import pathlib
import sys
import typing
from collections.abc import Sequence

Json = dict[str, typing.Any]


def config(old: Json) -> Json:
    """A config of the new format with the meaning of an old one."""
    new = json.loads(json.dumps(old))
    new["task"] = "countdown"
    temperature = new["model"].pop("temperature")
    new["sampler"]["temperature"] *= temperature  # the sampler's is that of the policy now
    if "grpo" in new:
        new["train"] |= {"eval_every": new["grpo"].pop("eval_every"), "log_every": 1}
    return new


def evaluation(old: Json) -> Json:
    """An entry of eval.json in the new format."""
    new = {name: value for name, value in old.items() if name not in ("pass", "cons", "results")}
    new |= {"task": "countdown", "pass_at": old["pass"], "cons_at": old["cons"]}
    new.setdefault("demonstrator_beams", [])
    new["results"] = [result(old_result) for old_result in old["results"]]
    return new


def result(old: Json) -> Json:
    """A rollout's result in the new format."""
    problem = {"numbers": old["numbers"], "target": old["target"]}
    return {"problem": problem} | {name: value for name, value in old.items() if name not in problem}


def migrate(path: pathlib.Path) -> list[str]:
    """Converts the files of a run, and returns their names. Raises ValueError if there is no run."""
    if not (path / "config.json").exists() and not (path / "eval.json").exists():
        raise ValueError(f"{path} holds neither config.json nor eval.json")
    done = []
    for name, is_old, convert in (("config.json", old_config, config), ("eval.json", old_evaluations, evaluations)):
        file = path / name
        if file.exists() and file.stat().st_size and is_old(value := json.loads(file.read_text())):
            file.write_text(json.dumps(convert(value), indent=1) + "\n")
            done.append(name)
    return done


def old_config(value: Json) -> bool:
    """Whether a config is of the old format."""
    return "task" not in value


def old_evaluations(value: list[Json]) -> bool:
    """Whether an eval.json is of the old format."""
    return any("task" not in entry for entry in value)


def evaluations(value: list[Json]) -> list[Json]:
    """The entries of an old eval.json in the new format."""
    return [evaluation(entry) for entry in value]


def main(arguments: Sequence[str]) -> int:
    """Converts the runs named; returns the exit status (2: bad input)."""
    if not arguments:
        print(f"usage: python -m harness.migrate RUN [RUN ...]\n\n{__doc__}", file=sys.stderr)
        return 2
    for argument in arguments:
        try:
            done = migrate(pathlib.Path(argument))
        except (OSError, ValueError, KeyError) as error:
            print(f"error: {argument}: {error}", file=sys.stderr)
            return 2
        print(f"{argument}: {'converted ' + ', '.join(done) if done else 'nothing to convert'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Converts runs of the older format in place: their config.json, eval.json, metrics.jsonl and checksums.

    python -m harness.migrate RUN [RUN ...]

The old format kept the temperature of the policy in the model, had no field `task`, other names (`CONFIG`), and no
checksums. The parameters stay as they are. Files that are converted already are left alone, and so are checkpoints of
the new format that lack their checksums: those are damaged.
"""

from __future__ import annotations

import json
import pathlib
import re
import sys
import typing
from collections.abc import Sequence

from harness import files, results
from harness.cli import UsageError, in_order, one_line

Json = dict[str, typing.Any]


CONFIG = {  # field of the old format -> of the new one
    "prompt.sub_calls": "budget.children",
    "prompt.tokens": "budget.tokens",
    "demonstrator.condition": "demonstrator.budget_fraction",
    "threads.join": "threads.child_returns",
    "threads.inherit": "threads.inherit_context",
    "limits.answer_tokens": "limits.forced_answer_tokens",
    "limits.extensions": "limits.min_budget_rounds",
    "sampler.lanes": "sampler.workers",
    "sampler.burst": "sampler.steps_per_call",
    "sampler.bucket": "sampler.length_bucket",
    "sampler.view": "sampler.max_gathered_slots",
    "grpo.importance_cap": "grpo.tis_cap",
    "grpo.eval_every": "train.eval_every",
}
ENTRY = {"pass": "pass_at", "cons": "cons_at", "kept": "adherence"}  # the same for a field of an entry of eval.json
WORDS = (  # the same for the budget of an entry, in words
    (r"^free$", "no budget"),
    (r"(\d+) threads asked", r"\1 children requested"),
    (r"(\d+) tokens asked", r"\1 tokens requested"),
    (r"answer after (\d+) tokens", r"answer forced after \1 tokens"),
    (r"sent on (\d+) times", r"forced to continue \1 times"),
)


def config(old: Json) -> Json:
    """A config of the new format with the meaning of an old one."""
    new: Json = {}
    for section, value in old.items():
        for field, inner in value.items() if isinstance(value, dict) else [("", value)]:
            path = CONFIG.get(f"{section}.{field}", f"{section}.{field}").split(".")
            if field:
                new.setdefault(path[0], {})[path[1]] = inner
            else:
                new[section] = inner
    new["task"] = "countdown"
    if "demonstrator" in new:
        new["demonstrator"].setdefault("beam_low_without_budget", new["demonstrator"]["beam_low"])
    temperature = new["model"].pop("temperature")
    new["sampler"]["temperature"] *= temperature  # the sampler's is that of the policy now
    if "grpo" in new:
        new["train"]["log_every"] = 1
    return new


def evaluation(old: Json) -> Json:
    """An entry of eval.json in the new format."""
    new = {ENTRY.get(name, name): value for name, value in old.items() if name not in ("asked", "results", "threads")}
    asked = config({"model": {"temperature": 1.0}, "sampler": {"temperature": 1.0}, "limits": old["asked"]})["limits"]
    new["requested"] = {"children": asked.pop("sub_calls"), "tokens": asked.pop("tokens")}
    new |= {"task": "countdown", "limits": asked, "demonstrator_beams": old.get("demonstrator_beams", [])}
    new["threads"] = {"child_returns": old["threads"]["join"], "inherit_context": old["threads"]["inherit"]}
    for words, now in WORDS:
        new["budget"] = re.sub(words, now, new["budget"])
    new["results"] = [result(old_result) for old_result in old["results"]]
    return new


def result(old: Json) -> Json:
    """A rollout's result in the new format."""
    problem = {"numbers": old["numbers"], "target": old["target"]}
    return {"problem": problem} | {name: value for name, value in old.items() if name not in problem}


def log(old: Json) -> Json:
    """A line of metrics.jsonl in the new format."""
    names = {name: name.replace("heldout_", "validation_").replace("mismatch_", "sampler_trainer_gap_") for name in old}
    if "loss" in old and "accuracy" in old:
        names["accuracy"] = "token_accuracy"
    return {names[name]: value for name, value in old.items()}


def migrate(path: pathlib.Path) -> list[str]:
    """Converts the files of a run, and returns their names. An exported model stays as it is.

    Raises ValueError if there is no run, and UsageError if another process writes to it.
    """
    if [*path.glob("model*.safetensors")]:
        return []  # exported: of the new format, with checksums of its own
    texts = {name: path / name for name in ("metrics.jsonl", "eval.json", "config.json")}
    if not any(file.exists() for file in texts.values()):
        raise ValueError(f"{path} holds no run: no {', '.join(texts)}")
    files.lock(path)
    found = {name: file.read_text() for name, file in texts.items() if file.exists()}
    new = {name: _converted(name, text) for name, text in found.items()}
    done = []
    if "temperature" in json.loads(found.get("config.json", "{}")).get("model", {}):
        for folder in sorted((*path.glob("checkpoints/*"), *path.glob("best/*"))):
            if folder.name.isdecimal() and not (folder / files.CHECKSUMS).exists():
                files.sign(folder)
                done.append(f"{folder.relative_to(path)}/{files.CHECKSUMS}")
    for name, text in new.items():  # the configuration, which tells the format, last
        if text not in ("", found[name]):
            files.replace(texts[name], text.encode())
            done.append(name)
    return done


def _converted(name: str, text: str) -> str:
    """The text of a file in the new format; as it is if it is new already."""
    if name == "metrics.jsonl":
        lines = [json.dumps(log(json.loads(line))) for line in text.split("\n")[:-1]]  # a kill may have cut the last
        return text if lines == text.splitlines() else "".join(line + "\n" for line in lines)
    value: typing.Any = json.loads(text) if text else []
    if name == "config.json" and text and "checksum" not in dict(value):
        new = config(value) if "temperature" in value.get("model", {}) else value
        return json.dumps(results.signed(new), indent=1) + "\n"
    if name == "eval.json" and any("checksum" not in entry for entry in value):
        return json.dumps([entry if "checksum" in entry else _signed(entry) for entry in value], indent=1) + "\n"
    return text


def _signed(entry: Json) -> Json:
    """An evaluation in the new format, with its checksum."""
    return results.signed(entry if "task" in entry else evaluation(entry))


def main(arguments: Sequence[str]) -> int:
    """Converts the runs named; returns the exit status (2: bad input)."""
    if not arguments:
        print(f"usage: python -m harness.migrate RUN [RUN ...]\n\n{__doc__}", file=sys.stderr)
        return 2
    for argument in arguments:
        try:
            done = migrate(pathlib.Path(argument))
        except (AttributeError, KeyError, OSError, RecursionError, TypeError, ValueError, UsageError) as error:
            print(f"error: {argument}: {one_line(error)}", file=sys.stderr)
            return 2
        print(f"{argument}: {'converted ' + ', '.join(done) if done else 'nothing to convert'}")
    return 0


if __name__ == "__main__":
    with in_order():
        sys.exit(main(sys.argv[1:]))

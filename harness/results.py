"""What eval.json and metrics.jsonl hold: evaluations and the log of a run, read back and checked. No JAX.

An evaluation carries a checksum, and is read only if it matches. Runs that ship without their parameters share one
zip file, evidence.zip: NAME/config.json, eval.json, metrics.jsonl. It lists the checksums of all of them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import json
import lzma
import pathlib
import typing
import zipfile
import zlib

from harness import files
from harness.cli import UsageError
from harness.stats import Estimate

AnyPath = pathlib.Path | zipfile.Path  # read alike
EVIDENCE = "evidence.zip"
DAMAGES = (zipfile.BadZipFile, zlib.error, lzma.LZMAError)  # what zipfile raises of its own
KEPT = ("config.json", "eval.json", "metrics.jsonl")  # what it keeps of a run


@dataclasses.dataclass
class Result:
    """One rollout of an evaluation."""

    problem: dict[str, typing.Any]  # as `Domain.to_json` writes it
    sample: int  # which of the problem's rollouts
    correct: bool
    reason: str  # why it is wrong, "" if it is right
    answer: list[str]
    failure: str  # kind of fault that it failed by, "" if it is right
    total_tokens: float
    sequential_tokens: float
    longest_context: float
    children: float
    width: float  # children of its largest spawn; 1 where parents go on
    depth: float
    truncated: float
    malformed: float
    milliseconds: float


@dataclasses.dataclass
class Evaluation:
    """An evaluation of one run at one budget and temperature. Costs are means per rollout."""

    label: str
    task: str
    method: str
    budget: str  # in words; "no budget" without one
    requested: dict[str, int]  # the budget that prompts state: children, tokens; -1 is none
    limits: dict[str, int]  # bounds of a rollout
    threads: dict[str, typing.Any]  # what differs from the paper's spawn and join
    temperature: float
    sampling: dict[str, float]  # top_k, top_p
    context: int
    concurrent: int  # rollouts that start together; 0 is all
    n: int  # problems
    samples: int  # rollouts per problem
    correct: int
    accuracy: float
    interval: list[float]  # of 95 %
    total_tokens: float
    sequential_tokens: float
    children: float
    longest_context: float
    milliseconds: float
    truncated: float
    malformed: float
    throughput_ms: float  # wall clock of all / rollouts
    pass_at: dict[str, Estimate]  # k -> chance that one of k samples is right
    cons_at: dict[str, Estimate]  # k -> chance that the majority of k samples is right
    adherence: dict[str, typing.Any] | None  # use of the budget: asked (low, high), used (mean), within (share)
    failures: dict[str, float]  # kind of fault -> share of the rollouts
    windows: dict[str, Estimate]  # context window -> accuracy of what fits it
    demonstrator: float | None  # its accuracy where it spends what the model spends
    demonstrator_beams: list[dict[str, float]]
    family: dict[str, typing.Any]  # of the problems
    training_seed: int
    seed: int
    checkpoint: int  # step
    parameters: str  # fingerprint
    problem_set: str  # fingerprint
    results: list[Result]
    split: str = "heldout"  # or "unseen"; earlier evaluations do not say so

    def headline(self) -> dict[str, typing.Any]:
        """All fields but the results of single rollouts."""
        return {name: value for name, value in vars(self).items() if name != "results"}

    def to_json(self) -> dict[str, typing.Any]:
        """The evaluation as eval.json holds it."""
        return signed({**self.headline(), "results": [vars(result) for result in self.results]})


def signed(value: dict[str, typing.Any]) -> dict[str, typing.Any]:
    """A JSON object with the checksum of its other fields."""
    value = {name: field for name, field in value.items() if name != "checksum"}
    text = json.dumps(value, sort_keys=True)
    return {**value, "checksum": hashlib.blake2b(text.encode(), digest_size=8).hexdigest()}


AGAIN = "restore the file, measure it again, or convert an older one with `python -m harness.migrate`"


def match(value: dict[str, typing.Any], where: str, remedy: str = AGAIN) -> None:
    """Raises UsageError unless a JSON object matches the checksum in it."""
    if signed(value)["checksum"] != value.get("checksum"):
        raise UsageError(f"{where} does not match its checksum: {remedy}")


def match_all(data: bytes, where: str) -> list[dict[str, typing.Any]]:
    """The evaluations of an eval.json as JSON, at least one. Raises UsageError unless each matches its checksum."""
    try:
        if not (values := json.loads(data)):
            raise ValueError("it holds no evaluation")
        for value in values:
            match(value, where)
    except (AttributeError, TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"{where} is damaged ({error}): {AGAIN}") from error
    return values


def read(data: bytes, where: str) -> list[Evaluation]:
    """The evaluations of an eval.json that keep their single rollouts (some of the shipped evidence does not).

    Raises UsageError as `match_all` does, and if one lacks a field or results.
    """
    evaluations = []
    for value in match_all(data, where):
        if "results" not in value:
            continue
        try:
            value = {"split": "heldout", **value}
            fields = {field.name: value[field.name] for field in dataclasses.fields(Evaluation)}
            results = [Result(**result) for result in fields["results"]]
        except (KeyError, TypeError) as error:
            raise UsageError(f"{where} lacks a field ({error}): {AGAIN}") from error
        if not len(results) == fields["n"] * fields["samples"] > 0:
            raise UsageError(f"{where} has {len(results)} results, not n * samples: measure it again")
        evaluations.append(Evaluation(**{**fields, "results": results}))
    return evaluations


def opened(run: pathlib.Path) -> AnyPath:
    """The folder of a run, or its part of the evidence beside it. Raises UsageError if that is damaged."""
    packed = run.resolve().with_name(EVIDENCE)  # "." has no name
    return _unzipped(packed) / f"{run.name}/" if packed.exists() and not run.exists() else run


def _unzipped(path: pathlib.Path) -> zipfile.Path:
    _contents(path)
    return zipfile.Path(path)


def _contents(path: pathlib.Path) -> dict[str, bytes]:
    """The files of an archive. Raises UsageError unless they are those that it lists, each with its checksum."""
    try:
        with zipfile.ZipFile(path) as file:
            found = {name: file.read(name) for name in file.namelist()}
        if _sums(found) != json.loads(found.pop(files.CHECKSUMS)):
            raise ValueError("a file does not match its checksum")
        return found
    except (*DAMAGES, OSError, EOFError, KeyError, RuntimeError, ValueError) as error:
        remedy = "restore it, name another folder, or remove it and add its runs again with `python -m harness.export`"
        raise UsageError(f"{path} is damaged ({error}): {remedy}") from error


def _sums(contents: dict[str, bytes]) -> dict[str, str]:
    """SHA-256 of each file but the list of them."""
    return {name: hashlib.sha256(data).hexdigest() for name, data in contents.items() if name != files.CHECKSUMS}


def evaluations(folder: pathlib.Path) -> list[AnyPath]:
    """Every eval.json of a run or below a folder, those of its evidence included."""
    archives = [_unzipped(path) for path in sorted(folder.rglob(EVIDENCE))]
    packed = [run for archive in archives for run in archive.iterdir() if run.is_dir()]
    if isinstance(root := opened(folder), zipfile.Path):
        packed.append(root)
    in_archives = [run / "eval.json" for run in packed]
    return [*sorted(folder.rglob("eval.json")), *filter(zipfile.Path.exists, in_archives)]


def add_evidence(run: pathlib.Path, path: pathlib.Path) -> list[str]:
    """Puts config, evaluation and log of a run into a zip file, in place of what it held under the run's name.

    Returns the names written. The same runs give the same bytes. Raises UsageError if the file is damaged or another
    process adds to it, or if the run has no evaluation, or one that does not match its checksum.
    """
    run = run.resolve()  # "." has no name
    new = {f"{run.name}/{name}": (run / name).read_bytes() for name in KEPT if (run / name).exists()}
    if f"{run.name}/eval.json" not in new:
        raise UsageError(f"{run} has no eval.json: evaluate it first")
    match_all(new[f"{run.name}/eval.json"], str(run / "eval.json"))
    files.lock(path.parent)
    old = _contents(path) if path.exists() else {}
    contents = {name: data for name, data in old.items() if not name.startswith(f"{run.name}/")} | new
    contents[files.CHECKSUMS] = files.json_bytes(dict(sorted(_sums(contents).items())))
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as file:
        for name, data in sorted(contents.items()):
            file.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_DEFLATED)
    files.replace(path, buffer.getvalue())
    return [*new]


def read_log(path: AnyPath) -> list[dict[str, typing.Any]]:
    """The lines of a metrics.jsonl. A kill may have cut the last one, which does not count.

    Raises UsageError that names the first line that is damaged.
    """
    lines = []
    for number, text in enumerate(path.read_bytes().split(b"\n")[:-1], 1):
        try:
            line = json.loads(text)
            whole = isinstance(line["step"], int)
        except (ValueError, TypeError, KeyError, RecursionError):
            whole = False
        if not whole:
            raise UsageError(f"{path}, line {number}, is damaged: restore the file, or remove that line")
        lines.append(line)
    return lines

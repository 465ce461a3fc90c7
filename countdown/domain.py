"""Countdown for training and evaluation: the configuration's problems, demonstrators, task and budget."""

from __future__ import annotations

import dataclasses
import json
import random
import typing
from collections.abc import Sequence

from ml_collections import ConfigDict

import solver
from checks import require
from countdown.grader import Problem
from countdown.language import Tokenizer
from countdown.task import Countdown, record
from protocols import Domain
from records import Rollout, longest_context, mean_costs
from solver import DemonstratorConfig, ProblemRange


class CountdownDomain(Domain):
    """Reads `problems`, `demonstrator`, `number_limit`, `threads`, `budget` and `limits.depth` of the configuration."""

    example = '{"numbers": [...], "target": n}'
    language: Tokenizer
    task: Countdown

    def __init__(self, config: ConfigDict) -> None:
        self.language = Tokenizer(config.number_limit)
        self.family = ProblemRange(**config.problems)
        self.demonstrator = DemonstratorConfig(**config.demonstrator)
        depth, most = self.demonstrator.depth, config.limits.depth
        nests = depth <= max(most, 1)  # without threads at all, what trained the model does not matter
        require(nests, f"demonstrator.depth={depth} nests deeper than limits.depth={most}: raise limits.depth")
        both = depth > 1 and config.threads.inherit_context
        require(not both, f"threads.inherit_context hides a child's level: demonstrator.depth must be 1, not {depth}")
        goes_on = self.demonstrator.unjoined >= 0
        both = goes_on and config.threads.child_returns == "text"
        require(not both, "child_returns=text shows foreign states to a parent that goes on: unjoined must be -1")
        self.children, self.tokens = config.budget.children, config.budget.tokens
        both = self.children != -1 and self.tokens != -1
        require(not both, f"budget.children={self.children} and budget.tokens={self.tokens}: ask for one")
        for name, value, method in (("children", self.children, "apr"), ("tokens", self.tokens, "sosp")):
            knows = value == -1 or (value >= 0 and self.demonstrator.method == method)
            require(knows, f"budget.{name}={value} must be -1, or at least 0 where {method} demonstrated it")
        self.demo_task = Countdown(
            self.language, self.demonstrator.method, asynchronous=goes_on, **config.threads
        )
        self.task = dataclasses.replace(self.demo_task, children_budget=self.children, token_budget=self.tokens)

    def problem(self, split: str, seed: int, index: int) -> Problem:
        """Problem number `index` of a split."""
        return solver.problem(self.family, split, seed, index)

    def problems(self, split: str, n: int) -> Sequence[Problem]:
        """`n` distinct problems of a split."""
        return solver.problems_of(self.family, split, n)

    def demonstration(self, split: str, seed: int, index: int) -> Rollout:
        """Demonstration number `index` of a split."""
        return solver.demonstration(self.family, self.demonstrator, self.demo_task, split, seed, index)

    @staticmethod
    def to_json(problem: Problem) -> dict[str, typing.Any]:
        """{"numbers": [...], "target": n}."""
        return {"numbers": list(problem.numbers), "target": problem.target}

    @staticmethod
    def from_json(entry: typing.Any) -> Problem:
        """The problem of {"numbers": [...], "target": n}. Raises ValueError."""
        if not isinstance(entry, dict) or set(entry) != {"numbers", "target"} or not isinstance(entry["numbers"], list):
            raise ValueError(f"a problem must be {CountdownDomain.example}, not {json.dumps(entry)[:80]}")
        return Problem(tuple(entry["numbers"]), entry["target"])

    @classmethod
    def read_language(cls, facts: dict[str, typing.Any]) -> Tokenizer:
        """The tokenizer of a trace file."""
        return Tokenizer(facts["number_limit"])

    def facts(self) -> dict[str, typing.Any]:
        """The method, the family of problems, the ablations and the tokenizer's limit."""
        family = dataclasses.asdict(self.family)
        threads = {name: getattr(self.task, name) for name in ("child_returns", "inherit_context")}
        if self.task.asynchronous:  # as in files from before there was a choice
            threads["asynchronous"] = True
        if not self.family.unseen_targets:  # as in files from before there was such a share
            del family["unseen_targets"]
        return {
            "method": self.demonstrator.method,
            "family": family,
            "threads": threads,
            "number_limit": self.language.number_limit,
        }

    @staticmethod
    def solvable(problem: Problem) -> bool:
        """Whether the target can be reached, by exact search."""
        return solver.solvable(problem.numbers, problem.target)

    def requested(self) -> str:
        """The budget that prompts state."""
        if self.children >= 0:
            return f"{self.children} children requested"
        return "" if self.tokens < 0 else f"{self.tokens} tokens requested"

    def usage(self, rollouts: Sequence[Rollout]) -> tuple[list[int], int, int] | None:
        """Children started, or the longest context without the line that states the budget."""
        if self.children >= 0:
            return [len(rollout.threads()) - 1 for rollout in rollouts], self.children, self.children
        if self.tokens < 0:
            return None
        line = len(self.language.encode(self.task.root_prefix))  # does not count in demonstrations either
        used = [longest_context(rollout.root) - line for rollout in rollouts]
        return used, self.tokens - self.demonstrator.token_bin + 1, self.tokens

    def demonstrators(self, problems: Sequence[Problem], context: int) -> list[dict[str, float]]:
        """One demonstration of each problem, beam by beam; none of larger problems than the family's.

        `solved` is the accuracy in a context of any length.
        """
        if any(len(problem.numbers) > self.family.count for problem in problems):  # it may take minutes for one
            return []
        entries = []
        for beam in range(self.demonstrator.beam_low, self.demonstrator.beam_high + 1):
            config = dataclasses.replace(
                self.demonstrator, beam_low=beam, beam_high=beam, beam_low_without_budget=beam
            )
            rollouts = []
            for index, problem in enumerate(problems):
                trace = solver.demonstrate(problem, config, random.Random(f"demonstrator {beam} {index}"))
                rollouts.append(record(problem, trace, self.task))
            solved = [rollout for rollout in rollouts if rollout.grade.correct]
            fitting = [rollout for rollout in solved if longest_context(rollout.root) <= context]
            shares = {"accuracy": len(fitting) / len(rollouts), "solved": len(solved) / len(rollouts)}
            means = mean_costs(rollouts, ("children", "total_tokens"))
            entries.append({"beam": beam, **shares, **means})
        return entries

"""RL without demonstrations: from a model that has only read arithmetic, with nothing but the reward.

    python sft.py --config=baselines/zero.py:countdown-64             # the base model: reads arithmetic, solves nothing
    python grpo.py --config=baselines/zero.py:grpo --init=runs/zero-countdown-64          # and the reward alone
    python sft.py --config=baselines/zero.py:multiply-64                                  # the other problem

After TinyZero (Jiayi-Pan/TinyZero): the two kinds of problem, the tags, and the reward 1, 0.1 or 0. A rollout is one
thread that starts no children. Here 2, 5 and 7 shall make 17, and 23 * 45 is asked. A tag is one id, so is a character:

    <text>2,5,7=17<think>        the prompt
    (2+5)*7=49=17?no;(5*2)+7=17=17?yes</think><answer>(5*2)+7</answer><end>         an expression, its value, a check

    <text>23*45<think>           the prompt
    23*40=920;23*5=115;920+115=1035</think><answer>1035</answer><end>               partial products and their sum

The base model reads texts of four kinds, in the shares of `TEXTS` (of texts; a search is as long as six others):

    fact      0.40   an expression of numbers of the family and its value: (2+5)*7=49; of "multiply" a partial product
    sum       0.20   the sum of two values: 49+17=66
    check     0.25   whether two values are equal, as often as not: 49=17?no
    search    0.15   a problem of the training split, one to `TRIES` lines that are drawn at random, and as the answer
                     the last of them. Every other search of "countdown" checks its lines. None stops because a line
                     was right, so an answer is right by chance, and what is learned is the form.

No text shows how to solve a problem: to go on after "no", to stop after "yes" and to draw better is left to RL. No
text holds the answer to a problem of another split than that for training either.

Deviations from TinyZero: GRPO, not PPO with a critic; a base model from scratch, not a language model; an answer
needs the right form to earn 0.1; and a parser grades it (`value_of`), not `eval`.

Time: ten minutes for a base model on a CPU core that was shared with other work. In one run at width 64, whose texts
still held some answers of other splits, 200 steps of RL took validation accuracy from 0.070 (0.042-0.114) to 0.125
(0.086-0.178). No search came of it: lines fell from 2.5 to 1.1 and checks from 1.5 to 0. The model learned to guess, as
TinyZero reports of its smallest.
"""

from __future__ import annotations

import operator
import random
import re
import typing
from collections.abc import Callable, Sequence
from fractions import Fraction

from ml_collections import ConfigDict

import solver
from checks import require
from configs.common import LIMITS, MESH
from configs.grpo import overlay
from countdown.domain import CountdownDomain
from countdown.grader import Problem
from protocols import Domain, Language, MalformedSpawn, Spawn
from records import END, Call, Grade, Rollout, Thread
from solver import ProblemRange

TEXTS = {"fact": 0.40, "sum": 0.20, "check": 0.25, "search": 0.15}  # shares of what the base model reads
TRIES = 4  # most lines of a search that it reads
LARGEST = 999  # value in an expression that it reads
TRIALS = 10_000  # draws after which there is no such problem or expression
LONGEST_ANSWER, DEEPEST = 100, 10  # characters and nested parentheses that are graded

# ------------------------------------------------------------------- language


class Symbols:
    """The language: tags, "yes", "no", and single characters."""

    symbols = ("<text>", "<think>", "</think>", "<answer>", "</answer>", "<end>", "yes", "no", *"0123456789+-*/()=?,;")
    vocab_size = len(symbols)

    def encode(self, text: str) -> list[int]:
        """Ids of a text."""
        return [self.symbols.index(symbol) for symbol in re.findall("</?[a-z]+>|yes|no|.", text)]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids."""
        return "".join(self.symbols[i] for i in ids)


LANGUAGE = Symbols()

# ------------------------------------------------------------------- grading

OPERATIONS: dict[str, Callable[[Fraction, Fraction], Fraction]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
}
LEVELS = (("+", "-"), ("*", "/"))  # of binding, loosest first


def value_of(text: str) -> tuple[Fraction, list[int]]:
    """Exact value and numbers of an expression of natural numbers, + - * / and parentheses.

    Raises ValueError if it is none or too long or deep, and ZeroDivisionError.
    """
    tokens = re.findall(r"0|[1-9][0-9]*|[-+*/()]", text)
    require(len(text) <= LONGEST_ANSWER and "".join(tokens) == text, "other characters, or too many")
    rest = ["", *reversed(tokens)]  # a stack
    value = _take(rest, 0, DEEPEST)
    require(rest == [""], f"{rest[-1]!r} after the end")
    return value, [int(token) for token in tokens if token.isdigit()]


def _take(rest: list[str], level: int, depth: int) -> Fraction:
    """Takes the longest expression of a level of binding off a stack of tokens; `depth` parentheses may open."""
    if level < len(LEVELS):
        value = _take(rest, level + 1, depth)
        while rest[-1] in LEVELS[level]:
            value = OPERATIONS[rest.pop()](value, _take(rest, level + 1, depth))
        return value
    token = rest.pop()
    if token == "(":
        require(depth > 0, "too many parentheses")
        value = _take(rest, 0, depth - 1)
        require(rest.pop() == ")", "an open parenthesis")
        return value
    require(token.isdigit(), "a number is missing")
    return Fraction(token)


class Zero:
    """The `protocols.Task` of one kind of problem, "countdown" or "multiply". Nothing in it starts children."""

    end_id, spawn_id = LANGUAGE.symbols.index("<end>"), -1

    def __init__(self, kind: str) -> None:
        self.kind = kind

    def prompt_text(self, problem: Problem) -> str:
        """<text>2,5,7=17<think>, or <text>23*45<think>."""
        if self.kind == "multiply":
            return f"<text>{'*'.join(map(str, problem.numbers))}<think>"
        return f"<text>{','.join(map(str, problem.numbers))}={problem.target}<think>"

    def prompt(self, problem: Problem) -> list[int]:
        """The prompt in ids."""
        return LANGUAGE.encode(self.prompt_text(problem))

    def spawn(self, ids: Sequence[int]) -> Spawn:
        """No id spawns."""
        raise MalformedSpawn("threads of this task start no children")

    def join(self, children: Sequence[Thread]) -> list[int]:
        """Nothing is joined."""
        return []

    def grade(self, problem: Problem, root: Thread) -> Grade:
        """Thoughts, one answer and the end. A reason starts with the kind of failure; a malformed answer is none."""
        if root.stop != END:
            return Grade(False, f"no answer: stopped by {root.stop}")
        response = LANGUAGE.decode(root.ids()).removeprefix(self.prompt_text(problem))
        form = re.fullmatch("[^<]*</think><answer>([^<]*)</answer><end>", response)
        if not form:
            return Grade(False, "no answer: other than thoughts, one answer and the end")
        text = form[1]
        try:
            value, numbers = value_of(text)
            require(self.kind != "multiply" or text.isdigit(), "more than a number")
        except ZeroDivisionError:
            return Grade(False, "wrong value: division by zero", (text,))
        except ValueError as error:
            return Grade(False, f"malformed answer: {error}")
        if self.kind != "multiply" and sorted(numbers) != sorted(problem.numbers):
            return Grade(False, f"wrong numbers: {text}", (text,))
        right = value == problem.target
        return Grade(right, "" if right else f"wrong value: not {problem.target}", (text,))


def failure(rollout: Rollout, _: Language) -> str:
    """The kind of failure: no_answer, malformed_answer, wrong_numbers or wrong_value; "" if there is none."""
    return rollout.grade.reason.split(":")[0].replace(" ", "_")


def habits(rollout: Rollout, language: Language) -> dict[str, float]:
    """How a rollout worked: ids; lines of thought; checks; lines after "no"; whether "yes" ended the thoughts."""
    ids = rollout.root.calls[-1].sampled
    lines = language.decode(ids).split("</think>")[0].split(";")
    return {
        "tokens": len(ids),
        "lines": len(lines),
        "checks": sum("?" in line for line in lines),
        "backtracks": sum(line.endswith("?no") for line in lines[:-1]),
        "verified": lines[-1].endswith("?yes"),
    }


# ------------------------------------------------------------------- what the base model reads


def expression(numbers: Sequence[int], rng: random.Random) -> tuple[str, int]:
    """A random expression of all the numbers, and its value; every value in it is natural and at most `LARGEST`."""
    while True:
        parts = [(str(number), number) for number in rng.sample(numbers, len(numbers))]
        while len(parts) > 1:
            (a, x), (b, y) = parts.pop(rng.randrange(len(parts))), parts.pop(rng.randrange(len(parts)))
            sign = rng.choice("+-*/")
            result = OPERATIONS[sign](Fraction(x), Fraction(y))
            if result.denominator > 1 or not 1 <= result <= LARGEST:
                break
            parts.append((f"({a}{sign}{b})", int(result)))
        else:
            text, value = parts[0]
            return text[1:-1] if len(numbers) > 1 else text, value


def compare(left: int, right: int) -> str:
    """49=17?no."""
    return f"{left}={right}?{'yes' if left == right else 'no'}"


def partial_factors(number: int) -> list[int]:
    """What a number is the sum of: 45 is 5 + 40."""
    return [int(digit) * 10**power for power, digit in enumerate(reversed(str(number))) if digit != "0"]


def partial(numbers: Sequence[int], rng: random.Random) -> tuple[str, int]:
    """A random partial product of two numbers, and its value: of 23 and 45 it is 23*40 or 23*5."""
    left, right = numbers
    part = rng.choice(partial_factors(right))
    return f"{left}*{part}", left * part


class ZeroDomain(Domain):
    """Reads `problems` of the configuration; `kind` is "countdown" or "multiply".

    A product that can be a partial product of another, such as 23*40, is only in the training split.
    """

    example = CountdownDomain.example
    language = LANGUAGE
    to_json, from_json = staticmethod(CountdownDomain.to_json), staticmethod(CountdownDomain.from_json)
    task: Zero

    def __init__(self, config: ConfigDict) -> None:
        self.family = dict(config.problems)
        bounds = dict(self.family)
        kind = bounds.pop("kind")
        require(kind in PROBLEMS, f"problems.kind={kind!r} must be one of {', '.join(PROBLEMS)}")
        self.task, self.families = Zero(kind), []
        if kind == "countdown":
            least, most = bounds.pop("count_low"), bounds.pop("count_high")
            require(least <= most, f"problems.count_low={least} must be at most problems.count_high={most}")
            self.families = [ProblemRange(count=count, **bounds) for count in range(least, most + 1)]
        else:
            self.low, self.high = bounds["low"], bounds["high"]
            fits = 2 <= self.low < self.high <= 999
            require(fits, f"problems.low={self.low} must be from 2 to below problems.high={self.high}, that to 999")

    def problem(self, split: str, seed: int, index: int) -> Problem:
        """Problem number `index` of a split; the counts of numbers take turns."""
        if self.families:
            return solver.problem(self.families[index % len(self.families)], split, seed, index)
        rng = random.Random(f"multiply {split} {seed} {index}")
        for _ in range(TRIALS):
            left, right = rng.randint(self.low, self.high), rng.randint(self.low, self.high)
            is_partial = min(len(partial_factors(left)), len(partial_factors(right))) == 1
            if ("train" if is_partial else solver.split_of((left, right), left * right)) == split:
                return Problem((left, right), left * right)
        raise ValueError(f"no {split} product of numbers from {self.low} to {self.high}: widen problems.high")

    def problems(self, split: str, n: int) -> Sequence[Problem]:
        """The first `n` distinct problems of a split."""
        found: dict[tuple, Problem] = {}
        for index in range(100 * n):
            drawn = self.problem(split, 0, index)
            found.setdefault((*sorted(drawn.numbers), drawn.target), drawn)
            if len(found) == n:
                return list(found.values())
        raise ValueError(f"{n} {split} problems were asked for, {len(found)} were found: widen problems.high")

    def demonstration(self, split: str, seed: int, index: int) -> Rollout:
        """Text number `index` that the base model reads. Everything after <text> counts as sampled."""
        rng = random.Random(f"text {split} {seed} {index}")
        problem = self.problem(split, seed, index)
        kind = rng.choices([*TEXTS], [*TEXTS.values()])[0]
        ids = LANGUAGE.encode(f"<text>{self.text(kind, problem, rng)}<end>")
        root = Thread((), [Call(0, ids[:1], ids[1:])])
        return Rollout(problem, root, self.task.grade(problem, root))

    def text(self, kind: str, problem: Problem, rng: random.Random) -> str:
        """A text of one kind of `TEXTS`."""
        line, value = self.line(problem.numbers, rng)
        other = self.line(self.problem("train", 0, rng.randrange(10**6)).numbers, rng)[1]
        if kind == "fact":
            return f"{line}={value}"
        if kind == "sum":
            return f"{value}+{other}={value + other}"
        if kind == "check":
            return compare(value, rng.choice((value, other)))
        return self.task.prompt_text(problem).removeprefix("<text>") + self.search(problem, rng)

    def line(self, numbers: Sequence[int], rng: random.Random) -> tuple[str, int]:
        """A random expression or partial product and its value, which solves no problem outside of training."""
        if not self.families:
            return partial(numbers, rng)
        for _ in range(TRIALS):
            text, value = expression(numbers, rng)
            if solver.split_of(numbers, value) == "train":
                return text, value
        raise ValueError(f"no value of {numbers} up to {LARGEST} is a training problem's: lower problems.low")

    def search(self, problem: Problem, rng: random.Random) -> str:
        """Thoughts at random, and the last of them as the answer."""
        checks, lines, values = rng.random() < 0.5, list[str](), list[int]()
        answer = ""
        for _ in range(rng.randint(1, TRIES)):
            if self.families:
                answer, value = line, _ = self.line(problem.numbers, rng)
            elif len(values) > 1 and rng.random() < 0.5:
                left, right = rng.sample(values, 2)
                line, value = f"{left}+{right}", left + right
            else:
                line, value = self.line(problem.numbers, rng)
            values.append(value)
            lines.append(f"{line}={compare(value, problem.target) if checks and self.families else value}")
        return f"{';'.join(lines)}</think><answer>{answer or values[-1]}</answer>"

    @classmethod
    def read_language(cls, facts: dict[str, typing.Any]) -> Symbols:
        """Every trace file has the same symbols."""
        return LANGUAGE

    def facts(self) -> dict[str, typing.Any]:
        """The family of problems."""
        return super().facts() | {"method": "zero", "family": self.family}


# ------------------------------------------------------------------- recipes

PROBLEMS: dict[str, dict[str, typing.Any]] = {
    "countdown": dict(kind="countdown", count_low=3, count_high=3, low=1, high=12, target_low=10, target_high=40),
    "multiply": dict(kind="multiply", low=10, high=99),  # both numbers
}
CAP = 112  # ids of a response


def get_config(preset: str = "countdown-64") -> ConfigDict:
    """The recipe of a base model, KIND-WIDTH, or with the preset "grpo" of reinforcement learning from any."""
    evaluation = dict(problems=200, samples=1, concurrent=0, seed=0)
    if preset == "grpo":
        rl = dict(
            grpo=dict(
                temperature=1.0, aggregate="token", dead_groups="drop", steps=200, problems=32, rollouts=8, updates=1
            ),
            optimizer=dict(learning_rate=3e-4),
            train=dict(micro_rows=64, eval_every=20, eval_problems=200),  # few sizes to compile
            sampler=dict(rows=128, temperature=1.0),
        )
        config = overlay("", rl, evaluation, {})
        config.grpo.format_reward, config.limits.thread_tokens = 0.1, CAP
        # Divided by their spread, groups without a right answer would teach the form as loudly as others the search.
        config.grpo.advantage, config.grpo.kl_weight = "mean", 0.0
        # Adam's first steps are as long as its rate, whatever the gradient.
        config.optimizer.warmup_steps = 10
        return config
    kind, _, width = preset.partition("-")
    known = kind in PROBLEMS and width in ("16", "32", "64", "128")
    require(known, f"unknown preset {preset!r}: choose grpo, or countdown or multiply with -16, -32, -64 or -128")
    config = dict(
        name=f"zero-{preset}",
        task="zero",
        seed=0,
        init="",
        problems=PROBLEMS[kind],
        model=dict(
            width=int(width), layers=3, heads=2, kv_heads=2, head_width=max(8, int(width) // 2),
            mlp_width=3 * int(width), context=128, rope_theta=500.0, tied=True, dtype="float32",
        ),
        # One validation, at the end: it measures the base model and must not choose it.
        train=dict(rows=32, micro_rows=16, overlong="drop", log_every=100, eval_every=1500, eval_problems=200),
        optimizer=dict(
            matrices="muon", learning_rate=3e-3, end_learning_rate=3e-5, warmup_steps=50, steps=1500,
            weight_decay=0.01, clip=1.0, beta1=0.9, beta2=0.99, momentum=0.95,
        ),
        limits=dict(LIMITS, thread_tokens=CAP),
        # A base model is sampled as RL samples it: its most likely answer says little.
        sampler=dict(
            rows=128, workers=1, steps_per_call=16, length_bucket=32, max_gathered_slots=128 * 128,
            temperature=1.0, top_k=0, top_p=1.0,
        ),
        evaluation=evaluation,
        mesh=MESH,
    )
    return ConfigDict(config).lock()

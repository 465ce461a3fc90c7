"""A second task: the product of two numbers, by children that compute partial products. It trains in a minute.

    python sft.py --config=examples/products.py                                   # learns from written examples
    python grpo.py --config=examples/products.py:grpo --init=runs/products        # and from the reward alone

    12*34=                     the prompt
    <12*4|12*30>               the spawn block: two children, with the prompts 12*4= and 12*30=
    [48+360]                   the join block, in place of the spawn block
    408.                       the answer; a full stop ends a thread

`Products` is the `protocols.Task` that the runtime drives. `ProductsDomain` is the `protocols.Domain` that training
and evaluation use; `harness.tasks.TASKS` enters it under the name "products". Ids are character codes.

Time: one minute for each command on 2 CPU cores. After the first, 0.160 of 100 held-out products were right (one seed),
and 0.360 after three times as many updates.
"""

from __future__ import annotations

import hashlib
import itertools
import random
import re
import typing
from collections.abc import Sequence

from ml_collections import ConfigDict

from checks import require
from configs.common import LIMITS, MESH
from configs.grpo import PAPERS, overlay
from protocols import Domain, MalformedSpawn, Spawn
from records import END, SPAWN, Call, Grade, Rollout, Thread


class Problem(typing.NamedTuple):
    """Multiply two numbers."""

    left: int
    right: int


class Characters:
    """The language: an id is the code of a character."""

    vocab_size = 128

    def encode(self, text: str) -> list[int]:
        """Ids of a text."""
        return [ord(letter) for letter in text]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids."""
        return "".join(map(chr, ids))


LANGUAGE = Characters()
encode, decode = LANGUAGE.encode, LANGUAGE.decode


def answer(thread: Thread) -> str:
    """What a thread hands over; "!" if it did not end."""
    return decode(thread.calls[-1].sampled[:-1]) if thread.stop == END else "!"


class Products:
    """12*34= asks children for 12*4 and 12*30, and adds what they say."""

    end_id, spawn_id = ord("."), ord(">")

    def prompt(self, problem: tuple[int, int]) -> list[int]:
        """12*34=."""
        return encode(f"{problem[0]}*{problem[1]}=")

    def spawn(self, ids: Sequence[int]) -> Spawn:
        """Reads <12*4|12*30>."""
        before, _, block = decode(ids)[:-1].rpartition("<")
        if not re.fullmatch(r"\d+\*\d+(\|\d+\*\d+)*", block):
            raise MalformedSpawn(f"no products: {block!r}")
        return Spawn(len(before), [encode(f"{product}=") for product in block.split("|")])

    def join(self, children: Sequence[Thread]) -> list[int]:
        """Writes [48+360]."""
        return encode("[" + "+".join(answer(child) for child in children) + "]")

    def grade(self, problem: tuple[int, int], root: Thread) -> Grade:
        """The root must end with the product. One that was cut has no answer."""
        if root.stop != END:
            return Grade(False, f"no answer: stopped by {root.stop}")
        found = answer(root)
        right = found == str(problem[0] * problem[1])
        return Grade(right, "" if right else f"{found} is not {problem[0]} * {problem[1]}", (found,))


def parts(problem: tuple[int, int]) -> list[str]:
    """The partial products of a problem: 12*34 -> 12*4, 12*30."""
    left, right = problem
    digits = [(digit, "0" * power) for power, digit in enumerate(reversed(str(right))) if digit != "0"]
    return [f"{left}*{digit}{zeros}" for digit, zeros in digits]


def demonstrate(problem: tuple[int, int]) -> Rollout:
    """The record of a right solution."""
    task, products = Products(), parts(problem)
    results = [str(product_of(product)) for product in products]
    root = Thread((), [Call(0, task.prompt(problem), encode(f"<{'|'.join(products)}>"), stop=SPAWN)])
    root.spawns.append(
        [
            Thread((0, i), [Call(0, encode(f"{product}="), encode(f"{result}."))])
            for i, (product, result) in enumerate(zip(products, results, strict=True))
        ]
    )
    keep = len(root.calls[0].injected)
    root.calls.append(Call(keep, task.join(root.spawns[0]), encode(f"{sum(map(int, results))}.")))
    return Rollout(problem, root, task.grade(problem, root))


def product_of(text: str) -> int:
    """12*30 -> 360."""
    left, right = map(int, text.split("*"))
    return left * right


class ProductsDomain(Domain):
    """Reads `problems` of the configuration: two numbers from low to high, each with two or more digits that are not 0.

    So no problem is what a child computes, and what is held out was never a child's prompt in training.
    """

    example = '{"numbers": [left, right]}'
    language, task = LANGUAGE, Products()

    def __init__(self, config: ConfigDict) -> None:
        low, high = config.problems.low, config.problems.high
        require(1 <= low <= high, f"problems.low={low} must be at least 1 and at most problems.high={high}")
        numbers = [number for number in range(low, high + 1) if len(parts((1, number))) > 1]
        self.family = dict(config.problems)
        self.splits: dict[str, list[Problem]] = {"train": [], "validation": [], "heldout": []}
        for problem in itertools.starmap(Problem, itertools.product(numbers, numbers)):
            # 12 * 34 and 34 * 12 are one problem.
            tenth = hashlib.blake2b(repr(sorted(problem)).encode(), digest_size=1).digest()[0] % 10
            self.splits["heldout" if tenth == 0 else "validation" if tenth == 1 else "train"].append(problem)

    def problem(self, split: str, seed: int, index: int) -> Problem:
        """A random problem of a split."""
        return random.Random(f"{split} {seed} {index}").choice(self.splits[split])

    def problems(self, split: str, n: int) -> Sequence[Problem]:
        """The first `n` problems of a split, in random order."""
        found = random.Random(0).sample(self.splits[split], len(self.splits[split]))
        require(len(found) >= n, f"only {len(found)} {split} problems exist, {n} were asked for: widen problems.high")
        return found[:n]

    def demonstration(self, split: str, seed: int, index: int) -> Rollout:
        """The right solution of a random problem."""
        return demonstrate(self.problem(split, seed, index))

    @staticmethod
    def to_json(problem: Problem) -> dict[str, typing.Any]:
        """{"numbers": [12, 34]}."""
        return {"numbers": list(problem)}

    @staticmethod
    def from_json(entry: typing.Any) -> Problem:
        """The inverse of `to_json`."""
        numbers = entry.get("numbers") if isinstance(entry, dict) else None
        if not isinstance(numbers, list) or len(numbers) != 2 or not all(type(number) is int for number in numbers):
            raise ValueError(f"a problem must be {ProductsDomain.example}, not {entry}")
        return Problem(*numbers)

    @classmethod
    def read_language(cls, facts: dict[str, typing.Any]) -> Characters:
        """Every trace file has the same characters."""
        return LANGUAGE

    def facts(self) -> dict[str, typing.Any]:
        """Nothing but the family of problems."""
        return super().facts() | {"method": "products", "family": self.family}


def get_config(preset: str = "sft") -> ConfigDict:
    """The recipe of supervised training, or with the preset "grpo" of reinforcement learning from it."""
    evaluation = dict(problems=100, samples=1, concurrent=0, seed=0)
    if preset == "grpo":
        rl = dict(
            grpo=dict(PAPERS, steps=20, problems=16, rollouts=8, updates=1),
            optimizer=dict(learning_rate=1e-3),
            train=dict(eval_every=5, eval_problems=100),
            sampler=dict(rows=64, temperature=0.0),
        )
        return overlay("", rl, evaluation, {})
    config = dict(
        name="products",
        task="products",
        seed=0,
        init="",
        problems=dict(low=11, high=49),
        model=dict(
            width=64, layers=2, heads=2, kv_heads=2, head_width=32, mlp_width=192, context=64,
            rope_theta=10_000.0, tied=True, dtype="float32",
        ),
        train=dict(rows=32, micro_rows=16, overlong="drop", log_every=50, eval_every=400, eval_problems=100),
        optimizer=dict(
            matrices="muon", learning_rate=5e-3, end_learning_rate=5e-5, warmup_steps=50, steps=800,
            weight_decay=0.01, clip=1.0, beta1=0.9, beta2=0.99, momentum=0.95,
        ),
        limits=LIMITS,
        sampler=dict(
            rows=64, workers=2, steps_per_call=8, length_bucket=16, max_gathered_slots=4096,
            temperature=0.0, top_k=0, top_p=1.0,
        ),
        evaluation=evaluation,
        mesh=MESH,
    )
    return ConfigDict(config).lock()

"""RL without demonstrations: grading by hand-made cases, the parser against an oracle, and what the base model reads."""

import collections
import random
import re
from fractions import Fraction

import pytest

import grpo
import objective
import sft
from baselines import zero
from countdown.grader import Problem
from harness import tasks
from harness.build import build
from harness.results import read_log
from harness.rollouts import RolloutPool
from harness.workdir import Workdir, load_best
from objective import GrpoConfig
from records import CONTEXT, END, Call, Rollout, Thread

PROBLEM = Problem((2, 5, 7), 17)
PRODUCT = Problem((23, 45), 1035)
LANGUAGE = zero.LANGUAGE
FORM = "2+5=7</think><answer>{}</answer><end>"


def rolled(response, kind="countdown", stop=END):
    """The rollout of a model that wrote a response."""
    task, problem = zero.Zero(kind), PRODUCT if kind == "multiply" else PROBLEM
    root = Thread((), [Call(0, task.prompt(problem), LANGUAGE.encode(response), stop=stop)])
    return Rollout(problem, root, task.grade(problem, root))


@pytest.fixture(scope="module", params=zero.PROBLEMS)
def domain(request):
    return zero.ZeroDomain(zero.get_config(f"{request.param}-64"))


# ------------------------------------------------------------------- grading

CASES = (
    ("(5*2)+7", ""),
    ("7+5*2", ""),
    ("((7)+(5*2))", ""),
    ("2*5*7", "wrong_value"),
    ("7/(5-5)", "wrong_value"),  # it cannot be evaluated, whatever its numbers
    ("5*2+5+2", "wrong_numbers"),  # a number used twice, another not at all
    ("5*2+7+7-7", "wrong_numbers"),  # every number, one of them three times
    ("17", "wrong_numbers"),
    ("7+5+5", "wrong_numbers"),
    ("2+5", "wrong_numbers"),
    ("", "malformed_answer"),
    ("7+", "malformed_answer"),
    ("+7", "malformed_answer"),
    ("-7+5*2", "malformed_answer"),
    ("(5*2)+7)", "malformed_answer"),
    ("((5*2)+7", "malformed_answer"),
    ("(5*2)7", "malformed_answer"),
    ("5**2+7", "malformed_answer"),
    ("5//2+7", "malformed_answer"),
    ("05*2+7", "malformed_answer"),
    ("5*2+7=17", "malformed_answer"),
    ("5*2+7,", "malformed_answer"),
    ("()", "malformed_answer"),
    ("(" * 11 + "7" + ")" * 11 + "+5*2", "malformed_answer"),
    ("9" * 101, "malformed_answer"),
    ("7*" * 20000 + "7", "malformed_answer"),
    ("(" * 50000, "malformed_answer"),
)


@pytest.mark.parametrize(("answer", "kind"), CASES, ids=range(len(CASES)))
def test_an_answer_gets_its_verdict_and_its_reward(answer, kind):
    rollout = rolled(FORM.format(answer))
    assert zero.failure(rollout, LANGUAGE) == kind
    assert rollout.grade.correct == (kind == "") and len(rollout.grade.reason) < 200
    readable = kind != "malformed_answer"
    assert rollout.grade.answer == ((answer,) if readable else ())
    earned = objective.reward(rollout, GrpoConfig(**zero.get_config("grpo").grpo), 1)
    assert earned == (1.0 if rollout.grade.correct else 0.1 if readable else 0.0)


@pytest.mark.parametrize(
    ("answer", "kind"),
    [("1035", ""), ("1034", "wrong_value"), ("23*45", "malformed_answer"), ("(1035)", "malformed_answer"), ("9" * 100, "wrong_value")],
)
def test_a_product_is_one_number(answer, kind):
    assert zero.failure(rolled(FORM.format(answer), "multiply"), LANGUAGE) == kind


@pytest.mark.parametrize(
    "response",
    [
        "",
        "<end>",
        "2+5=7</think><end>",
        "<answer>(5*2)+7</answer><end>",
        "</think>(5*2)+7<end>",
        "</think><answer>1</answer><answer>(5*2)+7</answer><end>",
        "</think><answer>(5*2)+7</answer>;<end>",
        "<text></think><answer>(5*2)+7</answer><end>",
    ],
)
def test_another_form_is_no_answer(response):
    assert zero.failure(rolled(response), LANGUAGE) == "no_answer" and not rolled(response).grade.answer


def test_a_response_that_was_cut_is_no_answer():
    rollout = rolled(FORM.format("(5*2)+7"), stop=CONTEXT)
    assert rollout.grade.reason == "no answer: stopped by context"


def oracle(rng, depth):
    """A random expression, its value worked out beside it (None: division by zero), its numbers, how tightly it binds."""
    if depth == 0 or rng.random() < 0.2:
        number = rng.randint(0, 12)
        return str(number), Fraction(number), [number], 3
    (left, x, some, tight_left), (right, y, others, tight_right) = oracle(rng, depth - 1), oracle(rng, depth - 1)
    sign = rng.choice("+-*/")
    binds = 1 if sign in "+-" else 2
    left = f"({left})" if tight_left < binds or rng.random() < 0.2 else left
    right = f"({right})" if tight_right <= binds or rng.random() < 0.2 else right
    if x is None or y is None or (sign == "/" and y == 0):
        value = None
    else:
        value = {"+": lambda: x + y, "-": lambda: x - y, "*": lambda: x * y, "/": lambda: x / y}[sign]()
    return left + sign + right, value, some + others, binds


def test_the_parser_agrees_with_an_independent_evaluation():
    rng, met = random.Random(0), collections.Counter()
    for _ in range(3000):
        text, value, numbers, _ = oracle(rng, rng.randint(0, 4))
        if len(text) > zero.LONGEST_ANSWER:
            continue
        met["zero" if value is None else "whole" if value.denominator == 1 else "fraction"] += 1
        if value is None:
            with pytest.raises(ZeroDivisionError):
                zero.value_of(text)
        else:
            assert zero.value_of(text) == (value, numbers)
    assert min(met.values()) > 100 and len(met) == 3


def test_no_text_whatever_breaks_the_grader():
    rng = random.Random(1)
    for _ in range(2000):
        answer = "".join(rng.choices("0123456789+-*/()=?,;", k=rng.randint(0, 30)))
        assert zero.failure(rolled(FORM.format(answer)), LANGUAGE) in ("", "malformed_answer", "wrong_numbers", "wrong_value")
        ids = rng.choices(range(LANGUAGE.vocab_size), k=40)
        assert not rolled(LANGUAGE.decode(ids)).grade.correct


# ------------------------------------------------------------------- what the base model reads


def kind_of(text):
    """The kind of a text, by its form."""
    if "<think>" in text:
        return "search"
    if re.fullmatch(r"<text>\d+=\d+\?(yes|no)<end>", text):
        return "check"
    return "fact or sum" if re.fullmatch(r"<text>[\d+*/()-]+=\d+<end>", text) else "other"


def test_texts_come_in_their_shares_and_say_what_is_true(domain):
    rollouts = [domain.demonstration("train", 0, index) for index in range(4000)]
    texts = [LANGUAGE.decode(rollout.root.ids()) for rollout in rollouts]
    kinds = collections.Counter(map(kind_of, texts))
    assert kinds["other"] == 0
    assert kinds["search"] / 4000 == pytest.approx(0.15, abs=0.02)
    assert kinds["check"] / 4000 == pytest.approx(0.25, abs=0.025)
    for text in texts:
        for line in re.split("<[/a-z]+>|;", text):
            claim = re.fullmatch(r"([\d+*/()-]+)=(\d+)(?:=(\d+)\?(yes|no))?", line)
            if claim and "," not in line:
                value, _ = zero.value_of(claim[1])
                assert value == int(claim[2])
                assert claim[4] is None or (claim[4] == "yes") == (claim[2] == claim[3])
    checks = [text for text in texts if kind_of(text) == "check"]
    assert sum("yes" in text for text in checks) / len(checks) == pytest.approx(0.5, abs=0.07)


def test_a_search_that_is_read_is_well_formed_and_aimless(domain):
    """It answers, right by chance, and a line that is right does not stop it."""
    drawn = (domain.demonstration("train", 1, index) for index in range(8000))
    searches = [rollout for rollout in drawn if "<think>" in LANGUAGE.decode(rollout.root.ids())]
    assert all(rollout.grade.answer for rollout in searches)
    assert sum(rollout.grade.correct for rollout in searches) / len(searches) < 0.2
    if domain.task.kind == "countdown":
        assert sum(rollout.grade.correct for rollout in searches) / len(searches) < 0.09
        lines = [line for r in searches for line in LANGUAGE.decode(r.root.ids()).split("</think>")[0].split(";")[:-1]]
        follows = {word: sum(line.endswith(word) for line in lines) for word in ("?yes", "?no")}
        assert follows["?yes"] / follows["?no"] == pytest.approx(0.1, abs=0.03)


def test_every_id_after_the_first_is_trained_on_and_fits_the_context(domain):
    for index in range(500):
        (call,) = domain.demonstration("train", 0, index).root.calls
        assert LANGUAGE.decode(call.injected) == "<text>" and call.sampled[-1] == zero.Zero.end_id
        assert len(call.sampled) + 1 <= 128


def test_a_text_of_the_base_model_is_of_the_training_split(domain):
    """What RL is validated and tested on is never read before."""
    kept = {(*sorted(p.numbers), p.target) for split in ("validation", "heldout") for p in domain.problems(split, 200)}
    for index in range(6000):
        rollout = domain.demonstration("train", 0, index)
        assert (*sorted(rollout.problem.numbers), rollout.problem.target) not in kept
        for line in re.split("<[/a-z]+>|;", LANGUAGE.decode(rollout.root.ids())):
            if claim := re.match(r"([\d+*/()-]+)=", line):
                value, numbers = zero.value_of(claim[1])
                assert (*sorted(numbers), value) not in kept
    assert not {*domain.problems("validation", 200)} & {*domain.problems("heldout", 200)}


def test_prompts_leave_room_for_a_response(domain):
    for split in ("validation", "heldout"):
        for problem in domain.problems(split, 200):
            assert len(domain.task.prompt(problem)) + zero.CAP <= 128
            assert LANGUAGE.decode(domain.task.prompt(problem)) == domain.task.prompt_text(problem)
            assert domain.from_json(domain.to_json(problem)) == problem


def test_counts_of_numbers_take_turns():
    config = zero.get_config("countdown-64")
    config.problems.count_high = 4
    domain = zero.ZeroDomain(config)
    assert [len(domain.problem("train", 0, index).numbers) for index in range(4)] == [3, 4, 3, 4]


@pytest.mark.parametrize(
    ("preset", "field", "value", "message"),
    [
        ("countdown-64", "kind", "chess", "problems.kind='chess' must be one of countdown, multiply"),
        ("countdown-64", "count_low", 4, "problems.count_low=4 must be at most"),
        ("countdown-64", "high", 0, "range of numbers"),
        ("multiply-64", "high", 1000, "problems.low=10 must be"),
    ],
)
def test_what_cannot_work_is_refused(preset, field, value, message):
    config = zero.get_config(preset)
    config.problems[field] = value
    with pytest.raises(ValueError, match=message):
        zero.ZeroDomain(config)
    with pytest.raises(ValueError, match="unknown preset 'tiny'"):
        zero.get_config("tiny")


# ------------------------------------------------------------------- habits, and both stages


def test_draws_that_cannot_succeed_end():
    """Of 2 to 9 every product is a partial one, which is a training problem; no expression of 928 and 949 is one."""
    config = zero.get_config("multiply-64")
    config.problems.low, config.problems.high = 2, 9
    domain = tasks.part("zero", "domain")(config)
    assert domain.problem("train", 0, 0).target
    with pytest.raises(ValueError, match=r"no heldout product of numbers from 2 to 9: widen problems\.high"):
        domain.problem("heldout", 0, 0)
    domain = tasks.part("zero", "domain")(zero.get_config("countdown-64"))
    with pytest.raises(ValueError, match=r"no value of \(928, 949\) up to 999 is a training problem's"):
        domain.line((928, 949), random.Random(0))


def test_habits_are_counted_line_by_line():
    response = "2+5=7;2+5+7=14=17?no;7*5=35=17?no;(5*2)+7=17=17?yes</think><answer>(5*2)+7</answer><end>"
    counted = zero.habits(rolled(response), LANGUAGE)
    expected = {"lines": 4, "checks": 3, "backtracks": 2, "verified": True}
    assert counted == {"tokens": len(LANGUAGE.encode(response)), **expected}
    given_up = zero.habits(rolled("2+5=7=17?no</think><answer>2+5</answer><end>"), LANGUAGE)
    assert (given_up["backtracks"], given_up["verified"]) == (0, False)


def test_the_registry_names_the_task():
    assert tasks.part("zero", "domain") is zero.ZeroDomain
    assert tasks.part("zero", "explain") is zero.failure and tasks.part("zero", "habits") is zero.habits


def test_the_language_reads_what_it_writes():
    text = "<text>2,5=7<think>no;yes?(1+2)-3*4/5</think><answer>0</answer><end>"
    ids = LANGUAGE.encode(text)
    assert LANGUAGE.decode(ids) == text and max(ids) < LANGUAGE.vocab_size == len({*zero.Symbols.symbols})


@pytest.mark.slow
def test_a_base_model_trains_and_rl_goes_on_from_it(tmp_path):
    config = zero.get_config("countdown-16")
    config.mesh.data = 1
    config.optimizer.steps, config.optimizer.warmup_steps, config.train.eval_every = 60, 10, 60
    config.train.eval_problems = config.evaluation.problems = 16
    pool = RolloutPool(build(config))
    sft.train(pool, Workdir(tmp_path / "base", config))
    recipe = zero.get_config("grpo")
    recipe.grpo.steps, recipe.optimizer.warmup_steps, recipe.train.eval_every = 2, 0, 2
    recipe.train.eval_problems = recipe.evaluation.problems = 16
    recipe.mesh.data = 1
    parts = grpo.prepare(tmp_path / "base", recipe)
    params, _ = load_best(tmp_path / "base", parts.param_shapes())
    grpo.train(RolloutPool(parts), Workdir(tmp_path / "rl", parts.config), params)
    (*_, last) = [line for line in read_log(tmp_path / "rl" / "metrics.jsonl") if "validation_accuracy" in line]
    assert last["step"] == 2 and 0 <= last["validation_habit_verified"] <= 1
    assert 0 < last["validation_habit_tokens"] <= zero.CAP

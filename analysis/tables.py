"""The numbers of evaluations as tables in GitHub's markdown, the paper's own beside them."""

from __future__ import annotations

import functools
import typing
from collections import Counter
from collections.abc import Sequence

from analysis.charts import point
from analysis.choose import Entry, ablated, by_problem, forced, free, policy, requested, rl_pairs, sampled, whole
from analysis.labels import PAPER_ACCURACY, PAPER_RL, PAPER_TEMPERATURES, PAPERS_OWN, rank
from countdown.grader import Problem, replay
from countdown.states import solutions
from harness import stats

Row = list[typing.Any]  # cells of a table
EQUAL_TOTAL = tuple(128 << i for i in range(8))  # budgets of tokens at which methods are compared
EQUAL_SEQUENTIAL = (64, 128, 256, 384, 512, 1024)
WANTED = 4  # solutions of a problem that are enough


class Table(typing.NamedTuple):
    """A table of tables.md."""

    title: str
    note: str
    head: str  # names of the columns, with bars between
    rows: list[Row]


def share(estimate: Sequence[float], form: str = ".3f", to: str = "-") -> str:
    """A share or a difference of shares, with its interval."""
    value, low, high = (f"{number:{form}}" for number in estimate)
    return f"{value} ({low}{to}{high})"


def accuracy(entry: Entry) -> str:
    """Accuracy with its interval."""
    return share(point(entry)[1:])


def cost(entry: Entry, name: str, digits: int = 0) -> str:
    """Mean of a cost over problems, with half its interval."""
    value, low, high = stats.normal(by_problem(entry, name))
    return f"{value:,.{digits}f} ± {(high - low) / 2:,.{digits}f}"


def costs(entry: Entry) -> list[str]:
    """The costs that all tables name."""
    return [cost(entry, "total_tokens"), cost(entry, "sequential_tokens"), cost(entry, "children", 1)]


def used_of(entry: Entry, name: str) -> str:
    """How an entry adherence to the budget it was given; empty if it was given none."""
    return f"{entry.adherence[name]:.3g}" if entry.adherence else ""


def paper_accuracy(entry: Entry) -> str:
    """What the paper reports for this label, budget and temperature; empty if nothing."""
    row = PAPER_ACCURACY.get((entry.label, entry.budget))
    known = row and entry.temperature in PAPER_TEMPERATURES
    return f"{row[PAPER_TEMPERATURES.index(entry.temperature)]:.3f}" if row and known else ""


def accuracy_table(entries: Sequence[Entry]) -> Table:
    """Accuracy by method and temperature."""
    rows = [
        [e.label, f"{e.temperature:g}", accuracy(e), e.n, e.training_seed, e.seed, paper_accuracy(e)]
        for e in free(entries)
    ]
    head = "method | temperature | accuracy | problems | training seed | seed of draws | paper"
    return Table("Table 1. Accuracy by method and temperature", PAPERS_OWN, head, rows)


def rl_table(entries: Sequence[Entry]) -> Table:
    """What reinforcement learning changed."""
    rows = []
    for pair in rl_pairs(entries):
        (before, after), correct = pair, [by_problem(e, "correct") for e in pair]
        cells = [[accuracy(e) for e in pair], [share(stats.paired(*correct), "+.3f", " to ")]]
        cells += [[*both] for both in zip(*map(costs, pair), strict=True)]
        cells += [[f"{e.total_tokens / (1 + e.children):,.0f}" for e in pair], [*map(paper_accuracy, pair)]]
        row: Row = [after.label, f"{before.temperature:g}", before.budget, after.training_seed]
        row += [" → ".join(filter(None, cell)) for cell in cells]
        if (before.temperature, before.budget) == (0, "no budget"):
            row[-1] += PAPER_RL.get(before.label, "")
        rows.append(row)
    note = "The difference is paired, problem by problem; tokens per thread are total tokens / (1 + child threads). "
    head = "method | temperature | budget | training seed | accuracy | difference | total tokens | sequential tokens"
    head += " | child threads | tokens per thread | paper"
    return Table("Table 2. Reinforcement learning, before → after", note + PAPERS_OWN, head, rows)


def ablation_table(entries: Sequence[Entry]) -> Table:
    """Greedy entries that were asked for threads or tokens or join in another way, beside the same as trained."""
    greedy = [e for e in entries if e.temperature == 0]
    changed = requested(greedy, "children", 0) + requested(greedy, "tokens", 0) + whole(ablated(greedy))
    policies = {policy(e) for e in changed}
    chosen = sorted([e for e in free(greedy) if policy(e) in policies] + changed, key=lambda e: rank(e.label))
    rows = [
        [e.label, e.budget, accuracy(e), *costs(e), used_of(e, "within"), used_of(e, "used"), paper_accuracy(e)]
        for e in chosen
    ]
    head = "method | requested or changed | accuracy | total tokens | sequential tokens | child threads"
    head += " | share within the budget | mean use of it | paper"
    return Table("Table 3. Budgets requested, and other joins, greedy", PAPERS_OWN, head, rows)


def forcing_table(entries: Sequence[Entry]) -> Table:
    """Every point of budget forcing, and after those of a line what s1 makes of them."""
    rows: list[Row] = []
    for group in forced(entries):
        name = [group[0].label, f"{group[0].temperature:g}"]
        for e in group:
            rows.append([*name, e.budget, accuracy(e), cost(e, "total_tokens"), used_of(e, "within"), "", ""])
        controls = [e.adherence["within"] for e in group if e.adherence]
        control = f"{sum(controls) / len(controls):.3g}" if controls else ""
        rows.append([*name, *_s1([(e.total_tokens, e.accuracy) for e in group], control)])
    rows += [row for e in sampled(entries) for row in _resampled(e)]
    note = "After s1 (arXiv 2501.19393). Control: share of rollouts within the budget. Scaling: mean slope of accuracy "
    note += "per 1,000 total tokens, over all pairs of budgets. Performance: the highest accuracy. Resampled: tokens "
    note += "of accepted answers alone."
    head = "method | temperature | budget | accuracy | total tokens | Control | Scaling | Performance"
    return Table("Table 4. Budget forcing", note, head, rows)


def _s1(points: Sequence[tuple[float, float]], control: str) -> Row:
    """What s1 makes of the points (total tokens, accuracy) of a line: the end of their last row."""
    slope = f"{1000 * stats.scaling(points):+.3f}" if len({x for x, _ in points}) > 1 else ""
    return [f"these {len(points)}", "", "", control, slope, f"{max(y for _, y in points):.3f}"]


def _resampled(entry: Entry) -> list[Row]:
    """Rows of rejection sampling: a problem is sampled again until its rollout costs at most a bound."""
    correct, spent = ([getattr(r, name) for r in entry.results] for name in ("correct", "total_tokens"))
    name, points, rows = [entry.label, f"{entry.temperature:g}"], [], list[Row]()
    for bound in (entry.context * eighth // 8 for eighth in range(2, 9)):
        estimate, tokens = stats.resampled(correct, spent, bound, entry.samples)
        points.append((tokens, estimate[0]))
        rows.append([*name, f"resampled to at most {bound} tokens", share(estimate), f"{tokens:,.0f}", "1", "", ""])
    return [*rows, [*name, *_s1(points, "1")]]


def equal_table(entries: Sequence[Entry]) -> Table:
    """What every method achieves at equal total tokens, and at equal sequential tokens: as many samples as they pay.

    Samples run side by side, so k of them take the sequential tokens of the longest.
    """
    rows: list[Row] = []
    for kind, budgets in (("total", EQUAL_TOTAL), ("sequential", EQUAL_SEQUENTIAL)):
        for budget in budgets:
            for e in [*free(entries, 0.0), *sampled(entries)]:
                costs = {k: _together(e, int(k), kind) for k in e.pass_at}
                if paid := [k for k, cost in costs.items() if cost <= budget]:
                    k = max(paid, key=int)
                    row = [e.label, f"{e.temperature:g}", k, share(e.cons_at[k]), share(e.pass_at[k])]
                    rows.append([kind, f"{budget:,}", *row, f"{costs[k]:,.0f}"])
    note = "The most samples whose mean tokens stay within the budget. cons@k is the majority, pass@k any of them."
    head = "tokens | budget | method | temperature | k | cons@k | pass@k | tokens used"
    return Table("Table 8. All methods at equal tokens", note, head, rows)


def _together(entry: Entry, k: int, kind: str) -> float:
    """Mean tokens of k samples of a problem: of all of them, or of the longest (of the whole groups of k)."""
    if kind == "total":
        return k * entry.total_tokens
    problems = stats.grouped([r.sequential_tokens for r in entry.results], entry.samples)
    longest = [max(p[i : i + k]) for p in problems for i in range(0, entry.samples - k + 1, k)]
    return sum(longest) / len(longest)


def failure_table(entries: Sequence[Entry]) -> Table:
    """Why greedy rollouts failed, the kind that is most frequent over all methods first."""
    chosen = free(entries, 0.0)
    totals = Counter[str]()
    for e in chosen:
        totals.update(e.failures)
    rows = []
    for e in chosen:
        counts = [round(e.failures.get(kind, 0) * e.n) for kind, _ in totals.most_common()]
        shares = [share((count / e.n, *stats.wilson(count, e.n))) for count in counts]
        rows.append([e.label, e.training_seed, *shares])
    head = " | ".join(["method", "training seed", *(kind.replace("_", " ") for kind, _ in totals.most_common())])
    return Table("Table 5. Shares of problems by what the greedy rollout failed by", "", head, rows)


def cost_table(entries: Sequence[Entry]) -> Table:
    """What a problem costs, greedy: one at a time, and all side by side."""
    waits = {policy(e): cost(e, "milliseconds") for e in free(entries, 0.0, alone=True)}
    loads = {policy(e): f"{e.throughput_ms:.1f}" for e in free(entries, 0.0)}
    either = {policy(e): e for alone in (True, False) for e in free(entries, 0.0, alone)}
    rows = [
        [e.label, e.training_seed, *costs(e), waits.get(key, ""), loads.get(key, "")]
        for key, e in sorted(either.items(), key=lambda item: rank(item[1].label))
    ]
    note = "Alone: from start to end, one problem at a time. Under load: wall clock of all / problems."
    head = "method | training seed | total tokens | sequential tokens | child threads | ms alone | ms under load"
    return Table("Table 6. Cost per problem, greedy", note, head, rows)


def samples_table(entries: Sequence[Entry]) -> Table:
    """What k samples of a problem achieve together."""
    rows = [
        [e.label, f"{e.temperature:g}", k, share(e.cons_at[k]), share(e.pass_at[k]), f"{int(k) * e.total_tokens:,.0f}"]
        for e in sampled(entries)
        for k in sorted(e.pass_at, key=int)
    ]
    note = "cons@k: the majority over solution paths is right. pass@k: at least one of k is, estimated without bias."
    head = "method | temperature | k | cons@k | pass@k | total tokens"
    return Table("Table 7. Several samples of each problem", note, head, rows)


def solutions_table(entries: Sequence[Entry]) -> Table:
    """How many of the distinct solutions of a Countdown problem all samples together find (AsyncThink)."""
    rows = []
    for e in (e for e in sampled(entries) if e.task == "countdown"):
        found, there = [], []
        for group in stats.grouped(e.results, e.samples):
            problem = Problem(tuple(group[0].problem["numbers"]), group[0].problem["target"])
            found.append(len({_states(problem, result.answer) for result in group if result.correct}))
            there.append(_solutions(problem))
        shares = [have / every for have, every in zip(found, there, strict=True)]
        enough = [float(have >= min(WANTED, every)) for have, every in zip(found, there, strict=True)]
        row = [e.label, f"{e.temperature:g}", e.samples, f"{e.samples * e.total_tokens:,.0f}"]
        row += [f"{sum(values) / e.n:.2f}" for values in (found, there)]
        rows.append([*row, share(stats.mean_with_interval(shares)), share(stats.mean_with_interval(enough))])
    note = "Multi-solution Countdown (AsyncThink, arXiv 2510.26658), by samples. Two solutions are one if they go "
    note += f"through the same states. The last column: at least {WANTED} solutions, or all where there are fewer."
    head = "method | temperature | samples | total tokens | found | solutions | share found | enough found"
    return Table("Table 9. Distinct solutions", note, head, rows)


@functools.cache
def _solutions(problem: Problem) -> int:
    return sum(1 for _ in solutions([*problem.numbers], problem.target))


def _states(problem: Problem, steps: Sequence[str]) -> tuple[tuple[int, ...], ...]:
    """The numbers that are left after each step of a right answer, sorted."""
    return tuple(tuple(sorted(replay(problem, steps[:count])[0])) for count in range(1, len(steps) + 1))


TABLES = (
    accuracy_table, rl_table, ablation_table, forcing_table, failure_table, cost_table, samples_table, equal_table,
    solutions_table,
)  # fmt: skip


def markdown(table: Table) -> str:
    """A table in GitHub's markdown."""
    lines = [table.head, " | ".join(["---"] * len(table.head.split(" | ")))]
    lines += [" | ".join(map(str, row)) for row in table.rows]
    return f"\n**{table.title}.** {table.note}\n\n" + "".join(f"| {line} |\n" for line in lines)

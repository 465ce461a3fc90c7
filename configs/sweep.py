"""What `evaluate.py --sweep` measures: the paper's comparisons for the runs of one preset.

    python evaluate.py --sweep=configs/sweep.py            # preset laptop: docs/reproduce.md has its runs
    python evaluate.py --sweep=configs/sweep.py:PRESET     # smoke, laptop, desktop, gpu, paper
    python -m analysis.figures --results=runs/sweep

An entry is a label for tables, the workdir of a run, and a grid: field of its config -> values. Every combination is a
point. Entries whose run has not been trained are left out. A sweep of one's own is a file like this one, whose
`get_config` returns a name and entries.
"""

from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict

from analysis.labels import COMPARED, RUNS
from configs.common import choose


class Budgets(NamedTuple):
    """What the methods of one preset are given."""

    children: tuple[int, ...]  # to ask APR for
    tokens: tuple[int, ...]  # to ask SoS+ for
    cuts: tuple[int, ...]  # tokens after which an answer is forced
    min_budget_rounds: tuple[int, ...] = (1, 2, 4)  # times that a search that ends is sent on
    temperatures: tuple[float, ...] = (0.0, 0.1, 0.5, 1.0)  # the paper's table 1
    samples: tuple[int, int] = (8, 8)  # of each problem at temperature 1: of SoS+, of APR


BUDGETS = {
    "smoke": Budgets(children=(0, 2), tokens=(512,), cuts=(64,)),
    "laptop": Budgets(
        children=(0, 2, 3, 4, 5, 6, 8), tokens=(192, 256, 320, 384, 512), cuts=(192, 256, 320), min_budget_rounds=(1,)
    ),
    # A rollout of APR takes seven times the tokens of laptop's, four times those of SoS+: samples of equal cost.
    "desktop": Budgets(
        children=(0, 2, 3, 5),
        tokens=(256, 512, 768, 1024),
        cuts=(384, 640),
        min_budget_rounds=(),
        temperatures=(0.0, 0.5, 1.0),
        samples=(16, 4),
    ),
    "gpu": Budgets(children=(0, 2, 4, 6, 8, 10), tokens=(512, 1024, 1536, 2048), cuts=(512, 1024, 1536)),
    "paper": Budgets(children=(0, 1, 2, 3, 4, 6, 8, 10), tokens=(512, 1024, 2048, 3072, 4096), cuts=(1024, 2048, 3072)),
}


def get_config(preset: str = "laptop") -> ConfigDict:
    """The sweep of one preset. Raises ValueError on an unknown one."""
    budgets = choose(BUDGETS, preset)
    suffix = "" if preset == "laptop" else f"-{preset}"

    pair, trained = ("SoS+", "APR"), ("Direct", "SoS", "SoS RL", "SoS+", "SoS+ RL", "APR", "APR RL")

    def at(*temperatures: float) -> dict[str, tuple]:
        """One temperature for all methods, whatever their runs evaluate at."""
        return {"sampler.temperature": temperatures}

    alone = {**at(0.0), "evaluation.concurrent": (1,)}
    grids: list[tuple[tuple[str, ...], dict[str, tuple]]] = [
        (trained, at(*budgets.temperatures)),
        (("SoS+", "SoS+ RL"), {**at(1.0), "evaluation.samples": budgets.samples[:1]}),
        (("APR", "APR RL"), {**at(1.0), "evaluation.samples": budgets.samples[1:]}),
        (("Direct",), {**at(1.0), "evaluation.samples": (256,)}),  # of about a tenth of the tokens
        (trained, alone),
        (("APR sequential",), {**alone, "sampler.rows": (2,), "sampler.workers": (1,)}),
        (("APR",), {**at(0.0), "budget.children": budgets.children}),
        (("APR", "APR RL fixed"), {**at(0.0, 0.5, 1.0), "budget.children": budgets.children[-1:]}),
        (("SoS+",), {**at(0.0), "budget.tokens": budgets.tokens}),
        (pair, {"limits.thread_tokens": budgets.cuts, "limits.forced_answer_tokens": (96,)}),
        (pair, {"limits.min_budget_rounds": budgets.min_budget_rounds}),
        (("APR",), {"threads.child_returns": ("text",)}),
        (("APR",), {"threads.inherit_context": (True,)}),
        (("APR text", "APR inherit"), {}),
    ]

    def workdir(label: str) -> str:
        """One's own run if it is there, else the shipped one."""
        name = f"{(RUNS | COMPARED)[label]}{suffix}"
        shipped = Path(f"pretrained/{name}").is_dir() and not Path(f"runs/{name}").is_dir()
        return f"{'pretrained' if shipped else 'runs'}/{name}"

    entries = tuple(
        {"label": label, "workdir": workdir(label), "grid": grid} for labels, grid in grids for label in labels
    )
    return ConfigDict({"name": f"sweep{suffix}", "entries": entries}).lock()

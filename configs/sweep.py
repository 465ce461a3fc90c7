"""What `evaluate.py --sweep` measures: the paper's comparisons for the runs of one preset.

    python evaluate.py --sweep=configs/sweep.py            # preset laptop: the README says how its runs are trained
    python evaluate.py --sweep=configs/sweep.py:PRESET     # smoke, laptop, desktop, gpu, paper
    python figures.py --results=runs/sweep

An entry is a label for tables, the workdir of a run, and a grid: field of its config -> values. Every combination is a
point. Entries whose run has not been trained are left out. A sweep of one's own is a file like this one, whose
`get_config` returns a name and entries.
"""

from pathlib import Path
from typing import NamedTuple

from ml_collections import ConfigDict

# Label -> name of its run; tables and legends keep this order.
RUNS = {
    "SoS": "sos",
    "SoS RL": "grpo-sos",
    "SoS+": "sosp",
    "SoS+ RL": "grpo-sosp",
    "SoS+ asked": "sosp-asked",
    "APR": "apr",
    "APR RL": "grpo-apr",
    "APR asked": "apr-asked",
    "APR asked RL": "grpo-apr-asked",
}
# The same of what is compared with one of these: joins and inheritance retrained, longer demonstrations, and APR with
# a row for the parent and one for its children in turn.
COMPARED = {"APR text": "apr-text", "APR inherit": "apr-inherit", "SoS+ wide": "sosp-wide", "APR in turn": "apr"}


class Budgets(NamedTuple):
    """What the methods of one preset are given."""

    threads: tuple[int, ...]  # to ask APR for
    tokens: tuple[int, ...]  # to ask SoS+ for
    cuts: tuple[int, ...]  # tokens after which an answer is forced
    extensions: tuple[int, ...] = (1, 2, 4)  # times that a search that ends is sent on
    temperatures: tuple[float, ...] = (0.0, 0.1, 0.5, 1.0)  # the paper's table 1
    samples: tuple[int, int] = (8, 8)  # of each problem at temperature 1: of SoS+, of APR


BUDGETS = {
    "smoke": Budgets((0, 2), (512,), (64,)),
    "laptop": Budgets((0, 2, 3, 4, 5), (192, 256, 320, 384, 512), (128, 192, 256, 320, 384)),
    # A rollout of APR takes seven times the tokens of laptop's, four times those of SoS+: samples of equal cost.
    "desktop": Budgets((0, 2, 3, 5), (256, 512, 768, 1024), (384, 640), (), (0.0, 0.5, 1.0), (16, 4)),
    "gpu": Budgets((0, 2, 4, 6, 8, 10), (512, 1024, 1536, 2048), (512, 1024, 1536)),
    "paper": Budgets((0, 1, 2, 3, 4, 6, 8, 10), (512, 1024, 2048, 3072, 4096), (1024, 2048, 3072)),
}


def get_config(preset: str = "laptop") -> ConfigDict:
    """The sweep of one preset. Raises ValueError on an unknown one."""
    if preset not in BUDGETS:
        raise ValueError(f"unknown preset {preset!r}: choose one of {', '.join(BUDGETS)}")
    budgets = BUDGETS[preset]
    suffix = "" if preset == "laptop" else f"-{preset}"

    pair, trained = ("SoS+", "APR"), ("SoS", "SoS RL", "SoS+", "SoS+ RL", "APR", "APR RL")

    def at(*temperatures: float) -> dict[str, tuple]:
        """GRPO's policy has a temperature of its own, which multiplies the sampler's: 1 makes methods comparable."""
        return {"model.temperature": (1.0,), "sampler.temperature": temperatures}

    alone = {**at(0.0), "evaluation.concurrent": (1,)}
    grids: list[tuple[tuple[str, ...], dict[str, tuple]]] = [
        (trained, at(*budgets.temperatures)),
        (("SoS+", "SoS+ RL"), {**at(1.0), "evaluation.samples": budgets.samples[:1]}),
        (("APR", "APR RL"), {**at(1.0), "evaluation.samples": budgets.samples[1:]}),
        (trained, alone),
        (("APR in turn",), {**alone, "sampler.rows": (2,), "sampler.lanes": (1,)}),
        (("APR asked", "APR asked RL"), {**at(0.0), "prompt.sub_calls": budgets.threads}),
        (("APR asked", "APR asked RL"), {**at(0.5, 1.0), "prompt.sub_calls": budgets.threads[-1:]}),
        (("SoS+ asked",), {"prompt.tokens": budgets.tokens}),
        (pair, {"limits.thread_tokens": budgets.cuts, "limits.answer_tokens": (96,)}),
        (pair, {"limits.extensions": budgets.extensions}),
        (("APR",), {"threads.join": ("text",)}),
        (("APR",), {"threads.inherit": (True,)}),
        (("APR text", "APR inherit", "SoS+ wide"), {}),
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

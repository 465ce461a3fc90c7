"""Names of runs and methods for tables and legends, and the numbers of the paper beside them."""

from __future__ import annotations

import re

# Label -> name of its run. Tables and legends keep this order.
RUNS = {
    "Direct": "direct",
    "SoS": "sos",
    "SoS RL": "grpo-sos",
    "SoS+": "sosp",
    "SoS+ RL": "grpo-sosp",
    "APR": "apr",
    "APR RL": "grpo-apr",
    "APR RL fixed": "grpo-apr-fixed",  # trained with a fixed number of children in the prompts
}
# Label -> run of what is compared with one of these: joins and inheritance retrained, and APR whose children decode one
# after another (two rows: the parent keeps one).
COMPARED = {"APR text": "apr-text", "APR inherit": "apr-inherit", "APR sequential": "apr"}
LABELS = tuple(RUNS)
# Folder of a run, without its preset -> label. RUNS come last: the label of "apr" is "APR", not "APR sequential".
RUN_LABELS = {run: label for label, run in (COMPARED | RUNS).items()}

# The paper (arXiv 2504.15466): accuracy at its temperatures, what RL changed, points of its figures 4a and 6b.
PAPER_FAMILY = {"count": 4, "low": 1, "high": 99, "target_low": 10, "target_high": 100}
PAPER_TEMPERATURES = (0.0, 0.1, 0.5, 1.0)
PAPER_ACCURACY = {
    ("SoS", "no budget"): (0.495, 0.496, 0.471, 0.379),
    ("SoS+", "no budget"): (0.573, 0.571, 0.520, 0.481),
    ("SoS+ RL", "no budget"): (0.600, 0.593, 0.591, 0.581),
    ("APR", "no budget"): (0.755, 0.759, 0.749, 0.678),
    ("APR RL", "no budget"): (0.834, 0.829, 0.813, 0.764),
    ("APR", "10 children requested"): (0.832, 0.833, 0.838, 0.801),
    ("APR RL fixed", "10 children requested"): (0.833, 0.833, 0.838, 0.819),
}
PAPER_TOKENS = {"SoS+": (2201, 2660), "APR": (10964, 16720)}  # before and after RL
PAPER_RL = {label: f"; total tokens {before:,} → {after:,}" for label, (before, after) in PAPER_TOKENS.items()}
PAPER_RL["APR"] += "; tokens per thread 1,471 → 1,796; child threads 6.1 → 8.2"
PAPERS_OWN = "Column paper: Pan et al. (2025), on their own task, four numbers to 99, with 228M parameters."
PAPER_COMPUTE = {"SoS+": [(20000, 0.666)], "APR": [(20000, 0.801)]}  # majority of seven samples; ten threads
PAPER_LATENCY = {"SoS+": [(5000, 0.573)], "APR": [(5000, 0.752)]}


def label_of(name: str, other: str) -> str:
    """The label of a run by its name, without its preset; `other` if it is not ours."""
    return RUN_LABELS.get(re.sub("-(smoke|desktop|gpu|paper)$", "", name), other)


def rank(label: str) -> tuple[int, str]:
    """Sorts labels: ours in the order of LABELS, then others by name."""
    return (LABELS.index(label) if label in LABELS else len(LABELS), label)

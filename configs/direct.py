"""Direct solutions: no search, one correct path. Many samples of it are the baseline of every search in the text.

    python sft.py --config=configs/direct.py         # same model and updates as configs/apr.py
    python evaluate.py --workdir=runs/direct --config.sampler.temperature=1 --config.evaluation.samples=64

The second command prints pass@k and the majority of k samples. "Optimal path" in Stream of Search (arXiv 2404.03683);
against search at equal tokens in "To Backtrack or Not to Backtrack" (arXiv 2504.07052).

Time: as configs/apr.py. Expected score: see docs/results.md.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(preset: str = "laptop") -> ConfigDict:
    """The first solution of a depth-first search, in the order of the heuristic. Raises ValueError."""
    return common.recipe("direct", preset, beam_high=1, sub_beam_high=1, spawn_probability=0.0)

"""Stream of Search: one thread, depth-first or breadth-first per demonstration (Gandhi et al., arXiv 2404.03683).

    python sft.py --config=configs/sos.py            # same model, tokens and time as configs/apr.py

Time: as configs/apr.py. Expected score: see docs/results.md.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(preset: str = "laptop") -> ConfigDict:
    """Breadth-first traces have beam 1..5, of small presets always 5. Nothing is ever spawned."""
    return common.recipe("sos", preset, beam_high=5, sub_beam_high=5, spawn_probability=0.0)

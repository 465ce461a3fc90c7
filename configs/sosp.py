"""SoS+: one thread, best first with a beam. A coin has children searched next, in place. APR's baseline.

    python sft.py --config=configs/sosp.py           # same model, tokens and time as configs/apr.py

Time: as configs/apr.py. Expected score: see README.
"""

from ml_collections import ConfigDict

from configs import common


def get_config(preset: str = "laptop") -> ConfigDict:
    """Beam 1..5, as in the paper. Half of the nodes are searched in place. Raises ValueError on an unknown preset."""
    return common.recipe("sosp", preset, beam_high=5, sub_beam_high=5, spawn_probability=0.5)

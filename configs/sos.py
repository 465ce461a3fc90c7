"""Stream of Search: one thread, DFS or BFS per demonstration (Gandhi et al., 2024).

    python sft.py --config=configs/sos.py            # same model, tokens and time as configs/apr.py
"""

from configs import common


def get_config(preset: str = "laptop"):
    """Beam 1..5 for BFS traces; nothing is ever spawned."""
    return common.recipe("sos", preset, beam_high=5, sub_beam_high=5, spawn_probability=0.0)

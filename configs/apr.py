"""APR by supervised fine-tuning: parents that spawn children, from symbolic demonstrations.

    python sft.py --config=configs/apr.py            # preset laptop: 2 CPU cores, at most 30 minutes
    python sft.py --config=configs/apr.py:PRESET     # smoke, laptop, desktop, gpu, paper
"""

from configs import common


def get_config(preset: str = "laptop"):
    """Parents draw their beam from 1..beam_high, children from beam..sub_beam_high (paper: 10 and 15)."""
    beams = {"smoke": (3, 8), "laptop": (5, 8), "desktop": (5, 8)}
    beam_high, sub_beam_high = beams.get(preset, (10, 15))
    return common.recipe("apr", preset, beam_high, sub_beam_high, spawn_probability=0.9)

"""APR by supervised fine-tuning: parents that spawn children, from symbolic demonstrations.

    python sft.py --config=configs/apr.py            # preset laptop
    python sft.py --config=configs/apr.py:PRESET     # smoke, laptop, desktop, gpu, paper

Time: laptop about 27 minutes and desktop at most 2 hours on 2 CPU cores. Expected score: see README.
"""

from ml_collections import ConfigDict

from configs import common

# Parents that state a budget draw their beam from 1..beam_high; of small presets the others always take beam_high.
# Children draw theirs from the parent's beam..sub_beam_high. With a cost limit a beam is the most that are kept.
BEAMS = {
    "smoke": dict(beam_high=3, sub_beam_high=8),
    "laptop": dict(beam_high=8, sub_beam_high=8),
    "desktop": dict(beam_high=8, sub_beam_high=8),
    "gpu": dict(beam_high=10, sub_beam_high=15),  # the paper's
    "paper": dict(beam_high=10, sub_beam_high=15),
}


def get_config(preset: str = "laptop") -> ConfigDict:
    """The recipe of one preset. Raises ValueError on an unknown one."""
    return common.recipe("apr", preset, **common.choose(BEAMS, preset), spawn_probability=0.9)

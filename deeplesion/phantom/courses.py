"""How a distractor of the phantom runs through the slices: how fast it moves on, where it ends.

'oblique' is the phantom's first kind: each distractor moves on by at least 2 px in 2 mm. 'varied'
mixes distractors that betray themselves at different distances (docs/study_design.md says why).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

PERSIST = 17.0  # mm most distractors go on unchanged on each side of their key slice ...
FADE = 3.0  # ... before they fade out over these mm

# How often each course is drawn.
DISTRACTORS = {
    "oblique": {"oblique": 1.0},
    "varied": {"oblique": 0.1, "slow": 0.1, "straight": 0.1, "stub": 0.7},
}
# The speed of slow ones and stubs in shares of an oblique one's, even on a logarithmic scale.
SLOW = (0.05, 1.0)
STUB_ENDS = 2.5, 7.0  # mm


class Course(NamedTuple):
    """A distractor's way through the slices.

    Attributes:
        name: 'oblique', 'slow', 'straight' (along z) or 'stub'.
        velocity: (x, y), px in-plane a mm of z.
        ends: mm to its end towards lower and towards higher z: a stub has tapered off there, any
            other has gone on unchanged and fades out over FADE mm more.
    """

    name: str
    velocity: np.ndarray
    ends: tuple[float, float]

    def at(self, away: float) -> tuple[float, float]:
        """`away` mm from the key slice: opacity, and size of the section, in shares of those there.

        A stub narrows as an ellipsoid does, so that it ends as a lesion would.
        """
        end = self.ends[int(away > 0)]
        if self.name == "stub":
            size = math.sqrt(max(1 - (away / end) ** 2, 0.0))
            return float(size > 0), size
        return min((end + FADE - abs(away)) / FADE, 1.0), 1.0


def draw_course(rng: np.random.Generator, distractors: str, diameter: float) -> Course:
    """Draw a course of one of the mixtures of `DISTRACTORS` for a section `diameter` px long."""
    shares = DISTRACTORS[distractors]
    name = next(iter(shares))
    if len(shares) > 1:
        name = str(rng.choice(list(shares), p=list(shares.values())))
    # At least 2 px in 2 mm; a larger section must move more before the step can be seen.
    speed = max(1.1, 0.06 * diameter) * rng.uniform(1, 1.4)
    angle = rng.uniform(0, 2 * np.pi)
    ends = (PERSIST, PERSIST)
    if name in ("slow", "stub"):
        speed *= math.exp(rng.uniform(*np.log(SLOW)))
    elif name == "straight":
        speed = 0.0
    if name == "stub":
        ends = tuple(rng.uniform(*STUB_ENDS, 2).tolist())
    return Course(name, speed * np.array([np.cos(angle), np.sin(angle)]), ends)

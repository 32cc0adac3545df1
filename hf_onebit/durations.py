"""Times, as people read them."""

from __future__ import annotations

import math


def shown_estimate(seconds: float) -> str:
    """An estimate, such as "12 min": in seconds below 90, in hours from 90 minutes on, never 0."""
    if seconds < 90:
        return f"{max(1, math.ceil(seconds))} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def shown_duration(seconds: float) -> str:
    """What was measured, such as "12 min 7 s"."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"

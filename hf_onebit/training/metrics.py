"""What an optimizer step did to packed codes, as numbers to log."""

from __future__ import annotations

import math
from collections.abc import Iterable

from hf_onebit.nn.update_step import Tally

__all__ = ["summary"]


def summary(tallies: Iterable[Tally]) -> dict[str, float]:
    """Rates over all weights that the tallies are of; empty without any.

    Returns:
        flip_rate: share of codes that changed.
        saturation: share of codes at the first or the last of their levels, where they can go one way only.
        update_levels: mean size of a step in levels; of signs, the share that this step's votes were against.
        update_signal: root of the steps' mean square over that of the noise of their rounding. Far below 1 the noise
            is most of what moves: a lower learning rate, or larger batches, only helps after more steps. 0 for signs.
    """
    parts = list(tallies)
    weights = sum(part.weights for part in parts)
    if not weights:
        return {}
    changed, saturated, moved, squared, noise = (
        sum(float(getattr(part, name)) for part in parts)
        for name in ("changed", "saturated", "moved", "squared", "noise")
    )
    return {
        "flip_rate": changed / weights,
        "saturation": saturated / weights,
        "update_levels": moved / weights,
        "update_signal": math.sqrt(squared / noise) if noise > 0 else 0.0,
    }

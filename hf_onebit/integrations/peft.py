"""PEFT: adapters train beside packed weights; merging one into them is refused, since it would overwrite packed words.

Imported when PEFT is (``on_import.py``), never before.
"""

from __future__ import annotations

import functools
from typing import Any

from peft.tuners.tuners_utils import BaseTuner

from hf_onebit.nn.replace import PACKED


def guard_merges() -> None:
    """Make every tuner refuse to merge into a model that holds adapters on packed layers. Calling it again is fine."""
    original = BaseTuner._check_merge_allowed
    if getattr(original, "guards_packed_layers", False):
        return

    @functools.wraps(original)
    def check(self: Any) -> Any:
        packed = [name for name, module in self.model.named_modules() if _adapts_packed_layer(module)]
        if packed:
            raise ValueError(
                f"Cannot merge an adapter into packed weights ({len(packed)} such layers, the first is {packed[0]}): "
                "the sum has no packed form. Keep the adapter beside the model (model.save_pretrained), or merge it "
                "into the float model that hf_onebit.load(path, dequantize=True) gives"
            )
        return original(self)

    check.guards_packed_layers = True  # type: ignore[attr-defined]
    BaseTuner._check_merge_allowed = check  # type: ignore[method-assign]


def _adapts_packed_layer(module: Any) -> bool:
    get_base_layer = getattr(module, "get_base_layer", None)
    return callable(get_base_layer) and isinstance(get_base_layer(), PACKED)

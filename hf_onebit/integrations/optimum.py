"""Optimum: our quantizer counts as one of Optimum's.

    import hf_onebit.integrations.optimum
    isinstance(OneBitQuantizer(OneBitConfig()), optimum.quantization_base.OptimumQuantizer)   # True

`OneBitQuantizer` offers the methods of that abstract class anyway; it is registered as a virtual subclass
here, and not derived from it, because Optimum is an optional dependency. The command for `optimum-cli` is in
`optimum_register/`.
"""

from optimum.quantization_base import OptimumQuantizer

from ..quantize import OneBitQuantizer

__all__ = ["OneBitQuantizer"]

OptimumQuantizer.register(OneBitQuantizer)

"""Optimum: our quantizers count as Optimum's.

    import hf_onebit.integrations.optimum
    isinstance(OneBitQuantizer(OneBitConfig()), optimum.quantization_base.OptimumQuantizer)   # True

``OneBitQuantizer`` and ``MPQQuantizer`` offer the methods of that abstract class anyway; they are registered as virtual
subclasses here, and not derived from it, because Optimum is an optional dependency. The command for ``optimum-cli`` is
in ``optimum_register/``.
"""

from optimum.quantization_base import OptimumQuantizer

from hf_onebit.mpq_quantizer import MPQQuantizer
from hf_onebit.quantize import OneBitQuantizer

__all__ = ["MPQQuantizer", "OneBitQuantizer"]

OptimumQuantizer.register(OneBitQuantizer)
OptimumQuantizer.register(MPQQuantizer)

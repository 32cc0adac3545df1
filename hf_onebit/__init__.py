"""hf_onebit: language models of one to eight bits per weight for Hugging Face Transformers, packed on disk and in RAM.

Importing it registers the quantization methods "onebit" and "mpq" with Transformers:

    import hf_onebit
    model = AutoModelForCausalLM.from_pretrained("user/model-onebit")                       # load packed, run packed
    model = AutoModelForCausalLM.from_pretrained(name, quantization_config=OneBitConfig())  # quantize while loading
    config = OneBitConfig(preset="fast", dataset="text.txt")                                # quantize with data
    OneBitQuantizer(config).quantize_model(model, tokenizer)
    MPQQuantizer(MPQConfig(bits=4, preset="fast")).quantize_model(model, tokenizer)          # codes of 1 to 8 bits
"""

from hf_onebit.algorithms.onebit import Onebit, OnebitResult
from hf_onebit.config import OneBitConfig
from hf_onebit.integrations.merging import merge_and_dequantize, merge_and_requantize
from hf_onebit.integrations.model_methods import adapt_models as _adapt_models
from hf_onebit.integrations.on_import import when_imported as _when_imported
from hf_onebit.integrations.residual import init_from_residual
from hf_onebit.integrations.training import prepare_model_for_training
from hf_onebit.integrations.transformers import register as _register
from hf_onebit.loading import load, load_quantized_model
from hf_onebit.mpq_config import MPQConfig
from hf_onebit.mpq_quantizer import MPQQuantizer
from hf_onebit.nn.parameter import MPQWeightParameter
from hf_onebit.nn.scales import freeze_scales, scale_groups, train_scales
from hf_onebit.quantize import OneBitQuantizer
from hf_onebit.storage.checkpoint import save
from hf_onebit.storage.scale_files import load_scales, save_scales
from hf_onebit.training import DiodeMix, diode_mix
from hf_onebit.version import __version__

__all__ = [
    "DiodeMix",
    "MPQConfig",
    "MPQQuantizer",
    "MPQWeightParameter",
    "OneBitConfig",
    "OneBitQuantizer",
    "Onebit",
    "OnebitResult",
    "__version__",
    "diode_mix",
    "freeze_scales",
    "init_from_residual",
    "load",
    "load_quantized_model",
    "load_scales",
    "merge_and_dequantize",
    "merge_and_requantize",
    "prepare_model_for_training",
    "save",
    "save_scales",
    "scale_groups",
    "train_scales",
]


def _introduce_to_peft() -> None:
    from hf_onebit.integrations.peft import install

    install()


_register()
_when_imported("transformers.modeling_utils", _adapt_models)
_when_imported("peft.tuners.tuners_utils", _introduce_to_peft)

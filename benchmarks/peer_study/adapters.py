"""What differs between libraries: how each quantizes, saves, loads, and where it keeps its tensors.

This runs in the peer's own Python, so nothing of a library is imported before its adapter is asked for it.
"""

import time
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Options = dict[str, Any]


class CannotRun(Exception):
    """A row that cannot be made here, and why: a result too."""


def load_bf16(folder: str, **more: Any) -> Any:
    """The float model, or a checkpoint of a library that Transformers knows."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, **more).eval()


def linear_names(model: nn.Module) -> list[str]:
    """Every linear layer but the head: what our own rows pack."""
    return [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and "lm_head" not in name]


def tensors_of(value: Any) -> list[Tensor]:
    """The plain tensors that a tensor, a subclass of one, or a container of them keeps."""
    if isinstance(value, Tensor):
        flatten = getattr(value, "__tensor_flatten__", None)
        if flatten is None or type(value) in (Tensor, nn.Parameter):
            return [value]
        names = flatten()[0]
        return [part for name in names for part in tensors_of(getattr(value, name))]
    if isinstance(value, dict):
        return [part for each in value.values() for part in tensors_of(each)]
    return []


class Adapter:
    """A library. `saves` says whether it has a checkpoint of its own; without one it quantizes at each load."""

    package = ""
    saves = False
    notes: tuple[str, ...] = ()

    def __init__(self, options: Options) -> None:
        self.options, self.bits = options, options.get("bits", 16)

    def version(self) -> str:
        """Of the library."""
        return f"{self.package} {metadata.version(self.package)}"

    def quantize(self, source: str, calibration: list[list[int]]) -> tuple[Any, float]:
        """The quantized model and the processor's seconds."""
        model = load_bf16(source)
        start = time.process_time()
        model = self.convert(model)
        return model, time.process_time() - start

    def convert(self, model: Any) -> Any:
        """Quantize a model in memory."""
        return model

    def save(self, model: Any, folder: Path) -> None:
        """Write its own checkpoint."""
        model.save_pretrained(folder)

    def load(self, folder: str) -> Any:
        """Read its own checkpoint."""
        return load_bf16(folder)

    def tensors(self, module: nn.Module) -> list[Tensor]:
        """What stands for one layer's weight: codes, scales, zeros, tables."""
        held = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        return [part for name, tensor in held if name != "bias" for part in tensors_of(tensor)]

    def layer_bits(self, module: nn.Module) -> float:
        """Bits that one layer's weight takes."""
        return 8.0 * sum(t.numel() * t.element_size() for t in self.tensors(module))

    def dequantize(self, module: Any) -> Tensor:
        """(out, in): the weight that a layer stands for."""
        weight: Tensor = module.weight.dequantize()
        return weight


class Float(Adapter):
    """Not quantized."""

    package = "transformers"


class Ours(Adapter):
    """hf_onebit's mpq without data, while the model loads."""

    package = "hf_onebit"
    saves = True

    def version(self) -> str:
        """From the checkout, which need not be installed."""
        import hf_onebit

        return f"hf_onebit {hf_onebit.__version__}"

    def quantize(self, source: str, calibration: list[list[int]]) -> tuple[Any, float]:
        """Weights are read one after the other; the seconds are those of all of the load."""
        from hf_onebit import MPQConfig

        start = time.process_time()
        config = MPQConfig(bits=self.bits, group_size=self.options["group_size"])
        model = load_bf16(source, quantization_config=config)
        return model, time.process_time() - start

    def load(self, folder: str) -> Any:
        """As users load it."""
        from hf_onebit import loading

        return loading.load(folder).eval()


class Hqq(Adapter):
    """Half-quadratic quantization, no data, in PyTorch."""

    package = "hqq"
    saves = True

    def convert(self, model: Any) -> Any:
        """Groups along inputs (axis 1), as its kernels want them."""
        from hqq.core.quantize import BaseQuantizeConfig
        from hqq.models.hf.base import AutoHQQHFModel

        config = BaseQuantizeConfig(nbits=self.bits, group_size=self.options["group_size"], axis=1)
        AutoHQQHFModel.quantize_model(model, quant_config=config, compute_dtype=torch.bfloat16, device="cpu")
        return model

    def save(self, model: Any, folder: Path) -> None:
        """Its own format."""
        from hqq.models.hf.base import AutoHQQHFModel

        AutoHQQHFModel.save_quantized(model, str(folder))

    def load(self, folder: str) -> Any:
        """Its own format."""
        from hqq.models.hf.base import AutoHQQHFModel

        return AutoHQQHFModel.from_quantized(folder, compute_dtype=torch.bfloat16, device="cpu").eval()

    def tensors(self, module: Any) -> list[Tensor]:
        """Codes, and what `meta` has of scales and zeros."""
        return [module.W_q, *tensors_of(module.meta)]

    def dequantize(self, module: Any) -> Tensor:
        """By its own method."""
        weight: Tensor = module.dequantize()
        return weight


class Quanto(Adapter):
    """optimum-quanto: 8, 4 and 2 bits, groups that divide the rows (128 at most)."""

    package = "optimum-quanto"

    def convert(self, model: Any) -> Any:
        """The layers in place."""
        from optimum import quanto

        kinds = {8: quanto.qint8, 4: quanto.qint4, 2: quanto.qint2}
        if self.bits not in kinds:
            raise CannotRun(f"optimum-quanto has integers of 8, 4 and 2 bits, none of {self.bits}")
        quanto.quantize(model, weights=kinds[self.bits], exclude="lm_head")
        quanto.freeze(model)
        return model


class Bitsandbytes(Adapter):
    """bitsandbytes through Transformers: nf4 in blocks of 64, or int8 with a scale a row."""

    package = "bitsandbytes"
    saves = True

    def quantize(self, source: str, calibration: list[list[int]]) -> tuple[Any, float]:
        """Its seconds are those of all of the load."""
        from transformers import BitsAndBytesConfig

        four: dict[str, Any] = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4",
                                "bnb_4bit_compute_dtype": torch.bfloat16,
                                "bnb_4bit_use_double_quant": self.options.get("double", False)}  # fmt: skip
        config = BitsAndBytesConfig(**(four if self.bits == 4 else {"load_in_8bit": True}))
        start = time.process_time()
        model = load_bf16(source, quantization_config=config, device_map="cpu")
        return model, time.process_time() - start

    def load(self, folder: str) -> Any:
        """Its checkpoint, by Transformers."""
        return load_bf16(folder, device_map="cpu")

    def tensors(self, module: Any) -> list[Tensor]:
        """Codes and what the quantization state has: maxima of blocks, the table of levels, their own maxima."""
        weight, found = module.weight, [module.weight.data]
        if self.bits == 8:
            scales = weight.SCB if getattr(weight, "SCB", None) is not None else module.state.SCB
            return [*found, scales]
        states = [weight.quant_state]
        while states:
            state = states.pop()
            found += [t for t in (state.absmax, state.code, state.offset) if isinstance(t, Tensor)]
            states += [state.state2] if getattr(state, "state2", None) is not None else []
        return found

    def dequantize(self, module: Any) -> Tensor:
        """By its own functions."""
        from bitsandbytes import functional

        weight: Tensor
        if self.bits == 4:
            weight = functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
        else:
            scales = module.weight.SCB if module.weight.SCB is not None else module.state.SCB
            weight = functional.int8_vectorwise_dequant(module.weight.data, scales)
        return weight


class Torchao(Adapter):
    """torchao's weight-only types that the CPU has."""

    package = "torchao"

    def convert(self, model: Any) -> Any:
        """The layers in place."""
        from torchao import quantization as ao

        group = self.options.get("group_size")
        if self.options.get("intx"):
            from torchao.quantization.granularity import PerGroup

            kind = getattr(torch, f"int{self.bits}")
            asymmetric = ao.MappingType.ASYMMETRIC
            config = ao.IntxWeightOnlyConfig(weight_dtype=kind, granularity=PerGroup(group), mapping_type=asymmetric)
        elif self.bits == 8:
            config = ao.Int8WeightOnlyConfig(set_inductor_config=False)
        else:
            from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

            config = PrototypeInt4WeightOnlyConfig(group_size=group)
        ao.quantize_(model, config, lambda m, name: isinstance(m, nn.Linear) and "lm_head" not in name)
        return model

    def layer_bits(self, module: Any) -> float:
        """Its intx types keep each code in a byte here: they are counted as they would be packed."""
        found = super().layer_bits(module)
        if self.options.get("intx"):
            found -= (8 - self.bits) * module.weight.numel()
        return found


class Gptq(Adapter):
    """GPTQ by gptqmodel: its defaults (symmetric, groups ordered by activation), our calibration text."""

    package = "gptqmodel"
    saves = True

    def quantize(self, source: str, calibration: list[list[int]]) -> tuple[Any, float]:
        """On the sequences that our presets calibrate on."""
        from gptqmodel import GPTQModel, QuantizeConfig

        config = QuantizeConfig(bits=self.bits, group_size=self.options["group_size"], device="cpu")
        model = GPTQModel.load(source, config)
        start = time.process_time()
        rows = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in calibration]
        model.quantize(rows, batch_size=1)
        return model, time.process_time() - start

    def save(self, model: Any, folder: Path) -> None:
        """Its own format."""
        model.save(str(folder))

    def load(self, folder: str) -> Any:
        """In the kernel that it picks for the CPU."""
        from gptqmodel import GPTQModel

        return GPTQModel.load(folder, device="cpu").model.eval()

    def tensors(self, module: Any) -> list[Tensor]:
        """As its checkpoint has them; a kernel may hold other forms."""
        names = ("qweight", "qzeros", "scales", "g_idx")
        return [getattr(module, name) for name in names if isinstance(getattr(module, name, None), Tensor)]

    def dequantize(self, module: Any) -> Tensor:
        """By its own method, which gives (in, out)."""
        weight: Tensor = module.dequantize_weight().T
        return weight


ADAPTERS: dict[str, type[Adapter]] = {
    "float": Float,
    "ours": Ours,
    "hqq": Hqq,
    "quanto": Quanto,
    "bnb": Bitsandbytes,
    "torchao": Torchao,
    "gptq": Gptq,
}

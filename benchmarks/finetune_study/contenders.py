"""What differs between rows: the model, what of it learns, and the optimizer."""

import contextlib
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from ladder_study.protocol import CannotRun
from torch import nn

from hf_onebit import DiodeMix, MPQConfig, MPQWeightParameter, scale_groups, train_scales
from hf_onebit.nn import packed_layers
from hf_onebit.nn.sign_parameter import SignWeightParameter

from .protocol import Study
from .rows import Rates, Row

RANK = 16
# Gradients of codes are averaged over many steps: noise in them costs flips that go nowhere.
PACKED_BETAS, FLOAT_BETAS = (0.99, 0.9999), (0.9, 0.99)


@dataclass
class Contender:
    """A model in training.

    Attributes:
        model: with adapters, if there are any.
        inner: the Transformers model within.
        optimizer: steps; where ``fused``, within backward.
        autocast: products in bf16 of a float32 model.
        learning: how many numbers learn.
    """

    model: Any
    inner: Any
    optimizer: torch.optim.Optimizer
    fused: bool
    autocast: bool
    learning: int

    def precision(self) -> Any:
        """A context for its forward passes."""
        return torch.autocast("cpu", torch.bfloat16) if self.autocast else contextlib.nullcontext()


def start_model(row: Row, study: Study, blocks: int | None = None) -> Any:
    """The row's model before it learns; with ``blocks``, the first ones only, packed while they load.

    Raises:
        CannotRun: it needs a packed model that was not named, or a library that this Python lacks.
    """
    from transformers import AutoModelForCausalLM

    source, more = str(study.places.model), {} if blocks is None else {"num_hidden_layers": blocks}
    dtype = torch.float32 if row.master else torch.bfloat16
    if row.start in ("float", "bf16"):
        return AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **more)
    if row.start == "nf4":
        try:
            import bitsandbytes  # noqa: F401
        except ImportError as reason:
            raise CannotRun(f"bitsandbytes is not installed: {reason}") from reason
        from transformers import BitsAndBytesConfig

        config: Any = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
        model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, quantization_config=config, **more)
        for module in model.modules():
            # On CPUs with bfloat16 products an evaluation would pack them for inference, and no gradient passes then.
            if hasattr(module, "support_avx512bf16_for_cpu"):
                module.support_avx512bf16_for_cpu = False
        return model
    if row.start in study.packed and blocks is None:  # a packed folder is loaded whole
        return AutoModelForCausalLM.from_pretrained(str(study.packed[row.start]), dtype=dtype)
    if not row.start.startswith("mpq"):
        raise CannotRun(f"no packed model was named with --packed {row.start}=DIR")
    config = MPQConfig(bits=int(row.start.removeprefix("mpq")), group_size=64)
    return AutoModelForCausalLM.from_pretrained(source, dtype=dtype, quantization_config=config, **more)


def contender(row: Row, study: Study, rates: Rates, blocks: int | None = None) -> Contender:
    """The row's model ready to train at these learning rates."""
    torch.manual_seed(study.seed)
    inner = start_model(row, study, blocks).requires_grad_(False)
    model = inner
    if "lora" in row.learns:
        from peft import LoraConfig, get_peft_model

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kind = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM")
            model = get_peft_model(inner, kind)
    groups = [group for part in row.learns for group in groups_of(part, model, rates)]
    for group in groups:
        for parameter in group["params"]:
            parameter.requires_grad_(True)
    fused = bool(row.options.get("fused"))
    if {"everything", "linear", "lora"} & set(row.learns):
        optimizer: Any = torch.optim.AdamW(groups, weight_decay=0.0, betas=FLOAT_BETAS)
    else:
        optimizer = DiodeMix(groups, seed=study.seed, **row.options)  # type: ignore[arg-type]
    sizes = {id(layer.weight): layer.in_features * layer.out_features for layer in packed_layers(model).values()}
    learning = sum(sizes.get(id(p), p.numel()) for group in groups for p in group["params"])
    return Contender(model.train(), inner, optimizer, fused, row.master, learning)


def groups_of(part: str, model: nn.Module, rates: Rates) -> list[dict[str, Any]]:
    """Parameter groups of one kind of what learns."""
    if part == "scales":
        train_scales(model)
        return scale_groups(model, rates[part], betas=FLOAT_BETAS)
    named = dict(model.named_parameters())
    signs = [p for p in named.values() if isinstance(p, SignWeightParameter)]
    if part == "signs":
        return [{"params": signs, "lr": rates[part], "eps": rates["vote"], "betas": PACKED_BETAS}]
    if part == "codes":
        codes = [p for p in named.values() if _is_packed(p) and not isinstance(p, SignWeightParameter)]
        return [{"params": codes, "lr": rates[part], "betas": PACKED_BETAS}]
    found = {
        "everything": lambda name, p: p.is_floating_point(),
        "linear": lambda name, p: p.dim() == 2 and p is not _embedding(model) and p is not _head(model),
        "lora": lambda name, p: "lora_" in name,
        "norms": lambda name, p: "norm" in name and p.dim() == 1,
        "embeddings": lambda name, p: p is _embedding(model),
    }[part]
    return [{"params": [p for n, p in named.items() if found(n, p)], "lr": rates[part], "betas": FLOAT_BETAS}]


def _embedding(model: Any) -> Any:
    return model.get_input_embeddings().weight


def _head(model: Any) -> Any:
    return model.get_output_embeddings().weight


def _is_packed(parameter: Any) -> bool:
    return isinstance(parameter, MPQWeightParameter) and parameter.is_packed

"""Before and after the bits: which modules are packed and how, and a packed model made whole for Transformers."""

from __future__ import annotations

import copy

from torch import nn

from hf_onebit.config import AUTO, OneBitConfig, PackingConfig
from hf_onebit.counts import counted
from hf_onebit.formats.double_quant import DoubleQuant
from hf_onebit.formats.table import TableEntry
from hf_onebit.mpq_config import MPQConfig
from hf_onebit.nn.adapters import adapted_modules
from hf_onebit.nn.experts import join_experts, separate_experts
from hf_onebit.nn.heads import keep_tie, plan_heads, undo_tie
from hf_onebit.nn.replace import LayerPlan, find_layers, named_planes, packed_layers, unmatched_patterns
from hf_onebit.nn.roles import LinearShape
from hf_onebit.progress import logger
from hf_onebit.quantization.finite import check_finite_model

_NOISE_WARNING = (
    "One bit per weight from the closed form alone keeps the shape of a model, not its language: expect noise. "
    "Measure it before use: hf-onebit eval DIR --data FILE --against MODEL. The other presets bring some of "
    "the language back: hf-onebit quantize MODEL -o DIR --preset fast, in Python OneBitConfig(preset='fast')"
)
_HEAD_BITS = 8
# Widths at which rounding to the nearest weights alone is not worth having.
NOISY_BITS = 3
_GROUP_NOISE_WARNING = (
    "At {bits} bits, weights rounded without data lose much of the language. Measure it before use: hf-onebit eval DIR "
    "--data FILE --against MODEL. The other presets lose far less: hf-onebit quantize MODEL -o DIR --method mpq "
    "--preset fast, in Python MPQConfig(preset='fast')"
)


def plan_layers(model: nn.Module, config: PackingConfig, *, warn: bool = True) -> LayerPlan:
    """Which layers to pack; a model none of whose layers can be is refused.

    Fused experts are separated (nn/experts.py) where some of them are to be packed; the model computes what it did.

    Args:
        model: on any device, the meta device included.
        config: how to quantize.
        warn: say which entries of the config name nothing. False for plans that another one comes after.

    Raises:
        ValueError: with the reasons, counted; or the config asks for float layers (``require_packing``).
    """
    require_packing(config)
    separate = separate_experts(model)
    try:
        plan = _plan(model, config)
        packed = any(name.startswith(f"{experts}.") for experts in separate for name in plan.selected)
    except BaseException:
        join_experts(model)
        raise
    if separate and not packed:
        join_experts(model)  # as the model's own checkpoints have them
        plan = _plan(model, config)
    if warn:
        _warn_of_names(model, plan, config)
    return plan


def plan_float_model(model: nn.Module, config: PackingConfig) -> LayerPlan:
    """The plan of a model in memory, once it is clear that it is a float one, whole and finite.

    Raises:
        ValueError: it is not; or as ``plan_layers``.
    """
    from transformers import PreTrainedModel

    if not isinstance(model, PreTrainedModel):
        raise ValueError(
            f"Cannot quantize a {type(model).__name__}: expected a Transformers model, e.g. from "
            "AutoModelForCausalLM.from_pretrained"
        )
    if packed_layers(model):
        raise ValueError(
            f"{type(model).__name__} is quantized already ({counted(len(packed_layers(model)), 'packed layer')}): load "
            "the float model, or call model.dequantize() first"
        )
    if adapted := adapted_modules(model):
        raise ValueError(
            f"{type(model).__name__} has adapters (on {counted(len(adapted), 'module')}, the first is {adapted[0]}): "
            "expected the model alone. Merge them into it or unload them first"
        )
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError(f"{type(model).__name__} was quantized by another method: load the float model")
    plan = plan_layers(model, config)
    offloaded = [name for name, p in model.named_parameters() if p.is_meta]
    if offloaded:
        raise ValueError(
            f"{type(model).__name__} is offloaded in part ({counted(len(offloaded), 'parameter')}, the first is "
            f"{offloaded[0]}): load the model whole into memory, or quantize it while it loads, with preset='closed' "
            "and without a dataset"
        )
    check_finite_model(model)
    return plan


def _plan(model: nn.Module, config: PackingConfig) -> LayerPlan:
    # Bits that are to be chosen stand for themselves at any width, until they are.
    lm_head_bits, embedding_bits = (
        _HEAD_BITS if b == AUTO else b for b in (config.lm_head_bits, config.embedding_bits)
    )
    heads = plan_heads(model, lm_head_bits, embedding_bits, config.head_group_size, config.modules_to_not_convert)
    plan, model_name = find_layers(model, config.modules_to_not_convert, heads), type(model).__name__
    if isinstance(config, MPQConfig) and not config.chooses_bits:
        plan.entries = {name: group_entry(config, shape) for name, shape in plan.selected.items()}
    elif isinstance(config, OneBitConfig):
        named, _ = named_planes(plan.selected, config.planes_per_layer)
        plan.planes = {name: named.get(name, config.planes) for name in plan.selected}
    if plan.selected or heads.entries:
        return plan
    if not plan.skipped:
        raise ValueError(f"{model_name} has no linear layers: there is nothing to quantize")
    reasons = sorted({skipped.reason for skipped in plan.skipped.values()})
    raise ValueError(
        f"{model_name} has no layer to quantize: all {len(plan.skipped)} linear layers stay in floating point "
        f"({'; '.join(reasons)}). Shorten modules_to_not_convert (--skip) if it names too much"
    )


def _warn_of_names(model: nn.Module, plan: LayerPlan, config: PackingConfig) -> None:
    """Point out what of the config names no layer: most likely typing errors."""
    of, question = type(model).__name__, "is it a typing error?"
    if unmatched := unmatched_patterns(model, plan, config.modules_to_not_convert):
        logger.warning(f"modules_to_not_convert (--skip) names no linear layer of {of} by {unmatched}: {question}")
    if isinstance(config, OneBitConfig):
        unmatched = named_planes(plan.selected, config.planes_per_layer)[1]
        if unmatched:
            about = f"planes_per_layer (--planes-per-layer) names no packed layer of {of} by {unmatched}"
            logger.warning(f"{about}: {question}")


def group_entry(config: MPQConfig, shape: LinearShape) -> TableEntry:
    """How a config packs a layer of that size."""
    assert isinstance(config.bits, int)
    return TableEntry(
        "mpq",
        config.bits,
        1,
        config.group_size,
        config.symmetric,
        in_features=shape.in_features,
        q_perm=config.act_order,
        double_quant=DoubleQuant.default(config.symmetric, shape.out_features) if config.double_quant else None,
    )


def packing_table(plan: LayerPlan) -> dict[str, TableEntry]:
    """How each module of a plan is packed: the table that config.json will hold."""
    return {name: plan.entry(name) for name in plan.selected} | plan.heads.entries


def settle_tie(model: nn.Module, plan: LayerPlan, config: PackingConfig) -> None:
    """Tie what was packed as one, or untie for good what was not; ``config.untied`` says the latter."""
    heads = plan.heads
    config.untied = heads.untied
    if heads.untied:
        undo_tie(model)
    elif heads.tied:
        assert heads.head is not None and heads.embedding is not None  # noqa: PT018  both are packed
        keep_tie(model, heads.head, heads.embedding, heads.entries[heads.head].tensor_names)


def attach(model: nn.Module, config: PackingConfig) -> None:
    """Make a model whose layers were packed in memory the same to Transformers as one that was loaded packed."""
    from transformers.quantizers.auto import AutoHfQuantizer

    config = copy.copy(config)
    config.dataset = config.tokenizer = None  # the model must not carry the data around
    quantizer = AutoHfQuantizer.from_config(config, pre_quantized=True)
    model.hf_quantizer = quantizer
    model.is_quantized = True  # type: ignore[assignment]
    model.quantization_method = config.quant_method  # type: ignore[assignment]
    quantizer.postprocess_model(model)


def require_packing(config: PackingConfig) -> None:
    """Refuse a config whose layers were to be float ones.

    Raises:
        ValueError: naming the remedy.
    """
    if config.dequantize:
        raise ValueError(
            "dequantize is True, which makes float layers of a packed checkpoint: expected False where a model is "
            "quantized. For weights as quantization rounds them, quantize, and call model.dequantize() of the result"
        )


def require_text(config: PackingConfig) -> None:
    """Refuse targets where there is no text.

    Raises:
        ValueError: naming the remedies.
    """
    if not isinstance(config, OneBitConfig):
        return
    if not config.calibrates and (config.target_bpw is not None or config.target_size is not None):
        field = "target_bpw" if config.target_bpw is not None else "target_size"
        raise ValueError(
            f"{field} gives a second plane to the layers that need it most, which is measured on text: pass "
            "dataset=FILE or 'self' (--calibration), or name the layers yourself: planes_per_layer={NAME: 2} "
            "(--planes-per-layer NAME=2)"
        )


def require_reader(model: nn.Module) -> None:
    """Refuse to calibrate models that text cannot be put into.

    Raises:
        ValueError: naming the remedy.
    """
    main: str = getattr(model, "main_input_name", "input_ids")
    if main != "input_ids":
        raise ValueError(
            f"{type(model).__name__} reads {main}, and calibration data is text: quantize it without data "
            "(preset='closed' and dataset=None; --preset closed)"
        )


def warn_of_noise(config: PackingConfig) -> None:
    """Say once, for models quantized without data, what the closed form alone comes to."""
    if config.preset == "closed" and isinstance(config, MPQConfig):
        bits = config.target_bpw if config.chooses_bits else config.bits
        if isinstance(bits, (int, float)) and bits <= NOISY_BITS:
            logger.warning_once(_GROUP_NOISE_WARNING.format(bits=bits))
    if config.preset == "closed" and isinstance(config, OneBitConfig):
        logger.warning_once(_NOISE_WARNING)

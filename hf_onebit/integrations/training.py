"""Making a packed model ready to train something beside its packed words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hf_onebit.argument_checks import require_module, shown
from hf_onebit.nn.replace import packed_layers
from hf_onebit.nn.scales import scales_to_train, train_scales

# What torch.utils.checkpoint.checkpoint takes by name.
_OPTIONS = ("use_reentrant", "preserve_rng_state", "context_fn", "determinism_check", "debug", "early_stop")


def prepare_model_for_training(
    model: Any,
    *,
    scales: bool | Sequence[str] = False,
    gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: Mapping[str, Any] | None = None,
) -> Any:
    """Freeze a packed model and make gradients pass through it; call it before ``get_peft_model``.

    What ``peft.prepare_model_for_kbit_training`` is for other methods. That function knows no packed layers of this
    package: it would widen embeddings and norms to float32 and leave activation checkpointing out. Here every dtype
    stays: what is frozen gains nothing by more digits, PEFT makes its adapters float32 by itself, and one float32 norm
    turns the activations of all layers after it to float32.

    Args:
        model: a packed Transformers model; changed in place.
        scales: let scales and zeros of packed layers learn, all of them or some kinds: see ``train_scales``. PEFT
            freezes them again: with adapters, call ``train_scales`` after ``get_peft_model`` instead.
        gradient_checkpointing: compute each block's activations again in backward instead of keeping them.
        gradient_checkpointing_kwargs: for ``torch.utils.checkpoint.checkpoint``; ``{"use_reentrant": False}`` if None.

    Returns:
        The model.

    Raises:
        TypeError: the model is no module.
        ValueError: the model holds no packed layers, checkpointing is asked for and it has none, or an option is of
            another type; nothing was changed then.
    """
    require_module("prepare_model_for_training", model)
    if not isinstance(gradient_checkpointing, bool):
        raise ValueError(
            f"prepare_model_for_training got gradient_checkpointing={shown(gradient_checkpointing)}, expected True or "
            "False; options of checkpointing go into gradient_checkpointing_kwargs"
        )
    if not isinstance(gradient_checkpointing_kwargs, (Mapping, type(None))):
        raise ValueError(
            f"prepare_model_for_training got gradient_checkpointing_kwargs={shown(gradient_checkpointing_kwargs)}, "
            "expected None or a dict like {'use_reentrant': False}"
        )
    unknown = [name for name in gradient_checkpointing_kwargs or () if name not in _OPTIONS]
    if unknown:
        raise ValueError(
            f"prepare_model_for_training got gradient_checkpointing_kwargs with {unknown[0]!r}, expected some of "
            f"{', '.join(_OPTIONS)}"
        )
    if not packed_layers(model):
        raise ValueError(
            f"prepare_model_for_training got a {type(model).__name__} without packed layers: quantize it first, or "
            "train it as any float model"
        )
    if gradient_checkpointing and not getattr(model, "supports_gradient_checkpointing", False):
        raise ValueError(f"{type(model).__name__} has no activation checkpointing: pass gradient_checkpointing=False")
    kinds = None if isinstance(scales, bool) else scales
    learn = bool(scales) if scales is None or isinstance(scales, (bool, Sequence)) else True
    if learn:
        scales_to_train(
            model, kinds, ("prepare_model_for_training", "scales")
        )  # what it refuses, it refuses before anything is frozen
    model.requires_grad_(False)
    if gradient_checkpointing:
        how = dict(gradient_checkpointing_kwargs or {"use_reentrant": False})
        if hasattr(model, "activation_checkpointing_enable"):
            model.activation_checkpointing_enable(how)
        else:  # Transformers before the name changed
            model.gradient_checkpointing_enable(how)
        # Reentrant checkpointing passes gradients only to inputs that ask for them, and frozen embeddings give none.
        model.enable_input_require_grads()
    if learn:
        train_scales(model, kinds)
    return model

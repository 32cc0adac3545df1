"""Tuning the blocks of a model while the prefix is quantized: the training form of a block, and the way back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_onebit.algorithms.block_loss import Example
from hf_onebit.algorithms.blockwise import BlockOptions, BlockResult, tune_block
from hf_onebit.algorithms.distill import Trained
from hf_onebit.algorithms.sign_linear import SignLinear, SignPlane
from hf_onebit.rungs.prefix import QuantizedBlock

Planes = list[tuple[Tensor, Tensor, Tensor]]


@dataclass
class TunedBlock:
    """A block's new parameters.

    Attributes:
        planes: {layer: (signs (out, in) bool, a (out,) fp16, b (in,) fp16) for each plane}.
        vectors: {parameter: new value}, by full names: gains and biases, in the model's dtype.
        margins: {layer: how far each sign is from flipping, (out, in) fp16, for each plane}.
        result: how it went.
    """

    planes: dict[str, Planes]
    vectors: dict[str, Tensor]
    margins: dict[str, list[Tensor]]
    result: BlockResult


def tune(
    block: QuantizedBlock,
    planes: Mapping[str, Planes],
    latents: Mapping[str, Sequence[Tensor]],
    options: BlockOptions,
    dtype: torch.dtype = torch.bfloat16,
) -> TunedBlock:
    """Tune one block of the walk; its module is as it was when this returns or raises.

    Args:
        block: from ``walk_prefix``.
        planes: stored planes of its layers, by their full names.
        latents: margins (out, in) of each plane, by layer; float32 ones are changed.
        options: how.
        dtype: of the layers' products.

    Raises:
        ValueError: as ``tune_block``.
    """
    forms: dict[str, SignLinear] = {}
    trained: dict[str, Trained] = {}
    for name, found in planes.items():
        bias = layer_of(block, name).bias
        assert bias is None or isinstance(bias, Tensor)
        forms[name] = SignLinear(found, bias, dtype)
        for number, plane in enumerate(_planes(forms[name])):
            trained[f"{name}.a_{number}"] = Trained(plane.a, torch.float16)
            trained[f"{name}.b_{number}"] = Trained(plane.b, torch.float16)
    named = {f"{name}.{number}": p for name, form in forms.items() for number, p in enumerate(_planes(form))}
    learned = {name: [t.float() for t in found] for name, found in latents.items()}
    margins = {f"{name}.{number}": t for name, found in learned.items() for number, t in enumerate(found)}

    def run(all_trained: dict[str, Trained], examples: list[Example], heldout: list[Example]) -> BlockResult:
        return tune_block(all_trained, named, margins, examples, heldout, options)

    result, vectors = tune_forms(block, forms, trained, run)
    tuned = {
        name: [(p.signs > 0, p.a.detach().half(), p.b.detach().half()) for p in _planes(form)]
        for name, form in forms.items()
    }
    return TunedBlock(tuned, vectors, {name: [t.half() for t in found] for name, found in learned.items()}, result)


def layer_of(block: QuantizedBlock, name: str) -> nn.Module:
    """The layer of that full name."""
    return block.module.get_submodule(name.removeprefix(block.name + "."))


def tune_forms(
    block: QuantizedBlock,
    forms: Mapping[str, nn.Module],
    trained: dict[str, Trained],
    run: Callable[[dict[str, Trained], list[Example], list[Example]], BlockResult],
) -> tuple[BlockResult, dict[str, Tensor]]:
    """Run a tuning with layers of a block in training form, its other vectors learning too.

    The module is as it was when this returns or raises.

    Args:
        block: from ``walk_prefix``.
        forms: the layers' training forms by full names; a parameter ``bias`` of a form learns.
        trained: what else of them learns.
        run: (everything that learns, sequences to fit, held-out ones) -> how it went.

    Returns:
        what ``run`` did, and the new gains and biases by full names, in the model's dtype.
    """
    prefix = block.name + "."
    originals = {name: layer_of(block, name) for name in forms}
    learns = {name: parameter.requires_grad for name, parameter in block.module.named_parameters()}
    vectors: dict[str, nn.Parameter] = {}
    exact: dict[str, Tensor] = {}
    try:
        block.module.requires_grad_(False)
        for name, original in originals.items():
            block.module.set_submodule(name.removeprefix(prefix), forms[name])
            bias, learning = original.bias, getattr(forms[name], "bias", None)
            if isinstance(bias, Tensor) and learning is not None:
                trained[f"{name}.bias"] = Trained(learning, bias.dtype)
        inside = tuple(f"{name.removeprefix(prefix)}." for name in originals)
        for short, parameter in block.module.named_parameters():
            if parameter.dim() == 1 and not short.startswith(inside) and parameter.is_floating_point():
                vectors[short] = parameter
                exact[short] = parameter.data
                parameter.data = parameter.data.float().clone()  # steps are smaller than a 16-bit float can show
                trained[prefix + short] = Trained(parameter.requires_grad_(True), exact[short].dtype)
        examples = [_example(block, position) for position in range(len(block.inputs))]
        result = run(
            trained,
            [example for position, example in enumerate(examples) if position not in block.heldout],
            [example for position, example in enumerate(examples) if position in block.heldout],
        )
        new = {
            name: t.parameter.detach().to(t.stored).clone()
            for name, t in trained.items()
            if name.endswith(".bias") or name.removeprefix(prefix) in vectors
        }
    finally:
        for short, value in exact.items():
            vectors[short].data = value
        for name, original in originals.items():
            block.module.set_submodule(name.removeprefix(prefix), original)
        for name, parameter in block.module.named_parameters():
            parameter.requires_grad_(learns.get(name, False))
            parameter.grad = None
    return result, new


def _planes(form: SignLinear) -> list[SignPlane]:
    return list(form.planes)  # type: ignore[arg-type]


def _example(block: QuantizedBlock, position: int) -> Example:
    hidden = block.inputs[position]
    return Example(
        lambda: block.rows(block.run(position, hidden), position),
        block.rows(block.targets[position], position),
        block.rows(block.float_inputs[position], position),
    )

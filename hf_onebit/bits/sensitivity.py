"""How much a model's predictions suffer from fewer bits in one layer, measured on text before anything is quantized.

To second order, an error ΔW of one layer alone raises the divergence from the float model by

    KL ≈ ½ E[(gᵀ ΔW x)²] ≈ ½ Σ_i G_i (ΔW H ΔWᵀ)_ii        nats per token,    H = E[x xᵀ],  G_i = E[g_i²]

with x the layer's input, g the gradient of −log p(label) with respect to its output, and labels drawn from the
model's own predictions: the Fisher information, with x and g taken as independent and G as diagonal (Martens & Grosse
2015, arXiv:1503.05671, §3). ΔW comes from a quick fit of a sample of rows. The derivation is in
docs/methods/allocation.md.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from hf_onebit.algorithms.closed_form import closed_form_planes, dequantize_planes, importance_from_hessian
from hf_onebit.algorithms.curvature import Curvature
from hf_onebit.algorithms.signs import fit_signs
from hf_onebit.calibration import Batch, real_tokens
from hf_onebit.modes import evaluating
from hf_onebit.nn.replace import float_weight
from hf_onebit.rungs.blocks import find_blocks, run_model
from hf_onebit.rungs.walk import walk

Planes = Sequence[tuple[Tensor, Tensor, Tensor]]
Fit = Callable[[str, Tensor, Tensor, Any], Planes | Tensor]
"""(layer's name, rows of W, Hessian of its inputs, option) -> stored planes (signs, a, b), or what they stand for."""

# The shrinkage that serves most layers where it is not chosen on held-out data.
_SHRINKAGE = 0.15
_REMEDY = (
    "name the layers for a second plane yourself: planes_per_layer={NAME: 2} (--planes-per-layer NAME=2); or, with "
    "bits='auto' (--bits auto), pass no text"
)


@dataclass(frozen=True)
class Sensitivity:
    """What was measured.

    Attributes:
        costs: {layer: {option: expected KL divergence from the float model, nats per token}}; an option is a number of
            planes, or whatever the fit knows by that name.
        tokens: that it was measured on; 0 where it comes from the weights alone.
    """

    costs: dict[str, dict[Any, float]]
    tokens: int


@dataclass(eq=False)
class _Seen:
    """Sums over the rows that one layer was run on."""

    squares: Tensor  # of the gradients of its outputs (out,) float64
    inputs: Tensor  # of the squares of its inputs (in,) float64
    rows: int = 0

    @classmethod
    def nothing(cls, module: nn.Module) -> _Seen:
        out_features, in_features = float_weight(module).shape
        return cls(torch.zeros(out_features, dtype=torch.float64), torch.zeros(in_features, dtype=torch.float64))


def measure_sensitivity(
    model: nn.Module,
    layers: Sequence[str],
    batches: Sequence[Batch],
    fit: Fit,
    *,
    planes: Sequence[Any] | Mapping[str, Sequence[Any]] = (1, 2),
    tokens: int = 4096,
    length: int = 256,
    rows: int = 64,
    seed: int = 0,
    arithmetic: torch.dtype | None = torch.bfloat16,
    done: Callable[[str], None] = lambda name: None,
) -> Sensitivity:
    """Measure what each layer costs at each number of planes, or with each option of another kind.

    The model is left as it was. Two passes: one forward and backward, of which two vectors a layer are kept, and one
    forward block by block for the Hessians of one block at a time. Memory beside the model is the activations of one
    piece of ``length`` tokens.

    Args:
        model: float model whose output has ``logits``, whole in memory.
        layers: full names of the linear layers.
        batches: calibration sequences; pieces of them, evenly spread, are used.
        fit: how the layers will be quantized, about: ``closed_fit`` or ``sign_fit``.
        planes: numbers of planes to measure, or other options that ``fit`` knows; {layer: options} if they differ.
        tokens: about how many to measure on.
        length: tokens of one piece.
        rows: of each weight that are fitted, evenly spaced; all if there are no more.
        seed: of the labels that are drawn.
        arithmetic: dtype of products in the first pass (autocast), None for the model's own.
        done: called with each layer's name.

    Raises:
        ValueError: the model gives no logits, they do not depend on its linear layers, or they are not finite.
    """
    pieces = pieces_of(batches, tokens, length)
    seen, counted = _gradients(model, layers, pieces, seed, arithmetic)
    costs: dict[str, dict[Any, float]] = {}

    def visit(_block: str, statistics: Mapping[str, Tensor | None]) -> None:
        for name, H in statistics.items():
            options = planes[name] if isinstance(planes, Mapping) else planes
            costs[name] = _costs(model.get_submodule(name), name, H, seen[name], counted, fit, options, rows)
            done(name)

    with frozen(model):
        walk(model, layers, pieces, visit)
    return Sensitivity({name: costs[name] for name in layers}, counted)


def measure_embedding(
    model: nn.Module,
    embedding: str,
    batches: Sequence[Batch],
    quantized: Callable[[Tensor, Any], Tensor],
    options: Sequence[Any],
    *,
    tokens: int = 2048,
    length: int = 256,
    rows: int = 2048,
    seed: int = 0,
    arithmetic: torch.dtype | None = torch.bfloat16,
) -> dict[Any, float]:
    """What the token embedding costs at each option, as ``measure_sensitivity`` says it of layers.

    Its input is one token, so that ΔW x is the error of one row: ½ E_token[Σ_d G_d δ_d²], the tokens as in the text.

    Args:
        model: float model whose output has ``logits``, whole in memory; left as it was.
        embedding: full name of the embedding.
        batches: calibration sequences.
        quantized: (rows of its matrix, option) -> what is stored of them.
        options: to measure.
        tokens, length, seed, arithmetic: as of ``measure_sensitivity``.
        rows: of the matrix that are quantized at the most, tokens of the text.

    Returns:
        {option: nats per token}.
    """
    pieces = pieces_of(batches, tokens, length)
    module = model.get_submodule(embedding)
    squares: list[Tensor] = []

    def after(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> Tensor:
        kept = output.detach().requires_grad_()
        kept.register_hook(lambda g: squares.append(g.reshape(-1, g.shape[-1]).float().square().sum(0).cpu()))
        return kept.clone()

    handle = module.register_forward_hook(after)
    generator, counted = torch.Generator().manual_seed(seed), 0
    device = next(model.parameters()).device
    try:
        with frozen(model), torch.enable_grad():
            for piece in pieces:
                with torch.autocast(device.type, arithmetic) if arithmetic else contextlib.nullcontext():
                    logits = _logits(model, piece)
                _surprise(logits, generator).backward()
                counted += len(logits)
    finally:
        handle.remove()
    # A frequent token stands here as often as in the text.
    real = [piece.get("attention_mask", torch.ones_like(piece["input_ids"])).bool() for piece in pieces]
    seen = torch.cat([piece["input_ids"][mask] for piece, mask in zip(pieces, real, strict=True)])
    seen = seen[torch.linspace(0, len(seen) - 1, min(rows, len(seen))).round().long()]
    W = float_weight(module)[seen.to(device)].float()
    G = torch.stack(squares).sum(0).to(W) / counted
    return {option: 0.5 * float((W - quantized(W, option)).square().mean(0) @ G) for option in options}


def closed_fit(use_importance: bool = True, **options: Any) -> Fit:
    """The closed form, with the keyword arguments of ``closed_form_planes``."""

    def fit(name: str, W: Tensor, H: Tensor, planes: int) -> Planes:
        importance = importance_from_hessian(H) if use_importance else None
        return closed_form_planes(W, planes, layer=name, importance=importance, **options)

    return fit


def sign_fit(rounds: int = 0) -> Fit:
    """Signs under the full Hessian; without rounds of flips, which help one and two planes about alike."""
    last: dict[str, Curvature] = {}

    def fit(name: str, W: Tensor, H: Tensor, planes: int) -> Planes:
        if name not in last:
            last.clear()
            last[name] = Curvature(H, _SHRINKAGE)
        return fit_signs(W, last[name], planes=planes, rounds=rounds, layer=name).planes

    return fit


def depths(model: nn.Module, layers: Sequence[str]) -> dict[str, float]:
    """How deep in the stack of blocks each layer is: 0 in the first, 1 in the last, ½ outside or without a stack."""
    found = find_blocks(model)
    if found is None or len(found[1]) < 2:
        return dict.fromkeys(layers, 0.5)
    stack, last = found[0] + ".", len(found[1]) - 1
    inside = {name: int(name.removeprefix(stack).partition(".")[0]) for name in layers if name.startswith(stack)}
    return {name: inside[name] / last if name in inside else 0.5 for name in layers}


def pieces_of(batches: Sequence[Batch], tokens: int, length: int) -> list[Batch]:
    """Pieces of at most ``length`` tokens, about ``tokens`` in all without padding, spread over the sequences."""
    cut = [
        {key: value[:, start : start + length] for key, value in batch.items()}
        for batch in batches
        for start in range(0, batch["input_ids"].shape[1], length)
    ]
    cut = [piece for piece in cut if real_tokens(piece)]
    total = sum(map(real_tokens, cut))
    wanted = min(len(cut), math.ceil(tokens * len(cut) / total))
    return [cut[index * len(cut) // wanted] for index in range(wanted)]


def _gradients(
    model: nn.Module, layers: Sequence[str], pieces: Sequence[Batch], seed: int, arithmetic: torch.dtype | None
) -> tuple[dict[str, _Seen], int]:
    """Squares of the gradients of each layer's outputs and of its inputs, and the tokens with a label."""
    seen = {name: _Seen.nothing(model.get_submodule(name)) for name in layers}
    mask: Tensor | None = None

    def hook(name: str) -> Callable[..., Tensor]:
        def after(_module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
            x = args[0].detach().reshape(-1, args[0].shape[-1])
            if mask is not None and mask.numel() == len(x):
                x = x[mask.reshape(-1).bool().to(x.device)]
            total = seen[name]
            total.inputs += x.float().square().sum(0).cpu()
            total.rows += len(x)

            def count(gradient: Tensor) -> None:
                total.squares += gradient.reshape(-1, gradient.shape[-1]).float().square().sum(0).cpu()

            # Parameters are frozen, so the first layers' outputs would not ask for gradients themselves.
            kept = output if output.requires_grad else output.detach().requires_grad_()
            kept.register_hook(count)
            return kept.clone()  # what follows may change it in place

        return after

    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in layers]
    generator = torch.Generator().manual_seed(seed)
    counted = 0
    try:
        with frozen(model), torch.enable_grad():
            device = next(p.device for p in model.parameters())
            for piece in pieces:
                mask = piece.get("attention_mask")
                with torch.autocast(device.type, arithmetic) if arithmetic else contextlib.nullcontext():
                    logits = _logits(model, piece)
                loss = _surprise(logits, generator)
                loss.backward()
                counted += len(logits)
    finally:
        for handle in handles:
            handle.remove()
    return seen, counted


def logits_of(model: nn.Module, piece: Batch) -> Tensor:
    """(tokens, classes) of one sequence, in the model's own dtype, without those of padding.

    Raises:
        ValueError: the model gives no logits, or they are not finite.
    """
    output = run_model(model, piece)
    logits, mask = getattr(output, "logits", None), piece.get("attention_mask")
    owner = type(model).__name__
    if not isinstance(logits, Tensor):
        raise ValueError(f"{owner} gives no logits to measure the sensitivity of its layers by: {_REMEDY}")
    if mask is not None and mask.shape == logits.shape[:-1]:
        logits = logits[mask.bool().to(logits.device)]
    logits = logits.reshape(-1, logits.shape[-1])
    if not bool(torch.isfinite(logits).all()):
        raise ValueError(f"The logits of {owner} hold NaN or infinite values: load it in float32 or bfloat16")
    return logits


def _logits(model: nn.Module, piece: Batch) -> Tensor:
    """As ``logits_of``, float32, with a gradient."""
    logits = logits_of(model, piece)
    if not logits.requires_grad:
        raise ValueError(f"The logits of {type(model).__name__} do not depend on the layers to be packed: {_REMEDY}")
    return logits.float()


def _surprise(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Σ −log p(label), with one label drawn for each row."""
    with torch.no_grad():
        labels = torch.multinomial(logits.softmax(-1).cpu(), 1, generator=generator)[:, 0]
    return F.cross_entropy(logits, labels.to(logits.device), reduction="sum")


@torch.no_grad()
def _costs(
    module: nn.Module,
    name: str,
    H: Tensor | None,
    seen: _Seen,
    tokens: int,
    fit: Fit,
    options: Sequence[Any],
    rows: int,
) -> dict[Any, float]:
    """½ Σ_i G_i (ΔW H ΔWᵀ)_ii per token for each option."""
    if not seen.rows:  # an expert that no token chose
        return dict.fromkeys(options, 0.0)
    W = float_weight(module).float()
    if H is None:  # outside of the blocks: only the squares of its inputs are known
        H = torch.diag(seen.inputs * (2 / seen.rows)).to(W)
    # H is 2 Σ x xᵀ / rows, and the squares are summed over the layer's rows: a quarter is left of the half.
    G = (seen.squares / (4 * tokens)).to(W)
    energies = ((W @ H) * W).sum(1)
    chosen = torch.linspace(0, len(W) - 1, min(rows, len(W)), device=W.device).round().long()
    sample = W[chosen]
    sampled = float((G[chosen] * energies[chosen]).sum(dtype=torch.float64))
    whole = float((G * energies).sum(dtype=torch.float64))
    costs = {}
    for option in options:
        found = fit(name, sample, H, option)
        R = sample - (found if isinstance(found, Tensor) else dequantize_planes(found))
        lost = float((G[chosen] * ((R @ H) * R).sum(1)).sum(dtype=torch.float64))
        # The sampled rows tell which share of the energy is lost; how large that energy is, all rows tell.
        costs[option] = lost / sampled * whole if sampled > 0 else 0.0
    if not all(map(math.isfinite, costs.values())):
        raise ValueError(f"The sensitivity of {name} is not finite ({costs}): load the model in float32 or bfloat16")
    return costs


@contextlib.contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No parameter asks for a gradient, and dropout is off; both as before when this ends."""
    asked = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in asked:
        parameter.requires_grad_(False)
    try:
        with evaluating(model):
            yield
    finally:
        for parameter in asked:
            parameter.requires_grad_(True)

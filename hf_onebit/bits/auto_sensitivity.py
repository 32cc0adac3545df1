"""What each layer, the head and the embedding lose with each choice of automatic bits: on text, or by weights alone.

On text it is ``sensitivity.measure_sensitivity``: nats per token. Without text nothing says what a layer's error does
to the predictions. Then the cost is ‖W − Ŵ‖² / ‖W‖², one for every layer whatever its size: that is exact where all
layers hand the same share of their relative error on, which Malinovskii et al. 2024 (arXiv:2411.17525) find to be so
within a small factor. Small layers, for which a bit is cheap, then come first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from hf_onebit.algorithms.closed_form import closed_form_planes, dequantize_planes, importance_from_hessian
from hf_onebit.algorithms.curvature import Curvature
from hf_onebit.algorithms.gptq import GroupFit
from hf_onebit.algorithms.groupwise import quantize_groupwise
from hf_onebit.algorithms.row_blocks import column_importance
from hf_onebit.algorithms.signs import fit_signs
from hf_onebit.arithmetic import autocast_dtype
from hf_onebit.bits.sensitivity import Planes, Sensitivity, measure_embedding, measure_sensitivity
from hf_onebit.calibration import Batch
from hf_onebit.choices import Choice
from hf_onebit.formats.onebit import pack_planes
from hf_onebit.formats.table import TableEntry
from hf_onebit.nn.heads import HeadPlan
from hf_onebit.nn.replace import LayerPlan, float_weight
from hf_onebit.quantization.group_tensors import dense_fit, fit_entry, pack_fit, round_entry
from hf_onebit.rungs.blocks import device_of

# The shrinkage that serves most layers where it is not chosen on held-out data.
_SHRINKAGE = 0.15
_SAMPLE_ROWS = 64
_HEAD_ROWS = 1024
# Of a head or an embedding, what may be chosen beside floating point.
HEAD_CHOICES = (8, 4)


@dataclass
class ChoiceFit:
    """A quick fit of some rows with any choice; ``sensitivity.Fit``.

    Attributes:
        entries: {layer: {choice: entry}}. Those of several widths are added when they are first fitted, since the
            inputs' importance decides how many get which.
        closed: to the nearest weights, as preset ``closed`` does; else to the nearest outputs.
        options: keyword arguments of ``choices.Choice.entry``.
        search: as of ``MPQConfig``.
    """

    entries: dict[str, dict[str, TableEntry]]
    closed: bool
    options: Mapping[str, Any] = field(default_factory=dict)
    search: str = "mse"
    _last: tuple[Tensor, Curvature] | None = None

    def __call__(self, name: str, W: Tensor, H: Tensor | None, choice: str) -> Tensor:
        """What a layer's rows W (rows, in) become."""
        entry = self._entry(name, W, H, choice)
        if entry is None:
            return torch.zeros_like(W)
        found = self._fitted(name, W, H, entry)
        return dense_fit(found, entry) if isinstance(found, GroupFit) else dequantize_planes(found)

    def pack(self, name: str, W: Tensor, H: Tensor | None, choice: str) -> tuple[TableEntry, dict[str, Tensor]]:
        """How a layer W (out, in) is packed, and its packed tensors; ``choice`` is one that it can have."""
        entry = self._entry(name, W, H, choice)
        assert entry is not None
        found = self._fitted(name, W, H, entry)
        return entry, pack_fit(found, entry) if isinstance(found, GroupFit) else pack_planes(found)

    def _fitted(self, name: str, W: Tensor, H: Tensor | None, entry: TableEntry) -> GroupFit | Planes:
        if not self.closed and H is not None:
            curvature = self._curvature(H)
            if entry.method == "onebit":
                return fit_signs(W, curvature, planes=entry.planes, rounds=0, layer=name).planes
            return fit_entry(W, curvature, entry, 0, name)
        if entry.method == "onebit":
            importance = None if H is None else importance_from_hessian(H)
            return closed_form_planes(W, entry.planes, layer=name, importance=importance)
        diagonal = None if H is None else H.diagonal()
        return round_entry(W, entry, name, diagonal, self.search)

    def _entry(self, name: str, W: Tensor, H: Tensor | None, choice: str) -> TableEntry | None:
        known = self.entries[name]
        if choice not in known:
            importance = column_importance(W, None if H is None else H.diagonal())
            found = Choice.parse(choice).entry(W.shape[1], importance=importance, **self.options)
            if found is None:
                return None
            known[choice] = found
        return known[choice]

    def _curvature(self, H: Tensor) -> Curvature:
        # By the matrix, not by the name: a layer is fitted more than once, each time on other text.
        if self._last is None or self._last[0] is not H:
            self._last = H, Curvature(H, _SHRINKAGE)
        return self._last[1]


@dataclass(frozen=True)
class HeadCosts:
    """What head and embedding lose, {bits: cost} each; empty where their bits are not to be chosen."""

    head: dict[int, float] = field(default_factory=dict)
    embedding: dict[int, float] = field(default_factory=dict)


def costs_on_text(
    model: nn.Module,
    names: Mapping[str, Sequence[str]],
    heads: HeadPlan,
    fit: ChoiceFit,
    batches: Sequence[Batch],
    *,
    seed: int = 0,
    done: Callable[[str], None] = lambda name: None,
) -> tuple[Sensitivity, HeadCosts]:
    """Measure layers, and of ``heads`` what it packs.

    Args:
        model: float model, left as it was.
        names: {layer: choices}.
        heads: the head and the embedding whose bits are to be chosen, at any bits.
        fit: what the choices do.
        batches: calibration sequences.
        seed: of the labels that are drawn.
        done: called with each layer's name.

    Raises:
        ValueError: as ``measure_sensitivity``.
    """
    head = heads.head if heads.head in heads.entries else None
    embedding = heads.embedding if heads.embedding in heads.entries else None

    def either(name: str, W: Tensor, H: Tensor, choice: Any) -> Tensor:
        return _rounded(W, heads.entries[name], choice) if name == head else fit(name, W, H, choice)

    options: dict[str, Sequence[Any]] = dict(names)
    if head is not None:
        options[head] = HEAD_CHOICES
    arithmetic = autocast_dtype(device_of(model))
    measured = measure_sensitivity(
        model, list(options), batches, either, planes=options, rows=_SAMPLE_ROWS, seed=seed, arithmetic=arithmetic,
        done=done,
    )  # fmt: skip
    costs, of_embedding = dict(measured.costs), {}
    if embedding is not None:
        entry = heads.entries[embedding]
        of_embedding = measure_embedding(
            model, embedding, batches, lambda W, bits: _rounded(W, entry, bits), HEAD_CHOICES, seed=seed,
            arithmetic=arithmetic,
        )  # fmt: skip
    of_head = costs.pop(head) if head is not None else {}
    return Sensitivity(costs, measured.tokens), HeadCosts(of_head, of_embedding)


@torch.no_grad()
def costs_of_weights(
    model: nn.Module,
    names: Mapping[str, Sequence[str]],
    heads: HeadPlan,
    fit: ChoiceFit,
    *,
    done: Callable[[str], None] = lambda name: None,
) -> tuple[Sensitivity, HeadCosts]:
    """The same by relative errors of weights; arguments as of ``costs_on_text``."""
    costs: dict[str, dict[Any, float]] = {}
    for name, choices in names.items():
        sample = _sample(float_weight(model.get_submodule(name)), _SAMPLE_ROWS)
        costs[name] = {choice: _relative(sample, fit(name, sample, None, choice)) for choice in choices}
        done(name)
    found: list[dict[int, float]] = []
    for role in (heads.head, heads.embedding):
        entry = None if role is None else heads.entries.get(role)
        if role is None or entry is None:
            found.append({})
            continue
        sample = _sample(float_weight(model.get_submodule(role)), _HEAD_ROWS)
        found.append({bits: _relative(sample, _rounded(sample, entry, bits)) for bits in HEAD_CHOICES})
        done(role)
    return Sensitivity(costs, 0), HeadCosts(*found)


def choices_of(plan: LayerPlan, names: Sequence[str], options: Mapping[str, Any]) -> dict[str, dict[str, TableEntry]]:
    """{layer: {choice: entry}} of the choices of one width."""
    parsed = {name: Choice.parse(name) for name in names}
    found: dict[str, dict[str, TableEntry]] = {}
    for layer, shape in plan.selected.items():
        found[layer] = {}
        for name, choice in parsed.items():
            entry = None if choice.mixed else choice.entry(shape.in_features, **options)
            if entry is not None:
                found[layer][name] = entry
    return found


def _rounded(W: Tensor, entry: TableEntry, bits: int) -> Tensor:
    codes, scales, zeros = quantize_groupwise(W, bits, entry.group_size, entry.symmetric)
    width = W.shape[1] if entry.group_size == -1 else entry.group_size
    s = scales.float().repeat_interleave(width, 0)[: W.shape[1]].T
    z = s * (1 << (bits - 1)) if zeros is None else zeros.float().repeat_interleave(width, 0)[: W.shape[1]].T
    return codes.float() * s - z


def _sample(W: Tensor, rows: int) -> Tensor:
    chosen = torch.linspace(0, len(W) - 1, min(rows, len(W)), device=W.device).round().long()
    return W[chosen].float()


def _relative(W: Tensor, Q: Tensor) -> float:
    energy = float(W.square().sum(dtype=torch.float64))
    return float((W - Q).square().sum(dtype=torch.float64)) / energy if energy > 0 else 0.0

"""From a target to planes per layer: what a checkpoint of a plan will take, and which layers get a second plane."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from hf_onebit.algorithms.allocation import DEPTH_PRIOR, Option, allocate, depth_ramp
from hf_onebit.bits.sensitivity import Sensitivity, depths
from hf_onebit.byte_sizes import shown_size
from hf_onebit.config import OneBitConfig
from hf_onebit.formats.onebit import MAX_PLANES
from hf_onebit.formats.table import TableEntry
from hf_onebit.nn.replace import LayerPlan, named_planes
from hf_onebit.nn.roles import LinearShape

# What a weight file has beside tensors and their entries in its header: lengths, metadata, padding. Large checkpoints
# are split into several files, each with its own.
_FILE_OVERHEAD = 256
_BYTES_A_FILE = 10**9
# What another plane leaves of a layer's cost at the most.
_NO_GAIN = 1 - 1e-6


@dataclass(frozen=True)
class Budget:
    """What a target leaves to the sign matrices and scales.

    Attributes:
        field: "target_bpw" or "target_size".
        wanted: its value: bits per weight, or bytes.
        bits: for all layers' packed tensors together (with their entries in the header of the file, if that counts).
        options: {layer: {planes: bits}}; one entry where ``planes_per_layer`` decides. With automatic bits, choices by
            name stand in the place of planes.
        fixed: bits of the target that do not depend on the planes.
        weights: of all layers together.
    """

    field: str
    wanted: float
    bits: int
    options: dict[str, dict[Any, int]]
    fixed: int
    weights: int

    @property
    def reachable(self) -> tuple[float, float]:
        """The least and the most that the target may be, in its own unit."""
        totals = [sum(f(bits.values()) for bits in self.options.values()) + self.fixed for f in (min, max)]
        least, most = (total / (self.weights if self.field == "target_bpw" else 8) for total in totals)
        return least, most


def plan_budget(model: nn.Module, plan: LayerPlan, config: OneBitConfig) -> Budget | None:
    """The budget that a config's target leaves, or None where it has no target.

    Args:
        model: float model, as it will be packed.
        plan: the layers to pack.
        config: valid; ``target_bpw``, ``target_size`` and ``planes_per_layer`` are used.

    Raises:
        ValueError: no layer is to be packed, or the target is out of reach, naming the range.
    """
    field = "target_bpw" if config.target_bpw is not None else "target_size"
    wanted = config.target_bpw if config.target_bpw is not None else config.target_bytes
    if wanted is None:
        return None
    if not plan.selected:
        raise ValueError(f"{field} chooses planes for linear layers, and none is to be packed: leave it out")
    named, _ = named_planes(plan.selected, config.planes_per_layer)
    choices = {name: (named[name],) if name in named else range(1, MAX_PLANES + 1) for name in plan.selected}
    of_file = field == "target_size"
    fixed = other_bits(model, plan) if of_file else bias_bits(model, plan)
    most = [entry_bits(name, shape, TableEntry(planes=MAX_PLANES)) for name, shape in plan.selected.items()]
    digits = digits_of((fixed + sum(most)) // 8) if of_file else 0
    options = {
        name: {planes: entry_bits(name, shape, TableEntry(planes=planes), digits) for planes in choices[name]}
        for name, shape in plan.selected.items()
    }
    budget = budget_of(plan, field, wanted, options, fixed)
    by_size = "pack the head and the embedding as well (lm_head_bits=8, embedding_bits=8; --lm-head-bits 8 "
    by_size += "--embedding-bits 8), or leave it out"
    packed = field == "target_bpw" or bool(plan.heads.entries)
    lower = "for the least, leave it out and set planes=1 (--planes 1)" if packed else by_size
    check_reachable(budget, type(model).__name__, lower, "for the most, leave it out and set planes=2 (--planes 2)")
    return budget


def budget_of(plan: LayerPlan, field: str, wanted: float, options: dict[str, dict[Any, int]], fixed: int) -> Budget:
    """The budget of a target: what it leaves to ``options`` once ``fixed`` bits are taken."""
    weights = sum(shape.weights for shape in plan.selected.values())
    total = wanted * 8 if field == "target_size" else math.floor(wanted * weights)
    return Budget(field, wanted, int(total) - fixed, options, fixed, weights)


def choose_planes(
    budget: Budget, model: nn.Module, sensitivity: Sensitivity, depth_prior: float = DEPTH_PRIOR
) -> tuple[dict[str, int], dict[str, Any]]:
    """Planes of each layer that cost least within a budget.

    Args:
        budget: of ``plan_budget``.
        model: its stack of blocks says how deep each layer is.
        sensitivity: measured costs.
        depth_prior: strength of the ramp that the costs are multiplied by (``depth_ramp``).

    Returns:
        {layer: planes}, and a JSON-ready record of the choice for the report.
    """
    ramp = {name: depth_ramp(depth, depth_prior) for name, depth in depths(model, list(budget.options)).items()}
    options = []
    for name, choices in budget.options.items():
        costs = [sensitivity.costs[name][planes] * ramp[name] for planes in choices]
        # A sample of rows and a quick fit may say that a plane does harm. Then it is the last to be given, not refused.
        costs = [cost if i == 0 else min(cost, costs[0] * _NO_GAIN) for i, cost in enumerate(costs)]
        options.append([Option(bits, cost) for bits, cost in zip(choices.values(), costs, strict=True)])
    found = allocate(options, budget.bits)
    planes = {
        name: list(choices)[choice]
        for (name, choices), choice in zip(budget.options.items(), found.choices, strict=True)
    }
    spent = found.bits + budget.fixed
    record = {
        "target": budget.field.removeprefix("target_"),
        "wanted": budget.wanted,
        "planned": spent / budget.weights if budget.field == "target_bpw" else -(-spent // 8),
        "tokens": sensitivity.tokens,
        "depth_prior": depth_prior,
        "cost": found.cost,
        "least_cost": found.bound,
        "layers": {
            name: {
                "planes": count,
                "sensitivity": {str(key): value for key, value in sensitivity.costs[name].items()},
                "ramp": ramp[name],
            }
            for name, count in planes.items()
        },
    }
    return planes, record


def other_bits(model: nn.Module, plan: LayerPlan) -> int:
    """Bits of all that will be in the weight files beside the selected layers' packed tensors, headers included.

    An upper bound, exact but for some hundred bytes a file: tensors that a model's own code leaves out of its files
    count too, and so does each file's share of ``_FILE_OVERHEAD``.
    """
    packed = set(plan.selected) | set(plan.heads.entries)
    tensors: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    seen: set[int] = set()
    for key, tensor in model.state_dict(keep_vars=True).items():
        owner, _, name = key.rpartition(".")
        if (name == "weight" and owner in packed) or id(tensor) in seen:
            continue
        seen.add(id(tensor))  # a tied matrix is stored once
        tensors[key] = tuple(tensor.shape), tensor.dtype
    for owner, entry in plan.heads.entries.items():
        shape = plan.heads.shapes[owner]
        if entry.tied_to is None:
            specs = entry.tensor_specs(shape.in_features, shape.out_features)
            tensors |= {f"{owner}.{name}": spec for name, spec in specs.items()}
    sizes = {key: math.prod(shape) * dtype.itemsize for key, (shape, dtype) in tensors.items()}
    data = sum(sizes.values())
    two = TableEntry(planes=MAX_PLANES)
    most = data + sum(
        2 * shape.weights if name in plan.entries else entry_bits(name, shape, two) // 8
        for name, shape in plan.selected.items()
    )
    entries = sum(_header(key, shape, dtype, digits_of(most)) for key, (shape, dtype) in tensors.items())
    return 8 * (data + entries + _FILE_OVERHEAD * (1 + most // _BYTES_A_FILE))


def bias_bits(model: nn.Module, plan: LayerPlan) -> int:
    """Bits of the packed layers' biases, which stay as they are."""
    biases = [getattr(model.get_submodule(name), "bias", None) for name in plan.selected]
    return sum(8 * bias.numel() * bias.element_size() for bias in biases if bias is not None)


def digits_of(most_bytes: int) -> int:
    """How many digits an offset in files of so many bytes may have."""
    return len(str(most_bytes))


def entry_bits(name: str, shape: LinearShape, entry: TableEntry, digits: int = 0) -> int:
    """Bits of a layer's packed tensors, the bias apart; with ``digits``, their entries in the file's header too."""
    specs = entry.stored_specs(shape.in_features, shape.out_features)
    bits = sum(8 * math.prod(size) * dtype.itemsize for size, dtype in specs.values())
    if digits:
        bits += 8 * sum(_entry(f"{name}.{tensor}", size, dtype, digits) for tensor, (size, dtype) in specs.items())
    return bits


def _header(key: str, shape: tuple[int, ...], dtype: torch.dtype, digits: int) -> int:
    """As ``_entry``; fused experts are saved split, into a gate, an up and a down matrix for each expert."""
    if "experts" not in key or len(shape) != 3:
        return _entry(key, shape, dtype, digits)
    return 2 * shape[0] * _entry(f"{key}.{shape[0]}_proj.weight", shape, dtype, digits)


def _entry(key: str, shape: tuple[int, ...], dtype: torch.dtype, digits: int) -> int:
    """Bytes of a tensor's entry in the JSON header of a safetensors file, comma included, at the most."""
    offset = 10**digits - 1
    kind = "F8_E4M3FNUZ" if dtype.itemsize == 1 else "BF16"  # the longest name that may be
    entry = {key: {"dtype": kind, "shape": list(shape), "data_offsets": [offset, offset]}}
    return len(json.dumps(entry, separators=(",", ":"), ensure_ascii=False).encode()) - 1


def check_reachable(budget: Budget, owner: str, lower: str, higher: str) -> None:
    """Refuse a target out of reach.

    Args:
        budget: what it leaves.
        owner: class of the model, for the error text.
        lower, higher: what to do for less, and for more.

    Raises:
        ValueError: naming the least and the most, and the remedy.
    """
    least, most = budget.reachable
    if least <= budget.wanted <= most:
        return
    if budget.field == "target_bpw":
        reach = f"{math.ceil(least * 1e4) / 1e4:.4f} to {math.floor(most * 1e4) / 1e4:.4f} bits per weight"
        got = f"{budget.wanted:g}"
    else:
        reach = f"{math.ceil(least)} to {math.floor(most)} bytes ({shown_size(least)} to {shown_size(most)})"
        got = f"{int(budget.wanted)} bytes ({shown_size(budget.wanted)})"
    remedy = higher if budget.wanted > most else lower
    raise ValueError(f"{budget.field} is {got}, and {owner} can be packed to {reach}: {remedy}")

"""Packed linear layers as vLLM builds them: several modules in one layer, cut over ranks, filled tensor by tensor.

vLLM computes q, k and v, or gate and up, in one layer, of which each rank holds some outputs or some inputs. A file has
each module's own tensors, of maybe another method and width. So one vLLM layer is *parts*, the modules of the file, and
*matrices*, what is computed in one call: neighbouring parts in plain groups of the same kind lie side by side in one
matrix, any other part is one by itself::

    q, k 4-bit, v 2-bit    parts  q | k | v      matrices  [q k] (words, out_q + out_k)   [v] (words, out_v)
    q, k, v onebit         parts  q | k | v      matrices  [q] [k] [v], since each has scales of the inputs of its own

The layer has one parameter for each tensor name of the file (``weight``, ``a``, ``scales``, ...), since vLLM finds
parameters by name. Of several matrices it is flat, one after the other; of one it has the tensor's own shape.

Nothing here imports vLLM: ``vllm.py`` gives these to it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from hf_onebit import ops
from hf_onebit.formats import mbwq, mpq, onebit
from hf_onebit.formats.mpq import Specs
from hf_onebit.formats.packing import WORD_BITS
from hf_onebit.formats.table import TableEntry

# What vLLM calls the parts of its fused attention layer.
_SHARDS = {"q": 0, "k": 1, "v": 2}
# Tensors along the inputs alone; all others have the outputs in their last dimension.
_ALONG_INPUTS = frozenset({"b", "b_1", "g_idx", "q_perm"})
_REMEDY = "run it with tensor_parallel_size=1, or on fewer ranks"


@dataclass(frozen=True)
class Part:
    """A module of the checkpoint within a vLLM layer.

    Attributes:
        name: in the checkpoint's table.
        entry: how it is packed.
        outputs: of each of vLLM's partitions that it fills, on this rank; several where the file's module is fused.
    """

    name: str
    entry: TableEntry
    outputs: tuple[int, ...]


@dataclass(frozen=True)
class _Matrix:
    """Neighbouring parts that are computed in one call.

    Attributes:
        name: of its parts, for errors.
        entry: how it is packed.
        start: its first output among those of the layer.
        outputs: how many it has.
        specs: shape and dtype of its tensors.
    """

    name: str
    entry: TableEntry
    start: int
    outputs: int
    specs: Specs


@dataclass
class _Loaded:
    """What has arrived of a part.

    Attributes:
        names: tensors of the file.
        outputs: of the whole module, once a tensor told.
        statistics: scales and zeros in few bits, which are restored when all of them are there.
    """

    names: set[str] = field(default_factory=set)
    outputs: int | None = None
    statistics: dict[str, Tensor] = field(default_factory=dict)


class PackedLayer:
    """The packed tensors of one vLLM layer: their sizes, how they are filled, and the product.

    Args:
        parts: in the order of the layer's outputs.
        in_features: of the whole layer.
        inputs_here: those of this rank.
        ranks: gives (rank, ranks) that share the layer.

    Raises:
        ValueError: parts that cannot be in one layer, or cannot be cut so.
    """

    def __init__(
        self, parts: Sequence[Part], in_features: int, inputs_here: int, ranks: Callable[[], tuple[int, int]]
    ) -> None:
        self.parts = tuple(parts)
        self.in_features, self.inputs_here = in_features, inputs_here
        self._ranks = ranks
        for part in self.parts:
            self._check(part)
        self._loaded = [_Loaded() for _ in self.parts]
        self._place: list[tuple[int, int]] = []  # of each part: its matrix, and its first output within that
        self.matrices = self._arrange()
        planes = {matrix.entry.planes if matrix.entry.method == "onebit" else 0 for matrix in self.matrices}
        self._as_group = len(self.matrices) > 1 and len(planes) == 1 and 0 not in planes
        self._dense = False

    # --- sizes ----------------------------------------------------------------------------------------------

    def _check(self, part: Part) -> None:
        entry, name = part.entry, part.name
        if entry.in_features not in (None, self.in_features):
            raise ValueError(f"{name} has {entry.in_features} inputs by the table, and {self.in_features} in vLLM")
        if len(part.outputs) > 1 and entry.double_quant is not None:
            raise ValueError(
                f"{name} is fused in the file and has statistics in few bits (double_quant), whose outputs cannot be "
                "told apart. Quantize with double_quant=False"
            )
        if self.inputs_here == self.in_features:
            return
        if entry.g_idx or entry.in_blocks:
            raise ValueError(f"The inputs of {name} have an order of their own, which cannot be cut: {_REMEDY}")
        unit, why = WORD_BITS, f"a word holds {WORD_BITS} inputs"
        if entry.method == "mpq" and 0 < entry.group_size < self.in_features:
            unit, why = math.lcm(unit, entry.group_size), f"{why}, a group {entry.group_size}"
        if self.inputs_here % unit:
            raise ValueError(
                f"{name} has {self.in_features} inputs, and a rank would hold {self.inputs_here} of them: expected a "
                f"multiple of {unit} ({why}); {_REMEDY}"
            )

    def _arrange(self) -> tuple[_Matrix, ...]:
        def kind(numbered: tuple[int, Part]) -> tuple[object, ...]:
            number, part = numbered
            entry = part.entry
            plain = entry.method == "mpq" and not entry.g_idx and not entry.in_blocks
            return (entry.bits, entry.group_size, entry.symmetric) if plain else (number,)

        matrices: list[_Matrix] = []
        start = 0
        for _, neighbours in itertools.groupby(enumerate(self.parts), kind):
            members = [part for _, part in neighbours]
            outputs = 0
            for part in members:
                self._place.append((len(matrices), outputs))
                outputs += sum(part.outputs)
            entry = members[0].entry
            specs = entry.tensor_specs(self.inputs_here, outputs)
            matrices.append(_Matrix("+".join(p.name for p in members), entry, start, outputs, specs))
            start += outputs
        return tuple(matrices)

    @property
    def output_dims(self) -> dict[str, int]:
        """For each tensor name with outputs, the dimension that has them in the file.

        Models whose files interleave the outputs of fused layers bring them into order along it.
        """
        names = {name for part in self.parts for name in part.entry.tensor_names} - _ALONG_INPUTS
        return {name: 0 if name.startswith("a") else 1 for name in names}

    def register(self, layer: nn.Module, loader: Callable[[str], Callable[..., None]]) -> None:
        """Give a layer its parameters.

        Args:
            layer: vLLM's.
            loader: from a tensor's name to what vLLM calls as ``(parameter, tensor, shard id)``.
        """
        sizes: dict[str, list[tuple[tuple[int, ...], torch.dtype]]] = {}
        for matrix in self.matrices:
            for name, spec in matrix.specs.items():
                sizes.setdefault(name, []).append(spec)
        for name, specs in sizes.items():
            shape = specs[0][0] if len(self.matrices) == 1 else (sum(math.prod(shape) for shape, _ in specs),)
            parameter = nn.Parameter(torch.empty(shape, dtype=specs[0][1]), requires_grad=False)
            self._add(layer, name, parameter, loader(name))
        for name in sorted(self._only_stored()):
            # vLLM looks for it by this name; what arrives is kept aside and restored in ``finish``.
            self._add(layer, name, nn.Parameter(torch.empty(0), requires_grad=False), loader(name))

    def _add(self, layer: nn.Module, name: str, parameter: nn.Parameter, loader: Callable[..., None]) -> None:
        parameter.weight_loader = loader  # type: ignore[attr-defined]
        if name in self.output_dims:
            parameter.output_dim = self.output_dims[name]  # type: ignore[attr-defined]
        layer.register_parameter(name, parameter)

    def _only_stored(self) -> set[str]:
        """Names that the file has and a layer in memory has not."""
        return {name for part in self.parts for name in self._stored(part)} - {
            n for m in self.matrices for n in m.specs
        }

    def _stored(self, part: Part, outputs: int = 1) -> Specs:
        return part.entry.stored_specs(self.in_features, outputs)

    def tensors(self, layer: nn.Module, number: int) -> dict[str, Tensor]:
        """The tensors of a matrix by name, views of the layer's parameters."""
        found: dict[str, Tensor] = {}
        for name, (shape, _) in self.matrices[number].specs.items():
            parameter: Tensor = getattr(layer, name)
            if len(self.matrices) > 1:
                before = sum(math.prod(m.specs[name][0]) for m in self.matrices[:number] if name in m.specs)
                parameter = parameter.narrow(0, before, math.prod(shape)).view(shape)
            found[name] = parameter
        return found

    # --- filling --------------------------------------------------------------------------------------------

    @torch.no_grad()
    def load(self, layer: nn.Module, name: str, tensor: Tensor, shard: str | int | None = None) -> None:
        """Take a tensor of the file, and of it what this rank holds.

        Args:
            layer: whose parameters are filled.
            name: the tensor's, within its module.
            tensor: whole, as the file has it.
            shard: which part: "q", "k", "v" or a number; None where the layer is one module of the file.

        Raises:
            ValueError: no part has such a tensor, or it has another dtype or shape.
        """
        number = self._part_of(name, shard)
        part, loaded = self.parts[number], self._loaded[number]
        where = f"{part.name}.{name}"
        specs = self._stored(part)
        if name not in specs:
            raise ValueError(f"{where}: a layer packed so has {', '.join(specs)} and no such tensor")
        if tensor.dtype != specs[name][1]:
            raise ValueError(f"{where} is {tensor.dtype} {tuple(tensor.shape)}, expected {specs[name][1]}")
        if name in self._only_stored():
            # The file's words cannot be cut before they are restored.
            loaded.statistics[name] = tensor.detach().clone()
        else:
            if name not in _ALONG_INPUTS:
                self._count_outputs(loaded, tensor.shape[-1] if tensor.dim() else 0, where)
            expected = self._stored(part, loaded.outputs or 1)[name][0]
            if tuple(tensor.shape) != expected:
                raise ValueError(f"{where} has shape {tuple(tensor.shape)}, expected {expected}")
            self._copy(layer, number, name, tensor)
        loaded.names.add(name)

    def _part_of(self, name: str, shard: str | int | None) -> int:
        number = _SHARDS.get(shard) if isinstance(shard, str) else 0 if shard is None else shard
        known = isinstance(number, int) and 0 <= number < len(self.parts)
        if not known or (shard is None) != (len(self.parts) == 1):
            raise ValueError(
                f"vLLM brings {name!r} for part {shard!r} of a layer made of {[part.name for part in self.parts]}: its "
                "model code cuts this layer in a way that the plug-in does not know"
            )
        return int(number)  # type: ignore[arg-type]  # an int, by ``known``

    @staticmethod
    def _count_outputs(loaded: _Loaded, outputs: int, where: str) -> None:
        if loaded.outputs not in (None, outputs):
            raise ValueError(f"{where} has {outputs} outputs, and other tensors of its layer {loaded.outputs}")
        loaded.outputs = outputs

    def _copy(self, layer: nn.Module, number: int, name: str, tensor: Tensor) -> None:
        part = self.parts[number]
        matrix, start = self._place[number]
        target = self.tensors(layer, matrix)[name]
        if name not in _ALONG_INPUTS:
            target = target.narrow(-1, start, sum(part.outputs))
            pieces = self._outputs_here(part, tensor.shape[-1])
            tensor = torch.cat([tensor.narrow(-1, first, count) for first, count in pieces], dim=-1)
        first, count = self._inputs_here(name, tensor.shape[0])
        target.copy_(tensor.narrow(0, first, count))

    def _outputs_here(self, part: Part, outputs: int) -> list[tuple[int, int]]:
        """(first, count) of the outputs of a whole module that this rank holds."""
        here = sum(part.outputs)
        if outputs == here:
            return [(0, outputs)]
        rank, ranks = self._ranks()
        if len(part.outputs) == 1 and outputs % here == 0 and ranks % (outputs // here) == 0:
            # Fewer pieces than ranks: neighbouring ranks hold the same one, as vLLM does with heads of keys and values.
            return [(rank * (outputs // here) // ranks * here, here)]
        if outputs == ranks * here:  # a fused module: every partition is cut by itself
            starts = itertools.accumulate(part.outputs, initial=0)
            return [(ranks * start + rank * count, count) for start, count in zip(starts, part.outputs, strict=False)]
        raise ValueError(
            f"{part.name} has {outputs} outputs, and a rank of {ranks} would hold {here} of them: expected {here} in "
            f"all, or equal parts; {_REMEDY}"
        )

    def _inputs_here(self, name: str, rows: int) -> tuple[int, int]:
        """(first, count) along the first dimension of a tensor that this rank holds."""
        along_rows = name in _ALONG_INPUTS or name in ("scales", "zeros") or name.startswith("weight")
        if self.inputs_here == self.in_features or not along_rows or rows == 1:
            return 0, rows  # one group for all inputs is whole everywhere
        rank = self._ranks()[0]
        parts = self.in_features // self.inputs_here
        return rank * (rows // parts), rows // parts

    @torch.no_grad()
    def finish(self, layer: nn.Module, dense: torch.dtype | None = None) -> None:
        """Make a filled layer ready to compute: all tensors there, their values such as they may be.

        Args:
            layer: filled.
            dense: unpack the weight to this dtype and keep that instead; None keeps it packed.

        Raises:
            ValueError: a tensor is missing, or holds values that no packed layer has.
        """
        for number, (part, loaded) in enumerate(zip(self.parts, self._loaded, strict=True)):
            missing = sorted(set(self._stored(part)) - loaded.names)
            if missing:
                raise ValueError(
                    f"{part.name}: vLLM loaded no {', '.join(missing)}. The checkpoint is not whole (hf-onebit verify "
                    "PATH), or no weights were asked for (load_format='dummy'), which packed layers do not do"
                )
            if loaded.statistics:
                outputs = loaded.outputs or 0  # told by ``weight``, which is there
                restored = part.entry.from_stored(loaded.statistics, self.in_features, outputs, part.name)
                for name, tensor in restored.items():
                    self._copy(layer, number, name, tensor)
                loaded.statistics.clear()
        for name in self._only_stored():
            if hasattr(layer, name):
                delattr(layer, name)
        for number, matrix in enumerate(self.matrices):
            tensors = self.tensors(layer, number)
            matrix.entry.validate_tensors(tensors, self.inputs_here, matrix.outputs, matrix.name)
        if dense is not None:
            self._unpack(layer, dense)

    def _unpack(self, layer: nn.Module, dtype: torch.dtype) -> None:
        rows = [self._float_weight(self.tensors(layer, number), number, dtype) for number in range(len(self.matrices))]
        for name in {name for matrix in self.matrices for name in matrix.specs}:
            delattr(layer, name)
        layer.register_parameter("weight", nn.Parameter(torch.cat(rows), requires_grad=False))
        self._dense = True

    def _float_weight(self, tensors: dict[str, Tensor], number: int, dtype: torch.dtype) -> Tensor:
        entry = self.matrices[number].entry
        if entry.method == "onebit":
            planes = [
                (tensors[weight], tensors[a], tensors[b])
                for weight, a, b in (onebit.plane_names(plane) for plane in range(entry.planes))
            ]
            return onebit.dequantize(planes, self.inputs_here, dtype)
        weight, scales, zeros = tensors["weight"], tensors["scales"], tensors.get("zeros")
        if entry.in_blocks:
            blocks = entry.row_blocks(self.inputs_here)
            return mbwq.dequantize(weight, scales, zeros, blocks, tensors.get("q_perm"), dtype)
        about = self.inputs_here, entry.bits, entry.group_size, dtype
        return mpq.dequantize(weight, scales, zeros, *about, tensors.get("g_idx"))

    # --- the product ----------------------------------------------------------------------------------------

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """(..., inputs_here) floating point -> (..., outputs here) of the same dtype.

        Args:
            layer: finished.
            x: input.
            bias: one entry for each output of this rank, or None.
        """
        if self._dense:
            return nn.functional.linear(x, layer.weight, bias)  # type: ignore[arg-type]
        biases = [None if bias is None else bias.narrow(0, m.start, m.outputs) for m in self.matrices]
        held = [self.tensors(layer, number) for number in range(len(self.matrices))]
        if self._as_group:
            return torch.cat(self._group(x, held, biases), dim=-1)
        ys = [
            _product(matrix.entry, x, tensors, own, self.inputs_here)
            for matrix, tensors, own in zip(self.matrices, held, biases, strict=True)
        ]
        return ys[0] if len(ys) == 1 else torch.cat(ys, dim=-1)

    def _group(self, x: Tensor, held: list[dict[str, Tensor]], biases: list[Tensor | None]) -> list[Tensor]:
        """Onebit matrices of the same planes, in one call."""
        lists = {name: [tensors[name] for tensors in held] for name in self.matrices[0].specs}
        given = None if biases[0] is None else [bias for bias in biases if bias is not None]
        second = [lists.get(name) for name in onebit.plane_names(1)]
        return ops.onebit_linear_group(x, lists["weight"], lists["a"], lists["b"], given, *second)


def _product(entry: TableEntry, x: Tensor, held: dict[str, Tensor], bias: Tensor | None, in_features: int) -> Tensor:
    if entry.method == "onebit":
        second = [held.get(name) for name in onebit.plane_names(1)]
        return ops.onebit_linear(x, held["weight"], held["a"], held["b"], bias, *second)
    weight, scales, zeros = held["weight"], held["scales"], held.get("zeros")
    if entry.g_idx:
        return ops.mpq_linear_g_idx(x, weight, scales, zeros, bias, held["g_idx"], entry.bits)
    if not entry.in_blocks:
        return ops.mpq_linear(x, weight, scales, zeros, bias, entry.bits, entry.group_size)
    q_perm, blocks = held.get("q_perm"), entry.row_blocks(in_features)
    if len(blocks) == 1:
        ordered = x if q_perm is None else x.index_select(-1, q_perm)
        return ops.mpq_linear(ordered, weight, scales, zeros, bias, blocks[0][0], blocks[0][2])
    return ops.mbwq_linear(x, weight, scales, zeros, bias, q_perm, [number for block in blocks for number in block])

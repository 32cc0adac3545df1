"""Group quantization on the quantized prefix: what ``quantize_on_prefix`` asks of a method, by algorithms/gptq.py."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hf_onebit.algorithms.blockwise import BlockOptions, BlockResult, Example, tune_discrete
from hf_onebit.algorithms.code_linear import CodeLatents, CodeLinear
from hf_onebit.algorithms.curvature import Curvature
from hf_onebit.algorithms.distill import Trained
from hf_onebit.algorithms.gptq import GroupFit, dense, wishes
from hf_onebit.formats.table import TableEntry
from hf_onebit.quantization.group_tensors import dense_fit, dequantize_entry, fit_entry, pack_fit, rounding_of
from hf_onebit.rungs.fitting import Corrections, Fitted, TunedLayers, sample_rows
from hf_onebit.rungs.prefix import PrefixStatistics, QuantizedBlock
from hf_onebit.rungs.tuning import layer_of, tune_forms

# Shares of H's off-diagonal to give up that are tried on held-out data, and the one taken without such data.
SHRINKAGES = (0.03, 0.1, 0.3)
_SHRINKAGE = 0.05
_SAMPLE_ROWS = 96


@dataclass
class GroupMethod:
    """Fits the layers of a walk in groups; ``fitting.LayerMethod``.

    Attributes:
        entries: how each layer is packed.
        rounds: of codes, scales and zeros (``gptq.fit_groups``).
        tunes: keep what tuning a block needs.
        keeps_wishes: return, after each block, where codes would like to be: for codes that learn later on.
    """

    entries: Mapping[str, TableEntry]
    rounds: int = 2
    tunes: bool = True
    keeps_wishes: bool = False
    _fits: dict[str, GroupFit] = field(default_factory=dict)  # of the block at hand
    _wishes: dict[str, Tensor] = field(default_factory=dict)
    _curvatures: dict[int, Curvature] = field(default_factory=dict)  # of the stage at hand
    _corrections: Corrections = field(default_factory=Corrections)

    def begin_stage(self) -> None:
        self._curvatures, self._corrections = {}, Corrections()

    def fit(self, name: str, W: Tensor, statistics: PrefixStatistics | None) -> Fitted:
        entry = self.entries[name]
        strength, target = 0.0, W
        if statistics is None or statistics.hessian is None:  # an expert that no token chose
            curvature = Curvature(torch.zeros(W.shape[1], W.shape[1], device=W.device))
        else:
            curvature = self._curvature(name, W, statistics)
            sample = sample_rows(W, _SAMPLE_ROWS)
            strength, target = self._corrections.of(
                W, sample, statistics, lambda rows: self._quick(rows, curvature, entry, name)
            )
        fit = fit_entry(target, curvature, entry, self.rounds, name)
        moves = entry.blocks is None  # of several widths, codes stay as they were fitted
        if self.tunes and moves:
            self._fits[name] = fit
        if (self.tunes or self.keeps_wishes) and moves:
            self._wishes[name] = wishes(target, fit, curvature, entry.bits, entry.group_size)
        sizes: dict[str, Any] = {"method": "mpq", "bits": entry.bits, "group_size": entry.group_size}
        sizes["bits_per_weight"] = entry.bits_per_weight(W.shape[1], W.shape[0])
        choices = {"shrinkage": fit.shrinkage, "correction": strength}
        if entry.blocks is not None:
            sizes["blocks"] = [list(block) for block in entry.blocks]
        return Fitted(pack_fit(fit, entry), dense_fit(fit, entry), sizes, choices)

    def tune(self, view: QuantizedBlock, options: BlockOptions, dtype: torch.dtype) -> TunedLayers:
        forms: dict[str, CodeLinear] = {}
        trained: dict[str, Trained] = {}
        for name, fit in self._fits.items():
            entry, bias = self.entries[name], layer_of(view, name).bias
            assert bias is None or isinstance(bias, Tensor)
            forms[name] = CodeLinear(fit, entry.bits, entry.group_size, bias, dtype, rounding_of(entry))
            trained |= forms[name].trained(name)
        moving = self._wishes if options.sign_rate else {}
        codes = CodeLatents(forms, {name: wish for name, wish in moving.items() if name in forms}, options.betas)

        def run(everything: dict[str, Trained], examples: list[Example], heldout: list[Example]) -> BlockResult:
            return tune_discrete(everything, codes, examples, heldout, options)

        result, vectors = tune_forms(view, forms, trained, run)
        layers = {}
        for name, form in forms.items():
            entry = self.entries[name]
            fit = GroupFit(form.codes, *form.statistics(), self._fits[name].g_idx)
            layers[name] = pack_fit(fit, entry), dense(fit, entry.bits, entry.group_size)
        return TunedLayers(layers, vectors, result)

    def dense(self, name: str, tensors: dict[str, Tensor], in_features: int) -> Tensor:
        return dequantize_entry(tensors, self.entries[name], in_features)

    def end_block(self) -> dict[str, Tensor]:
        kept = {name: wish.half() for name, wish in self._wishes.items()} if self.keeps_wishes else {}
        self._fits.clear()
        self._wishes.clear()
        return kept

    def _curvature(self, name: str, W: Tensor, statistics: PrefixStatistics) -> Curvature:
        """Of the layers that read one input; its shrinkage is chosen with the first of them that asks."""
        key = id(statistics)
        if key not in self._curvatures:
            assert statistics.hessian is not None
            self._curvatures[key] = self._chosen(name, W, statistics.hessian, statistics.heldout_hessian)
        return self._curvatures[key]

    def _chosen(self, name: str, W: Tensor, H: Tensor, heldout: Tensor | None) -> Curvature:
        if heldout is None:
            return Curvature(H, _SHRINKAGE)
        sample, entry = sample_rows(W, _SAMPLE_ROWS), self.entries[name]
        best: tuple[float, Curvature] | None = None
        for shrinkage in SHRINKAGES:
            curvature = Curvature(H, shrinkage)
            R = sample - self._quick(sample, curvature, entry, name)
            loss = float(((R @ heldout) * R).sum(dtype=torch.float64))
            if best is None or loss < best[0]:
                best = loss, curvature
        assert best is not None
        return best[1]

    def _quick(self, W: Tensor, curvature: Curvature, entry: TableEntry, name: str) -> Tensor:
        return dense_fit(fit_entry(W, curvature, entry, 0, name), entry)

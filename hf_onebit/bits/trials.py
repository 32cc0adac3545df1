"""Plans tried on text: how far the predictions go from the float model's with every layer fitted as a plan says.

The costs of single layers are taken at the float model and added up. Where every layer is coarse neither holds: errors
of one layer meet those of the others, and a plan that saves on few layers can lose more than its sum. So plans that
differ are tried. Each layer is fitted whole, once for each choice that a plan asks for, on the float model's inputs;
the divergence is taken on sequences that no fit saw.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from hf_onebit.algorithms.divergence import kl_from_logits
from hf_onebit.bits.sensitivity import frozen, logits_of
from hf_onebit.calibration import Batch, real_tokens
from hf_onebit.formats.table import TableEntry
from hf_onebit.nn.replace import PackedModule, float_weight, set_packed
from hf_onebit.rungs.walk import walk

Plan = Mapping[str, str]
"""{layer: choice}."""
Pack = Callable[[str, Tensor, "Tensor | None", str], tuple[TableEntry, dict[str, Tensor]]]
"""(layer's name, W, Hessian of its inputs, choice) -> how it is packed, and the packed tensors."""

JUDGED_TOKENS = 2048
_FITTED_TOKENS = 16384
_ROWS = 128  # of logits, in float32 at a time


class PackedChoices:
    """Layers of a float model fitted whole, each with every choice that was asked for.

    It holds them packed, and while they are fitted one block's Hessians.

    Args:
        model: float model, whole in memory; left as it was.
        pack: how a layer is fitted.
        batches: calibration sequences, whose inputs it is fitted on.
        done: called with a layer's name whenever it was fitted.
    """

    def __init__(
        self, model: nn.Module, pack: Pack, batches: Sequence[Batch], done: Callable[[str], None] = lambda name: None
    ) -> None:
        self.model, self.pack, self.batches, self.done = model, pack, batches, done
        self.known: dict[tuple[str, str], PackedModule] = {}

    @torch.no_grad()
    def fit(self, plans: Sequence[Plan]) -> None:
        """Fit what these plans ask for and is not there yet."""
        wanted = {n: [c for c in dict.fromkeys(p[n] for p in plans) if (n, c) not in self.known] for n in plans[0]}
        layers = [name for name, choices in wanted.items() if choices]

        def visit(_block: str, statistics: Mapping[str, Tensor | None]) -> None:
            for name, H in statistics.items():
                W = float_weight(self.model.get_submodule(name)).float()
                for choice in wanted[name]:
                    self.put(name, choice, *self.pack(name, W, H, choice))
                self.done(name)

        if layers:
            with frozen(self.model):
                walk(self.model, layers, self.batches, visit)

    def put(self, name: str, choice: str, entry: TableEntry, tensors: Mapping[str, Tensor]) -> None:
        """Take a layer that was fitted elsewhere."""
        module = self.model.get_submodule(name)
        self.known[name, choice] = set_packed(self.model, name, tensors, entry)
        self.model.set_submodule(name, module)

    def modules(self, plan: Plan) -> dict[str, PackedModule]:
        """The packed layers of a plan, by name."""
        self.fit([plan])
        return {name: self.known[name, choice] for name, choice in plan.items()}

    @torch.no_grad()
    def losses(self, plans: Sequence[Plan], judges: Sequence[Batch]) -> tuple[list[float], int]:
        """What each plan loses with all layers packed together.

        Args:
            plans: of the same layers.
            judges: sequences that nothing was fitted on; those of padding alone are passed over.

        Returns:
            The KL divergence from the float model of each plan, nats per token; and the tokens that it was taken on.

        Raises:
            ValueError: the model gives no logits, or they are not finite; or no judge holds a token.
        """
        judges = [piece for piece in judges if real_tokens(piece)]
        if not judges:
            raise ValueError("The sequences that plans are to be tried on hold padding alone: pass a longer text")
        self.fit(plans)
        originals = {name: self.model.get_submodule(name) for name in plans[0]}
        found = []
        with frozen(self.model):
            references = [logits_of(self.model, piece) for piece in judges]
            try:
                for plan in plans:
                    for name, module in self.modules(plan).items():
                        self.model.set_submodule(name, module)
                    found.append(_divergence(self.model, judges, references))
            finally:
                for name, original in originals.items():
                    self.model.set_submodule(name, original)
        return found, sum(map(len, references))


def split(batches: Sequence[Batch], tokens: int = JUDGED_TOKENS) -> tuple[list[Batch], list[Batch]]:
    """Sequences to fit on, and those to judge on: about ``tokens``, the last, at most a quarter of all; cut to fit.

    Padding counts nowhere: judges are cut around it, and sequences of padding alone are left out.
    """
    rest = [batch for batch in batches if real_tokens(batch)]
    wanted = min(tokens, sum(map(real_tokens, rest)) // 4) if len(rest) > 1 else tokens
    judges: list[Batch] = []
    while len(rest) > 1 and wanted > 0:
        judges.append(_opening(rest.pop(), wanted))
        wanted -= real_tokens(judges[-1])
    judges = judges or [_opening(rest[0], tokens)]
    fitted: list[Batch] = []
    for batch in rest:
        if fitted and sum(map(real_tokens, fitted)) + real_tokens(batch) > _FITTED_TOKENS:
            break
        fitted.append(batch)
    return fitted, judges


def _opening(batch: Batch, tokens: int) -> Batch:
    """The first ``tokens`` of a sequence, without the padding in front of them."""
    mask = batch.get("attention_mask")
    if mask is None:
        return {key: value[:, :tokens] for key, value in batch.items()}
    places = mask.bool().any(0).nonzero()[:tokens, 0].tolist()
    return {key: value[:, places[0] : places[-1] + 1] for key, value in batch.items()}


def _divergence(model: nn.Module, judges: Sequence[Batch], references: Sequence[Tensor]) -> float:
    total = 0.0
    for piece, wanted in zip(judges, references, strict=True):
        logits = logits_of(model, piece)
        for start in range(0, len(logits), _ROWS):
            rows = slice(start, start + _ROWS)
            total += float(kl_from_logits(wanted[rows], logits[rows])[0].sum(dtype=torch.float64))
    return total / sum(map(len, references))

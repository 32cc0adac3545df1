"""``DiodeMix``: one optimizer for packed weights, packed signs, scales and float parameters.

Each parameter gets the step that suits it. Packed weights (``MPQWeightParameter``) take their own ``update``, so
nothing of their size is kept in floating point; floating parameters take Adam with decoupled weight decay, the same
rule without the rounding. Moments are stored as ``states`` says.

The name and the defaults of the betas and ε are those of bitorch-engine's optimizer for the same kinds of weights.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from hf_onebit.algorithms.moments import BlockwiseMoment, FactoredMoment
from hf_onebit.argument_checks import shown
from hf_onebit.nn.data_parallel import reducer_of
from hf_onebit.nn.parameter import MPQWeightParameter
from hf_onebit.nn.parameter_checks import check_gradient, largest_magnitude
from hf_onebit.nn.scales import is_rounded_in_files
from hf_onebit.nn.update_step import Rounding, Step, Tally
from hf_onebit.training.float_step import step_large, step_small
from hf_onebit.training.metrics import summary
from hf_onebit.training.options import (
    check_group,
    check_options,
    check_parameters,
    check_rates,
    check_state_dict,
    split_groups,
)
from hf_onebit.training.projector import LowRankProjector

__all__ = ["DiodeMix", "diode_mix"]

# Floating parameters with fewer numbers keep float32 moments: there is nothing to save.
_SMALL = 4096
_FIRST, _SECOND = "exp_avg_l", "exp_avg_s"
_EXACT = "exact"


class DiodeMix(torch.optim.Optimizer):
    """Trains packed weights in place, and everything else beside them.

    Args:
        params: parameters, named parameters or groups, as for any optimizer. Every option below may also be in a group,
            but for ``lr_packed``, ``lr_signs``, ``lr_scales`` and ``fused``.
        lr: learning rate, of everything that has none of its own below.
        betas: decay of the first and of the second moment; of signs, of the votes and of the inertia.
        eps: added to the root of the second moment; of signs, see ``MPQWeightParameter.update``.
        weight_decay: decoupled.
        correct_bias: whether the moments' start at zero is corrected for.
        dtype: of the arithmetic on packed weights, where it is wider than float32.
        lr_packed, lr_signs, lr_scales: learning rates of packed weights, of packed signs, and of the scales and zeros
            of the packed weights among ``params``. Where one is given, groups are split by these kinds; a group that is
            added later says its own ``lr``.
        states: how moments are stored: "8bit", both in blocks of eight bits; "factored", the second as means of rows
            and columns and the first in eight bits; or "float32". Small float parameters always have float32.
        rank: of the subspace that gradients of packed weights are projected to; None: no projection.
        update_proj_gap: steps between two subspaces.
        scale: factor of what comes back from the subspace, at least 0.
        rounding: of all packed weights: "stochastic", "nearest" or "inertia"; None: as each of them says itself.
        seed: of all random words; None: of a packed weight, its own ``seed``, else 0. Each parameter has a stream of
            its own, counted in the order of ``params`` unless its ``stream`` was set.
        metrics: whether steps are counted for :meth:`metrics`.
        fused: step each parameter within backward, as soon as its gradient is whole, and drop that gradient: see
            :meth:`fuse`.

    Raises:
        TypeError: ``params`` are neither parameters nor groups.
        ValueError: an option of another type or out of range, or parameters that cannot be trained: integers that are
            no ``MPQWeightParameter``, or, with rounding "inertia", codes of more than one bit.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.99, 0.9999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        correct_bias: bool = True,
        dtype: torch.dtype = torch.float32,
        *,
        lr_packed: float | None = None,
        lr_signs: float | None = None,
        lr_scales: float | None = None,
        states: str = "8bit",
        rank: int | None = None,
        update_proj_gap: int = 200,
        scale: float = 1.0,
        rounding: str | None = None,
        seed: int | None = None,
        metrics: bool = True,
        fused: bool = False,
    ) -> None:
        options = {
            "lr": lr,
            "betas": tuple(betas) if isinstance(betas, list) else betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "correct_bias": correct_bias,
            "dtype": dtype,
            "states": states,
            "rank": rank,
            "update_proj_gap": update_proj_gap,
            "scale": scale,
            "rounding": rounding,
            "seed": seed,
            "metrics": metrics,
        }
        check_options(options)
        rates = check_rates({"packed": lr_packed, "signs": lr_signs, "scales": lr_scales})
        if not isinstance(fused, bool):
            raise ValueError(f"DiodeMix got fused={shown(fused)}, expected True or False")
        self._no_steps()
        super().__init__(split_groups(params, rates), options)
        if fused:
            self.fuse()

    def _no_steps(self) -> None:
        self._tallies: dict[int, Tally] = {}  # of the last step
        self._handles: list[RemovableHandle] = []
        self._places: dict[int, tuple[int, int]] = {}  # of parameters that are stepped in backward: group, number
        self._passed = False  # whether any of them was since the last step()

    def __setstate__(self, state: dict[str, Any]) -> None:
        if "_tallies" not in vars(self):  # a copy: nothing steps its parameters in backward
            self._no_steps()
        super().__setstate__(state)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as for any optimizer; its packed weights get the group's seed, rounding and streams.

        Raises:
            TypeError: it is no group.
            ValueError: an option out of range, or parameters that it cannot train; nothing was added then.
        """
        what = f"DiodeMix's param group {len(self.param_groups)}"
        check_group(param_group, what)
        check_options({**self.defaults, **param_group}, what)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            check_parameters(group, what)
        except ValueError:
            self.param_groups.pop()
            raise
        number = sum(len(other["params"]) for other in self.param_groups[:-1])
        for offset, p in enumerate(group["params"]):
            if _is_packed(p):
                if group["seed"] is not None:
                    p.seed = group["seed"]
                if group["rounding"] is not None:
                    p.rounding = group["rounding"]
                if "stream" not in vars(p):
                    p.stream = number + offset

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step on every parameter that has a gradient.

        Args:
            closure: computes the loss again, as for any optimizer.

        Raises:
            ValueError: a gradient that is not finite, of a packed weight; or an option that has been set to a value out
                of range, such as a learning rate by a schedule: no parameter has moved then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for number, group in enumerate(self.param_groups):
            check_options(group, f"DiodeMix's param group {number}")
        if not self._passed:
            self._tallies.clear()
        self._passed = False
        for _, group, parameters in self._numbered():
            self._step([(p, number) for p, number in parameters if p.grad is not None], group)
        return loss

    def metrics(self) -> dict[str, float]:
        """What the last step did to the packed weights that had a gradient; see ``training.metrics.summary``.

        Empty where none had. What a fused one has stepped in backward counts for the :meth:`step` after it; in a loop
        that never calls that, figures are of the last step of each weight.
        """
        return summary(self._tallies.values())

    def fuse(self) -> list[RemovableHandle]:
        """From now on, step each parameter within backward and drop its gradient then.

        So the gradients of two layers are never there at once, and :meth:`step` has nothing left to do. Each backward
        pass is a step: there is no accumulation over several, no clipping by the norm of all, and no loss scaling. A
        weight that several layers share is stepped once all of them are through; with reentrant checkpointing they
        must be in one checkpointed part. Groups that are added later are stepped by :meth:`step`, until this is called
        again; so is all of a copy.

        Returns:
            Handles; removing them all, or :meth:`unfuse`, ends it.
        """
        self.unfuse()
        for index, _, parameters in self._numbered():
            for p, number in parameters:
                if p.requires_grad:
                    self._places[id(p)] = index, number
                    self._handles.append(p.register_post_accumulate_grad_hook(self._step_in_backward))
        return self._handles

    def unfuse(self) -> None:
        """End :meth:`fuse`."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._places, self._passed = [], {}, False

    def state_dict(self) -> dict[str, Any]:
        """As of any optimizer, and scales that learn in float32 with their values: model files hold them in float16,
        and a run that goes on from those would be another.
        """
        result = super().state_dict()
        states = result["state"]
        parameters = [p for group in self.param_groups for p in group["params"]]
        for number, p in enumerate(parameters):
            if number in states and is_rounded_in_files(p):
                states[number] = {**states[number], _EXACT: p.detach().clone()}
        return result

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up another run's state, bit for bit; the base class would cast moments to their parameter's dtype.

        Scales that learn in float32 take the values that the state has of them.

        Raises:
            ValueError: it is no state of a ``DiodeMix`` with as many parameters, or an option of it is out of range;
                nothing was changed then.
        """
        check_state_dict(state_dict)
        super().load_state_dict(state_dict)
        saved = [number for group in state_dict["param_groups"] for number in group["params"]]
        own = [p for group in self.param_groups for p in group["params"]]
        for number, p in zip(saved, own, strict=True):
            found = state_dict["state"].get(number)
            if found is None:
                continue
            copied = {
                key: value.to("cpu" if key == "step" else p.device, copy=True) if isinstance(value, Tensor) else value
                for key, value in found.items()
            }
            exact = copied.pop(_EXACT, None)
            if exact is not None and is_rounded_in_files(p):
                p.copy_(exact)
            self.state[p] = copied
            if _is_packed(p):
                p.seed, p.stream = copied["seed"], copied["stream"]

    # -- one step ---------------------------------------------------------------------------------------------------

    def _numbered(self) -> Iterator[tuple[int, dict[str, Any], list[tuple[Any, int]]]]:
        """(index, group, its parameters, each with its number among all)."""
        first = 0
        for index, group in enumerate(self.param_groups):
            yield index, group, [(p, first + i) for i, p in enumerate(group["params"])]
            first += len(group["params"])

    @torch.no_grad()
    def _step_in_backward(self, p: Any) -> None:
        if p.grad is None:
            return
        if _is_packed(p) and reducer_of(p) is not None:
            raise ValueError(
                "fused=True steps before ranks have averaged their gradients, so their models would drift apart: use "
                "fused=False with DistributedDataParallel"
            )
        index, number = self._places[id(p)]
        group = self.param_groups[index]  # looked up each time: loading a state makes new groups
        check_options(group, "DiodeMix's param group")
        if not self._passed:
            self._tallies.clear()
        self._passed = True
        self._step([(p, number)], group)
        p.grad = None

    def _step(self, parameters: list[tuple[Any, int]], group: dict[str, Any]) -> None:
        small = []
        for p, number in parameters:
            if _is_packed(p):
                self._step_packed(p, group)
            elif p.grad.is_sparse:
                raise ValueError("DiodeMix got a sparse gradient; make the embedding with sparse=False")
            elif p.dim() != 2 or p.numel() < _SMALL or group["states"] == "float32":
                small.append((p, number))
            else:
                step = self._float_step(p, group, number, large=True)
                step_large(p, p.grad, step)
                self.state[p]["step"].add_(1)
        for dtype, device in {(p.dtype, p.device): None for p, _ in small}:
            alike = [(p, number) for p, number in small if (p.dtype, p.device) == (dtype, device)]
            steps = [self._float_step(p, group, number, large=False) for p, number in alike]
            batch = [p for p, _ in alike]
            pairs = [(self.state[p][_FIRST], self.state[p][_SECOND]) for p in batch]
            step_small(batch, [p.grad for p in batch], pairs, steps)
            for p in batch:
                self.state[p]["step"].add_(1)

    def _float_step(self, p: Tensor, group: dict[str, Any], stream: int, large: bool) -> Step:
        state = self.state[p]
        if not state:
            state["step"] = torch.tensor(0)
            if large:
                _new_moments(state, (p.shape[0], p.shape[1]), group["states"], p.device)
            else:
                state[_FIRST], state[_SECOND] = (torch.zeros_like(p, dtype=torch.float32) for _ in range(2))
        return _step_of(state, group, Rounding(seed=group["seed"] or 0, stream=stream))

    def _step_packed(self, p: MPQWeightParameter, group: dict[str, Any]) -> None:
        grad = p.grad
        assert grad is not None
        check_gradient(grad, p)  # before there is a state
        state = self.state[p]
        flips = p.rounding == "inertia"
        projector = None
        if not state:
            state.update(step=torch.tensor(0), seed=p.seed, stream=p.stream)
        if group["rank"] is not None and group["rank"] < min(grad.shape):
            about = (group["rank"], group["update_proj_gap"], group["scale"], p.seed, p.stream)
            projector = LowRankProjector(state, *about)
        whole = (grad.shape[0], grad.shape[1])
        if projector is not None:
            largest_magnitude(grad)  # no basis can be made of what is not finite
            grad = projector.project(grad, int(state["step"]) + 1)
        if int(state["step"]) == 0:
            shape = (grad.shape[0], grad.shape[1])
            _new_moments(state, shape, group["states"], p.device, whole if flips else None)
            if flips:
                p.start_inertia(_moment(state, _SECOND))
        tally = Tally() if group["metrics"] else None
        p.take_step(grad, _step_of(state, group, Rounding(), projector), tally)
        if tally is not None:
            self._tallies[id(p)] = tally


def diode_mix(**options: Any) -> tuple[type[DiodeMix], dict[str, Any]]:
    """What ``Trainer(optimizer_cls_and_kwargs=...)`` takes.

    Args:
        **options: of :class:`DiodeMix`. Weight decay is that of ``TrainingArguments``: the Trainer hands over groups
            that say theirs.

    Returns:
        (class, options).

    Raises:
        TypeError: there is no such option.
        ValueError: an option of another type or out of range.
    """
    DiodeMix([torch.nn.Parameter(torch.zeros(1))], **options)  # errors here, not in the Trainer
    return DiodeMix, options


def _is_packed(p: Any) -> bool:
    return isinstance(p, MPQWeightParameter) and p.is_packed


def _step_of(state: dict[str, Any], group: dict[str, Any], rounding: Rounding, projector: Any = None) -> Step:
    beta1, beta2 = group["betas"]
    return Step(
        _moment(state, _SECOND),
        _moment(state, _FIRST),
        state["step"],
        float(group["lr"]),
        float(group["weight_decay"]),
        float(beta1),
        float(beta2),
        float(group["eps"]),
        group["dtype"],
        group["correct_bias"],
        projector,
        rounding=rounding,
    )


def _new_moments(
    state: dict[str, Any],
    shape: tuple[int, int],
    states: str,
    device: torch.device,
    inertia: tuple[int, int] | None = None,
) -> None:
    """Zero moments, as tensors that a state dict can hold; of flips, the second is signed and of its own shape."""
    zeros = functools.partial(BlockwiseMoment.zeros, device=device)
    if states == "float32":
        state[_FIRST] = torch.zeros(shape, device=device)
        state[_SECOND] = torch.zeros(inertia or shape, device=device)
        return
    _keep(state, _FIRST, zeros(shape, signed=True, lane=0))
    if inertia is not None:
        _keep(state, _SECOND, zeros(inertia, signed=True, lane=1))
    elif states == "factored":
        _keep(state, _SECOND, FactoredMoment.zeros(shape, device))
    else:
        _keep(state, _SECOND, zeros(shape, signed=False, lane=1))


def _keep(state: dict[str, Any], name: str, moment: BlockwiseMoment | FactoredMoment) -> None:
    if isinstance(moment, FactoredMoment):
        state[f"{name}_row"], state[f"{name}_col"] = moment.row, moment.col
    else:
        state[name], state[f"{name}_peaks"] = moment.codes, moment.peaks


def _moment(state: dict[str, Any], name: str) -> Any:
    """The moment that :func:`_keep` took apart, or the plain tensor."""
    if f"{name}_row" in state:
        return FactoredMoment(state[f"{name}_row"], state[f"{name}_col"])
    if f"{name}_peaks" in state:
        return BlockwiseMoment(state[name], state[f"{name}_peaks"], lane=0 if name == _FIRST else 1)
    return state[name]

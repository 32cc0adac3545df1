"""Distilling a packed model: its training form, and the way back."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from hf_onebit.algorithms.code_linear import CodeLatents, CodeLinear, code_layers
from hf_onebit.algorithms.distill import Distillation, DistillOptions, Trained
from hf_onebit.algorithms.gptq import GroupFit
from hf_onebit.algorithms.latents import JointLatents
from hf_onebit.algorithms.pair_latents import sign_latents
from hf_onebit.algorithms.sign_linear import SignLinear, sign_planes
from hf_onebit.casting import cast
from hf_onebit.formats.onebit import pack_signs, plane_names, unpack_signs
from hf_onebit.formats.table import TableEntry
from hf_onebit.head_split import Batch, pair
from hf_onebit.nn.linear import OneBitLinear
from hf_onebit.nn.mbwq import MBWQLinear
from hf_onebit.nn.mpq import MPQLinear
from hf_onebit.nn.replace import entry_of, packed_layers
from hf_onebit.quantization.group_tensors import pack_fit, rounding_of, unpack_fit


@dataclass
class TrainingForm:
    """A copy of a packed model that trains, and where its parameters belong.

    Attributes:
        student: the copy: dense signs and codes (1 byte a weight), folded matrices and everything else in ``dtype``
            (see ``casting.cast``).
        trained: what may learn, by the names of the packed model's parameters.
        model: the packed model itself; unchanged until :meth:`write_back`.
        entries: how the group-quantized layers are packed.
    """

    model: nn.Module
    student: nn.Module
    trained: dict[str, Trained]
    entries: dict[str, TableEntry] = field(default_factory=dict)

    def fold(self) -> None:
        """Bring the student's matrices up to date with its scales, signs and codes."""
        for plane in sign_planes(self.student).values():
            plane.fold()
        for layer in code_layers(self.student).values():
            layer.fold()

    @torch.no_grad()
    def write_back(self, stored: dict[str, Tensor]) -> None:
        """Copy values, by name, and the student's signs, codes and their statistics into the packed model."""
        parameters = dict(self.model.named_parameters())
        for name, tensor in stored.items():
            if name in parameters:  # statistics of codes are the student's own
                parameters[name].copy_(tensor)
        for name, layer in _onebit_layers(self.model).items():
            for plane, form in enumerate(self.student.get_submodule(name).planes):  # type: ignore[arg-type]
                getattr(layer, plane_names(plane)[0]).copy_(pack_signs(form.signs))
        for name, form in code_layers(self.student).items():
            packed = pack_fit(GroupFit(form.codes, *form.statistics(), form.g_idx), self.entries[name])
            for short, tensor in packed.items():
                self.model.get_parameter(f"{name}.{short}").copy_(tensor)


def training_form(
    model: nn.Module,
    *,
    norms: bool = True,
    multiplicative: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    entries: Mapping[str, TableEntry] | None = None,
) -> TrainingForm:
    """A copy of a packed model whose scales, biases and (with ``norms``) other vectors learn.

    Layers with codes of several widths stay as they are.

    Args:
        model: a model with packed layers.
        norms: also train every vector outside of the packed layers: gains and biases of norms, biases of float layers.
        multiplicative: train the logarithms of the scales of signs.
        dtype: of the student's products and of all that is neither packed nor trained.
        entries: how group-quantized layers are packed, which says what the file does to their statistics; a layer that
            is missing here is stored as its module has it.

    Raises:
        ValueError: the model has no packed layer that learns.
    """
    signs, codes = _onebit_layers(model), _group_layers(model, entries or {})
    if not signs and not codes:
        raise ValueError(f"{type(model).__name__} has no packed layer to distill; quantize it first")
    student = copy.deepcopy(model)
    student.requires_grad_(False)
    trained: dict[str, Trained] = {}
    for name, layer in signs.items():
        planes = [
            (unpack_signs(weight, layer.in_features, torch.int8).t(), a, b) for weight, a, b in layer.plane_tensors()
        ]
        form = SignLinear(planes, layer.bias, dtype)
        student.set_submodule(name, form)
        for plane, trainable in enumerate(form.planes):
            _, a_name, b_name = plane_names(plane)
            for short, parameter in ((a_name, trainable.a), (b_name, trainable.b)):
                trained[f"{name}.{short}"] = Trained(parameter, torch.float16, multiplicative)  # type: ignore[arg-type]
        if form.bias is not None and layer.bias is not None:
            trained[f"{name}.bias"] = Trained(form.bias, layer.bias.dtype)
    for name, (fit, entry) in codes.items():
        bias = model.get_submodule(name).bias
        assert bias is None or isinstance(bias, Tensor)
        coded = CodeLinear(fit, entry.bits, entry.group_size, bias, dtype, rounding_of(entry))
        student.set_submodule(name, coded)
        trained |= coded.trained(name)
        if coded.bias is not None and bias is not None:
            trained[f"{name}.bias"] = Trained(coded.bias, bias.dtype)
    cast(student, dtype)
    if norms:
        inside = tuple(f"{name}." for name in (*signs, *codes))
        originals = dict(model.named_parameters())
        for name, parameter in student.named_parameters():
            if parameter.dim() == 1 and parameter.is_floating_point() and not name.startswith(inside):
                exact = originals[name].detach()
                trained[name] = Trained(parameter.requires_grad_(True), exact.dtype, start=exact)
    return TrainingForm(model, student, trained, {name: entry for name, (_, entry) in codes.items()})


def _onebit_layers(model: nn.Module) -> dict[str, OneBitLinear]:
    """Packed heads and embeddings stay as they are."""
    return {name: layer for name, layer in packed_layers(model).items() if isinstance(layer, OneBitLinear)}


def _group_layers(model: nn.Module, entries: Mapping[str, TableEntry]) -> dict[str, tuple[GroupFit, TableEntry]]:
    head = getattr(model, "get_output_embeddings", lambda: None)()
    found = {}
    for name, layer in packed_layers(model).items():
        if layer is head or not isinstance(layer, MPQLinear | MBWQLinear):
            continue
        entry = entries.get(name) or entry_of(layer)
        tensors = {short: getattr(layer, short).detach() for short in entry.tensor_names}
        fit = unpack_fit(tensors, entry, layer.in_features)
        if fit is not None:
            found[name] = fit, entry
    return found


def _latents(student: nn.Module, margins: Mapping[str, Tensor], betas: tuple[float, float]) -> JointLatents:
    """Of all signs, at ±1 where nothing is known of them, and of the codes that something is known of."""
    planes, layers = sign_planes(student), code_layers(student)
    return JointLatents(
        [
            sign_latents(planes, {name: value for name, value in margins.items() if name not in layers}, betas),
            CodeLatents(layers, {name: value for name, value in margins.items() if name in layers}, betas),
        ]
    )


def joined(group: Sequence[Batch]) -> Batch:
    """Batches as one of several rows; shorter ones are padded and masked."""
    longest = max(batch["input_ids"].shape[1] for batch in group)
    ids, masks = [], []
    for batch in group:
        row = batch["input_ids"]
        mask = batch.get("attention_mask", torch.ones_like(row))
        missing = (0, longest - row.shape[1])
        ids.append(nn.functional.pad(row, missing))
        masks.append(nn.functional.pad(mask, missing))
    whole = {"input_ids": torch.cat(ids)}
    mask = torch.cat(masks)
    return whole if bool(mask.all()) else whole | {"attention_mask": mask}


def distill_model(
    model: nn.Module,
    teacher: nn.Module,
    batches: Sequence[Batch],
    heldout: Sequence[Batch],
    options: DistillOptions,
    *,
    norms: bool = True,
    multiplicative: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    margins: Mapping[str, Tensor] | None = None,
    entries: Mapping[str, TableEntry] | None = None,
) -> tuple[Distillation, TrainingForm]:
    """Make ready to distill a packed model from its float teacher: ``run`` the first, ``write_back`` its ``stored()``.

    Args:
        model: the packed model; unchanged until the second is told to write back.
        teacher: the float model; where it is in another dtype than ``dtype``, or training, a copy of it answers.
        batches, heldout: inputs of both, ``input_ids`` (rows, length) and whatever else; padding is left out where an
            ``attention_mask`` says so.
        options: how.
        norms, multiplicative, dtype, entries: see :func:`training_form`.
        margins: signs and codes learn too: how far each sign is from flipping, (out, in) by the names of
            ``sign_planes``, planes that are missing here start at ±1; and where each code would like to be, (out, in)
            by the names of layers, codes that are missing here stay. None leaves all as they are.

    Raises:
        ValueError: nothing to train, no batches, or models of different vocabularies.
    """
    if not batches or not heldout:
        raise ValueError(f"distill_model: got {len(batches)} batches and {len(heldout)} held-out ones, expected some")
    form = training_form(model, norms=norms, multiplicative=multiplicative, dtype=dtype, entries=entries)
    same = not teacher.training and all(p.dtype == dtype for p in teacher.parameters() if p.is_floating_point())
    judge = teacher if same else cast(copy.deepcopy(teacher), dtype)
    probe = {name: tensor[:1, :8] for name, tensor in heldout[0].items()}
    latents = None if margins is None else _latents(form.student, margins, options.betas)
    both = pair(form.student, judge, probe)
    run = Distillation(both, form.trained, batches, heldout, options, form.fold, latents)
    return run, form

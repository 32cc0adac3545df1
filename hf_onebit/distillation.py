"""Distilling a packed model: its training form, the split of a model at its head, and the way back."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from hf_onebit.algorithms.distill import Distillation, DistillOptions, Features, Pair, Trained
from hf_onebit.algorithms.latents import SignLatents
from hf_onebit.algorithms.sign_linear import SignLinear, sign_planes
from hf_onebit.formats.onebit import pack_signs, plane_names, unpack_signs
from hf_onebit.nn.linear import OneBitLinear
from hf_onebit.nn.replace import packed_layers

Batch = dict[str, Tensor]


@dataclass
class TrainingForm:
    """A copy of a packed model that trains, and where its parameters belong.

    Attributes:
        student: the copy: dense signs (1 byte a weight), folded matrices and everything else in ``dtype``.
        trained: what may learn, by the names of the packed model's parameters.
        model: the packed model itself; unchanged until :meth:`write_back`.
    """

    model: nn.Module
    student: nn.Module
    trained: dict[str, Trained]

    def fold(self) -> None:
        """Bring the student's matrices up to date with its scales and signs."""
        for plane in sign_planes(self.student).values():
            plane.fold()

    @torch.no_grad()
    def write_back(self, stored: dict[str, Tensor]) -> None:
        """Copy values, by name, and the student's signs into the packed model."""
        parameters = dict(self.model.named_parameters())
        for name, tensor in stored.items():
            parameters[name].copy_(tensor)
        for name, layer in _onebit_layers(self.model).items():
            for plane, form in enumerate(self.student.get_submodule(name).planes):  # type: ignore[arg-type]
                getattr(layer, plane_names(plane)[0]).copy_(pack_signs(form.signs))


def training_form(
    model: nn.Module,
    *,
    norms: bool = True,
    multiplicative: bool = False,
    dtype: torch.dtype = torch.bfloat16,
) -> TrainingForm:
    """A copy of a packed model whose scales, biases and (with ``norms``) other vectors learn.

    Args:
        model: a model with packed layers.
        norms: also train every vector outside of the packed layers: gains and biases of norms, biases of float layers.
        multiplicative: train the scales' logarithms.
        dtype: of the student's products and of all that is neither packed nor trained.

    Raises:
        ValueError: the model has no packed layer.
    """
    layers = _onebit_layers(model)
    if not layers:
        raise ValueError(f"{type(model).__name__} has no packed layer to distill; quantize it first")
    student = copy.deepcopy(model)
    student.requires_grad_(False)
    trained: dict[str, Trained] = {}
    for name, layer in layers.items():
        planes = [
            (unpack_signs(weight, layer.in_features, torch.int8).t(), a, b) for weight, a, b in layer.plane_tensors()
        ]
        form = SignLinear(planes, layer.bias, dtype)
        parent, _, child = name.rpartition(".")
        setattr(student.get_submodule(parent), child, form)
        for plane, trainable in enumerate(form.planes):
            _, a_name, b_name = plane_names(plane)
            for short, parameter in ((a_name, trainable.a), (b_name, trainable.b)):
                trained[f"{name}.{short}"] = Trained(parameter, torch.float16, multiplicative)  # type: ignore[arg-type]
        if form.bias is not None and layer.bias is not None:
            trained[f"{name}.bias"] = Trained(form.bias, layer.bias.dtype)
    student.to(dtype)
    if norms:
        inside = tuple(f"{name}." for name in layers)
        originals = dict(model.named_parameters())
        for name, parameter in student.named_parameters():
            if parameter.dim() == 1 and not name.startswith(inside):
                trained[name] = Trained(parameter.requires_grad_(True), originals[name].dtype)
    return TrainingForm(model, student.eval(), trained)


def _onebit_layers(model: nn.Module) -> dict[str, OneBitLinear]:
    """Packed heads and embeddings stay as they are."""
    return {name: layer for name, layer in packed_layers(model).items() if isinstance(layer, OneBitLinear)}


def pair(student: Any, teacher: Any, probe: Batch) -> Pair:
    """Split both models in front of their heads, where that is exact.

    A model whose logits are more than a product with its output embedding (capped, scaled, biased) gives its logits
    instead, which takes more memory.

    Args:
        student, teacher: causal language models of Transformers with one vocabulary.
        probe: a batch to compare on.
    """
    student_features, student_head = _split(student, probe)
    teacher_features, teacher_head = _split(teacher, probe)
    return Pair(student_features, teacher_features, student_head, teacher_head)


def stack(batches: Sequence[Batch], size: int) -> list[Batch]:
    """Join neighbours, ``size`` at a time, into batches of several rows; shorter ones are padded and masked."""
    return [_joined(batches[start : start + size]) for start in range(0, len(batches), size)]


def _joined(group: Sequence[Batch]) -> Batch:
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
) -> tuple[Distillation, TrainingForm]:
    """Make ready to distill a packed model from its float teacher: ``run`` the first, ``write_back`` its ``stored()``.

    Args:
        model: the packed model; unchanged until the second is told to write back.
        teacher: the float model; where it is in another dtype than ``dtype``, or training, a copy of it answers.
        batches, heldout: inputs of both, ``input_ids`` (rows, length) and whatever else; padding is left out where an
            ``attention_mask`` says so.
        options: how.
        norms, multiplicative, dtype: see :func:`training_form`.
        margins: signs learn too: how far each is from flipping, (out, in) by the names of ``sign_planes``; planes that
            are missing here start at ±1. None leaves all signs as they are.

    Raises:
        ValueError: nothing to train, no batches, or models of different vocabularies.
    """
    if not batches or not heldout:
        raise ValueError(f"distill_model: got {len(batches)} batches and {len(heldout)} held-out ones, expected some")
    form = training_form(model, norms=norms, multiplicative=multiplicative, dtype=dtype)
    same = not teacher.training and all(p.dtype == dtype for p in teacher.parameters() if p.is_floating_point())
    judge = teacher if same else copy.deepcopy(teacher).to(dtype).eval()
    probe = {name: tensor[:1, :8] for name, tensor in heldout[0].items()}
    latents = None if margins is None else SignLatents(sign_planes(form.student), margins, options.betas)
    both = pair(form.student, judge, probe)
    run = Distillation(both, form.trained, batches, heldout, options, form.fold, latents)
    return run, form


def _split(model: Any, probe: Batch) -> tuple[Features, Tensor | None]:
    head: Any = model.get_output_embeddings()
    base = model.base_model
    is_plain = isinstance(head, nn.Linear) and getattr(head, "bias", None) is None
    if is_plain and head.weight.is_floating_point() and base is not model:
        features = _rows(base, lambda batch: base(**batch, use_cache=False).last_hidden_state)
        with torch.no_grad():
            expected = model(**_beside(base, probe), use_cache=False).logits.flatten(0, 1)
            got = features(probe)
            if got.shape[1] == head.weight.shape[1]:
                logits = nn.functional.linear(got, head.weight)
                # Both were rounded to the models' dtype; anything else would differ far more.
                if logits.shape == expected.shape and torch.allclose(logits, expected, rtol=2e-2, atol=2e-2):
                    return features, head.weight.detach()
    return _rows(model, lambda batch: model(**batch, use_cache=False).logits), None


def _rows(model: Any, forward: Callable[[Batch], Tensor]) -> Features:
    def rows(batch: Batch) -> Tensor:
        output = forward(_beside(model, batch)).flatten(0, 1)
        mask = batch.get("attention_mask")
        if mask is None or bool(mask.all()):
            return output
        return output[mask.flatten().bool().to(output.device)]

    return rows


def _beside(model: Any, batch: Batch) -> Batch:
    """The batch on the model's device; batches are kept on the CPU."""
    device = model.get_input_embeddings().weight.device
    return {name: tensor.to(device) for name, tensor in batch.items()}

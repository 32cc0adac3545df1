"""Tiny packed students ready to be distilled, and how to tell their tensors apart."""

import copy

import torch
from tiny import tiny_ids, tiny_llama

from hf_onebit.algorithms.distill import DistillOptions
from hf_onebit.distillation import distill_model
from hf_onebit.quantize import OneBitQuantizer


def packed(model, **options):
    return OneBitQuantizer(preset="closed", **options).quantize_model(copy.deepcopy(model))


def sequences(count, seed=0, length=16):
    return [{"input_ids": tiny_ids(2, length, seed=seed + i)} for i in range(count)]


def make_run(steps=6, model=None, student=None, **options):
    teacher = model or tiny_llama(bias=True)
    options = {"learning_rate": 0.02, "warmup": 2, "evaluate_every": 3, **options}
    student = student or packed(teacher)
    run, form = distill_model(
        student, teacher, sequences(3), sequences(2, 50), DistillOptions(steps=steps, **options), dtype=torch.float32
    )
    return run, form


def bits(tensors):
    return {name: tensor.contiguous().view(torch.uint8).clone() for name, tensor in tensors.items()}


def same_bits(one, other):
    assert one.keys() == other.keys()
    return all(torch.equal(one[name], other[name]) for name in one)

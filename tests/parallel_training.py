"""What the ranks of a data parallel test and the one process that they are compared with both run."""

import contextlib

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from hf_onebit import diode_mix
from hf_onebit.nn import MPQLinear, MPQWeightParameter, OneBitLinear, ignore_in_ddp

RANKS, MICRO, STEPS = 2, 2, 3


class Parts(nn.Module):
    """Float and packed layers, and one that not every input comes to."""

    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.stem, self.head = nn.Linear(32, 64), nn.Linear(64, 8)
        self.codes, self.signs = MPQLinear(64, 64, False, symmetric=False), OneBitLinear(64, 64, False)
        self.expert, self.unused = MPQLinear(64, 64, False), MPQLinear(64, 64, False)
        for layer in (self.codes, self.signs, self.expert, self.unused):
            layer.weight.requires_grad_(True)
        to_nearest(self)
        ignore_in_ddp(self)

    def forward(self, x, with_expert, reentrant=False):
        hidden = self.codes(self.stem(x))
        hidden = hidden + (checkpoint(self.signs, hidden, use_reentrant=True) if reentrant else self.signs(hidden))
        if with_expert:
            hidden = hidden + self.expert(hidden)
        return self.head(hidden.tanh()).square().mean()


def words(model):
    return {name: p.data.clone() for name, p in model.named_parameters() if isinstance(p, MPQWeightParameter)}


def train(model, ranks, optimizer, reentrant=False, no_sync=contextlib.nullcontext):
    """Steps of two micro batches each, of the ranks named; returns the norms of their gradients."""
    inputs = torch.randn(STEPS, MICRO, RANKS, 4, 32, generator=torch.Generator().manual_seed(1))
    norms = []
    for step in inputs:
        for number, micro in enumerate(step):
            with no_sync() if number < MICRO - 1 else contextlib.nullcontext():
                for rank in ranks:
                    (model(micro[rank], rank == 0, reentrant) / len(ranks)).backward()
        norms.append(float(nn.utils.clip_grad_norm_(model.parameters(), 0.1)))
        optimizer.step()
        model.zero_grad()
    return norms


# Codes go to the nearest level, as `to_nearest` says, and signs flip by inertia; or both are drawn.
NEAREST = {"lr": 0.05, "lr_signs": 0.1, "betas": (0.9, 0.99), "states": "float32"}
DRAWN = {"lr": 0.01, "lr_signs": 0.1, "betas": (0.9, 0.99), "rounding": "stochastic"}


def to_nearest(model):
    for p in model.parameters():
        if isinstance(p, MPQWeightParameter) and p.rounding == "stochastic":
            p.rounding = "nearest"


def trainer_of(folder, output, batch, steps=3):
    """A Trainer over codes and norms of a packed checkpoint, which saves after two steps."""
    # Not above: ranks without a Trainer start in a fraction of the time.
    from tiny import tiny_ids
    from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

    model = AutoModelForCausalLM.from_pretrained(folder).requires_grad_(False)
    for name, p in model.named_parameters():
        if isinstance(p, MPQWeightParameter) or "norm" in name:
            p.requires_grad_(True)
    to_nearest(model)
    arguments = TrainingArguments(
        str(output),
        max_steps=steps,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=2,
        learning_rate=1e-2,
        logging_steps=1,
        save_steps=2,
        max_grad_norm=0.5,
        lr_scheduler_type="constant",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    rows = [{"input_ids": row, "labels": row} for row in tiny_ids(32, 16)]
    options = {**NEAREST, "lr": 1e-2}
    return Trainer(model, arguments, train_dataset=rows, optimizer_cls_and_kwargs=diode_mix(**options))

"""What the ranks of a sharded run and the one process that they are compared with both run."""

import gc

import torch
from peft import LoraConfig, get_peft_model
from tiny import tiny_gpt2, tiny_ids, tiny_llama, tiny_llama_ragged, tiny_qwen3_moe
from torch import distributed as dist
from torch import nn

from hf_onebit import MPQConfig, MPQQuantizer, OneBitConfig, OneBitQuantizer
from hf_onebit.nn import MBWQLinear, MPQEmbedding, MPQLinear, OneBitLinear
from hf_onebit.nn.binding import BoundWeight

RANKS, STEPS = 2, 2
ROWS = tiny_ids(2 * RANKS, 12)


def onebit(model, **options):
    return OneBitQuantizer(OneBitConfig(**options)).quantize_model(model)


def mpq(model, **options):
    return MPQQuantizer(MPQConfig(group_size=32, **options)).quantize_model(model)


MODELS = {
    "onebit": lambda: onebit(tiny_llama(layers=1)),
    "two planes": lambda: onebit(tiny_gpt2(), planes=2),
    "mpq": lambda: mpq(tiny_llama_ragged(layers=1), bits=3),  # no word rows, nor groups, that two ranks share evenly
    "head": lambda: mpq(tiny_llama(layers=1, tied=True), bits=4, lm_head_bits=8, embedding_bits=8),
    "experts": lambda: onebit(tiny_qwen3_moe()),
}


class Parts(nn.Module):
    """Layers whose inputs have an order of their own, an embedding, and signs."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = MPQEmbedding(300, 64)
        self.first = MBWQLinear(64, 96, blocks=[(4, 32, 32), (3, 32, 32)], symmetric=False, q_perm=torch.randperm(64))
        self.second = MPQLinear(96, 64, group_size=32, g_idx=torch.randint(0, 3, (96,)))
        self.third = OneBitLinear(64, 300)
        self.requires_grad_(False)

    def forward(self, ids):
        logits = self.third(self.second(self.first(self.embedding(ids)).tanh()).tanh())
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


def with_adapter(model):
    """LoRA on all linear layers, not zero at its start; the same on every rank."""
    torch.manual_seed(0)
    targets = ["first", "second", "third"] if isinstance(model, Parts) else "all-linear"
    return get_peft_model(model, LoraConfig(r=4, target_modules=targets, init_lora_weights=False)).eval()


def blocks_of(model):
    """Its blocks; of PEFT's models and of others."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return list(base.model.layers if hasattr(base, "model") else getattr(getattr(base, "transformer", None), "h", ()))


def loss_of(model, rows):
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return model(rows) if isinstance(inner, Parts) else model(input_ids=rows, labels=rows).loss


def mean(loss):
    """Of all ranks."""
    dist.all_reduce(loss)
    return loss / RANKS


def train(model, rows, mean=lambda loss: loss):
    """Steps of AdamW on the rows; losses and norms of all gradients."""
    learning = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-2)
    said = []
    for _ in range(STEPS):
        loss = loss_of(model, rows)
        loss.backward()
        norm = nn.utils.clip_grad_norm_(learning, 0.5)
        said += [float(mean(loss.detach())), float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)]
        optimizer.step()
        optimizer.zero_grad()
    return said


def packed_tensors(model):
    """{name: parameter} of all packed layers: words, scales, indices."""
    return {
        f"{name}.{own}": p
        for name, module in model.named_modules()
        if isinstance(module, BoundWeight)
        for own, p in module.named_parameters(recurse=False)
        if own != "bias"
    }


def bytes_of(parameters):
    """Bytes on this rank, a tied one once."""
    return sum(
        p.to_local().nbytes if hasattr(p, "to_local") else p.nbytes for p in {id(p): p for p in parameters}.values()
    )


def live_bytes(dtypes):
    """Bytes of all storages behind tensors of some dtypes that are alive in this process."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        if type(thing).__name__ != "DTensor" and isinstance(thing, torch.Tensor) and thing.dtype in dtypes:
            storage = thing.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def trainer_of(model, output, batch, sharded=None, **more):
    """A Trainer that takes three steps and saves after two; of ranks, with Accelerate's FSDP2 and these options."""
    from accelerate import PartialState
    from accelerate.utils import DistributedType
    from transformers import Trainer, TrainingArguments

    if sharded is not None:
        about = {"state_dict_type": "FULL_STATE_DICT", "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
        more |= {"fsdp": True, "fsdp_config": {"version": 2, **about, **sharded}}
    arguments = TrainingArguments(
        str(output),
        max_steps=3,
        save_steps=2,
        logging_steps=1,
        per_device_train_batch_size=batch,
        learning_rate=1e-2,
        lr_scheduler_type="constant",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **more,
    )
    if sharded is not None:
        assert arguments.world_size == RANKS
        # Accelerate has FSDP on accelerators only, and on a CPU would take DistributedDataParallel instead.
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    trainer = Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in tiny_ids(16, 12)])
    assert trainer.is_fsdp_enabled == (sharded is not None)
    return trainer


def logged(trainer):
    """Losses and norms."""
    return [entry[key] for entry in trainer.state.log_history for key in ("loss", "grad_norm") if key in entry]

"""One of several processes that share a packed model: ``python ranks.py RANK WORLD STORE FOLDER...``.

Prints a JSON object for each folder: how far its logits are from ``expected.safetensors`` there, which of the packed
parameters are cut, or what was refused.
"""

import datetime
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import distributed as dist
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

import hf_onebit  # noqa: F401  registers the methods
from hf_onebit.nn import packed_layers


def compare(folder: Path) -> dict[str, object]:
    expected = load_file(folder / "expected.safetensors")
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, distributed_config=DistributedConfig(tp_size=dist.get_world_size())
        )
    except ValueError as error:
        return {"refused": str(error)}
    with torch.no_grad():
        logits = model(expected["ids"]).logits
    with_gradients = model(expected["ids"]).logits
    layers = {}
    for name, layer in packed_layers(model).items():
        for tensor, parameter in layer.named_parameters(recurse=False):
            layers[f"{name}.{tensor}"] = list(getattr(parameter, "_local_tensor", parameter).shape)
    return {
        "difference": float((logits - expected["logits"]).abs().max()),
        "difference_with_gradients": float((with_gradients - expected["logits"]).abs().max()),
        "scale": float(expected["logits"].abs().max()),
        "shapes": layers,
    }


def main() -> None:
    rank, world, store, *folders = sys.argv[1:]
    dist.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=int(rank),
        world_size=int(world),
        timeout=datetime.timedelta(seconds=90),
    )
    for folder in folders:
        print("RESULT " + json.dumps({"folder": folder, **compare(Path(folder))}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()

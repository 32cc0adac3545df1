"""Times training steps on packed layers beside one of LoRA on bfloat16 layers, of real shapes.

The contenders are decoder blocks of one Llama configuration (SmolLM2-135M's by default): with the same adapters on a
bfloat16 base and on packed ones, and packed ones whose codes learn (``--updates``: DiodeMix, moments in eight bits,
fused into backward). Correctness first: the adapters' gradients on a packed base, in float32 and in bfloat16,
are compared with those on a float32 base of the very weights that the packed one stands for; of codes that learn the
gradients are compared so, and the codes after three steps with those of the step in plain PyTorch, to the bit. A
figure outside its bound ends the run. Then every contender makes one step (forward, backward, AdamW on the adapters or
DiodeMix on the codes) a round, in turn, so that whatever else the machine does hits all alike; figures are medians over
rounds of ratios within one round.

    python benchmarks/train_step.py --threads 1 --json steps.json
"""

import argparse
import copy
import json
import platform
import statistics
import sys
import time
import warnings
from typing import Any

import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn

from hf_onebit import DiodeMix, MPQWeightParameter, ops
from hf_onebit.bench.rounds import median_ratio
from hf_onebit.nn import dequantize_layers, packed_layers, replace_layers
from hf_onebit.nn.packed_update import packed_step
from hf_onebit.nn.replace import TableEntry

SHAPE = {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3}
ENTRIES = {
    "onebit": TableEntry(planes=1),
    "mpq 4 bit": TableEntry("mpq", bits=4, group_size=64, symmetric=False),
    "mpq 2 bit": TableEntry("mpq", bits=2, group_size=64, symmetric=False),
}
# ‖gradient - exact‖ / ‖exact‖ of all adapters together. In bfloat16 a few roundings of 2⁻⁹ a layer; few tokens with
# random weights leave small gradients, which they hit harder.
BOUNDS = {"float32": 1e-3, "bfloat16": 0.2}
UPDATES = {"lr": 1e-4, "betas": (0.9, 0.99), "states": "8bit"}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--layers", type=int, default=4, help="decoder blocks (default 4)")
    parser.add_argument("--tokens", type=int, default=512, help="tokens of one sequence (default 512)")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--hidden", type=int, help="another width, the others in proportion")
    parser.add_argument("--base", nargs="+", choices=ENTRIES, default=["onebit", "mpq 4 bit"])
    parser.add_argument(
        "--updates", nargs="*", choices=ENTRIES, default=["mpq 4 bit"], help="formats whose codes learn"
    )
    parser.add_argument("--checkpointing", action="store_true", help="compute activations again in backward")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", metavar="FILE", help="write all figures there")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    shape = dict(SHAPE)
    if options.hidden:
        shape |= {"hidden_size": options.hidden, "intermediate_size": options.hidden * 8 // 3}
    models = {"bf16": model_of(shape, options)}
    for name in options.base:
        models[name] = model_of(shape, options, ENTRIES[name])
    errors = {name: gradient_errors(models[name], options) for name in options.base}
    for name, error in errors.items():
        shown = ", ".join(f"{value:.1e} in {dtype}" for dtype, value in error.items())
        print(f"{name}: gradients of the adapters differ from those on its float twin by {shown}")
        if not all(error[dtype] < bound for dtype, bound in BOUNDS.items()):
            print(f"{name}: beyond {BOUNDS}", file=sys.stderr)
            return 1
    for name in options.updates:
        learning = model_of(shape, options, ENTRIES[name], learns=True)
        error, equal = update_errors(learning, options)
        print(f"{name}, codes learn: gradients differ by {error:.1e} in bfloat16, codes are the twin's: {equal}")
        if not equal or not error < BOUNDS["bfloat16"]:
            print(f"{name}: beyond {BOUNDS}, or other codes", file=sys.stderr)
            return 1
        models[f"{name}, codes learn"] = learning
        errors[f"{name}, codes learn"] = {"bfloat16": error}
    times = measure(models, options)
    ratios = {name: median_ratio(times[name], times["bf16"]) for name in models}
    weights = sum(p.numel() for n, p in models["bf16"].named_parameters() if "base_layer" in n)
    print(f"{options.batch} x {options.tokens} tokens, {options.layers} blocks, {weights / 1e6:.1f} M adapted weights")
    for name, ratio in ratios.items():
        print(f"{name:>22}: {statistics.median(times[name]) * 1e3:8.1f} ms a step, {ratio:.2f} of bf16's")
    if options.json:
        sizes = {name: value for name, value in vars(options).items() if name != "json"}
        about = {"torch": torch.__version__, "platform": platform.platform(), "isa": ops.cpu.isa(), **sizes}
        with open(options.json, "w", encoding="utf-8") as file:
            json.dump({**about, "shape": shape, "errors": errors, "ratios": ratios, "seconds": times}, file, indent=1)
    return 0


def model_of(
    shape: dict[str, int], options: argparse.Namespace, entry: TableEntry | None = None, learns: bool = False
) -> Any:
    """Blocks in bfloat16, with adapters or with codes that learn; no embedding or head of the real size, which no
    contender changes.
    """
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=64, num_hidden_layers=options.layers, **shape)
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    if entry is not None:
        names = [n for n, m in model.named_modules() if type(m) is nn.Linear and n != "lm_head"]
        replace_layers(model, dict.fromkeys(names, entry))
    if learns:
        model.requires_grad_(False)
        for p in packed_parameters(model):
            p.requires_grad_(True)
        if options.checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return model.train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        kind = LoraConfig(r=options.rank, target_modules="all-linear", init_lora_weights=False)
        adapted = get_peft_model(model, kind)
    if options.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return adapted.train()


def packed_parameters(model: Any) -> list[MPQWeightParameter]:
    return [p for p in model.parameters() if isinstance(p, MPQWeightParameter) and p.is_packed]


def update_errors(model: Any, options: argparse.Namespace) -> tuple[float, bool]:
    """How far the gradients of codes are from those of the float32 twin; whether three steps give the codes that the
    step in plain PyTorch gives from the same gradients.
    """
    wide = copy.deepcopy(model).float()
    dequantize_layers(wide, torch.float32)
    wide.requires_grad_(True)(**batch_of(options)).loss.backward()
    model(**batch_of(options)).loss.backward()
    exact = [m.weight.grad.T for n, m in wide.named_modules() if type(m) is nn.Linear and n != "lm_head"]
    found = [p.grad for p in packed_parameters(model)]
    off = sum(float((a - b).double().square().sum()) for a, b in zip(found, exact, strict=True))
    error = (off / sum(float(b.double().square().sum()) for b in exact)) ** 0.5
    copies = [copy.deepcopy(packed_parameters(model)[:4]) for _ in range(2)]
    for weights, reference in zip(copies, (False, True), strict=True):
        optimizer = DiodeMix(weights, **UPDATES)
        with torch.library._scoped_library("hf_onebit", "IMPL") as own, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # overriding is what is meant
            if reference:
                own.impl("packed_step", packed_step, "CPU", allow_override=True)
            for _ in range(3):
                for weight, grad in zip(weights, found, strict=False):
                    weight.grad = grad
                optimizer.step()
    model.zero_grad()
    return error, all(torch.equal(a.data, b.data) for a, b in zip(*copies, strict=True))


def optimizer_of(model: Any) -> Any:
    packed = [p for p in packed_parameters(model) if p.requires_grad]
    if packed:
        return DiodeMix(packed, **UPDATES, fused=True)
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5)


def batch_of(options: argparse.Namespace) -> dict[str, torch.Tensor]:
    ids = torch.randint(0, 64, (options.batch, options.tokens), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "labels": ids}


def gradients(model: Any, options: argparse.Namespace) -> torch.Tensor:
    model(**batch_of(options)).loss.backward()
    found = torch.cat([p.grad.flatten().float() for name, p in model.named_parameters() if "lora_" in name])
    model.zero_grad()
    return found


def gradient_errors(model: Any, options: argparse.Namespace) -> dict[str, float]:
    """Relative, beside the float32 twin of the packed model, by the dtype of the activations."""
    wide = copy.deepcopy(model).float()
    twin = copy.deepcopy(wide)
    assert packed_layers(twin)
    dequantize_layers(twin, torch.float32)
    exact = gradients(twin, options)
    found = {"float32": gradients(wide, options), "bfloat16": gradients(model, options)}
    return {dtype: float((gradient - exact).norm() / exact.norm()) for dtype, gradient in found.items()}


def measure(models: dict[str, Any], options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of each step in each round."""
    batch = batch_of(options)
    optimizers = {name: optimizer_of(model) for name, model in models.items()}
    times: dict[str, list[float]] = {name: [] for name in models}
    for number in range(options.rounds + 1):
        for name, model in models.items():
            begin = time.perf_counter()
            model(**batch).loss.backward()
            optimizers[name].step()
            optimizers[name].zero_grad()
            if number:  # the first warms up
                times[name].append(time.perf_counter() - begin)
    return times


if __name__ == "__main__":
    sys.exit(main())

"""Win back what one bit lost, from the float model's answers: LoRA, scales alone and packed signs on the same tokens.

python examples/recover_one_bit.py PACKED FLOAT TEXT HELDOUT DIR [--steps 32 --length 512 --lr 1e-3 --lr-signs 3e-4]
"""

import argparse
import json
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from hf_onebit import DiodeMix, MPQWeightParameter, scale_groups, train_scales
from hf_onebit.distillation import pair
from hf_onebit.evaluation import compare, token_windows
from hf_onebit.report import plot_curves


def optimizer_of(way: str, model: PreTrainedModel, options: argparse.Namespace) -> torch.optim.Optimizer:
    """Make what learns in this way trainable, in place, and the optimizer of it."""
    if way == "LoRA":
        adapted = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
        return torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], options.lr, weight_decay=0.0)
    train_scales(model.requires_grad_(False))
    norms = [p.requires_grad_(True) for name, p in model.named_parameters() if "norm" in name]
    groups = [*scale_groups(model, options.lr), {"params": norms, "lr": options.lr}]
    if way == "packed signs":
        signs = [p.requires_grad_(True) for p in model.parameters() if isinstance(p, MPQWeightParameter)]
        groups.append({"params": signs, "lr": options.lr_signs, "betas": (0.99, 0.9999), "eps": 3.0})
    return DiodeMix(groups, betas=(0.9, 0.99))


def main() -> None:
    """Parse the arguments, train in each way, write and draw the curves."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("packed", "teacher", "text", "heldout", "output"):
        parser.add_argument(name, type=Path)
    for name, value in {"--steps": 32, "--length": 512, "--lr": 1e-3, "--lr-signs": 3e-4}.items():
        parser.add_argument(name, type=type(value), default=value)
    options, curves = parser.parse_args(), {}
    tokenizer = AutoTokenizer.from_pretrained(options.packed)
    texts = [file.read_text(encoding="utf-8") for file in (options.text, options.heldout)]
    windows, heldout = (token_windows(t, tokenizer, options.length, options.length * options.steps) for t in texts)
    teacher = AutoModelForCausalLM.from_pretrained(options.teacher, dtype="auto").eval()
    for way in ("LoRA", "scales alone", "packed signs"):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_pretrained(options.packed)
        optimizer, curves[way] = optimizer_of(way, model, options), []
        fade = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / len(windows))
        both = pair(model, teacher, {"input_ids": windows[0][None]})
        for done in range(len(windows) + 1):
            if done:
                batch = {"input_ids": windows[done - 1][None]}
                both.loss(batch, both.targets(batch)).backward()
                optimizer.step()
                optimizer.zero_grad()
                fade.step()
            if done % max(1, len(windows) // 4) == 0:
                curves[way].append(found := {**compare(model, teacher, heldout[:8]), "tokens": done * options.length})
                print(f"{way}, {done} updates: loss {found['nll']:.4f}, KL {found['kl']:.4f}", flush=True)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "curves.json").write_text(json.dumps(curves, indent=1), encoding="utf-8")
    plot_curves(curves, options.output / "curves.svg")


if __name__ == "__main__":
    main()

"""Train LoRA adapters on a packed model with the Trainer of Transformers, and save the adapter.

python examples/lora_on_packed.py PACKED TEXT -o DIR [--residual FLOAT_MODEL_FOLDER]
"""

import argparse

from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

import hf_onebit


def main() -> None:
    """Parse the arguments, train, save the adapter, print the losses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", metavar="PACKED", help="packed checkpoint, with its tokenizer")
    parser.add_argument("text", metavar="TEXT", help="text file to train on")
    parser.add_argument("-o", "--output", metavar="DIR", required=True, help="folder for the adapter")
    parser.add_argument("--residual", metavar="DIR", help="float checkpoint: start the adapter at what packing lost")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence (default 256)")
    parser.add_argument("--lr", type=float, default=2e-4)
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    with open(options.text, encoding="utf-8") as file:
        ids = tokenizer(file.read(), return_tensors="pt", verbose=False).input_ids[0]
    rows = ids[: len(ids) // options.length * options.length].view(-1, options.length)
    data = [{"input_ids": row, "labels": row} for row in rows]

    model = hf_onebit.prepare_model_for_training(AutoModelForCausalLM.from_pretrained(options.model))
    model = get_peft_model(model, LoraConfig(r=options.rank, target_modules="all-linear", task_type="CAUSAL_LM"))
    if options.residual:
        some = [{"input_ids": rows[:8]}]
        fits = hf_onebit.init_from_residual(model, options.residual, some).values()
        before, after = (sum(getattr(fit, key) for fit in fits) / len(fits) for key in ("before", "after"))
        print(f"relative error of a layer's outputs: {before:.3f} packed, {after:.3f} with the adapter's start")
    arguments = TrainingArguments(
        options.output,
        max_steps=options.steps,
        learning_rate=options.lr,
        per_device_train_batch_size=4,
        logging_steps=max(1, options.steps // 5),
        save_strategy="no",
        report_to="none",
    )
    trainer = Trainer(model, arguments, train_dataset=data)
    trainer.train()
    model.save_pretrained(options.output)
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, adapter in {options.output}")


if __name__ == "__main__":
    main()

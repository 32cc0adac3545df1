"""Transformers' Trainer, as it is, on packed weights: norms, clipping, accumulation, checkpoints, resuming."""

import math
import re
from pathlib import Path

import pytest
import torch
from tiny import tiny_ids, tiny_llama, tiny_tokenizer
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed

import hf_onebit
from hf_onebit import MPQConfig, MPQQuantizer, OneBitConfig, OneBitQuantizer
from hf_onebit.nn import MPQWeightParameter

ROWS = [{"input_ids": row, "labels": row} for row in tiny_ids(16, 16)]


def packed(model):
    return {name: p for name, p in model.named_parameters() if isinstance(p, MPQWeightParameter)}


@pytest.fixture(scope="module", params=["mpq", "onebit"])
def folder(request, tmp_path_factory):
    """A packed checkpoint, quantized without data."""
    made = tmp_path_factory.mktemp(request.param) / "packed"
    if request.param == "mpq":
        model = MPQQuantizer(MPQConfig(bits=4, group_size=32)).quantize_model(tiny_llama())
    else:
        model = OneBitQuantizer(OneBitConfig()).quantize_model(tiny_llama())
    model.save_pretrained(made)
    return made


def learning(folder, scales=False):
    """The model with codes and norms that learn, and scales if asked for."""
    model = AutoModelForCausalLM.from_pretrained(folder).requires_grad_(False)
    for name, p in model.named_parameters():
        if isinstance(p, MPQWeightParameter) or "norm" in name:
            p.requires_grad_(True)
    if scales:
        hf_onebit.train_scales(model)
    return model


def trainer_of(model, output, steps=4, batch=2, optimizer=None, **more):
    options = {"logging_steps": 1, "save_strategy": "no", "max_grad_norm": 0.0, "lr_scheduler_type": "constant", **more}
    arguments = TrainingArguments(
        str(output),
        max_steps=steps,
        per_device_train_batch_size=batch,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **options,
    )
    made = hf_onebit.diode_mix(lr=1e-3, lr_signs=1e-2, betas=(0.9, 0.99)) if optimizer is None else optimizer
    return Trainer(model, arguments, train_dataset=ROWS, optimizer_cls_and_kwargs=made)


def logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


def everything(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(first, second):
    assert first.keys() == second.keys()
    different = [key for key in first if not torch.equal(first[key], second[key])]
    assert not different


def test_training_lowers_the_loss_and_reloads(folder, tmp_path):
    model = learning(folder)
    before = everything(model)
    trainer = trainer_of(model, tmp_path, steps=12, batch=8)
    trainer.train()
    losses = logged(trainer, "loss")
    assert losses[-1] < losses[0] - 0.02
    changed = [name for name in packed(model) if not torch.equal(before[name], model.state_dict()[name])]
    assert len(changed) == len(packed(model)) == 14
    assert trainer.optimizer.optimizer.metrics()["flip_rate"] > 0
    trainer.save_model(tmp_path / "saved")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    ids = tiny_ids(2, 12, seed=1)
    torch.testing.assert_close(again(ids).logits, model.eval()(ids).logits, rtol=0, atol=0)


def test_the_logged_norm_is_of_all_gradients(folder, tmp_path):
    trainer = trainer_of(learning(folder), tmp_path, steps=1)
    trainer.train()
    rows = torch.stack([ROWS[i]["input_ids"] for i in first_batch(trainer)])
    model = learning(folder)
    model(rows, labels=rows).loss.backward()
    squares = [float(p.grad.double().square().sum()) for p in model.parameters() if p.grad is not None]
    assert len(squares) == 14 + 5
    assert logged(trainer, "grad_norm")[0] == pytest.approx(math.sqrt(sum(squares)), rel=1e-5)
    assert all(p.grad is None for p in trainer.model.parameters())


def first_batch(trainer):
    """Which rows the trainer took first."""
    set_seed(trainer.args.seed)
    ids = next(iter(trainer.get_train_dataloader()))["input_ids"].cpu()
    return [next(i for i, row in enumerate(ROWS) if torch.equal(row["input_ids"], line)) for line in ids]


class Norms(TrainerCallback):
    """The norm of all gradients as each optimizer step finds them."""

    def __init__(self):
        self.found = []

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        squares = [float(p.grad.double().square().sum()) for p in model.parameters() if p.grad is not None]
        self.found.append(math.sqrt(sum(squares)))


def test_clipping(folder, tmp_path):
    norms = Norms()
    trainer = trainer_of(learning(folder), tmp_path, steps=2, max_grad_norm=0.01)
    trainer.add_callback(norms)
    trainer.train()
    assert norms.found == pytest.approx([0.01, 0.01], rel=1e-3)
    assert min(logged(trainer, "grad_norm")) > 0.1  # what was there before


def test_accumulated_steps_are_those_of_one_batch(folder, tmp_path):
    results = []
    for batch, times in ((4, 1), (1, 4)):
        made = hf_onebit.diode_mix(lr=1e-2, betas=(0.9, 0.99), states="float32", rounding="nearest")
        model = learning(folder)
        before = everything(model)
        trainer = trainer_of(model, tmp_path, 2, batch, made, gradient_accumulation_steps=times)
        trainer.train()
        results.append((packed(model), logged(trainer, "grad_norm")))
        assert any(not torch.equal(before[name], p) for name, p in packed(model).items())
    (codes, norms), (others, other_norms) = results
    assert norms == pytest.approx(other_norms, rel=1e-3)
    assert differing(codes, others) < 1e-3


def differing(codes, others):
    """Share of the float weights that two models' words do not stand for both."""
    pairs = [(codes[name].float_weight(), others[name].float_weight()) for name in codes]
    different = sum(int((a != b).sum()) for a, b in pairs)
    return different / sum(a.numel() for a, _ in pairs)


@pytest.mark.parametrize("scales", [False, True], ids=["codes", "scales too"])
def test_a_resumed_run_ends_with_the_same_bits(folder, tmp_path, scales):
    made = hf_onebit.diode_mix(lr=1e-3, lr_signs=1e-2, lr_scales=1e-4, betas=(0.9, 0.99))
    more = {"save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2}
    whole = trainer_of(learning(folder, scales), tmp_path, 4, 2, made, **more)
    whole.train()
    resumed = trainer_of(learning(folder, scales), tmp_path, 4, 2, made, **more)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.state.global_step == 4
    assert_same(everything(whole.model), everything(resumed.model))
    states = [trainer.optimizer.state_dict()["state"] for trainer in (whole, resumed)]
    assert states[0].keys() == states[1].keys()
    for number, state in states[0].items():
        for key, value in state.items():
            other = states[1][number][key]
            assert torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other
    assert logged(whole, "loss")[-1] == logged(resumed, "loss")[-1]


def test_what_the_docs_show(folder, tmp_path, monkeypatch):
    docs = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    _, code = re.findall(r"^```python\n(.*?)^```", docs, re.M | re.S)
    monkeypatch.chdir(tmp_path)
    Path("model-mpq").symlink_to(folder)
    names = {"dataset": ROWS}
    exec(code, names)
    again = AutoModelForCausalLM.from_pretrained("model-tuned")
    assert all(torch.equal(p, packed(names["model"])[name]) for name, p in packed(again).items())


def test_sft_trainer(folder, tmp_path):
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    made = hf_onebit.diode_mix(lr=1e-3, lr_signs=1e-2, betas=(0.9, 0.99))
    model = learning(folder)
    before = everything(model)
    arguments = trl.SFTConfig(
        str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=2,
        max_length=16,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
    )
    trainer = trl.SFTTrainer(
        model,
        args=arguments,
        train_dataset=datasets.Dataset.from_dict({"text": ["hello to all of you", "nothing is here"] * 4}),
        processing_class=tiny_tokenizer(),
        optimizer_cls_and_kwargs=made,
    )
    trainer.train()
    assert len(logged(trainer, "grad_norm")) == 3
    assert all(not torch.equal(before[name], p) for name, p in packed(trainer.model).items())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-3")
    assert all(torch.equal(p, packed(trainer.model)[name]) for name, p in packed(again).items())


def test_sft_trainer_with_adapters(folder, tmp_path):
    """Of a frozen packed base; TRL wraps the model itself."""
    trl, peft = pytest.importorskip("trl"), pytest.importorskip("peft")
    datasets = pytest.importorskip("datasets")
    model = AutoModelForCausalLM.from_pretrained(folder)
    before = everything(model)
    arguments = trl.SFTConfig(
        str(tmp_path),
        max_steps=8,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        max_length=16,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        bf16=False,
    )
    trainer = trl.SFTTrainer(
        model,
        args=arguments,
        train_dataset=datasets.Dataset.from_dict({"text": ["hello to all of you", "nothing is here"] * 4}),
        processing_class=tiny_tokenizer(),
        peft_config=peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    trainer.train()
    losses = logged(trainer, "loss")
    assert losses[-1] < losses[0] - 0.1
    base = trainer.model.get_base_model().state_dict()
    for name, value in before.items():
        if value.dtype == torch.int32:
            assert torch.equal(base[name.replace(".weight", ".base_layer.weight")], value)
    again = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), tmp_path / "checkpoint-8")
    ids = tiny_ids(2, 12, seed=1)
    torch.testing.assert_close(again(ids).logits, trainer.model.eval()(ids).logits, rtol=1e-5, atol=1e-5)

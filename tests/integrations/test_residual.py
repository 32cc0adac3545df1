"""Adapters that start at what packing lost."""

import pytest
import torch
from tiny import save_float, tiny_gpt2, tiny_gpt_oss, tiny_ids, tiny_llama, tiny_mixtral, tiny_qwen3_moe

peft = pytest.importorskip("peft")

from transformers import AutoModelForCausalLM  # noqa: E402  after the skip

import hf_onebit  # noqa: E402
from hf_onebit import MPQConfig, OneBitConfig  # noqa: E402
from hf_onebit.integrations.residual import _leading  # noqa: E402

CONFIGS = {
    "onebit": OneBitConfig,
    "two planes": lambda: OneBitConfig(planes=2),
    "2 bits": lambda: MPQConfig(bits=2, group_size=32),
    "4 bits": lambda: MPQConfig(bits=4, group_size=32),
}


def start(folder, config, float_model, **more):
    save_float(float_model, folder / "float")
    packed = AutoModelForCausalLM.from_pretrained(folder / "float", quantization_config=config)
    kind = peft.LoraConfig(**{"r": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM", **more})
    return peft.get_peft_model(packed, kind).eval()


def sharp(make=tiny_llama):
    """A random model whose predictions are far from uniform, so that errors show in them."""
    model = make()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.mul_(4 if "lm_head" in name or "embed" in name or "wte" in name else 2)
    return model


def divergence(model, teacher):
    with torch.no_grad():
        ids = tiny_ids(4, 32, seed=7)
        P, Q = (m(input_ids=ids).logits.log_softmax(-1) for m in (teacher, model))
    return float((P.exp() * (P - Q)).sum(-1).mean())


@pytest.mark.parametrize("name", CONFIGS)
def test_it_starts_nearer_to_the_float_model(name, tmp_path):
    teacher = sharp()
    model = start(tmp_path, CONFIGS[name](), teacher)
    plain = divergence(model, teacher)
    with model.disable_adapter():
        assert divergence(model, teacher) == plain  # LoRA's own start is the packed model
    fits = hf_onebit.init_from_residual(model, teacher)
    assert len(fits) == 14
    assert all(fit.after < 0.95 * fit.before for fit in fits.values())
    near = divergence(model, teacher)
    assert near < 0.9 * plain
    with model.disable_adapter():
        assert divergence(model, teacher) == plain
    batches = [{"input_ids": tiny_ids(4, 32, seed=seed)} for seed in range(4)]
    weighed = hf_onebit.init_from_residual(model, teacher, batches)
    assert all(fit.after < fit.before for fit in weighed.values())
    assert divergence(model, teacher) < 0.9 * plain


def test_the_errors_are_what_they_say(tmp_path):
    teacher = sharp()
    model = start(tmp_path, OneBitConfig(), teacher, lora_alpha=4)
    fits = hf_onebit.init_from_residual(model, teacher)
    for name, fit in fits.items():
        layer = model.get_base_model().get_submodule(name)
        W, Q = teacher.get_submodule(name).weight.detach(), layer.base_layer.dequantize()
        assert fit.before == pytest.approx(float((W - Q).norm() / W.norm()), rel=1e-4)
        after = W - Q - layer.get_delta_weight("default").detach()
        assert fit.after == pytest.approx(float(after.norm() / W.norm()), rel=1e-4)
        tail = torch.linalg.svdvals(W - Q)[8:]
        assert fit.after == pytest.approx(float(tail.norm() / W.norm()), rel=1e-3)  # nothing of that rank is nearer
        A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        torch.testing.assert_close(A.norm(dim=1), B.norm(dim=0), rtol=1e-3, atol=1e-6)


def test_with_data_the_outputs_are_nearer_than_without(tmp_path):
    teacher = sharp()
    model = start(tmp_path, MPQConfig(bits=2, group_size=32), teacher)
    batches = [{"input_ids": tiny_ids(8, 64, seed=seed)} for seed in range(4)]
    weighed = hf_onebit.init_from_residual(model, teacher, batches)
    first = "model.layers.0.self_attn.q_proj"
    layer = model.get_base_model().get_submodule(first)
    inputs = []
    handle = layer.register_forward_pre_hook(lambda module, args: inputs.append(args[0].flatten(0, -2)))
    with torch.no_grad():
        model(**batches[0])
    handle.remove()
    W, x = teacher.get_submodule(first).weight.detach(), inputs[0]

    def error():
        with torch.no_grad():
            return float((layer(x) - x @ W.T).norm() / (x @ W.T).norm())

    by_data = error()
    assert by_data == pytest.approx(weighed[first].after, rel=0.2)
    hf_onebit.init_from_residual(model, teacher)
    assert by_data < error()


@pytest.mark.parametrize("more", [{"use_dora": True}, {"use_rslora": True}], ids=str)
def test_other_kinds_of_lora(more, tmp_path):
    teacher = sharp()
    model = start(tmp_path, OneBitConfig(), teacher, **more)
    plain = divergence(model, teacher)
    hf_onebit.init_from_residual(model, teacher)
    assert divergence(model, teacher) < 0.9 * plain
    assert sum(p.requires_grad for p in model.parameters()) == (42 if "use_dora" in more else 28)
    model.save_pretrained(tmp_path / "adapter")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=OneBitConfig())
    again = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    assert divergence(again, teacher) == divergence(model, teacher)


@pytest.mark.parametrize("shards", [False, True])
def test_weights_from_a_folder(shards, tmp_path):
    teacher = sharp()
    model = start(tmp_path, OneBitConfig(), teacher)
    hf_onebit.init_from_residual(model, teacher)
    expected = divergence(model, teacher)
    save_float(teacher, tmp_path / "sharded", max_shard_size="50KB" if shards else "5GB")
    again = start(tmp_path, OneBitConfig(), teacher)
    hf_onebit.init_from_residual(again, tmp_path / "sharded")
    assert divergence(again, teacher) == expected


@pytest.mark.parametrize("make", [tiny_qwen3_moe, tiny_mixtral, tiny_gpt_oss])
def test_weights_of_experts(make, tmp_path):
    """Fused in the float model; in files by the names of each expert's layers, by others than in memory, or fused."""
    teacher = make()
    model = start(tmp_path, OneBitConfig(), teacher)
    from_model = hf_onebit.init_from_residual(model, teacher)
    assert sum(".experts." in name for name in from_model) == 3 * 4 * 2
    assert all(fit.after < fit.before < 0.7 for fit in from_model.values())  # another expert's weight would give 1.2
    assert hf_onebit.init_from_residual(model, tmp_path / "float") == from_model


def test_transposed_layers(tmp_path):
    teacher = sharp(tiny_gpt2)
    model = start(tmp_path, OneBitConfig(), teacher)
    plain = divergence(model, teacher)
    fits = hf_onebit.init_from_residual(model, teacher)
    assert len(fits) == 8
    assert divergence(model, teacher) < 0.95 * plain
    again = start(tmp_path, OneBitConfig(), teacher)
    hf_onebit.init_from_residual(again, tmp_path / "float")
    assert divergence(again, teacher) == divergence(model, teacher)


def test_ranks_beyond_the_matrix_and_large_matrices():
    torch.manual_seed(0)
    U, S, V = _leading(torch.randn(6, 40), 9)
    assert (U.shape, S.shape, V.shape) == ((6, 9), (9,), (40, 9))
    assert S[6:].eq(0).all()
    M = torch.randn(800, 20) @ torch.randn(20, 800) + 0.01 * torch.randn(800, 800)
    state = torch.random.get_rng_state()
    U, S, V = _leading(M, 20)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert float((M - U * S @ V.T).norm() / M.norm()) < 0.01


def test_it_says_no(tmp_path):
    teacher = tiny_llama()
    model = start(tmp_path, OneBitConfig(), teacher)
    for message, call in {
        "found no LoRA adapter 'other'": lambda: hf_onebit.init_from_residual(model, teacher, adapter_name="other"),
        "got no batches": lambda: hf_onebit.init_from_residual(model, teacher, []),
        r"needs the float weight \(64, 64\) of model.layers.0.self_attn.q_proj, found nothing": (
            lambda: hf_onebit.init_from_residual(model, torch.nn.Linear(3, 3))
        ),
        r"found torch.float32 \(72, 72\)": lambda: hf_onebit.init_from_residual(model, tiny_llama(hidden=72)),
        "holds no safetensors files": lambda: hf_onebit.init_from_residual(model, tmp_path),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=OneBitConfig())
    with pytest.raises(ValueError, match="call get_peft_model"):
        hf_onebit.init_from_residual(base, teacher)

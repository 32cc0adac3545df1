"""PEFT's methods on packed layers: what works does all of what PEFT promises, what cannot says so before it changes
anything."""

import warnings

import pytest
import torch
from tiny import save_float, tiny_gemma3, tiny_gpt2, tiny_ids, tiny_llama

peft = pytest.importorskip("peft")

from transformers import AutoModelForCausalLM  # noqa: E402  after the skip

import hf_onebit  # noqa: E402
from hf_onebit import MPQConfig, OneBitConfig  # noqa: E402
from hf_onebit.nn import packed_layers  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")
BASES = {"onebit": OneBitConfig, "mpq": lambda: MPQConfig(bits=4, group_size=32)}
T = {"target_modules": ["q_proj", "up_proj"], "task_type": "CAUSAL_LM"}


def lora(**more):
    return peft.LoraConfig(**{"r": 4, **T, **more})


# Does the method change the layers' sum in a way that has a merged form?
MERGE = {
    "lora": lora,
    "lora, all linear": lambda: lora(target_modules="all-linear"),
    "lora, gaussian": lambda: lora(init_lora_weights="gaussian"),
    "lora, eva": lambda: lora(init_lora_weights="eva"),
    "rslora": lambda: lora(use_rslora=True),
    "dora": lambda: lora(use_dora=True),
    "lora, ranks": lambda: lora(rank_pattern={"up_proj": 8}, alpha_pattern={"up_proj": 4}),
    "adalora": lambda: peft.AdaLoraConfig(init_r=6, target_r=4, total_step=50, tinit=5, tfinal=5, **T),
    "ia3": lambda: peft.IA3Config(feedforward_modules=["up_proj"], **T),
    "oft": lambda: peft.OFTConfig(r=0, oft_block_size=4, **T),
    "boft": lambda: peft.BOFTConfig(boft_block_size=4, **T),
    "vera": lambda: peft.VeraConfig(r=16, d_initial=1.0, **T),
    "miss": lambda: peft.MissConfig(r=4, **T),
    "shira": lambda: peft.ShiraConfig(r=4, **T),
    "c3a": lambda: peft.C3AConfig(block_size=32, **T),
    "fourierft": lambda: peft.FourierFTConfig(n_frequency=64, **T),
    "gralora": lambda: peft.GraloraConfig(r=4, gralora_k=2, **T),
    "randlora": lambda: peft.RandLoraConfig(r=4, **T),
    "road": lambda: peft.RoadConfig(group_size=32, **T),
    "vblora": lambda: peft.VBLoRAConfig(r=4, num_vectors=16, vector_length=32, topk=2, **T),
    "waveft": lambda: peft.WaveFTConfig(n_frequency=64, **T),
}
BESIDE = {
    "ln tuning": lambda: peft.LNTuningConfig(target_modules=["input_layernorm"], task_type="CAUSAL_LM"),
    "prompt": lambda: peft.PromptTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    "prefix": lambda: peft.PrefixTuningConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    "p-tuning": lambda: peft.PromptEncoderConfig(num_virtual_tokens=4, task_type="CAUSAL_LM"),
    "tokens": lambda: peft.TrainableTokensConfig(
        token_indices=tiny_ids()[0].tolist(), target_modules=["embed_tokens"], task_type="CAUSAL_LM"
    ),
    "pvera": lambda: peft.PveraConfig(r=16, d_initial=1.0, **T),
    "beft": lambda: peft.BeftConfig(**T),
    "lily": lambda: peft.LilyConfig(r=4, **T),
}
WORK = MERGE | BESIDE
REFUSED = {
    "loha": lambda: peft.LoHaConfig(r=4, **T),
    "lokr": lambda: peft.LoKrConfig(r=4, **T),
    "hra": lambda: peft.HRAConfig(r=4, **T),
    "delora": lambda: peft.DeloraConfig(r=4, **T),
    "hira": lambda: peft.HiraConfig(r=4, **T),
    "tinylora": lambda: peft.TinyLoraConfig(r=2, **T),
    "supertuning": lambda: peft.SupertuningConfig(**T),
    "frod": lambda: peft.FrodConfig(**T),
    "glora": lambda: peft.GloraConfig(r=4, **T),
    "osf": lambda: peft.OSFConfig(**T),
    "peanut": lambda: peft.PeanutConfig(r=4, **T),
    "deft": lambda: peft.DeftConfig(r=4, **T),
    "psoft": lambda: peft.PsoftConfig(r=4, **T),
}
STARTS = ["pissa", "pissa_niter_4", "olora", "orthogonal", "corda", "mica", "lora_ga"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packed")
    save_float(tiny_llama(), folder / "float")
    for name, config in BASES.items():
        packed = AutoModelForCausalLM.from_pretrained(folder / "float", quantization_config=config())
        packed.save_pretrained(folder / name)
    return folder


def train(model, steps=4, lr=1e-2):
    """Losses of a few steps on the same tokens."""
    learning = [p for p in model.parameters() if p.requires_grad]
    assert learning
    optimizer, ids, losses = torch.optim.Adam(learning, lr=lr), tiny_ids(), []
    for _ in range(steps):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def logits(model):
    model.eval()
    with torch.no_grad():
        return model(input_ids=tiny_ids(seed=9)).logits


def words(model):
    return {name: [p.clone() for p in layer.parameters()] for name, layer in packed_layers(model).items()}


def same(one, other):
    plain = [{name.replace(".base_layer", ""): tensors for name, tensors in of.items()} for of in (one, other)]
    return plain[0].keys() == plain[1].keys() and all(
        torch.equal(a, b) for name in plain[0] for a, b in zip(plain[0][name], plain[1][name], strict=True)
    )


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", WORK)
def test_a_method_that_works(method, base, folder, tmp_path):
    torch.manual_seed(0)
    packed = AutoModelForCausalLM.from_pretrained(folder / base)
    before, plain = words(packed), logits(packed)
    model = peft.get_peft_model(packed, WORK[method]()).train()
    losses = train(model)
    assert losses[-1] < losses[0] - 1e-5
    assert same(words(packed), before), "training an adapter changed packed words or scales"
    expected = logits(model)
    assert not torch.equal(expected[:, -plain.shape[1] :], plain)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model)[:, -plain.shape[1] :], plain)
    model.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / base), tmp_path / "adapter")
    torch.testing.assert_close(logits(again), expected, rtol=0, atol=0)
    if hasattr(model, "merge_and_unload") and method in MERGE:
        with pytest.raises(ValueError, match="Cannot merge an adapter into packed weights"):
            model.merge_and_unload()
        with pytest.raises(ValueError, match="Cannot merge an adapter into packed weights"):
            model.merge_adapter()
        layer = model.get_base_model().model.layers[0].self_attn.q_proj
        with pytest.raises(ValueError, match="Cannot merge an adapter into packed weights"):
            layer.merge()
        assert same(words(packed), before)
        merged = hf_onebit.merge_and_dequantize(model)
        assert not packed_layers(merged)
        assert not hasattr(merged.config, "quantization_config")
        torch.testing.assert_close(logits(merged), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("method", REFUSED)
def test_a_method_that_cannot_work_says_so_first(method, base, folder):
    packed = AutoModelForCausalLM.from_pretrained(folder / base)
    before, modules = words(packed), [type(m) for m in packed.modules()]
    with pytest.raises(ValueError, match=r"cannot adapt the packed layer model\.layers\.0\.self_attn\.q_proj"):
        peft.get_peft_model(packed, REFUSED[method]())
    assert same(words(packed), before)
    assert [type(m) for m in packed.modules()] == modules


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("start", STARTS)
def test_a_start_that_would_change_the_base_is_refused(start, base, folder):
    packed = AutoModelForCausalLM.from_pretrained(folder / base)
    before = words(packed)
    with pytest.raises(ValueError, match=f"init_lora_weights='{start}' cannot start an adapter on the packed layer"):
        peft.get_peft_model(packed, lora(init_lora_weights=start))
    assert same(words(packed), before)


def test_adaption_prompts_fail_loudly(folder):
    packed = AutoModelForCausalLM.from_pretrained(folder / "onebit")
    config = peft.AdaptionPromptConfig(adapter_len=4, adapter_layers=1, task_type="CAUSAL_LM")
    with pytest.raises((NotImplementedError, RuntimeError)):
        peft.get_peft_model(packed, config)


@pytest.mark.parametrize("method", ["loha", "hra"])
def test_methods_on_float_layers_of_a_packed_model_are_left_alone(method, folder):
    packed = AutoModelForCausalLM.from_pretrained(folder / "onebit")
    config = REFUSED[method]()
    config.target_modules = {"lm_head"}
    model = peft.get_peft_model(packed, config)
    losses = train(model)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("method", ["lora", "dora", "oft", "boft", "vera", "miss", "shira", "ia3"])
def test_half_precision(method, dtype, folder):
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder / "mpq", dtype=dtype), WORK[method]())
    losses = train(model)
    assert losses[-1] < losses[0] - 1e-3 or method in ("oft", "boft", "vera", "ia3")
    merged = hf_onebit.merge_and_dequantize(model)
    assert merged.dtype == dtype
    assert torch.isfinite(logits(merged)).all()


def test_the_backend_has_a_name(folder):
    for base in BASES:
        model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder / base), WORK["oft"]())
        assert model.get_model_status().quantization_backend == base


@pytest.mark.parametrize("base", BASES)
def test_several_adapters(base, folder, tmp_path):
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder / base), lora(), adapter_name="first")
    train(model)
    first = logits(model)
    model.add_adapter("second", lora(r=2, use_dora=True))
    model.set_adapter("second")
    train(model)
    second = logits(model)
    model.set_adapter("first")
    torch.testing.assert_close(logits(model), first, rtol=0, atol=0)
    assert not torch.equal(first, second)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folder / base), tmp_path / "first", adapter_name="first"
    )
    again.load_adapter(tmp_path / "second", "second")
    torch.testing.assert_close(logits(again), first, rtol=0, atol=0)
    again.set_adapter("second")
    torch.testing.assert_close(logits(again), second, rtol=0, atol=0)
    again.add_adapter("third", lora())
    again.add_weighted_adapter(["first", "third"], [1.0, 1.0], "sum", combination_type="cat")
    again.set_adapter("sum")
    torch.testing.assert_close(logits(again), first, rtol=1e-4, atol=1e-5)  # the third is zero
    again.delete_adapter("sum")
    merged = hf_onebit.merge_and_dequantize(again, adapter_names=["second"])
    torch.testing.assert_close(logits(merged), second, rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="has no adapter on a packed layer"):
        hf_onebit.merge_and_dequantize(AutoModelForCausalLM.from_pretrained(folder / base))


@pytest.mark.parametrize("base", BASES)
def test_adapters_of_transformers_itself(base, folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder / base)
    model.add_adapter(lora(), adapter_name="mine")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora_" in name)
    losses = train(model)
    assert losses[-1] < losses[0] - 0.05
    expected = logits(model)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(folder / base)
    again.load_adapter(tmp_path, adapter_name="mine")
    torch.testing.assert_close(logits(again), expected, rtol=0, atol=0)
    again.disable_adapters()
    assert not torch.equal(logits(again), expected)
    merged = hf_onebit.merge_and_dequantize(model)
    torch.testing.assert_close(logits(merged), expected, rtol=1e-3, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "merged")), logits(merged))


@pytest.mark.parametrize("base", BASES)
def test_modules_to_save(base, folder, tmp_path):
    packed = AutoModelForCausalLM.from_pretrained(folder / base)
    model = peft.get_peft_model(packed, lora(modules_to_save=["lm_head", "norm"]))
    train(model)
    expected = logits(model)
    model.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder / base), tmp_path)
    torch.testing.assert_close(logits(again), expected, rtol=0, atol=0)
    torch.testing.assert_close(logits(hf_onebit.merge_and_dequantize(model)), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "more", [{"modules_to_save": ["lm_head"]}, {"modules_to_save": ["mlp"]}, {"trainable_token_indices": [3]}], ids=str
)
def test_a_packed_module_cannot_be_trained_whole(more, tmp_path):
    save_float(tiny_llama(), tmp_path)
    config = OneBitConfig(lm_head_bits=4, embedding_bits=4)
    packed = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    with pytest.raises(ValueError, match="cannot train a copy of a packed module"):
        peft.get_peft_model(packed, lora(target_modules=["q_proj"], **more))


def test_dora_on_a_packed_embedding_is_refused(tmp_path):
    save_float(tiny_llama(), tmp_path)
    packed = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=OneBitConfig(embedding_bits=4))
    with pytest.raises(ValueError, match=r"DoRA cannot adapt the packed embedding model\.embed_tokens"):
        peft.get_peft_model(packed, lora(target_modules=["embed_tokens"], use_dora=True))


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_gemma3, lambda: tiny_llama(tied=True), lambda: tiny_llama(bias=True)])
def test_merged_models_of_other_kinds(make, tmp_path):
    """Transposed layers, scaled embeddings, tied ends, biases."""
    save_float(make(), tmp_path / "float")
    config = MPQConfig(bits=4, group_size=32, lm_head_bits=4, embedding_bits=4)
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=config)
    ends = ["wte"] if "GPT2" in type(packed).__name__ else ["embed_tokens"]
    targets = [n for n, m in packed.named_modules() if isinstance(m, torch.nn.Linear)] + ends
    model = peft.get_peft_model(packed, lora(target_modules=[t for t in targets if not t.endswith("lm_head")]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.05)
    expected = logits(model)
    merged = hf_onebit.merge_and_dequantize(model)
    assert not packed_layers(merged)
    torch.testing.assert_close(logits(merged), expected, rtol=2e-3, atol=2e-4)
    merged.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert [type(m).__name__ for m in again.modules()] == [type(m).__name__ for m in merged.modules()]
    torch.testing.assert_close(logits(again), logits(merged))


def test_prepare_model_for_training(folder):
    packed = AutoModelForCausalLM.from_pretrained(folder / "onebit", dtype=torch.bfloat16)
    dtypes = {name: p.dtype for name, p in packed.named_parameters()}
    assert hf_onebit.prepare_model_for_training(packed) is packed
    assert not any(p.requires_grad for p in packed.parameters())
    assert {name: p.dtype for name, p in packed.named_parameters()} == dtypes
    model = peft.get_peft_model(packed, lora()).train()
    losses = train(model)
    assert losses[-1] < losses[0] - 0.05
    with pytest.raises(ValueError, match="without packed layers"):
        hf_onebit.prepare_model_for_training(tiny_llama())
    packed.supports_gradient_checkpointing = False
    with pytest.raises(ValueError, match="has no activation checkpointing"):
        hf_onebit.prepare_model_for_training(packed)


@pytest.mark.parametrize("base", BASES)
def test_checkpointing_gives_the_same_gradients(base, folder):
    found = []
    for kwargs in (None, {"use_reentrant": False}, {"use_reentrant": True}):
        packed = AutoModelForCausalLM.from_pretrained(folder / base)
        hf_onebit.prepare_model_for_training(
            packed, gradient_checkpointing=kwargs is not None, gradient_checkpointing_kwargs=kwargs
        )
        torch.manual_seed(0)
        model = peft.get_peft_model(packed, lora(init_lora_weights=False)).train()
        ids = tiny_ids()
        model(input_ids=ids, labels=ids).loss.backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("base", BASES)
def test_adapters_and_scales_together(base, folder, tmp_path):
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(folder / base), lora())
    hf_onebit.train_scales(model)
    adapters = [p for n, p in model.named_parameters() if "lora_" in n]
    groups = [{"params": adapters, "lr": 1e-2}, *hf_onebit.scale_groups(model, 1e-2)]
    optimizer, ids, losses = torch.optim.AdamW(groups), tiny_ids(), []
    for _ in range(6):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.05
    model.save_pretrained(tmp_path)
    hf_onebit.save_scales(model, tmp_path)
    hf_onebit.freeze_scales(model)
    expected = logits(model)
    fresh = AutoModelForCausalLM.from_pretrained(folder / base)
    hf_onebit.load_scales(fresh, tmp_path)
    again = peft.PeftModel.from_pretrained(fresh, tmp_path)
    torch.testing.assert_close(logits(again), expected, rtol=0, atol=0)


def test_a_float_base_is_as_before():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for config in (REFUSED["loha"](), lora(init_lora_weights="pissa"), WORK["shira"]()):
            model = peft.get_peft_model(tiny_llama(), config)
            train(model)
            expected = logits(model)
            torch.testing.assert_close(logits(model.merge_and_unload()), expected, rtol=1e-3, atol=1e-4)

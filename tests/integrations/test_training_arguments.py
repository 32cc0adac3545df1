"""Wrong input of what makes models ready to train, merges adapters and starts them: refused by the argument's name."""

import pytest
import torch
from tiny import tiny_llama

peft = pytest.importorskip("peft")

import hf_onebit  # noqa: E402  after the skip
from hf_onebit import MPQConfig, MPQQuantizer  # noqa: E402
from hf_onebit.nn import full_state_dict, ignore_in_ddp, prepare_for_fsdp  # noqa: E402

KINDS = "expected some of a, b, scales, zeros in a list"
NAN = float("nan")


@pytest.fixture(scope="module")
def packed():
    return MPQQuantizer(MPQConfig(bits=4, group_size=32)).quantize_model(tiny_llama())


def adapted(config):
    model = MPQQuantizer(MPQConfig(bits=4, group_size=32)).quantize_model(tiny_llama())
    return peft.get_peft_model(model, config)


@pytest.fixture(scope="module")
def lora():
    return adapted(peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))


def snapshot(model):
    return {name: (p.data.clone(), p.dtype, p.requires_grad) for name, p in model.named_parameters()}


def require_same(model, before):
    after = snapshot(model)
    assert after.keys() == before.keys()
    for name, (values, dtype, learns) in after.items():
        assert torch.equal(values, before[name][0]), name
        assert (dtype, learns) == before[name][1:], name


PACKED = [
    ("prepare_model_for_training", {"scales": "scales"}, f"got scales='scales', {KINDS}"),
    ("prepare_model_for_training", {"scales": ["q"]}, rf"got scales=\['q'\], {KINDS}"),
    ("prepare_model_for_training", {"scales": 3}, f"got scales=3, {KINDS}"),
    ("prepare_model_for_training", {"scales": ["a"]}, "found no a in LlamaForCausalLM"),
    (
        "prepare_model_for_training",
        {"gradient_checkpointing": "yes"},
        "got gradient_checkpointing='yes', expected True",
    ),
    ("prepare_model_for_training", {"gradient_checkpointing": None}, "got gradient_checkpointing=None, expected True"),
    ("prepare_model_for_training", {"gradient_checkpointing_kwargs": True}, "got .*kwargs=True, expected None or"),
    (
        "prepare_model_for_training",
        {"gradient_checkpointing_kwargs": {"reentrant": 1}},
        "got .* with 'reentrant', expected",
    ),
    *(("train_scales", {"names": names}, f"got names=.*{KINDS}") for names in ("scales", [], 3, [3], [["a"]], ["q"])),
    ("train_scales", {"names": torch.ones(2)}, f"got names=.*{KINDS}"),
    *(("scale_groups", {"lr": lr}, "got lr=.*expected a positive number") for lr in ("a", 0, -1, NAN, None, True, [1])),
    ("scale_groups", {"lr": 1e-3, "params": []}, "got params: it finds the scales"),
    ("scale_groups", {"lr": 1e-3, "weight_decay": -1}, "got weight_decay=-1, expected a finite number >= 0"),
]


@pytest.mark.parametrize(("name", "options", "message"), PACKED)
def test_wrong_options_of_a_packed_model(packed, name, options, message):
    before = snapshot(packed)
    with pytest.raises(ValueError, match=rf"^{name} {message}"):
        getattr(hf_onebit, name)(packed, **options)
    require_same(packed, before)


ADAPTED = [
    *(
        (name, {"adapter_names": names}, "got adapter_names=.*expected None .* or a list of some of default")
        for name in ("merge_and_dequantize", "merge_and_requantize")
        for names in (["q"], "default", 3, [], [3])
    ),
    *(
        ("merge_and_dequantize", {"dtype": dtype}, "got dtype=.*expected None or like torch.bfloat16")
        for dtype in ("float32", torch.int8, 3)
    ),
    *(
        ("merge_and_requantize", {"max_lost": value}, "got max_lost=.*expected a finite number >= 0")
        for value in (-1, "a", NAN, None)
    ),
    *(("merge_and_requantize", {"force": force}, "got force=.*expected True or False") for force in ("yes", 1, None)),
]


@pytest.mark.parametrize(("name", "options", "message"), ADAPTED)
def test_wrong_options_of_a_merge(lora, name, options, message):
    before = snapshot(lora)
    with pytest.raises(ValueError, match=rf"^{name} {message}"):
        getattr(hf_onebit, name)(lora, **options)
    require_same(lora, before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"float_weights": 3}, "got float_weights=3, expected the float model"),
        ({"float_weights": None}, "got float_weights=None, expected the float model"),
        ({"adapter_name": 3}, "got adapter_name=3, expected a name"),
        ({"batches": 3}, "got batches=3, expected None or an iterable"),
        ({"batches": {"input_ids": torch.ones(1, 4)}}, "got batches={'input_ids'.*expected None or an iterable"),
        ({"batches": torch.ones(1, 4)}, "got batches=a tensor .*expected None or an iterable"),
        ({"batches": [torch.ones(1, 4)]}, r"got batches\[0\]=a tensor .*expected None or an iterable"),
    ],
)
def test_wrong_arguments_of_the_residual_start(lora, arguments, message):
    before = snapshot(lora)
    with pytest.raises(TypeError, match=rf"(?s)^init_from_residual {message}"):
        hf_onebit.init_from_residual(lora, **{"float_weights": tiny_llama(), **arguments})
    require_same(lora, before)


def test_adapters_that_cannot_start_at_a_residual():
    other = adapted(peft.AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="found no LoRA adapter 'default'"):
        hf_onebit.init_from_residual(other, tiny_llama())
    for alpha in (0, -8):
        model = adapted(peft.LoraConfig(r=4, lora_alpha=alpha, target_modules=["q_proj"]))
        before = snapshot(model)
        with pytest.raises(ValueError, match=r"q_proj scales its adapter by -?\d.*expected a finite number > 0"):
            hf_onebit.init_from_residual(model, tiny_llama())
        require_same(model, before)


def test_what_is_no_model(tmp_path):
    calls = {
        "prepare_model_for_training": hf_onebit.prepare_model_for_training,
        "train_scales": hf_onebit.train_scales,
        "freeze_scales": hf_onebit.freeze_scales,
        "scale_groups": lambda model: hf_onebit.scale_groups(model, 1e-3),
        "save_scales": lambda model: hf_onebit.save_scales(model, tmp_path / "made"),
        "load_scales": lambda model: hf_onebit.load_scales(model, tmp_path),
        "merge_and_dequantize": hf_onebit.merge_and_dequantize,
        "merge_and_requantize": hf_onebit.merge_and_requantize,
        "init_from_residual": lambda model: hf_onebit.init_from_residual(model, torch.nn.Linear(2, 2)),
        "prepare_for_fsdp": prepare_for_fsdp,
        "full_state_dict": full_state_dict,
        "ignore_in_ddp": ignore_in_ddp,
    }
    for name, call in calls.items():
        for wrong in (None, 3, {}):
            with pytest.raises(TypeError, match=rf"^{name} got model={wrong}, expected a torch module$"):
                call(wrong)
        with pytest.raises(TypeError, match=rf"^{name} got model='folder', .*: give the model that from_pretrained"):
            call("folder")
    assert not (tmp_path / "made").exists()


def test_folders_that_are_none(packed):
    for name in ("save_scales", "load_scales"):
        for wrong in (3, None, ["a"]):
            with pytest.raises(TypeError, match=f"^{name} got folder=.*expected the path of a folder"):
                getattr(hf_onebit, name)(packed, wrong)

"""Whole models on a CUDA device: the tokens of the CPU, a training step, compiled decoding, memory."""

import copy
import warnings

import pytest
import torch
from tiny import tiny_gpt2, tiny_gpt_oss, tiny_ids, tiny_llama, tiny_llama_ragged, tiny_qwen3_moe
from transformers import AutoModelForCausalLM

from hf_onebit import OneBitConfig, OneBitQuantizer, doctor, ops
from hf_onebit.nn import MPQLinear, OneBitLinear, grouped_experts
from hf_onebit.ops import gpu, gpu_examination

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
STEPS = 24


@pytest.fixture(autouse=True)
def _kernels_answer():
    """Nothing refused afterwards, or these tests would examine the reference."""
    assert ops.backends()["gpu"].startswith("in use"), ops.backends()["gpu"]
    yield
    refused = {key: why for key, why in gpu._examined.items() if why}
    assert not refused, refused


def packed(make, **options):
    return OneBitQuantizer(OneBitConfig(**options)).quantize_model(make()).eval()


def generate(model, ids, **options):
    options |= {"min_new_tokens": STEPS, "max_new_tokens": STEPS, "do_sample": False, "pad_token_id": 0}
    return model.generate(ids.to(model.device), **options).cpu()


@pytest.mark.parametrize("options", [{}, {"planes": 2}, {"lm_head_bits": 4, "embedding_bits": 8}], ids=str)
@pytest.mark.parametrize("make", [tiny_llama, tiny_llama_ragged, tiny_gpt2])
def test_generates_what_the_cpu_generates(make, options):
    model = packed(make, **options)
    ids = tiny_ids(rows=2)
    with torch.no_grad():
        expected, logits = generate(model, ids), model(ids).logits
        model.to("cuda")
        torch.testing.assert_close(model(ids.cuda()).logits.cpu(), logits, rtol=1e-3, atol=1e-4)
        assert torch.equal(generate(model, ids), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_logits_of_half_precision(dtype):
    model = packed(tiny_llama, lm_head_bits=4)
    ids = tiny_ids(rows=2)
    with torch.no_grad():
        exact = model(ids).logits
        half = model.to("cuda", dtype)(ids.cuda()).logits.cpu()
    assert half.dtype == dtype
    assert torch.nn.functional.cosine_similarity(half.float(), exact, dim=-1).min() > 0.99


def test_modules_on_the_device():
    for layer in (OneBitLinear(72, 40, planes=2), MPQLinear(72, 40, bits=3, group_size=32, symmetric=False)):
        x = torch.randn(4, 3, 72)
        with torch.no_grad():
            expected = layer(x)
            moved = copy.deepcopy(layer).cuda()
            torch.testing.assert_close(moved(x.cuda()).cpu(), expected, rtol=1e-5, atol=1e-5)
            with torch.autocast("cuda", torch.bfloat16):
                y = moved(x.cuda())
        assert y.dtype == torch.bfloat16
        torch.testing.assert_close(y.cpu().float(), expected, rtol=3e-2, atol=3e-2)


def test_a_training_step_as_on_the_cpu():
    """Scales and the norms that stay float learn on both devices alike."""
    ids = tiny_ids(rows=2)
    trained = []
    for device in ("cpu", "cuda"):
        model = packed(tiny_llama, planes=2).to(device)
        for layer in model.modules():
            if isinstance(layer, OneBitLinear):
                for name in layer.scale_names:
                    scale = getattr(layer, name)
                    scale.data = scale.data.float()
                    scale.requires_grad_(True)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        losses = []
        for _ in range(3):
            optimizer.zero_grad()
            loss = model(input_ids=ids.to(device), labels=ids.to(device)).loss
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        trained.append((losses, {n: p.detach().cpu() for n, p in model.named_parameters()}))
    (cpu_losses, cpu), (gpu_losses, on_gpu) = trained
    assert cpu_losses[-1] < cpu_losses[0]
    torch.testing.assert_close(torch.tensor(gpu_losses), torch.tensor(cpu_losses), rtol=1e-4, atol=1e-4)
    for name, value in cpu.items():
        torch.testing.assert_close(on_gpu[name], value, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("make", [tiny_qwen3_moe, tiny_gpt_oss])
def test_experts_in_a_few_launches(make, monkeypatch):
    """As one by one, and without waiting for the device."""
    model = packed(make).to("cuda")
    ids = tiny_ids(rows=2).cuda()
    with torch.no_grad():
        grouped = model(ids).logits
        assert gpu._examined[("cuda:0", "experts dtype=torch.float32 method=onebit bits=1 zeros=False")] == ""
        monkeypatch.setattr(grouped_experts, "suits", lambda *_: False)
        torch.testing.assert_close(grouped, model(ids).logits, rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_a_model_on_two_devices_gives_what_it_gives_on_one(tmp_path):
    """By accelerate's device_map: half of the blocks on each."""
    import hf_onebit

    model = OneBitQuantizer(OneBitConfig()).quantize_model(tiny_llama())
    hf_onebit.save(model, tmp_path / "packed")
    places = {"model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": 1, "model.norm": 1, "lm_head": 1}
    places["model.rotary_emb"] = 0
    one, two = (AutoModelForCausalLM.from_pretrained(tmp_path / "packed", device_map=m) for m in ({"": 0}, places))
    assert {p.device.index for p in two.parameters()} == {0, 1}
    ids = tiny_ids(rows=2).cuda()
    with torch.no_grad():
        torch.testing.assert_close(two(ids).logits.to(0), one(ids).logits, rtol=1e-3, atol=1e-4)
        assert torch.equal(generate(two, ids), generate(one, ids))


def test_decoding_compiled_with_a_static_cache():
    model = packed(tiny_llama).to("cuda")
    ids = tiny_ids(rows=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the compiler's own
        expected = generate(model, ids)
        assert torch.equal(generate(model, ids, cache_implementation="static"), expected)


def test_a_packed_model_takes_the_memory_of_its_file():
    model = packed(lambda: tiny_llama(hidden=512, intermediate=1024))
    size = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    model.to("cuda")
    held = torch.cuda.memory_allocated() - before
    assert held <= size + 512 * len(list(model.parameters())) + (1 << 16)


def test_doctor_examines_the_device():
    report = doctor.examine()
    devices = {test["device"] for test in report["self_test"]}
    assert "cuda:0" in devices
    assert all(test["ok"] for test in report["self_test"]), report["self_test"]
    examined = {test["op"] for test in report["self_test"] if test["device"] == "cuda:0"}
    kinds = {"onebit", "mpq", "g_idx", "embedding", "codes", "update", "experts"}
    assert examined == {"onebit_linear", *(f"kernel {kind}" for kind in kinds)}
    assert set(gpu_examination.EXAMINATIONS) == kinds
    for kind in ("onebit", "mpq", "g_idx", "embedding", "experts"):
        about = " ".join(test["about"] for test in report["self_test"] if test["op"] == f"kernel {kind}")
        assert all(f"dtype={dtype}" in about for dtype in ("float16", "bfloat16", "float32")), about

"""What only a card can show: the operator, tuning, sparse tensor cores, a model from its checkpoint to its tokens."""

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM

import armor.hf  # noqa: F401
from armor.config.training import TuneJob, TuneSettings
from armor.core import blockdiag
from armor.core.packing import unpack
from armor.core.quantization import LIMITS
from armor.runtime import cuda
from armor.runtime.linear import ArmorLinear
from armor.training.tune import tune
from tests.linears import product_within, random_linear, stored, twin
from tests.packed import opened
from tests.training.trained import TRAINING, ready, refined, sample

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device", allow_module_level=True)
pytest.importorskip("armor.runtime.kernels", reason="needs Triton", exc_type=ImportError)

DTYPES = [torch.bfloat16, torch.float16, torch.float32]


def on_card(*shape_and_dtype):
    return [t.cuda() if isinstance(t, torch.Tensor) else t for t in random_linear(*shape_and_dtype)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 5, 8])
def test_a_tuned_linear_is_its_twin_within_rounding(dtype, rows):
    *operands, group = on_card(1024, 2048, 64, 128, "2:4", dtype)
    x = torch.randn(rows, 2048, device="cuda").to(dtype)
    expected, bound = twin(x, *operands, group)
    for _ in range(20):  # the last program of a block is another one each time
        assert ((cuda.linear(x, *operands, group=group).double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("core", LIMITS)
def test_a_linear_of_integers_stays_packed_and_is_its_twin_within_rounding(core, dtype):
    if core == "fp8" and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("no fp8 on this card")
    factors, bias = stored(1024, 2048, 64, 128, "2:4", core, "int8", 128, dtype)
    factors = factors.to("cuda")
    linear, exact = ArmorLinear.of(factors, bias.cuda()), factors.in_floats()
    assert linear.runs_packed
    for rows in (1, 5, 8, 9, 100, 1000):
        x = torch.randn(rows, 2048, device="cuda").to(dtype).requires_grad_()
        expected, bound = product_within(x.detach(), exact.core, exact.left, exact.right, bias.cuda())
        bound = bound + 2.0**-12 * expected.abs().amax()  # a card may round inside its own float32 products
        with torch.no_grad():
            assert all(((linear(x).double() - expected).abs() <= bound).all() for _ in range(5)), f"{rows} rows"
    (found,) = torch.autograd.grad(linear(x).sum(), x)
    torch.testing.assert_close(found[0].float(), factors.reconstruct().sum(0), rtol=0.02, atol=0.02)
    compiled = torch.compile(linear, fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), linear(x))


def test_the_operator_compiles_whole_and_under_inference_mode():
    *operands, group = on_card(64, 128, 32, 64, "2:4", torch.bfloat16)
    x = torch.randn(3, 128, device="cuda").bfloat16()
    torch.library.opcheck(torch.ops.armor.cuda_linear, (x, *operands, group))

    def function(x):
        return cuda.linear(x, *operands, group=group) if cuda.supports(x, *operands, group=group) else x

    with torch.inference_mode():
        expected = function(x)
        assert expected.shape == (3, 64)
        torch.testing.assert_close(torch.compile(function, fullgraph=True)(x), expected)


def test_gradients_reach_the_input_and_the_bias():
    values, bits, left, right, bias, group = on_card(64, 128, 32, 64, "2:4", torch.float32)
    x, bias = torch.randn(2, 3, 128, device="cuda", requires_grad=True), bias.requires_grad_()
    found = torch.autograd.grad(cuda.linear(x, values, bits, left, right, bias, group=group).square().sum(), (x, bias))
    y = blockdiag.multiply(left, blockdiag.multiply(right, x) @ unpack(values, bits, 128)[0].T) + bias
    torch.testing.assert_close(found, torch.autograd.grad(y.square().sum(), (x, bias)), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [9, 16, 100, 8192])
def test_a_two_four_core_on_sparse_tensor_cores_is_the_dense_one(dtype, rows):
    values, bits, *_, group = on_card(256, 512, None, None, "2:4", dtype)
    values[:, ::3] = 0  # a kept value may be zero
    x = torch.randn(rows, 512, device="cuda").to(dtype)
    expected = F.linear(x, unpack(values, bits, 512)[0])
    torch.testing.assert_close(cuda.linear(x, values, bits, group=group), expected, rtol=2e-2, atol=2e-2)
    core = cuda._semi_structured(x, values, bits, group)
    if core is None:
        pytest.skip("torch has no library for 2:4 on this card, or only one that pays for more rows")
    torch.testing.assert_close(F.linear(x, core), expected, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_model_stays_packed_on_the_card_and_gives_the_tokens_of_the_cpu(root, dtype):
    prompt = torch.arange(1, 13).view(1, 12)
    options = {"max_new_tokens": 8, "do_sample": False, "output_logits": True, "return_dict_in_generate": True}
    models = [
        AutoModelForCausalLM.from_pretrained(root / "checkpoint", dtype=kind, device_map=device).eval()
        for kind, device in ((torch.float32, "cpu"), (dtype, "cuda"))
    ]
    linears = [module for module in models[1].modules() if isinstance(module, ArmorLinear)]
    assert linears and all(module.runs_packed and not module.is_unpacked for module in linears)
    on_cpu, on_gpu = (m.generate(prompt.to(m.device), **options) for m in models)
    tolerance = {torch.bfloat16: 5e-2, torch.float16: 5e-3, torch.float32: 1e-3}[dtype]
    expected, found = on_cpu.logits[0], on_gpu.logits[0].float().cpu()
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()
    if dtype == torch.float32:
        assert torch.equal(on_gpu.sequences.cpu(), on_cpu.sequences)


def test_training_on_the_card_is_as_on_the_host(tmp_path):
    root = ready(tmp_path)
    for inputs in ("dense", "compressed"):
        there, here = (
            [refined(root, layer, tmp_path / inputs / device[:4], device=device, inputs=inputs) for layer in range(2)]
            for device in ("cuda:0", "cpu")
        )
        for one, other in zip(there, here, strict=True):
            assert one.training[-1].kept > 0
            assert one.training[-1].loss == pytest.approx(other.training[-1].loss, rel=0.02)
    job = TuneJob(tune=TuneSettings(**TRAINING | {"rate": 3e-3}), sample=sample(root))
    calibration = root / "calibration/calibration.json"
    one, other = (
        tune(*opened(root), root / "layers", calibration, job, root / f"{device[:4]}.json", device).training
        for device in ("cuda:0", "cpu")
    )
    assert one.kept > 0 and one.loss == pytest.approx(other.loss, rel=0.02)

"""The CUDA backend as far as a machine without a card can show it; what a card must show is in tests/gpu."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from armor.core.packing import pack
from armor.core.pattern import Pattern, top_n_mask
from armor.format.checkpoint import PackedLinear
from armor.runtime import cuda
from armor.runtime.linear import ArmorLinear
from tests.killed import REPOSITORY as ROOT
from tests.linears import stored

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed")
FLOATS = ("x", "bias", "y", "z", "dense")
NUMBERS = ("values", "left", "matrices")
SCALES = ("scales", "left_scales")
OF_PARTS = {  # what comes as tuples
    "blocks": ("matrices", "scales"),
    "core": ("inputs", "starts", "values", "bits", "scales", "left", "left_scales", "bias"),
}


@needs_triton
def test_the_kernels_compute_the_linear_in_tritons_interpreter():
    """tests/gpu/test_kernels.py in a process of its own: Triton reads the variable when it is imported.

    It interprets every operation of a kernel. Compiled alone, a kernel would not show what it computes.
    """
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-ra", "tests/gpu/test_kernels.py"]
    ran = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0 and "skipped" not in ran.stdout.lower(), ran.stdout + ran.stderr


@needs_triton
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="Triton interprets, it does not compile")
@pytest.mark.parametrize(
    ("name", "numbers", "parts", "capabilities"),
    [
        ("blocks", "bf16", 1, (80, 120)),
        ("core", "bf16", 3, (80, 90, 120)),
        ("unpack", "bf16", 1, (90,)),
        ("blocks", "i8", 3, (120,)),
        ("core", "u8", 2, (80,)),
        ("product", "i8", 1, (80, 120)),
        ("product", "fp8e4nv", 1, (89,)),
    ],
)
def test_the_kernels_compile_for_cards_that_are_not_here(name, numbers, parts, capabilities, tmp_path, monkeypatch):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from armor.runtime import kernels

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    function = kernels.unpack if name == "unpack" else getattr(kernels, name).fn  # the others are tuned
    pointers = dict.fromkeys(FLOATS, "*bf16") | {"bits": "*u8", "places": "*i32", "finished": "*i32"}
    blocks = "i8" if numbers == "fp8e4nv" else numbers
    pointers |= dict.fromkeys(NUMBERS, f"*{blocks}") | ({} if numbers == "bf16" else dict.fromkeys(SCALES, "*bf16"))
    pointers["values"] = f"*{numbers}"
    constants = {"KEPT": 4, "ROWS": 16 if name == "product" else 2, "TILE": 32 if name == "product" else 8, "STEP": 32}
    constants["FORM"] = ""
    constants |= {key: None for key in SCALES if key not in pointers}
    constants = {key: value for key, value in constants.items() if key in function.arg_names}
    signature = {key: "constexpr" if key in constants else pointers.get(key, "i32") for key in function.arg_names}
    values = {(function.arg_names.index(key),): value for key, value in constants.items()}
    for key in OF_PARTS.get(name, ()):
        place, signature[key] = function.arg_names.index(key), (signature[key],) * parts
        if key in constants:
            values |= {(place, part): values[place,] for part in range(parts)}
            del values[place,]
    source = ASTSource(function, signature, values)
    for capability in capabilities:
        assert compile(source, target=GPUTarget("cuda", capability, 32)).asm["cubin"]


@pytest.mark.parametrize(("shape", "dtype"), [((96, 128), torch.bfloat16), ((160, 64), torch.float16)], ids=str)
def test_cutlass_reads_the_packed_values_with_the_mask_in_its_order(shape, dtype):
    generator = torch.Generator().manual_seed(shape[0])
    mask = top_n_mask(torch.rand(shape, generator=generator), Pattern(2, 4))
    core = torch.randn(shape, generator=generator).to(dtype) * mask
    values, bits = pack(core, mask)
    expected_values, expected_mask = sparse_semi_structured_from_dense_cutlass(core)
    found = cuda._cutlass_mask(bits)
    assert torch.equal(values, expected_values) and torch.equal(found, expected_mask)
    values[:, ::2] = 0  # torch cannot tell a kept zero from a zero: the mask can
    expected = torch.zeros(shape, dtype=dtype).masked_scatter(mask, values)
    assert torch.equal(sparse_semi_structured_to_dense_cutlass(values, found), expected)


@pytest.fixture
def pretend(monkeypatch):
    """Pretend that there are cards of these compute capabilities: torch's answers stand in for the hardware."""

    def pretend(*capabilities):
        def index(device):
            return (torch.device(device).index or 0) if not isinstance(device, int) else device

        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capabilities[index(device)])
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "an old card")

    forget()
    yield pretend
    forget()


def forget():
    """Nothing was asked of a card, and nothing said of it."""
    for function in (cuda._kernels, cuda._is_able, cuda._sparse_library, cuda._say_once):
        function.cache_clear()


@needs_triton
@pytest.mark.parametrize(
    ("pattern", "core", "group", "is_packed"),
    [
        ("2:4", "int8", 32, True),
        ("2:4", "fp8", 16, True),
        ("3:4", "int8", 96, True),  # the whole row
        ("3:4", "int4", 32, False),
        ("2:4", "int8", 24, False),
        ("50%", "int8", 96, False),
    ],
)
def test_a_linear_of_integers_runs_packed_on_a_card_where_the_kernels_can(pattern, core, group, is_packed, pretend):
    pretend((9, 0))
    factors, _ = stored(16, 96, 8, 12, pattern, core, "int8", group, torch.bfloat16)
    with torch.no_grad(), FakeTensorMode():
        linear = ArmorLinear(PackedLinear.of(factors), True, device="cuda:0", dtype=torch.bfloat16)
        assert linear.runs_packed == is_packed
        if is_packed:
            y = linear(torch.empty(2, 3, 96, device="cuda:0", dtype=torch.bfloat16))
            assert y.shape == (2, 3, 16) and y.device == torch.device("cuda:0") and y.dtype == torch.bfloat16
        pretend((8, 0))
        assert linear.runs_packed == (is_packed and core != "fp8")
        linear.bias = torch.nn.Parameter(torch.empty(16, dtype=torch.bfloat16, device="cpu"))
        assert not linear.runs_packed


WITHOUT_TRITON = """
import torch
from armor.runtime import cuda
torch.cuda.get_device_capability = lambda index: (8, 6)
assert not any(cuda.available(index) for index in (0, 1, 0))
"""


def test_missing_triton_is_said_once(tmp_path):
    (tmp_path / "triton.py").write_text("raise ImportError('not installed')")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (tmp_path, ROOT)))}
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("pip install triton") == 1

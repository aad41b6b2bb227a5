import copy

import pytest
import torch
import torch.nn.functional as F

from armor.core import blockdiag
from armor.core.factorization import Factorization
from armor.core.pattern import Pattern, top_n_mask
from armor.runtime.linear import ArmorLinear

# pattern, out, in, left block, right block, rank
LAYOUTS = [
    ("2:4", 24, 32, 8, 16),
    ("2:4", 5, 8, None, None),
    ("4:8", 8, 40, 8, None),
    ("3:6", 10, 18, 5, 6),
    ("50%", 9, 15, 3, 5),
    ("2:4", 12, 16, None, None, 3),
    ("2:4", 6, 8, 3, 4, 1),
]


def factorization(pattern, rows, columns, left, right, rank=0, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    pattern = Pattern.parse(pattern)
    mask = top_n_mask(torch.rand(rows, columns, generator=g), pattern)
    core = torch.randn(rows, columns, generator=g).to(dtype) * mask
    blocks = [d and torch.randn(n // d, d, d, generator=g).to(dtype) for n, d in ((rows, left), (columns, right))]
    shapes = {"up": (rows, rank), "down": (rank, columns)} if rank else {}
    pair = {name: torch.randn(shape, generator=g).to(dtype) for name, shape in shapes.items()}
    return Factorization(core, mask, pattern, *blocks, **pair)


def dense(factors):
    """A·S·B + U·V from the definition."""
    weight = factors.core
    if factors.left is not None:
        weight = blockdiag.expand(factors.left) @ weight
    if factors.right is not None:
        weight = weight @ blockdiag.expand(factors.right)
    if factors.up is not None:
        weight = weight + factors.up @ factors.down
    return weight


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("shape", [(1,), (3,), (2, 5), (0,)], ids=str)
@pytest.mark.parametrize("unpacked", [False, True], ids=["packed", "unpacked"])
def test_it_computes_what_the_dense_linear_does(layout, shape, unpacked):
    factors, bias = factorization(*layout), torch.randn(layout[1])
    layer = ArmorLinear.of(factors, bias)
    if unpacked:
        layer.unpack()
    x = torch.randn(*shape, layout[2])
    expected = F.linear(x, dense(factors), bias)
    y = layer(x)
    assert torch.allclose(y, expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        assert torch.equal(layer(x), y), "made ready once, it is the same"
    assert torch.allclose(layer.dense_weight(), dense(factors), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_the_state_is_always_the_packed_tensors(layout):
    factors = factorization(*layout)
    layer = ArmorLinear.of(factors)
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    assert before.keys() == factors.tensors().keys()
    assert {n: tuple(t.shape) for n, t in before.items()} == layer.layout.shapes()
    layer.unpack()
    assert layer.core_values is None and torch.equal(layer.core, factors.core)
    after = layer.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in before)
    assert all(torch.equal(before[n], t) for n, t in layer.pack().state_dict().items())
    assert not layer.is_unpacked


def test_weights_are_loaded_into_an_unpacked_layer_and_change_their_dtype():
    layer = ArmorLinear.of(factorization(*LAYOUTS[0]), torch.randn(24)).unpack()
    other = ArmorLinear.of(factorization(*LAYOUTS[0], seed=1), torch.randn(24))
    layer.load_state_dict(other.state_dict())
    x = torch.randn(3, 32)
    assert torch.allclose(layer(x), other(x), rtol=1e-4, atol=1e-4)
    for held in (layer, other):
        twin = copy.deepcopy(held).to(torch.bfloat16)
        assert {n: t.dtype for n, t in twin.state_dict().items() if t.dtype != torch.bfloat16} == {
            "core_mask": torch.uint8
        }
        assert torch.allclose(twin(x.bfloat16()).float(), other(x), rtol=0.1, atol=0.5)
    with pytest.raises(RuntimeError, match="core_values"):
        layer.load_state_dict({})


@pytest.mark.parametrize("unpacked", [False, True])
def test_gradients_reach_the_input_and_not_the_factors(unpacked):
    factors = factorization(*LAYOUTS[0])
    layer = ArmorLinear.of(factors, torch.zeros(24))
    if unpacked:
        layer.unpack()
    x = torch.randn(3, 32, requires_grad=True)
    layer(x).sum().backward()
    assert torch.allclose(x.grad, dense(factors).sum(0).expand(3, -1), rtol=1e-4, atol=1e-4)
    assert all(not p.requires_grad and p.grad is None for n, p in layer.named_parameters() if n != "bias")


@pytest.mark.parametrize("layout", [LAYOUTS[0], LAYOUTS[-1]], ids=str)
@pytest.mark.parametrize("unpacked", [False, True])
def test_it_compiles_as_one_graph(layout, unpacked):
    layer = ArmorLinear.of(factorization(*layout))
    if unpacked:
        layer.unpack()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")  # graph capture without a C++ compiler
    x = torch.randn(2, layout[2])
    assert torch.allclose(compiled(x), layer(x), atol=1e-5)

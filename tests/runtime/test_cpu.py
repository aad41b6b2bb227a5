"""The CPU kernel against the plain product in float64, for every level, at shapes that fit no vector."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from armor.core import blockdiag
from armor.core.packing import unpack
from armor.runtime import cpu
from armor.runtime.operator import Operands
from tests.killed import REPOSITORY
from tests.linears import random_linear, twin

needs_library = pytest.mark.skipif(not cpu.available(), reason="the CPU kernel was not built")
LEVELS = [pytest.param(i, id=name) for i, name in enumerate(cpu.LEVELS[: cpu.LEVELS.index(cpu.level()) + 1])]
DTYPES = [torch.bfloat16, torch.float32]
SHAPES = [  # out, in, left block, right block, pattern
    (64, 128, 32, 64, "2:4"),
    (36, 20, 4, 4, "2:4"),
    (100, 60, 20, 12, "2:4"),
    (7, 332, None, None, "2:4"),
    (50, 44, None, 22, "2:4"),
    (40, 1156, 40, None, "2:4"),
    (15, 10284, None, None, "2:4"),  # two rows of x do not fit into the L1 cache; no second half of the core
    (45, 10284, None, None, "2:4"),  # the same, in halves of 32 and 13 rows
    (40, 48, 8, 16, "4:8"),
    (30, 36, 5, 9, "1:3"),
    (33, 100, 11, 20, "50%"),
    (70, 64, 35, 64, "1:4"),
]
ROWS = [*range(1, 18), 20, 24, 28, 33, 70]  # 17 to 70: 1, 4, 8, 12, 1 and 6 rows behind panels of 16


def packed(*shape, **bias):
    return Operands(*random_linear(*shape, **bias))


@needs_library
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_the_linear_is_its_twin_within_rounding(shape, dtype, level):
    operands = random_linear(*shape, dtype, bias=shape[0] % 4 == 0)
    for rows in ROWS:
        x = torch.randn(rows, shape[1]).to(dtype)
        y = cpu.multiply(x, Operands(*operands), level)
        expected, bound = twin(x, *operands)
        assert y.dtype == dtype and ((y.double() - expected).abs() <= bound).all(), f"{rows} rows"


@needs_library
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_linears_in_one_call_give_the_bits_of_separate_calls(dtype, level):
    """With B shared, of its own, absent and odd; apart, side by side, and for groups of rows of their own."""
    shared = packed(64, 300, 16, 60, "2:4", dtype)
    second = packed(36, 300, None, 60, "2:4", dtype, bias=False)
    groups = [
        [shared, second._replace(right=shared.right), packed(44, 300, 4, 20, "2:4", dtype)],
        [packed(64, 300, 32, None, "2:4", dtype), packed(36, 300, None, None, "50%", dtype), shared],
    ]
    for group, rows in ((group, rows) for group in groups for rows in (1, 3, 12, 70, 772)):
        x = torch.randn(rows, 300).to(dtype)
        expected = [cpu.multiply(x, own, level) for own in group]
        table = cpu.Table(group, 300)
        for found in with_threads(lambda x=x, table=table: table.apart(x, level)):
            assert all(map(torch.equal, found, expected)), rows
        assert torch.equal(table.side_by_side(x, level), torch.cat(expected, dim=-1)), rows
    if not cpu.is_grouped(torch.ones(1, 8), [1]):
        return
    pairs = [group[:2] for group in groups]
    tables = [[cpu.Table([linear], 300) for linear in pair] for pair in pairs]
    for counts in ([1, 1], [9, 300], [0, 17]):
        x = torch.randn(sum(counts), 300).to(dtype)
        rows = list(zip(x.split(counts), pairs, strict=True))
        expected = [torch.cat([cpu.multiply(r, pair[i], level) for r, pair in rows]) for i in (0, 1)]
        for found in with_threads(lambda x=x, counts=counts: cpu.grouped(x, counts, tables, level)):
            assert all(map(torch.equal, found, expected)), counts


@needs_library
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_unpack_is_exact(shape, dtype, level):
    values, bits, *_ = random_linear(*shape, dtype)
    assert torch.equal(cpu.unpack(values, bits, shape[1], level), unpack(values, bits, shape[1])[0])


def with_threads(multiply):
    """What `multiply` returns with one thread, two and five."""
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(multiply())
    finally:
        torch.set_num_threads(before)
    return results


@needs_library
@pytest.mark.parametrize("has_tiles", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 31, 32, 773])  # of which the last are multiplied in several turns
def test_the_linear_is_near_its_twin_and_threads_change_no_bit_of_the_c_loops(monkeypatch, rows, dtype, has_tiles):
    """Where torch multiplies many rows, as on processors with AMX, and where it does not."""
    monkeypatch.setattr(cpu, "_has_tiles", has_tiles)
    operands = random_linear(512, 1024, 64, 128, "2:4", dtype)
    x = torch.randn(rows, 1024).to(dtype)
    expected, bound = twin(x, *operands)
    first, *others = results = with_threads(lambda: cpu.linear(x, *operands[:-1], group=operands[-1]))
    assert all(((y.double() - expected).abs() <= bound).all() for y in results)
    assert not cpu.runs_in_c(x) or all(torch.equal(first, y) for y in others)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 12, 40])
def test_nan_and_infinity_stay_in_their_row(monkeypatch, rows, dtype):
    monkeypatch.setattr(cpu, "_has_tiles", True)
    operands = random_linear(36, 20, 4, 4, "2:4", dtype)
    for value in (torch.nan, torch.inf):
        x = torch.zeros(rows, 20, dtype=dtype)
        x[-1] = value
        y = cpu.linear(x, *operands[:-1], group=4)
        assert not y[-1].isfinite().any() and y[:-1].isfinite().all()


@needs_library
@pytest.mark.parametrize("x", [torch.randn(60), torch.randn(2, 3, 60), torch.randn(60, 5).T, torch.randn(0, 60)])
def test_any_leading_dimensions_and_strides(x):
    operands = random_linear(100, 60, 20, 12, "2:4", torch.float32)
    y = cpu.linear(x, *operands[:-1], group=4)
    torch.testing.assert_close(y, twin(x, *operands)[0].float())
    joined = cpu.Joined([Operands(*operands)] * 2, 60)
    assert torch.equal(joined(x), torch.cat([y, y], dim=-1))


@needs_library
def test_the_operator_is_one_to_torch_where_the_kernel_runs():
    *operands, group = random_linear(64, 128, 32, 64, "2:4", torch.bfloat16)
    x = torch.randn(3, 128).bfloat16()
    torch.library.opcheck(torch.ops.armor.cpu_linear, (x, *operands, group))
    assert cpu.supports(x, *operands)
    assert not cpu.supports(x.float(), *operands)
    assert not cpu.supports(x.half(), *(t.half() for t in operands))
    assert not cpu.supports(x.to("meta"), *operands)


@needs_library
def test_gradients_reach_the_input_and_the_bias():
    values, bits, left, right, bias, group = random_linear(64, 128, 32, 64, "2:4", torch.float32)
    x, bias = torch.randn(2, 3, 128, requires_grad=True), bias.requires_grad_()
    found = torch.autograd.grad(cpu.linear(x, values, bits, left, right, bias, group=group).square().sum(), (x, bias))
    y = blockdiag.multiply(left, blockdiag.multiply(right, x) @ unpack(values, bits, 128)[0].T) + bias
    torch.testing.assert_close(found, torch.autograd.grad(y.square().sum(), (x, bias)), rtol=1e-4, atol=1e-4)


@needs_library
@pytest.mark.parametrize(("name", "index"), [("mask", 1), ("left", 2), ("right", 3), ("bias", 4)])
def test_shapes_that_do_not_fit_are_refused(name, index):
    *operands, group = random_linear(64, 128, 32, 64, "2:4", torch.bfloat16)
    operands[index] = operands[index][:-1]
    with pytest.raises(ValueError, match=name):
        cpu.linear(torch.randn(3, 128).bfloat16(), *operands, group=group)


UNBUILT = """
import torch
from armor.runtime import cpu
from tests.linears import random_linear
operands = random_linear(64, 128, 32, 64, "2:4", torch.bfloat16)
assert not any(cpu.supports(torch.randn(3, 128).bfloat16(), *operands[:-1]) for _ in range(3))
"""


def test_a_missing_library_is_said_once(tmp_path):
    """In a copy of the package where nothing was built."""
    for name in ("armor", "tests"):
        shutil.copytree(REPOSITORY / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    done = subprocess.run([sys.executable, "-c", UNBUILT], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("the CPU kernel was not built") == 1 and "compiler" in done.stderr


NATIVE = sorted((Path(cpu.__file__).parent / "native").glob("*.c"))
DRIVER = Path(__file__).with_name("native_driver.c")
C11 = ("-std=c11", "-D_GNU_SOURCE", "-pthread")
SANITIZERS = ["address"] if os.environ.get("ARMOR_SANITIZERS") != "all" else ["address,undefined", "thread"]
"""`make test-native` has all of them: compiling with each takes half a minute."""


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
@pytest.mark.parametrize("sanitizers", SANITIZERS)
def test_sanitizers_find_nothing(tmp_path, sanitizers):
    """Every level on buffers of exactly their size, and masks that set too many bits; races where there are threads.

    It compiles the library anew, for the one that is built has no sanitizers, and without them a read beyond a buffer
    mostly goes unseen.
    """
    # GCC takes long to optimise what is checked, and for checks of pointers, which those of addresses hold already.
    flags = ["-O0", "-g", f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"]
    flags += ["-fno-sanitize=null,object-size,pointer-overflow"]
    subprocess.run(["cc", *C11, "-O2", "-c", DRIVER, "-o", tmp_path / "driver.o"], check=True)
    build = ["cc", *C11, *flags, *NATIVE, tmp_path / "driver.o", "-lm", "-o", tmp_path / "run"]
    if (built := subprocess.run(build, capture_output=True, text=True)).returncode:
        if "sanitize" in built.stderr or "asan" in built.stderr or "tsan" in built.stderr:
            pytest.skip("this compiler has no sanitizers")
        pytest.fail(built.stderr)
    command = [tmp_path / "run", *["threads alone"] * (sanitizers == "thread")]
    ran = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"ASAN_OPTIONS": "detect_leaks=1"})
    if "unexpected memory mapping" in ran.stderr:
        pytest.skip("this kernel's address layout is beyond the compiler's thread sanitizer")
    assert ran.returncode == 0, ran.stdout + ran.stderr

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
    """With B shared, of its own, absent and of an odd size; apart, and side by side; on one thread and more."""
    shared = packed(64, 300, 16, 60, "2:4", dtype)
    second = packed(36, 300, None, 60, "2:4", dtype, bias=False)
    groups = [
        [shared, second._replace(right=shared.right), packed(44, 300, 4, 20, "2:4", dtype)],
        [packed(33, 300, 11, None, "2:4", dtype), shared, packed(20, 300, 4, None, "50%", dtype)],
        [packed(40, 300, None, None, "2:4", dtype), packed(12, 300, 12, None, "2:4", dtype)],
        [packed(512, 300, 16, 60, "2:4", dtype), packed(20, 300, 4, None, "50%", dtype)],
        [packed(30, 300, 5, 25, "50%", dtype), packed(30, 300, 5, 60, "2:4", dtype)],
    ]
    threads = torch.get_num_threads()
    try:
        for group, rows in ((group, rows) for group in groups for rows in (1, 3, 8, 12, 17, 28, 70, 300, 772)):
            x = torch.randn(rows, 300).to(dtype)
            expected = [cpu.multiply(x, own, level) for own in group]
            for count in (1, 3):
                torch.set_num_threads(count)
                table = cpu.Table(group, 300)
                assert all(map(torch.equal, table.apart(x, level), expected)), (rows, count)
                assert torch.equal(table.side_by_side(x, level), torch.cat(expected, dim=-1)), (rows, count)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.skipif(not cpu.is_grouped(torch.ones(1, 8), [1]), reason="the CPU kernel was not built, or is older")
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_groups_of_rows_with_linears_of_their_own_give_the_bits_of_separate_calls(dtype, level):
    """With B shared in a group, of its own and absent; fewer products than threads, and more."""
    one, two = packed(64, 300, 16, 60, "2:4", dtype), packed(40, 300, 8, 60, "2:4", dtype)
    groups = [
        [one, two._replace(right=one.right)],
        [packed(64, 300, None, None, "2:4", dtype), packed(40, 300, 10, 25, "50%", dtype, bias=False)],
        [packed(64, 300, 32, 20, "2:4", dtype), two],
    ]
    for counts in ([1, 1, 1], [9, 1, 300], [0, 2, 17], [3]):
        x, own = torch.randn(sum(counts), 300).to(dtype), groups[: len(counts)]
        rows = x.split(counts)
        expected = [torch.cat([cpu.multiply(r, g[i], level) for r, g in zip(rows, own, strict=True)]) for i in (0, 1)]
        tables = [[cpu.Table([linear], 300) for linear in group] for group in own]
        for found in with_threads(lambda x=x, counts=counts, tables=tables: cpu.grouped(x, counts, tables, level)):
            assert all(map(torch.equal, found, expected)), counts
    with pytest.raises(ValueError, match=r"4 rows do not fit 2 groups of \[1, 2\] rows"):
        cpu.grouped(torch.ones(4, 300, dtype=dtype), [1, 2], tables * 2)
    with pytest.raises(ValueError, match="a linear of 40 rows beside one of 64"):
        cpu.grouped(torch.ones(2, 300, dtype=dtype), [1, 1], [[cpu.Table([one], 300)], [cpu.Table([two], 300)]])


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
def test_joined_linears_give_what_each_gives_side_by_side(dtype):
    shared = packed(64, 300, 16, 60, "2:4", dtype)
    group = [shared, packed(44, 300, 4, 20, "2:4", dtype, bias=False), shared._replace(bias=None)]
    for joined, own in ((cpu.Joined(group, 300), group), (cpu.Joined(group[1:2], 300), group[1:2])):
        for x in (torch.randn(300), torch.randn(2, 3, 300), torch.randn(40, 600)[:, ::2], torch.randn(0, 300)):
            x = x.to(dtype)
            expected = [cpu.linear(x, *one[:5], group=one.group) for one in own]
            assert torch.equal(joined(x), torch.cat(expected, dim=-1)), x.shape
    with pytest.raises(ValueError, match="x of 299 columns, expected 300"):
        joined(torch.ones(1, 299, dtype=dtype))
    with pytest.raises(ValueError, match="mask"):
        cpu.Joined(group, 400)


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
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 6, 9, 18, 24, 31, 32, 257, 772, 773])  # 257 and more: in several turns
def test_threads_change_no_bit_in_the_c_loops_and_many_rows_are_near_their_twin(rows, dtype, level):
    operands = random_linear(512, 1024, 64, 128, "2:4", dtype)
    x = torch.randn(rows, 1024).to(dtype)
    expected, bound = twin(x, *operands)
    first, *others = with_threads(lambda: cpu.multiply(x, Operands(*operands), level))
    assert ((first.double() - expected).abs() <= bound).all() and all(torch.equal(first, y) for y in others)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 31, 32, 300])
def test_the_linear_keeps_its_bits_where_it_runs_in_c_and_is_near_its_twin_everywhere(rows, dtype):
    operands = random_linear(512, 1024, 64, 128, "2:4", dtype)
    x = torch.randn(rows, 1024).to(dtype)
    expected, bound = twin(x, *operands)
    first, *others = results = with_threads(lambda: cpu.linear(x, *operands[:-1], group=operands[-1]))
    assert all(((y.double() - expected).abs() <= bound).all() for y in results)
    assert not cpu.runs_in_c(x) or all(torch.equal(first, y) for y in others)


@needs_library
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("rows", [1, 12, 20])
def test_nan_and_infinity_pass_through_and_stay_in_their_row(dtype, value, rows):
    operands = random_linear(36, 20, 4, 4, "2:4", dtype)
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


@needs_library
def test_the_operator_compiles_whole_and_under_inference_mode():
    *operands, group = random_linear(64, 128, 32, 64, "2:4", torch.bfloat16)
    x = torch.randn(3, 128).bfloat16()
    torch.library.opcheck(torch.ops.armor.cpu_linear, (x, *operands, group))

    def function(x):
        return cpu.linear(x, *operands, group=group) if cpu.supports(x, *operands) else x

    with torch.inference_mode():
        expected = function(x)
        assert expected.shape == (3, 64)
        assert torch.equal(torch.compile(function, fullgraph=True)(x), expected)


@needs_library
def test_supports_says_when_torch_must_run():
    *operands, _ = random_linear(64, 128, 32, 64, "2:4", torch.bfloat16)
    x = torch.randn(3, 128).bfloat16()
    assert cpu.supports(x, *operands)
    assert not cpu.supports(x.float(), *operands)
    assert not cpu.supports(x.half(), *(t.half() if t is not None else None for t in operands))
    assert not cpu.supports(x.to("meta"), *operands)
    assert not cpu.supports(x, None, *operands[1:])
    operands[2].requires_grad_()
    assert not cpu.supports(x, *operands)
    with torch.no_grad():
        assert cpu.supports(x, *operands)


@needs_library
@pytest.mark.parametrize("blocks", [(32, 64), (None, 16), (8, None)], ids=str)
def test_gradients_reach_the_input_and_the_bias(blocks):
    values, bits, left, right, bias, group = random_linear(64, 128, *blocks, "2:4", torch.float32)
    x, bias = torch.randn(2, 3, 128, requires_grad=True), bias.requires_grad_()
    found = torch.autograd.grad(cpu.linear(x, values, bits, left, right, bias, group=group).square().sum(), (x, bias))
    y = x if right is None else blockdiag.multiply(right, x)
    y = y @ unpack(values, bits, 128)[0].T
    y = (y if left is None else blockdiag.multiply(left, y)) + bias
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


@needs_library
@pytest.mark.skipif(os.environ.get(cpu.ASSUME_AMX) == "1", reason="it is assumed already")
def test_these_laws_hold_where_torch_multiplies_many_rows_as_with_amx():
    kept = "near_its_twin_everywhere or side_by_side or joined or leading or nan or computes_what_the_dense_linear_does"
    files = [str(Path(__file__).with_name(f"test_{name}.py")) for name in ("cpu", "integers", "linear")]
    environment = os.environ | {cpu.ASSUME_AMX: "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", kept, *files]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_sanitizers_find_nothing(tmp_path, sanitizers):
    """Every level and way on buffers of exactly their size, results held to a twin, masks that set too many bits.

    Races are looked for where there are several threads. It compiles the library anew, for the one that is built has
    no sanitizers, and without them a read beyond a buffer mostly goes unseen.
    """
    native = Path(cpu.__file__).parent / "native"
    # GCC takes long to optimise what is checked, and for checks of pointers, which those of addresses hold already.
    flags = ["-O0", "-g", f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all"]
    flags += ["-fno-sanitize=null,object-size,pointer-overflow"]
    common = ["cc", "-std=c11", "-D_GNU_SOURCE", "-pthread"]
    driver = tmp_path / "driver.o"
    subprocess.run(
        [*common, "-O2", "-c", str(Path(__file__).with_name("native_driver.c")), "-o", str(driver)], check=True
    )
    sources = [str(path) for path in sorted(native.glob("*.c"))]
    build = [*common, *flags, *sources, str(driver), "-lm", "-o", str(tmp_path / "run")]
    if (built := subprocess.run(build, capture_output=True, text=True)).returncode:
        if "sanitize" in built.stderr or "asan" in built.stderr or "tsan" in built.stderr:
            pytest.skip("this compiler has no sanitizers")
        pytest.fail(built.stderr)
    environment = {**os.environ, "ASAN_OPTIONS": "detect_leaks=1", "UBSAN_OPTIONS": "print_stacktrace=1"}
    command = [str(tmp_path / "run"), *["threads alone"] * (sanitizers == "thread")]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment)
    if "unexpected memory mapping" in ran.stderr:
        pytest.skip("this kernel's address layout is beyond the compiler's thread sanitizer")
    assert ran.returncode == 0, ran.stdout + ran.stderr


ARM = ("aarch64-linux-gnu-gcc", "qemu-aarch64")


@pytest.mark.skipif(not all(map(shutil.which, ARM)), reason=f"needs {' and '.join(ARM)} (Debian: qemu-user)")
def test_on_arm_the_results_are_the_twins(tmp_path):
    sources = [*sorted((Path(cpu.__file__).parent / "native").glob("*.c")), Path(__file__).with_name("native_driver.c")]
    build = [ARM[0], "-std=c11", "-D_GNU_SOURCE", "-pthread", "-O2", "-static", *map(str, sources), "-lm"]
    subprocess.run([*build, "-o", str(tmp_path / "run")], check=True)
    ran = subprocess.run([ARM[1], str(tmp_path / "run")], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout + ran.stderr

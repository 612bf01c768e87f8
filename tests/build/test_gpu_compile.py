"""Both GPU routes compiled for the supported cards, without a GPU: no spills, 16-byte accesses, the occupancy model."""

import concurrent.futures
import importlib.util
import re
from importlib.metadata import version

import pytest

from layersync_kernels.runtime.machine import find_tool

from ..support import launches, occupancy
from ..support.cards import CARDS
from ..support.sass import Kernel, inspect

CAPABILITIES = (80, 90, 100)

needs_cuobjdump = pytest.mark.skipif(
    find_tool("cuobjdump") is None, reason="no cuobjdump: neither a CUDA toolkit nor Triton's wheel is installed"
)


# ---- CUDA C++

OPS = {
    "cosine_alignment": "cosine_",
    "gated_residual_norm": "gated_",
    "gelu": "gelu_",
    "gram_alignment": "gram_",
    "qk_norm_rope": "qk_",
    "spatial_norm": "spatial_",
    "swiglu": "swiglu_",
}
"""Op → how the names of its kernels begin."""


@pytest.fixture(scope="module")
def cuda_kernels():
    """Every kernel of the extension as it was built: (op, capability) → kernels."""
    extension = importlib.util.find_spec("layersync_kernels._cuda")
    if extension is None:
        pytest.skip("the extension was built without CUDA")
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        found = dict(zip(CAPABILITIES, pool.map(lambda sm: inspect(extension.origin, sm), CAPABILITIES), strict=True))

    def of(op, capability):
        if not found[capability]:
            pytest.skip(f"the extension was not built for sm_{capability}")
        return [kernel for kernel in found[capability] if re.match(rf"_ZN9layersync\d+{OPS[op]}", kernel.name)]

    return of


def sizes_of(name):
    """Bytes of an element of both tensors, from a mangled name; S1_ repeats the first type."""
    first, second = re.search(r"kernelI(f|13__nv_bfloat16|6__half)(f|13__nv_bfloat16|6__half|S1_)", name).groups()
    second = first if second == "S1_" else second
    return [4 if dtype == "f" else 2 for dtype in (first, second)]


@needs_cuobjdump
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_cosine_kernels_neither_spill_nor_use_narrow_accesses(cuda_kernels, capability):
    kernels = cuda_kernels("cosine_alignment", capability)
    # 9 pairs of dtypes, a warp or a block per row; forward, backward for one side and for both.
    assert len(kernels) == 9 * 2 * 3 + 1
    for kernel in kernels:
        assert kernel.spills == 0, kernel
        if "finish" in kernel.name:
            continue
        sizes = sizes_of(kernel.name)
        values = 16 // min(sizes)
        steps = 160 // (values * sum(sizes))  # RowPair::kSteps
        assert kernel.loads[128] == steps * values * sum(sizes) // 16, kernel
        assert kernel.batch == kernel.loads[128], kernel
        if "backward" in kernel.name:
            written = sizes if "Lb1E" in kernel.name else sizes[:1]
            assert kernel.stores[128] == sum(steps * values * size // 16 + 1 for size in written), kernel  # 1: zero_row


@needs_cuobjdump
@pytest.mark.parametrize("capability", CAPABILITIES)
class TestBlockKernels:
    def test_spill_nothing(self, cuda_kernels, capability):
        for op, count in (
            ("gated_residual_norm", 5 * 8),
            ("gelu", 3 * 4),
            ("gram_alignment", 3 * 2),
            ("swiglu", 3 * 16),
            ("qk_norm_rope", 2 * (3 * (6 + 4) + 2 * 2)),  # cuts of a head, and those of packs of 8 bytes
        ):
            assert len(cuda_kernels(op, capability)) == count
            for kernel in cuda_kernels(op, capability):
                assert kernel.spills == 0, kernel

    def test_norm_moves_16_bytes_an_access(self, cuda_kernels, capability):
        checked = 0
        for kernel in cuda_kernels("gated_residual_norm", capability):
            if not re.search(r"gated_(forward|backward)_kernel", kernel.name):
                continue
            sizes, numbers = sizes_of(kernel.name), [int(n) for n in re.findall(r"Li(\d+)E", kernel.name)]
            if numbers == [1]:
                continue  # rows that are not aligned
            checked += 1
            if "forward" in kernel.name:
                threads, channels = numbers
                quads = channels // threads * sum(sizes) // 16  # of x and branch, for a thread
                assert set(kernel.loads) == {128}, kernel
                assert kernel.stores[128] >= quads, kernel
                assert set(kernel.stores) == {128, 32}, kernel
                assert kernel.stores[32] == 5, kernel  # statistics of the norm and of the alignment
            else:
                quads = 8 * sum(sizes) // 16
                assert kernel.loads[32] == 6, kernel  # statistics, factors, means
                assert set(kernel.loads) == {128, 32}, kernel
                # d_x, d_branch and four sums.
                assert kernel.stores == {128: quads + 4 * 2}, kernel
        assert checked == 5 * 5  # pairs of dtypes, kernels

    def test_gelu_moves_16_bytes_an_access(self, cuda_kernels, capability):
        vectors = [k for k in cuda_kernels("gelu", capability) if re.search(r"gelu_\w+_kernelI.*Li[48]E", k.name)]
        assert len(vectors) == 3 * 2
        for kernel in vectors:
            forward = "forward" in kernel.name
            # The values that vectors leave over, one at a time.
            assert sum(count for bits, count in kernel.loads.items() if bits != 128) == (1 if forward else 0), kernel
            assert sum(count for bits, count in kernel.stores.items() if bits != 128) == (1 if forward else 0), kernel

    def test_swiglu_moves_16_bytes_an_access(self, cuda_kernels, capability):
        vectors = [k for k in cuda_kernels("swiglu", capability) if re.search(r"Li[48]E", k.name)]
        assert len(vectors) == 3 * 2 * 4
        for kernel in vectors:
            assert set(kernel.loads) == set(kernel.stores) == {128}, kernel
            # 32 bytes of the result for each thread: as much of each half, and backward of the gradient.
            assert kernel.batch == (6 if "backward" in kernel.name else 4), kernel

    def test_gram_moves_16_bytes_an_access(self, cuda_kernels, capability):
        vectors = [k for k in cuda_kernels("gram_alignment", capability) if re.search(r"Li[48]E", k.name)]
        assert len(vectors) == 3
        for kernel in vectors:
            assert set(kernel.loads) == {128}, kernel
            assert kernel.stores == {128: 4, 32: 1}, kernel  # four steps, and the sum
            assert kernel.batch == 4, kernel


# ---- Triton

BF16, FP16, FP32 = "bfloat16", "float16", "float32"
COSINE_CASES = [
    *(["cosine_alignment", 90, *dtypes, 1152] for dtypes in ([BF16] * 2, [FP32] * 2, [FP16] * 2, [BF16, FP32])),
    ["cosine_alignment", 90, BF16, BF16, 8192],
    *(
        ["cosine_alignment", capability, *[dtype] * 2, 1152]
        for capability, dtype in ((80, BF16), (100, BF16), (100, FP32))
    ),
]
NORM_CASES = [
    *(["gated_residual_norm", capability, BF16, BF16, 1152] for capability in CAPABILITIES),
    ["gated_residual_norm", 90, FP32, BF16, 1152],
    *(["gated_residual_norm", capability, BF16, BF16, 4096] for capability in (90, 100)),
    *(["gated_residual_norm_aligned", capability, FP32, FP32, 1152] for capability in (80, 100)),
    ["gated_residual_norm_aligned", 90, BF16, BF16, 1152],
    ["gated_residual_norm_aligned", 90, FP32, FP32, 4096],
]
GELU_CASES = [
    ["gelu", capability, dtype, 3072] for capability, dtype in ((80, BF16), (90, BF16), (90, FP32), (100, BF16))
]
SPATIAL_CASES = [
    ["spatial_norm", capability, dtype, 768] for capability, dtype in ((90, BF16), (90, FP32), (100, BF16))
]
MODEL_CASES = [occupancy.triton_case(op, 90, BF16, width) for op in occupancy.OPS for width in launches.WIDTHS]
SWIGLU_CASES = [
    [op, capability, dtype, 3072]
    for op in ("swiglu", "swiglu_of_pairs")
    for capability, dtype in ((80, BF16), (90, BF16), (90, FP32), (100, BF16))
]
PROJECTED_CASES = [["projected_alignment", capability, BF16, 1152] for capability in CAPABILITIES]
GRAM_CASES = [
    ["gram_alignment", capability, dtype, 1920] for capability, dtype in ((80, FP16), (90, FP32), (100, FP16))
]


CHECKED_CASES = [*COSINE_CASES, *NORM_CASES, *GELU_CASES, *GRAM_CASES, *PROJECTED_CASES, *SPATIAL_CASES, *SWIGLU_CASES]


@pytest.fixture(scope="module")
def triton_kernels(tmp_path_factory):
    pytest.importorskip("triton")
    return occupancy.triton_reports(CHECKED_CASES, tmp_path_factory.mktemp("triton"))


@pytest.fixture(scope="module")
def modelled_kernels(triton_kernels, tmp_path_factory):
    others = [case for case in MODEL_CASES if case not in CHECKED_CASES]
    return [*triton_kernels, *occupancy.triton_reports(others, tmp_path_factory.mktemp("model"))]


def kernels_of(reports, case):
    """The forward and the backward kernel of a case, with widths as numbers."""
    kernels = {}
    for report in reports:
        if report["case"] == case:
            for accesses in ("loads", "stores"):
                report[accesses] = {int(bits): count for bits, count in report[accesses].items()}
            kernels[report["name"]] = Kernel(**{field: report[field] for field in Kernel._fields})
    return kernels["forward_kernel"], kernels.get("backward_kernel")


def sixteen_byte_values(*dtypes):
    """Accesses of 16 bytes for 8 values of each tensor."""
    return sum(8 * (4 if dtype == FP32 else 2) // 16 for dtype in dtypes)


def narrow(accesses):
    return sum(count for bits, count in accesses.items() if bits != 128)


def name_of(case):
    return "-".join(map(str, case))


@needs_cuobjdump
@pytest.mark.parametrize("case", COSINE_CASES, ids=name_of)
def test_triton_kernels_neither_spill_nor_use_narrow_accesses(triton_kernels, case):
    *_, student, teacher, width = case
    steps = -(-width // (256 if width <= 2048 else 2048))
    for kernel in kernels_of(triton_kernels, case):
        assert kernel.spills == 0, kernel
        assert kernel.loads[128] >= steps * sixteen_byte_values(student, teacher), kernel
        assert narrow(kernel.loads) <= 12, kernel  # statistics, weight, gradient
    assert set(kernel.stores) == {128}


@needs_cuobjdump
@pytest.mark.parametrize("case", NORM_CASES, ids=name_of)
def test_triton_norm_kernels_neither_spill_nor_use_narrow_accesses(triton_kernels, case):
    op, _, x, dtype, width = case
    aligned = "aligned" in op
    forward, backward = kernels_of(triton_kernels, case)
    assert forward.spills == backward.spills == 0, (forward, backward)

    steps = -(-width // (256 if width <= 2048 else 2048))
    # x, branch, gate, shift and scale; the student, and once more if its squares leave the range of fp32.
    assert forward.loads == {128: steps * sixteen_byte_values(x, *[dtype] * 4, *[x, x] * aligned)}, forward
    assert forward.stores[128] == steps * sixteen_byte_values(x, dtype), forward
    assert narrow(forward.stores) == (5 if aligned else 2), forward  # statistics

    from layersync_kernels.ops.gated_residual_norm.triton import run_tile_for

    steps = width / (8 * 32 * run_tile_for(width).warps)  # of 8 values a thread; the last may reach beyond the width
    loads = sixteen_byte_values(x, x, *[dtype] * 4, *[x] * aligned)  # both gradients, r, branch, gate, scale; teacher
    assert backward.loads[128] >= steps * loads, backward
    assert narrow(backward.loads) == (4 if aligned else 2), backward  # statistics, factors
    assert set(backward.stores) == {128}, backward


@needs_cuobjdump
@pytest.mark.parametrize("case", GELU_CASES, ids=name_of)
def test_triton_gelu_kernels_neither_spill_nor_use_narrow_accesses(triton_kernels, case):
    dtype = case[2]
    forward, backward = kernels_of(triton_kernels, case)
    assert forward.spills == backward.spills == 0, (forward, backward)
    assert forward.loads == forward.stores == {128: 2 * sixteen_byte_values(dtype)}, forward
    assert backward.loads == {128: 4 * sixteen_byte_values(dtype)}, backward  # of this step and of the next
    assert backward.stores[128] == 2 * sixteen_byte_values(dtype), backward
    assert narrow(backward.stores) == 1, backward  # the sums, once


@needs_cuobjdump
@pytest.mark.parametrize("case", SWIGLU_CASES, ids=name_of)
def test_triton_swiglu_kernels_neither_spill_nor_use_narrow_accesses(triton_kernels, case):
    dtype = case[2]
    forward, backward = kernels_of(triton_kernels, case)
    assert forward.spills == backward.spills == 0, (forward, backward)
    assert forward.loads == {128: 2 * sixteen_byte_values(dtype)}, forward
    assert forward.stores == {128: sixteen_byte_values(dtype)}, forward
    assert backward.loads == {128: 6 * sixteen_byte_values(dtype)}, backward  # of this step and of the next
    sums = sum(backward.stores.values()) - 3 * sixteen_byte_values(dtype)  # once, of both halves
    assert 0 < sums <= 2, backward
    assert narrow(backward.stores) <= sums, backward


@needs_cuobjdump
@pytest.mark.parametrize("case", PROJECTED_CASES, ids=name_of)
def test_triton_projection_neither_spills_nor_stores_narrowly(triton_kernels, case):
    (kernel,) = (report for report in triton_kernels if report["case"] == case)
    assert kernel["spills"] == 0, kernel
    assert kernel["stores"] == {"128": 64 * 128 // (8 * 32 * 8), "32": 3}, kernel  # a tile of z, statistics


@pytest.mark.parametrize("case", GRAM_CASES, ids=name_of)
def test_triton_gram_kernels_neither_spill_nor_use_narrow_stores(triton_kernels, case):
    (kernel,) = (report for report in triton_kernels if report["case"] == case)
    assert kernel["spills"] == 0, kernel
    assert kernel["stores"] == {"128": 8, "32": 1}, kernel  # derivatives; the sum. Loads are asynchronous copies.


@needs_cuobjdump
def test_triton_kernels_that_finish_sums_compile(triton_kernels):
    reports = [report for report in triton_kernels if report["name"] in ("finish_kernel", "sum_kernel")]
    assert {report["name"] for report in reports} == {"finish_kernel", "sum_kernel"}
    assert all(report["spills"] == 0 for report in reports)


@needs_cuobjdump
@pytest.mark.parametrize("case", SPATIAL_CASES, ids=name_of)
def test_triton_spatial_norm_neither_spills_nor_uses_narrow_accesses(triton_kernels, case):
    kernel, _ = kernels_of(triton_kernels, case)
    assert kernel.spills == 0, kernel
    assert narrow(kernel.loads) == narrow(kernel.stores) == 0, kernel


@needs_cuobjdump
@pytest.mark.parametrize("capability", CAPABILITIES)
def test_spatial_norm_neither_spills_nor_uses_narrow_accesses(cuda_kernels, capability):
    kernels = cuda_kernels("spatial_norm", capability)
    assert len(kernels) == 3 * 2
    for kernel in kernels:
        assert kernel.spills == 0, kernel
        if "Li1E" in kernel.name:
            continue  # rows that are not aligned
        # Slots of 8 warps by 8 lanes for each value of a thread, and what the system takes of a block.
        values = int(re.search(r"Li(\d)E", kernel.name).group(1))
        assert kernel.shared + CARDS[capability].static_reserve == values * 256 + 1024, kernel
        # The first token, and a batch in each of three passes, of which two read from the caches.
        assert kernel.loads == {128: 1 + 3 * 4}, kernel
        assert kernel.stores == {128: 4}, kernel


# ---- The occupancy model

ENOUGH = 0.85  # of the bandwidth; below it the launch binds, not the memory
FLOORS = {
    # Rows of 64 and 72 channels leave 8 or 9 lanes of a warp to do its work: instructions bind, or too little is in
    # flight. A row has a warp (or, backward, a block with two barriers).
    ("cuda", "cosine_alignment forward", 90): {64: 0.14, 72: 0.16},
    ("cuda", "cosine_alignment backward", 90): {64: 0.11, 72: 0.12, 384: 0.70},
    ("cuda", "gated_residual_norm forward", 90): {64: 0.27, 72: 0.30},
    # 96 registers of a thread leave 20 warps, and a row is loaded at a time. 768: 1.29 waves. 3072: a block of 12 warps
    # leaves no room for a second.
    ("cuda", "gated_residual_norm backward", 90): {64: 0.10, 72: 0.12, 384: 0.66, 768: 0.65, 3072: 0.65},
    ("cuda", "gated_residual_norm backward", 80): {1152: 0.82},
    # 256 runs of rows, to keep partial sums small: too few blocks where a row is a single tile of 1024 columns.
    # (The hidden widths of DiT's MLPs begin at 1536.)
    ("cuda", "gelu backward", 90): {64: 0.03, 72: 0.03, 384: 0.25, 768: 0.53, 1152: 0.80},
    # As of gelu: few runs of rows, and a tile of 1024 columns is empty beyond a row's.
    ("cuda", "swiglu backward", 90): {64: 0.10, 72: 0.11, 384: 0.63, 1152: 0.76},
    # A block for each sample and 64 channels: 256 or 512 blocks; of 72 channels, 8 are left for every second block.
    ("cuda", "spatial_norm forward", 90): {64: 0.58, 72: 0.31},
    # A B200 moves 8 TB/s with the issue rate of an H100: 4.65 instructions of a byte, and 53 KiB in flight.
    ("cuda", "gated_residual_norm forward", 100): {1152: 0.70},
    ("cuda", "gated_residual_norm backward", 100): {1152: 0.44},
    ("cuda", "gelu forward", 100): {1152: 0.80},
    ("cuda", "gelu backward", 100): {1152: 0.32},
    ("cuda", "spatial_norm forward", 100): {1152: 0.47},
    # 72 channels are a step of 128: the masks cost lanes and instructions.
    ("triton", "cosine_alignment forward", 90): {72: 0.57},
    ("triton", "cosine_alignment backward", 90): {72: 0.64},
    ("triton", "gated_residual_norm forward", 90): {72: 0.81},
    # Runs are made for 8 warps on a multiprocessor, which registers leave from Triton 3.6 and on other cards (213 to
    # 233); 3.8 leaves 12 on an H100 (168). For 12, 3.6 would have one and a half waves, and spills if held to 168.
    # 3072 in 256 groups: one program for a group. 384: two steps of 256 are a quarter empty.
    ("triton", "gated_residual_norm backward", 90): {
        64: 0.30,
        72: 0.12,
        384: 0.33,
        768: 0.66,
        1152: 0.55,
        1536: 0.76,
        3072: 0.76,
        5120: 0.61,
    },
    ("triton", "gelu backward", 90): {72: 0.79},
    # A program for each sample and 64 channels, 256 to 1536 of them up to 384 channels. 768: 3.3 waves.
    ("triton", "spatial_norm forward", 90): {64: 0.22, 72: 0.24, 384: 0.72, 768: 0.72},
    # Runs are made for an H100's residency: more than a wave of an A100's, less than one of a B200's.
    ("triton", "gated_residual_norm backward", 80): {1152: 0.38},
    ("triton", "gated_residual_norm backward", 100): {1152: 0.24},
    ("triton", "gelu backward", 80): {3072: 0.75},
    ("triton", "gelu backward", 100): {3072: 0.64},
    ("triton", "cosine_alignment forward", 100): {1152: 0.63},
    ("triton", "cosine_alignment backward", 100): {1152: 0.80},
    ("triton", "gated_residual_norm forward", 100): {1152: 0.73},
    ("triton", "spatial_norm forward", 100): {768: 0.30},
}
"""(Route, kernel, card) → width → what the model leaves of the bandwidth, where it is not enough: not to get worse."""
SLACK = 0.1  # by which compilers differ; what gains more is no longer what is written above


@pytest.fixture(scope="module")
def cuda_rows(cuda_kernels, tmp_path_factory):
    program = launches.build(tmp_path_factory.mktemp("launches"))
    if program is None:
        pytest.skip("launches.cpp is compiled with g++, and there is none")
    cases = [(op, 90, width) for op in occupancy.OPS for width in launches.WIDTHS]
    cases += [(op, capability, 1152) for op in occupancy.OPS for capability in (80, 100)]
    return [
        row
        for op, capability, width in cases
        for row in occupancy.cuda_rows(program, cuda_kernels(op, capability), op, capability, BF16, width)
    ]


@pytest.fixture(scope="module")
def rows(request):
    """Of one route: what its launches come to."""

    def of(route):
        if route == "cuda":
            return request.getfixturevalue("cuda_rows")
        return list(occupancy.triton_rows(request.getfixturevalue("modelled_kernels")))

    return of


@needs_cuobjdump
@pytest.mark.slow
@pytest.mark.parametrize("route", ["cuda", "triton"])
class TestOccupancy:
    def test_covers_all_launches(self, rows, route):
        found = {(row.kernel, row.width, row.groups) for row in rows(route) if row.capability == 90}
        groups = {name: (1, 256) if "norm f" in name or "norm b" in name else (256,) for name in occupancy.TENSORS}
        groups["spatial_norm forward"] = (256,)
        assert found >= {(name, width, g) for name in groups for width in launches.WIDTHS for g in groups[name]}

    def test_a_block_moves_its_share_of_the_tensors(self, rows, route):
        """What holds the model together: masks, loops and addresses of the machine code, run for one block."""
        for row in rows(route):
            sizes = [4 if dtype == FP32 else 2 for dtype in row.dtype.split("/")]
            if len(set(sizes)) > 1:
                continue
            expected = occupancy.TENSORS[row.kernel] * launches.ROWS * row.width * sizes[0]
            # Statistics come on top; the last step of a run, and the last block, may have fewer rows.
            assert expected * 0.99 <= row.figures.total <= (expected + 20 * launches.ROWS) * 1.15, row

    def test_launches_leave_the_memory_to_bind(self, rows, route):
        least = {}
        for row in rows(route):
            key = (row.route, row.kernel, row.capability), row.width
            least[key] = min(least.get(key, (2, None)), (row.figures.bandwidth, row), key=lambda pair: pair[0])
        newest = importlib.util.find_spec("triton") and version("triton") >= "3.8"  # whose figures are written above
        wrong = {}
        for (kernel, width), (bandwidth, row) in least.items():
            floor = FLOORS.get(kernel, {}).get(width, ENOUGH)
            known_best = floor + SLACK if floor < ENOUGH and (route == "cuda" or newest) else 2
            if not floor <= bandwidth < known_best:
                wrong[kernel, width] = row
        assert not wrong
        known = {(kernel, width) for kernel, widths in FLOORS.items() for width in widths if kernel[0] == route}
        assert known <= least.keys()

    def test_no_64_bit_division_and_no_more_barriers_than_known(self, rows, route):
        # Of a row: where a block has a row to itself, two for each sum. Triton also converts layouts by way of shared
        # memory, of everything where the dtypes of the tensors differ.
        for row in rows(route):
            most = 4.2 if route == "cuda" else 12.5 if "/" in row.dtype else 6.5
            assert row.figures.divisions == 0, row
            if row.op != "spatial_norm":  # which has barriers for each tile of channels
                assert row.figures.barriers <= most, row

    def test_lanes_of_accesses_are_live(self, rows, route):
        for row in rows(route):
            if row.width >= 384:
                assert row.figures.lanes >= 0.4, row  # of all accesses, those of one lane for a row's statistics too
                assert row.figures.sectors >= 0.97, row

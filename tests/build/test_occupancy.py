"""The occupancy model (cards.py), and the machine that runs a block (sass_run.py), by hand and by the calculator."""

import ctypes
import itertools
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from ..support import cards
from ..support.cards import CARDS, Block, figures, resident_blocks
from ..support.sass_run import Machine, parse

H100 = CARDS[90]


# ---- Residency


@pytest.mark.parametrize(
    ("threads", "registers", "shared", "blocks"),
    [
        (128, 32, 0, 16),  # 64 warps
        (128, 40, 0, 12),  # 1280 registers a warp: 51 warps, 48 of them in blocks
        (128, 41, 0, 10),  # rounded up to 48 registers: 42 warps, 40 in whole quarters
        (64, 168, 0, 6),  # 5376 registers a warp: 12 warps
        (640, 96, 0, 1),  # 21 warps, 20 in whole quarters
        (32, 16, 0, 32),  # the limit of blocks
        (128, 32, 48 << 10, 4),  # 228 KiB of shared memory
        (1024, 64, 0, 1),
        (1024, 65, 0, 0),  # cannot be launched
    ],
)
def test_residency_by_hand(threads, registers, shared, blocks):
    assert resident_blocks(H100, threads, registers, shared) == blocks


def occupancy_header():
    """NVIDIA's occupancy calculator in C, which toolkits and Triton bring."""
    folders = [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include"]
    triton = pytest.importorskip("triton")
    folders.append(Path(triton.__file__).parent / "backends" / "nvidia" / "include")
    return next((folder for folder in folders if (folder / "cuda_occupancy.h").exists()), None)


WRAPPER = r"""
#include "cuda_occupancy.h"
extern "C" int blocks(int major, int shared_sm, int sms, int threads, int registers, int shared) {
  cudaOccDeviceProp device;
  device.computeMajor = major, device.computeMinor = 0;
  device.maxThreadsPerBlock = 1024, device.maxThreadsPerMultiprocessor = 2048;
  device.regsPerBlock = device.regsPerMultiprocessor = 65536;
  device.warpSize = 32, device.numSms = sms;
  device.sharedMemPerBlock = 49152, device.sharedMemPerMultiprocessor = shared_sm;
  device.sharedMemPerBlockOptin = shared_sm - 1024, device.reservedSharedMemPerBlock = 1024;
  cudaOccFuncAttributes kernel;
  kernel.maxThreadsPerBlock = 1024, kernel.numRegs = registers, kernel.sharedSizeBytes = 0;
  kernel.partitionedGCConfig = PARTITIONED_GC_OFF;
  kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN, kernel.maxDynamicSharedSizeBytes = shared_sm - 1024;
  kernel.numBlockBarriers = 1;
  cudaOccDeviceState state;
  cudaOccResult result;
  if (cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &kernel, &state, threads, shared)) return -1;
  return result.activeBlocksPerMultiprocessor;
}
"""


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.parametrize("capability", CARDS)
def test_residency_as_the_occupancy_calculator_has_it(capability, tmp_path):
    folder = occupancy_header()
    if folder is None:
        pytest.skip("no cuda_occupancy.h")
    source, library = tmp_path / "blocks.cpp", tmp_path / "blocks.so"
    source.write_text(WRAPPER)
    subprocess.run(["g++", "-shared", "-fPIC", "-w", f"-I{folder}", source, "-o", library], check=True)
    calculator, card = ctypes.CDLL(str(library)).blocks, CARDS[capability]
    for threads, registers, shared in itertools.product(
        (32, 64, 96, 128, 160, 256, 384, 512, 640, 1024), range(16, 256, 7), (0, 160, 1024, 3072, 48 << 10, 100 << 10)
    ):
        expected = calculator(capability // 10, card.shared, card.multiprocessors, threads, registers, shared)
        reported = shared + 1024 - card.static_reserve  # as the compiler for this card reports it
        assert resident_blocks(card, threads, registers, reported) == expected, (threads, registers, shared)


# ---- The comparison with a card


def test_figures_by_hand():
    # A block of 4 warps reads and writes 16 KiB in 2000 cycles with 1600 instructions; 12 are resident, 48 warps.
    block = Block(1600, 32, 0, 0, 1, 16384, 8192, 16384, 1024, 32, 2000)
    found = figures(H100, 40, 1024, 128, 132 * 12 * 3, 132 * 12 * 6, block)
    assert (found.blocks, found.warps, found.waves, found.idle, found.lanes, found.sectors) == (12, 48, 3, 0, 1, 1)
    assert found.instructions == 1600 * 32 / 16384
    assert found.barriers == 0.5
    assert found.in_flight == pytest.approx(12 * 8192 * 1.98e9 * 1e-6 / 2000 / 1024)
    assert found.needed == pytest.approx(3.35e12 / 132 * 1e-6 / 2 / 1024)
    # Bandwidth binds: a round of 12 blocks takes 12 * 16384 / (3.35 TB/s / 132) = 7.7 µs, one block alone 1 µs.
    assert found.bandwidth == pytest.approx(1)
    # 4000 cycles times 5 are 10.1 µs for what takes 7.7.
    slow = figures(H100, 40, 1024, 128, 132 * 12 * 3, 132 * 12 * 6, block._replace(cycles=20000))
    assert slow.bandwidth == pytest.approx(12 * 16384 / (3.35e12 / 132) / (20000 / 1.98e9))
    assert slow.latency_share == pytest.approx(slow.bandwidth)
    # One block more than three rounds: a fourth one, as long as a block alone.
    tail = figures(H100, 40, 1024, 128, 132 * 12 * 3 + 1, 132 * 12 * 6, block._replace(cycles=20000))
    assert tail.bandwidth == pytest.approx(slow.bandwidth * 3 / 4, rel=1e-3)
    assert tail.idle == pytest.approx(1 / 4, rel=1e-3)
    # 9.99 instructions are issued while a byte moves: 5120 * 32 / 16384 = 10 take a little longer.
    busy = figures(H100, 40, 1024, 128, 132 * 12 * 3, 132 * 12 * 6, block._replace(instructions=5120))
    assert busy.bandwidth == pytest.approx(H100.issue / 10) == pytest.approx(0.9987, abs=1e-4)
    assert busy.issue_share == pytest.approx(busy.bandwidth)


def test_limits_of_the_cards():
    # 132 multiprocessors * 4 schedulers * 32 lanes * 1.98 GHz / 3.35 TB/s; 16 special functions a cycle.
    assert [round(CARDS[sm].issue, 2) for sm in (80, 90, 100)] == [9.56, 9.99, 4.65]
    assert H100.special_issue == pytest.approx(H100.issue / 8)
    assert H100.in_flight == pytest.approx(25379, abs=1)
    assert cards.LATENCY == 1e-6


def test_a_block_is_extended_by_steps():
    short, longer = Block(*[10.0] * 11), Block(*[13.0] * 11)
    assert short.repeated(longer, 5) == Block(*[25.0] * 11)


# ---- The machine


def program(*lines):
    return parse(
        "\n".join(f"        /*{16 * place:04x}*/                   {line} ;" for place, line in enumerate(lines))
    )


def machine(*lines, threads=64, parameters=b"", **options):
    return Machine(program(*lines), 90, threads, parameters, (1, 1, 1), **options)


def after(*lines, register="R0", **options):
    ran = machine(*lines, "EXIT", **options)
    ran.run()
    return ran.registers["R"][int(register[1:])]


@pytest.mark.parametrize(
    ("lines", "value"),
    [
        (["MOV R1, 0x7", "IADD3 R0, R1, -0x3, R1"], 11),
        (["IADD3 R1, RZ, 0x1, RZ", "IADD3 R2, P0, RZ, -R1, RZ", "IADD3.X R0, RZ, ~RZ, RZ, P0, !PT"], 2**32 - 1),  # -1
        (["IADD3 R2, P0, RZ, -RZ, RZ", "IADD3.X R0, RZ, ~RZ, RZ, P0, !PT"], 0),  # -0
        (["MOV R1, 0x5", "MOV R2, 0x6", "IMAD R0, R1, R2, 0x3"], 33),
        (["MOV R2, 0x80000000", "IMAD.WIDE.U32 R2, R2, 0x4, RZ", "MOV R0, R3"], 2),
        (["MOV R2, 0x80000000", "IMAD.WIDE R2, R2, 0x4, RZ", "MOV R0, R3"], 2**32 - 2),
        (["MOV R2, 0x0", "MOV R3, 0x5", "MOV R4, 0x80000000", "IMAD.HI.U32 R0, R4, 0x4, R2"], 7),
        (["MOV R1, 0x40000001", "LEA R2, P1, R1, 0x1, 0x2", "LEA.HI.X R0, R1, 0x9, RZ, 0x2, P1"], 10),
        (["MOV R1, 0x40000001", "LEA R0, P1, R1, 0x1, 0x2"], 5),
        (["MOV R1, 0x80000000", "LEA.HI.X.SX32 R0, R1, RZ, 0x1, !PT"], 2**32 - 1),
        (["MOV R1, 0xf0f0", "LOP3.LUT R0, R1, 0xff00, RZ, 0xc0, !PT"], 0xF000),  # and
        (["MOV R1, 0xf0f0", "LOP3.LUT R0, R1, 0xff00, RZ, 0x3c, !PT"], 0x0FF0),  # xor
        (["MOV R1, 0x80000000", "SHF.R.S32.HI R0, RZ, 0x1f, R1"], 2**32 - 1),
        (["MOV R1, 0x80000000", "SHF.R.U32.HI R0, RZ, 0x1f, R1"], 1),
        (["MOV R1, 0x80000000", "SHF.L.U64.HI R0, R1, 0x2, RZ"], 2),
        (["MOV R1, 0x12345678", "PRMT R0, R1, 0x7632, R1"], 0x12341234),
        (["MOV R1, -0x1", "ISETP.GT.AND P0, PT, R1, RZ, PT", "SEL R0, 0x1, 0x2, P0"], 2),
        (["MOV R1, -0x1", "ISETP.GT.U32.AND P0, PT, R1, RZ, PT", "SEL R0, 0x1, 0x2, P0"], 1),
        (["MOV R1, 0x1", "ISETP.GE.AND.EX P0, PT, R1, 0x1, PT, !PT", "SEL R0, 0x1, 0x2, P0"], 2),  # equal, but lower
        (["PLOP3.LUT P0, PT, PT, PT, PT, 0x8, 0x0", "SEL R0, 0x1, 0x2, P0"], 2),
        (["PLOP3.LUT P0, PT, PT, PT, PT, 0x80, 0x0", "SEL R0, 0x1, 0x2, P0"], 1),
        (["MOV R1, 0x7", "I2F.U32.RP R2, R1", "MUFU.RCP R2, R2", "VIADD R2, R2, 0xffffffe",
          "F2I.FTZ.U32.TRUNC.NTZ R3, R2", "IMAD.HI.U32 R0, R3, 0x64, RZ"], 14),  # 100 / 7, as ptxas divides
        (["MOV R1, 0x40000000", "FFMA R0, R1, R1, 1"], 0x40A00000),  # 2·2 + 1
        (["MOV R1, 0x3f800000", "FSETP.GT.AND P0, PT, R1, 0.5, PT", "SEL R0, 0x1, 0x2, P0"], 1),
        (["HFMA2.MMA R0, -RZ, RZ, 1.875, 0"], 0x3F800000),
        (["MOV R2, 0x3f800000", "MOV R3, 0x40000000", "FADD2 R4, R2.F32x2.HI_LO, R3.F32", "MOV R0, R5"], 0x40800000),
        (["MOV R1, 0x5", "STS [0x10], R1", "LDS R0, [0x10]"], 5),
        (["ULDC UR4, c[0x0][0x210]", "MOV R0, UR4"], 77),
        (["MOV R20, 0x30", "CALL.REL.NOINC 0x50", "MOV R0, 0x9", "IADD3 R0, R0, 0x1, RZ", "EXIT",
          "MOV R0, 0x4", "RET.REL.NODEC R20 0x0"], 5),
    ],
)  # fmt: skip
def test_instructions(lines, value):
    assert after(*lines, parameters=(77).to_bytes(4, "little")).tolist() == [value] * 64


def test_lanes_part_and_meet():
    lanes = ["S2R R1, SR_TID.X", "ISETP.GE.AND P0, PT, R1, 0x5, PT", "@P0 BRA 0x50", "MOV R0, 0x1", "BRA 0x60"]
    ran = machine(*lanes, "MOV R0, 0x2", "IADD3 R0, R0, 0x1, RZ", "EXIT")
    run = ran.run()
    assert ran.registers["R"][0].tolist() == [2] * 5 + [3] * 59
    assert run.names["IADD3"] == 2  # together again: once for each warp
    assert run.names["MOV"] == 1 + 2  # the first side only in the first warp


def test_a_loop_runs_as_often_as_its_parameters_say():
    body = [
        "MOV R0, RZ",
        "IADD3 R0, R0, 0x1, RZ",
        "ISETP.GE.AND P0, PT, R0, c[0x0][0x210], PT",
        "@!P0 BRA 0x10",
        "EXIT",
    ]
    for count in (3, 5):
        run = machine(*body, parameters=count.to_bytes(4, "little")).run()
        assert run.instructions == 2 * (1 + 3 * count + 1)


def test_shuffles_stay_in_their_warp():
    assert after("S2R R1, SR_TID.X", "SHFL.BFLY PT, R0, R1, 0x1, 0x1f").tolist() == [i ^ 1 for i in range(64)]
    assert after("S2R R1, SR_TID.X", "SHFL.IDX PT, R0, R1, 0x3, 0x1f").tolist() == [3] * 32 + [35] * 32


ADDRESS = ["S2R R0, SR_TID.X", "MOV R2, RZ", "MOV R3, 0x100", "IMAD.WIDE.U32 R2, R0, 0x10, R2"]


def test_accesses_count_live_lanes_and_bytes_once():
    mask = "ISETP.GE.AND P0, PT, R0, 0x8, PT"
    load = "@!P0 LDG.E.128 R4, desc[UR4][R2.64]"
    run = machine(*ADDRESS, mask, load, load, "STG.E.128 desc[UR4][R2.64+0x400], R4", "EXIT").run()
    assert run.loaded == {1: 2 * 8 * 16}
    assert run.stored == {1: 64 * 16}
    assert run.unique == {1: 8 * 16 + 64 * 16}
    assert run.sectors == {1: 4 + 32}
    assert (run.accesses, run.lanes) == (2 + 2, 16 + 64)


def test_waits_for_what_it_uses_and_no_sooner():
    first, second = "LDG.E.128 R4, desc[UR4][R2.64]", "LDG.E.128 R8, desc[UR4][R2.64+0x1000]"
    together = machine(*ADDRESS, first, second, "FADD R0, R4, R4", "FADD R0, R8, R8", "EXIT", latency=1000).run()
    apart = machine(*ADDRESS, first, "FADD R0, R4, R4", second, "FADD R0, R8, R8", "EXIT", latency=1000).run()
    unused = machine(*ADDRESS, first, second, "EXIT", latency=1000).run()
    assert 1000 < together.cycles < 1100
    assert 2000 < apart.cycles < 2100
    assert unused.cycles < 100
    again = machine(*ADDRESS, first, "FADD R0, R4, R4", first, "FADD R0, R4, R4", "EXIT", latency=1000).run()
    assert 1200 < again.cycles < 1400  # from the cache


def test_barriers_join_warps():
    work = ["S2R R1, SR_TID.X", "ISETP.GE.AND P0, PT, R1, 0x20, PT", "@P0 BRA 0x80", *["FADD R2, R2, R2"] * 5]
    run = machine(*work, "BAR.SYNC.DEFER_BLOCKING 0x0", "EXIT").run()
    assert run.barriers == 1
    assert run.cycles == 4 * (3 + 5 + 2)


def test_what_is_not_known_is_an_error():
    with pytest.raises(NotImplementedError, match="no meaning is known for HMMA"):
        machine("HMMA.16816.F32 R4, R8, R10, R4", "EXIT").run()
    with pytest.raises(NotImplementedError, match=r"operand c\[0x3\]"):
        machine("MOV R0, c[0x3][0x10]", "EXIT").run()
    with pytest.raises(RuntimeError, match="outside of all tensors"):
        machine("CS2R R2, SRZ", "LDG.E R0, desc[UR4][R2.64]", "EXIT").run()
    with pytest.raises(RuntimeError, match="16 bytes that is not aligned"):
        machine(*ADDRESS, "LDG.E.128 R4, desc[UR4][R2.64+0x8]", "EXIT").run()
    with pytest.raises(RuntimeError, match="more than 100 instructions"):
        machine("BRA 0x0", "EXIT").run(limit=100)

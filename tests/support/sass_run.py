"""Runs one block of a kernel's machine code on the CPU: which instructions it issues, what it reads and writes, when.

Not a simulator of values: global memory reads as about 1 in any dtype and forgets what is stored. Everything that
decides a path (integers, addresses, predicates, comparisons of floats) is computed for each lane, so that masks, trips
of loops and branches are those of the launch. An instruction or a path that this file does not know is an error.

Semantics: CUDA Binary Utilities, instruction set reference; PTX ISA for what it leaves out (carries, lop3, prmt).
"""

from __future__ import annotations

import itertools
import re
from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

LANES = 32
SECTOR = 32  # bytes; what DRAM and L2 move at least
PATTERN = 0x3F803F80  # 1 in bf16, twice; 1.002 in fp32
WORD = np.uint64(0xFFFFFFFF)
COMPARE = {
    "GE": np.greater_equal,
    "GT": np.greater,
    "LE": np.less_equal,
    "LT": np.less,
    "EQ": np.equal,
    "NE": np.not_equal,
}

# Cycles until a result can be read. ISSUE: between two dependent instructions of a warp, which is also about what a
# warp alone manages between independent ones of this code. (Published microbenchmarks of Volta to Hopper: 4 for
# arithmetic, 23 to 33 for shuffles and shared memory, 200 to 300 for L2.) A model, no measurement.
ISSUE, SHARED, L2 = 4, 30, 270


class Instruction(NamedTuple):
    address: int
    guard: str  # predicate under which it does anything, or ""
    name: str  # LDG.E.128
    operands: tuple[str, ...]


def parse(sass):
    """The instructions of a function as cuobjdump prints it."""
    found = re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(?:@(!?U?P[T\d]) )?\s*([A-Z][\w.]*)\s*(.*?)\s*;", sass)
    return [
        Instruction(
            int(address, 16), guard, name, tuple(part.replace(".reuse", "") for part in rest.split(", ") if part)
        )
        for address, guard, name, rest in found
    ]


def parameter_base(capability):
    """Where in constant bank 0 the parameters of a kernel begin."""
    return {80: 0x160, 90: 0x210, 100: 0x380}[capability]


@dataclass
class Run:
    """What a block did."""

    instructions: int = 0  # issued, of all warps
    names: Counter = field(default_factory=Counter)  # of instructions, as issued
    loaded: Counter = field(default_factory=Counter)  # tensor → bytes that its live lanes asked for
    stored: Counter = field(default_factory=Counter)
    unique: Counter = field(default_factory=Counter)  # tensor → different bytes of both
    sectors: Counter = field(default_factory=Counter)  # tensor → different sectors of 32 bytes that those are in
    loads: Counter = field(default_factory=Counter)  # bits → accesses by a warp with a live lane
    stores: Counter = field(default_factory=Counter)
    lanes: int = 0  # live lanes in those
    accesses: int = 0
    barriers: int = 0  # that each warp has waited at
    cycles: int = 0  # with the block alone on its multiprocessor


def _float(text):
    special = {"+INF": np.inf, "-INF": -np.inf, "INF": np.inf, "+QNAN": np.nan, "-QNAN": np.nan, "QNAN": np.nan}
    return special[text] if text in special else float(text)


def _is_predicate(text):
    return re.fullmatch(r"!?U?P[T\d]", text) is not None


class Machine:
    """The state of a block that runs, and one method for each kind of instruction."""

    def __init__(
        self, code, capability, threads, parameters, grid, place=(0, 0, 0), latency=2000, streamed=lambda _: True
    ):
        self.code = {instruction.address: instruction for instruction in code}
        self.after = {one.address: other.address for one, other in itertools.pairwise(code)}
        self.threads, self.warps = threads, threads // LANES
        self.place, self.latency, self.streamed = place, latency, streamed
        self.bank = np.zeros(8192, np.uint8)
        self.bank[parameter_base(capability) :][: len(parameters)] = np.frombuffer(parameters, np.uint8)
        sizes = np.array([threads, 1, 1, *grid], np.uint32)
        start = 0x360 if capability >= 100 else 0
        self.bank[start : start + 12] = sizes[:3].view(np.uint8)
        self.bank[start + (16 if capability >= 100 else 12) :][:12] = sizes[3:].view(np.uint8)
        self.registers = {"R": np.zeros((256, threads), np.uint32), "UR": np.zeros((256, threads), np.uint32)}
        self.predicates = {"P": np.zeros((8, threads), bool), "UP": np.zeros((8, threads), bool)}
        for bank in self.predicates.values():
            bank[7] = True
        self.shared = np.zeros(1 << 18, np.uint8)
        self.ready = {}  # register → cycle of each warp at which it can be read
        self.clock = np.zeros(self.warps, np.int64)
        self.lane = np.arange(threads) % LANES
        self.seen = {}
        self.run_ = Run()

    # ---- Operands

    def _spread(self, value):
        return np.full(self.threads, value, np.uint32)

    def _raw(self, text, wide=False):
        """A function that gives an operand's bits without sign, or the pair of registers that begins there."""
        if match := re.fullmatch(r"(U?R)(\d+|Z)(?:\.64|\.U32|\.H0_H0)*", text):
            bank, number = match.groups()
            if number == "Z":
                zero = np.zeros(self.threads, np.uint64 if wide else np.uint32)
                return lambda: zero
            row, n = self.registers[bank], int(number)
            if wide:
                return lambda: row[n].astype(np.uint64) | (row[n + 1].astype(np.uint64) << np.uint64(32))
            return lambda: row[n]
        if match := re.fullmatch(r"c\[0x0\]\[(0x[0-9a-f]+)\]", text):
            place = int(match.group(1), 16)
            size, kind = (8, np.uint64) if wide else (4, np.uint32)
            value = np.full(self.threads, self.bank[place : place + size].view(kind)[0], kind)
            return lambda: value
        raise NotImplementedError(f"operand {text}")

    def _integer(self, text, wide=False):
        kind = np.uint64 if wide else np.uint32
        if re.fullmatch(r"-?(0x[0-9a-f]+|\d+)", text):
            bits = int(text, 0) & (0xFFFFFFFFFFFFFFFF if wide else 0xFFFFFFFF)
            value = np.full(self.threads, bits, kind)
            return lambda: value
        if text == "SRZ":
            return self._raw("RZ", wide)
        if text[0] == "~":
            inner = self._raw(text[1:], wide)
            return lambda: ~inner()
        if text[0] == "-":
            inner = self._raw(text[1:], wide)
            return lambda: ~inner() + kind(1)
        return self._raw(text, wide)

    def _number(self, text):
        """An operand as fp32."""
        if re.fullmatch(r"[-+]?(\d.*|INF|QNAN)\s*", text) and not text.startswith("0x"):
            value = np.full(self.threads, _float(text.strip()), np.float32)
            return lambda: value
        sign = text[0] == "-"
        text = text.removeprefix("-")
        absolute = text[0] == "|"
        if text.startswith("0x"):
            bits = self._integer(text)
        else:
            bits = self._raw(text.strip("|"))

        def read():
            value = bits().view(np.float32)
            value = np.abs(value) if absolute else value
            return -value if sign else value

        return read

    def _predicate(self, text):
        inverted, bank, number = re.fullmatch(r"(!?)(U?P)([T\d])", text).groups()
        row, n = self.predicates[bank], 7 if number == "T" else int(number)
        return (lambda: ~row[n]) if inverted else (lambda: row[n])

    def _put(self, text, value, active):
        bank, number = re.fullmatch(r"(U?R)(\d+|Z)", text).groups()
        if number == "Z":
            return
        if bank == "UR":  # one value for a warp, that of its first active lane
            value, active = self._uniform(value, active)
        np.copyto(self.registers[bank][int(number)], value.astype(np.uint32, copy=False), where=active)

    def _uniform(self, value, active):
        by_warp = active.reshape(-1, LANES)
        first = by_warp.argmax(1)
        value = np.broadcast_to(value, (self.threads,)).reshape(-1, LANES)
        return np.repeat(value[np.arange(self.warps), first], LANES), np.repeat(by_warp.any(1), LANES)

    def _put_wide(self, text, value, active):
        bank, number = re.fullmatch(r"(U?R)(\d+|Z)", text).groups()
        if number == "Z":
            return
        self._put(text, (value & WORD).astype(np.uint32), active)
        self._put(f"{bank}{int(number) + 1}", (value >> np.uint64(32)).astype(np.uint32), active)

    def _put_number(self, text, value, active):
        self._put(text, np.asarray(value, np.float32).view(np.uint32), active)

    def _set(self, text, value, active):
        bank, number = re.fullmatch(r"(U?P)([T\d])", text).groups()
        if number == "T":
            return
        if bank == "UP":
            value, active = self._uniform(value, active)
        np.copyto(self.predicates[bank][int(number)], value, where=active)

    # ---- Integer arithmetic

    @staticmethod
    def _split(operands):
        """Destination, predicates out (carries), sources, predicates in."""
        first = next(place for place, text in enumerate(operands) if not _is_predicate(text))
        sources = list(operands[first + 1 :])
        out, into = list(operands[:first]), []
        while _is_predicate(sources[0]):
            out.append(sources.pop(0))
        while _is_predicate(sources[-1]):
            into.insert(0, sources.pop())
        return operands[first], out, sources, into

    def IADD3(self, one):
        to, out, sources, into = self._split(one.operands)
        extended = ".X" in one.name
        # In the extended form - stands for ~, and the carry brings what is missing.
        parts = [self._integer(s.replace("-", "~") if extended and s[:2] in ("-R", "-U") else s) for s in sources]
        negative = sum(1 for s in sources if s[0] == "-" and not extended and not re.match(r"-\d", s))
        raws = [
            self._integer("~" + s[1:]) if s[0] == "-" and not extended and not re.match(r"-\d", s) else p
            for s, p in zip(sources, parts, strict=True)
        ]
        carries = [self._predicate(p) for p in into]

        def run(active):
            total = sum((raw().astype(np.uint64) for raw in raws), np.full(self.threads, negative, np.uint64))
            for carry in carries:
                total = total + carry().astype(np.uint64)
            self._put(to, (total & WORD).astype(np.uint32), active)
            for place, name in enumerate(out):
                self._set(name, total >= np.uint64((place + 1) << 32), active)

        return run

    UIADD3 = IADD3

    def VIADD(self, one):
        to, _, (a, b), _ = self._split(one.operands)
        a, b = self._integer(a), self._integer(b)
        return lambda active: self._put(to, a() + b(), active)

    def IMAD(self, one):
        to, out, (a, b, c), into = self._split(one.operands)
        kinds = one.name.split(".")[1:]
        if "WIDE" in kinds or "HI" in kinds:
            if out or into:
                raise NotImplementedError(str(one))
            a, b, c = self._integer(a), self._integer(b), self._integer(c, wide=True)
            unsigned = "U32" in kinds

            def run(active):
                x, y = a(), b()
                if unsigned:
                    product = x.astype(np.uint64) * y.astype(np.uint64)
                else:
                    product = (x.view(np.int32).astype(np.int64) * y.view(np.int32).astype(np.int64)).view(np.uint64)
                product = product + c()
                if "WIDE" in kinds:
                    self._put_wide(to, product, active)
                else:
                    self._put(to, (product >> np.uint64(32)).astype(np.uint32), active)

            return run
        carries = [self._predicate(p) for p in into]
        a, b, c = self._integer(a), self._integer(b), self._integer(c)

        def run_low(active):
            value = a() * b() + c()
            for carry in carries[:1]:
                value = value + carry().astype(np.uint32)
            if out:
                raise NotImplementedError(str(one))
            self._put(to, value, active)

        return run_low

    UIMAD = IMAD

    def LEA(self, one):
        to, out, sources, into = self._split(one.operands)
        kinds = one.name.split(".")[1:]
        high = "HI" in kinds
        shift = np.uint64(int(sources[-1], 0))
        a, b = self._integer(sources[0]), self._integer(sources[1])
        c = self._integer(sources[2]) if high and len(sources) == 4 else None
        carries = [self._predicate(p) for p in into]

        def run(active):
            value = a().astype(np.uint64)
            if "SX32" in kinds:
                value = a().view(np.int32).astype(np.int64).view(np.uint64)
            elif c is not None:
                value = value | (c().astype(np.uint64) << np.uint64(32))
            value = value << shift
            value = (value >> np.uint64(32) if high else value) & WORD
            total = value + b().astype(np.uint64)
            for carry in carries[:1]:
                total = total + carry().astype(np.uint64)
            self._put(to, (total & WORD).astype(np.uint32), active)
            for name in out[:1]:
                self._set(name, total > WORD, active)

        return run

    ULEA = LEA

    def SHF(self, one):
        to, _, (low, amount, high), _ = self._split(one.operands)
        left, kind, upper = ".L." in one.name, one.name.split(".")[2], one.name.endswith(".HI")
        low, amount, high = self._integer(low), self._integer(amount), self._integer(high)

        def run(active):
            count = amount().astype(np.uint64) & np.uint64(63 if "64" in kind else 31)
            if kind == "S32" and not left:
                value = (high().view(np.int32) >> count.astype(np.int32)).view(np.uint32)
                self._put(to, value, active)
                return
            if kind == "U32":
                value = (
                    (low().astype(np.uint64) << count)
                    if left
                    else (high() if upper else low()).astype(np.uint64) >> count
                )
                self._put(to, (value & WORD).astype(np.uint32), active)
                return
            pair = low().astype(np.uint64) | (high().astype(np.uint64) << np.uint64(32))
            value = pair << count if left else pair >> count
            self._put(to, ((value >> np.uint64(32)) if upper else value & WORD).astype(np.uint32), active)

        return run

    USHF = SHF

    def SGXT(self, one):
        to, _, (a, bits), _ = self._split(one.operands)
        a, bits = self._integer(a), int(bits, 0)
        if ".U32" not in one.name:
            move = 32 - bits
            return lambda active: self._put(to, ((a() << move).view(np.int32) >> move).view(np.uint32), active)
        return lambda active: self._put(to, a() & np.uint32((1 << bits) - 1), active)

    USGXT = SGXT

    def LOP3(self, one):
        to, out, (a, b, c, table), into = self._split(one.operands)
        table = int(table, 0)
        a, b, c = self._integer(a), self._integer(b), self._integer(c)
        also = [self._predicate(p) for p in into]

        def run(active):
            x, y, z = a(), b(), c()
            value = np.zeros(self.threads, np.uint32)
            for row in range(8):
                if table >> row & 1:
                    value |= (x if row & 4 else ~x) & (y if row & 2 else ~y) & (z if row & 1 else ~z)
            self._put(to, value, active)
            for name in out[:1]:
                self._set(name, (value != 0) | (also[0]() if also else False), active)

        return run

    ULOP3 = LOP3

    def PLOP3(self, one):
        *names, table, other = one.operands
        out, into = names[:2], [self._predicate(p) for p in names[2:]]

        def run(active):
            place = sum(p().astype(np.uint8) << shift for p, shift in zip(into, (2, 1, 0), strict=True))
            for name, bits in zip(out, (table, other), strict=True):
                self._set(name, np.uint8(int(bits, 0)) >> place & 1 == 1, active)

        return run

    UPLOP3 = PLOP3

    def ISETP(self, one):
        out, (a, b), into = list(one.operands[:2]), one.operands[2:4], one.operands[4:]
        kinds = one.name.split(".")[1:]
        compare = COMPARE[kinds[0]]
        strict = {"GE": np.greater, "LE": np.less}.get(kinds[0], compare)
        kind = np.uint32 if "U32" in kinds else np.int32
        combine = np.logical_or if "OR" in kinds else np.logical_and
        a, b = self._integer(a), self._integer(b)
        into = [self._predicate(p) for p in into]

        def run(active):
            x, y = a().view(kind), b().view(kind)
            if "EX" in kinds:  # of the upper halves; the last operand is what the lower ones gave
                lower = into[-1]()
                value = (x != y) | lower if kinds[0] == "NE" else strict(x, y) & (x != y) | (x == y) & lower
            else:
                value = compare(x, y)
            self._set(out[0], combine(value, into[0]()), active)
            self._set(out[1], combine(~value, into[0]()), active)

        return run

    UISETP = ISETP

    def SEL(self, one):
        to, _, (a, b), (which,) = self._split(one.operands)
        a, b, which = self._integer(a), self._integer(b), self._predicate(which)
        return lambda active: self._put(to, np.where(which(), a(), b()), active)

    USEL = SEL

    def IMNMX(self, one):
        to, _, (a, b), (least,) = self._split(one.operands)
        kind = np.uint32 if ".U32" in one.name else np.int32
        a, b, least = self._integer(a), self._integer(b), self._predicate(least)

        def run(active):
            x, y = a().view(kind), b().view(kind)
            self._put(to, np.where(least(), np.minimum(x, y), np.maximum(x, y)).view(np.uint32), active)

        return run

    VIMNMX = IMNMX

    def IABS(self, one):
        to, a = one.operands
        a = self._integer(a)
        return lambda active: self._put(to, np.abs(a().view(np.int32)).view(np.uint32), active)

    def PRMT(self, one):
        to, _, (a, selector, b), _ = self._split(one.operands)
        a, selector, b = self._integer(a), self._integer(selector), self._integer(b)

        def run(active):
            pair = a().astype(np.uint64) | (b().astype(np.uint64) << np.uint64(32))
            picks, value = selector(), np.zeros(self.threads, np.uint32)
            for byte in range(4):
                pick = picks >> np.uint32(4 * byte) & np.uint32(15)
                bits = (pair >> ((pick & np.uint32(7)).astype(np.uint64) * np.uint64(8)) & np.uint64(255)).astype(
                    np.uint32
                )
                bits = np.where(pick & np.uint32(8), np.where(bits & 128, np.uint32(255), np.uint32(0)), bits)
                value |= bits << np.uint32(8 * byte)
            self._put(to, value, active)

        return run

    UPRMT = PRMT

    def MOV(self, one):
        to, a = one.operands[:2]
        a = self._integer(a)
        return lambda active: self._put(to, a(), active)

    UMOV = R2UR = MOV

    def CS2R(self, one):
        to, a = one.operands
        if a != "SRZ":
            raise NotImplementedError(str(one))
        zero = np.zeros(self.threads, np.uint64)
        return lambda active: (self._put if ".32" in one.name else self._put_wide)(to, zero, active)

    def S2R(self, one):
        to, what = one.operands
        values = dict.fromkeys(("SR_TID.Y", "SR_TID.Z", "SR_CgaCtaId"), 0)
        values |= {"SR_TID.X": np.arange(self.threads), "SR_LANEID": self.lane}
        values |= {f"SR_CTAID.{axis}": place for axis, place in zip("XYZ", self.place, strict=True)}
        value = np.broadcast_to(np.asarray(values[what], np.uint32), (self.threads,))
        return lambda active: self._put(to, value, active)

    S2UR = S2R

    def P2R(self, one):
        to, _, a, mask = one.operands
        a, mask = self._integer(a), int(mask, 0)

        def run(active):
            value = a() & np.uint32(~mask & 0xFFFFFFFF)
            for n in range(7):
                if mask >> n & 1:
                    value = value | (self.predicates["P"][n].astype(np.uint32) << np.uint32(n))
            self._put(to, value, active)

        return run

    def R2P(self, one):
        _, a, mask = one.operands
        a, mask = self._integer(a), int(mask, 0)

        def run(active):
            for n in range(7):
                if mask >> n & 1:
                    self._set(f"P{n}", a() >> np.uint32(n) & 1 == 1, active)

        return run

    # ---- Floating point

    def _float_operation(self, one, operation):
        to, *sources = one.operands
        sources = [self._number(s) for s in sources]
        return lambda active: self._put_number(to, operation(*(s() for s in sources)), active)

    def FADD(self, one):
        return self._float_operation(one, np.add)

    def FMUL(self, one):
        return self._float_operation(one, np.multiply)

    def FFMA(self, one):
        saturate = ".SAT" in one.name
        return self._float_operation(one, lambda a, b, c: np.clip(a * b + c, 0, 1) if saturate else a * b + c)

    def _pair_operation(self, one, operation):
        """On two neighbouring registers at once, with single ones standing for both."""
        to, *sources = one.operands
        high = [re.sub(r"R(\d+)\.F32x2", lambda match: f"R{int(match.group(1)) + 1}", text) for text in sources]
        halves = [[self._number(re.sub(r"\.(F32|HI_LO).*", "", text)) for text in half] for half in (sources, high)]

        def run(active):
            values = [operation(*(read() for read in half)) for half in halves]
            for step, value in enumerate(values):
                self._put_number(self._row(to, step), value, active)

        return run

    def FADD2(self, one):
        return self._pair_operation(one, np.add)

    def FMUL2(self, one):
        return self._pair_operation(one, np.multiply)

    def FFMA2(self, one):
        return self._pair_operation(one, lambda a, b, c: a * b + c)

    def _half(self, text):
        upper, bits = ".H1" in text, self._integer(re.sub(r"\.H\d.*", "", text))

        def read():
            return (bits() & np.uint32(0xFFFF0000) if upper else bits() << np.uint32(16)).view(np.float32)

        return read

    def FHADD(self, one):  # of a bf16 and a float
        to, a, b = one.operands
        a, b = self._half(a), self._number(b)
        return lambda active: self._put_number(to, a() + b(), active)

    def FHFMA(self, one):
        to, a, b, c = one.operands
        a, b, c = self._half(a), self._half(b), self._number(c)
        return lambda active: self._put_number(to, a() * b() + c(), active)

    def MUFU(self, one):
        operations = {"RCP": lambda x: 1 / x, "RSQ": lambda x: 1 / np.sqrt(x), "EX2": np.exp2, "SQRT": np.sqrt}
        return self._float_operation(one, operations[one.name.split(".")[1]])

    def FMNMX(self, one):
        to, _, (a, b), (least,) = self._split(one.operands)
        a, b, least = self._number(a), self._number(b), self._predicate(least)
        return lambda active: self._put_number(to, np.where(least(), np.fmin(a(), b()), np.fmax(a(), b())), active)

    def FSEL(self, one):
        to, a, b, which = one.operands
        a, b, which = self._number(a), self._number(b), self._predicate(which)
        return lambda active: self._put_number(to, np.where(which(), a(), b()), active)

    def FSETP(self, one):
        out, a, b, into = (
            one.operands[:2],
            self._number(one.operands[2]),
            self._number(one.operands[3]),
            one.operands[4:],
        )
        kinds = one.name.split(".")[1:]
        compare = COMPARE[kinds[0].removesuffix("U")]
        combine = np.logical_or if "OR" in kinds else np.logical_and
        into = self._predicate(into[0])

        def run(active):
            x, y = a(), b()
            unordered = np.isnan(x) | np.isnan(y)
            value = compare(x, y) | unordered if kinds[0].endswith("U") else compare(x, y) & ~unordered
            self._set(out[0], combine(value, into()), active)
            self._set(out[1], combine(~value, into()), active)

        return run

    def FCHK(self, one):  # whether a division needs its slow path; not for what is loaded here
        return lambda active: self._set(one.operands[0], np.zeros(self.threads, bool), active)

    def I2F(self, one):
        if ".U64" in one.name:
            raise NotImplementedError(str(one))
        to, a = one.operands
        a = self._integer(a)
        kind = np.uint32 if ".U32" in one.name else np.int32
        up = ".RP" in one.name

        def run(active):
            exact = a().view(kind)
            value = exact.astype(np.float32)
            if up:
                value = np.where(value.astype(np.float64) < exact, np.nextafter(value, np.float32(np.inf)), value)
            self._put_number(to, value, active)

        return run

    I2FP = I2F

    def F2I(self, one):
        to, a = one.operands
        a = self._number(a)
        return lambda active: self._put(to, np.clip(a().astype(np.float64), 0, 2**32 - 1).astype(np.uint32), active)

    @staticmethod
    def _halves(values):
        return values.astype(np.float32).view(np.uint32) >> np.uint32(16)

    def F2FP(self, one):
        to, a, b = one.operands[:3]
        a, b = self._number(a), self._number(b)
        return lambda active: self._put(to, self._halves(a()) << np.uint32(16) | self._halves(b()), active)

    def F2F(self, one):
        to, a = one.operands
        a = self._number(a)
        return lambda active: self._put(to, self._halves(a()), active)

    def HFMA2(self, one):  # only as ptxas makes constants of it, and of bf16 by the values
        to, a, b, *immediates = one.operands
        if {a.lstrip("-"), b} != {"RZ"} or len(immediates) != 2:
            raise NotImplementedError(str(one))
        bits = np.array([_float(text) for text in immediates[::-1]], np.float16).view(np.uint32)[0]
        value = self._spread(bits)
        return lambda active: self._put(to, value, active)

    def HSETP2(self, one):
        out, a, b = one.operands[:2], self._integer(one.operands[2]), self._integer(one.operands[3])
        kinds = one.name.split(".")
        compare = COMPARE[kinds[2]]
        if kinds[1] != "BF16_V2" or kinds[3] != "AND" or one.operands[4] != "PT":
            raise NotImplementedError(str(one))

        def run(active):
            x, y = a(), b()
            low = compare((x << np.uint32(16)).view(np.float32), (y << np.uint32(16)).view(np.float32))
            mask = np.uint32(0xFFFF0000)
            self._set(out[0], low, active)
            self._set(out[1], compare((x & mask).view(np.float32), (y & mask).view(np.float32)), active)

        return run

    # ---- Memory

    def _address(self, text):
        """A function that gives the address in brackets, and those of its parts that are registers."""
        inside = re.search(r"\[([^\[\]]*)\]$", text).group(1)
        parts, offset = [], 0
        for part in inside.replace("+-", "-").replace("-", "+-").split("+"):
            if not part:
                continue
            if re.fullmatch(r"-?0x[0-9a-f]+", part):
                offset += int(part, 16)
            else:
                register, _, scale = part.partition(".X")
                part = self._integer(register.removesuffix(".64"), wide=register.endswith(".64"))
                parts.append((part, np.uint64(int(scale or 1))))

        def read():
            total = np.full(self.threads, offset & 0xFFFFFFFFFFFFFFFF, np.uint64)
            for part, scale in parts:
                total = total + part().astype(np.uint64) * scale
            return total

        return read

    @staticmethod
    def _bits(name):
        sizes = [int(size) for size in re.findall(r"\.[US]?(8|16|64|128|256)\b", name)]
        return sizes[0] if sizes else 32

    def _touch(self, addresses, size, active, moved, widths, bits):
        """Count an access; whether a tensor that streams by has given a new sector of itself."""
        warps = active.reshape(-1, LANES).any(1).sum()
        if warps == 0:
            return False
        widths[bits] += int(warps)
        self.run_.accesses += int(warps)
        self.run_.lanes += int(active.sum())
        new = False
        live = addresses[active]
        if (live % np.uint64(size)).any():
            raise RuntimeError(f"an access of {size} bytes that is not aligned")
        for tensor in np.unique(live >> np.uint64(40)):
            mine = live[live >> np.uint64(40) == tensor]
            key = int(tensor)
            if key == 0 or key > 255:
                raise RuntimeError(f"an access outside of all tensors, at {int(mine[0]):#x}")
            moved[key] += len(mine) * size
            before, touched = self.seen.setdefault(key, (set(), set()))
            fresh = set(mine.tolist()) - before
            before |= fresh
            self.run_.unique[key] += len(fresh) * size
            sectors = {place // SECTOR for place in fresh} - touched
            touched |= sectors
            self.run_.sectors[key] += len(sectors)
            new = new or (bool(sectors) and self.streamed(key))
        return new

    @staticmethod
    def _row(text, step):
        return "RZ" if text == "RZ" else f"R{int(text[1:]) + step}"

    def LDG(self, one):
        bits = self._bits(one.name)
        *targets, source = one.operands
        targets = [t for t in targets if not _is_predicate(t)]
        address = self._address(source)
        pattern = self._spread(PATTERN if bits >= 32 else PATTERN & 0xFFFF)

        def run(active):
            new = self._touch(address(), bits // 8, active, self.run_.loaded, self.run_.loads, bits)
            words = [self._row(t, i) for t in targets for i in range(max(bits // 32 // len(targets), 1))]
            arrival = self.clock + (self.latency if new else L2)
            for word in words:
                self._put(word, pattern, active)
                if active.any():
                    self.ready[word] = arrival

        return run

    def STG(self, one):
        bits = self._bits(one.name)
        address = self._address(one.operands[0])

        def run(active):
            self._touch(address(), bits // 8, active, self.run_.stored, self.run_.stores, bits)

        return run

    def LDS(self, one):
        to, source = one.operands
        address, size = self._address(source), self._bits(one.name) // 8

        def run(active):
            place = np.where(active, address(), np.uint64(0)).astype(np.int64)
            for word in range(max(size // 4, 1)):
                value = np.zeros(self.threads, np.uint32)
                for byte in range(min(size, 4)):
                    value |= self.shared[place + 4 * word + byte].astype(np.uint32) << np.uint32(8 * byte)
                self._put(self._row(to, word), value, active)
                self.ready[self._row(to, word)] = self.clock + SHARED

        return run

    def STS(self, one):
        target, source = one.operands
        address, size = self._address(target), self._bits(one.name) // 8

        def run(active):
            place = address().astype(np.int64)[active]
            for word in range(max(size // 4, 1)):
                value = self._integer(self._row(source, word))()[active]
                for byte in range(min(size, 4)):
                    self.shared[place + 4 * word + byte] = (value >> np.uint32(8 * byte)).astype(np.uint8)

        return run

    def STSM(self, _):  # tiles on their way to a store, which no path depends on
        return lambda active: None

    def LDSM(self, one):
        to = one.operands[0]
        count = int(re.search(r"\.(2|4)\b", one.name).group(1)) if re.search(r"\.(2|4)\b", one.name) else 1

        def run(active):
            for word in range(count):
                self._put(self._row(to, word), self._spread(PATTERN), active)
                self.ready[self._row(to, word)] = self.clock + SHARED

        return run

    def LDC(self, one):
        to, source = one.operands
        offset, size = self._address(source), self._bits(one.name) // 8
        bank, number = re.fullmatch(r"(U?R)(\d+|Z)", to).groups()

        def run(active):
            place = np.where(active, offset(), np.uint64(0)).astype(np.int64)
            for word in range(max(size // 4, 1) if number != "Z" else 0):
                value = sum(
                    self.bank[place + 4 * word + byte].astype(np.uint32) << np.uint32(8 * byte)
                    for byte in range(min(size, 4))
                )
                self._put(f"{bank}{int(number) + word}", value, active)

        return run

    ULDC = LDCU = LDC

    def SHFL(self, one):
        _, to, a, which, _ = one.operands
        kind = one.name.split(".")[1]
        if kind not in ("BFLY", "IDX"):
            raise NotImplementedError(str(one))
        a, which, threads = self._integer(a), self._integer(which), np.arange(self.threads)

        def run(active):
            lane = which().astype(np.int64) % LANES
            source = threads ^ lane if kind == "BFLY" else threads - self.lane + lane
            self._put(to, a()[source], active)
            self.ready[to] = self.clock + SHARED

        return run

    def VOTEU(self, one):
        to, which = one.operands
        if ".ANY" not in one.name:
            raise NotImplementedError(str(one))
        which = self._predicate(which)

        def run(active):
            any_lane = np.repeat((which() & active).reshape(-1, LANES).any(1), LANES)
            self._set(to, any_lane, active)

        return run

    # ---- Control

    def _nothing(self, _):
        return lambda active: None

    NOP = BSSY = BSYNC = BREAK = WARPSYNC = _nothing

    def _compile(self, one):
        """What running an instruction takes: its function, what it waits for, its guard, its successor."""
        kind = one.name.split(".")[0]
        wide = 4 if "128" in one.name else 2
        waits = set()
        for place, text in enumerate(one.operands):
            for number in re.findall(r"\bR(\d+)", text):
                pair = "WIDE" in one.name or ".64" in text or "HI" in one.name or ".F32x2" in text
                many = wide if one.name.startswith(("STG", "STS")) and place == 1 else 2 if pair else 1
                waits |= {f"R{int(number) + i}" for i in range(many)}
        jump = getattr(self, f"_{kind.lower()}", None) if kind in ("BRA", "EXIT", "CALL", "RET", "BAR") else None
        make = getattr(self, kind, None)
        if jump is None and (make is None or ".COLLECTIVE" in one.name):
            raise NotImplementedError(f"no meaning is known for {one.name} {', '.join(one.operands)}")
        guard = self._predicate(one.guard) if one.guard else None
        return one, jump or make(one), jump is not None, frozenset(waits), guard, self.after.get(one.address)

    def run(self, limit=2_000_000):
        """Run the block to its end. Of lanes that have parted, those that are furthest behind go first."""
        compiled, steps = {}, 0
        groups = {min(self.code): self._group(np.ones(self.threads, bool))}
        with np.errstate(all="ignore"):
            while groups:
                steps += 1
                if steps > limit:
                    raise RuntimeError(f"more than {limit} instructions")
                address = min(groups)
                group = groups.pop(address)
                if address not in compiled:
                    compiled[address] = self._compile(self.code[address])
                one, work, jump, waits, guard, after = compiled[address]
                active, warps, issued = group
                if self.ready and not waits.isdisjoint(self.ready):
                    for name in waits & self.ready.keys():
                        np.maximum(self.clock, self.ready[name], out=self.clock, where=warps)
                        if issued == self.warps:
                            del self.ready[name]
                self.run_.instructions += issued
                self.run_.names[one.name] += issued
                self.clock[warps] += ISSUE
                taken = active & guard() if guard else active
                if not jump:
                    work(taken)
                    self._join(groups, after, group)
                    continue
                targets = work(one, taken)
                left = active
                for place, mask in targets:
                    left = left & ~mask
                    if place is not None and mask.any():
                        self._join(groups, place, group if mask is active else self._group(mask))
                if left.any():
                    self._join(groups, after, self._group(left))
        self.run_.cycles = int(self.clock.max())
        return self.run_

    def _group(self, active):
        warps = active.reshape(-1, LANES).any(1)
        return active, warps, int(warps.sum())

    def _join(self, groups, address, group):
        groups[address] = self._group(groups[address][0] | group[0]) if address in groups else group

    # Each gives where the lanes that take it go: None ends them.

    def _exit(self, _, taken):
        return [(None, taken)]

    def _bra(self, one, taken):
        if ".DIV" in one.name:  # lanes that have parted from the others; shuffles are collective here
            return []
        *conditions, target = one.operands
        for condition in conditions:
            taken = taken & self._predicate(condition)()
        return [(int(target, 16), taken)]

    def _call(self, one, taken):
        return [(int(one.operands[-1], 16), taken)]

    def _ret(self, one, taken):
        target = self._integer(one.operands[0].split()[0])()
        return [(int(place), taken & (target == place)) for place in np.unique(target[taken])]

    def _bar(self, one, taken):
        warps = taken.reshape(-1, LANES).any(1)
        self.run_.barriers += 1
        self.clock[warps] = self.clock[warps].max()
        return []

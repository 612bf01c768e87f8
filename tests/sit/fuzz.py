"""Damages files and has them read: `python -m tests.sit.fuzz COUNT [KIND ...]`.

Case i of a kind is the same everywhere. Each has to end within seconds, as if the file were whole or with a UserError;
memory is limited to what the process has before the first case, and `ROOM`. Prints a line of JSON for each kind.
"""

from __future__ import annotations

import collections
import contextlib
import faulthandler
import io
import json
import logging
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
import torchvision.datasets  # noqa: F401 - here, so that it does not count as growth
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load, save

from layersync_kernels.errors import UserError
from layersync_kernels.sit.checkpoints import local
from layersync_kernels.sit.checkpoints.weights import fill_model, load_weights
from layersync_kernels.sit.config.data import DataConfig
from layersync_kernels.sit.config.io import load_config
from layersync_kernels.sit.data.registry import load_data
from layersync_kernels.sit.files import sha256
from layersync_kernels.sit.sampling.load import load_trained
from layersync_kernels.sit.studies.compare.folder import read_marks
from layersync_kernels.sit.teachers.features import Features
from layersync_kernels.sit.training.curves import save_curves
from layersync_kernels.sit.training.folder import start_run
from layersync_kernels.sit.training.loop import Trainer
from layersync_kernels.sit.training.runlog import RECORDS, RunLog, checkpoint_to_resume, read_records

from .tiny import tiny_config, tiny_data

ROOM = 2**30
SECONDS = 20
LIMIT_GB = 0.05
"""--memory-limit-gb of the cases."""
INTERESTING = [b"\0" * 4, b"\xff" * 4, b"\xff\xff\xff\x7f", b"\0\0\0\x80", b"\xff" * 8, b"\x7f" + b"\xff" * 7]


class TooSlow(BaseException):
    """No Exception, so that nothing takes it for a broken file."""


# Damage


def damage_bytes(rng, content):
    """Flips, overwrites, cuts, inserts or repeats; half of the time near the beginning, where headers are."""
    content = bytearray(content)
    for _ in range(rng.choice([1, 1, 1, 2, 4])):
        at = rng.randrange(min(len(content), 256) if rng.random() < 0.5 else len(content)) if content else 0
        length = rng.choice([1, 2, 4, 16, 100, len(content) // 3])
        match rng.randrange(8):
            case 0 | 1:
                content[at : at + 1] = bytes(b ^ 1 << rng.randrange(8) for b in content[at : at + 1])
            case 2:
                content[at : at + length] = rng.randbytes(length)
            case 3:
                patch = rng.choice(INTERESTING)
                content[at : at + len(patch)] = patch
            case 4:
                del content[at:]
            case 5:
                del content[at : at + length]
            case 6:
                content[at:at] = rng.randbytes(length)
            case 7:
                content[at:at] = content[at : at + length]
    return bytes(content)


def hostile(rng):
    """A JSON value that is somewhere wrong."""
    numbers = [0, -1, 1, 2, 2**31, 2**63, 2**70, 10**400, -(2**70), 0.5, -0.5, 1e308, float("nan"), float("inf")]
    others = [None, True, False, "", "x", "\0", "\ud800", "x" * 5000, [], {}, [1], [[]], {"a": 1}, [1] * 1000]
    return rng.choice([*numbers, *others, [rng.choice(numbers)] * rng.randrange(1, 6)])


def damage_json(rng, value):
    """Replaces, removes or adds a value somewhere inside."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        name = rng.choice(list(value))
        match rng.randrange(8):
            case 0:
                return {k: v for k, v in value.items() if k != name}
            case 1:
                return {**value, rng.choice(["x", "", "step", "data", "\0"]): hostile(rng)}
            case _:
                return {**value, name: damage_json(rng, value[name])}
    if isinstance(value, list) and value and rng.random() < 0.8:
        at = rng.randrange(len(value))
        if rng.random() < 0.2:
            return value[:at] + value[at + 1 :]
        return [*value[:at], damage_json(rng, value[at]), *value[at + 1 :]]
    return hostile(rng)


def damage_text(rng, content):
    """Of a JSON file: of its values or of its bytes."""
    if rng.random() < 0.3:
        return damage_bytes(rng, content)
    value = json.loads(content)
    for _ in range(rng.choice([1, 1, 2])):
        value = damage_json(rng, value)
    text = json.dumps(value)
    if rng.random() < 0.03:
        text = text.replace("1", "[" * 20_000, 1)
    return text.encode()


TYPES = [torch.int8, torch.uint8, torch.int64, torch.float16, torch.bfloat16, torch.float64, torch.bool]
TYPES += [torch.complex64, torch.float8_e4m3fn, torch.uint16]


def damage_tensors(rng, tensors):
    """Drops, adds, reshapes, converts or fills tensors."""
    tensors = dict(tensors)
    for _ in range(rng.choice([1, 1, 2, 5])):
        if not tensors:
            break
        name = rng.choice(sorted(tensors))
        tensor = tensors[name]
        match rng.randrange(9):
            case 0:
                del tensors[name]
            case 1:
                tensors[rng.choice(["x", name + ".step", name + ".exp_avg", "blocks.9"])] = tensor.clone()
            case 2:
                tensors[name] = rng.choice([torch.zeros(1), torch.zeros(()), torch.zeros(0), torch.zeros(0, 2**40)])
            case 3:
                tensors[name] = tensor.flatten()
            case 4:
                tensors[name] = tensor.to(rng.choice(TYPES))
            case 5 if tensor.numel():
                flat = tensor.flatten().clone()
                value = rng.choice([float("nan"), float("inf"), -1.0, 1e38, 0.0, 255.0])
                if not flat.is_floating_point():
                    value = rng.choice([0, 1, 100])
                flat[rng.randrange(len(flat))] = value
                tensors[name] = flat.reshape(tensor.shape)
            case 6:
                other = rng.choice(sorted(tensors))
                tensors[name], tensors[other] = tensors[other].clone(), tensor.clone()
            case 7:
                tensors[name] = tensor[:-1].clone() if tensor.ndim and len(tensor) > 1 else tensor[None].clone()
            case _:
                tensors[name] = torch.zeros_like(tensor)
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def damage_safetensors(rng, content, label=None):
    """Of the bytes, the header's JSON, or the tensors."""
    match rng.randrange(3):
        case 0:
            return damage_bytes(rng, content)
        case 1:
            end = 8 + int.from_bytes(content[:8], "little")
            header = damage_text(rng, content[8:end])
            return len(header).to_bytes(8, "little") + header + content[end:]
        case _:
            return save(damage_tensors(rng, load(content)), label)


# What reads them


def take(data, limit=64):
    """The first batch that training would see."""
    batch = next(data.batches(3, seed=0))
    assert batch.samples.isfinite().all()
    assert batch.labels.min() >= 0
    assert batch.labels.max() < data.num_classes
    assert batch.samples.nbytes < limit * 2**20


def fuzz_npz(folder):
    """Archives of images or latents, with labels."""
    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (6, 4, 4), dtype=np.uint8), np.arange(6) % 3
    whole = []
    for write in (np.savez, np.savez_compressed):
        for arrays in (
            {"images": images, "labels": labels},
            {"x": (images / 255).astype(">f4"), "y": labels.astype(">i2")},
            {"latents": rng.normal(size=(6, 2, 4, 4)).astype(np.float16), "labels": labels},
        ):
            write(file := io.BytesIO(), **arrays)
            whole.append(file.getvalue())
    path = folder / "d.npz"

    def damage(rng, content):
        """The archive, or what is in it: the archive's checksums fit again."""
        if rng.random() < 0.5:
            return damage_bytes(rng, content)
        packed = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(content)) as before, zipfile.ZipFile(packed, "w", rng.choice([0, 8])) as after:
            for name in before.namelist():
                array = before.read(name)
                array = damage_bytes(rng, array) if rng.random() < 0.7 else array
                after.writestr(rng.choice(["x", "labels.npy"]) if rng.random() < 0.05 else name, array)
        return packed.getvalue()

    def case(rng):
        path.write_bytes(damage(rng, rng.choice(whole)))
        take(load_data(DataConfig(data=str(path), memory_limit_gb=LIMIT_GB)))

    return case


def fuzz_latents(folder):
    """A safetensors file of latents."""
    tensors = {"latents": torch.randn(6, 2, 4, 4, dtype=torch.float16), "labels": torch.arange(6) % 3}
    whole, path = save(tensors), folder / "l.safetensors"

    def case(rng):
        path.write_bytes(damage_safetensors(rng, whole))
        take(load_data(DataConfig(data=str(path), memory_limit_gb=LIMIT_GB)))

    return case


def fuzz_features(folder):
    """A teacher's features."""
    tensors = {name: torch.randn(16, 4, 5).half() for name in ("features", "mirrored")}
    label = {"teacher": "tiny", "teacher_size": "8", "source": "digits"}
    whole, path, data = save(tensors, label), folder / "f.safetensors", tiny_data()

    def case(rng):
        path.write_bytes(damage_safetensors(rng, whole, label))
        tokens = Features(path, data, flip=True).tokens(torch.arange(16), torch.arange(16) % 2 == 0)
        assert tokens.isfinite().all()

    return case


def make_run(folder):
    """A run with a checkpoint of step 4, and a trainer to load it into."""
    run = folder / "run"
    config = tiny_config(optim={"steps": 4}, log={"sample_every": 0})
    start_run(run, config, overwrite=False)
    Trainer(config, tiny_data(), run_dir=run).fit()
    return run, Trainer(tiny_config(log={"sample_every": 0}), tiny_data())


def fits_again(rng, checkpoint):
    """Makes checksums fit what is there now, or removes them as in an old checkpoint; one time in four does nothing."""
    how = rng.randrange(4)
    state = json.loads((checkpoint / local.STATE).read_text())
    if how == 0 or not isinstance(state, dict):
        return
    state.pop("checksums", None)
    state.pop("digest", None)
    if how == 1:
        state.pop("run", None)
    else:
        state["checksums"] = {p.name: sha256(p) for p in checkpoint.glob("*.safetensors")}
        state["digest"] = local._digest(state)
    (checkpoint / local.STATE).write_text(json.dumps(state))


def resume(run, trainer):
    """As `layersync train --resume` does, and a step."""
    trainer.load(checkpoint_to_resume(run))
    trainer.step(next(trainer.batches()))
    trainer.check_finite()


def make_restorable_run(folder):
    """A run, its trainer, and what brings its checkpoints back as they were and gives the newest."""
    run, trainer = make_run(folder)
    kept = folder / "kept"
    shutil.copytree(run / "checkpoints", kept)

    def restored():
        shutil.rmtree(run / "checkpoints")
        shutil.copytree(kept, run / "checkpoints")
        return run / "checkpoints/step_00000004"

    return run, trainer, restored


def fuzz_checkpoint(folder):
    """The tensors of a checkpoint."""
    run, trainer, restored = make_restorable_run(folder)

    def case(rng):
        checkpoint = restored()
        path = checkpoint / f"{rng.choice(['model', 'ema', 'optimizer', 'optimizer', 'rng'])}.safetensors"
        with safe_open(path, "pt") as file:
            label = file.metadata()
        path.write_bytes(damage_safetensors(rng, path.read_bytes(), label))
        fits_again(rng, checkpoint)
        if rng.random() < 0.2:
            load_trained(run, which="ema" if rng.random() < 0.5 else "model")
        elif rng.random() < 0.2:
            load_trained(shutil.copy(path, folder / "lone.safetensors"), num_heads=2)
        resume(run, trainer)

    return case


def fuzz_state(folder):
    """The state of a checkpoint."""
    run, trainer, restored = make_restorable_run(folder)

    def case(rng):
        checkpoint = restored()
        path = checkpoint / local.STATE
        path.write_bytes(damage_text(rng, path.read_bytes()))
        with contextlib.suppress(ValueError, RecursionError):  # it is no JSON any more
            fits_again(rng, checkpoint)
        if rng.random() < 0.5:
            load_trained(checkpoint)
        resume(run, trainer)

    return case


def fuzz_config(folder):
    """The config of a run."""
    run, _ = make_run(folder)
    path = run / "config.json"
    whole = path.read_bytes()

    def case(rng):
        path.write_bytes(damage_text(rng, whole))
        load_config(path).validate()
        load_trained(run)

    return case


def fuzz_records(folder):
    """The records of a run: nothing stops at them."""
    run, _ = make_run(folder)
    path = run / RECORDS
    whole = path.read_bytes().splitlines() * 3

    def case(rng):
        lines = [damage_text(rng, line) if rng.random() < 0.5 else line for line in whole]
        content = b"\n".join(lines)
        path.write_bytes(damage_bytes(rng, content) if rng.random() < 0.3 else content)
        assert checkpoint_to_resume(run) is not None
        RunLog(run, step=4, steps=8)
        records = read_records(run)
        assert all(record["step"] <= 4 for record in records)
        if records and rng.random() < 0.02:
            save_curves(records, folder / "curves.png")

    return case


def fuzz_marks(folder):
    """The marks of a comparison; `Run.read` makes a UserError of a ValueError."""
    mark = {"step": 2, "seconds": 0.5, "validation_loss": 1.0, "frechet": None, "frechet_floor": 1.0, "loss": 0.5}
    whole, path = json.dumps([mark | {"teacher": "x", "teacher_share": 0.1}] * 3).encode(), folder / "marks.json"

    def case(rng):
        path.write_bytes(damage_text(rng, whole))
        try:
            read_marks(path)
        except ValueError as error:
            raise UserError(str(error)) from error

    return case


def fuzz_published(folder):
    """A published .pt."""
    _, trainer = make_run(folder)
    file, path = io.BytesIO(), folder / "p.pt"
    torch.save({"ema": trainer.ema.state_dict(), "model": trainer.model.state_dict()}, file)

    def case(rng):
        path.write_bytes(damage_bytes(rng, file.getvalue()))
        fill_model(trainer.model, load_weights(path))

    return case


def checked_png(content):
    """With the checksums of all chunks right again, as far as there are chunks."""
    content, at = bytearray(content), 8
    while at + 12 <= len(content):
        end = at + 8 + int.from_bytes(content[at : at + 4], "big")
        content[end : end + 4] = zlib.crc32(content[at + 4 : end]).to_bytes(4, "big") if end < len(content) else b""
        at = end + 4
    return bytes(content)


def fuzz_images(suffix, **options):
    """A folder with a damaged image of this kind and a whole one."""

    def make(folder):
        rng = np.random.default_rng(0)
        whole = []
        for shape, mode in (((24, 20, 3), "RGB"), ((16, 16), "L"), ((9, 30, 4), "RGBA"), ((16, 16), "P")):
            if suffix == "jpeg" and mode in ("RGBA", "P"):
                continue
            file = io.BytesIO()
            image = Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).convert(mode)
            for extra in [{}, options]:
                image.save(file := io.BytesIO(), suffix, **extra)
                whole.append(file.getvalue())
        (folder / "images" / "a").mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(folder / "images" / "a" / "0.png")
        path = folder / "images" / "a" / f"1.{suffix}"

        def case(rng):
            content = damage_bytes(rng, rng.choice(whole))
            path.write_bytes(checked_png(content) if suffix == "png" and rng.random() < 0.7 else content)
            # One time in five the samples are beyond the limit, and each image is not: they are streamed.
            limit, size = (2e-5, 64) if rng.random() < 0.2 else (LIMIT_GB, rng.choice([None, 4]))
            config = DataConfig(data=str(folder / "images"), image_size=size, memory_limit_gb=limit, workers=0)
            data = load_data(config)
            take(data)
            if data.broken:
                raise UserError("broken")  # counted as refused

        return case

    return make


KINDS = {
    "npz": fuzz_npz,
    "latents": fuzz_latents,
    "features": fuzz_features,
    "checkpoint": fuzz_checkpoint,
    "state": fuzz_state,
    "config": fuzz_config,
    "records": fuzz_records,
    "marks": fuzz_marks,
    "published": fuzz_published,
    "png": fuzz_images("png", optimize=True),
    "jpeg": fuzz_images("jpeg", progressive=True),
    "tiff": fuzz_images("tiff", compression="tiff_lzw"),
}


def grown():
    """The most memory that this process has had, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def fuzz(kind, count, start=0):
    """Runs the cases of a kind: how many were taken and refused, what else happened, seconds and MB at the most."""
    clock = time.perf_counter
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        torch.manual_seed(0)
        case = KINDS[kind](folder)
        with open("/proc/self/statm") as file:
            size = int(file.read().split()[0]) * resource.getpagesize()
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        before, began, slowest = grown(), clock(), (0.0, start)
        ended, failures = collections.Counter(), {}
        for number in range(start, start + count):
            resource.setrlimit(resource.RLIMIT_AS, (size + ROOM, hard))
            faulthandler.dump_traceback_later(3 * SECONDS, exit=True)
            signal.setitimer(signal.ITIMER_REAL, SECONDS)
            at = clock()
            print(f"{kind} {number}", file=sys.stderr, flush=True)  # the last line tells which case ended the process
            try:
                case(random.Random(f"{kind} {number}"))
                ended["taken"] += 1
            except UserError:
                ended["refused"] += 1
            except (Exception, TooSlow) as error:
                ended["failed"] += 1
                where = traceback.extract_tb(error.__traceback__)[-1]
                failures.setdefault(f"{type(error).__name__}: {str(error)[:200]} ({where.name})", number)
                traceback.print_exc()
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
                faulthandler.cancel_dump_traceback_later()
                resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
            slowest = max(slowest, (clock() - at, number))
        return {
            "kind": kind,
            **{name: ended[name] for name in ("taken", "refused", "failed")},
            "failures": failures,
            "seconds": round(clock() - began, 1),
            "slowest": round(slowest[0], 2),
            "slowest_case": slowest[1],
            "grown_mb": round(grown() - before),
        }


def _too_slow(*_):
    raise TooSlow(f"more than {SECONDS} s")


def main(count, *kinds):
    """See the module."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGALRM, _too_slow)
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    for kind in kinds or KINDS:
        print(json.dumps(fuzz(kind, int(count))), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

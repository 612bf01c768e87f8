"""Runs of the trainer end, bit by bit, where `golden/trajectories.json` says: moving code must not change numbers.

`python -m tests.sit.test_trajectories --write` computes that file anew, for a change of numbers that is meant.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from layersync_kernels import cli
from layersync_kernels.bench.machine import machine_facts
from layersync_kernels.ops import native
from layersync_kernels.sit import create_transport
from layersync_kernels.sit.batch import Condition
from layersync_kernels.sit.checkpoints.local import list_checkpoints, read_tensors
from layersync_kernels.sit.config.sampling import SamplingConfig
from layersync_kernels.sit.sampling.draw import draw
from layersync_kernels.sit.sampling.load import load_trained
from layersync_kernels.sit.training.runlog import read_records

GOLDEN = Path(__file__).parent / "golden" / "trajectories.json"

# 16 images of 8x8, three blocks of width 32, 16 tokens.
SIZE = "--model SiT-P/2 --hidden-size 32 --depth 3 --num-heads 2 --batch-size 6 --steps 6 --lr 2e-3 --ema-decay 0.5"
LOGS = "--log-every 1 --sample-every 0 --checkpoint-every 3 --keep 10 --no-tensorboard --device cpu --compile off"
FULL = (
    "--flip --accumulate 2 --clip-norm 0.5 --ema-warmup --warmup-steps 2 --lr-schedule cosine --weight-decay 0.01 "
    "--layersync 1:2 1:3 --weight 0.5 0.25 --schedule cosine --start-step 1 --stop-step 5 --every 2"
)
RUNS = {
    "fused": f"{FULL} --precision fp32",
    "fused bf16": f"{FULL} --precision bf16",
    "fused fp16": f"{FULL} --precision fp16",
    "eager": f"{FULL} --kernels eager --precision fp32",
    "eager bf16": f"{FULL} --kernels eager --precision bf16",
    "recompute": "--layersync auto --recompute light --precision fp32",
    "plain": "--layersync off --path-type gvp --prediction noise --loss-weight likelihood --precision fp32",
    "teacher's gradient": "--layersync 1:3 --teacher-grad --loss-backend reference --precision fp32",
    "repa of features": "--flip --accumulate 2 --layersync 2:3 --align repa --features FEATURES --clip-norm 1 "
    "--align-schedule linear --align-stop-step 5 --precision bf16",
    "irepa": "--flip --accumulate 3 --layersync off --align irepa --teacher hub/TEACHER:tiny --teacher-size 8 "
    "--align-block 2 --align-every 2 --kernels eager --precision fp32",
}
DRAWS = {
    "heun": SamplingConfig(solver="heun", sampling_steps=4, cfg_scale=2.0, guidance_interval=(0.3, 0.8)),
    "dopri5": SamplingConfig(),
    "sde": SamplingConfig(sampler="sde", solver="euler", sampling_steps=5, cfg_scale=1.5),
}
TOLERANCE = {"fp32": 5e-5, "fp16": 1e-2, "bf16": 1e-2}
"""Relative, of the losses on machines that round otherwise; off by 5e-6 and 2e-3 with AVX2 or no vectors at all."""


def facts():
    """What decides about the bits; the number of threads and their order is fixed at one."""
    library = native.cpp().facts
    return {
        "torch": torch.__version__,
        "cpu": f"{machine_facts('cpu')['cpu']} {processor()}",
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "kernels": "none" if library is None else library.cpu_isa(),
        "compiler": "none" if library is None else library.compiler,
    }


def processor():
    """Family, model and stepping: virtual machines give processors of several generations the same name."""
    try:
        lines = [line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines()]
    except OSError:
        return ""
    found = {name.strip(): value.strip() for name, _, value in lines}
    return "-".join(found.get(name, "") for name in ("cpu family", "model", "stepping"))


def compute():
    """All runs and draws: their digests and losses."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        numbers = np.random.default_rng(0)
        images = numbers.integers(0, 256, (16, 8, 8), dtype=np.uint8)
        np.savez(root / "data.npz", images=images, labels=np.arange(16) % 3)
        tokens = {name: torch.from_numpy(numbers.normal(size=(16, 4, 5))).half() for name in ("features", "mirrored")}
        save_file(tokens, root / "features.safetensors")
        (root / "hubconf.py").write_text(
            "import torch\n"
            "def tiny(pretrained):\n"
            "    network = torch.nn.Conv2d(3, 5, 2, stride=2)\n"
            "    for parameter in network.parameters():\n"
            "        torch.nn.init.normal_(parameter, generator=torch.Generator().manual_seed(1))\n"
            "    return network\n"
        )
        runs = {name: train(root, name, flags) for name, flags in RUNS.items()}
        model, transport = load_trained(root / "fused").model, create_transport()
        labels = torch.arange(5) % 3
        drawn = {name: draw(model, transport, sampling, Condition(labels), seed=3) for name, sampling in DRAWS.items()}
    draws = {name: {"digest": digest({"": x}), "some": x.flatten()[::40].tolist()} for name, x in drawn.items()}
    return {"facts": facts(), "runs": runs, "draws": draws}


def train(root, name, flags):
    flags = flags.replace("FEATURES", str(root / "features.safetensors")).replace("TEACHER", str(root))
    run = root / name
    flags = f"--preset paper {SIZE} {LOGS} {flags}"
    assert cli.main(["train", f"--data={root / 'data.npz'}", f"--out={run}", *flags.split()]) == 0
    last = list_checkpoints(run)[-1]
    return {
        "losses": [untimed(record) for record in read_records(run)],
        "digests": {file.stem: digest(read_tensors(file)) for file in sorted(last.glob("*.safetensors"))},
    }


def untimed(record):
    """Name to number; cosines by block, as the name of a teacher holds that of a temporary folder."""
    timed = {"step", "seconds", "samples_per_second", "tokens_per_second", "data_wait", "teacher_share", "cosine"}
    timed |= {"save_seconds", "save_wait"}
    cosines = {f"cosine {pair.partition(':hub/')[0]}": value for pair, value in record.get("cosine", {}).items()}
    return {name: value for name, value in record.items() if name not in timed} | cosines


def digest(tensors):
    """SHA-256 of names, types, shapes and bytes."""
    sha = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        sha.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


@pytest.fixture(scope="module")
def golden():
    return json.loads(GOLDEN.read_text())


@pytest.fixture(scope="module", params=["here", pytest.param("generic", marks=pytest.mark.slow)])
def computed(request):
    """In a process of its own: threads and instruction sets are chosen at its start."""
    generic = {"ATEN_CPU_CAPABILITY": "default", "LAYERSYNC_CPU_ISA": "generic"} if request.param == "generic" else {}
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", **generic}
    done = subprocess.run(
        [sys.executable, "-m", "tests.sit.test_trajectories"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("name", RUNS)
def test_trajectory_is_the_stored_one(golden, computed, name):
    stored, found = golden["runs"][name], computed["runs"][name]
    precision = RUNS[name].rpartition(" ")[2]
    assert len(found["losses"]) == len(stored["losses"]) == 6
    for expected, record in zip(stored["losses"], found["losses"], strict=True):
        assert record == pytest.approx(expected, rel=TOLERANCE[precision], abs=TOLERANCE[precision])
    if computed["facts"] == golden["facts"]:
        assert found == stored
    assert found["digests"].keys() == stored["digests"].keys()


def test_samples_are_the_stored_ones(golden, computed):
    assert computed["draws"].keys() == golden["draws"].keys()
    for name, stored in golden["draws"].items():
        assert computed["draws"][name]["some"] == pytest.approx(stored["some"], rel=1e-4, abs=1e-4)
    if computed["facts"] == golden["facts"]:
        assert computed["draws"] == golden["draws"]


if __name__ == "__main__":
    computed_here = compute()
    if "--write" in sys.argv:
        GOLDEN.write_text(json.dumps(computed_here, indent=1) + "\n")
    else:
        print(json.dumps(computed_here))

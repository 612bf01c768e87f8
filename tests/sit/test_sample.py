from __future__ import annotations

import argparse
import dataclasses
import logging
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from layersync_kernels.errors import CheckpointError, ConfigError, UserError
from layersync_kernels.sit.batch import Condition
from layersync_kernels.sit.checkpoints.local import save_checkpoint
from layersync_kernels.sit.checkpoints.weights import warn_of_first_weights
from layersync_kernels.sit.commands.sample import SampleCommand, sample
from layersync_kernels.sit.config.io import load_config, save_config
from layersync_kernels.sit.config.model import ModelConfig
from layersync_kernels.sit.config.optim import OptimConfig
from layersync_kernels.sit.config.run import CONFIG, TrainConfig
from layersync_kernels.sit.config.sampling import SamplingConfig
from layersync_kernels.sit.diffusion.transport import create_transport
from layersync_kernels.sit.files import new_figure, plain_ticks
from layersync_kernels.sit.modality.images import save_grid, unit_to_pixels
from layersync_kernels.sit.modality.latents import Latents
from layersync_kernels.sit.models.sit import SiT
from layersync_kernels.sit.sampling.draw import draw
from layersync_kernels.sit.sampling.load import load_trained
from layersync_kernels.sit.training.curves import save_curves
from layersync_kernels.sit.training.loop import Trainer

from .tiny import run_state, tiny_config, tiny_data

FAST = SamplingConfig(solver="euler", sampling_steps=3)


def alive(model):
    """Weights away from the initialisation, whose prediction is zero."""
    torch.manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return model.eval()


@pytest.fixture
def model():
    return alive(SiT(4, 2, 1, hidden_size=16, depth=2, num_heads=4, num_classes=3))


@pytest.fixture
def run(tmp_path, model):
    """A run of that model, whose averaged and last weights differ."""
    run = tmp_path / "run"
    run.mkdir()
    save_config(
        TrainConfig(model=ModelConfig("SiT-P/2", hidden_size=16, depth=2, num_heads=4), sampling=FAST), run / CONFIG
    )
    zeros = {name: torch.zeros_like(value) for name, value in model.state_dict().items()}
    save_checkpoint(run, 5, {"model": zeros, "ema": model.state_dict()}, run_state(5))
    return run


def transport():
    return create_transport()


# Drawing


def test_seed_fixes_the_samples_and_batching_does_not_change_them(model):
    labels = torch.tensor([0, 1, 2, 0, 1])
    first = draw(model, transport(), FAST, Condition(labels), seed=0)
    assert first.shape == (5, 1, 4, 4)
    assert first.dtype == torch.float32
    torch.testing.assert_close(draw(model, transport(), FAST, Condition(labels), seed=0, batch_size=2), first)
    assert not torch.allclose(draw(model, transport(), FAST, Condition(labels), seed=1), first)


def test_drawing_leaves_the_global_generator_alone(model):
    before = torch.get_rng_state()
    sde = SamplingConfig(sampler="sde", solver="euler", sampling_steps=3)
    draw(model, transport(), sde, Condition(torch.tensor([0])), seed=0)
    assert torch.equal(torch.get_rng_state(), before)


def test_sde_noise_is_not_the_starting_noise(model, monkeypatch):
    drawn = []
    randn = torch.randn

    def record(*args, **kwargs):
        drawn.append(randn(*args, **kwargs))
        return drawn[-1]

    monkeypatch.setattr(torch, "randn", record)
    monkeypatch.setattr(torch, "randn_like", lambda x, **kwargs: record(x.shape, **kwargs))
    draw(
        model,
        transport(),
        SamplingConfig(sampler="sde", solver="euler", sampling_steps=3),
        Condition(torch.tensor([0])),
        seed=0,
    )
    assert len(drawn) > 1
    assert not any(torch.equal(drawn[0], noise) for noise in drawn[1:])


@pytest.mark.parametrize("solver", ["euler", "heun"])
def test_sde_is_reproducible_and_differs_from_the_ode(model, solver):
    labels = torch.arange(3)
    sde = SamplingConfig(sampler="sde", solver=solver, sampling_steps=5)
    first = draw(model, transport(), sde, Condition(labels), seed=0)
    assert torch.equal(first, draw(model, transport(), sde, Condition(labels), seed=0))
    assert not torch.allclose(first, draw(model, transport(), FAST, Condition(labels), seed=0))


def test_guidance_moves_away_from_the_unconditional_prediction(model):
    """One Euler step from t = 0: x + v, so guidance is linear in its scale."""
    one = {"solver": "euler", "sampling_steps": 2}
    labels = torch.arange(3)
    plain = draw(model, transport(), SamplingConfig(**one), Condition(labels), seed=0)
    null = draw(model, transport(), SamplingConfig(**one), Condition(torch.full((3,), 3)), seed=0)
    guided = draw(model, transport(), SamplingConfig(**one, cfg_scale=3.0), Condition(labels), seed=0)
    torch.testing.assert_close(guided, null + 3 * (plain - null), rtol=1e-4, atol=1e-4)
    late = SamplingConfig(**one, cfg_scale=3.0, guidance_interval=(0.5, 1.0))
    torch.testing.assert_close(draw(model, transport(), late, Condition(labels), seed=0), plain)


def test_guidance_without_null_label_is_an_error():
    model = SiT(4, 2, 1, hidden_size=16, depth=2, num_heads=4, num_classes=3, class_dropout_prob=0).eval()
    with pytest.raises(ConfigError, match="--class-dropout"):
        draw(model, transport(), SamplingConfig(cfg_scale=2.0), Condition(torch.tensor([0])), seed=0)


def test_guidance_without_null_label_is_an_error_before_training(tmp_path):
    config = tiny_config(model={"class_dropout": 0.0})
    with pytest.raises(ConfigError, match=r"--cfg-scale 2 needs a null label.*--sample-every 0"):
        Trainer(config, tiny_data(), run_dir=tmp_path)
    Trainer(config, tiny_data())  # draws nothing


# From runs and files


def test_run_draws_with_averaged_weights_one_row_per_class(run, model):
    command = SampleCommand(run, sampling=FAST, precision="fp32", classes=(2, 0), per_class=3, array=run / "s.npz")
    path = sample(dataclasses.replace(command, floats=True))
    assert path == run / "samples" / "grid.png"
    width, height = Image.open(path).size
    assert width > height  # three columns, two rows
    stored = np.load(run / "s.npz")
    assert stored["labels"].tolist() == [2, 2, 2, 0, 0, 0]
    expected = draw(model, transport(), FAST, Condition(torch.tensor([2, 2, 2, 0, 0, 0])), seed=0)
    np.testing.assert_allclose(stored["samples"], expected.numpy(), rtol=1e-5, atol=1e-5)
    sample(command)
    for_evaluation = np.load(run / "s.npz")  # what the evaluator of guided-diffusion reads
    assert for_evaluation["arr_0"].dtype == np.uint8
    np.testing.assert_array_equal(for_evaluation["arr_0"], unit_to_pixels(expected).permute(0, 2, 3, 1).numpy())
    assert for_evaluation["arr_1"].tolist() == [2, 2, 2, 0, 0, 0]


def test_last_weights_can_be_asked_for(run):
    sample(SampleCommand(run, sampling=FAST, weights="model", array=run / "last.npz"))
    sample(SampleCommand(run, sampling=FAST, array=run / "ema.npz"))
    assert not np.array_equal(np.load(run / "last.npz")["arr_0"], np.load(run / "ema.npz")["arr_0"])


@pytest.mark.parametrize(
    ("optim", "which", "said"),
    [
        (OptimConfig(ema_decay=0.9999), "ema", "after 5 steps 100 % of the averaged weights"),
        (OptimConfig(ema_decay=(0.5, 0.9)), "ema-0.9", "59 % of the averaged weights"),
        (OptimConfig(ema_decay=0.9999), "model", None),
        (OptimConfig(ema_decay=0.6), "ema", None),  # 8 %
        (OptimConfig(ema_decay=0.9999, ema_warmup=True), "ema", None),
    ],
)
def test_an_average_that_is_still_its_start_is_told(run, caplog, optim, which, said):
    config = load_config(run / CONFIG)
    save_config(dataclasses.replace(config, optim=optim), run / CONFIG)
    with caplog.at_level(logging.WARNING):
        warn_of_first_weights(optim, 5, which)
    assert (said in caplog.text) if said else not caplog.records
    caplog.clear()
    if which != "ema-0.9":  # of which this run has no file
        load_trained(run, which=which)
        assert bool(caplog.records) == bool(said)


@pytest.mark.parametrize(("change", "said"), [({"vae": "nobody/nothing"}, "--vae"), ({"floats": True}, "--array")])
def test_flags_that_say_nothing_here_are_refused(run, change, said):
    with pytest.raises(ConfigError, match=said):
        sample(SampleCommand(run, sampling=FAST, **change))


def test_checkpoint_folder_inside_its_run_and_copied_out_of_it(run, tmp_path):
    inside = run / "checkpoints" / "step_00000005"
    assert load_trained(inside).spec.shape == (1, 4, 4)
    shutil.copytree(inside, tmp_path / "copy")
    assert load_trained(tmp_path / "copy", num_heads=4).spec.shape == (1, 4, 4)


@pytest.mark.parametrize("null_label", [True, False])
def test_published_file_tells_its_own_size(tmp_path, null_label):
    """Heads follow from the published width and depth, everything else from the shapes."""
    made = alive(
        SiT(8, 4, 4, hidden_size=384, depth=12, num_heads=6, num_classes=5, class_dropout_prob=0.1 * null_label)
    )
    args = argparse.Namespace(model="SiT-S/4", num_classes=5)
    torch.save({"ema": made.state_dict(), "args": args}, tmp_path / "0001.pt")
    trained = load_trained(tmp_path / "0001.pt")
    assert trained.spec.shape == (4, 8, 8)
    assert trained.num_classes == 5
    assert isinstance(trained.modality, Latents)
    assert trained.model.num_heads == 6
    x, t, y = torch.randn(2, 4, 8, 8), torch.rand(2), torch.tensor([0, 4])
    assert torch.equal(trained.model(x, t, y), made(x, t, y))


def test_lone_file_of_unknown_size_asks_for_heads(run, tmp_path):
    lone = run / "checkpoints" / "step_00000005" / "ema.safetensors"
    with pytest.raises(CheckpointError, match=r"ema\.safetensors.*--num-heads"):
        load_trained(lone)
    assert load_trained(lone, num_heads=4).model.depth == 2
    with pytest.raises(CheckpointError, match="num_heads=3"):
        load_trained(lone, num_heads=3)


def test_file_of_another_kind_is_no_sit(tmp_path):
    torch.save({"layer.weight": torch.zeros(3)}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match=r"other\.pt is no SiT checkpoint"):
        load_trained(tmp_path / "other.pt")


def test_weights_that_diverged_are_reported(run):
    save_checkpoint(
        run,
        6,
        {"ema": {n: torch.full_like(v, float("nan")) for n, v in load_trained(run).model.state_dict().items()}},
        run_state(6),
    )
    with pytest.raises(CheckpointError, match="not finite"):
        sample(SampleCommand(run, sampling=FAST))


def test_flipped_bit_in_the_weights_stops_it(run):
    ema = run / "checkpoints" / "step_00000005" / "ema.safetensors"
    content = bytearray(ema.read_bytes())
    content[-100] ^= 1
    ema.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"ema\.safetensors: it is damaged"):
        sample(SampleCommand(run, sampling=FAST))
    assert not (run / "samples").exists()
    sample(SampleCommand(run, sampling=FAST, weights="model"))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"classes": (3,)}, r"--classes 3: the model has classes 0 to 2"),
        ({"classes": (-1,)}, r"--classes -1"),
        ({"per_class": 0}, "--per-class 0"),
        ({"batch_size": 0}, "--batch-size 0"),
        ({"sampling": SamplingConfig(sampler="sde")}, "--sampler sde"),
        ({"sampling": SamplingConfig(sampling_steps=1)}, "--sampling-steps 1"),
        ({"sampling": SamplingConfig(sampler="sde", solver="euler", diffusion_form="wild")}, "wild"),
        ({"device": "cuda:77"}, "--device"),
    ],
)
def test_bad_sample_settings_are_explained(run, changes, message):
    with pytest.raises(UserError, match=message):
        sample(SampleCommand(run, **changes))


# Pictures


def test_grid_places_samples_row_by_row_and_enlarges_them(tmp_path):
    samples = torch.full((3, 1, 14, 14), -1.0)
    samples[1] = 1.0
    save_grid(samples, tmp_path / "grid.png", columns=2)
    pixels = np.array(Image.open(tmp_path / "grid.png"))
    assert pixels.shape == (2 * 58 + 2, 2 * 58 + 2)
    assert (pixels[2:58, 60:116] == 255).all()
    assert (pixels[2:58, 2:58] == 0).all()
    assert (pixels[60:116, 2:58] == 0).all()
    assert (pixels[60:116, 60:116] == 128).all()


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (3, "RGB"), (4, "RGB")])
def test_grid_of_any_number_of_channels(tmp_path, channels, mode):
    save_grid(torch.randn(2, channels, 8, 8), tmp_path / "grid.png", columns=2, latent=channels == 4)
    assert Image.open(tmp_path / "grid.png").mode == mode


def test_curves_without_cosine_and_with_gaps(tmp_path):
    records = [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.0, "cosine": {"1:2": 0.5}}, {"step": 3, "loss": 0.5}]
    assert save_curves(records, tmp_path / "c.png").stat().st_size > 1000
    assert save_curves(records[:1], tmp_path / "one.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("values", "scale", "expected"),
    [
        ([2.35, 2.1], "log", ["2.1", "2.2", "2.3"]),
        ([0.05, 2.0], "log", ["0.05", "0.1", "0.2", "0.5", "1", "2"]),
        ([311_000, 311_049], "linear", ["311,000", "311,020", "311,040"]),
        ([0.99990, 0.9999005], "linear", ["0.9999", "0.9999002", "0.9999004"]),
    ],
)
def test_ticks_are_numbers_as_people_read_them(values, scale, expected):
    figure = new_figure(4, 3)
    axes = figure.subplots()
    axes.plot(range(2), values)
    axes.set_yscale(scale)
    plain_ticks(axes.yaxis)
    figure.canvas.draw()
    low, high = sorted(axes.get_ylim())
    shown = [t.get_text() for t in axes.get_yticklabels() if low <= t.get_position()[1] <= high]
    assert shown == expected
    assert not axes.yaxis.get_offset_text().get_text()


@pytest.mark.parametrize(("every", "lines"), [(1, 4), (2, 1)])
def test_every_row_is_shown_where_each_step_is_recorded(every, lines, caplog):
    """Else one in ten seconds, and the last."""
    config = tiny_config(optim={"steps": 4}, log={"log_every": every})
    with caplog.at_level(logging.INFO, logger="layersync_kernels"):
        Trainer(config, tiny_data()).fit()
    assert sum("samples/s" in message for message in caplog.messages) == lines

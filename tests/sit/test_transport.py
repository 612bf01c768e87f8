"""Interpolants, training losses and samplers: equal to the published code, exact on Gaussians, bad input."""

import functools
import itertools
import json
import math
from pathlib import Path

import pytest
import torch

from layersync_kernels.sit import Sampler, SiT, create_transport
from layersync_kernels.sit.diffusion.interpolants import DIFFUSION_FORMS, INTERPOLANTS

GOLDEN = json.loads((Path(__file__).parent / "golden" / "transport.json").read_text(encoding="utf-8"))
PREDICTIONS = ("velocity", "noise", "score")


def wave(shape, phase, scale=1.0):
    index = torch.arange(math.prod(shape), dtype=torch.float64)
    return (scale * torch.sin(0.7 * index + phase)).float().reshape(shape)


def smooth_model(x, t):
    return 0.5 * x * torch.cos(2 * t).view(-1, 1, 1, 1) - 0.3 * torch.tanh(x) + 0.1


MEAN, STD = 1.5, 0.5


def gaussian_model(transport):
    """What a perfect model of data N(MEAN, STD²) predicts: x_t is Gaussian, so everything is in closed form."""

    def model(x, t):
        time = t.view(-1, *[1] * (x.ndim - 1))
        (alpha, d_alpha), (sigma, d_sigma) = transport.interpolant.alpha(time), transport.interpolant.sigma(time)
        centred = (x - alpha * MEAN) / ((alpha * STD) ** 2 + sigma**2)
        data, noise = MEAN + alpha * STD**2 * centred, sigma * centred
        return {"velocity": d_alpha * data + d_sigma * noise, "noise": noise, "score": -centred}[transport.prediction]

    return model


# ---- interpolants


@pytest.mark.parametrize(
    ("name", "alpha", "sigma"),
    [
        ("linear", lambda t: t, lambda t: 1 - t),
        ("gvp", lambda t: math.sin(math.pi * t / 2), lambda t: math.cos(math.pi * t / 2)),
        # exp(-1/2 of the integral of beta from t to 1), beta(t) = 20 - 19.9 t
        ("vp", lambda t: math.exp(-0.5 * (20 * (1 - t) - 19.9 * (1 - t * t) / 2)), None),
    ],
)
def test_path_coefficients_follow_their_formula_and_derivatives_their_coefficients(name, alpha, sigma):
    path = INTERPOLANTS[name]()
    t = torch.linspace(0.02, 0.98, 25, dtype=torch.float64, requires_grad=True)
    expected_alpha = torch.tensor([alpha(v) for v in t.tolist()], dtype=torch.float64)
    expected_sigma = (1 - expected_alpha**2).sqrt() if sigma is None else torch.tensor([sigma(v) for v in t.tolist()])
    for (value, slope), expected in ((path.alpha(t), expected_alpha), (path.sigma(t), expected_sigma.double())):
        torch.testing.assert_close(value.detach(), expected, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(slope.detach(), torch.autograd.grad(value.sum(), t)[0])
    (value, slope), (s, d_s) = path.alpha(t), path.sigma(t)
    torch.testing.assert_close(path.d_log_alpha(t), slope / value)
    torch.testing.assert_close(path.rate(t), slope / value * s**2 - s * d_s)


def test_vp_sigma_keeps_its_digits_where_training_ends():
    t = 1 - torch.logspace(-5, -3, 50)
    exact = INTERPOLANTS["vp"]().sigma(t.double())[0]
    torch.testing.assert_close(INTERPOLANTS["vp"]().sigma(t)[0].double(), exact, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize(("name", "prediction"), list(itertools.product(INTERPOLANTS, PREDICTIONS)))
def test_every_prediction_stands_for_the_same_velocity_and_score(name, prediction):
    transport, velocity, score = (create_transport(name, p) for p in (prediction, "velocity", "score"))
    t = torch.linspace(0.05, 0.95, 7, dtype=torch.float64)
    x = wave((7, 1, 2, 2), 0.3).double()
    output = gaussian_model(transport)(x, t)
    torch.testing.assert_close(transport.velocity(output, x, t), gaussian_model(velocity)(x, t))
    torch.testing.assert_close(transport.score(output, x, t), gaussian_model(score)(x, t))


@pytest.mark.parametrize("name", INTERPOLANTS)
def test_the_score_of_a_velocity_is_finite_at_the_start(name):
    transport = create_transport(name)
    x, t = wave((2, 1, 2, 2), 0.3), torch.zeros(2)
    score = transport.score(gaussian_model(transport)(x, t), x, t)
    torch.testing.assert_close(score, gaussian_model(create_transport(name, "score"))(x, t), rtol=1e-4, atol=1e-4)


# ---- training losses


@pytest.mark.parametrize(("path", "prediction", "weight", "expected"), GOLDEN["losses"])
def test_losses_are_the_published_ones(path, prediction, weight, expected):
    transport = create_transport(path, prediction, weight)
    x1, x0 = wave((3, 2, 2, 2), 0.4), wave((3, 2, 2, 2), 1.9)
    terms = transport.training_losses(smooth_model, x1, t=torch.tensor([0.05, 0.5, 0.9]), x0=x0)
    torch.testing.assert_close(terms["loss"], torch.tensor(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("path", "prediction", "train", "sample", "times"),
    [
        ("linear", "velocity", 0.0, 0.0, (0.0, 1.0)),
        ("gvp", "velocity", 0.0, 0.0, (0.0, 1.0)),
        ("linear", "noise", 1e-3, 1e-3, (1e-3, 1 - 1e-3)),
        ("gvp", "score", 1e-3, 1e-3, (1e-3, 1 - 1e-3)),
        ("vp", "velocity", 1e-5, 1e-3, (0.0, 1 - 1e-5)),
        ("vp", "noise", 1e-5, 1e-3, (0.0, 1 - 1e-5)),
    ],
)
def test_default_distances_are_the_published_ones(path, prediction, train, sample, times):
    transport = create_transport(path, prediction)
    assert (transport.train_eps, transport.sample_eps) == (train, sample)
    assert transport.interval(transport.train_eps) == times
    assert create_transport(path, prediction, sample_eps=0.01).sample_eps == 0.01
    assert create_transport(path, prediction, train_eps=0.01).sample_eps == sample


def test_training_times_fill_the_interval_and_noise_is_standard_normal():
    transport = create_transport("linear", "noise", train_eps=0.2)
    seen = {}

    def model(x, t):
        seen["t"] = t
        return x

    x1 = torch.zeros(4000, 1, 2, 2)
    noise = transport.training_losses(model, x1, generator=torch.Generator().manual_seed(0))["pred"]
    t = seen["t"]
    assert 0.2 <= t.min() < 0.21
    assert 0.79 < t.max() <= 0.8
    noise = noise / (1 - t).view(-1, 1, 1, 1)
    assert abs(noise.mean()) < 0.03
    assert abs(noise.std() - 1) < 0.03


def test_a_generator_repeats_the_losses_and_leaves_the_global_one_alone():
    transport, x1 = create_transport(), wave((5, 1, 2, 2), 0.0)
    before = torch.get_rng_state()
    first, second, third = (
        transport.training_losses(smooth_model, x1, generator=torch.Generator().manual_seed(seed))["loss"]
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, third)
    assert torch.equal(before, torch.get_rng_state())


def test_states_of_the_model_are_handed_on():
    model = SiT(input_size=4, hidden_size=16, depth=2, num_heads=1, num_classes=3)
    y = torch.tensor([0, 1])
    terms = create_transport().training_losses(model, wave((2, 4, 4, 4), 0.0), {"y": y, "capture": (2,)})
    assert terms["states"][2].shape == (2, 4, 16)
    assert terms["loss"].shape == (2,)
    assert "states" not in create_transport().training_losses(model, wave((2, 4, 4, 4), 0.0), {"y": y})


def test_half_precision_data_keep_an_fp32_loss():
    seen = []

    def model(x, t):
        seen.append((x.dtype, t.dtype))
        return x

    x1, t = wave((3, 1, 8, 8), 0.0), torch.tensor([0.1, 0.5, 0.9])
    x0 = wave((3, 1, 8, 8), 1.0)
    exact = create_transport().training_losses(model, x1.bfloat16().float(), t=t, x0=x0)["loss"]
    loss = create_transport().training_losses(model, x1.bfloat16(), t=t, x0=x0)["loss"]
    create_transport().training_losses(model, x1.bfloat16())
    assert seen[1] == seen[2] == (torch.bfloat16, torch.float32)
    assert loss.dtype is torch.float32
    torch.testing.assert_close(loss, exact, rtol=3e-3, atol=0.0)


# ---- samplers


@pytest.mark.parametrize(("kind", "path", "prediction", "method", "form", "last", "expected"), GOLDEN["samples"])
def test_samples_are_the_published_ones(kind, path, prediction, method, form, last, expected):
    sampler = Sampler(create_transport(path, prediction))
    torch.manual_seed(0)
    if kind == "ode":
        sample = sampler.sample_ode(sampling_method=method, num_steps=10)
    else:
        sample = sampler.sample_sde(
            sampling_method=method, diffusion_form=form, diffusion_norm=0.7, last_step=last, num_steps=10
        )
    x = sample(wave((2, 1, 2, 2), 0.8, 1.5), smooth_model).flatten()
    torch.testing.assert_close(x, torch.tensor(expected), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("path", "prediction"), list(itertools.product(INTERPOLANTS, PREDICTIONS)))
@pytest.mark.parametrize(
    ("method", "steps", "tolerance"),
    [("dopri5", 2, 1e-4), ("heun", 200, 5e-3), ("euler", 1000, 2e-2)],
)
def test_ode_carries_noise_to_the_gaussian_it_was_trained_on(path, prediction, method, steps, tolerance):
    transport = create_transport(path, prediction, sample_eps=None if prediction == "velocity" else 0.02)
    z = torch.linspace(-2, 2, 16, dtype=torch.float64).view(2, 1, 2, 4)
    sample = Sampler(transport).sample_ode(sampling_method=method, num_steps=steps, atol=1e-7, rtol=1e-6)
    start, end = transport.interval(transport.sample_eps)
    (mean0, std0), (mean1, std1) = (
        (alpha * MEAN, math.hypot(alpha * STD, sigma))
        for alpha, sigma in (
            (transport.interpolant.alpha(time)[0].item(), transport.interpolant.sigma(time)[0].item())
            for time in torch.tensor([start, end], dtype=torch.float64)
        )
    )
    expected = mean1 + std1 * (z - mean0) / std0  # the flow between two Gaussians of one dimension
    torch.testing.assert_close(sample(z, gaussian_model(transport)), expected, rtol=0.0, atol=tolerance)


def assert_gaussian(transport, tolerance, **settings):
    torch.manual_seed(0)
    z = torch.randn(2, 1, 128, 128)
    x = Sampler(transport).sample_sde(**settings)(z, gaussian_model(transport))
    assert abs(x.mean().item() - MEAN) < tolerance
    assert abs(x.std().item() - STD) < tolerance


@pytest.mark.parametrize("method", ["euler", "heun"])
@pytest.mark.parametrize("form", DIFFUSION_FORMS)
@pytest.mark.parametrize("path", INTERPOLANTS)
def test_every_diffusion_has_the_marginals_of_the_data(path, form, method):
    # A last step without noise, of size h, lacks 2wh of variance: visible where w is not small at the end.
    assert_gaussian(create_transport(path), 0.02, sampling_method=method, diffusion_form=form, last_step="euler")


@pytest.mark.parametrize("last_step", [None, "mean", "tweedie", "euler"])
@pytest.mark.parametrize("method", ["euler", "heun"])
@pytest.mark.parametrize(
    ("path", "prediction"), [("linear", "velocity"), ("linear", "noise"), ("gvp", "score"), ("vp", "noise")]
)
def test_every_last_step_ends_at_the_data(path, prediction, method, last_step):
    assert_gaussian(create_transport(path, prediction), 0.03, sampling_method=method, last_step=last_step)


def test_reverse_goes_back_to_the_noise():
    for path in INTERPOLANTS:
        sampler = Sampler(create_transport(path))
        model = gaussian_model(sampler.transport)
        z = wave((2, 1, 2, 2), 0.8).double()
        x = sampler.sample_ode(atol=1e-8, rtol=1e-7)(z, model)
        torch.testing.assert_close(
            sampler.sample_ode(atol=1e-8, rtol=1e-7, reverse=True)(x, model), z, rtol=0, atol=1e-5
        )
        assert (x - z).abs().max() > 0.1


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("method", ["dopri5", "heun", "euler"])
def test_the_model_is_never_asked_beyond_the_ends(method, reverse):
    transport, times = create_transport("linear", "noise"), []

    def model(x, t):
        times.append(t[0].item())
        return gaussian_model(transport)(x, t)

    Sampler(transport).sample_ode(sampling_method=method, reverse=reverse)(wave((2, 1, 2, 2), 0.8), model)
    assert min(times) >= 1e-3 - 1e-7
    assert max(times) <= 1 - 1e-3 + 1e-7


def test_sde_evaluates_the_model_once_per_slope():
    calls = []

    def model(x, t):
        calls.append(t)
        return x

    for method, last, expected in (("euler", None, 9), ("euler", "mean", 10), ("heun", "tweedie", 19)):
        calls.clear()
        sample = Sampler(create_transport()).sample_sde(sampling_method=method, last_step=last, num_steps=10)
        sample(torch.zeros(1, 1, 2, 2), model)
        assert len(calls) == expected


def test_sde_without_diffusion_is_the_ode():
    sampler, z = Sampler(create_transport()), wave((2, 1, 2, 2), 0.8)
    sde = sampler.sample_sde(diffusion_norm=0.0, last_step=None, num_steps=20)(z, smooth_model)
    torch.testing.assert_close(sde, sampler.sample_ode(sampling_method="euler", num_steps=20)(z, smooth_model))


def test_a_generator_repeats_the_sde():
    z = wave((2, 1, 2, 2), 0.8)
    first, second, third = (
        Sampler(create_transport()).sample_sde(num_steps=5, generator=torch.Generator().manual_seed(seed))(
            z, smooth_model
        )
        for seed in (1, 1, 2)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


@pytest.mark.parametrize("reach", ["module", "method", "partial"])
def test_sampling_drops_no_labels_and_restores_the_mode_of_every_part(reach):
    model = SiT(input_size=4, hidden_size=16, depth=1, num_heads=1, num_classes=3).train()
    model.final_layer.eval()
    modes, seen = {part: part.training for part in model.modules()}, []
    model.register_forward_pre_hook(lambda module, inputs: seen.append(any(m.training for m in module.modules())))
    model_fn = {"module": model, "method": model.forward_with_cfg, "partial": functools.partial(model)}[reach]
    kwargs = {"cfg_scale": 2.0} if reach == "method" else {}
    sampler, y = Sampler(create_transport()), torch.tensor([0, 3])
    for sample in (sampler.sample_ode(num_steps=3), sampler.sample_sde(num_steps=3)):
        x = sample(wave((2, 4, 4, 4), 0.0), model_fn, y=y, **kwargs)
        assert not x.requires_grad
    assert not any(seen)
    assert {part: part.training for part in model.modules()} == modes


def test_samplers_run_in_inference_mode():
    sampler, z = Sampler(create_transport()), wave((2, 1, 2, 2), 0.8)
    for sample in (sampler.sample_ode(), sampler.sample_ode(sampling_method="euler"), sampler.sample_sde(num_steps=5)):
        with torch.inference_mode():
            assert sample(z, smooth_model).isfinite().all()


def test_half_precision_noise_is_integrated_in_fp32():
    def model(x, t):  # a constant velocity, so small per step that a bfloat16 state would not move
        assert x.dtype is torch.bfloat16
        return torch.full_like(x, 1.0)

    z = torch.ones(1, 1, 2, 2, dtype=torch.bfloat16)
    for sample in (
        Sampler(create_transport()).sample_ode(sampling_method="euler", num_steps=1001),
        Sampler(create_transport()).sample_sde(diffusion_norm=0.0, num_steps=1001),
    ):
        x = sample(z, model)
        assert x.dtype is torch.bfloat16
        torch.testing.assert_close(x, torch.full_like(x, 2.0))


# ---- bad input


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"path_type": "cosine"}, "unknown path_type 'cosine'; known: linear, gvp, vp"),
        ({"prediction": "data"}, "unknown prediction 'data'; known: velocity, noise, score"),
        ({"prediction": "noise", "loss_weight": "snr"}, "unknown loss_weight 'snr'; known: velocity, likelihood"),
        ({"loss_weight": "velocity"}, "the velocity loss has no weight"),
        ({"train_eps": 0.5}, "train_eps=0.5"),
        ({"sample_eps": -0.1}, "sample_eps=-0.1"),
        ({"prediction": "score", "sample_eps": 0.0}, "infinite at the ends"),
    ],
)
def test_a_bad_transport_is_named(settings, message):
    with pytest.raises(ValueError, match=message):
        create_transport(**settings)


def test_published_spellings_are_understood():
    assert create_transport("GVP", "velocity").interpolant.alpha(torch.tensor(1.0))[0] == 1
    Sampler(create_transport("Linear")).sample_sde(
        sampling_method="Euler", diffusion_form="inccreasing-decreasing", last_step="Mean"
    )


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        ("sample_ode", {"sampling_method": "ddim"}, "unknown sampling_method 'ddim'; known: dopri5.*euler, heun"),
        ("sample_ode", {"num_steps": 1}, "num_steps=1; expected at least 2"),
        ("sample_ode", {"atol": 0.0}, "atol=0.0"),
        ("sample_sde", {"sampling_method": "dopri5"}, "unknown sampling_method 'dopri5'; known: euler, heun"),
        ("sample_sde", {"diffusion_form": "cosine"}, "unknown diffusion_form 'cosine'; known: constant, sbdm"),
        ("sample_sde", {"last_step": "ddim"}, "unknown last_step 'ddim'; known: mean, tweedie, euler"),
        ("sample_sde", {"last_step_size": 0.0}, "last_step_size=0.0"),
        ("sample_sde", {"diffusion_norm": -1.0}, "diffusion_norm=-1.0"),
        ("sample_sde", {"num_steps": 1}, "num_steps=1"),
        ("sample_sde", {"diffusion_form": "sbdm", "last_step_size": 0.9995}, "leaves no time"),
    ],
)
def test_a_bad_sampler_is_named(make, settings, message):
    with pytest.raises(ValueError, match=message):
        getattr(Sampler(create_transport()), make)(**settings)


@pytest.mark.parametrize("make", ["sample_ode", "sample_sde"])
@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda x, t: x[:, :1], r"returned shape \(2, 1, 2, 2\); expected \(2, 3, 2, 2\)"),
        (lambda x, t: (x, {}), "returned tuple"),
    ],
)
def test_a_model_of_the_wrong_kind_is_named(make, model, message):
    with pytest.raises(ValueError, match=message):
        getattr(Sampler(create_transport()), make)()(torch.zeros(2, 3, 2, 2), model)


def test_a_model_that_returns_nan_stops_an_adaptive_solver_with_a_reason():
    with pytest.raises(RuntimeError, match=r"dopri5 cannot go on .* not finite"):
        Sampler(create_transport()).sample_ode()(torch.zeros(1, 1, 2, 2), lambda x, t: x + math.nan)


@pytest.mark.parametrize(
    ("x1", "given", "error", "message"),
    [
        (torch.zeros(2, 1, 2, 2, dtype=torch.uint8), {}, TypeError, "x1 is torch.uint8"),
        (torch.zeros(2), {}, TypeError, r"expected floating point \(B, ...\)"),
        (torch.zeros(2, 1, 2, 2), {"t": torch.zeros(3)}, ValueError, r"t has shape \(3,\)"),
        (torch.zeros(2, 1, 2, 2), {"x0": torch.zeros(2, 1, 2, 1)}, ValueError, r"x0 \(2, 1, 2, 1\)"),
    ],
)
def test_bad_training_data_is_named(x1, given, error, message):
    with pytest.raises(error, match=message):
        create_transport().training_losses(smooth_model, x1, **given)


def test_a_prediction_of_the_wrong_shape_is_named():
    with pytest.raises(ValueError, match=r"returned shape \(2, 1\)"):
        create_transport().training_losses(lambda x, t: x.flatten(1)[:, :1], torch.zeros(2, 1, 2, 2))


# Times


def times(**options):
    transport = create_transport(**options)
    generator = torch.Generator().manual_seed(0)
    return transport.draw_times(20_000, generator=generator, dtype=torch.float64, device=torch.device("cpu"))


def test_uniform_times_are_those_that_training_has_always_drawn():
    expected = torch.rand(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.equal(times(), expected)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.5, 0.6)])
def test_logit_normal_times_have_normal_logits(mean, std):
    logits = times(time_sampling="logit-normal", logit_mean=mean, logit_std=std).logit()
    assert logits.mean().item() == pytest.approx(mean, abs=0.03)
    assert logits.std().item() == pytest.approx(std, abs=0.03)


def test_shift_moves_times_towards_noise_by_the_published_formula():
    plain, shifted = times(), times(time_shift=3.0)
    noise = 1 - plain
    torch.testing.assert_close(1 - shifted, 3 * noise / (1 + 2 * noise))
    assert (shifted <= plain).all()
    ends = create_transport(time_shift=3.0).shifted(torch.tensor([0.0, 1.0]))
    assert ends.tolist() == [0.0, 1.0]


@pytest.mark.parametrize("reverse", [False, True])
def test_fixed_step_solvers_visit_shifted_times(reverse):
    transport, seen = create_transport(time_shift=3.0), []

    def model(x, t):
        seen.append(t[0].item())
        return torch.zeros_like(x)

    Sampler(transport).sample_ode(sampling_method="euler", num_steps=5, reverse=reverse)(torch.zeros(1, 1), model)
    expected = transport.shifted(torch.linspace(0, 1, 5)).tolist()
    assert seen == pytest.approx(expected[:0:-1] if reverse else expected[:-1], abs=1e-6)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"time_sampling": "beta"}, "unknown time_sampling"),
        ({"time_shift": 0.0}, "time_shift"),
        ({"logit_std": -1}, "logit_std"),
    ],
)
def test_times_out_of_range_are_named(options, match):
    with pytest.raises(ValueError, match=match):
        create_transport(**options)

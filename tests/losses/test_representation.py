"""RepresentationAlignmentLoss against what REPA, iREPA and SRA publish, each written out here."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from layersync_kernels import RepresentationAlignmentLoss, layersync_loss
from layersync_kernels.losses import projectors as projectors_module
from layersync_kernels.sit.models.sit import SiT

D, T, N = 32, 24, 16


def published_mlp(hidden_size=D, projector_dim=40, size=T):
    return nn.Sequential(
        nn.Linear(hidden_size, projector_dim), nn.SiLU(),
        nn.Linear(projector_dim, projector_dim), nn.SiLU(),
        nn.Linear(projector_dim, size),
    )  # fmt: skip


def published_loss(teachers, projected):
    """REPA's: sample by sample, encoder by encoder."""
    loss = 0.0
    for teacher, tokens in zip(teachers, projected, strict=True):
        for t, z in zip(teacher, tokens, strict=True):
            loss = loss - (F.normalize(t, dim=-1) * F.normalize(z, dim=-1)).sum(-1).mean()
    return loss / (len(teachers) * len(teachers[0]))


def smooth_l1(x, y):
    return F.smooth_l1_loss(x, y, beta=0.05)


@pytest.fixture
def hidden():
    return torch.randn(3, N, D, requires_grad=True)


@pytest.fixture
def teacher():
    return torch.randn(3, N, T) + 0.5


def gradients(loss, *tensors):
    return torch.autograd.grad(loss, tensors)


def test_value_and_gradient_of_the_published_loop(hidden):
    teacher = torch.randn(3, N, D)
    loss = RepresentationAlignmentLoss(D, D, projector=nn.Identity(), weights=1.0)({8: hidden}, teacher)
    expected = published_loss([teacher], [hidden])
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients(loss, hidden), gradients(expected, hidden))


def test_ten_optimiser_steps_as_published():
    """Model and projector, from the same weights; the projector's under the published keys."""
    model = SiT(input_size=8, in_channels=4, patch_size=2, hidden_size=D, depth=3, num_heads=2, num_classes=5)
    nn.init.normal_(model.final_layer.linear.weight, std=0.02)
    for block in model.blocks:
        nn.init.normal_(block.adaLN_modulation[-1].weight, std=0.02)
    twin, projectors = copy.deepcopy(model), nn.ModuleList([published_mlp()])
    align = RepresentationAlignmentLoss(D, T, 2, projector_dim=40)
    align.projectors.load_state_dict(projectors.state_dict())

    def fused(x, t, y, teacher):
        velocity, states = model(x, t, y, capture=align.captures)
        return velocity, align(states, teacher)

    def eager(x, t, y, teacher):
        velocity, states = twin(x, t, y, capture=(2,))
        return velocity, 0.5 * published_loss([teacher], [projectors[0](states[2].reshape(-1, D)).reshape(-1, N, T)])

    losses = []
    for step, parameters in (fused, [*model.parameters(), *align.parameters()]), (
        eager, [*twin.parameters(), *projectors.parameters()],
    ):  # fmt: skip
        optimizer = torch.optim.AdamW([p for p in parameters if p.requires_grad], lr=1e-3)
        torch.manual_seed(1)
        losses.append([])
        for _ in range(10):
            x, target, teacher = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8), torch.randn(2, N, T)
            velocity, aligned = step(x, torch.rand(2), torch.randint(5, (2,)), teacher)
            (F.mse_loss(velocity, target) + aligned).backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[-1].append(aligned.detach())
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-6)
    # Adam divides by gradients that can be all rounding: 10 steps of 1e-3 may go either way where they are.
    for ours, published in zip(align.parameters(), projectors.parameters(), strict=True):
        torch.testing.assert_close(ours, published, rtol=1e-3, atol=2e-4)
    for name, ours in model.named_parameters():
        torch.testing.assert_close(ours, twin.get_parameter(name), rtol=1e-3, atol=2e-4)


def test_projectors_of_repa_are_fused_with_the_loss(hidden, teacher, monkeypatch):
    """Linear layers with SiLU in between, whoever made them; others, and those with hooks, are called as they are."""
    fused = []
    real = projectors_module.projected_alignment_loss
    monkeypatch.setattr(
        projectors_module,
        "projected_alignment_loss",
        lambda *args, **options: fused.append(1) or real(*args, **options),
    )
    mlp, hooked, gelu = published_mlp(), published_mlp(), published_mlp()
    hooked.register_forward_hook(lambda module, args, output: 2 * output)
    gelu[1] = nn.GELU()
    for projector, taken in ((mlp, True), (hooked, False), (gelu, False), (nn.Linear(D, T), False)):
        align = RepresentationAlignmentLoss(D, T, projector=nn.ModuleList([projector]), weights=1.0)
        assert align.projectors[0] is projector
        loss, expected = align({8: hidden}, teacher), published_loss([teacher], [projector(hidden)])
        assert bool(fused) == taken
        fused.clear()
        torch.testing.assert_close(loss, expected)
        parameters = [hidden, *projector.parameters()]
        torch.testing.assert_close(gradients(loss, *parameters), gradients(expected, *parameters))


def published_irepa(conv, hidden, teacher, alpha, grid):
    image = hidden.reshape(len(hidden), *grid, D).permute(0, 3, 1, 2).contiguous()
    projected = conv(image).permute(0, 2, 3, 1).reshape(len(hidden), N, T)
    mean, std = teacher.mean(dim=1, keepdim=True), teacher.std(dim=1, keepdim=True)
    return published_loss([(teacher - alpha * mean) / (std + 1e-6)], [projected])


@pytest.mark.parametrize(("grid", "alpha"), [(None, None), ((2, 8), 0.8)])
def test_irepa_as_published(hidden, teacher, grid, alpha):
    align = RepresentationAlignmentLoss(D, T, method="irepa", weights=1.0, grid=grid, spatial_norm_alpha=alpha)
    conv = nn.Conv2d(D, T, 3, padding=1)
    conv.load_state_dict(align.projectors[0].state_dict())
    loss = align({8: hidden}, teacher)
    expected = published_irepa(conv, hidden, teacher, alpha or 0.6, grid or (4, 4))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        gradients(loss, hidden, *align.parameters()), gradients(expected, hidden, *conv.parameters())
    )


@pytest.mark.parametrize("rows", ["cosine", "smooth_l1"])
def test_sra_as_published(hidden, rows):
    """Its cosine runs over channels, as the paper has it; its teacher is as wide as the student."""
    teacher = torch.randn(3, N, D)
    align = RepresentationAlignmentLoss(D, method="sra", weights=1.0, rows=rows)
    linear1, _, linear2 = align.projectors[0]
    assert (linear1.out_features, linear2.out_features) == (2 * D, D)
    projected = linear2(F.silu(linear1(hidden)))
    expected = smooth_l1(projected, teacher) if rows == "smooth_l1" else published_loss([teacher], [projected])
    loss = align({8: hidden}, teacher)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        gradients(loss, hidden, *align.parameters()), gradients(expected, hidden, *align.parameters())
    )
    torch.testing.assert_close(align.cosine["8"], -published_loss([teacher], [projected]).detach())


@pytest.mark.parametrize("rows", ["cosine", "smooth_l1"])
def test_masked_tokens_are_not_read(hidden, teacher, rows):
    align = RepresentationAlignmentLoss(D, T, projector_dim=40, rows=rows)
    mask, weight = torch.rand(3, N) > 0.3, torch.rand(3, N)
    assert not mask.all()
    poisoned = teacher.masked_fill(~mask.unsqueeze(-1), math.nan)
    loss = align({8: hidden}, poisoned, mask=mask, token_weight=weight)
    projected = align.projectors[0](hidden)
    each = smooth_l1_rows(projected, teacher) if rows == "smooth_l1" else -F.cosine_similarity(projected, teacher, -1)
    expected = 0.5 * (each * mask * weight).sum() / (mask * weight).sum()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients(loss, hidden), gradients(expected, hidden), rtol=1e-4, atol=1e-6)


def smooth_l1_rows(x, y):
    return F.smooth_l1_loss(x, y, beta=0.05, reduction="none").mean(dim=-1)


def test_every_pair_counts_with_its_weight_and_its_teacher(hidden):
    states = {4: hidden, 8: hidden * 2}
    teachers = {"dinov2": torch.randn(3, N, T), "clip": torch.randn(3, N, 20), 4: torch.randn(3, N, 12)}
    align = RepresentationAlignmentLoss(
        D, {"dinov2": T, "clip": 20, 4: 12}, [4, (8, "dinov2"), (8, "clip")], weights=[0.1, 0.2, 0.3], projector_dim=40
    )
    assert align.layers == (4, 8)
    projected = [p(states[block]) for p, block in zip(align.projectors, (4, 8, 8), strict=True)]
    terms = [published_loss([teachers[name]], [z]) for name, z in zip((4, "dinov2", "clip"), projected, strict=True)]
    torch.testing.assert_close(align(states, teachers), 0.1 * terms[0] + 0.2 * terms[1] + 0.3 * terms[2])
    assert set(align.cosine) == {"4", "8:dinov2", "8:clip"}
    torch.testing.assert_close(align.cosine["8:clip"], -terms[2].detach())
    with pytest.raises(ValueError, match=r"no tokens of teacher 'clip', only of \[4, 'dinov2'\]"):
        align(states, {name: teachers[name] for name in (4, "dinov2")})


def test_the_teacher_is_a_constant(hidden, teacher):
    teacher.requires_grad_()
    for method in ("repa", "irepa", "sra"):
        for rows in ("cosine", "smooth_l1"):
            loss = RepresentationAlignmentLoss(D, T, method=method, rows=rows, projector_dim=40)({8: hidden}, teacher)
            assert torch.autograd.grad(loss, teacher, allow_unused=True) == (None,)


class OwnLinear(nn.Linear):
    """As a sharded, quantised or adapted layer: its weight alone does not say what it computes."""

    def forward(self, input):
        return super().forward(input).square()


def test_a_last_layer_with_a_forward_of_its_own_is_called(hidden, teacher):
    align = RepresentationAlignmentLoss(D, T, projector_dim=40, weights=1.0)
    align.projectors[0][-1] = OwnLinear(40, T)
    torch.testing.assert_close(align({8: hidden}, teacher), layersync_loss(align.projectors[0](hidden), teacher))


def test_schedule_as_of_layersync(hidden, teacher):
    align = RepresentationAlignmentLoss(D, T, projector_dim=40, schedule="linear", start_step=10, stop_step=20, every=5)
    assert align.cosine["8"].isnan()
    full = align({8: hidden}, teacher, step=0)
    torch.testing.assert_close(align({8: hidden}, teacher, step=15), 0.5 * full)
    last = align.cosine["8"]
    assert [align.active(step) for step in (0, 3, 15, 20)] == [True, False, True, False]
    assert align({}, None, step=20) == 0
    assert align.cosine["8"] is last
    assert 0.5 * last == full.neg()
    with pytest.raises(ValueError, match="RepresentationAlignmentLoss: this schedule needs to know the step"):
        align({8: hidden}, teacher)


@pytest.mark.parametrize(("student", "source"), [((4, 4), (8, 8)), ((2, 8), (4, 16)), ((4, 4), (3, 3))])
def test_interpolation_is_bilinear_on_the_grid(hidden, student, source):
    tokens = torch.randn(3, source[0] * source[1], T)
    align = RepresentationAlignmentLoss(D, T, projector_dim=40, grid=student, interpolate=True)
    image = tokens.reshape(3, *source, T).permute(0, 3, 1, 2)
    resampled = F.interpolate(image, student, mode="bilinear").permute(0, 2, 3, 1).reshape(3, N, T)
    torch.testing.assert_close(align({8: hidden}, tokens), align({8: hidden}, resampled))


def test_a_broken_teacher_is_found_in_the_first_step_or_makes_the_loss_nan(hidden, teacher):
    broken = teacher.clone()
    broken[1, 3, 5] = math.nan
    align = RepresentationAlignmentLoss(D, T, projector_dim=40)
    with pytest.raises(ValueError, match="NaN or infinity in 1 of 48 tokens; check its weights and its precision"):
        align({8: hidden}, broken)
    align({8: hidden}, teacher)
    assert align({8: hidden}, broken).isnan()
    align.check_teacher = True
    with pytest.raises(ValueError, match="NaN or infinity"):
        align({8: hidden}, broken)


@pytest.mark.parametrize("method", ["repa", "irepa", "sra"])
def test_compiles_without_graph_breaks(method, hidden, teacher):
    torch._dynamo.reset()
    align = RepresentationAlignmentLoss(D, T, method=method, projector_dim=40)
    compiled = torch.compile(lambda *args: align(*args), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled({8: hidden}, teacher), align({8: hidden}, teacher))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"blocks": ()}, "at least one block"),
        ({"blocks": (8, 8)}, "given twice"),
        ({"blocks": 0}, "counted from 1, got 0"),
        ({"teacher_size": None}, "teacher_size of 8 is missing"),
        ({"teacher_size": {4: T}}, "teacher_size of 8 is missing"),
        ({"method": "reap"}, "unknown method 'reap'"),
        ({"rows": "l2"}, "unknown rows='l2'"),
        ({"weights": (1, 2)}, "2 weights for 1 pairs"),
        ({"blocks": (4, 8), "projector": nn.Identity()}, "1 projectors for 2 pairs"),
        ({"schedule": "linear"}, "RepresentationAlignmentLoss: schedule 'linear' needs stop_step"),
    ],
)
def test_bad_settings_are_explained(arguments, match):
    with pytest.raises(ValueError, match=match):
        RepresentationAlignmentLoss(**{"hidden_size": D, "teacher_size": T, "projector_dim": 40, **arguments})


def test_bad_tokens_are_explained(hidden, teacher):
    align = RepresentationAlignmentLoss(D, T, projector_dim=40)
    for tokens, match in (
        (torch.randn(3, 17, T), "block 8 has 16 tokens, its teacher 17; interpolate=True resamples"),
        (torch.randn(3, N, T + 1), rf"gave \(3, 16, 25\); expected \(batch=3, tokens, teacher_size={T}\)"),
        (torch.randn(2, N, T), r"gave \(2, 16, 24\); expected \(batch=3"),
    ):
        with pytest.raises(ValueError, match=match):
            align({8: hidden}, tokens)
    with pytest.raises(ValueError, match=rf"block 8 gave \(3, 16, 24\); expected \(batch, tokens, hidden_size={D}\)"):
        align({8: teacher}, teacher)
    with pytest.raises(ValueError, match=r"blocks \[8\] were not captured, only \[4\]"):
        align({4: hidden}, teacher)
    with pytest.raises(ValueError, match=r"projector of block 8 gives \(3, 16, 32\), the teacher \(3, 16, 24\)"):
        RepresentationAlignmentLoss(D, T, projector=nn.Identity())({8: hidden}, teacher)
    with pytest.raises(ValueError, match=r"16 tokens do not fill the grid of 3x5"):
        RepresentationAlignmentLoss(D, T, method="irepa", grid=(3, 5))({8: hidden}, teacher)
    with pytest.raises(ValueError, match=r"15 tokens do not fill a square grid; give grid="):
        RepresentationAlignmentLoss(D, T, method="irepa")({8: hidden[:, 1:]}, teacher[:, 1:])
    with pytest.raises(ValueError, match="17 tokens of the teacher are no grid of the shape 4x4"):
        RepresentationAlignmentLoss(D, T, interpolate=True, projector_dim=40)({8: hidden}, torch.randn(3, 17, T))

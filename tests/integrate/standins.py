"""What the guides' code meets in other people's repos: models of the same structure, tiny, and the rest of a trainer.

Depths are the real ones, so that the guides' block numbers can be used as they stand.
"""

import logging
from collections import OrderedDict
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from . import lightning
from .targets import MotionDenoiser, SiT, SiTBlock

BATCH, STEPS = 2, 2


def update_ema(ema, model, decay=0.9999):
    averages = OrderedDict(ema.named_parameters())
    for name, parameter in model.named_parameters():
        averages[name.replace("module.", "")].data.mul_(decay).add_(parameter.data, alpha=1 - decay)


def sgd(model):
    """Not Adam, whose first step makes 1e-9 of a gradient as large as 1."""
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)


def images():
    return [(torch.randn(BATCH, 4, 8, 8), torch.randint(10, (BATCH,))) for _ in range(STEPS)]


def patches(x):
    return F.unfold(x, 2, stride=2).transpose(1, 2)


# SiT, DiT


class Transport:
    def training_losses(self, model, x1, model_kwargs):
        t, noise = torch.rand(len(x1)), torch.randn_like(x1)
        mix = t.view(-1, 1, 1, 1)
        prediction = model(mix * x1 + (1 - mix) * noise, t, **model_kwargs)
        return {"loss": (prediction - patches(x1 - noise)).square().flatten(1).mean(1)}


class Diffusion:
    num_timesteps = 1000

    def training_losses(self, model, x_start, t, model_kwargs, dataset=None):
        noise = torch.randn_like(x_start)
        mix = (t / self.num_timesteps).view(-1, *[1] * (x_start.dim() - 1))
        prediction = model((1 - mix) * x_start + mix * noise, t / self.num_timesteps, **model_kwargs)
        goal = x_start if prediction.shape == x_start.shape else patches(noise)
        return {"loss": (prediction - goal).square().flatten(1).mean(1)}


# The published fork of SiT: the model returns hidden states, the transport aligns them.


class ForkedSiT(SiT):
    def forward(self, x, t, y):
        return super().forward(x, t, y), (None, None, {})


class ForkedTransport(Transport):
    def training_losses(self, model, x1, model_kwargs, loss_type):
        assert loss_type == "vanilla"
        terms = super().training_losses(lambda *args, **kwargs: model(*args, **kwargs)[0], x1, model_kwargs)
        return terms | {"reg": torch.zeros_like(terms["loss"])}


# REPA: the model returns projected hidden states as well.


class ProjectedSiT(SiT):
    def __init__(self, depth):
        super().__init__(depth=depth)
        layers = nn.Linear(32, 24), nn.SiLU(), nn.Linear(24, 24), nn.SiLU(), nn.Linear(24, 12)
        self.projectors = nn.ModuleList([nn.Sequential(*layers)])

    def forward(self, x, t, y):
        x = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder(t[:, None]) + self.y_embedder(y)
        for number, block in enumerate(self.blocks, start=1):
            x = block(x, c)
            if number == 8:
                n, t, d = x.shape
                projected = [projector(x.reshape(-1, d)).reshape(n, t, -1) for projector in self.projectors]
        return self.head(x), projected


def repa_loss(model, images, model_kwargs, zs):
    t, noise = torch.rand(len(images)), torch.randn_like(images)
    mix = t.view(-1, 1, 1, 1)
    prediction, projected = model((1 - mix) * images + mix * noise, t, **model_kwargs)
    proj_loss = -sum(F.cosine_similarity(z, p, dim=-1).mean() for z, p in zip(zs, projected, strict=True))
    return (prediction - patches(noise - images)).square().flatten(1).mean(1), proj_loss


# LightningDiT: compiled forward, rotary positions as third argument, reentrant checkpoints.


class LightningDiT(SiT):
    def __init__(self, depth, use_checkpoint):
        super().__init__(depth=depth)
        self.feat_rope = lightning.VisionRotaryEmbeddingFast(lightning.WIDTH // lightning.HEADS // 2, lightning.GRID)
        self.blocks = nn.ModuleList([lightning.CompiledBlock() for _ in range(depth)])
        self.use_checkpoint = use_checkpoint

    def forward(self, x, t, y):
        x = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder(t[:, None]) + self.y_embedder(y)
        for block in self.blocks:
            inputs = x, c, self.feat_rope
            x = checkpoint(block, *inputs, use_reentrant=True) if self.use_checkpoint else block(*inputs)
        return self.head(x)


# motion-diffusion-model


class MDM(MotionDenoiser):
    def __init__(self, layers=8):
        super().__init__(depth=layers)
        self.clip_model = nn.Module()
        self.clip_model.transformer = nn.Module()
        self.clip_model.transformer.resblocks = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)).requires_grad_(False)

    def forward(self, x, timesteps, y):
        """x: (B, joints, features, frames)."""
        motion = super().forward(x.flatten(1, 2).transpose(1, 2), timesteps, y["mask"][:, 0, 0])
        return motion.transpose(1, 2).view_as(x)


FRAMES = torch.arange(9) < torch.tensor([[9], [5]])  # the second motion is padded


def motions():
    return [(torch.randn(BATCH, 3, 2, 9), {"y": {"mask": FRAMES[:, None, None]}}) for _ in range(STEPS)]


def train_loop(model):
    """The attributes of TrainLoop that a step needs."""
    optimizer = sgd(model)
    trainer = SimpleNamespace(zero_grad=optimizer.zero_grad, backward=torch.Tensor.backward)
    trainer.optimize = lambda opt: opt.step()
    sampler = SimpleNamespace(sample=lambda batch, device: (torch.randint(1000, (batch,)), torch.ones(batch)))
    return SimpleNamespace(
        model=model, ddp_model=model, diffusion=Diffusion(), schedule_sampler=sampler, mp_trainer=trainer, opt=optimizer
    )


class Logger(logging.Logger):
    """Also what motion-diffusion-model's logger has."""

    def logkv_mean(self, key, value):
        self.info("%s %s", key, value)


# DiffSynth-Studio: a pipeline of modules, LoRA in its `dit`, whose forward nobody calls.


class WanBlock(SiTBlock):
    def forward(self, x, context, t_mod, freqs):
        return super().forward(x, t_mod)


class WanTrainingModule(nn.Module):
    def __init__(self, depth=30):
        from peft import LoraConfig, inject_adapter_in_model

        super().__init__()
        self.pipe = nn.Module()
        self.pipe.dit, self.pipe.text_encoder = nn.Module(), nn.Module()
        self.pipe.dit.embed, self.pipe.dit.head = nn.Linear(6, 32), nn.Linear(32, 6)
        self.pipe.dit.blocks = nn.ModuleList([WanBlock(32, 2) for _ in range(depth)])
        self.pipe.text_encoder.blocks = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
        self.requires_grad_(False).eval()
        lora = LoraConfig(r=2, target_modules=["qkv", "proj"], init_lora_weights=False)
        inject_adapter_in_model(lora, self.pipe.dit)
        for name, parameter in self.named_parameters():
            parameter.requires_grad = "lora_" in name

    def forward(self, data):
        x, t_mod = self.pipe.dit.embed(data["latents"]), data["t_mod"]
        for block in self.pipe.dit.blocks:
            x = checkpoint(block, x, None, t_mod, None, use_reentrant=False)
        return F.mse_loss(self.pipe.dit.head(x), data["goal"])


def videos():
    return [
        {"latents": torch.randn(1, 12, 6), "t_mod": torch.randn(1, 32), "goal": torch.randn(1, 12, 6)}
        for _ in range(STEPS)
    ]

"""Models of other people's libraries, tiny, each with what a trainer needs: a batch, a loss, and where the tokens are.

Libraries are imported when a model is built, so that the module loads without them.
"""

import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils.checkpoint import checkpoint

BATCH = 2


@dataclass(frozen=True)
class Batch:
    """Keyword arguments of the model's forward, what it should predict, and which tokens count."""

    inputs: dict[str, Any]
    goal: Tensor
    mask: Tensor | None = None


@dataclass(frozen=True, eq=False)  # compared and hashed by identity
class Target:
    """A model as its users have it.

    `sync` is what a user hands to `LayerSync`. `pair` and `tokens` say the same without it, for the reference: the
    paths of student and teacher in the unwrapped model, and how a block's output becomes (B, N, D).
    """

    name: str
    libraries: tuple[str, ...]  # distributions
    make: Callable[[], nn.Module]
    draw: Callable[[], Batch]
    sync: dict[str, Any]
    pair: tuple[str, str]
    tokens: Callable[[Any], Tensor] = lambda output: output
    prediction: Callable[[Any], Tensor] = lambda output: output
    blocks: tuple[str, ...] = ("blocks",)  # what holds them
    checkpoint: Callable[[nn.Module, Callable | None], None] | None = None
    inductor: bool = False  # compile cells: Inductor costs seconds, so the others stop at AOTAutograd
    sharded_from: int = 0  # FSDP: the first block with parameters of its own to gather

    @property
    def installed(self) -> bool:
        return all(importlib.util.find_spec(library) for library in self.libraries)

    @property
    def versions(self) -> str:
        return ", ".join(f"{library} {importlib.metadata.version(library)}" for library in self.libraries)

    def build(self) -> nn.Module:
        """The same weights at every call. Noise on all of them: adaLN-zero would make every block the identity."""
        torch.manual_seed(0)
        model = self.make().train()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
        return model

    def batch(self, seed: int) -> Batch:
        torch.manual_seed(1000 + seed)
        return self.draw()

    def task_loss(self, model: nn.Module, batch: Batch) -> Tensor:
        return F.mse_loss(self.prediction(model(**batch.inputs)).float(), batch.goal)

    def containers(self, model: nn.Module) -> list[nn.Module]:
        return [model.get_submodule(path) for path in self.blocks]

    def use_checkpoints(self, model: nn.Module, context_fn: Callable | None) -> None:
        """The library's own switch where it has one, else PyTorch's wrapper around each block."""
        if self.checkpoint is not None:
            return self.checkpoint(model, context_fn)
        options = {} if context_fn is None else {"context_fn": context_fn}
        for container in self.containers(model):
            for index, block in enumerate(container):
                container[index] = checkpoint_wrapper(block, **options)


def diffusers_checkpoints(model, context_fn):
    if context_fn is None:
        return model.enable_gradient_checkpointing()

    def selective(module, *args):
        return checkpoint(module.__call__, *args, use_reentrant=False, context_fn=context_fn)

    model.enable_gradient_checkpointing(selective)


def transformers_checkpoints(model, context_fn):
    options = {"use_reentrant": False} | ({} if context_fn is None else {"context_fn": context_fn})
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=options)


def sample(output):
    return output.sample


# The published SiT: its block is adaLN around timm's Attention and Mlp.


class SiTBlock(nn.Module):
    def __init__(self, width: int, heads: int):
        from timm.models.vision_transformer import Attention, Mlp

        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, num_heads=heads, qkv_bias=True)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(width, 2 * width, act_layer=partial(nn.GELU, approximate="tanh"))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c).unsqueeze(1).chunk(6, dim=-1)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class SiT(nn.Module):
    def __init__(self, width: int = 32, depth: int = 4, heads: int = 2):
        from timm.models.vision_transformer import PatchEmbed

        super().__init__()
        self.x_embedder = PatchEmbed(8, 2, 4, width)
        self.t_embedder = nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width))
        self.y_embedder = nn.Embedding(10, width)
        self.pos_embed = nn.Parameter(torch.zeros(1, self.x_embedder.num_patches, width), requires_grad=False)
        self.blocks = nn.ModuleList([SiTBlock(width, heads) for _ in range(depth)])
        self.head = nn.Linear(width, 16)
        self.checkpoint = None

    def forward(self, x, t, y):
        x = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder(t[:, None]) + self.y_embedder(y)
        for block in self.blocks:
            # As DiT's code does it: the block is called inside of the checkpoint, its hooks with it.
            x = block(x, c) if self.checkpoint is None else self.checkpoint(block, x, c)
        return self.head(x)


def sit_checkpoints(model, context_fn):
    options = {} if context_fn is None else {"context_fn": context_fn}
    model.checkpoint = partial(checkpoint, use_reentrant=False, **options)


def sit_batch():
    inputs = {"x": torch.randn(BATCH, 4, 8, 8), "t": torch.rand(BATCH), "y": torch.randint(10, (BATCH,))}
    return Batch(inputs, torch.randn(BATCH, 16, 16))


# timm


def timm_vit():
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(img_size=8, patch_size=2, num_classes=8, embed_dim=32, depth=4, num_heads=2, mlp_ratio=2)


def timm_checkpoints(model, context_fn):
    if context_fn is None:
        return model.set_grad_checkpointing()
    for index, block in enumerate(model.blocks):  # its switch cannot be selective
        model.blocks[index] = checkpoint_wrapper(block, context_fn=context_fn)


# diffusers


def dit():
    from diffusers import DiTTransformer2DModel

    return DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        num_layers=4,
        sample_size=8,
        norm_num_groups=4,
        num_embeds_ada_norm=10,
    )


def dit_batch():
    inputs = {
        "hidden_states": torch.randn(BATCH, 4, 8, 8),
        "timestep": torch.randint(1000, (BATCH,)),
        "class_labels": torch.randint(10, (BATCH,)),
    }
    return Batch(inputs, torch.randn(BATCH, 4, 8, 8))


def pixart():
    from diffusers import PixArtTransformer2DModel

    return PixArtTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        cross_attention_dim=32,
        sample_size=8,
        norm_num_groups=4,
        caption_channels=24,
        use_additional_conditions=False,
    )


def pixart_batch():
    inputs = {
        "hidden_states": torch.randn(BATCH, 4, 8, 8),
        "encoder_hidden_states": torch.randn(BATCH, 5, 24),
        "timestep": torch.randint(1000, (BATCH,)),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }
    return Batch(inputs, torch.randn(BATCH, 4, 8, 8))


def sd3():
    from diffusers import SD3Transformer2DModel

    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=4,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        caption_projection_dim=32,
        pooled_projection_dim=20,
        out_channels=4,
        pos_embed_max_size=8,
    )


def sd3_batch():
    inputs = {
        "hidden_states": torch.randn(BATCH, 4, 8, 8),
        "encoder_hidden_states": torch.randn(BATCH, 5, 24),
        "pooled_projections": torch.randn(BATCH, 20),
        "timestep": torch.randint(1000, (BATCH,)),
    }
    return Batch(inputs, torch.randn(BATCH, 4, 8, 8))


def flux():
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        in_channels=4,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=20,
        axes_dims_rope=(4, 6, 6),
    )


def flux_batch():
    inputs = {
        "hidden_states": torch.randn(BATCH, 16, 4),
        "encoder_hidden_states": torch.randn(BATCH, 5, 24),
        "pooled_projections": torch.randn(BATCH, 20),
        "timestep": torch.rand(BATCH),
        "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(4.0), torch.arange(4.0)),
        "txt_ids": torch.zeros(5, 3),
    }
    return Batch(inputs, torch.randn(BATCH, 16, 4))


def wan():
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=32,
        ffn_dim=32,
        num_layers=4,
        rope_max_seq_len=16,
    )


def wan_batch():
    inputs = {
        "hidden_states": torch.randn(BATCH, 4, 2, 8, 4),
        "timestep": torch.randint(1000, (BATCH,)),
        "encoder_hidden_states": torch.randn(BATCH, 5, 16),
    }
    return Batch(inputs, torch.randn(BATCH, 4, 2, 8, 4))


def wan_lora():
    from peft import LoraConfig, get_peft_model

    return get_peft_model(wan(), LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0"]))


def cogvideox():
    from diffusers import CogVideoXTransformer3DModel

    return CogVideoXTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=4,
        time_embed_dim=16,
        text_embed_dim=16,
        num_layers=4,
        sample_width=4,
        sample_height=8,
        sample_frames=5,
        max_text_seq_length=5,
    )


def cogvideox_batch():
    inputs = {
        "hidden_states": torch.randn(BATCH, 2, 4, 8, 4),
        "timestep": torch.randint(1000, (BATCH,)),
        "encoder_hidden_states": torch.randn(BATCH, 5, 16),
    }
    return Batch(inputs, torch.randn(BATCH, 2, 4, 8, 4))


def ltx():
    from diffusers import LTXVideoTransformer3DModel

    return LTXVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        cross_attention_dim=24,
        num_layers=4,
        caption_channels=16,
    )


def ltx_batch():
    inputs = {
        "hidden_states": torch.randn(BATCH, 16, 4),
        "timestep": torch.randint(1000, (BATCH,)),
        "encoder_hidden_states": torch.randn(BATCH, 5, 16),
        "encoder_attention_mask": torch.ones(BATCH, 5),
        "num_frames": 2,
        "height": 4,
        "width": 2,
    }
    return Batch(inputs, torch.randn(BATCH, 16, 4))


def stable_audio():
    from diffusers import StableAudioDiTModel

    return StableAudioDiTModel(
        sample_size=12,
        in_channels=4,
        num_layers=4,
        attention_head_dim=8,
        num_attention_heads=3,
        num_key_value_attention_heads=3,
        out_channels=4,
        cross_attention_dim=24,
        time_proj_dim=16,
        global_states_input_dim=10,
        cross_attention_input_dim=16,
    )


def stable_audio_batch():
    angles = torch.arange(13.0)[:, None] / torch.tensor([1.0, 10.0, 1.0, 10.0])  # 12 latents and what is prepended
    inputs = {
        "hidden_states": torch.randn(BATCH, 4, 12),
        "timestep": torch.rand(BATCH),
        "encoder_hidden_states": torch.randn(BATCH, 5, 16),
        "global_hidden_states": torch.randn(BATCH, 1, 10),
        "rotary_embedding": (angles.cos(), angles.sin()),
    }
    return Batch(inputs, torch.randn(BATCH, 4, 12))


# transformers


def timesformer():
    from transformers import TimesformerConfig, TimesformerForVideoClassification

    config = TimesformerConfig(
        image_size=8,
        patch_size=4,
        num_frames=4,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=64,
        num_labels=8,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return TimesformerForVideoClassification(config)


def timesformer_batch():
    return Batch({"pixel_values": torch.randn(BATCH, 4, 3, 8, 8)}, torch.randn(BATCH, 8))


class ModelOutputLayer(nn.Module):
    """A layer that returns a dataclass, as models in the manner of transformers do."""

    def __init__(self, width: int):
        super().__init__()
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, hidden_states):
        from transformers.modeling_outputs import BaseModelOutput

        attended, weights = self.attention(hidden_states, hidden_states, hidden_states)
        hidden_states = hidden_states + attended
        return BaseModelOutput(
            last_hidden_state=hidden_states + self.mlp(self.norm(hidden_states)), attentions=(weights,)
        )


class ModelOutputEncoder(nn.Module):
    def __init__(self, width: int = 32, depth: int = 4):
        super().__init__()
        self.embed = nn.Linear(6, width)
        self.layers = nn.ModuleList([ModelOutputLayer(width) for _ in range(depth)])
        self.head = nn.Linear(width, 6)

    def forward(self, x):
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x).last_hidden_state
        return self.head(x)


def model_output_batch():
    return Batch({"x": torch.randn(BATCH, 10, 6)}, torch.randn(BATCH, 10, 6))


# motion-diffusion-model


class MotionDenoiser(nn.Module):
    """MDM's encoder: frames are the first dimension, a condition token comes before them, padded frames are masked."""

    def __init__(self, features: int = 6, width: int = 32, depth: int = 4):
        super().__init__()
        self.embed = nn.Linear(features, width)
        self.embed_timestep = nn.Linear(1, width)
        layer = nn.TransformerEncoderLayer(width, 2, 2 * width, dropout=0.0, activation="gelu")
        self.seqTransEncoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Linear(width, features)

    def forward(self, x, t, frames):
        tokens = torch.cat([self.embed_timestep(t[:, None])[None], self.embed(x).transpose(0, 1)])
        padded = ~torch.cat([frames.new_ones(len(frames), 1), frames], dim=1)
        return self.head(self.seqTransEncoder(tokens, src_key_padding_mask=padded)[1:]).transpose(0, 1)


def motion_batch():
    lengths = torch.randint(4, 10, (BATCH, 1))
    frames = torch.arange(9) < lengths
    inputs = {"x": torch.randn(BATCH, 9, 6), "t": torch.rand(BATCH), "frames": frames}
    return Batch(inputs, torch.randn(BATCH, 9, 6), mask=frames)


TARGETS = [
    Target(
        name="SiT, published block",
        libraries=("timm",),
        make=SiT,
        draw=sit_batch,
        sync={"student": 2, "teacher": 3},
        pair=("blocks.1", "blocks.2"),
        checkpoint=sit_checkpoints,
        inductor=True,
    ),
    Target(
        name="timm ViT",
        libraries=("timm",),
        make=timm_vit,
        draw=lambda: Batch({"x": torch.randn(BATCH, 3, 8, 8)}, torch.randn(BATCH, 8)),
        sync={"student": 2, "teacher": 3, "tokens": slice(1, None)},
        pair=("blocks.1", "blocks.2"),
        tokens=lambda output: output[:, 1:],
        checkpoint=timm_checkpoints,
    ),
    Target(
        name="DiT",
        libraries=("diffusers",),
        make=dit,
        draw=dit_batch,
        sync={"student": 2, "teacher": 3},
        pair=("transformer_blocks.1", "transformer_blocks.2"),
        prediction=lambda output: output.sample[:, :4],
        blocks=("transformer_blocks",),
        checkpoint=diffusers_checkpoints,
        inductor=True,
        sharded_from=1,  # the model embeds timestep and class by reaching into its first block
    ),
    Target(
        name="PixArt",
        libraries=("diffusers",),
        make=pixart,
        draw=pixart_batch,
        sync={"student": "transformer_blocks.1", "teacher": "transformer_blocks.2"},
        pair=("transformer_blocks.1", "transformer_blocks.2"),
        prediction=sample,
        blocks=("transformer_blocks",),
        checkpoint=diffusers_checkpoints,
    ),
    Target(
        name="SD3",
        libraries=("diffusers",),
        make=sd3,
        draw=sd3_batch,
        sync={"student": 2, "teacher": 3},
        pair=("transformer_blocks.1", "transformer_blocks.2"),
        tokens=lambda output: output[1],
        prediction=sample,
        blocks=("transformer_blocks",),
        checkpoint=diffusers_checkpoints,
    ),
    Target(
        name="Flux",
        libraries=("diffusers",),
        make=flux,
        draw=flux_batch,
        sync={"student": "transformer_blocks.1", "teacher": "single_transformer_blocks.0"},
        pair=("transformer_blocks.1", "single_transformer_blocks.0"),
        tokens=lambda output: output[1],
        prediction=sample,
        blocks=("transformer_blocks", "single_transformer_blocks"),
        checkpoint=diffusers_checkpoints,
    ),
    Target(
        name="Wan",
        libraries=("diffusers",),
        make=wan,
        draw=wan_batch,
        sync={"student": 2, "teacher": 3},
        pair=("blocks.1", "blocks.2"),
        prediction=sample,
        checkpoint=diffusers_checkpoints,
    ),
    Target(
        name="Wan with LoRA",
        libraries=("diffusers", "peft"),
        make=wan_lora,
        draw=wan_batch,
        sync={"student": 2, "teacher": 3},
        pair=("base_model.model.blocks.1", "base_model.model.blocks.2"),
        prediction=sample,
        blocks=("base_model.model.blocks",),
        checkpoint=diffusers_checkpoints,
    ),
    Target(
        name="CogVideoX",
        libraries=("diffusers",),
        make=cogvideox,
        draw=cogvideox_batch,
        sync={"student": 2, "teacher": 3},
        pair=("transformer_blocks.1", "transformer_blocks.2"),
        tokens=lambda output: output[0],
        prediction=sample,
        blocks=("transformer_blocks",),
        checkpoint=diffusers_checkpoints,
    ),
    Target(
        name="LTX",
        libraries=("diffusers",),
        make=ltx,
        draw=ltx_batch,
        sync={"student": 2, "teacher": 3},
        pair=("transformer_blocks.1", "transformer_blocks.2"),
        prediction=sample,
        blocks=("transformer_blocks",),
        checkpoint=diffusers_checkpoints,
    ),
    Target(
        name="Stable Audio",
        libraries=("diffusers",),
        make=stable_audio,
        draw=stable_audio_batch,
        sync={"student": 2, "teacher": 3, "tokens": slice(1, None)},
        pair=("transformer_blocks.1", "transformer_blocks.2"),
        tokens=lambda output: output[:, 1:],
        prediction=sample,
        blocks=("transformer_blocks",),
        checkpoint=diffusers_checkpoints,
    ),
    Target(
        name="TimeSformer",
        libraries=("transformers",),
        make=timesformer,
        draw=timesformer_batch,
        sync={"student": 2, "teacher": 3, "tokens": slice(1, None)},
        pair=("timesformer.encoder.layer.1", "timesformer.encoder.layer.2"),
        tokens=lambda output: output[0][:, 1:],
        prediction=lambda output: output.logits,
        blocks=("timesformer.encoder.layer",),
        checkpoint=transformers_checkpoints,
    ),
    Target(
        name="ModelOutput layers",
        libraries=("transformers",),
        make=ModelOutputEncoder,
        draw=model_output_batch,
        sync={"student": 2, "teacher": 3},
        pair=("layers.1", "layers.2"),
        tokens=lambda output: output.last_hidden_state,
        blocks=("layers",),
    ),
    Target(
        name="MDM encoder",
        libraries=("torch",),
        make=MotionDenoiser,
        draw=motion_batch,
        sync={"student": 2, "teacher": 3, "token_dim": 0, "tokens": slice(1, None)},
        pair=("seqTransEncoder.layers.1", "seqTransEncoder.layers.2"),
        tokens=lambda output: output[1:].transpose(0, 1),
        blocks=("seqTransEncoder.layers",),
    ),
]

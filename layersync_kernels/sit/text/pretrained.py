"""Text encoders of the package transformers: T5's, CLIP's, and others that give a state for each token."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...errors import ConfigError
from ..extras import optional_module
from .base import TextEncoder

BATCH = 64
"""Captions encoded at once."""
CLASSES = {
    "t5": "T5EncoderModel",
    "umt5": "UMT5EncoderModel",
    "clip": "CLIPTextModel",
    "clip_text_model": "CLIPTextModel",
}
"""The half of a model that reads text, where it has two; by type of its config."""


class PretrainedEncoder(TextEncoder):
    """The last hidden states of a published model, on the CPU. Reads safetensors alone, and runs no code of the model's
    repository.

    Args:
        name: on the Hugging Face hub, or a folder.

    Raises:
        ConfigError: transformers is not installed, or the model or its tokenizer cannot be had.
    """

    def __init__(self, name: str) -> None:
        transformers = optional_module("transformers", f"--text-encoder transformers/{name}", "transformers")
        try:
            config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
            kind = getattr(transformers, CLASSES.get(config.model_type, "AutoModel"))
            self._tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
            self._model = kind.from_pretrained(name, trust_remote_code=False, use_safetensors=True).eval().float()
        except Exception as error:  # files that are missing, damaged or of another kind raise anything
            raise ConfigError(
                f"--text-encoder transformers/{name}: {' '.join(str(error).split())[:300]}; expected the name of a "
                "model on the Hugging Face hub, or a folder, with config.json, tokenizer files and model.safetensors"
            ) from error
        self.width = int(self._model.config.hidden_size)
        limit = getattr(self._model.config, "max_position_embeddings", None) or 512
        self._limit = min(limit, self._tokenizer.model_max_length)

    @torch.no_grad()
    def _encode(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        tokens = self._tokenizer(
            list(captions), padding=True, truncation=True, max_length=self._limit, return_tensors="pt"
        )
        ids, mask = tokens["input_ids"], tokens["attention_mask"]
        states = [
            self._model(input_ids=i, attention_mask=m).last_hidden_state
            for i, m in zip(ids.split(BATCH), mask.split(BATCH), strict=True)
        ]
        return (torch.cat(states) * mask[..., None]).float(), mask.sum(1)

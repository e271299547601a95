"""Prompts to text embeddings: computed once while the text encoder is frozen, live while it trains."""

from __future__ import annotations

import torch
from torch import nn
from transformers import CLIPTokenizer


class Prompts:
    """Calling it gives a prompt's embedding (1, tokens, width)."""

    def __init__(
        self, tokenizer: CLIPTokenizer, text_encoder: nn.Module, max_length: int | None = None, *, live: bool = False
    ) -> None:
        self.tokenizer, self.text_encoder, self.live = tokenizer, text_encoder, live
        self.max_length = max_length or tokenizer.model_max_length
        self._kept: dict[str, torch.Tensor] = {}

    def __call__(self, prompt: str) -> torch.Tensor:
        if self.live:
            return self._encode(prompt)
        if prompt not in self._kept:
            with torch.no_grad():
                self._kept[prompt] = self._encode(prompt)
        return self._kept[prompt]

    def _encode(self, prompt: str) -> torch.Tensor:
        tokens = self.tokenizer(
            prompt, padding="max_length", truncation=True, max_length=self.max_length, return_tensors="pt"
        )
        device = next(self.text_encoder.parameters()).device
        return self.text_encoder(tokens.input_ids.to(device))[0]

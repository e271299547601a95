"""Prompts to what the denoiser is told: computed once while the text encoders are frozen, live while they train."""

from __future__ import annotations

import torch

from ..families import Conditions, Family


class Prompts:
    """Calling it gives a prompt's conditions, as for a batch of one."""

    def __init__(self, family: Family, *, live: bool = False) -> None:
        self.family, self.live = family, live
        self._kept: dict[str, Conditions] = {}

    def __call__(self, prompt: str) -> Conditions:
        if self.live:
            return self.family.encode_prompt(prompt)
        if prompt not in self._kept:
            with torch.no_grad():
                self._kept[prompt] = self.family.encode_prompt(prompt)
        return self._kept[prompt]

"""What to do with a prompt when another adapter is chosen."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import takewhile


def trigger_words(instance_prompt: str | None) -> str:
    """What stands for the subject in an instance prompt: "sks dog" in "a photo of sks dog"."""
    return (instance_prompt or "").split(" of ", 1)[-1].strip()


def exchanged(prompt: str, new: str | None, others: Iterable[str | None]) -> str:
    """The prompt with the new adapter's trigger words in the place of another's.

    Args:
        prompt: what the person wrote, or an adapter's own prompt that nobody has touched.
        new: the instance prompt of the adapter that is chosen now.
        others: those of all adapters whose words may be in the prompt.
    """
    others = {other for other in others if other and other != new}
    if not new or _whole(trigger_words(new)).search(prompt):
        return prompt
    if not prompt.strip() or prompt.strip() in others:
        return new
    for words, replacement in ((lambda other: other, new), (trigger_words, trigger_words(new))):
        found = {text: match.start() for text in map(words, others) if (match := _whole(text).search(prompt))}
        if found:  # the longest, and of several the one that comes first
            text = max(found, key=lambda text: (len(text), -found[text]))
            return _whole(text).sub(lambda _: replacement, prompt)  # noqa: B023  (called at once)
    return prompt


def differing(prompts: Sequence[str]) -> list[str]:
    """What tells prompts apart: each without the words that all begin with, or whole where nothing would be left."""
    words = [prompt.split() for prompt in prompts]
    same = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*words, strict=False)))
    return [" ".join(found[same:]) or prompt for found, prompt in zip(words, prompts, strict=True)]


def _whole(words: str) -> re.Pattern[str]:
    """Words as they stand in a text, not as a part of other words."""
    return re.compile(rf"(?<!\w){re.escape(words)}(?!\w)")

"""A language model's answers to a file of questions."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from finetuning import readable
from tqdm.auto import tqdm
from trl import SFTTrainer

from s2ft_diffusion.errors import InputError


def as_text(messages: Sequence[dict[str, str]]) -> str:
    """Chat messages for a model without a chat template, up to where the answer is to begin."""
    headings = {"system": "System", "user": "Instruction", "assistant": "Response"}
    turns = [f"### {headings.get(turn['role'], turn['role'])}:\n{turn['content']}\n\n" for turn in messages]
    return "".join([*turns, "### Response:\n"])


def read_questions(path: str) -> list[dict[str, Any]]:
    """The lines of a file of questions, MT-Bench's or Vicuna's; raises InputError for one without a question."""
    with readable(path):
        lines = [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    for number, line in enumerate(lines):
        turns = (line.get("turns") or [line.get("text")]) if isinstance(line, dict) else None
        if not isinstance(turns, list) or not all(isinstance(turn, str) and turn for turn in turns):
            raise InputError(f"{path}: line {number + 1} has neither text nor turns.")
    return lines


@torch.no_grad()
def answer(trainer: SFTTrainer, questions: list[dict[str, Any]], path: Path, max_new_tokens: int) -> None:
    """Write every question's answers, turn after turn, the likeliest word each time."""
    model, tokenizer = trainer.model.eval(), trainer.processing_class
    with path.open("w", encoding="utf-8") as lines:
        for question in tqdm(questions, desc="answers", disable=trainer.args.disable_tqdm):
            messages: list[dict[str, str]] = []
            for turn in question.get("turns") or [question["text"]]:
                messages.append({"role": "user", "content": turn})
                if tokenizer.chat_template:
                    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
                else:
                    text = as_text(messages)
                tokens = tokenizer(text, return_tensors="pt", add_special_tokens=not tokenizer.chat_template)
                tokens = {name: tokens[name].to(model.device) for name in ("input_ids", "attention_mask")}
                asked = tokens["input_ids"].shape[1]
                room = min(max_new_tokens, getattr(model.config, "max_position_embeddings", math.inf) - asked)
                if room < 1:  # what was said so far is all that the model reads: no answer to this and what follows
                    messages.pop()
                    break
                made = model.generate(
                    **tokens, max_new_tokens=room, do_sample=False, pad_token_id=tokenizer.pad_token_id
                )[0, asked:]
                messages.append({"role": "assistant", "content": tokenizer.decode(made, skip_special_tokens=True)})
            answers = [turn["content"] for turn in messages if turn["role"] == "assistant"]
            lines.write(json.dumps({**question, "answers": answers}, ensure_ascii=False) + "\n")

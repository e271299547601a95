"""Fine-tune a causal language model to follow instructions (S2FT's Table 5), the loss on answers alone.

    python examples/instruction_tuning.py --dataset_name tatsu-lab/alpaca --output_dir out/alpaca
    python examples/instruction_tuning.py --train_file chats.jsonl --questions vicuna.jsonl --output_dir out/mine

Rows have Alpaca's columns (instruction, input, output), chat messages, or a prompt and a completion. Of a chat every
answer counts, each after all that was said before it. --packing puts several rows into one sequence, --load_in_4bit
quantises the base. All flags of TRL's SFTConfig count too. Runs under `accelerate launch` and `torchrun` as it is.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import finetuning as ft
import torch
from answers import answer, as_text, read_questions
from datasets import Dataset, DatasetDict, load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedTokenizerBase, set_seed
from trl import SFTConfig, SFTTrainer

from s2ft_diffusion.dreambooth.process import exit_codes
from s2ft_diffusion.errors import InputError

ANSWERS_NAME = "answers.jsonl"


@dataclass
class Arguments:
    """Model and data."""

    model_name_or_path: str = "meta-llama/Llama-2-7b-hf"
    gguf_file: str | None = field(default=None, metadata={"help": "a GGUF file in the model's folder"})
    load_in_4bit: bool = field(default=False, metadata={"help": "quantise the base (needs bitsandbytes)"})
    dataset_name: str | None = field(default=None, metadata={"help": "a data set of the hub, or a local one's path"})
    train_file: str | None = field(default=None, metadata={"help": "JSON or JSON Lines, instead"})
    validation_file: str | None = field(default=None, metadata={"help": "JSON or JSON Lines for the perplexity"})
    validation_share: float = field(default=0.05, metadata={"help": "of the rows, where there is no such file"})
    max_train_samples: int | None = None
    questions: str | None = field(default=None, metadata={"help": "JSON Lines with text or turns, answered at the end"})
    max_new_tokens: int = 512


def load_rows(args: Arguments, seed: int) -> DatasetDict:
    """Splits "train" and "validation" as the files have them; raises InputError for what is missing."""
    if (args.dataset_name is None) == (args.train_file is None):
        raise InputError("Give either --dataset_name or --train_file.")
    with ft.readable(args.dataset_name or args.train_file):
        if args.dataset_name is not None:
            data = load_dataset(args.dataset_name)
        else:
            files = {"train": args.train_file, "validation": args.validation_file}
            data = load_dataset("json", data_files={name: path for name, path in files.items() if path is not None})
    if "train" not in data:
        raise InputError(f"There is no split 'train'; there are {', '.join(data)}.")
    if "validation" not in data:
        with ft.readable("--validation_share"):
            parts = data["train"].train_test_split(test_size=args.validation_share, seed=seed)
        data = DatasetDict(train=parts["train"], validation=parts["test"])
    if args.max_train_samples is not None:
        data["train"] = data["train"].select(range(min(args.max_train_samples, len(data["train"]))))
    return DatasetDict({name: data[name] for name in ("train", "validation")})


def examples(rows: Dataset, tokenizer: PreTrainedTokenizerBase) -> Iterator[dict[str, Any]]:
    """Prompts with completions: as chat messages where the tokenizer has a template for them, else as text."""
    columns, seen, without = rows.column_names, set(), 0
    for row in rows:
        if "messages" in columns:
            turns = row["messages"] if isinstance(row["messages"], list) else []
            messages = [{key: turn.get(key) for key in ("role", "content")} for turn in turns if isinstance(turn, dict)]
            answers = [place for place, turn in enumerate(messages) if turn["role"] == "assistant" and place > 0]
        elif "completion" in columns:
            messages, answers = exchange(row["prompt"], row["completion"]), [1]
        else:
            question = "\n\n".join(part for part in (row["instruction"], row.get("input")) if part)
            messages, answers = exchange(question, row["output"]), [1]
        texts = [turn["content"] for turn in messages]
        if any(text is not None and not isinstance(text, str) for text in texts):
            raise InputError(f"There is something in place of a text: {str(row)[:100]}")
        if not answers or not all(texts):
            without += 1  # nothing to learn from; well-known data sets have such rows
            continue
        for place in answers:
            if tokenizer.chat_template:
                roles = tuple(turn["role"] for turn in messages[: place + 1])
                if roles not in seen:  # some templates take no system message, or no two of one role
                    with ft.readable("The chat template"):
                        tokenizer.apply_chat_template(messages[: place + 1], tokenize=False)
                    seen.add(roles)
                yield {"prompt": messages[:place], "completion": [messages[place]]}
            else:
                yield {"prompt": as_text(messages[:place]), "completion": f" {messages[place]['content']}"}
    if without:
        print(f"{without} of {len(rows)} rows have no answer and are left out.", file=sys.stderr)


def exchange(question: str, answer: str) -> list[dict[str, str]]:
    """A question and its answer as chat messages."""
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Train, evaluate and answer; returns what is written to results.json."""
    args, method, training = ft.parse(
        (Arguments, ft.MethodArguments, SFTConfig),
        argv,
        num_train_epochs=1, per_device_train_batch_size=4, warmup_steps=0.06, max_length=None,
        lr_scheduler_type="cosine", eval_strategy="no", save_strategy="steps", save_total_limit=1,
        ddp_broadcast_buffers=False, ddp_find_unused_parameters=False,
    )  # fmt: skip
    ft.at_least(1, max_train_samples=args.max_train_samples, max_new_tokens=args.max_new_tokens)
    if args.questions:
        ft.refuse_sharded(training, "--questions")
    training.completion_only_loss = True
    set_seed(training.seed)
    questions = read_questions(args.questions) if args.questions else []
    with training.main_process_first(desc="data"):
        data = load_rows(args, training.seed)
    for split in data.values():
        wanted = {"messages": ("messages",), "completion": ("prompt", "completion")}
        kind = next((name for name in wanted if name in split.column_names), None)
        ft.need_columns(split.column_names, *wanted.get(kind, ("instruction", "output")))
    if args.load_in_4bit and (method.method == "full" or not torch.cuda.is_available()):
        raise InputError("--load_in_4bit needs a GPU, and a method other than full.")
    dtype = torch.bfloat16 if training.bf16 and method.method != "full" else torch.float32
    more: dict[str, Any] = {"gguf_file": args.gguf_file} if args.gguf_file else {}
    with ft.readable(args.model_name_or_path):
        tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path, **more)
        if args.load_in_4bit:
            more["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype
            )
        model = AutoModelForCausalLM.from_pretrained(args.model_name_or_path, dtype=dtype, **more)
    training.max_length = ft.choose_length(model, tokenizer, training.max_length, 512)
    ft.need_padding(tokenizer)
    with training.main_process_first(desc="examples"):
        data = DatasetDict({name: Dataset.from_list(list(examples(rows, tokenizer))) for name, rows in data.items()})
    for name, rows in data.items():
        if not len(rows):
            raise InputError(f"No row of the {name} data has an answer.")
    with ft.readable("--push_to_hub" if training.push_to_hub else "The flags do not go together"):
        trainer = SFTTrainer(
            ft.adapt(model, method, seed=training.seed),
            training,
            train_dataset=data["train"],
            eval_dataset=data["validation"],
            processing_class=tokenizer,
        )
    if not (len(trainer.train_dataset) and len(trainer.eval_dataset)):  # TRL drops rows that are cut before the answer
        raise InputError(f"No answer begins within --max_length {training.max_length} tokens.")
    facts = ft.train(trainer, method, args)
    facts["validation_rows"] = len(trainer.eval_dataset)
    facts["metrics"] = trainer.evaluate()
    facts["metrics"]["eval_perplexity"] = torch.tensor(facts["metrics"]["eval_loss"]).exp().item()
    ft.write(trainer, facts)  # answering may take long, and fail
    if questions and trainer.is_world_process_zero():
        answer(trainer, questions, Path(training.output_dir) / ANSWERS_NAME, args.max_new_tokens)
    return ft.report(trainer, facts)


if __name__ == "__main__":
    with exit_codes("instruction_tuning.py"):
        main()

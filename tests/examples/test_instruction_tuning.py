"""examples/instruction_tuning.py, end to end on a tiny causal model."""

from __future__ import annotations

import json
from pathlib import Path

import instruction_tuning
import pytest
import torch
from datasets import Dataset
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file

from s2ft_diffusion.dreambooth.process import exit_codes
from s2ft_diffusion.errors import InputError
from tests.examples.conftest import GRID, quick, tokenizer


def flags(llama: str, data: Path, output: Path, *more: str) -> list[str]:
    common = ("--num_train_epochs", "2", "--max_length", "32", "--validation_share", "0.2", "--max_new_tokens", "4")
    return quick(output, "--model_name_or_path", llama, "--train_file", str(data), *common, *more)


def test_trains_resumes_answers_and_loads(llama, instructions, tmp_path) -> None:
    data = instructions / "alpaca.json"
    more = ("--learning_rate", "1e-1", "--save_steps", "4", "--save_total_limit", "5")
    questions = ("--questions", str(instructions / "questions.jsonl"))
    facts = instruction_tuning.main(flags(llama, data, tmp_path, *more, *questions))
    assert facts["trainable"] == 4 * GRID
    assert facts["steps"] == 8
    assert facts["metrics"]["eval_perplexity"] < 60  # one of 60 words by chance
    answers = [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()]
    assert [len(line["answers"]) for line in answers] == [1, 1]
    assert answers[0]["question_id"] == 7
    half = tmp_path / "half"
    resume = ("--resume_from_checkpoint", str(tmp_path / "checkpoint-4"))
    instruction_tuning.main(flags(llama, data, half, *more, *resume))
    whole, resumed = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path, half))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    loaded = AutoPeftModelForCausalLM.from_pretrained(tmp_path).eval()
    tokens = torch.tensor([[1, 5, 6, 7]])
    adapted = loaded(input_ids=tokens).logits
    with loaded.disable_adapter():
        assert not torch.allclose(adapted, loaded(input_ids=tokens).logits, atol=1e-4)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_chats_and_packing(llama, instructions, tmp_path, method) -> None:
    more = ("--method", method, "--packing", "true", "--packing_strategy", "wrapped", "--save_strategy", "no")
    facts = instruction_tuning.main(flags(llama, instructions / "chat.jsonl", tmp_path, *more))
    assert facts["steps"] < 2 * (
        24 * 2 / 8
    )  # two epochs of 24 chats of two answers: several in a sequence of 32 tokens
    assert facts["metrics"]["eval_perplexity"] > 1


def test_every_answer_of_a_chat_counts() -> None:
    turns = (("system", "a"), ("user", "b"), ("assistant", "c"), ("user", "d"), ("assistant", "e"))
    chat = [{"role": role, "content": content} for role, content in turns]
    made = list(instruction_tuning.examples(Dataset.from_list([{"messages": chat}]), tokenizer()))
    assert made == [{"prompt": chat[:2], "completion": [chat[2]]}, {"prompt": chat[:4], "completion": [chat[4]]}]
    plain = tokenizer()
    plain.chat_template = None
    alpaca = Dataset.from_list([{"instruction": "say", "input": "", "output": "yes"}])
    (row,) = instruction_tuning.examples(alpaca, plain)
    assert row == {"prompt": "### Instruction:\nsay\n\n### Response:\n", "completion": " yes"}


def test_rows_without_an_answer_are_left_out(capsys) -> None:
    rows = [{"instruction": "say", "output": output} for output in ("yes", "", None, "no")]
    found = list(instruction_tuning.examples(Dataset.from_list(rows), tokenizer()))
    assert [row["completion"][0]["content"] for row in found] == ["yes", "no"]
    assert "2 of 4 rows have no answer" in capsys.readouterr().err


def test_a_chat_template_that_takes_no_system_message() -> None:
    picky = tokenizer()
    picky.chat_template = "{% if messages[0].role == 'system' %}{{ raise_exception('No system role') }}{% endif %}"
    chat = [{"role": role, "content": "say"} for role in ("system", "user", "assistant")]
    with pytest.raises(InputError, match="chat template: No system role"):
        list(instruction_tuning.examples(Dataset.from_list([{"messages": chat}]), picky))


def test_questions_longer_than_the_model_reads(llama, instructions, tmp_path, monkeypatch) -> None:
    """The model reads 64 tokens; results are there before anything is answered."""
    lines = [{"turns": ["say yes", "say no"]}, {"text": "say yes " * 60}]
    (tmp_path / "q.jsonl").write_text("\n".join(map(json.dumps, lines)))
    more = ("--questions", str(tmp_path / "q.jsonl"), "--max_new_tokens", "60")
    instruction_tuning.main(flags(llama, instructions / "alpaca.json", tmp_path / "out", *more))
    answers = [json.loads(line)["answers"] for line in (tmp_path / "out" / "answers.jsonl").read_text().splitlines()]
    assert [len(found) for found in answers] in ([1, 0], [2, 0])
    monkeypatch.setattr(instruction_tuning, "answer", out_of_luck)
    with pytest.raises(RuntimeError, match="out of luck"):
        instruction_tuning.main(flags(llama, instructions / "alpaca.json", tmp_path / "again", *more))
    assert (tmp_path / "again" / "results.json").is_file()


def out_of_luck(*args: object) -> None:
    raise RuntimeError("out of luck")


def test_bad_input_is_one_line(llama, instructions, tmp_path, capsys) -> None:
    def refused(*argv: str) -> str:
        with pytest.raises(SystemExit) as stopped, exit_codes("instruction_tuning.py"):
            instruction_tuning.main(quick(tmp_path, "--model_name_or_path", llama, *argv))
        assert stopped.value.code == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("instruction_tuning.py: ")]
        assert len(lines) == 1
        return lines[0]

    def file(name: str, *rows: dict) -> str:
        (tmp_path / name).write_text("\n".join(json.dumps(row) for row in rows) + "\n")
        return str(tmp_path / name)

    alpaca = str(instructions / "alpaca.json")
    good = {"instruction": "say", "input": "", "output": "yes"}
    assert "either --dataset_name" in refused()
    assert "no column 'output'" in refused("--train_file", file("a.jsonl", *[{"instruction": "say"}] * 4))
    assert "No row of the train data has an answer" in refused(
        "--train_file", file("b.jsonl", *[{**good, "output": ""}] * 4), "--validation_share", ".5"
    )
    assert "no column 'prompt'" in refused("--train_file", file("c.jsonl", *[{"completion": "yes"}] * 4))
    assert "line 1 has neither" in refused("--train_file", alpaca, "--questions", file("q.jsonl", {"question": "what"}))
    assert "none.json" in refused("--train_file", str(tmp_path / "none.json"))
    assert "--load_in_4bit" in refused("--train_file", alpaca, "--load_in_4bit", "true")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("--max_train_samples 0", "--max_train_samples must be at least 1"),
        ("--max_new_tokens 0", "--max_new_tokens must be at least 1"),
        ("--max_length 0", "--max_length must be at least 1"),
        ("--max_length 65", "above the 64 tokens"),
        ("--max_length 3", "No answer begins within --max_length 3"),
        ("--train_file {folder}/messages.jsonl", "No row of the train data has an answer"),
        ("--train_file {folder}/turns.jsonl", "No row of the train data has an answer"),
        ("--train_file {folder}/number.jsonl", "in place of a text"),
        ("--questions {folder}/list.jsonl", "line 1 has neither text nor turns"),
        ("--questions {folder}/text.jsonl", "line 1 has neither text nor turns"),
    ],
)
def test_refused_before_training(llama, instructions, tmp_path, ended, given, words) -> None:
    files = {
        "messages": {"messages": "say yes"},
        "turns": {"messages": ["say", "yes"]},
        "number": {"instruction": "say", "output": 3},
        "list": ["say"],
        "text": {"turns": "say"},
    }
    for name, row in files.items():
        (tmp_path / f"{name}.jsonl").write_text(f"{json.dumps(row)}\n" * 4)
    more = ("--validation_share", "0.5", *given.format(folder=tmp_path).split())
    code, line = ended(instruction_tuning, flags(llama, instructions / "alpaca.json", tmp_path / "out", *more))
    assert code == 2
    assert words in line

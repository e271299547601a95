"""Adapters and trainings in words, for the page."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .library import Entry, plain
from .words import escaped, shown


def caption(entry: Entry) -> str:
    """What stands below an adapter's tile."""
    if entry.reason:
        return f"{entry.name} · {entry.reason}"
    return f"{entry.name} · {entry.bytes / 1e6:.2f} MB"


def details(entry: Entry) -> str:
    """The header of an adapter as Markdown."""
    if entry.reason:
        return f"### {escaped(entry.name)}\n\nCannot be used: {escaped(entry.reason)}"
    facts = {
        "prompt": entry.info.instance_prompt,
        "class": entry.info.class_name,
        "base": entry.info.base_model,
        "trained": entry.info.date,
        "size": f"{entry.bytes:,} bytes",
        "trainable numbers": f"{entry.trainable:,}",
        "steps": entry.info.training.get("steps"),
    }
    rows = "\n".join(f"| {key} | {escaped(shown(str(value)))} |" for key, value in facts.items() if value is not None)
    return f"### {escaped(entry.name)}\n\n| | |\n| --- | --- |\n{rows}"


def training_words(status: Mapping[str, Any]) -> str:
    """How a training stands, from `App.training_status`, as Markdown."""
    if status["state"] == "none":
        return "No training yet."
    lines = [f"### {escaped(status['subject'])}: {status['state']}"]
    if status["state"] == "waiting" and status["before"]:
        lines.append(f"{status['before']} before it.")
    if status["state"] == "failed":
        lines.append(escaped(status["message"]))
    lines += [f"* **{phase}**: {escaped(plain(summary))}" for phase, summary in status["phases"]]
    if status["phase"]:
        done = f" step {status['losses'][-1][0]} of {status['steps']}" if status["losses"] else ""
        lines.append(f"* **{status['phase']}** …{done if status['phase'] == 'train' else ''}")
    if status["state"] == "done":
        lines.append("The adapter is in the library.")
    return "\n\n".join(lines[:1]) + "\n\n" + "\n".join(lines[1:])

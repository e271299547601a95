"""What is compared: methods and their sizes, subjects, what they are trained on and judged by."""

from __future__ import annotations

import sys
from argparse import Namespace
from dataclasses import replace

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer

pytest.importorskip("open_clip")

from eval import methods
from eval.methods import LORA_NUMBERS, METHODS, lora_rank, numbers, peft_config, s2ft
from eval.subjects import Subject, find_subjects
from eval.training import Run, Session, held_out_loss, peak_memory, train
from s2ft_diffusion.errors import InputError
from s2ft_diffusion.pipelines.targets import attention_targets
from s2ft_diffusion.toybox.subjects import SUBJECTS, write_photos
from s2ft_diffusion.toybox.world import BACKGROUNDS


def test_sizes_are_in_the_relation_that_is_compared(toybox_pipe) -> None:
    unet = toybox_pipe.unet
    targets = attention_targets(unet)
    ours = sum(numbers(0.02, unet.get_submodule(name)) for name in targets)
    counts = {}
    for kind in ("lora", "lora-bytes", "oft", "fourierft", "waveft"):
        adapted = type(unet).from_config(unet.config)
        adapted.requires_grad_(False)
        adapted.add_adapter(peft_config(kind, adapted, targets, 0.02, 0))
        counts[kind] = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    assert counts["lora"] >= LORA_NUMBERS * ours
    assert counts["lora"] < LORA_NUMBERS * ours * (1 + 1 / lora_rank(unet, targets, 0.02))
    for kind in ("fourierft", "waveft"):
        assert ours / counts[kind] == pytest.approx(0.8, rel=1e-3)
    assert counts["lora"] / 2.1 < counts["oft"] <= counts["lora"]  # blocks are powers of two
    # S²FT's file: its numbers in half precision, and of every row and column an order of eight bits and a sign.
    sides = sum(sum(unet.get_submodule(name).weight.shape) for name in targets)
    allowed = 2 * ours + sides * 9 / 8
    assert 2 * counts["lora-bytes"] <= allowed < 2 * (counts["lora-bytes"] + sides)


def test_what_adapts_no_convolution_has_as_many_numbers_in_the_linear_layers(toybox_pipe) -> None:
    unet = toybox_pipe.unet
    targets = attention_targets(unet, "all")
    ours = sum(numbers(0.002, unet.get_submodule(name)) for name in targets)
    for kind in ("fourierft", "lora"):
        adapted = type(unet).from_config(unet.config)
        adapted.requires_grad_(False)
        adapted.add_adapter(peft_config(kind, adapted, targets, 0.002, 0))
        count = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
        if kind == "lora":
            assert LORA_NUMBERS <= count / ours < LORA_NUMBERS * (1 + 1 / lora_rank(unet, targets, 0.002) + 0.1)
        else:
            assert ours / count == pytest.approx(0.8, rel=5e-3)
        found = {name for name, module in adapted.named_modules() if isinstance(module, BaseTunerLayer)}
        convolutions = {name for name in found if isinstance(unet.get_submodule(name), torch.nn.Conv2d)}
        assert bool(convolutions) == (kind == "lora")


def test_a_method_knows_when_it_has_become_another() -> None:
    default, paper = (m.definition() for m in METHODS if m.kind == "s2ft")
    assert default != paper
    changed = s2ft("s2ft-default", "another title", 1.0, gamma=3.0)
    assert changed.definition() != METHODS[-1].definition()
    assert s2ft("s2ft-default", "x", 9.0).definition() == METHODS[-1].definition()


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux' /proc")
def test_peak_memory_counts_what_is_freed_again() -> None:
    with peak_memory("cpu") as peak:
        block = torch.ones(50 * 2**20 // 4)
        del block
    assert 45 * 2**20 < peak.bytes < 80 * 2**20


def test_a_prior_is_kept_for_other_rates_and_grids(tmp_path, monkeypatch) -> None:
    made = []

    def estimate(model, loss, batches, *, estimate) -> dict[str, torch.Tensor]:
        made.append(estimate)
        return {"layer": torch.full((2, 3), float(len(made)))}

    monkeypatch.setattr("eval.training.estimate_prior", estimate)
    write_photos("perk", tmp_path / "photos")
    run = Run("toybox", tmp_path / "photos", "a photo of sks mug", 0, 0.02, steps=2, priors=tmp_path / "priors")
    paper, default = (m for m in METHODS if m.kind == "s2ft")
    for method in (paper, paper, default):
        Session(run, method.adapter).prior(method.estimate)
    assert made == [paper.estimate.kind, default.estimate.kind]
    kept = Session(run, paper.adapter).prior(paper.estimate)
    assert torch.equal(kept["layer"], torch.ones(2, 3))
    Session(replace(run, seed=1), paper.adapter).prior(paper.estimate)
    assert len(made) == 3


@pytest.mark.slow
def test_pictures_that_are_held_out_are_not_trained_on(tmp_path) -> None:
    photos = write_photos("perk", tmp_path / "all")
    for path in write_photos("perk", tmp_path / "some")[-2:]:
        path.unlink()
    lora = next(m for m in METHODS if m.kind == "lora")
    common = {"base": "toybox", "instance_prompt": "a photo of sks dog", "seed": 0, "n_frequency": 0.02, "steps": 2}
    subject = Subject("perk", "dog", tmp_path / "all")
    assert subject.held_out() == ((photos[-2], ""), (photos[-1], ""))
    held_out = Run(photos=tmp_path / "all", held_out=subject.held_out(), **common)
    fewer = Run(photos=tmp_path / "some", **common)
    assert train(lora, 1e-3, held_out).losses == pytest.approx(train(lora, 1e-3, fewer).losses, rel=1e-5)
    assert held_out_loss(lora, 0.0, held_out) == 1.0
    assert held_out_loss(lora, 1e-3, held_out) != 1.0
    one, other = (Session(held_out, method.adapter).held_out_loss() for method in (lora, METHODS[-1]))
    assert one == pytest.approx(other, rel=1e-5)  # all methods are judged by the same draws


def test_a_toybox_subject_is_judged_by_scenes_that_its_photos_do_not_show(tmp_path) -> None:
    args = Namespace(subjects_dir=None, output_dir=tmp_path, development=["perk"], subjects=None)
    (subject,), others = find_subjects(args)
    assert {other.name for other in others} == SUBJECTS.keys() - {"perk"}
    args.subjects = ["mocha"]  # one of the further ones, which take part where they are named
    assert [other.name for other in find_subjects(args)[1]] == ["mocha"]
    drawn = {path.name for path in (args.output_dir / "subjects").iterdir()}
    assert drawn == {subject.name, "mocha", *(other.name for other in others)}  # no others' pictures are written
    held_out = subject.held_out()
    assert len(held_out) == 8
    assert {words for _, words in held_out}.isdisjoint(BACKGROUNDS[n] for n in SUBJECTS["perk"].photo_backgrounds())
    common = {"base": "toybox", "instance_prompt": "a photo of sks cat", "seed": 0, "n_frequency": 0.02, "steps": 1}
    named = Session(Run(photos=subject.photos, held_out=held_out, **common))
    assert len(named.source) == 6
    unnamed = Session(Run(photos=subject.photos, held_out=tuple((path, "") for path, _ in held_out), **common))
    assert named.held_out_loss() < unnamed.held_out_loss()  # the base knows the scenes by their words


def test_subjects_of_dreambench_as_distributed(tmp_path, monkeypatch) -> None:
    for name in ("dog6", "rc_car", "unnamed"):
        write_photos("mittens", tmp_path / name)
    (tmp_path / "prompts_and_classes.txt").write_text(
        "Classes\n\nsubject_name,class\ndog6,dog\nrc_car,toy\n\nPrompts\n\nObject Prompts\n"
    )
    args = Namespace(subjects_dir=tmp_path, prompts=None, development=None, subjects=None, output_dir=tmp_path / "out")
    development, subjects = find_subjects(args)
    assert [(s.name, s.class_name) for s in (*development, *subjects)] == [("dog6", "dog"), ("rc_car", "toy")]
    args.output_dir = tmp_path / "dog6" / "." / ".." / "dog6"
    with pytest.raises(InputError, match="--output_dir and the photos of dog6 are one folder"):
        find_subjects(args)


def test_a_method_is_another_one_under_another_rule_for_its_estimate(monkeypatch) -> None:
    before = {method.name: method.definition() for method in METHODS}
    monkeypatch.setattr(methods, "ESTIMATE_SHARE", 0.5)
    changed = [method.name for method in METHODS if method.definition() != before[method.name]]
    assert changed == ["s2ft-default"]

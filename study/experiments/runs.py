"""A run of an experiment: trained and probed in a process of its own, its record kept.

A run's folder is `runs/<table>-<name>-seed<seed>`, its record a line of
study/results/<table>.jsonl. A run that was cut off is resumed, and one whose record is kept is left
alone, if they are of the same recipe: settings and presets as they are today.
"""

import argparse
import dataclasses
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch

import empssl
from empssl_support.cli import Stopped, UsageError, human_time
from empssl_support.runs import records
from empssl_support.settings import RUNS, read_settings
from study import baselines
from study.experiments.records import keep, read

ROOT = Path(__file__).resolve().parent.parent.parent

# Training images of each data set; of a folder it is not known before it is read.
IMAGES = {"tinyimagenet": 100_000, "imagenet100": 126_689, "shapes": 10_000}


class Recipe(NamedTuple):
    """A run to make. `name` is the same for every seed; `flags` are empssl.py's or, where
    --method is among them, those of study.baselines."""

    table: str
    name: str
    flags: str
    seed: int
    probes: str = ""  # the name of the run whose encoder is probed, where nothing is trained
    about: dict = {}  # what else its record says

    def folder(self, name: str = "") -> Path:
        return RUNS / f"{self.table}-{name or self.name}-seed{self.seed}"

    def arguments(self) -> list[str]:
        return [*shlex.split(self.flags), "--seed", str(self.seed)]

    def settings(self) -> empssl.Config:
        """With those of its preset and its method."""
        arguments = self.arguments()
        if "--method" in arguments:
            return baselines.settings(arguments)
        return read_settings(empssl.Config, empssl.PRESETS, arguments, "")

    def is_of(self, stored: dict) -> bool:
        """Whether a stored run is of this recipe, on a machine of any kind and precision.

        What is None is the data set's to say.
        """
        ours = vars(self.settings())
        ignored = {"name", "force", "data_dir", "device", "precision"}
        if ours["eval_only"]:
            ignored.add("epochs")
        if ours.get("method") == "supervised":
            ignored.add("dim")  # as many as there are classes
        return all(ours[k] in (None, stored.get(k)) for k in ours.keys() - ignored)

    def record(self) -> dict | None:
        """What is kept of it."""
        for record in read(self.table):
            same = (record["name"], record["seed"]) == (self.name, self.seed)
            if same and self.is_of(record.get("probe", record)):
                return record
        return None


def start(recipe: Recipe) -> dict:
    """Make the run, unless its record is kept. Returns the record.

    Exits with the code of a run that fails.
    """
    return recipe.record() or make(recipe)


def make(recipe: Recipe) -> dict:
    folder, arguments = recipe.folder(), recipe.arguments()
    program = [str(ROOT / "empssl.py")]
    if "--method" in arguments:
        program = ["-m", "study.baselines"]
    if recipe.probes:
        arguments += ["--checkpoint", str(recipe.folder(recipe.probes) / "encoder.pt")]
    begun = folder / "config.json"
    if begun.exists() and recipe.is_of(json.loads(begun.read_text())):
        config = recipe.settings()
        # Where the data lie and what trains may have changed since.
        here = ["--data-dir", config.data_dir, "--device", config.device]
        arguments = ["--resume", str(folder), *here]
    else:
        arguments += ["--name", folder.name, "--force"]
    if code := run([sys.executable, *program, *arguments]):
        sys.exit(code)
    record = written(recipe)
    keep(recipe.table, record)
    return record


def run(command: list[str]) -> int:
    """Run a program to its end; a signal to this one is passed on to it. Returns its exit code."""
    print(shlex.join(command), flush=True)
    with subprocess.Popen(command) as process:
        try:
            return process.wait()
        except Stopped as stopped:
            process.send_signal(stopped.number)
            stopped.sentence = "stopped; the same command goes on"
            raise


def written(recipe: Recipe) -> dict:
    """The record of a run, from its folder."""
    folder = recipe.folder()
    config = json.loads((folder / "config.json").read_text())
    *before, last = records(folder)
    record = config
    if recipe.probes:
        # The settings and costs of the training; those of the probe stand beside. What was found in
        # the training's own probes is none of this one's.
        record = written(recipe._replace(name=recipe.probes, probes="")) | {"probe": config}
        costs = ("R", "D", "train_seconds", "patches_seen")
        last = {key: record["metrics"][key] for key in costs if key in record["metrics"]} | last
    elif config["eval_only"]:
        record = config | {"epochs": 0}
    seen = [line for line in before if "linear_top1" in line]
    resumed = [line for line in before if "resumed" in line]
    record = record | recipe.about | {"name": recipe.name, "run": folder.name}
    return record | {"seen": seen, "resumed": resumed, "metrics": last}


# ---- what will run, and for how long ----


def estimate(recipes: list[Recipe]) -> float:
    """Seconds of training, at the speed of three steps of the first recipe's encoder here."""
    settings = [recipe.settings() for recipe in recipes]
    first = dataclasses.replace(settings[0], batch=5, epochs=1, size_schedule=None)
    s = first.patch_size = first.patch_size or (224 if first.dataset == "imagenet100" else 32)
    images = torch.randint(256, (15, 3, s, s)).to(first.device, torch.uint8)
    encoder = empssl.new_encoder(first, images)
    augmentation = empssl.training_augmentation(first, (s, s))
    empssl.train(encoder, images[:5], first, augmentation)  # the first step takes longer
    record = empssl.train(encoder, images, first, augmentation)
    patches = 0
    for config in settings:
        if not config.eval_only:
            images = config.subset or IMAGES.get(config.dataset, 50_000)
            patches += images * config.patches * config.epochs
    return patches * record["train_seconds"] / record["patches_seen"]


def start_all(recipes: list[Recipe], may_be_long: bool = True) -> None:
    """Say what will run and for about how long, and run it.

    Raises `UsageError` for the paper's recipes on a CPU, unless they `may_be_long`.
    """
    left = left_of(recipes)
    if not left:
        print("nothing to do: all are on record; to make them anew, move their file away first:")
        print(*sorted({f"  study/results/{recipe.table}.jsonl" for recipe in recipes}), sep="\n")
        return
    seconds = estimate(left)
    print(f"{len(left)} runs, about {human_time(seconds)} of training, and probing:")
    print(*(f"  {recipe.name}, seed {recipe.seed}" for recipe in left), sep="\n")
    if not may_be_long and left[0].settings().device == "cpu":
        raise UsageError(
            f"The paper's recipes would take about {seconds / 86400:.0f} days here; "
            f"use a GPU, give --anyway, or try --subset 500 --seeds 1."
        )
    for recipe in left:
        make(recipe)


def left_of(recipes: list[Recipe]) -> list[Recipe]:
    """Those without a record, and those whose encoder one of them probes, where it is gone."""
    missing = [recipe for recipe in recipes if not recipe.record()]
    probed = [(recipe.probes, recipe.seed) for recipe in missing]

    def is_gone(recipe: Recipe) -> bool:
        wanted = (recipe.name, recipe.seed) in probed
        return wanted and not (recipe.folder() / "encoder.pt").exists()

    return [recipe for recipe in recipes if recipe in missing or is_gone(recipe)]


def flags(about: str, data_dir: str = "data") -> argparse.ArgumentParser:
    """Those that the commands share."""
    parser = argparse.ArgumentParser(description=about)
    where = "where the images lie; what is on record is taken to be of the same ones"
    parser.add_argument("--data-dir", default=data_dir, help=where)
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0")
    return parser


def flags_of_trials(about: str, data_dir: str = "data") -> argparse.ArgumentParser:
    parser = flags(about, data_dir)
    what = "auto, cpu or cuda, to train and embed on; seconds stay those of a CPU"
    parser.add_argument("--device", default="auto", help=what)
    return parser

"""Every number of the README, from the run that it came from: python benchmarks/evidence.py COMMAND [--seeds 3]

    cifar10, cifar100           1, 10 and 30 epochs of 20 and 200 patches, each with a cosine that ends at its own last epoch
    tinyimagenet, imagenet100   1 and 10 epochs, from --data-dir
    transfer                    CIFAR-10's encoder probed on CIFAR-100 and the other way round; or --from A --to B, two folders
    ablation                    patches, batch, lambda, LARS, at one epoch of CIFAR-10
    peers                       every method of baselines.py, at equal epochs and at equal seconds
    laptop                      preset laptop on two cores: ten minutes, the same with all labels, an hour

Says first what will run and about how long it takes here. A run that was cut off is resumed, one that has a record in
results/COMMAND/ for the same recipe is left alone. On a CPU the paper's recipes take days: they are refused, with an
estimate, unless --anyway or --subset N asks for them.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import baselines            # noqa: E402
import empssl               # noqa: E402
import empssl_io as io      # noqa: E402
import report               # noqa: E402

GPU = torch.cuda.is_available()


class Run(NamedTuple):
    name: str                   # of its record, results/<command>/<name>.json
    flags: str                  # of baselines.py, which takes all of empssl.py's; a run of EMP-SSL is empssl.py's own
    after: str = ""             # the run whose encoder is probed
    once: bool = False          # whatever --seeds


def paper(dataset: str, data_dir: str = "data") -> list[Run]:
    """The paper's table: epochs by patches. A 30-epoch run is also probed after its first and tenth epoch, one of 10 after
    each, for the time that it takes to 80, 85 and 90 %."""
    runs = []
    for patches in (20, 200):
        for epochs in (1, 10, 30):
            seen = {1: "", 10: " --probe-epochs 1,2,3,4,5,6,7,8,9", 30: " --probe-epochs 1,10"}[epochs]
            runs.append(Run(f"{dataset}-{epochs}-epochs-{patches}-patches",
                            f"--dataset {dataset} --data-dir {data_dir} --preset paper --epochs {epochs} --patches {patches}{seen}"))
    return runs


def folders(dataset: str, data_dir: str) -> list[Run]:
    return [Run(f"{dataset}-{epochs}-epochs-200-patches", f"--dataset {dataset} --data-dir {data_dir} --preset paper --epochs {epochs} "
                f"--patches 200 --precision auto") for epochs in (1, 10)]


def transfer(flags) -> list[Run]:
    pairs = [("cifar10", "cifar100"), ("cifar100", "cifar10")]
    data = {name: f"--dataset {name}" for pair in pairs for name in pair}
    if flags.source:
        a, b = Path(flags.source).name, Path(flags.target).name
        pairs, data = [(a, b)], {a: f"--dataset imagefolder --data-dir {flags.source}", b: f"--dataset imagefolder --data-dir {flags.target}"}
    preset = "paper" if GPU else "laptop"
    runs = []
    for a, b in pairs:
        runs += [Run(f"{a}", f"{data[a]} --preset {preset} --epochs 1"),
                 Run(f"{a}-to-{b}", f"{data[b]} --preset {preset} --eval-only", after=f"{a}")]
    return runs


ABLATION = {"as-the-preset": "", **{f"{n}-patches": f"--patches {n}" for n in (2, 5, 10, 50, 100, 200)},
            **{f"batch-{b}": f"--batch {b}" for b in (50, 200, 400)}, **{f"lambda-{x}": f"--lam {x}" for x in (0, 10, 50, 400)},
            "no-lars": "--optimizer sgd", "centre-crop-at-evaluation": "--eval-patches 1 --eval-augmentation grid"}


def ablation() -> list[Run]:
    return [Run(name, f"--dataset cifar10 --preset paper --epochs 1 {flags}") for name, flags in ABLATION.items()]


def laptop() -> list[Run]:
    """The figures of the README's first table. An hour has one seed: the preset, and what was to do better. Batches of 50
    are 2.3 points ahead of batches of 100 in the comparison's 300 steps; in thousands that was predicted to turn, by half a point."""
    bench = "--dataset imagefolder --data-dir data/cifar10-jpeg --preset laptop --device cpu"
    hours = {"an-hour": "--epochs 12", "an-hour-hidden-4096": "--epochs 9 --hidden 4096 --augmentation paper",
             "an-hour-batch-100": "--epochs 11 --batch 100 --hidden 2048 --augmentation paper"}
    return [*(Run(name, f"{bench} {flags}", once=True) for name, flags in hours.items()),
            Run("ten-minutes", f"{bench} --epochs 2"), Run("ten-minutes-supervised", f"{bench} --epochs 2 --method supervised", once=True)]


# ---- peers: on a CPU preset laptop, 15,000 images, so that one epoch of EMP-SSL takes three minutes on two cores ----

METHODS = {                     # each on EMP-SSL's patches; ReSSL's second view and noise alone have their crop alone
    "untrained": "--eval-only --batch 100",
    "empssl": "--patches 20 --batch 100",
    "simclr": "--method simclr --augmentation {ours}",
    "simclr-one-negative": "--method simclr --augmentation {ours} --negatives 1",
    "simclr-noise": "--method simclr --augmentation noise --noise 0.5",
    "vicreg": "--method vicreg --augmentation {ours}",
    "byol": "--method byol --augmentation {ours}",
    "swav": "--method swav --augmentation {ours}",
    "ressl": "--method ressl --augmentation {ours}",
    "single": "--method single --augmentation {ours}",
}
PEERS_ABLATIONS = {             # at equal seconds too, one seed; EMP-SSL has 20 patches of 100 images but where it says otherwise
    "single-random-bank": "--method single --augmentation {ours} --bank-start random",
    "single-moving-average": "--method single --augmentation {ours} --bank-update average",
    "single-no-distillation": "--method single --augmentation {ours} --distillation 0",
    "empssl-sizes-8-16": "--patches 20 --patch-size 16 --size-schedule 8:0.5,16:0.5 --batch 100",
    "empssl-no-last-stage": "--patches 20 --drop-last-stage --batch 100",
    "empssl-upsampled-32-5-patches": "--patches 5 --patch-size 32 --batch 100",          # the pixels of 20 patches of 16
    "empssl-5-patches": "--patches 5 --batch 100",
    "empssl-2-patches": "--patches 2 --batch 100",
    "empssl-60-patches-of-5000": "--patches 60 --subset 5000 --batch 100",
    "empssl-200-patches-of-1500": "--patches 200 --subset 1500 --batch 100",
    "empssl-centre-crop-at-evaluation": "--patches 20 --eval-only --eval-patches 1 --eval-augmentation grid --batch 100",
    "empssl-no-lars": "--patches 20 --optimizer sgd --batch 100",
    "empssl-lambda-10": "--patches 20 --lam 10 --batch 100",
    "empssl-batch-50": "--patches 20 --batch 50",
    "simclr-batch-64": "--method simclr --augmentation {ours} --batch 64 --lr 0.1",
    "single-none-of-the-three": "--method single --augmentation {ours} --bank-start random --bank-update average --distillation 0",
    "empssl-lambda-400": "--patches 20 --lam 400 --batch 100",
    "empssl-batch-200": "--patches 20 --batch 200",
    "simclr-published-views": "--method simclr --crops published",
    "empssl-10-patches": "--patches 10 --batch 100",
}


def peers_bench() -> str:
    return ("--dataset cifar10 --preset paper" if GPU else
            "--dataset imagefolder --data-dir data/cifar10-jpeg --preset laptop --device cpu --subset 15000")


def peers_recipes(seeds: int) -> list[tuple[str, str, int]]:
    """Name, flags and seed of each method and each ablation, in the order in which they run."""
    return ([(name, flags, seed) for seed in range(seeds) for name, flags in METHODS.items()]
            + [(name, flags, 0) for name, flags in PEERS_ABLATIONS.items()])


def announce_peers(seeds: int, here: Path) -> None:
    config = settled([*peers_bench().split(), *METHODS["empssl"].split()])
    config.patch_size = config.patch_size or 32
    an_epoch = (config.subset or 50_000) * config.patches / patches_per_second(config)
    names = [f"{name}-1-epoch-seed{seed}" for name, _, seed in peers_recipes(seeds)]
    left = [name for name in names if not (here / f"{name}.json").exists()]
    print(f"peers: {len(METHODS) - 1} methods of {seeds} seeds and {len(PEERS_ABLATIONS)} ablations, each for one epoch and, where that is shorter, "
          f"for the {io.human_time(an_epoch)} of EMP-SSL's; {len(left)} of {len(names)} to come, about "
          f"{io.human_time(1.1 * an_epoch * len(left))} of training on {io.describe_device('cuda' if GPU else 'cpu')}, and probing", flush=True)


def peers(seeds: int, start) -> None:
    """One epoch of each, then as many as fit into the seconds of EMP-SSL's one, by the records of both."""
    bench = peers_bench()
    ours = "paper" if GPU else "light"
    seconds = lambda name: json.loads((report.RESULTS / "peers" / f"{name}.json").read_text())["metrics"]["train_seconds"]
    for name, flags, seed in peers_recipes(seeds):
        recipe = f"{bench} {flags.format(ours=ours)} --seed {seed}"
        if "--eval-only" in flags:
            start(Run(f"{name}-1-epoch-seed{seed}", recipe, after="" if name == "untrained" else f"empssl-1-epoch-seed{seed}"))
            continue
        if "--subset" in flags:                                     # to train on; probed on all, as the others
            start(Run(f"{name}-trained-seed{seed}", f"{recipe} --epochs 1"))
            start(Run(f"{name}-1-epoch-seed{seed}", f"{bench} --seed {seed} --eval-only", after=f"{name}-trained-seed{seed}"))
            continue
        start(Run(f"{name}-1-epoch-seed{seed}", f"{recipe} --epochs 1"))
        epochs = round(seconds(f"empssl-1-epoch-seed{seed}") / seconds(f"{name}-1-epoch-seed{seed}"))
        if epochs > 1:
            start(Run(f"{name}-equal-seconds-seed{seed}", f"{recipe} --epochs {epochs}"))


# ---- what a run is, and what it takes ----

def settled(arguments: list[str]) -> empssl.Config:
    """A run's settings, its preset's and its method's among them."""
    method = arguments[arguments.index("--method") + 1] if "--method" in arguments else "empssl"
    kind = baselines.Config if "--method" in arguments else empssl.Config
    return io.settings(io.parse_flags(kind, arguments, ""), {k: v | baselines.PUBLISHED[method] for k, v in empssl.PRESETS.items()})


def same_recipe(path: Path, arguments: list[str]) -> bool:
    """Whether the record or the run's `config.json` at `path` is of these arguments, with the presets as they are today. What is
    None here is the data set's to say."""
    ours, theirs = dataclasses.asdict(settled(arguments)), json.loads(path.read_text())
    if ours.get("method") == "supervised":
        ours["dim"] = None                                          # as many as there are classes
    return all(theirs.get(key) == value for key, value in ours.items() if value is not None and key not in ("name", "force", "data_dir"))


def patches_per_second(config: empssl.Config) -> float:
    """Of training, on this machine, from three steps after a first one."""
    b = 5 if config.device == "cpu" else config.batch
    small = dataclasses.replace(config, batch=b, epochs=1)
    images = torch.zeros(3 * b, 3, 32, 32, dtype=torch.uint8, device=config.device).random_()
    encoder = empssl.new_encoder(small, images)
    augmentation, _ = empssl.augmentations(small, 32, 32)
    empssl.train(encoder, images[:b], small, augmentation)
    started = time.perf_counter()
    empssl.train(encoder, images, small, augmentation)
    return 3 * b * config.patches / (time.perf_counter() - started)


def estimate(runs: list[Run], subset: int | None) -> float:
    """Seconds of training of these runs."""
    known, total = {}, 0.0
    for run in runs:
        if run.after:
            continue
        config = settled(run.flags.split())
        config.patch_size = config.patch_size or 32
        key = (config.backbone, config.patch_size, config.precision)
        known[key] = known.get(key) or patches_per_second(dataclasses.replace(config, patches=20))
        images = subset or {"imagenet100": 126_689, "tinyimagenet": 100_000}.get(config.dataset, 50_000)
        total += images * config.patches * config.epochs / known[key]
    return total


def arguments_of(run: Run, results: str, subset: int | None = None) -> list[str]:
    after = ["--checkpoint", str(folder_of(run.after, results) / "encoder.pt")] if run.after else []
    return run.flags.split() + (["--subset", str(subset)] if subset else []) + after


def folder_of(name: str, results: str) -> Path:
    return io.RUNS / f"{results.replace('/', '-')}-{name}"


def done(run: Run, results: str, subset: int | None = None) -> bool:
    path = report.RESULTS / results / f"{run.name}.json"
    return path.exists() and (bool(run.after) or same_recipe(path, arguments_of(run, results, subset)))


def start(run: Run, results: str, subset: int | None = None) -> None:
    """Train and probe, from where it was cut off, unless its record is there; keep the record in results/<results>/."""
    if done(run, results, subset):
        print(f"{run.name} has its record")
        return
    folder, arguments = folder_of(run.name, results), arguments_of(run, results, subset)
    program = ["baselines.py"] if "--method" in arguments else ["empssl.py"]
    begun = (folder / "config.json").exists()
    half_way = begun and same_recipe(folder / "config.json", arguments)
    command = program + (["--resume", str(folder)] if half_way else [*arguments, "--name", folder.name, *["--force"] * begun])
    print("python", *command, flush=True)
    ended = subprocess.run([sys.executable, ROOT / command[0], *command[1:]])
    if ended.returncode:
        sys.exit(ended.returncode)
    if results == "laptop":                                         # the README shows the first
        report.draw(folder)
    report.keep_record(folder, results, run.name)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=("cifar10", "cifar100", "tinyimagenet", "imagenet100", "transfer", "ablation", "peers", "laptop"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--subset", type=int, help="of the training images: a rehearsal, its records go to results/rehearsal/")
    parser.add_argument("--anyway", action="store_true", help="on a CPU too, whatever it takes")
    parser.add_argument("--data-dir", default="data", help="of tinyimagenet and imagenet100")
    parser.add_argument("--from", dest="source", help="transfer: a folder of images to train on")
    parser.add_argument("--to", dest="target", help="transfer: a labelled folder to probe on")
    flags = parser.parse_args(argv)
    if bool(flags.source) != bool(flags.target):
        raise io.UsageError("--from and --to go together; give both folders.")
    where = ("rehearsal" if flags.subset else flags.command, flags.subset)
    if flags.command == "peers":
        announce_peers(flags.seeds, report.RESULTS / where[0])
        peers(flags.seeds, lambda run: start(run, *where))
        report.main(["--peers"])
        return
    runs = {"cifar10": lambda: paper("cifar10"), "cifar100": lambda: paper("cifar100"),
            "tinyimagenet": lambda: folders("tinyimagenet", flags.data_dir), "imagenet100": lambda: folders("imagenet100", flags.data_dir),
            "transfer": lambda: transfer(flags), "ablation": ablation, "laptop": laptop}[flags.command]()
    open_runs = [run._replace(name=f"{run.name}-seed{seed}", flags=f"{run.flags} --seed {seed}", after=run.after and f"{run.after}-seed{seed}")
                 for seed in range(flags.seeds) for run in runs if seed == 0 or not run.once]
    open_runs = [run for run in open_runs if not done(run, *where)]
    seconds = estimate(open_runs, flags.subset)
    print(f"{flags.command}: {len(open_runs)} runs, about {io.human_time(seconds)} of training on {io.describe_device('cuda' if GPU else 'cpu')}, "
          f"and probing", *(f"  {run.name}" for run in open_runs), sep="\n")
    if not GPU and "--preset paper" in "".join(run.flags for run in open_runs) and not (flags.anyway or flags.subset):
        raise io.UsageError(f"The paper's recipes would take about {seconds / 86400:.0f} days here; use a GPU, give --anyway, or rehearse "
                            f"with --subset 500 --seeds 1.")
    for run in open_runs:
        start(run, *where)


if __name__ == "__main__":
    with io.mistakes_in_one_sentence():
        main()

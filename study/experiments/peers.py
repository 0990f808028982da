"""EMP-SSL beside the other methods: python -m study.experiments.peers

Preset laptop on 15,000 images of a folder: each method, and each ablation with one seed, for one
epoch; then again, where more fit, for as many epochs as take the seconds of EMP-SSL's one. Records
are kept in peers.jsonl.
"""

import shlex

from empssl_support.cli import one_sentence
from study.experiments.runs import Recipe, flags, start_all

# Each on EMP-SSL's patches; ReSSL's second view and noise alone have their crop alone.
METHODS = """\
untrained: --eval-only --batch 100
empssl: --patches 20 --batch 100
simclr: --method simclr --augmentation light
simclr-one-negative: --method simclr --augmentation light --negatives 1
simclr-noise: --method simclr --augmentation noise --noise 0.5
vicreg: --method vicreg --augmentation light
byol: --method byol --augmentation light
swav: --method swav --augmentation light
ressl: --method ressl --augmentation light
single: --method single --augmentation light"""

# Of one seed.
ABLATIONS = """
empssl-10-patches: --patches 10 --batch 100
empssl-5-patches: --patches 5 --batch 100
empssl-2-patches: --patches 2 --batch 100
empssl-60-patches-of-5000: --patches 60 --batch 100 --subset 5000
empssl-200-patches-of-1500: --patches 200 --batch 100 --subset 1500
empssl-batch-50: --patches 20 --batch 50
empssl-batch-200: --patches 20 --batch 200
empssl-lambda-10: --patches 20 --batch 100 --lam 10
empssl-lambda-400: --patches 20 --batch 100 --lam 400
empssl-no-lars: --patches 20 --batch 100 --optimizer sgd
empssl-no-last-stage: --patches 20 --batch 100 --drop-last-stage
empssl-sizes-8-16: --patches 20 --batch 100 --size-schedule 8:0.5,16:0.5
empssl-upsampled-32-5-patches: --patches 5 --batch 100 --patch-size 32
empssl-centre-crop-at-evaluation: --patches 20 --batch 100 --eval-only --eval-patches 1
simclr-batch-64: --method simclr --augmentation light --batch 64 --lr 0.1
simclr-published-views: --method simclr --crops published
single-random-bank: --method single --augmentation light --bank-start random
single-moving-average: --method single --augmentation light --bank-update average
single-no-distillation: --method single --augmentation light --distillation 0
single-none-of-the-three: --method single --augmentation light \
--bank-start random --bank-update average --distillation 0"""


def one_epoch(what: str, changes: str, seed: int, bench: str) -> list[Recipe]:
    def recipe(name, flags, probes="", budget="one epoch"):
        about = {"what": what, "budget": budget}
        return Recipe("peers", f"{what}-{name}", f"{bench} {flags}", seed, probes, about)

    if "--subset" in changes:
        # To train on; it is probed on as many images as the others.
        trained = recipe("trained", changes, budget="training alone")
        return [trained, recipe("1-epoch", "--eval-only", trained.name)]
    probes_ours = what != "untrained" and "--eval-only" in changes
    return [recipe("1-epoch", changes, "empssl-1-epoch" if probes_ours else "")]


def equal_seconds(recipes: list[Recipe]) -> list[Recipe]:
    """Of those that train for one epoch and take at most two thirds of EMP-SSL's seconds."""
    trained = [r for r in recipes if "--eval-only" not in r.flags and r.name.endswith("-1-epoch")]
    seconds = {(r.name, r.seed): r.record()["metrics"]["train_seconds"] for r in trained}
    longer = []
    for r in trained:
        epochs = round(seconds["empssl-1-epoch", r.seed] / seconds[r.name, r.seed])
        if epochs > 1:
            name = f"{r.about['what']}-equal-seconds"
            about = r.about | {"budget": "equal seconds"}
            flags = f"{r.flags} --epochs {epochs}"
            longer.append(r._replace(name=name, flags=flags, about=about))
    return longer


def main(argv: list[str] | None = None) -> None:
    about = "Each method and each ablation, for one epoch and at equal seconds."
    typed = flags(about, "data/cifar10-jpeg").parse_args(argv)
    bench = f"--dataset imagefolder --data-dir {shlex.quote(typed.data_dir)}"
    bench += " --subset 15000 --preset laptop --device cpu"
    recipes = []
    for seed in range(typed.seeds):
        for line in (METHODS if seed else METHODS + ABLATIONS).splitlines():
            what, changes = line.split(": ")
            recipes += one_epoch(what, changes, seed, bench)
    start_all(recipes)
    start_all(equal_seconds(recipes))


if __name__ == "__main__":
    with one_sentence():
        main()

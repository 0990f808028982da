"""The paper's own network: python -m study.experiments.network

ResNet-18 on all images of a folder, by the paper's recipe for 20 patches: one epoch, and two that
are probed after each, as the authors launch it. The encoder of one epoch is also probed on 5,000
images, by the grid's 16 crops and by 128 that are drawn as in training.

On a GPU that is done with patches enlarged to 32x32, as published, then with patches that keep
their 16x16 pixels, a quarter of the arithmetic; on a CPU, where it takes hours, with the latter
alone unless --enlarged asks for both. What was cut off goes on. Records are kept in network.jsonl.
"""

import shlex

import torch

from empssl_support.cli import one_sentence
from study.experiments.runs import Recipe, flags, start_all


def main(argv: list[str] | None = None) -> None:
    parser = flags("ResNet-18 by the paper's recipe.", "data/cifar10-jpeg")
    parser.add_argument("--enlarged", action="store_true", help="as published, on a CPU too")
    parser.set_defaults(seeds=1)
    typed = parser.parse_args(argv)
    bench = f"--dataset imagefolder --data-dir {shlex.quote(typed.data_dir)} --preset paper"
    kinds = {"native": f"{bench} --patch-size 16"}
    if typed.enlarged or torch.cuda.is_available():
        kinds = {"enlarged": bench} | kinds
    recipes = []
    for seed in range(typed.seeds):
        for kind, recipe in kinds.items():
            recipes += of_kind(kind, recipe, seed)
    start_all(recipes)


def of_kind(kind: str, recipe: str, seed: int) -> list[Recipe]:
    one = Recipe("network", f"{kind}-1-epoch", recipe, seed)
    two = f"{recipe} --epochs 2 --probe-epochs 1"
    few = f"{recipe} --subset 5000 --eval-only"
    drawn = f"{few} --eval-augmentation train --eval-patches 128"
    return [
        one,
        Recipe("network", f"{kind}-2-epochs", two, seed),
        Recipe("network", f"{kind}-16-crops-of-5000", few, seed, probes=one.name),
        Recipe("network", f"{kind}-128-crops-of-5000", drawn, seed, probes=one.name),
    ]


if __name__ == "__main__":
    with one_sentence():
        main()

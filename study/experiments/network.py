"""The paper's own network on a CPU: python -m study.experiments.network

ResNet-18 on all images of a folder, by the paper's recipe in all but one thing: patches keep their
16x16 pixels, a quarter of the arithmetic of patches enlarged to 32x32. One epoch, also probed by
128 drawn crops on 5,000 images; and two epochs, probed after each. It takes hours; a run that was
cut off goes on. --enlarged adds the epoch as published. Records are kept in network.jsonl.
"""

import shlex

from empssl_support.cli import one_sentence
from study.experiments.runs import Recipe, flags, start_all


def main(argv: list[str] | None = None) -> None:
    parser = flags("ResNet-18 on a CPU, by the paper's recipe.", "data/cifar10-jpeg")
    parser.add_argument("--enlarged", action="store_true", help="as published too: 32x32 pixels")
    parser.set_defaults(seeds=1)
    typed = parser.parse_args(argv)
    folder = shlex.quote(typed.data_dir)
    bench = f"--dataset imagefolder --data-dir {folder} --preset paper --device cpu"
    native = f"{bench} --patch-size 16"
    few = f"{native} --subset 5000 --eval-only"
    recipes = []
    for seed in range(typed.seeds):
        one = Recipe("network", "native-1-epoch", native, seed)
        drawn = f"{few} --eval-augmentation train --eval-patches 128"
        two = f"{native} --epochs 2 --probe-epochs 1"
        recipes += [
            one,
            Recipe("network", "native-16-crops-of-5000", few, seed, probes=one.name),
            Recipe("network", "native-128-crops-of-5000", drawn, seed, probes=one.name),
            Recipe("network", "native-2-epochs", two, seed),
        ]
        if typed.enlarged:
            recipes.append(Recipe("network", "enlarged-1-epoch", bench, seed))
    start_all(recipes)


if __name__ == "__main__":
    with one_sentence():
        main()

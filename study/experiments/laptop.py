"""The README's figures, by preset laptop on a CPU: python -m study.experiments.laptop

One pass, ten minutes, an hour, the hour with all labels as well, and `shapes`, on two cores.
Records are kept in laptop.jsonl and shapes.jsonl.
"""

import shlex

from empssl_support.cli import one_sentence
from study.experiments.runs import Recipe, flags, start_all


def main(argv: list[str] | None = None) -> None:
    about = "One pass, ten minutes and an hour, the hour with all labels too; and shapes."
    typed = flags(about, "data/cifar10-jpeg").parse_args(argv)
    preset = "--preset laptop --device cpu"
    bench = f"--dataset imagefolder --data-dir {shlex.quote(typed.data_dir)} {preset}"
    recipes = []
    for seed in range(typed.seeds):
        recipes += [
            Recipe("laptop", "one-pass", f"{bench} --epochs 1", seed),
            Recipe("laptop", "ten-minutes", f"{bench} --epochs 4", seed),
        ]
    recipes += [
        # With the paper's augmentation, so that colour does not name them.
        Recipe("shapes", "shapes", f"--dataset shapes {preset} --augmentation paper", 0),
        Recipe("laptop", "an-hour", f"{bench} --epochs 28", 0),
        Recipe("laptop", "an-hour-supervised", f"{bench} --epochs 28 --method supervised", 0),
    ]
    start_all(recipes)


if __name__ == "__main__":
    with one_sentence():
        main()

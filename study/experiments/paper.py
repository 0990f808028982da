"""The paper's tables: python -m study.experiments.paper cifar10

1, 10 and 30 epochs of 20 and 200 patches, each with a cosine that ends with its own last epoch; 30
epochs are also probed after 1 and 10, as the paper has it. Records are kept in cifar10.jsonl and so
on, those of a --subset in rehearsal.jsonl. On a CPU they take days: refused unless --anyway.
"""

import shlex

from empssl_support.cli import one_sentence
from study.experiments.runs import Recipe, flags, start_all

DATASETS = ("cifar10", "cifar100", "tinyimagenet", "imagenet100")


def main(argv: list[str] | None = None) -> None:
    parser = flags("The paper's recipe: 1, 10 and 30 epochs of 20 and 200 patches.")
    parser.add_argument("dataset", choices=DATASETS)
    parser.add_argument("--subset", type=int, help="of the training images: a rehearsal")
    parser.add_argument("--anyway", action="store_true", help="on a CPU too, whatever it takes")
    typed = parser.parse_args(argv)
    folder = shlex.quote(typed.data_dir)
    bench = f"--dataset {typed.dataset} --data-dir {folder} --preset paper"
    table = typed.dataset
    if typed.subset:
        bench += f" --subset {typed.subset}"
        table = "rehearsal"
    recipes = []
    for seed in range(typed.seeds):
        for patches in (20, 200):
            for epochs in (1, 10, 30):
                name = f"{typed.dataset}-{epochs}-epochs-{patches}-patches"
                recipe = f"{bench} --patches {patches} --epochs {epochs}"
                if epochs == 30:
                    recipe += " --probe-epochs 1,10"
                recipes.append(Recipe(table, name, recipe, seed))
    start_all(recipes, may_be_long=typed.anyway or bool(typed.subset))


if __name__ == "__main__":
    with one_sentence():
        main()

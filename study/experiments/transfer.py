"""An encoder probed on other images than it has seen: python -m study.experiments.transfer

CIFAR-10's on CIFAR-100, or between any two of these and folders of images: --from A --to B. Both
are probed, A's own images too if they have labels. Records are kept in transfer.jsonl.
"""

import shlex
from pathlib import Path

from empssl_support.cli import one_sentence
from study.experiments.runs import Recipe, flags, start_all


def data(where: str, data_dir: str) -> str:
    if where in ("cifar10", "cifar100"):
        return f"--dataset {where} --data-dir {data_dir}"
    return f"--dataset imagefolder --data-dir {shlex.quote(where)}"


def main(argv: list[str] | None = None) -> None:
    parser = flags("Train on some images, probe on others.")
    parser.add_argument("--from", dest="source", default="cifar10", help="to train on")
    parser.add_argument("--to", dest="target", default="cifar100", help="labelled, to probe on")
    typed = parser.parse_args(argv)
    name = Path(typed.source).name
    both = f"{name}-to-{Path(typed.target).name}"
    recipes = []
    for seed in range(typed.seeds):
        recipes.append(Recipe("transfer", name, data(typed.source, typed.data_dir), seed))
        probe = f"{data(typed.target, typed.data_dir)} --eval-only"
        recipes.append(Recipe("transfer", both, probe, seed, probes=name))
    start_all(recipes)


if __name__ == "__main__":
    with one_sentence():
        main()

"""Pictures and tables, drawn from what runs wrote. Nothing of the method is here.

    python report.py runs/<name>             draw the run, into its folder:
                                             patches.png  images beside patches that training cut from them
                                             curves.png   R, D and holdout accuracy against steps
                                             tsne.png     test features in the plane, coloured by class
    python report.py --record runs/<name> [folder]
                                             keep the run's figures and where they come from as results/[folder/]<name>.json,
                                             and its tsne.png beside them
    python report.py --peers                 draw results/peers/accuracy.png, of the methods' runs
    python report.py --readme                write README.md's tables anew from results/
"""

import dataclasses
import itertools
import json
import math
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import torch

import baselines
import empssl
import empssl_io as io


def draw_patches(plt, config: dict, data: io.Dataset, path: Path, rows: int = 6, columns: int = 12) -> None:
    images = data.train_images[torch.randperm(len(data.train_images), generator=torch.Generator().manual_seed(0))[:rows]]
    rows, _, H, W = images.shape
    kind, drawn = (baselines.Config, baselines.views) if "method" in config else (empssl.Config, lambda *how: empssl.augmentations(*how)[0])
    augmentation = drawn(kind(**{f.name: config[f.name] for f in dataclasses.fields(kind)}), H, W)
    if isinstance(augmentation, list):                              # one for each view
        augmentation = augmentation * (columns // len(augmentation))
    params = empssl.sample_patches(rows, columns, (H, W), augmentation, empssl.generator(0, "report", 0))
    x = empssl.extract_patches(images, torch.arange(rows), params, config["patch_size"])
    x = ((x + 1) / 2).clamp(0, 1).view(columns, rows, *x.shape[1:]).permute(1, 0, 3, 4, 2)
    figure, axes = plt.subplots(rows, columns + 1, figsize=(columns + 1, rows), squeeze=False,
                                gridspec_kw={"wspace": 0.05, "hspace": 0.05})
    for row in range(rows):
        for column, ax in enumerate(axes[row]):
            ax.imshow((images[row].permute(1, 2, 0) if column == 0 else x[row, column - 1]).numpy())
            ax.axis("off")
    axes[0][0].set_title("image")
    axes[0][1].set_title(f"patches, {config['patch_size']}x{config['patch_size']}", loc="left")
    figure.savefig(path, dpi=120, bbox_inches="tight")


def draw_curves(plt, records: list[dict], path: Path) -> None:
    steps = [r for r in records if "R" in r and "step" in r]
    epochs = [r for r in records if "holdout_knn_top1" in r]
    last = records[-1]
    figure, axes = plt.subplots(1, 3, figsize=(12, 3), layout="constrained")
    for ax, key, title in ((axes[0], "R", "R, coding rate (nats)"), (axes[1], "D", "D, invariance")):
        ax.plot([r["step"] for r in steps], [r[key] for r in steps])
        ax.set(title=title, xlabel="step")
    axes[2].plot([r["step"] for r in epochs], [r["holdout_knn_top1"] for r in epochs], "o-", label="kNN, training holdout")
    for key, label, style in (("linear_top1", "linear", "-"), ("knn_top1", "kNN", "-."), ("untrained_top1", "untrained", "--"),
                              ("raw_pixels_top1", "raw pixels", ":")):
        if key in last:
            axes[2].axhline(last[key], color="grey", linestyle=style, label=f"{label} {last[key]:.3f} (test)")
    axes[2].set(title="top-1 accuracy", xlabel="step", ylim=(0, 1))
    axes[2].legend(fontsize=8)
    figure.savefig(path, dpi=120)


def draw_tsne(plt, run: Path, data: io.Dataset, path: Path, most: int = 2000) -> None:
    from sklearn.manifold import TSNE

    saved = np.load(run / "test_features.npz")
    chosen = np.random.default_rng(0).permutation(len(saved["test_labels"]))[:most]
    features, labels = saved["test_features"][chosen].astype(np.float32), saved["test_labels"][chosen]
    features /= np.linalg.norm(features, axis=1, keepdims=True) + 1e-8
    xy = TSNE(random_state=0, perplexity=min(30, (len(chosen) - 1) / 3), init="pca").fit_transform(features)
    figure, ax = plt.subplots(figsize=(7, 6), layout="constrained")
    colours = plt.get_cmap("tab10" if len(data.classes) <= 10 else "gist_rainbow", max(10, len(data.classes)))
    for c, name in enumerate(data.classes):
        ax.scatter(*xy[labels == c].T, s=5, color=colours(c), label=name)
    if len(data.classes) <= 20:
        ax.legend(markerscale=3, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    ax.set(title=f"t-SNE of {len(chosen)} test images' features", xticks=[], yticks=[])
    figure.savefig(path, dpi=120)


# ---- records and the README's tables ----

RESULTS = Path(__file__).parent / "results"
README = Path(__file__).parent / "README.md"


def read_run(run: Path) -> tuple[dict, list[dict]]:
    try:
        config, records = json.loads((run / "config.json").read_text()), io.records(run)
    except (OSError, ValueError):
        records = []
    if not records:
        raise io.UsageError(f"{run} is no run's folder, or of a run that has nothing to show yet; give another, such as runs/demo.")
    return config, records


def keep_record(run: Path, folder: str = ".", name: str | None = None) -> None:
    config, records = read_run(run)
    if "linear_top1" not in records[-1]:
        raise io.UsageError(f"{run} has not been probed to its end; there is nothing to keep.")
    if folder == "." and "patches_seen" not in records[-1]:
        raise io.UsageError(f"{run} was not trained, only probed; name a folder of results/ to keep it in.")
    path = RESULTS / folder / f"{name or run.name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    resumed = [r["resumed"] | {"step": r["step"]} for r in records if "resumed" in r]
    seen = [r for r in records[:-1] if "linear_top1" in r]                      # at --probe-epochs
    more = ({"resumed": resumed} if resumed else {}) | ({"seen": seen} if seen else {})
    record = {"name": name or run.name} | config | more | {"metrics": records[-1]}
    io.save_atomically(path, lambda out: out.write((json.dumps(record, indent=1) + "\n").encode()))
    if (run / "tsne.png").is_file():                                # where it has been drawn
        shutil.copyfile(run / "tsne.png", path.with_suffix(".png"))
    print(f"kept as {path}")


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def table(columns: list[str], rows: list[list]) -> str:
    """Markdown; a row may end early."""
    padded = [[*row, *[""] * (len(columns) - len(row))] for row in [columns, *rows]]
    head, *body = ["|" + "".join(" |" if cell == "" else f" {cell} |" for cell in row) for row in padded]
    return "\n".join([head, "|" + "---|" * len(columns), *body])


def memory(metrics: dict) -> str:
    parts = [f"{metrics[key] / 2 ** 30:.1f} GiB{where}" for key, where in (("peak_memory", ""), ("peak_gpu_memory", " of the GPU"))
             if metrics.get(key)]
    return ", ".join(parts) or "not measured"


def data_name(record: dict) -> str:
    return record["dataset"] if record["dataset"] != "imagefolder" else Path(record["data_dir"]).name


def runs_table() -> str:
    """A row for each recipe, over its seeds: results/*.json, and what `reproduce.sh laptop` keeps in results/laptop/."""
    recipes = {}
    for path in [*sorted((RESULTS / "laptop").glob("*-seed*.json")), *sorted(RESULTS.glob("*.json"))]:
        recipes.setdefault(re.sub(r"-seed\d+$", "", path.stem), []).append(path)
    rows = []
    for name, paths in recipes.items():
        records = [read(path) for path in paths]
        r, mean = records[0], lambda key: sum(r["metrics"][key] for r in records) / len(records)
        accuracies = ("linear_top1", "representation_top1", "knn_top1", "untrained_top1", "raw_pixels_top1")
        links = [f"[{name if i == 0 else r['seed']}]({path.relative_to(RESULTS.parent)})" for i, (r, path) in enumerate(zip(records, paths))]
        rows.append([data_name(r), r["preset"] + (", all labels" if r.get("method") == "supervised" else ""), r["epochs"], f"{mean('patches_seen'):,.0f}",
                     f"{mean('train_seconds'):.0f} s", f"{mean('probe_seconds'):.0f} s", memory(max((r["metrics"] for r in records), key=lambda m: m.get("peak_memory", 0))),
                     *(spread(records, key) if key in r["metrics"] else "not measured" for key in accuracies), r["hardware"],
                     ", ".join(str(r["seed"]) for r in records), ", ".join(links)])
    rows.sort(key=lambda row: (row[0], row[2]))
    return table(["data", "preset", "epochs", "patches seen", "training", "probing", "peak memory", "linear", "of the representation", "kNN",
                  "untrained", "raw pixels", "hardware", "seeds", "record"], rows)


def memory_table() -> str:
    """A row for each recipe, from the run of it that took the most."""
    records = [read(path) for kind in ("laptop/*-seed*.json", "*.json", "memory/*.json") for path in sorted(RESULTS.glob(kind))]
    largest = {}
    for r in records:
        recipe = (r["preset"], data_name(r), r["batch"], r["patches"], f"{r['patch_size']}x{r['patch_size']}", r["hidden"], f"{r['device']}, {r['precision']}")
        if "peak_memory" in r["metrics"] and "method" not in r:
            largest[recipe] = max(r["metrics"], largest.get(recipe, {"peak_memory": 0}), key=lambda m: m["peak_memory"])
    rows = [[*recipe, memory(m), f"{m['checkpoint_bytes'] / 1e6:.0f} MB in {m['saving_seconds'] / m['checkpoints']:.1f} s" if m.get("checkpoints")
             else "not measured"] for recipe, m in largest.items()]
    rows += [[preset, "", "", "", "", "", "GPU", "not measured", "not measured"] for preset in empssl.PRESETS
             if not any(r["preset"] == preset and r["device"].startswith("cuda") for r in records)]
    for precision in ("bf16", "float32"):                           # of benchmarks/speed.py: 20,000 patches in one forward
        path, said = RESULTS / "speed" / f"memory-{precision}.json", "not measured"
        if path.exists():
            r = read(path)
            held = "does not fit" if r["peak_bytes"] is None else f"{r['peak_bytes'] / 2 ** 30:.1f} GiB of the GPU, two steps"
            said = f"{held} ({r['device_bytes'] / 2 ** 30:.0f} GiB, {r['hardware']})"
        rows.append(["paper", "", 100, 200, "32x32", 4096, f"GPU, {precision}", said])
    return table(["preset", "data", "batch", "patches", "patch", "hidden", "on", "peak memory", "a checkpoint"], rows)


def ops_table() -> str:
    """Each op against its peers, from benchmarks/ops.py; GPU cells stay "not measured" until it has run on one."""
    found = {device: read(path) for device in ("cpu", "cuda") if (path := RESULTS / "ops" / f"{device}.json").is_file()}
    rows = {device: {(r["op"], r["name"]): r for r in record["rows"] if "name" in r} for device, record in found.items()}

    def cell(device, key):
        r = rows.get(device, {}).get(key)
        if r is None:
            return "not measured"
        if "fraction_of_the_step" in r:
            return (f"{r['patches'] / r['seconds']:,.0f} patches/s: {r['fraction_of_copy_bandwidth']:.0%} of the copy bandwidth, "
                    f"{r['fraction_of_float32_rate']:.0%} of the float32 rate, {r['fraction_of_the_step']:.2%} of the ResNet-18 step")
        return f"{r['patches'] / r['seconds']:,.0f} patches/s" if "patches" in r else f"{r['seconds'] * 1e3:.1f} ms"
    on = [f"{name}: {found[device]['hardware'] if device in found else 'not measured'}" for name, device in (("CPU", "cpu"), ("GPU", "cuda"))]
    return table(["op", "what", *on], [[f"`{op}`", name, cell("cpu", (op, name)), cell("cuda", (op, name))]
                                       for op, name in dict.fromkeys(key for of_device in rows.values() for key in of_device)])


# What the paper reports on CIFAR-10 after 1 and 10 epochs (ResNet-18; EMP-SSL of 20 patches).
PAPER = {"empssl": (.806, .907), "simclr": (.282, .565), "byol": (.249, .489), "vicreg": (.406, .697), "swav": (.245, .532),
         "ressl": (.245, .256)}


def peers_records() -> dict[str, dict[str, list[dict]]]:
    """Records of results/peers by method or ablation, then by "1-epoch" or "equal-seconds", one of each seed. What was only probed has
    the rest from the record of its encoder's training."""
    found = {}
    for path in sorted((RESULTS / "peers").glob("*.json")):
        if not (parts := re.fullmatch(r"(.*)-(1-epoch|equal-seconds|trained)-seed(\d+)", path.stem)):
            continue
        name, kind, _ = parts.groups()
        record = read(path)
        if encoder := record["metrics"].get("checkpoint"):
            trained = read(path.with_name(Path(encoder).parent.name.removeprefix("peers-") + ".json"))
            record = trained | {"metrics": trained["metrics"] | record["metrics"]}
        if kind != "trained":
            found.setdefault(name, {}).setdefault(kind, []).append(record)
    return found


def at_equal_seconds(kinds: dict[str, list[dict]], seconds: dict[int, float]) -> list[dict]:
    """Of each seed the run of as many epochs as fit EMP-SSL's seconds, or the one epoch that does; none that is a third away."""
    longer = {r["seed"]: r for r in kinds.get("equal-seconds", ())}
    runs = [longer.get(r["seed"], r) for r in kinds["1-epoch"]]
    return [r for r in runs if 2 / 3 <= r["metrics"].get("train_seconds", 0) / seconds.get(r["seed"], float("inf")) <= 3 / 2]


def spread(records: list[dict], key: str) -> str:
    """Mean, and half the range, of a metric over seeds."""
    values = [r["metrics"][key] for r in records]
    mean = f"{sum(values) / len(values):.3f}"
    return mean if len(values) == 1 else f"{mean} ± {(max(values) - min(values)) / 2:.3f}"


def peers_table() -> str:
    found, rows = peers_records(), []
    seconds = {r["seed"]: r["metrics"]["train_seconds"] for r in found.get("empssl", {}).get("1-epoch", ())}
    methods = [name for name in found if "-" not in name or name.startswith("simclr-noise") or name.startswith("simclr-one")]
    for name in sorted(found, key=lambda name: (name not in methods, name.split("-")[0] != "empssl", name == "untrained", name)):
        one, equal = found[name]["1-epoch"], at_equal_seconds(found[name], seconds)
        mean = lambda records, key: sum(r["metrics"].get(key, 0) for r in records) / len(records)
        accuracies = lambda records: [spread(records, key) for key in ("linear_top1", "representation_top1", "knn_top1")]
        epochs = " or ".join(str(e) for e in sorted({r["epochs"] for r in equal}))
        rows.append([name, len(one), *accuracies(one), f"{mean(one, 'patches_seen'):,.0f}",
                     f"{mean(one, 'patches_seen') / (one[0]['patches'] * one[0]['batch']):.0f}", f"{mean(one, 'train_seconds'):.0f}",
                     *([epochs, *accuracies(equal), f"{mean(equal, 'train_seconds'):.0f}"] if equal else [""] * 5),
                     " / ".join(f"{x:.3f}" for x in PAPER.get(name, ()))])
    return table(["what", "seeds", "one epoch: linear", "of the representation", "kNN", "patches seen", "steps", "seconds",
                  "equal seconds: epochs", "linear", "of the representation", "kNN", "seconds", "paper, 1 / 10 epochs"], rows)


def draw_peers() -> None:
    """Linear accuracy, of all that is probed and of the representation alone, against seconds and against patches seen: of each
    method one epoch, and equal seconds."""
    found = {name: kinds for name, kinds in peers_records().items() if name in (*PAPER, "simclr-one-negative", "simclr-noise", "single")}
    if not found:
        print("no method has a record in results/peers yet: nothing drawn")
        return
    untrained = peers_records().get("untrained", {}).get("1-epoch")
    plt = pyplot()
    figure, axes = plt.subplots(2, 2, figsize=(11, 8), sharex="col", sharey="row", layout="constrained")
    accuracies = {"linear_top1": "linear probe, top-1", "representation_top1": "the same, of the representation alone"}
    costs = {"train_seconds": "seconds of training", "patches_seen": "patches seen"}
    for (accuracy, key), ax in zip(itertools.product(accuracies, costs), axes.flat):
        for name, kinds in sorted(found.items()):
            points = [[sum(r["metrics"][k] for r in records) / len(records) for k in (key, accuracy)] for records in kinds.values()]
            style = dict(marker="*", markersize=14, linewidth=0) if name == "empssl" else dict(marker="o", markersize=4)
            ax.plot(*zip(*sorted(points)), label=name, **style)
        if untrained:
            ax.axhline(float(spread(untrained, accuracy).split()[0]), color="grey", linestyle=":", label="untrained encoder")
        ax.set_xscale("log")
        ax.xaxis.set(major_locator=plt.matplotlib.ticker.LogLocator(subs=(1, 2, 5)), minor_locator=plt.matplotlib.ticker.NullLocator(),
                     major_formatter=lambda x, _: f"{x:,.0f}")
        ax.set(xlabel=costs[key] if ax in axes[1] else "", ylabel=accuracies[accuracy] if ax in axes[:, 0] else "")
    axes[0, 1].legend(loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(RESULTS / "peers" / "accuracy.png", dpi=120)
    print(f"drawn: {RESULTS / 'peers' / 'accuracy.png'}")


# Top-1 of the linear probe in the paper's tables, by (data set, patches, epochs of the schedule, epoch at which it is seen).
# Its one-epoch figures are of a recipe tuned for that; .842 is in the authors' README and .851 in the abstract.
PUBLISHED = {("cifar10", 20, 30, 1): ".806", ("cifar10", 20, 30, 10): ".907", ("cifar10", 20, 30, 30): ".931",
             ("cifar10", 200, 30, 1): ".826", ("cifar10", 200, 30, 10): ".915", ("cifar10", 200, 30, 30): ".934",
             ("cifar10", 200, 1, 1): ".842-.851",
             ("cifar100", 20, 30, 1): ".551", ("cifar100", 20, 30, 10): ".678", ("cifar100", 20, 30, 30): ".724",
             ("cifar100", 200, 30, 1): ".577", ("cifar100", 200, 30, 10): ".701", ("cifar100", 200, 30, 30): ".733",
             ("cifar100", 200, 1, 1): ".585",
             ("tinyimagenet", 200, 1, 1): ".381", ("tinyimagenet", 200, 10, 10): ".515",
             ("imagenet100", 200, 1, 1): ".585", ("imagenet100", 200, 10, 10): ".789"}


def paper_table() -> str:
    """The paper's tables beside ours; a cell of ours is filled by `bash reproduce.sh <data set>`."""
    ours, rows = {}, []
    for path in sorted(p for data in ("cifar10", "cifar100", "tinyimagenet", "imagenet100") for p in (RESULTS / data).glob("*.json")):
        r = read(path)
        for m in [*r.get("seen", []), r["metrics"] | {"epoch": r["epochs"]}]:
            ours.setdefault((r["dataset"], r["patches"], r["epochs"], round(m["epoch"])), []).append(r | {"metrics": m})
    for key in list(PUBLISHED) + sorted(key for key in set(ours) - set(PUBLISHED) if key[2] == key[3]):
        cells = ["not measured"]
        if r := ours.get(key):
            reached = " / ".join(time_to(r, goal) for goal in (0.80, 0.85, 0.90)) if key[2] == key[3] else ""
            cells = [spread(r, "linear_top1"), spread(r, "knn_top1"), f"{sum(x['metrics']['train_seconds'] for x in r) / len(r):.0f}",
                     reached, r[0]["hardware"], len(r)]
        rows.append([*key, PUBLISHED.get(key, ""), *cells])
    return table(["data", "patches", "schedule of", "seen at epoch", "paper", "linear", "kNN", "seconds of training", "to 80 / 85 / 90 %",
                  "hardware", "seeds"], rows)


def time_to(records: list[dict], goal: float) -> str:
    """Mean seconds of training until a probe, on the way or at the end, reached `goal`; "-" where one seed's did not."""
    first = [next((m["train_seconds"] for m in [*r.get("seen", []), r["metrics"]] if m["linear_top1"] >= goal), None) for r in records]
    return "-" if None in first else f"{sum(first) / len(first):.0f} s"


def profile_table() -> str:
    found = [read(path) for path in sorted((RESULTS / "profile").glob("*.json"))]
    columns = [column for r in found for column in (f"{r['preset']}, {r['hardware']}: ms", "share", "over its floor")]
    rows = [[same[0]["part"], *(cell for p in same for cell in (f"{p['seconds'] * 1e3:.1f}", f"{p['share']:.1%}", f"{p['seconds'] / p['floor']:.1f}x"))]
            for same in zip(*(r["parts"] for r in found))]
    return table(["part of a step", *columns], rows) if found else "not measured"


def speed_table() -> str:
    """The ways of benchmarks/speed.py; "not measured" until it has run on a GPU. Seconds to an accuracy are of whichever schedule
    gets there sooner."""
    folder, parts = RESULTS / "speed", ("sampling", "patches", "forward", "loss", "backward", "optimizer")
    rows = []
    for way in ("official", "paper", "paper-bf16", "fast"):
        if not (folder / f"{way}.json").exists():
            rows.append([way, "not measured"])
            continue
        r, trained = read(folder / f"{way}.json"), "paper-bf16" if way == "official" else way
        schedules = [[read(path) for path in sorted(folder.glob(f"{trained}-{epochs}-epochs-seed*.json"))] for epochs in (1, 10)]
        linear = " / ".join(spread(records, "linear_top1") if records else "not measured" for records in schedules)
        if way == "official":                                       # sees what paper sees, at its own pace
            pace = lambda m, run, epoch: m | {"train_seconds": epoch * run["images"] * run["patches"] / r["patches_per_second"]}
            schedules = [[run | {"seen": [pace(m, run, m["epoch"]) for m in run.get("seen", [])],
                                 "metrics": pace(run["metrics"], run, run["epochs"])} for run in records] for records in schedules]
        seconds = lambda said: math.inf if said == "-" else float(said[:-2])
        sooner = lambda goal: min((time_to(records, goal) for records in schedules if records), key=seconds)
        found = {p["part"]: f"{p['seconds'] * 1e3:.2f}" + (f" ({p['seconds'] / p['floor']:.1f}x)" if "floor" in p else "") for p in r["parts"]}
        rows.append([way, f"{r['patches_per_second']:,.0f}", *(found.get(part, "") for part in parts),
                     "" if r.get("idle") is None else f"{r['idle']:.0%}", linear,
                     " / ".join(sooner(goal) for goal in (0.80, 0.85, 0.90)) if any(schedules) else "not measured", r["hardware"]])
    return table(["way", "patches/s", *(f"{part}: ms (over its floor)" for part in parts), "no kernel runs", "linear after 1 / 10 epochs",
                  "seconds to 80 / 85 / 90 %", "hardware"], rows)


def speed_story() -> str:
    """results/speed/README.md: what was tried for preset fast, what each try was predicted to give, and what it gave."""
    rows = []
    for t in sorted(map(read, (RESULTS / "speed" / "tries").glob("*.json")), key=lambda t: -t["metrics"].get("holdout_linear_top1", -1)):
        m = t["metrics"]
        gave = [m["failed"], "-", "-"] if "failed" in m else [f"{m['holdout_linear_top1']:.4f}", f"{m['patches_per_second']:,.0f}", f"{m['train_seconds']:.0f} s"]
        rows.append([t["try"], f"`{t['flags']}`" if t["flags"] else "", t["predicted"], *gave, t["hardware"]])
    return "\n\n".join(["# The search for preset fast",
                        "Written by `python report.py --readme` from `tries/`, misses too, the best first. Scored by the linear probe on 5,000 training "
                        "images held out, one seed. `bash reproduce.sh speed --search` tries what has no record yet.",
                        table(["try", "flags", "predicted", "gave", "patches/s", "training", "hardware"], rows)]) + "\n"


def laptop_story() -> str:
    """results/laptop/README.md: what was tried for the laptop preset, what each try was predicted to give, and what it gave."""
    found = {path.stem: read(path) for path in (RESULTS / "laptop").glob("*.json")}
    singles = [found[name] | found[name]["metrics"] for name in sorted(found) if "try" in found[name]]          # of benchmarks/laptop.py, a file a try
    found["one by one"] = {"what": "records of benchmarks/laptop.py, a file a try", "tries": singles}
    parts = ["# The search for the laptop preset",
             "Written by `python report.py --readme` from the records beside it, misses too, in the order in which they were made. "
             "Every accuracy above the last table is a linear probe's (or kNN's) on training images held out. `python benchmarks/laptop.py` "
             "tries again."]
    figure = lambda value: f"{value:.4f}" if isinstance(value, float) else str(value)
    for name in ("tries", "whole-epochs", "separable", "maps", *(["one by one"] if singles else [])):
        rows = []
        for t in found[name]["tries"]:
            scores = {k.removeprefix("holdout_").removesuffix("_top1"): v for k, v in t.items() if k.startswith("holdout_")}
            scores |= {k: v for k, v in t.get("holdout", {}).items() if isinstance(v, float)}
            busy = " (other work beside it)" if t.get("other_work_on_the_machine") else ""
            rows.append([t["try"], t.get("predicted", "no figure"), ", ".join(f"{k} {figure(v)}" for k, v in scores.items()), f"{t['R']:.1f}",
                         f"{t['D']:.3f}", f"{t['patches_seen']:,}" if "patches_seen" in t else "-", f"{t['train_seconds']:.0f} s{busy}"])
        parts += [f"## {name}", found[name]["what"], table(["try", "predicted", "gave", "R", "D", "patches seen", "training"], rows)]
        for title in [title for title in ("evaluation_layout", "patches_per_second") if title in found[name]]:
            how = found[name][title]
            parts += [f"### {title.replace('_', ' ').capitalize()}", how["what"]]
            for group, values in ({k: v for k, v in how.items() if isinstance(v, dict)} or {"how": how}).items():
                parts.append(table([group, ""], [[k.strip(), figure(v)] for k, v in values.items() if k != "what"]))
    again = {name: [found[f"{name}{seed}"] for seed in ("", "@1", "@2") if f"{name}{seed}" in found] for name in found if f"{name}@1" in found}
    if again:
        parts += ["### Finalists", "means over seeds, ± half their range; the preset is `now-batch-50`",
                  table(["try", "linear", "maps", "knn", "training", "seeds"],
                        [[name, *(spread(r, f"holdout_{key}_top1") for key in ("linear", "maps", "knn")),
                          f"{sum(x['metrics']['train_seconds'] for x in r) / len(r):.0f} s", len(r)] for name, r in again.items()])]
    for name, what in (("layouts", "what is probed beside or instead of what the preset probes; 20,000 labels"),
                       ("views", "how many views of an image, whole (one) or large crops of it (several), its maps are the mean of; 10,000 labels")):
        if name in found:
            rows = [[t["layout"], t["predicted"], f"{t['features']:,}", f"{t['holdout_top1']:.4f}"] for t in found[name]["layouts"]]
            parts += [f"## {name}", f"benchmarks/layouts.py, of `{found[name]['encoder']}`: {what}, 5,000 training images held out, 30 probe epochs",
                      table(["layout", "predicted", "features", "gave"], rows)]
    rows = []
    for path in [path for kind in ("earlier-preset-*", "*-seed*") for path in sorted((RESULTS / "laptop").glob(f"{kind}.json"))]:
        m = read(path)["metrics"]
        rows.append([f"[{path.stem}]({path.name})", f"{m['patches_seen']:,}",
                     f"{m['train_seconds']:.0f} s", *(f"{m[key]:.4f}" for key in ("linear_top1", "knn_top1", "untrained_top1"))])
    parts += ["## The preset on the test set", "Nothing was chosen on it.",
              table(["record", "patches", "training", "linear", "kNN", "untrained"], rows)]
    return "\n\n".join(parts) + "\n"


def readme_with_tables(text: str) -> str:
    for name, written in (("runs", runs_table), ("paper", paper_table), ("peers", peers_table), ("memory", memory_table), ("speed", speed_table),
                          ("ops", ops_table), ("profile", profile_table)):
        start, end = f"<!-- {name}: written by report.py --readme -->", f"<!-- end of {name} -->"
        head, rest = text.split(start)
        text = f"{head}{start}\n{written()}\n{end}{rest.split(end)[1]}"
    return text


def main(argv: list[str]) -> None:
    if argv == ["--readme"]:
        README.write_text(readme_with_tables(README.read_text()))
        (RESULTS / "laptop" / "README.md").write_text(laptop_story())
        if (RESULTS / "speed" / "tries").is_dir():
            (RESULTS / "speed" / "README.md").write_text(speed_story())
    elif argv == ["--peers"]:
        draw_peers()
    elif len(argv) in (2, 3) and argv[0] == "--record":
        keep_record(Path(argv[1]), *argv[2:])
    elif len(argv) == 1 and not argv[0].startswith("-"):
        draw(Path(argv[0]))
    else:
        raise io.UsageError("give a run's folder, --record and a run's folder, --peers, or --readme.")


def pyplot():
    try:
        import matplotlib
    except ImportError:
        raise io.UsageError("drawing needs matplotlib and scikit-learn; install them with pip install -e '.[figures]'.")
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt


def draw(run: Path) -> None:
    config, records = read_run(run)
    plt = pyplot()
    data = io.load_dataset(config["dataset"], config["data_dir"], config["image_size"], config["subset"], config["seed"])
    draw_patches(plt, config, data, run / "patches.png")
    draw_curves(plt, records, run / "curves.png")
    drawn = ["patches.png", "curves.png"]
    if (run / "test_features.npz").is_file():
        draw_tsne(plt, run, data, run / "tsne.png")
        drawn.append("tsne.png")
    print("drawn:", ", ".join(str(run / name) for name in drawn))


if __name__ == "__main__":
    with io.mistakes_in_one_sentence():
        main(sys.argv[1:])

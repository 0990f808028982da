"""The tables of docs/peers.md: methods, minutes, patches, claims, transfer and the paper's network.

study.experiments.tables writes them. Each is of the records of the command of its name.
"""

import empssl
from study.experiments import claims, methods, minutes, patches, transfer
from study.experiments.cells import (
    METHODS,
    accuracy,
    average,
    differences,
    points,
    processors,
    steps,
    table,
)
from study.experiments.network import of_kind
from study.experiments.records import by_key, named, read

ACCURACIES = (0.60, 0.70, 0.75)
PAPERS = {
    claims.DEMOCRATIC: "[Bordes et al.](https://arxiv.org/abs/2303.01986)",
    claims.SINGLE: "[single-branch](https://arxiv.org/abs/2404.19289)",
    claims.S3L: "[S3L](https://arxiv.org/abs/2103.13559)",
    claims.OURS: "asked here",
}


# ---- methods ----


def settings() -> str:
    """What the search found for each method, on held-out training images; EMP-SSL is the preset."""
    rows = [row_of_the_preset()] if named("laptop", "try-two-epochs") else []
    for method in methods.PEERS:
        tries = [r for r in read("methods") if r["name"].startswith(f"search-{method}-")]
        if not tries:
            continue
        best = max(tries, key=methods.top1)
        published = methods.baselines.METHODS[method]
        temperature = best["temperature"] if published.get("temperature") else ""
        settings = [optimizer_of(published), optimizer_of(best), temperature]
        rows.append([METHODS[method], *settings, best["epochs"], len(tries), accuracy([best])])
    columns = ["method", "published optimizer, batch, rate", "chosen", "temperature", "epochs"]
    return table([*columns, "tries", "held out"], rows)


def row_of_the_preset() -> list:
    tries = [record for record in read("laptop") if "predicted" in record]
    runs = named("laptop", "try-two-epochs")
    settings = [optimizer_of(vars(empssl.Config())), optimizer_of(runs[0]), ""]
    return [METHODS["empssl"], *settings, runs[0]["epochs"], len(tries), accuracy(runs)]


def optimizer_of(settings: dict) -> str:
    return f"{settings['optimizer']}, {settings['batch']}, {settings['lr']:g}"


def methods_at_equal(budget: str) -> str:
    ours = named("methods", "empssl-equal-seconds")
    rows = []
    for method, name in METHODS.items():
        runs = named("methods", f"{method}-equal-{budget}") if method != "empssl" else ours
        if not runs:
            continue
        behind = "" if method == "empssl" else points(differences(runs, ours))
        rows.append(
            [
                name,
                accuracy(runs),
                behind,
                accuracy(runs, "knn_top1"),
                f"{seconds_alone(runs[0]):,.0f}",
                runs[0]["epochs"],
                average(runs, "patches_seen"),
                steps(runs),
                len(runs),
            ]
        )
    columns = ["method", "bag of patches", "minus EMP-SSL", "kNN", "seconds, estimated", "epochs"]
    return table([*columns, "patches seen", "steps", "seeds"], rows)


def seconds_alone(run: dict) -> float:
    """Of a training that has the machine to itself: by the speeds, not by this run's clock."""
    return methods.seconds_of(run["epochs"], run["method"], run["optimizer"], run["batch"])


def equal_seconds() -> str:
    return methods_at_equal("seconds")


def equal_epochs() -> str:
    return methods_at_equal("epochs")


# ---- minutes ----


def ten_minutes() -> str:
    """A row a method; the seconds to an accuracy are of the first seed."""
    ours = named("minutes", "empssl")
    rows = []
    for method, name in METHODS.items():
        runs = named("minutes", method)
        if not runs:
            continue
        figures = [accuracy(runs, key) for key in ("linear_top1", "quadrants_top1", "knn_top1")]
        behind = "" if method == "empssl" else points(differences(runs, ours))
        first = runs[0]
        curve = minutes.curve_of(first)
        reached = [seconds_to(wanted, curve) for wanted in ACCURACIES]
        spent = [f"{curve[-1][0]:,.0f}", first["epochs"]]
        made = [len(runs), "; ".join(processors(runs))]
        rows.append([name, figures[0], behind, *figures[1:], *spent, *reached, *made])
    columns = ["method", "bag of patches", "minus EMP-SSL", "quadrants", "kNN"]
    columns += ["seconds, estimated", "epochs"]
    columns += [f"seconds to {wanted:.2f}" for wanted in ACCURACIES]
    return table([*columns, "seeds", "on"], rows)


def seconds_to(wanted: float, curve: list[tuple[float, float]]) -> str:
    seconds = minutes.seconds_to(wanted, curve)
    if seconds is None:
        return "not reached"
    # Before the first probe nothing is known.
    at_most = "at most " if seconds == curve[0][0] else ""
    return f"{at_most}{seconds:,.0f}"


# ---- numbers of patches ----


def numbers_of_patches() -> str:
    """Two comparisons, a row for each lambda, or for two that are the same."""
    rows = []
    reference = named("patches", "reference")
    for comparison in patches.COMPARISONS:
        for n in patches.NUMBERS:
            ratio, cosine = (
                of_patches(comparison, n, f"equal {how}") for how in ("ratio", "cosine")
            )
            ways = [("ratio", ratio), ("cosine", cosine)]
            if ratio and cosine and ratio[0]["lam"] == cosine[0]["lam"]:
                ways = [("both", ratio)]
            if n != patches.REFERENCE:
                ways.append(("fixed", of_patches(comparison, n, "equal lambda")))
            ways.append(("cosine", of_another_rate(comparison, n)))
            for how, runs in ways:
                if not runs:
                    continue
                first = runs[0]
                settings = [comparison, n, first["batch"], how, first["lr"], f"{first['lam']:.0f}"]
                ahead = points(differences(runs, reference)) if n != patches.REFERENCE else ""
                figures = [accuracy(runs), ahead, accuracy(runs, "knn_top1")]
                seen = average(runs, "patches_seen")
                rows.append([*settings, average(runs, "cosine", ".2f"), *figures, seen, len(runs)])
    columns = ["equal", "patches", "images a batch", "lambda by", "rate", "lambda", "cosine"]
    columns += ["bag of patches", f"minus {patches.REFERENCE} patches"]
    return table([*columns, "kNN", "patches seen", "seeds"], rows)


def of_patches(comparison: str, n: int, how: str) -> list[dict]:
    if n == patches.REFERENCE:
        return named("patches", "reference")
    return named("patches", patches.name_of(comparison, n, how))


def of_another_rate(comparison: str, n: int) -> list[dict]:
    return named("patches", patches.name_of(comparison, n, patches.ANOTHER_RATE))


# ---- claims ----


def claims_table() -> str:
    rows = []
    for claim in claims.CLAIMS:
        found = claims.paired(claim)
        if not found:
            continue
        first, second = (named("claims", name) for name in (claim.first, claim.second))
        rows.append(
            [
                PAPERS[claim.paper],
                claim.says,
                f"`{claim.first}` {accuracy(first)}",
                f"`{claim.second}` {accuracy(second)}",
                claim.equal,
                points(found),
                f"over {claim.above:+.0f}" if claim.above else "over 0",
                len(found),
                claims.verdict(found, claim.above),
                points(claims.paired(claim, "knn_top1")),
            ]
        )
    columns = ["paper", "claim", "this", "compared with", "at equal", "points", "asked", "seeds"]
    return table([*columns, "here", "points by kNN"], rows)


def claims_runs() -> str:
    """What the runs of the claims are: a row each."""
    rows = []
    for name, variant in claims.VARIANTS.items():
        runs = named("claims", name)
        if not runs:
            continue
        changed = [f"`{variant.changes}`"] if variant.changes else []
        if variant.before:
            changed.append(f"after `{variant.before}`")
        if variant.like:
            changed.append(f"as `{variant.like}`")
        rows.append(
            [
                f"`{name}`",
                METHODS[variant.method],
                ", ".join(changed),
                f"{variant.images:,}",
                "" if runs[0]["eval_only"] else runs[0]["epochs"],
                seconds_of_run(name, runs[0]),
                average(runs, "patches_seen"),
                "" if runs[0]["eval_only"] else steps(runs),
                "" if runs[0]["eval_only"] else f"{runs[0]['lr']:.3g}",
                rates_tried(name),
                accuracy(runs),
                accuracy(runs, "knn_top1"),
                len(runs),
                "; ".join(processors(runs)),
            ]
        )
    columns = ["run", "method", "what is changed", "images", "epochs", "seconds, estimated"]
    columns += ["patches seen", "steps", "rate", "rates tried"]
    return table([*columns, "bag of patches", "kNN", "seeds", "on"], rows)


def seconds_of_run(name: str, run: dict) -> str:
    """Of both phases, where there are two; empty where the run has no seconds to keep to."""
    name = claims.model_of(name)
    variant = claims.VARIANTS[name]
    if variant.seconds is None:
        return ""
    seconds = run["epochs"] * claims.seconds_an_epoch(name)
    if variant.before:
        seconds += claims.epochs_of(variant.before) * claims.seconds_an_epoch(variant.before)
    return f"{seconds:.0f}"


def rates_tried(name: str) -> str:
    """From the lowest to the highest."""
    start = f"search-{claims.model_of(name)}-"
    tried = [r["lr"] for r in read("claims") if r["name"] == f"{start}{r.get('rate', 0):.3g}"]
    return f"{min(tried):.3g} to {max(tried):.3g}" if tried else ""


# ---- transfer ----


def transfer_table() -> str:
    """Of each pair of data sets the raw pixels, the untrained encoder, then a row a method.

    At its end a method's accuracies where it was trained on what is probed: the other way's own.
    """
    of_the_table = [run for run in read("transfer") if run["images"]]
    pairs = pairs_of([run for run in of_the_table if not run["eval_only"]])
    untrained = pairs_of([run for run in of_the_table if run["eval_only"]])
    rows = []
    for (source, target), runs in pairs.items():
        before = untrained.get((source, target), [])
        if raw_pixels := accuracy(before[:1], "raw_pixels_top1"):  # no seed changes pixels
            rows.append(["", target, "raw pixels", raw_pixels, *[""] * 5])
        if before:
            rows.append([source, target, "untrained", *transfer_cells(before, [], [])])
        by_method = by_key(runs, "method")
        back = by_key(pairs.get((target, source), []), "method")
        for method in transfer.METHODS:
            if found := by_method.get(method):
                ours = by_method.get("empssl", []) if method != "empssl" else []
                cells = transfer_cells(found, ours, back.get(method, []))
                rows.append([source, target, METHODS[method], *cells])
    columns = ["trained on", "probed on", "features", "bag of patches", "minus EMP-SSL", "kNN"]
    return table([*columns, "trained on such images", "by kNN", "seeds"], rows)


def transfer_cells(runs: list[dict], ours: list[dict], back: list[dict]) -> list:
    own = [accuracy(back, f"source_{metric}") for metric in ("linear_top1", "knn_top1")]
    ahead = points(differences(runs, ours))
    return [accuracy(runs), ahead, accuracy(runs, "knn_top1"), *own, len(runs)]


def pairs_of(runs: list[dict]) -> dict[tuple[str, str], list[dict]]:
    found = {}
    for run in runs:
        ends = tuple(run[end].rpartition("/")[2] for end in ("source", "target"))
        found.setdefault(ends, []).append(run)
    return found


# ---- the paper's network ----


def network() -> str:
    """A row for each probe of each training, on the way too; seconds are of undisturbed ones."""
    rows = []
    kinds = [recipe.name for kind in ("enlarged", "native") for recipe in of_kind(kind, "", 0)]
    for name in kinds:
        runs = named("network", name)
        if not runs:
            continue
        for epoch in sorted({line["epoch"] for run in runs for line in run["seen"]}):
            seen = [
                run | {"metrics": line}
                for run in runs
                for line in run["seen"]
                if line["epoch"] == epoch
            ]
            rows.append([name, f"{epoch} of {runs[0]['epochs']}", *network_cells(seen)])
        epochs = runs[0]["epochs"]
        rows.append([name, f"{epochs} of {epochs}", *network_cells(runs)])
    columns = ["run", "epoch", "R", "D", "bag of patches", "quadrants", "kNN", "training, s"]
    return table([*columns, "seeds", "on"], rows)


def network_cells(runs: list[dict]) -> list:
    alone = [run["metrics"] for run in runs if "other_work_on_the_machine" not in run]
    seconds = [metrics["train_seconds"] for metrics in alone if "train_seconds" in metrics]
    return [
        average(runs, "R", ".1f"),
        average(runs, "D", ".3f"),
        accuracy(runs),
        accuracy(runs, "quadrants_top1"),
        accuracy(runs, "knn_top1"),
        f"{sum(seconds) / len(seconds):,.0f}" if seconds else "",
        len(runs),
        "; ".join(processors(runs)),
    ]


TABLES = {
    "settings": settings,
    "equal-seconds": equal_seconds,
    "equal-epochs": equal_epochs,
    "ten-minutes": ten_minutes,
    "numbers-of-patches": numbers_of_patches,
    "claims": claims_table,
    "claims-runs": claims_runs,
    "transfer": transfer_table,
    "network": network,
}

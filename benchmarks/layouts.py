"""What the laptop preset's probe could see: python benchmarks/layouts.py runs/<name>/encoder.pt [views]     (an encoder of preset laptop)

Layouts of one encoder's maps of the whole image, each scored by the linear probe (30 epochs) with the labels of 20,000 training
images of CIFAR-10's JPEG copy on 5,000 others. Test data is never read here. What each was predicted to give, and what it
gave, goes to results/laptop/layouts.json; or, with `views`, of how many large crops the maps may be the mean, with 10,000 labels,
to results/laptop/views.json.
"""

import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import empssl               # noqa: E402
import empssl_io as io      # noqa: E402
import laptop               # noqa: E402


def deviations(x: Tensor) -> Tensor:
    """Of each region: `(b, c, k, k) -> (b, 8c)`, as long as `regions` gives its means."""
    mean, square = (empssl.regions(y) * 8 ** 0.5 for y in (x, x * x))
    return (square - mean ** 2).clamp(min=0).sqrt() / 8 ** 0.5


PARTS = {                       # of the maps of the first convolution, of the stage before the last and of the last, and of h (9, b, hidden)
    "first": lambda first, early, last, h: empssl.regions(first),
    "early": lambda first, early, last, h: empssl.regions(early),
    "last": lambda first, early, last, h: empssl.regions(last),
    "last 4x4": lambda first, early, last, h: F.adaptive_avg_pool2d(last, 4).flatten(1) / 4,
    "last deviation": lambda first, early, last, h: last.std((2, 3)),
    "last deviations": lambda first, early, last, h: deviations(last),
    "last maxima": lambda first, early, last, h: F.adaptive_max_pool2d(last, 2).flatten(1) / 2,
    "h": lambda first, early, last, h: h.mean(0),
    "h deviation": lambda first, early, last, h: h.std(0),
    "h rows": lambda first, early, last, h: torch.cat([*h.view(3, 3, *h.shape[1:]).mean(1)], 1) / 3 ** 0.5,
}
LAYOUTS = {                     # what it is predicted to give, and the parts side by side
    "as the preset": ("0.76: 0.774 on the test set with 50,000 labels and 100 epochs", ["last", "h"]),
    "each feature of unit variance": ("+0.5: some channels are small", ["last", "h"]),
    "and the stage before": ("+0.5, as a stage before the last helped two encoders", ["early", "last", "h"]),
    "and the two before": ("+0.7", ["first", "early", "last", "h"]),
    "last stage in 4x4 places": ("-0.5: a mirror image is another one", ["last 4x4", "h"]),
    "and its deviation": ("+0.5", ["last", "last deviation", "h"]),
    "and each region's deviation": ("+1: means and deviations gained 2.7 for an earlier encoder's patches", ["last", "last deviations", "h"]),
    "and quadrants' maxima": ("+0.5", ["last", "last maxima", "h"]),
    "and the deviation of h": ("+0.5", ["last", "h", "h deviation"]),
    "h in three rows": ("+0.3", ["last", "h rows"]),
    "the stage before, all deviations": ("+1.5", ["early", "last", "last deviations", "h", "h deviation"]),
}
CROPS = empssl.Augmentation.none(area=(0.6, 1.0), flip=0.5)
VIEWS = {                       # of the image whole and three crops of it, with the parts that the preset probes
    "mean over whole image and crops": "+0.5: a bag of patches, of large ones",
    "crops as further images": "+1: what a linear evaluation elsewhere does; as many steps",
    "the same, mean of the test features": "+0.5 over that",
}
CROPS_SEEN = {                  # of CROPS; 1: the image whole
    1: "no figure: the preset, for the two below",
    4: "+0.7: whole image and three crops gained 0.5",
    8: "+1",
}


def read_encoder(path: str) -> empssl.Encoder:
    saved = io.load_checkpoint(path)
    if (saved["architecture"]["backbone"], saved["architecture"]["drop_last_stage"]) != ("small", False):
        raise io.UsageError(f"{path} is no encoder of preset laptop; give one of those.")
    encoder = empssl.Encoder(**saved["architecture"])
    io.load_weights(encoder, path)
    return encoder


def keep(name: str, encoder: str, rows: list[dict]) -> None:
    record = {"encoder": encoder, **io.provenance("cpu"), "layouts": rows}
    io.save_atomically(laptop.RESULTS / f"{name}.json", lambda out: out.write((json.dumps(record, indent=1) + "\n").encode()))


def views(path: str, labels_used: int = 10_000) -> None:
    encoder, rows = read_encoder(path), []
    (images, labels), (held_out, their_labels) = laptop.holdout_split(io.load_dataset("imagefolder", "data/cifar10-jpeg"))
    for patches, predicted in CROPS_SEEN.items():
        shown = laptop.WHOLE_IMAGE if patches == 1 else CROPS
        x, u = (empssl.embed(encoder, some, patches, shown, maps=True) for some in (images[:labels_used], held_out))
        top1, _ = empssl.linear_probe(x, labels[:labels_used], u, their_labels, epochs=30)
        rows.append({"layout": f"mean of {patches} views", "predicted": predicted, "features": x.shape[1], "holdout_top1": top1})
        print(f"{patches}: predicted {predicted}; holdout {top1:.4f}", flush=True)
    keep("views", path, rows)


@torch.no_grad()
def parts_of(encoder: empssl.Encoder, images: Tensor, augmentation=laptop.WHOLE_IMAGE, wanted=tuple(PARTS), seed: int = 0) -> dict[str, Tensor]:
    """Parts' features of `images (N, 3, H, W)`, seen as `empssl.embed` shows them to `Encoder.maps`, or of a crop of each."""
    *stages, _, _ = encoder.eval().backbone.children()
    ends = (2, next(i for i, stage in enumerate(stages) if isinstance(stage, empssl.Residual)), len(stages) - 1)
    found, side = {name: [] for name in wanted}, 2 * encoder.architecture["patch_size"]
    for index in io.progress(torch.arange(len(images)).split(500), desc="embedding", leave=False):
        params = empssl.sample_patches(len(index), 1, images.shape[2:], augmentation, empssl.generator(seed, "layouts", int(index[0])))
        x, maps = empssl.cut(images, index, params, side, torch.device("cpu")), []
        for i, stage in enumerate(stages):
            x = stage(x)
            maps += [x] if i in ends else []
        k = max(1, x.shape[-1] // 2)
        h = encoder.represent(F.avg_pool2d(x, k, k // 2).permute(2, 3, 0, 1).flatten(0, 2)).view(9, len(index), -1)
        for name in wanted:
            found[name].append(PARTS[name](*maps, h))
    return {name: torch.cat(blocks) for name, blocks in found.items()}


def main(path: str) -> None:
    encoder = read_encoder(path)
    (images, labels), (held_out, their_labels) = laptop.holdout_split(io.load_dataset("imagefolder", "data/cifar10-jpeg"))
    train, test = parts_of(encoder, images[:20_000]), parts_of(encoder, held_out)
    torch.testing.assert_close(torch.cat([test["last"], test["h"]], 1)[:100], empssl.embed(encoder, held_out[:100], 1, maps=True),
                               atol=1e-4, rtol=1e-3)
    rows = []

    def score(name, predicted, x, y, u, epochs=30):
        top1, _ = empssl.linear_probe(x, y, u, their_labels, epochs=epochs)
        rows.append({"layout": name, "predicted": predicted, "features": x.shape[1], "holdout_top1": top1})
        print(f"{name}: predicted {predicted}; {x.shape[1]} features, holdout {top1:.4f}", flush=True)
    for name, (predicted, parts) in LAYOUTS.items():
        x, u = (torch.cat([features[part] for part in parts], 1) for features in (train, test))
        if "unit variance" in name:
            scale = x.std(0) + 1e-6
            scale *= ((x / scale).square().sum(1).mean() / x.square().sum(1).mean()).sqrt()         # as long as before
            x, u = x / scale, u / scale
        score(name, predicted, x, labels[:20_000], u)
    wanted = ("last", "h")
    views = [[torch.cat([features[part] for part in wanted], 1)] for features in (train, test)]
    del train, test
    for seed in range(1, 4):
        for some, view in zip((images[:20_000], held_out), views):
            view.append(torch.cat([*parts_of(encoder, some, CROPS, wanted, seed).values()], 1))
    mean = [sum(view) / 4 for view in views]
    (averaged, further, both), y = VIEWS, labels[:20_000]
    score(averaged, VIEWS[averaged], mean[0], y, mean[1])
    x, y = torch.cat(views[0]), y.repeat(4)
    score(further, VIEWS[further], x, y, views[1][0], epochs=8)
    score(both, VIEWS[both], x, y, mean[1], epochs=8)
    keep("layouts", path, rows)


if __name__ == "__main__":
    with io.mistakes_in_one_sentence():
        if len(sys.argv) not in (2, 3) or sys.argv[2:] not in ([], ["views"]):
            raise io.UsageError("give one encoder.pt, such as runs/demo/encoder.pt, and `views` or nothing.")
        (views if sys.argv[2:] else main)(sys.argv[1])

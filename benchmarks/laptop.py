"""The search for the laptop preset: python benchmarks/laptop.py [TRY | TRY@SEED ...]     (default: all that have no record yet)

Each try is one pass over 45,000 of the 50,000 training images of CIFAR-10's JPEG copy (data/cifar10-jpeg), or over a third
of them, scored by the paper's linear probe on the other 5,000. Test data is never read here. What it was
predicted to give, and what it gave, goes to results/laptop/<try>.json with its log.
"""

import contextlib
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import empssl               # noqa: E402
import empssl_io as io      # noqa: E402

RESULTS = ROOT / "results" / "laptop"


def dense(inputs, outputs, kernel, stride, padding):
    return [nn.Conv2d(inputs, outputs, kernel, stride=stride, padding=padding, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]


def plain(*widths):
    """3x3, 3x3 and 2x2 convolutions of stride 2: 16 -> 8 -> 4 -> 2 pixels."""
    layers, inputs = [], 3
    for outputs, (kernel, padding) in zip(widths, ((3, 1), (3, 1), (2, 0))):
        layers += dense(inputs, outputs, kernel, 2, padding)
        inputs = outputs
    return layers


class Basic(nn.Module):
    """ResNet's block: two 3x3 convolutions."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.main = nn.Sequential(*dense(inputs, outputs, 3, stride, 1), *dense(outputs, outputs, 3, 1, 1)[:2])
        self.side = nn.Sequential(*dense(inputs, outputs, 1, stride, 0)[:2]) if stride > 1 else nn.Identity()

    def forward(self, x):
        return torch.relu(self.main(x) + self.side(x))


def thin_resnet(*widths, blocks=2):
    """ResNet-18's first stages, narrower, behind a first convolution of stride 2."""
    layers = dense(3, widths[0], 3, 2, 1)
    for stage, (inputs, outputs) in enumerate(zip((widths[0], *widths), widths)):
        layers += [Basic(inputs, outputs, 2 if stage else 1), *(Basic(outputs, outputs, 1) for _ in range(blocks - 1))]
    return layers


def pointwise(inputs, outputs):
    return [empssl.Pointwise(inputs, outputs, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]


def depthwise(width, stride):
    return [nn.Conv2d(width, width, 3, stride, 1, groups=width, bias=False), nn.BatchNorm2d(width)]


def separable(first, second, third=0, early=0, blocks=2):
    """As `empssl.small_backbone`: residual blocks at 8x8 pixels (early) and at 4x4; third: a last stage at 2x2."""
    block = lambda width: empssl.Residual(*depthwise(width, 1), *pointwise(width, width))
    layers = [*dense(3, first, 3, 2, 1), *(block(first) for _ in range(early)),
              *depthwise(first, 2), *pointwise(first, second), *(block(second) for _ in range(blocks))]
    return layers + ([nn.PixelUnshuffle(2), *pointwise(4 * second, third)] if third else [])


def one_stage(width, blocks=1):
    """A convolution of stride 2, then residual blocks at 8x8 pixels: the preset without its last stage, at any width."""
    return [*dense(3, width, 3, 2, 1), *(empssl.Residual(*depthwise(width, 1), *pointwise(width, width)) for _ in range(blocks))]


BACKBONES = {"plain": (plain, (96, 192, 384)), "separable": (separable, (96, 192, 384)),
             "separable-wide": (separable, (128, 288, 640)), "two-stages-512": (separable, (128, 512, 0, 0, 1)),
             "two-stages-384": (separable, (128, 384)), "early-block": (separable, (128, 288, 640, 1, 1)),
             "early-384-one": (separable, (128, 384, 0, 1, 1)), "early-384": (separable, (128, 384, 0, 1, 2)),
             "early-576": (separable, (192, 576, 0, 1, 2)), "deeper-384": (separable, (128, 384, 0, 2, 3)),
             "one-stage": (one_stage, (128,)), "one-stage-256": (one_stage, (256,)), "thin-resnet": (thin_resnet, (64, 128, 256))}
WHOLE, THIRD = 45_000, 15_000                                    # images
WHOLE_IMAGE = empssl.Augmentation.none(area=(1.0, 1.0))
BEFORE = dict(batch=100, lr=0.1, patches=18, hidden=1024, projector=1024)          # the preset that the search began from
WIDER = dict(batch=100, lr=0.1, patches=18, hidden=2048, projector=512)
SHORT = dict(batch=100, lr=0.1, patches=10, hidden=2048, projector=512)
MAPS = dict(batch=100, lr=0.1, patches=10, hidden=1024, projector=512)
NOW = dict(images=THIRD, backbone="early-384", whitened=True)   # the preset, two epochs of a third


class Try(NamedTuple):
    predicted: str              # holdout linear accuracy, or points over another try
    settings: dict              # over the laptop preset's
    images: int = WHOLE
    backbone: str = "plain"
    whitened: bool = False
    augmentation: dict = {}     # over the light one
    warm_up: int = 0            # steps in which the learning rate rises
    averaging: float = 0.0      # decay, a step, of an average of the weights, which is then probed
    slower: float = 1.0         # factor of the gradients of biases and BatchNorms
    branch: float = 1.0         # of a residual branch at the start: its BatchNorm's weight
    annealed: bool = False      # LARS's trust falls with the learning rate, rather than being capped by it


TRIES = {
    "base": Try("0.68: lr 0.1 gained 1.8 points over 0.3 in short tries, an even grid of 16 patches 1", BEFORE),
    "hidden-2048": Try("+1 over base: twice the features at equal cost, as the projector narrows to 512", WIDER),
    "lambda-200": Try("+0.5 over hidden-2048: the paper's lambda is R's maximum, ours 0.6 of it", WIDER | dict(lam=200.0)),
    "batch-50": Try("+0.5 over hidden-2048: twice the steps", WIDER | dict(batch=50, lam=60.0)),
    "third": Try("hidden-2048 on a third of the images, for the four below", WIDER, THIRD),
    "third-whitened": Try("+1 over third: a first layer that need not be learned", WIDER, THIRD, whitened=True),
    "third-colour": Try("+0.5 over third: the paper's saturation and hue", WIDER, THIRD, augmentation=dict(saturation=0.4, hue=0.2)),
    "third-scales": Try("+0.5 over third: crops of 0.15 to 0.4 of the image", WIDER, THIRD, augmentation=dict(area=(0.15, 0.4))),
    "separable": Try("no figure: deeper, at 1.6 times the patches a second of hidden-2048",
                     dict(batch=100, lr=0.1, patches=16, epochs=2, hidden=2048, projector=512), backbone="separable", whitened=True),
    "separable-wide": Try("+1 over separable, with regions: what a short run saturates is the width",
                          dict(batch=100, lr=0.2, patches=12, epochs=2, hidden=1024, projector=512), backbone="separable-wide", whitened=True),
    "short": Try("separable on a third of its patches, for the five below", SHORT, backbone="separable", whitened=True),
    "short-adamw": Try("no figure", SHORT | dict(optimizer="adamw", lr=1e-3, weight_decay=1e-2), backbone="separable",
                       whitened=True),
    "short-lr-0.3": Try("no figure", SHORT | dict(lr=0.3), backbone="separable", whitened=True),
    "short-hidden-1024": Try("no figure: less to probe, and to compute", SHORT | dict(hidden=1024, projector=1024),
                             backbone="separable", whitened=True),
    "short-wide": Try("separable-wide on 450,000 patches, for the six below, probed by its maps", MAPS, backbone="separable-wide", whitened=True),
    "short-two-stages-512": Try("no figure: its last stage's maps were no better than those of the stage before",
                                MAPS, backbone="two-stages-512", whitened=True),
    "short-more-images": Try("no figure: five patches, twice the images and steps", MAPS | dict(patches=5, epochs=2),
                             backbone="separable-wide", whitened=True),
    "short-two-stages-384": Try("no figure: the same, narrower and deeper", MAPS, backbone="two-stages-384", whitened=True),
    "short-early-block": Try("no figure: depth where pixels are fine", MAPS, backbone="early-block", whitened=True),
    "short-early-384-one": Try("no figure: both of the two before", MAPS, backbone="early-384-one",
                               whitened=True),
    "short-early-384-lr-0.3": Try("no figure: another block, and the lr that gained before", MAPS | dict(lr=0.3),
                                  backbone="early-384", whitened=True),
    "now": Try("0.71: 0.704 from a third of these labels with half the patches; for the seven below", dict(batch=100, epochs=2), **NOW),
    "now-eps2-0.05": Try("-0.3: R grows by its logarithm, so lambda weighs less", dict(batch=100, epochs=2, eps2=0.05), **NOW),
    "now-eps2-0.8": Try("-0.3: the other way", dict(batch=100, epochs=2, eps2=0.8), **NOW),
    "now-warm-up": Try("0: LARS's clip bounds the first steps already", dict(batch=100, epochs=2), warm_up=30, **NOW),
    "now-sizes": Try("-1, at 1.2 times the patches a second", dict(batch=100, epochs=2, size_schedule="12:0.5,16:0.5"), **NOW),
    "now-bf16": Try("0, at half the patches a second: this CPU has no bf16 arithmetic (cut off at 60 patches a second, so of 1,500 images, for the "
                    "rate alone)", dict(batch=100, precision="bf16"), images=1_500, backbone="early-384", whitened=True),
    "now-averaging": Try("+0.3: a cosine to 0 leaves little to average", dict(batch=100, epochs=2), averaging=0.98, **NOW),
    "now-sgd": Try("-3: an independent run lost 31 without LARS, on a deeper network", dict(batch=100, epochs=2, optimizer="sgd"), **NOW),
    "now-lr-1": Try("+0.3: 0.3 gained over 0.1, but LARS's clip makes the rate a cap", dict(batch=100, epochs=2, lr=1.0), **NOW),
    "now-eta-0.01": Try("0: twice the trust, so twice the steps' length where the clip acts", dict(batch=100, epochs=2, eta=0.01), **NOW),
    "now-batch-200": Try("-0.5: half the steps, of a larger spread", dict(epochs=4, patches=4, batch=200), **NOW),
    "now-batch-50": Try("+1.5: with 20 patches, one epoch of a third, it gained 2.3 on the comparison's bench", dict(epochs=2, batch=50), **NOW),
    "now-batch-25": Try("+1: steps are short, R sees little", dict(epochs=2, batch=25), **NOW),
    "now-batch-50-lr-0.15": Try("+0.5 over now-batch-50: a rate of 1 lost 4 points, biases take its steps undamped", dict(epochs=2, batch=50, lr=0.15), **NOW),
    "now-shallower": Try("+1 over now-batch-50: a block more lost 3.6 points, so a block less, and the patches that its time buys",
                         dict(epochs=2, batch=50, patches=10), images=THIRD, backbone="early-384-one", whitened=True),
    "now-slower-0.1": Try("+1 over now-batch-50: biases and BatchNorms take raw steps on a loss scaled by 100", dict(epochs=2, batch=50),
                          slower=0.1, **NOW),
    "now-branch-0.3": Try("+0.5 over now-batch-50: depth that comes in slowly", dict(epochs=2, batch=50), branch=0.3, **NOW),
    "now-wider": Try("-1 over now-batch-50: 1.5 times the width, at half the patches; within that, it is the better one in an hour",
                     dict(epochs=2, batch=50, patches=4), images=THIRD, backbone="early-576", whitened=True),
    "now-wider-8-patches": Try("+1.5 over now-batch-50: as many patches as it, in twice its seconds; what it may gain in an hour", dict(epochs=2, batch=50),
                               images=THIRD, backbone="early-576", whitened=True),
    "now-thin-resnet": Try("+3 over now-batch-50: as many patches, in 2.8 times its seconds; after its first epoch the paper's ResNet-18 is far ahead",
                           dict(epochs=2, batch=50), images=THIRD, backbone="thin-resnet", whitened=True),
    "now-patch-32": Try("+3 over now-batch-50, in 3.5 times its seconds: blown up it gained 4.4 a patch in the comparison; what it may gain in an hour",
                        dict(epochs=2, batch=50, patch_size=32), **NOW),
    "now-eta-0.002": Try("+1 over now-batch-50: R + lambda D stands still from step 150 to 440 of 600 and rises when the cap acts", dict(epochs=2, batch=50, eta=0.002), **NOW),
    "now-annealed": Try("+1.5 over now-batch-50, for the same reason", dict(epochs=2, batch=50), annealed=True, **NOW),
    "now-paper-augmentation": Try("0 over now-batch-50: stronger augmentation lost 2.5 in the first and shortest tries, and should gain in longer ones",
                                  dict(epochs=2, batch=50, augmentation="paper"), **NOW),
    "now-hidden-2048": Try("+0.5 over now-batch-50, and 1 by the patches' probe: the representation grows in an hour", dict(epochs=2, batch=50, hidden=2048), **NOW),
    "now-lambda-200": Try("+0.5: what the smaller batch may have changed, lambda against R's maximum", dict(batch=100, epochs=2, lam=200.0), **NOW),
    "now-deeper": Try("+0.5: a block more in both stages, at three quarters of the patches", dict(batch=100, epochs=2, patches=6),
                      images=THIRD, backbone="deeper-384", whitened=True),
    "now-one-stage": Try("+0.5 over now-batch-50, at its seconds: in batches of 100 it gained a point of the comparison's linear probe",
                         dict(epochs=5, batch=50), images=THIRD, backbone="one-stage", whitened=True),
    "now-one-stage-256": Try("+1.5 over now-batch-50, at its seconds: twice the features of that, at half the patches", dict(epochs=3, batch=50),
                             images=THIRD, backbone="one-stage-256", whitened=True),
}


def holdout_split(data: io.Dataset, held: int = 5000):
    order = torch.randperm(len(data.train_images), generator=torch.Generator().manual_seed(123))
    parts = order[held:], order[:held]
    return [(data.train_images[rows], data.train_labels[rows]) for rows in parts]


@contextlib.contextmanager
def changed_schedule(warm_up: int):
    """The learning rate of `empssl.train` rises in the first steps."""
    before = empssl.cosine
    empssl.cosine = lambda lr, t, T: before(lr, t, T) * min(1, (t + 1) / max(1, warm_up))
    yield
    empssl.cosine = before


@contextlib.contextmanager
def annealed_trust(wanted: bool):
    """LARS's eta follows the cosine of `empssl.train`."""
    before = empssl.new_optimizer

    def new_optimizer(config, parameters):
        optimizer = before(config, parameters)
        group = optimizer.param_groups[0]
        optimizer.register_step_pre_hook(lambda *_: group.update(eta=config.eta * group["lr"] / config.lr))
        return optimizer
    empssl.new_optimizer = new_optimizer if wanted else before
    yield
    empssl.new_optimizer = before


@contextlib.contextmanager
def averaged(encoder: empssl.Encoder, decay: float):
    """What is to be probed: the encoder, or the moving average of its weights over the steps of `empssl.train`."""
    if not decay:
        yield encoder
        return
    average = torch.optim.swa_utils.AveragedModel(encoder, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(decay), use_buffers=True)
    before = empssl.new_optimizer

    def new_optimizer(*settings):
        optimizer = before(*settings)
        optimizer.register_step_post_hook(lambda *_: average.update_parameters(encoder))
        return optimizer
    empssl.new_optimizer = new_optimizer
    yield average.module
    empssl.new_optimizer = before


def run(name: str, data: io.Dataset, seed: int = 0) -> dict:
    chosen = TRIES[name.split("@")[0]]
    settings = empssl.PRESETS["laptop"] | chosen.settings
    config = empssl.Config(**dict(preset="laptop", precision="float32", device="cpu", seed=seed) | settings)
    (images, labels), (held_out, their_labels) = holdout_split(data)
    images, labels = images[:chosen.images], labels[:chosen.images]
    torch.manual_seed(seed)
    encoder = empssl.Encoder("small", config.patch_size, config.hidden, config.projector, config.dim)
    build, widths = BACKBONES[chosen.backbone]
    encoder.backbone = nn.Sequential(*build(*widths), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    encoder.represent[0] = nn.LazyLinear(config.hidden)
    encoder.eval()(torch.zeros(2, 3, config.patch_size, config.patch_size))
    if chosen.whitened:
        empssl.whiten(encoder.backbone[0], images[:2000])
    for parameter in encoder.parameters():
        if parameter.ndim == 1 and chosen.slower != 1:
            parameter.register_hook(lambda gradient: gradient * chosen.slower)
    for block in encoder.modules():
        if isinstance(block, empssl.Residual):
            nn.init.constant_(block[-2].weight, chosen.branch)
    encoder = encoder.to(memory_format=torch.channels_last)
    augmentation = dataclasses.replace(empssl.augmentations(config, 32, 32)[0], **chosen.augmentation)
    log, started = [], time.perf_counter()
    with changed_schedule(chosen.warm_up), annealed_trust(chosen.annealed), averaged(encoder, chosen.averaging) as to_probe:
        metrics = empssl.train(encoder, images, config, augmentation, log.append)
    encoder = to_probe
    h = {}
    for layout, shown in (("linear", dict(patches=16)), ("maps", dict(patches=1, augmentation=WHOLE_IMAGE, maps=True))):
        h[layout] = [empssl.embed(encoder, x, **shown) for x in (images, held_out)]
        metrics[f"holdout_{layout}_top1"] = empssl.linear_probe(h[layout][0], labels, h[layout][1], their_labels)[0]
    metrics |= {"holdout_knn_top1": empssl.knn_probe(h["linear"][0], labels, h["linear"][1], their_labels),
                "parameters": sum(p.numel() for p in encoder.parameters()),
                "probe_seconds": time.perf_counter() - started - metrics["train_seconds"]}
    print(f"{name}: predicted {chosen.predicted}; holdout linear {metrics['holdout_linear_top1']:.4f}, "
          f"of the maps {metrics['holdout_maps_top1']:.4f}")
    return {"try": name, **chosen._asdict(), "settings": settings, "seed": seed, **io.provenance("cpu"), "metrics": metrics,
            "log": log[4::5]}


if __name__ == "__main__":
    records = [json.loads(path.read_text()) for path in RESULTS.glob("*.json")]
    recorded = {t.get("try") for record in records for t in (record, *record.get("tries", ()))}
    names = sys.argv[1:] or [name for name in TRIES if name not in recorded]
    tries = [(name, TRIES.get(name.split("@")[0]), name.partition("@")[2] or "0") for name in names]
    unknown = [name for name, chosen, seed in tries if chosen is None or not seed.isdecimal()]
    if unknown:
        io.stop(f"error: there is no try {', '.join(unknown)}; the tries are {', '.join(TRIES)}, each with @SEED or without.", 2)
    with io.mistakes_in_one_sentence():
        io.keep_freed_memory()
        minutes = sum(13 if chosen.images == WHOLE else 5 for _, chosen, _ in tries)       # on two cores, with probing
        print(f"laptop: {len(names)} tries, about {io.human_time(60 * minutes)}: {', '.join(names)}", flush=True)
        data = io.load_dataset("imagefolder", "data/cifar10-jpeg")
        for name, _, seed in tries:
            record = run(name, data, int(seed))
            (RESULTS / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")

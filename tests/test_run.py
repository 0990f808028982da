"""Whole runs: training, its record, repeatability, and every mistake a user can make at the command line."""

import errno
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import empssl
import empssl_io as io
from empssl import Augmentation, Config, Encoder, main, train

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.usefixtures("in_tmp", "short_runs")

TINY = ["--preset", "laptop", "--device", "cpu", "--patches", "3", "--batch", "20", "--hidden", "16", "--projector", "16", "--dim", "8",
        "--eval-patches", "4", "--eval-augmentation", "grid"]
SHAPES = ["--dataset", "shapes", "--subset", "60", *TINY]


def records(name):
    return [json.loads(line) for line in (io.RUNS / name / "metrics.jsonl").read_text().splitlines()]


def tiny_training(steps=10, **kwargs):
    config = Config(**dict(patches=3, batch=8, patch_size=16, lr=0.1, lam=2.0, precision="float32") | kwargs)
    torch.manual_seed(5)
    encoder = Encoder("small", 16, hidden=16, projector=16, dim=8)
    images = torch.randint(0, 256, (steps * config.batch + 3, 3, 32, 32), dtype=torch.uint8,
                           generator=torch.Generator().manual_seed(5))
    return encoder, images, config


def losses_of(encoder, images, config, monkeypatch):
    losses, loss = [], empssl.empssl_loss
    monkeypatch.setattr(empssl, "empssl_loss", lambda *a: losses.append(loss(*a)) or losses[-1])
    train(encoder, images, config, Augmentation())
    return [x.item() for x in losses]


def test_ten_literal_losses(monkeypatch):
    """Order, patches, encoder, loss, optimizer and schedule together: a change in any of them shows here."""
    losses = losses_of(*tiny_training(), monkeypatch)
    assert losses == pytest.approx(TEN_LOSSES, rel=1e-3)


TEN_LOSSES = [-6.5651, -6.3311, -6.9264, -6.985, -6.6423, -6.4765, -6.7356, -6.6784, -6.7506, -6.7753]


def test_one_step_by_hand(monkeypatch):
    """The first step's weights from the public pieces alone, no setting its default."""
    encoder, images, config = tiny_training(steps=1, seed=3, eps2=0.5, eta=0.05, weight_decay=0.1)
    torch.manual_seed(5)
    ours = Encoder("small", 16, hidden=16, projector=16, dim=8)
    order = torch.randperm(len(images), generator=empssl.generator(3, "order", 0))[:8]
    params = empssl.sample_patches(8, 3, (32, 32), Augmentation(), empssl.generator(3, "patches", 0))
    z = ours(empssl.extract_patches(images, order, params, 16)).view(3, 8, 8)
    empssl.empssl_loss(z, config.lam, 0.5).backward()
    empssl.LARS(ours.parameters(), lr=config.lr, eta=0.05, weight_decay=0.1).step()
    train(encoder, images, config, Augmentation())
    for a, b in zip(encoder.parameters(), ours.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_two_runs_with_one_seed_end_in_equal_weights():
    weights = []
    for seed in (0, 0, 1):
        encoder, images, config = tiny_training(seed=seed)
        train(encoder, images, config, Augmentation())
        weights.append(torch.cat([p.detach().flatten() for p in encoder.parameters()]))
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_training_lowers_the_loss(precision, monkeypatch):
    encoder, images, config = tiny_training(steps=4, epochs=8, precision=precision)
    losses = losses_of(encoder, images, config, monkeypatch)
    assert len(losses) == 32 and np.mean(losses[-4:]) < np.mean(losses[:4]) - 0.25
    h, exact = (empssl.embed(encoder, images, 4, precision=how) for how in (precision, "float32"))
    assert h.dtype == torch.float32 and 0.99 < torch.nn.functional.cosine_similarity(h, exact).min() and torch.equal(h, exact) == (precision == "float32")


def test_an_epoch_shows_every_image_once_and_the_cosine_ends_at_zero(monkeypatch):
    encoder, images, config = tiny_training(steps=5, epochs=2)
    seen, drawn, rates = [], [], []
    cut, step = empssl.cut, empssl.LARS.step
    monkeypatch.setattr(empssl, "cut", lambda images, index, params, *rest: seen.append(index) or drawn.append(params)
                        or cut(images, index, params, *rest))
    monkeypatch.setattr(empssl.LARS, "step", lambda self: rates.append(self.param_groups[0]["lr"]) or step(self))
    metrics = train(encoder, images, config, Augmentation())
    first, second = torch.cat(seen[:5]), torch.cat(seen[5:])
    assert len(first.unique()) == len(second.unique()) == 40 and not torch.equal(first, second)
    assert not any(torch.equal(drawn[i], drawn[j]) for i in range(10) for j in range(i))        # new patches at each step
    assert rates == [pytest.approx(0.05 * (1 + math.cos(math.pi * t / 10))) for t in range(10)]
    assert metrics["patches_seen"] == 10 * 8 * 3


def test_a_size_schedule_gives_each_side_its_share_of_the_steps(monkeypatch):
    sides, cut = [], empssl.cut
    monkeypatch.setattr(empssl, "cut", lambda *a: sides.append(cut(*a).shape[-1]) or cut(*a))
    encoder, images, config = tiny_training(steps=10, size_schedule="8:0.3,12:0.5,16:0.2")
    train(encoder, images, config, Augmentation())
    assert sides == [8] * 3 + [12] * 5 + [16] * 2


def test_a_size_schedule_ends_at_the_side_that_is_probed():
    main([*SHAPES, "--name", "given", "--size-schedule", "8:0.5,16:0.5"])
    assert torch.load("runs/given/encoder.pt", weights_only=True)["architecture"]["patch_size"] == 16
    main([*SHAPES, "--name", "smaller", "--size-schedule", "16:0.5,8:0.5"])
    assert torch.load("runs/smaller/encoder.pt", weights_only=True)["architecture"]["patch_size"] == 8


@pytest.mark.parametrize("backbone,whole,less", [("small", 384, 128), ("resnet18", 512, 256)])
def test_dropping_the_last_stage_leaves_the_others_as_they_are(backbone, whole, less):
    torch.manual_seed(0)
    short = Encoder(backbone, 16, hidden=8, projector=8, dim=4, drop_last_stage=True)
    full = Encoder(backbone, 16, hidden=8, projector=8, dim=4)
    ours, theirs = dict(short.backbone.named_parameters()), dict(full.backbone.named_parameters())
    assert set(ours) < set(theirs) and all(ours[k].shape == theirs[k].shape for k in ours)
    x = torch.randn(2, 3, 16, 16)
    assert short.backbone(x).shape == (2, less) and full.backbone(x).shape == (2, whole)


@pytest.mark.parametrize("name,kind", [("lars", empssl.LARS), ("sgd", torch.optim.SGD), ("adamw", torch.optim.AdamW)])
def test_optimizers(name, kind):
    p = torch.nn.Parameter(torch.ones(2, 2))
    optimizer = empssl.new_optimizer(Config(optimizer=name, lr=0.25, weight_decay=0.5, eta=0.01), [p])
    group = optimizer.param_groups[0]
    assert type(optimizer) is kind and group["lr"] == 0.25 and group["weight_decay"] == 0.5
    assert group.get("eta", 0.01) == 0.01 and group.get("momentum", 0.9) == 0.9 and group.get("nesterov", True)


def test_probes_on_the_way():
    whole = main([*SHAPES, "--epochs", "3", "--name", "demo", "--probe-epochs", "1,3"])
    probed = [r for r in records("demo")[:-1] if "linear_top1" in r]
    assert [r["epoch"] for r in probed] == [1, 3] and probed[1]["linear_top1"] == whole["linear_top1"]
    assert probed[0]["train_seconds"] < probed[1]["train_seconds"] == whole["train_seconds"]
    assert main([*SHAPES, "--epochs", "3", "--name", "plain"])["linear_top1"] == whole["linear_top1"]


def test_the_whole_image_at_evaluation():
    _, at_eval = empssl.augmentations(Config(augmentation="light", eval_augmentation="maps"), 32, 32)
    params = empssl.sample_patches(5, 1, (32, 32), at_eval)
    assert (params[..., :4] == torch.tensor([0.0, 0, 32, 32])).all() and (params[..., 4] == 0).all()


@pytest.mark.skipif(sys.platform != "linux", reason="of glibc")
def test_freed_memory_is_kept_for_the_next_step():
    code = ("import sys, torch, empssl_io as io\n"
            "if sys.argv[1:]: io.keep_freed_memory()\n"
            "x = torch.zeros(50_000_000); del x\n"
            "print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmRSS')))\n")
    ask = lambda *arguments: int(subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True,
                                                env=os.environ | {"PYTHONPATH": str(ROOT)}).stdout)
    assert ask("keep") - ask() > 150_000                            # of 195,000 KiB


def test_r_and_d_are_reported_with_their_own_signs():
    encoder, images, config = tiny_training()
    log = []
    train(encoder, images, config, Augmentation(), log.append)
    assert log[0]["step"] == 10 and log[0]["R"] > 0 and 0 < log[0]["D"] <= 1
    assert log[0]["loss"] == pytest.approx(-(log[0]["R"] + config.lam * log[0]["D"]), rel=1e-4)
    assert 0 < log[0]["lr"] == pytest.approx(empssl.cosine(config.lr, 9, 10))


def test_seconds_of_training_are_without_what_follows_an_epoch():
    encoder, images, config = tiny_training(steps=2, epochs=3)
    started, log = time.perf_counter(), []
    train(encoder, images, config, Augmentation(), log.append, after_epoch=lambda epoch: time.sleep(0.3) or {"epoch": epoch})
    assert time.perf_counter() - started - max(r.get("train_seconds", 0) for r in log) >= 0.9


def test_a_preset_says_how_patches_are_drawn():
    data = io.load_dataset("shapes", subset=60)
    drawn = lambda how, side=32: empssl.augmentations(Config(augmentation=how), side, side)[0]
    assert drawn("paper") == Augmentation((0.25, 0.25), (1, 1), 0.5, 0.8, 0.4, 0.4, 0.4, 0.2, 0.2, 0.1, (0.1, 2.0), 0.1)
    assert drawn("light") == Augmentation((0.25, 0.25), (1, 1), 0.5, 0.8, 0.4, 0.4, 0.2, 0.1, 0.2, 0, (0.1, 2.0), 0)
    assert drawn("paper", 224).ratio == (3 / 4, 4 / 3)
    config = Config(device="cpu", backbone="small", patch_size=16, hidden=8, projector=8, dim=4, patches=2, augmentation="light")
    assert empssl.method(config, data)[2] == drawn("light")


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_what_was_saved(monkeypatch, capsys):
    loss, calls = empssl.empssl_loss, []
    monkeypatch.setattr(empssl, "empssl_loss",
                        lambda *a: loss(*a) * (math.nan if calls.append(1) or len(calls) == 5 else 1))
    with pytest.raises(SystemExit) as stop:
        main([*SHAPES, "--epochs", "3", "--name", "broken"])
    assert stop.value.code == 1 and "step 5 of 9" in capsys.readouterr().err
    weights = torch.load("runs/broken/encoder.pt", weights_only=True)["weights"]        # of epoch 1, three steps
    assert all(w.isfinite().all() for w in weights.values())


def test_a_run_and_its_record():
    record = main([*SHAPES, "--epochs", "2", "--name", "demo", "--eval-patches", "1", "--eval-augmentation", "maps"])
    assert record == records("demo")[-1]
    for key in ("linear_top1", "linear_top5", "knn_top1", "raw_pixels_top1", "untrained_top1"):
        assert 0 <= record[key] <= 1
    assert record["patches_seen"] == 2 * 60 * 3 and record["train_seconds"] > 0 and record["device"].startswith("cpu")
    assert [r["epoch"] for r in records("demo") if "holdout_knn_top1" in r] == [1, 2]
    config = json.loads((io.RUNS / "demo" / "config.json").read_text())
    assert config["preset"] == "laptop" and config["patch_size"] == 16 and config["lr"] == 0.3
    saved = np.load(io.RUNS / "demo" / "test_features.npz")
    assert saved["test_features"].shape == (40, 8 * 384 + 16) and saved["test_labels"].shape == (40,)


def test_a_saved_encoder_loads_and_probes_to_the_same_figures():
    trained = main([*SHAPES, "--name", "demo"])
    again = main([*SHAPES, "--name", "again", "--eval-only", "--checkpoint", "runs/demo/encoder.pt"])
    for key in ("linear_top1", "linear_top5", "knn_top1", "raw_pixels_top1", "untrained_top1"):
        assert again[key] == trained[key]
    assert again["checkpoint"] == "runs/demo/encoder.pt" and "train_seconds" not in again
    untrained = main([*SHAPES, "--name", "untrained", "--eval-only"])
    assert untrained["linear_top1"] == trained["untrained_top1"] and "checkpoint" not in untrained
    saved = torch.load("runs/demo/encoder.pt", weights_only=True)
    encoder = Encoder(**saved["architecture"])
    encoder.load_state_dict(saved["weights"])
    images = io.load_dataset("shapes").test_images
    features = np.load("runs/demo/test_features.npz")["test_features"]
    np.testing.assert_allclose(empssl.embed(encoder, images, 4).numpy(), features, atol=2e-3, rtol=2e-3)


def plain_folder(path, count=30, size=32):
    path.mkdir()
    for i in range(count):
        pixels = np.random.default_rng(i).integers(0, 256, (size, size, 3), np.uint8)
        Image.fromarray(pixels).save(path / f"{i:02}.png")


def test_plain_images_train_save_features_and_say_that_there_is_nothing_to_probe(in_tmp, capsys):
    plain_folder(in_tmp / "plain")
    record = main(["--dataset", "imagefolder", "--data-dir", "plain", *TINY, "--name", "plain"])
    assert "nothing to probe" in capsys.readouterr().out and "linear_top1" not in record
    saved = np.load("runs/plain/features.npz")
    assert saved["train_features"].shape == (30, 16) and saved["files"][3].endswith("03.png")
    assert (io.RUNS / "plain" / "encoder.pt").exists()


def test_export_features(in_tmp):
    main([*SHAPES, "--name", "demo", "--export-features", "own.npz"])
    own, data = np.load("own.npz"), io.load_dataset("shapes", subset=60)
    assert own["train_features"].shape == (60, 16) and np.array_equal(own["train_labels"], data.train_labels)
    assert np.array_equal(own["test_features"].astype(np.float16), np.load("runs/demo/test_features.npz")["test_features"])
    saved = torch.load("runs/demo/encoder.pt", weights_only=True)
    encoder = Encoder(**saved["architecture"])
    encoder.load_state_dict(saved["weights"])
    np.testing.assert_allclose(own["train_features"][40:], empssl.embed(encoder, data.train_images[40:], 4), atol=1e-5, rtol=1e-4)
    plain_folder(in_tmp / "plain")
    main(["--dataset", "imagefolder", "--data-dir", "plain", *TINY, "--checkpoint", "runs/demo/encoder.pt",
          "--export-features", "other.npz"])
    other = np.load("other.npz")
    assert other["train_features"].shape == (30, 16) and len(other["files"]) == 30
    assert [p.name for p in io.RUNS.iterdir() if not p.name.startswith(".")] == ["demo"]


def test_baselines_are_remembered(monkeypatch):
    assert io.remembered("a figure") is None
    first = main([*SHAPES, "--name", "one"])
    monkeypatch.setattr(empssl, "settled", lambda *_: pytest.fail("computed again"))
    assert main([*SHAPES, "--name", "two"])["untrained_top1"] == first["untrained_top1"]


def test_presets_are_defaults_that_any_flag_overrides(monkeypatch):
    class Trained(Exception):
        pass

    def settings_of(*arguments):
        def train(encoder, images, config, *_):
            raise Trained(config)
        monkeypatch.setattr(empssl, "train", train)
        with pytest.raises(Trained) as trained:
            main(["--dataset", "shapes", "--device", "cpu", "--batch", "50", *arguments])
        return trained.value.args[0]
    paper = settings_of("--preset", "paper", "--name", "a")
    assert (paper.patches, paper.batch, paper.lr, paper.backbone, paper.hidden, paper.dim, paper.eval_patches,
            paper.patch_size, paper.lam, paper.eps2, paper.epochs) == (20, 50, 0.3, "resnet18", 4096, 1024, 128, 32, 200,
                                                                       0.2, 1)
    assert (paper.augmentation, paper.eval_augmentation) == ("paper", "train")
    auto = settings_of("--lr", "1", "--name", "b")
    assert auto.preset == "laptop" and auto.patch_size == 16 and auto.backbone == "small" and auto.lr == 1


@pytest.mark.parametrize("dataset,size,side", [("tinyimagenet", 64, 32), ("imagefolder", 300, 224), ("imagefolder", 40, 40)])
def test_patches_are_of_the_images_side_but_tiny_imagenets(dataset, size, side, in_tmp, monkeypatch):
    for part in ("train", "val"):
        (in_tmp / "set" / part).mkdir(parents=True)
        plain_folder(in_tmp / "set" / part / "images", 10, size)
    (in_tmp / "set" / "val" / "val_annotations.txt").write_text("00.png\timages\n")
    drawn = []
    monkeypatch.setattr(empssl, "train", lambda encoder, images, config, *_: drawn.append(config.patch_size) or {})
    monkeypatch.setattr(empssl, "features", lambda *_: drawn.append(None) or sys.exit(0))
    with pytest.raises(SystemExit):
        main(["--dataset", dataset, "--data-dir", "set", *TINY, "--preset", "paper", "--backbone", "small", "--batch", "10", "--name", "x"])
    assert drawn == [side, None]


def test_the_first_lines_say_what_is_to_come(capsys):
    main([*SHAPES, "--epochs", "4", "--name", "demo"])
    output = capsys.readouterr()
    assert "preset laptop on cpu" in output.out and "12 steps, 720 patches of 16x16" in output.out
    assert "of training to go" in output.out + output.err           # after ten steps
    assert "report.py runs/demo" in output.out.splitlines()[-1]


# ---- mistakes: one sentence, exit code 2 ----

@pytest.mark.parametrize("arguments,sentence", [
    (["--dataset", "mnist"], "mnist"),
    (["--dataset", "imagefolder", "--data-dir", "nowhere"], "There is no folder nowhere"),
    (["--dataset", "imagefolder", "--data-dir", "empty"], "no images in empty"),
    ([*SHAPES, "--batch", "61"], "--batch 61 is larger"),
    ([*SHAPES, "--patch-size", "33"], "--patch-size 33"),
    ([*SHAPES, "--patch-size", "0"], "--patch-size is 0"),
    ([*SHAPES, "--patches", "1"], "--patches is 1"),
    ([*SHAPES, "--epochs", "0"], "--epochs is 0"),
    ([*SHAPES, "--eval-patches", "5"], "--eval-patches 5 makes no even grid"),
    ([*SHAPES, "--lr", "-1"], "--lr is -1"),
    ([*SHAPES, "--lr", "nan"], "--lr is nan"),
    ([*SHAPES, "--subset", "0"], "--subset is 0"),
    ([*SHAPES, "--image-size", "64"], "--image-size"),
    ([*SHAPES, "--seed", "x"], "--seed"),
    ([*SHAPES, "--device", "quantum"], "--device quantum"),
    ([*SHAPES, "--name", "../up"], "--name"),
    ([*SHAPES, "--checkpoint", "x.pt"], "--eval-only"),
    ([*SHAPES, "--eval-only", "--checkpoint", "nowhere.pt"], "There is no checkpoint nowhere.pt"),
    ([*SHAPES, "--eval-only", "--checkpoint", "text.pt"], "text.pt is no encoder"),
    ([*SHAPES, "--eval-only", "--checkpoint", "foreign.pt"], "foreign.pt is no encoder"),
    ([*SHAPES, "--eval-only", "--checkpoint", "code.pt"], "code.pt is no encoder"),
    ([*SHAPES, "--eval-only", "--checkpoint", "good.pt", "--backbone", "resnet18"], "another architecture"),
    ([*SHAPES, "--eval-only", "--checkpoint", "odd.pt"], "another architecture"),
    ([*SHAPES, "--export-features", "no/such/folder/f.npz"], "--export-features"),
    ([*SHAPES, "--size-schedule", "16:0.5,8"], "sides and shares"),
    ([*SHAPES, "--size-schedule", "16:0.5,8:0.4"], "sum to 1"),
    ([*SHAPES, "--size-schedule", "16:0.5,64:0.5"], "larger than the 32x32 images"),
    ([*SHAPES, "--size-schedule", "0:0.5,16:0.5"], "between 1 and"),
    ([*SHAPES, "--probe-epochs", "1,x"], "list of epochs"),
    ([*SHAPES, "--eval-augmentation", "maps"], "--eval-augmentation grid"),
    ([*SHAPES, "--eta", "-1"], "--eta is -1"),
], ids=lambda x: " ".join(x[-3:]) if isinstance(x, list) else "")
def test_mistakes(arguments, sentence, in_tmp, capsys):
    (in_tmp / "empty").mkdir()
    (in_tmp / "text.pt").write_text("hello")
    torch.save({"state_dict": {}}, "foreign.pt")
    torch.save({"architecture": print, "weights": Exploding()}, "code.pt")
    small = Encoder("small", 16, hidden=16, projector=16, dim=8)
    io.save_encoder("good.pt", small)
    io.save_encoder("odd.pt", small)
    odd = torch.load("odd.pt", weights_only=True)
    torch.save(odd | {"weights": Encoder("small", 16, hidden=4, projector=4, dim=8).state_dict()}, "odd.pt")
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and sentence in error and "Traceback" not in error
    assert not io.RUNS.exists() or not [p for p in io.RUNS.iterdir() if not p.name.startswith(".")]


class Exploding:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code from the checkpoint was run')",))


def test_a_run_is_not_overwritten(capsys):
    main([*SHAPES, "--name", "demo"])
    before = (io.RUNS / "demo" / "encoder.pt").read_bytes()
    with pytest.raises(SystemExit) as stop:
        main([*SHAPES, "--name", "demo", "--seed", "1"])
    assert stop.value.code == 2 and "demo holds a run already" in capsys.readouterr().err
    assert (io.RUNS / "demo" / "encoder.pt").read_bytes() == before


def test_force_does_not_delete_the_encoder_that_is_to_be_probed(capsys):
    (io.RUNS / "demo").mkdir(parents=True)
    io.save_encoder(io.RUNS / "demo" / "encoder.pt", Encoder("small", 16, hidden=16, projector=16, dim=8))
    with pytest.raises(SystemExit) as stop:
        main([*SHAPES, "--eval-only", "--checkpoint", "runs/demo/encoder.pt", "--name", "demo", "--force"])
    assert stop.value.code == 2 and "--force would delete runs/demo/encoder.pt" in capsys.readouterr().err
    assert (io.RUNS / "demo" / "encoder.pt").exists()


def test_too_little_memory_is_a_sentence(monkeypatch, capsys):
    monkeypatch.setattr(empssl, "load_dataset", lambda *_: torch.empty(2 ** 50))
    with pytest.raises(SystemExit) as stop:
        main([*SHAPES, "--name", "demo"])
    assert stop.value.code == 2 and "memory does not suffice" in capsys.readouterr().err


def test_a_log_has_each_line_at_once_and_any_file_name():
    code = "import os, empssl_io as io\nwith io.mistakes_in_one_sentence():\n    print('said \\udcff'); os._exit(0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""})
    assert done.stdout == "said \\udcff\n"


def test_a_line_is_not_glued_to_the_progress_bar(capsys):
    bar = io.progress(total=3, desc="training")
    capsys.readouterr()
    bar.write("a line")
    said = capsys.readouterr()
    assert said.out == "a line\n" and said.err.startswith("\r") and "training" in said.err        # cleared, then drawn again
    bar.close()


def test_a_command_is_recorded_as_it_would_be_typed(monkeypatch):
    monkeypatch.setattr(sys, "argv", [str(ROOT / "empssl.py"), "--data-dir", "my photos"])
    assert io.provenance("cpu")["command"] == "python empssl.py --data-dir 'my photos'"


def test_a_full_disk_is_one_sentence_and_leaves_the_last_encoder(monkeypatch, capsys):
    saves, fsync = [], io.os.fsync

    def full(fd):
        saves.append(fd)
        if len(saves) == 5:                                         # file and folder of config and encoder, then this
            raise OSError(errno.ENOSPC, "No space left on device", "encoder.pt")
        fsync(fd)
    monkeypatch.setattr(io.os, "fsync", full)
    with pytest.raises(SystemExit) as stop:
        main([*SHAPES, "--epochs", "2", "--name", "demo"])
    assert stop.value.code == 2 and "disk is full" in capsys.readouterr().err
    assert sorted(p.name for p in (io.RUNS / "demo").iterdir()) == [".lock", "config.json", "encoder.pt", "metrics.jsonl"]
    io.load_checkpoint(io.RUNS / "demo" / "encoder.pt")


def test_a_gpu_out_of_memory_names_the_flags(monkeypatch, capsys):
    def out_of_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 9 GiB")
    monkeypatch.setattr(empssl, "train", out_of_memory)
    with pytest.raises(SystemExit) as stop:
        main([*SHAPES, "--name", "demo"])
    assert stop.value.code == 2 and "--patches" in capsys.readouterr().err


def test_generator_hashes_all_of_its_arguments():
    draws = [torch.rand(1, generator=empssl.generator(*key)).item() for key in
             [(0, "order", 0), (1, "order", 0), (0, "patches", 0), (0, "order", 1), (2 ** 32, "order", 0)]]
    assert len(set(draws)) == len(draws)
    assert draws[0] == torch.rand(1, generator=empssl.generator(0, "order", 0)).item()

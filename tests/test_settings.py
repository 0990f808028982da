"""What a run is told: presets, flags, ranges, sizes."""

import dataclasses
import json
import os

import pytest
import torch

import empssl
from empssl import main
from empssl_support.cli import UsageError
from empssl_support.files import save_encoder
from empssl_support.settings import pick_precision, read_settings, sides_of_patches
from recipes import SHAPES, TINY, plain_folder, small_encoder

pytestmark = pytest.mark.usefixtures("in_tmp", "short_runs")


def settings(*arguments):
    return read_settings(empssl.Config, empssl.PRESETS, ["--device", "cpu", *arguments], "")


def test_the_defaults_are_the_papers():
    paper = settings("--preset", "paper")
    expected = {"patches": 20, "batch": 100, "lr": 0.3, "lam": 200.0, "eps2": 0.2, "epochs": 1}
    expected |= {"backbone": "resnet18", "hidden": 4096, "projector": 4096, "dim": 1024}
    expected |= {"augmentation": "paper", "optimizer": "lars", "eta": 0.005, "weight_decay": 1e-4}
    expected |= {"eval_patches": 16, "eval_augmentation": "grid"}
    assert {name: getattr(paper, name) for name in expected} == expected
    ours = dataclasses.asdict(paper) | {"preset": "auto", "device": "auto", "precision": "auto"}
    assert ours == dataclasses.asdict(empssl.Config())


def test_a_preset_is_defaults_that_any_flag_overrides():
    auto = settings("--lr", "1", "--hidden", "77")
    assert (auto.preset, auto.lr, auto.hidden) == ("laptop", 1, 77)
    assert (auto.backbone, auto.patch_size, auto.batch, auto.lam) == ("small", 16, 50, 100)
    # A flag that happens to be the paper's default still counts before the preset.
    assert settings("--preset", "laptop", "--patches", "20").patches == 20
    assert settings("--preset", "laptop", "--no-drop-last-stage").drop_last_stage is False


def test_the_last_size_of_a_schedule_is_probed_unless_a_size_is_given():
    assert settings("--size-schedule", "8:0.5,16:0.5").patch_size == 16
    assert settings("--size-schedule", "16:0.5,8:0.5").patch_size == 8
    assert settings("--size-schedule", "16:0.5,8:0.5", "--patch-size", "12").patch_size == 12


@pytest.mark.parametrize("total", [1, 2, 7, 10, 1000])
def test_every_step_has_a_side(total):
    sides = sides_of_patches(settings("--size-schedule", "8:0.1,12:0.2,16:0.7"), total)
    assert len(sides) == total and sides == sorted(sides)
    assert abs(sides.count(16) - 0.7 * total) <= 1
    assert sides_of_patches(settings("--patch-size", "9"), 3) == [9, 9, 9]


@pytest.mark.parametrize("shares", ["16:0.333333,32:0.6666665", "16:0.333333,32:0.6666675"])
def test_every_step_of_a_long_run_has_a_side_where_shares_are_rounded(shares):
    sides = sides_of_patches(settings("--size-schedule", shares), 1_500_000)
    assert len(sides) == 1_500_000 and sides[-1] == 32


@pytest.mark.parametrize(
    "found,precision",
    [
        ({"avx512_bf16": True}, "bf16"),
        ({"amx_bf16": True}, "bf16"),
        ({"avx512_f": True}, "float32"),
    ],
)
def test_auto_is_bf16_where_the_processor_multiplies_it(monkeypatch, found, precision):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found, raising=False)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert settings().precision == precision
    for asked in ("bf16", "float32"):
        assert settings("--precision", asked).precision == asked
    assert pick_precision("auto", "cuda:1") == "bf16"
    assert pick_precision("auto", "mps") == "float32"
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    assert pick_precision("auto", "cuda:1") == "float32"


def test_auto_is_float32_on_a_cpu_that_an_old_pytorch_says_nothing_of(monkeypatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert pick_precision("auto", "cpu") == "float32"


@pytest.mark.parametrize(
    "dataset,size,side",
    [("tinyimagenet", 64, 32), ("imagefolder", 300, 224), ("imagefolder", 40, 40)],
)
def test_patches_are_of_the_images_side_but_tiny_imagenets(dataset, size, side, in_tmp):
    for part in ("train", "val"):
        plain_folder(in_tmp / "set" / part / "images", 10, size)
    (in_tmp / "set" / "val" / "val_annotations.txt").write_text("00.png\timages\n")
    flags = ["--preset", "paper", "--batch", "10", "--dataset", dataset, "--data-dir", "set"]
    config = settings(*flags)
    empssl.load_data(config)
    assert config.patch_size == side


MISTAKES = [
    ("--dataset mnist", "mnist"),
    ("--dataset imagefolder --data-dir nowhere", "There is no folder nowhere"),
    ("--dataset imagefolder --data-dir empty", "no images in empty"),
    ("--batch 61", "--batch 61 is larger"),
    ("--patch-size 33", "--patch-size 33"),
    ("--patch-size 0", "--patch-size is 0; it must be at least 1"),
    ("--patches 1", "--patches is 1"),
    ("--epochs 0", "--epochs is 0"),
    ("--eval-patches 5", "--eval-patches 5 makes no even grid"),
    ("--lr -1", "--lr is -1"),
    ("--lr 0", "--lr is 0.0; it must be more than 0"),
    ("--lr nan", "--lr is nan"),
    ("--lam inf", "--lam is inf"),
    ("--subset 0", "--subset is 0"),
    ("--image-size 64", "--image-size"),
    ("--seed x", "--seed"),
    ("--seed 9223372036854775808", "2^63"),
    ("--device quantum", "--device quantum"),
    ("--name ../up", "--name"),
    ("--checkpoint x.pt", "--eval-only"),
    ("--eval-only --checkpoint nowhere.pt", "There is no checkpoint nowhere.pt"),
    ("--eval-only --checkpoint text.pt", "text.pt is no encoder"),
    ("--eval-only --checkpoint foreign.pt", "foreign.pt is no encoder"),
    ("--eval-only --checkpoint code.pt", "code.pt is no encoder"),
    ("--eval-only --checkpoint good.pt --backbone resnet18", "another architecture"),
    ("--eval-only --checkpoint odd.pt", "another architecture"),
    ("--export-features no/such/folder/f.npz", "--export-features"),
    ("--export-features f.txt", "ends otherwise than in .npz or .csv"),
    ("--export e.onnx --checkpoint good.pt", "ends otherwise than in .pt2"),
    ("--export e.pt2", "--export needs an encoder"),
    ("--export e.pt2 --checkpoint foreign.pt", "foreign.pt is no encoder"),
    ("--nearest q.png", "--nearest needs an encoder"),
    ("--nearest q.png --checkpoint good.pt", "--dataset is shapes"),
    ("--plan --eval-only", "--plan is of a training"),
    ("--plan --batch 61", "--batch 61 is larger"),
    ("--plan --subset 81", "between 1 and the 80"),
    ("--plan --patches 1", "--patches is 1"),
    ("--plan --dataset cifar10 --image-size 64", "--image-size"),
    ("--plan --dataset imagefolder --data-dir empty", "no images in empty"),
    ("--size-schedule 16:0.5,8", "sides and shares"),
    ("--size-schedule 16:0.5,8:0.4", "sum to 1"),
    ("--size-schedule 16:0.5,64:0.5", "larger than the 32x32 images"),
    ("--size-schedule 0:0.5,16:0.5", "between 1 and"),
    ("--probe-epochs 1,x", "list of epochs"),
    ("--epochs 2 --probe-epochs 1,3", "asks for epoch 3, and the run has 2"),
    ("--eta -1", "--eta is -1"),
    ("--report runs/nothing", "runs/nothing is no run's folder"),
]


class Exploding:
    def __reduce__(self):
        return (exec, ("raise SystemExit('code from the checkpoint was run')",))


@pytest.mark.parametrize("arguments,sentence", MISTAKES)
def test_a_mistake_is_one_sentence_and_writes_nothing(arguments, sentence, in_tmp, capsys):
    (in_tmp / "empty").mkdir()
    (in_tmp / "text.pt").write_text("hello")
    torch.save({"state_dict": {}}, "foreign.pt")
    torch.save({"architecture": print, "weights": Exploding()}, "code.pt")
    save_encoder(in_tmp / "good.pt", small_encoder())
    good = torch.load("good.pt", weights_only=True)
    other = empssl.Encoder("small", 16, hidden=4, projector=4, dim=8)
    torch.save(good | {"weights": other.state_dict()}, "odd.pt")
    with pytest.raises(SystemExit) as stop:
        main([*SHAPES, *arguments.split()])
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and sentence in error and "Traceback" not in error
    assert not os.path.exists("runs") or not [p for p in os.listdir("runs") if p[0] != "."]


def test_a_folder_has_the_size_that_its_encoder_was_trained_at(in_tmp):
    encoder = small_encoder()
    encoder.image_size = 40
    save_encoder(in_tmp / "good.pt", encoder)
    with_it = ["--eval-only", "--checkpoint", "good.pt"]
    assert settings("--dataset", "imagefolder", *with_it).image_size == 40
    assert settings("--dataset", "imagefolder", *with_it, "--image-size", "50").image_size == 50
    assert settings("--dataset", "shapes", *with_it).image_size is None
    searched = settings("--nearest", "q.png", "--checkpoint", "good.pt")
    assert (searched.dataset, searched.image_size) == ("imagefolder", 40)


# ---- a run that goes on ----


@pytest.fixture
def begun(in_tmp):
    """The settings of a run that was begun, in `runs/demo`."""
    folder = in_tmp / "runs" / "demo"
    folder.mkdir(parents=True)
    config = settings("--preset", "laptop", "--epochs", "7", "--patch-size", "12")
    (folder / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    return config


def test_a_run_goes_on_with_its_own_settings(begun):
    resumed = settings("--resume", "runs/demo")
    assert dataclasses.asdict(resumed) == dataclasses.asdict(begun) | {"resume": "runs/demo"}


def test_what_may_change_when_a_run_goes_on(begun):
    changed = {"data_dir": "elsewhere", "save_every": 1.5, "export_features": "own.npz"}
    words = "--data-dir elsewhere --save-every 1.5 --export-features own.npz"
    resumed = settings("--resume", "runs/demo", *words.split())
    expected = dataclasses.asdict(begun) | changed | {"resume": "runs/demo"}
    assert dataclasses.asdict(resumed) == expected


@pytest.mark.parametrize("flag", ["--epochs 7", "--name other", "--force", "--precision bf16"])
def test_what_may_not_change_when_a_run_goes_on(flag, begun):
    with pytest.raises(UsageError, match=f"leave {flag.split()[0]} out"):
        settings("--resume", "runs/demo", *flag.split())


@pytest.mark.parametrize(
    "stored,sentence",
    [
        ({"method": "simclr", "lr": 0.1}, "begun by another program"),
        ({"lr": 0.1}, "no run to go on with in runs/demo"),
        ([], "no run to go on with in runs/demo"),
        (None, "no run to go on with in runs/demo"),
    ],
)
def test_what_is_no_run_of_this_program(stored, sentence, begun, in_tmp):
    (in_tmp / "runs" / "demo" / "config.json").write_text(json.dumps(stored))
    with pytest.raises(UsageError, match=sentence):
        settings("--resume", "runs/demo")


# ---- folders ----


def test_a_run_is_not_overwritten(in_tmp, capsys):
    main([*SHAPES, "--name", "demo"])
    before = (in_tmp / "runs" / "demo" / "encoder.pt").read_bytes()
    with pytest.raises(SystemExit) as stop:
        main([*SHAPES, "--name", "demo", "--seed", "1"])
    assert stop.value.code == 2 and "demo holds a run already" in capsys.readouterr().err
    assert (in_tmp / "runs" / "demo" / "encoder.pt").read_bytes() == before


def test_force_does_not_delete_the_encoder_that_is_to_be_probed(in_tmp, capsys):
    run = in_tmp / "runs" / "demo"
    run.mkdir(parents=True)
    save_encoder(run / "encoder.pt", small_encoder())
    arguments = ["--eval-only", "--checkpoint", "runs/demo/encoder.pt", "--name", "demo", "--force"]
    with pytest.raises(SystemExit) as stop:
        main([*SHAPES, *arguments])
    assert stop.value.code == 2
    assert "--force would delete runs/demo/encoder.pt" in capsys.readouterr().err
    assert (run / "encoder.pt").exists()


def test_all_settings_are_kept_with_the_run(in_tmp):
    main([*SHAPES, "--name", "demo", "--lam", "7"])
    stored = json.loads((in_tmp / "runs" / "demo" / "config.json").read_text())
    names = {field.name for field in dataclasses.fields(empssl.Config)}
    assert names <= stored.keys() and stored["lam"] == 7 and stored["patch_size"] == 16
    assert stored["images"] == 60 and {"command", "commit", "versions", "hardware"} <= stored.keys()


def test_the_first_lines_say_what_is_to_come(capsys):
    main([*SHAPES, "--epochs", "4", "--name", "demo"])
    said = capsys.readouterr().out
    assert "preset laptop on cpu, float32: 60 images of 32x32" in said
    assert "12 steps, 720 patches of 16x16 in all" in said
    assert "extract_patches: " in said and "logdet_spd: " in said
    assert "written to runs/demo\n" in said


def test_ops_says_which_implementation_and_stops(in_tmp, capsys):
    assert main(["--ops", *TINY]) == {}
    assert [line.split(":")[0] for line in capsys.readouterr().out.splitlines()] == [
        "extract_patches",
        "logdet_spd",
    ]
    assert not (in_tmp / "runs").exists()

"""What other programs read: features as a table, the encoder as a program of PyTorch's and ONNX."""

import copy
import csv
import re
from pathlib import Path

import numpy as np
import pytest
import torch

import empssl
from empssl import main
from empssl_support.export import write_program
from empssl_support.files import save_encoder
from recipes import SHAPES, TINY, plain_folder, small_encoder

PAGE = Path(__file__).parent.parent / "docs" / "running.md"
whole_runs = pytest.mark.usefixtures("in_tmp", "short_runs")


def table(path):
    with open(path, newline="") as file:
        head, *rows = csv.reader(file)
    return head, rows


def trained_encoder(backbone="small", s=16):
    """With the BatchNorm statistics of a batch, laid out as `empssl.load` does."""
    encoder = empssl.Encoder(backbone, s, hidden=16, projector=16, dim=8)
    for layer in encoder.modules():
        layer.momentum = 1.0
    encoder(torch.randn(64, 3, s, s))
    return encoder.to(memory_format=torch.channels_last).eval()


# ---- features ----


@whole_runs
def test_a_table_has_the_features_of_the_arrays():
    main([*SHAPES, "--name", "demo", "--export-features", "own.csv"])
    again = "--eval-only --checkpoint runs/demo/encoder.pt --export-features own.npz".split()
    main([*SHAPES, "--name", "again", *again])
    head, rows = table("own.csv")
    own, data = np.load("own.npz"), empssl.load_dataset("shapes", subset=60)
    assert head == ["file", "label", "split", *(f"f{k}" for k in range(16))]
    assert [row[2] for row in rows] == ["train"] * 60 + ["test"] * 40
    features = np.array([row[3:] for row in rows], np.float32)
    expected = np.concatenate([own["train_features"], own["test_features"]])
    assert np.array_equal(features, expected)  # to the last bit
    labels = [*data.train_labels.tolist(), *data.test_labels.tolist()]
    assert [row[1] for row in rows] == [data.classes[label] for label in labels]
    assert {row[0] for row in rows} == {""}


@whole_runs
def test_rows_of_a_folder_have_their_files(in_tmp):
    for part, count in (("train", 30), ("test", 5)):
        for name in ("cat", "dog"):
            plain_folder(in_tmp / "set" / part / name, count)
    folder = ["--dataset", "imagefolder", "--data-dir", "set", *TINY]
    main([*folder, "--name", "set", "--export-features", "own.csv"])
    _, rows = table("own.csv")
    for file, label, split, *features in rows:
        assert file.startswith(f"set/{split}/{label}/") and len(features) == 16
    assert len(rows) == 70 and rows[0][0] == "set/train/cat/00.png"

    plain_folder(in_tmp / "plain", 30)
    plain = ["--dataset", "imagefolder", "--data-dir", "plain", *TINY]
    wanted = ["--checkpoint", "runs/set/encoder.pt", "--export-features", "plain.CSV"]
    assert main([*plain, *wanted]) == {}
    _, rows = table("plain.CSV")
    assert [row[:3] for row in rows[:2]] == [[f"plain/{i:02}.png", "", "train"] for i in (0, 1)]
    h = empssl.load("runs/set/encoder.pt").features([row[0] for row in rows])
    mine = empssl.embed(
        empssl.load("runs/set/encoder.pt"),
        empssl.load_dataset("imagefolder", "plain").train_images,
        4,
    )
    np.testing.assert_allclose(np.array([row[3:] for row in rows], float), mine, atol=1e-5)
    assert h.shape == mine.shape


# ---- the encoder ----


@pytest.mark.parametrize("backbone,s", [("small", 16), ("resnet18", 20)])
def test_the_program_gives_the_encoders_representation(backbone, s, in_tmp, recwarn):
    encoder = trained_encoder(backbone, s)
    save_encoder(in_tmp / "encoder.pt", encoder)
    main(["--export", "e.pt2", "--checkpoint", "encoder.pt"])
    assert not [w for w in recwarn if "tensor" in str(w.message)]
    program = torch.export.load("e.pt2").module()
    exact_encoder = copy.deepcopy(encoder).double()
    exact_program = torch.export.load("e.pt2").module().double()
    whole = [torch.randint(0, 256, (P, 3, s, s), dtype=torch.uint8) for P in (1, 7)]
    between = torch.rand(3, 3, s, s) * 255  # as resized patches are
    with torch.no_grad():
        for patches in (*whole, between):
            expected = exact_encoder.representation(patches.double() / 127.5 - 1)
            found = exact_program(patches.double())
            torch.testing.assert_close(found, expected, atol=1e-12, rtol=1e-12)
            # In float32 both are 1e-5 off that, each by another way of summing.
            for x in (patches, patches.float()):
                torch.testing.assert_close(program(x).double(), expected, atol=5e-5, rtol=5e-5)
        assert expected.std() > 0.1
    assert sorted(path.name for path in in_tmp.iterdir()) == ["e.pt2", "encoder.pt"]


def test_the_pages_lines_make_it_onnx(in_tmp):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    from onnx.reference import ReferenceEvaluator

    encoder = trained_encoder()
    write_program(Path("encoder.pt2"), encoder)
    (lines,) = re.findall(r"^```python\n([^`]*onnx[^`]*)^```", PAGE.read_text(), re.S | re.M)
    assert len(lines.splitlines()) == 3
    exec(lines)
    network = ReferenceEvaluator("encoder.onnx")
    for P in (1, 7):
        patches = torch.rand(P, 3, 16, 16) * 255
        (features,) = network.run(None, {"patches": patches.numpy()})
        with torch.no_grad():
            expected = encoder.representation(patches / 127.5 - 1)
        np.testing.assert_allclose(features, expected, atol=1e-4)


def test_an_encoder_that_cannot_be_written_leaves_nothing(in_tmp, monkeypatch, capsys):
    save_encoder(in_tmp / "encoder.pt", small_encoder())

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(SystemExit) as stop:
        main(["--export", "e.pt2", "--checkpoint", "encoder.pt"])
    assert stop.value.code == 2 and "disk is full" in capsys.readouterr().err
    assert [path.name for path in in_tmp.iterdir()] == ["encoder.pt"]

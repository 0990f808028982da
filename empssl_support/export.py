"""What other programs read: features as a table, the encoder as a program of PyTorch's."""

import io
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn

from empssl_support.cli import progress
from empssl_support.data import Dataset
from empssl_support.files import write_features, write_table, write_whole


def write_splits(path: Path, train_h: Tensor, test_h: Tensor | None, data: Dataset) -> None:
    """Features `(N, hidden)` of both splits, as `.csv` or, by any other ending, as `.npz`."""
    if path.suffix.lower() == ".csv":
        write_csv(path, train_h, test_h, data)
        return
    write_features(
        path,
        train_features=train_h,
        train_labels=data.train_labels,
        test_features=test_h,
        test_labels=data.test_labels,
        files=data.files,
        test_files=data.test_files,
        classes=data.classes or None,
    )


def write_csv(path: Path, train_h: Tensor, test_h: Tensor | None, data: Dataset) -> None:
    """A row an image: file, label, split, then the features; what there is none of is empty."""
    rows = rows_of_split("train", train_h, data.train_labels, data.files, data.classes)
    if test_h is not None:
        test = rows_of_split("test", test_h, data.test_labels, data.test_files, data.classes)
        rows = chain(rows, test)
    header = ["file", "label", "split", *(f"f{k}" for k in range(train_h.shape[1]))]
    write_table(path, header, progress(rows, desc="writing", unit="image", leave=False))


def rows_of_split(
    split: str, h: Tensor, labels: Tensor | None, files: list[str] | None, classes: list[str]
):
    for j, features in enumerate(h.cpu()):
        label = "" if labels is None else labels[j].item()
        name = classes[label] if classes and label != "" else label
        # Nine digits name a float32 exactly.
        numbers = [f"{value:.9g}" for value in features.tolist()]
        yield [files[j] if files else "", name, split, *numbers]


class Representation(nn.Module):
    """Patches `(P, 3, s, s)` with values 0 to 255, uint8 or float32 -> features `(P, hidden)`."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        # What `encoder.representation` applies; the projector stays behind.
        self.backbone = encoder.backbone
        self.represent = encoder.represent

    def forward(self, patches: Tensor) -> Tensor:
        return self.represent(self.backbone(patches / 127.5 - 1))


@torch.no_grad()
def write_program(path: Path, encoder: nn.Module) -> None:
    """The encoder's representation for `torch.export.load`, of any number of patches at once.

    The encoder's weights become contiguous, as that format wants them.
    """
    s = encoder.architecture["patch_size"]
    example = torch.zeros(2, 3, s, s)
    any_number = ({0: torch.export.Dim("patches", min=1)},)
    module = Representation(encoder).eval().to("cpu", memory_format=torch.contiguous_format)
    program = torch.export.export(module, (example,), dynamic_shapes=any_number)
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    write_whole(path, lambda out: out.write(buffer.getbuffer()))

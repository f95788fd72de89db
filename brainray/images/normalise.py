"""From resized uint8 pixels to the network's input, a batch at a time, on its device.

Apart from what decodes and resizes, because torch takes seconds to import and hundreds of
megabytes, which no process that only decodes needs.
"""

import torch

from brainray.images.preprocess import Preprocessing


def scale_to_unit(images: torch.Tensor) -> torch.Tensor:
    """Turn grey uint8 images (N, H, W) into float32 grey values (N, 1, H, W) in [0, 1]."""
    return images.unsqueeze(1).float().div_(255)


def standardise(images: torch.Tensor, preprocessing: Preprocessing) -> torch.Tensor:
    """Turn grey values in [0, 1] into network input: ``(images - mean) / std``.

    Parameters
    ----------
    images : Tensor of float32, shape (N, 1, H, W)

    Returns
    -------
    Tensor of float32, shape (N, 1, H, W)
    """
    return images.sub(preprocessing.mean).div_(preprocessing.std)


def normalise_images(images: torch.Tensor, preprocessing: Preprocessing) -> torch.Tensor:
    """Turn a batch of grey uint8 images into float network input, on their device.

    Parameters
    ----------
    images : Tensor of uint8, shape (N, H, W)

    Returns
    -------
    Tensor of float32, shape (N, 1, H, W)
        ``(images / 255 - mean) / std``.
    """
    return standardise(scale_to_unit(images), preprocessing)

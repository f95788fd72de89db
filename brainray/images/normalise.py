"""From resized uint8 pixels to the network's input, a batch at a time, on its device.

Apart from what decodes and resizes, because torch takes seconds to import and hundreds of
megabytes, which no process that only decodes needs.
"""

import torch

from brainray.images.preprocess import Preprocessing


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
    scale = 1.0 / (255.0 * preprocessing.std)
    offset = preprocessing.mean / preprocessing.std
    return images.unsqueeze(1).float().mul_(scale).sub_(offset)

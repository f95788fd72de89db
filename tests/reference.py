"""The reference for engines: eager PyTorch in fp32, without fused layers."""

import numpy as np
import torch
from numpy.typing import NDArray

from brainray.model.calibration import Outputs
from brainray.model.classifier import Classifier
from brainray.model.network import normalise_images, pool_stages, split_head


@torch.inference_mode()
def compute_eager(classifier: Classifier, images: NDArray[np.uint8]) -> Outputs:
    """Return logits and pooled features."""
    pixels = torch.from_numpy(np.require(images, requirements=["C", "W"]))
    trunk, head = split_head(classifier.build_network())
    _, pooled = pool_stages(trunk, normalise_images(pixels, classifier.preprocessing))
    return Outputs(head[-1](pooled[-1]).numpy(), torch.cat(pooled, 1).numpy())


def predict_eager(classifier: Classifier, images: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Return calibrated probabilities."""
    return classifier.calibration.calibrate(compute_eager(classifier, images).logits)

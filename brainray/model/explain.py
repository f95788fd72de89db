"""Class activation maps: the evidence for each class at each position of a scan.

ResNet's head averages the last features over their cells and multiplies the mean by its weights.
Both operations are linear, so the order can be exchanged: multiply each cell first, then average.
The products are the class activation map. No gradient is needed.

The last features have one cell for every 32 pixels. For a finer map, the last two stages are
computed again without their strides and with dilated kernels, so that each cell has the same inputs
and weights as before [1]_. That gives one cell for every 8 pixels. Every fourth cell along each
axis is one of the network's own cells, and the mean over these is the class's logit. A cell's
receptive field is much larger than 8 pixels: the map shows where evidence was found, not what it
was.

References
----------
.. [1] The algorithme à trous: Chen et al., DeepLab, IEEE TPAMI 40, 2018, section 3.1.
"""

import numpy as np
from numpy.typing import NDArray

from brainray.model.resnet50 import DENSITY

STRIDE_PX = 32 // DENSITY
"""Input pixels between neighbouring cells of the dense features. Cell i is centred on pixel
``i * STRIDE_PX``, because every layer that halves the size keeps the first pixel."""


def count_cells(size_px: int) -> int:
    """Return the side of the dense features, in cells, for a side of the input in pixels."""
    return -(-size_px // STRIDE_PX)


def compute_class_maps(
    features: NDArray[np.float32], weight: NDArray[np.float32], bias: NDArray[np.float32]
) -> NDArray[np.float32]:
    """Compute the class activation maps [1]_, shape (N, K, h, w), of dense features, (N, C, h, w).

    ``weight``, (K, C), and ``bias``, (K,), are the head's; the bias is added to every cell. The
    mean over ``[..., ::DENSITY, ::DENSITY]`` is the logit.

    References
    ----------
    .. [1] Zhou et al., Learning Deep Features for Discriminative Localization, CVPR 2016.
    """
    count, channels, height, width = features.shape
    cells = features.reshape(count, channels, height * width)
    maps: NDArray[np.float32] = weight @ cells + bias[:, None]
    return maps.reshape(count, len(weight), height, width)

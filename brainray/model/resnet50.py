"""The architecture of ResNet-50, as numbers [1]_: for what opens or builds it without torch.

References
----------
.. [1] He et al., Deep Residual Learning, CVPR 2016; version 1.5 and names as torchvision has them.
"""

import math
from dataclasses import dataclass

BATCH_NORM_EPSILON = 1e-5
STEM_CHANNELS = 64
EXPANSION = 4
"""Channels that a block gives, for each that it computes with."""


@dataclass(frozen=True, slots=True)
class Stage:
    """Blocks of one width; the first of them has the stage's stride and a shortcut of its own."""

    name: str
    num_blocks: int
    width: int
    stride: int


STAGES = (
    Stage("layer1", 3, 64, 1),
    Stage("layer2", 4, 128, 2),
    Stage("layer3", 6, 256, 2),
    Stage("layer4", 3, 512, 2),
)
NUM_DENSE_STAGES = 2
"""Last stages that class maps are computed without the stride of, see
:mod:`brainray.model.explain`."""
DENSITY = 4
"""Cells of the dense features along each axis, for each cell of the network's own."""
assert math.prod(stage.stride for stage in STAGES[-NUM_DENSE_STAGES:]) == DENSITY
NUM_FEATURES = EXPANSION * STAGES[-1].width
"""Width of the pooled features below the head."""


def list_shapes(num_classes: int) -> dict[str, tuple[int, ...]]:
    """Return the shape of each weight by its name, for grey images; no counters of batches."""
    shapes: dict[str, tuple[int, ...]] = {}

    def add_layer(conv: str, norm: str, inputs: int, outputs: int, side: int) -> None:
        shapes[f"{conv}.weight"] = (outputs, inputs, side, side)
        for part in ("weight", "bias", "running_mean", "running_var"):
            shapes[f"{norm}.{part}"] = (outputs,)

    add_layer("conv1", "bn1", 1, STEM_CHANNELS, 7)
    inputs = STEM_CHANNELS
    for stage in STAGES:
        outputs = EXPANSION * stage.width
        for number in range(stage.num_blocks):
            name = f"{stage.name}.{number}"
            add_layer(f"{name}.conv1", f"{name}.bn1", inputs, stage.width, 1)
            add_layer(f"{name}.conv2", f"{name}.bn2", stage.width, stage.width, 3)
            add_layer(f"{name}.conv3", f"{name}.bn3", stage.width, outputs, 1)
            if number == 0:
                add_layer(f"{name}.downsample.0", f"{name}.downsample.1", inputs, outputs, 1)
            inputs = outputs
    return shapes | {"fc.weight": (num_classes, NUM_FEATURES), "fc.bias": (num_classes,)}

"""The torch engine for GPUs, and CPUs on request."""

import copy
import itertools
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from brainray.inference.engine import Engine, EngineOptions
from brainray.model.calibration import Outputs
from brainray.model.classifier import Classifier
from brainray.model.network import normalise_images, pool_stages, split_head
from brainray.model.precision import Precision
from brainray.model.resnet50 import NUM_DENSE_STAGES

BATCH_SIZE = {"cpu": 32, "cuda": 256}
"""Images per batch; bounds the memory of a call."""


class TorchEngine(Engine):
    """Eager torch, with batch normalisation fused into the convolutions."""

    backend = "torch"

    def __init__(
        self, classifier: Classifier, precision: Precision, options: EngineOptions
    ) -> None:
        super().__init__(
            classifier.classes,
            classifier.preprocessing,
            classifier.calibration,
            classifier.weights["fc.weight"],
            classifier.weights["fc.bias"],
        )
        self.precision = precision
        self._device = torch.device("cuda" if options.use_gpu else "cpu")
        if options.num_threads is not None:
            torch.set_num_threads(options.num_threads)  # one pool for the whole process
        self._dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        network = fuse_batch_norm(classifier.build_network())
        network.to(self._device, self._dtype).to(memory_format=torch.channels_last)
        self._trunk, head = split_head(network)
        # In bf16, logits between 8 and 16 are multiples of 1/16. The head is too small to need it.
        self._layer = head[-1].float()
        if options.use_gpu:
            where = torch.cuda.get_device_name(self._device)
            # By default cuDNN computes fp32 convolutions in TF32, with 10 bits of mantissa.
            torch.backends.cudnn.conv.fp32_precision = "ieee"  # type: ignore[attr-defined]
        else:
            threads = torch.get_num_threads()
            where = f"{threads} thread{'s' * (threads > 1)}"
        self.description = f"torch {torch.__version__.split('+')[0]}, {precision}, {where}"

    @torch.inference_mode()
    def _compute_outputs(self, images: NDArray[np.uint8]) -> Outputs:
        pixels = torch.from_numpy(np.require(images, requirements=["C", "W"]))
        batches = [self._run(batch) for batch in pixels.split(BATCH_SIZE[self._device.type])]
        logits, features = (torch.cat(parts).cpu().numpy() for parts in zip(*batches, strict=True))
        return Outputs(logits, features)

    @torch.inference_mode()
    def _compute_features(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        pixels = torch.from_numpy(np.require(images, requirements=["C", "W"]))
        features: torch.Tensor = self._dense_trunk(self._prepare(pixels))
        return features.float().contiguous().cpu().numpy()

    @cached_property
    def _dense_trunk(self) -> nn.Sequential:
        return make_dense(self._trunk)

    def _run(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the logits and the pooled features."""
        _, pooled = pool_stages(self._trunk, self._prepare(pixels))
        return self._layer(pooled[-1]), torch.cat(pooled, 1)

    def _prepare(self, pixels: torch.Tensor) -> torch.Tensor:
        if self._device.type == "cuda":
            pixels = pixels.pin_memory().to(self._device, non_blocking=True)
        return normalise_images(pixels, self._preprocessing).to(
            dtype=self._dtype, memory_format=torch.channels_last
        )


def make_dense(trunk: nn.Sequential) -> nn.Sequential:
    """Return a copy without strides in the last stages, see :mod:`brainray.model.explain`."""
    dense, dilation = copy.deepcopy(trunk), 1
    for stage in list(dense)[-NUM_DENSE_STAGES:]:
        for number, block in enumerate(stage.children()):
            parts = dict(block.named_modules())
            conv = parts["conv2"]
            assert isinstance(conv, nn.Conv2d)
            stride = conv.stride[0]
            conv.dilation = conv.padding = (dilation, dilation)
            for strided in (conv, parts.get("downsample.0")):
                if isinstance(strided, nn.Conv2d):
                    strided.stride = (1, 1)
            if number == 0:
                dilation *= stride  # keeps the receptive field of the following blocks
    return dense


def fuse_batch_norm(network: nn.Module) -> nn.Module:
    """Return a copy with each batch normalisation fused into the convolution before it."""
    fused = copy.deepcopy(network).eval()
    for parent in list(fused.modules()):
        for (name, conv), (norm_name, norm) in itertools.pairwise(list(parent.named_children())):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(parent, name, fuse_conv_bn_eval(conv, norm))
                setattr(parent, norm_name, nn.Identity())
    return fused

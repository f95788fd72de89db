"""The torch engine for GPUs, and CPUs on request."""

import copy
import itertools
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torchvision.models import resnet50

from brainray.inference.engine import Engine, EngineOptions
from brainray.model.calibration import Outputs
from brainray.model.classifier import Classifier
from brainray.model.network import normalise_images, pool_stages, split_head
from brainray.model.precision import Precision

BATCH_SIZE = {"cpu": 32, "cuda": 256}
"""Images per batch; bounds the memory of a call."""


class TorchEngine(Engine):
    """Eager torch, with batch normalisation fused into the convolutions."""

    backend = "torch"

    def __init__(
        self, classifier: Classifier, precision: Precision, options: EngineOptions
    ) -> None:
        super().__init__(classifier)
        self.precision = precision
        self._device = torch.device("cuda" if options.use_gpu else "cpu")
        if options.num_threads is not None:
            torch.set_num_threads(options.num_threads)  # one pool for the whole process
        self._dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        network = _fuse_batch_norm(classifier.build_network())
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
        logits, features = [], []
        for start in range(0, len(images), BATCH_SIZE[self._device.type]):
            batch = images[start : start + BATCH_SIZE[self._device.type]]
            _, pooled = pool_stages(self._trunk, self._prepare(batch))
            logits.append(self._layer(pooled[-1]))
            features.append(torch.cat(pooled, 1))
        return Outputs(torch.cat(logits).cpu().numpy(), torch.cat(features).cpu().numpy())

    @torch.inference_mode()
    def _compute_features(self, images: NDArray[np.uint8]) -> NDArray[np.float32]:
        features: torch.Tensor = self._dense_trunk(self._prepare(images))
        return features.float().contiguous().cpu().numpy()

    def _prepare(self, images: NDArray[np.uint8]) -> torch.Tensor:
        pixels = torch.from_numpy(np.require(images, requirements=["C", "W"]))
        if self._device.type == "cuda":
            pixels = pixels.pin_memory().to(self._device, non_blocking=True)
        return normalise_images(pixels, self._preprocessing).to(
            dtype=self._dtype, memory_format=torch.channels_last
        )

    @cached_property
    def _dense_trunk(self) -> nn.Sequential:
        """The trunk without strides in the last two stages, see :mod:`brainray.model.explain`."""
        with torch.device("meta"):  # no weights, only the numbers of each convolution
            pattern, _ = split_head(resnet50(replace_stride_with_dilation=[False, True, True]))
        dense = copy.deepcopy(self._trunk)
        for conv, dilated in zip(dense.modules(), pattern.modules(), strict=True):
            if isinstance(conv, nn.Conv2d) and isinstance(dilated, nn.Conv2d):
                conv.stride, conv.padding = dilated.stride, dilated.padding
                conv.dilation = dilated.dilation
        return dense


def _fuse_batch_norm(network: nn.Module) -> nn.Module:
    """Return a copy with each batch normalisation fused into the convolution before it."""
    fused = copy.deepcopy(network).eval()
    for parent in list(fused.modules()):
        for (name, conv), (norm_name, norm) in itertools.pairwise(list(parent.named_children())):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                setattr(parent, name, fuse_conv_bn_eval(conv, norm))
                setattr(parent, norm_name, nn.Identity())
    return fused

"""ResNet-50 with one grey input channel and K classes, and its initial weights."""

import io
import pickle
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import safetensors
import safetensors.torch
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torchvision.models import ResNet50_Weights, resnet50

from brainray.errors import StorageError, WeightsError
from brainray.images.preprocess import Preprocessing
from brainray.io import storage
from brainray.model.resnet50 import NUM_FEATURES

STAGE_WIDTHS = (512, 1024, NUM_FEATURES)
"""Output channels of layer2, layer3 and layer4."""

DOWNLOAD_TIMEOUT_S = 20.0
"""Seconds without data after which a download of weights fails."""

StateDict = dict[str, torch.Tensor]
BatchNormMode = Literal["local", "sync", "frozen"]

STAGES = ("stem", "layer1", "layer2", "layer3", "layer4", "fc")
"""Parts of the network from input to head, for learning rates by stage."""


def standardise(images: torch.Tensor, preprocessing: Preprocessing) -> torch.Tensor:
    """Return ``(images - mean) / std`` of grey values in [0, 1], shape (N, 1, H, W)."""
    return images.sub(preprocessing.mean).div_(preprocessing.std)


def normalise_images(images: torch.Tensor, preprocessing: Preprocessing) -> torch.Tensor:
    """Convert grey uint8 images, (N, H, W), to network input: float32, (N, 1, H, W)."""
    return standardise(images.unsqueeze(1).float().div_(255), preprocessing)


def build_network(
    num_classes: int,
    *,
    weights: StateDict | None = None,
    norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
) -> nn.Module:
    """Build a ResNet-50 for grey images, in training mode: (N, 1, H, W) to (N, num_classes).

    Parameters
    ----------
    weights : dict of Tensor, optional
        torchvision ResNet-50 weights with any number of input channels and classes. An RGB
        stem is summed over its input channels, which equals repeating a grey image three
        times; a head with another number of classes is initialised at random.
    norm_layer : callable
        Takes a number of channels, returns a normalisation layer; see
        :func:`choose_norm_layer`.

    Raises
    ------
    WeightsError
        The weights are not a ResNet-50's.

    References
    ----------
    .. [1] He et al., Deep Residual Learning, CVPR 2016; version 1.5 as torchvision has it.
    .. [2] Goyal et al., 2017, arXiv:1706.02677, section 5.1: the last scale of each
       residual branch starts at zero.
    """
    network: nn.Module = resnet50(
        num_classes=num_classes, zero_init_residual=True, norm_layer=norm_layer
    )
    stem = nn.Conv2d(1, 64, kernel_size=7, stride=2, padding=3, bias=False)
    nn.init.kaiming_normal_(stem.weight, mode="fan_out", nonlinearity="relu")
    network.conv1 = stem
    if weights is None:
        return network
    expected = network.state_dict()
    adapted = {name.removeprefix("module."): tensor for name, tensor in weights.items()}
    first = adapted.get("conv1.weight")
    if first is not None and first.ndim == 4 and first.shape[1] > 1:
        adapted["conv1.weight"] = first.sum(dim=1, keepdim=True)
    for name in ("fc.weight", "fc.bias"):
        if name not in adapted or adapted[name].shape != expected[name].shape:
            adapted[name] = expected[name]
    wrong = [
        name
        for name, tensor in expected.items()
        if not name.endswith("num_batches_tracked")
        and (name not in adapted or adapted[name].shape != tensor.shape)
    ]
    if wrong:
        raise WeightsError(
            f"Expected a torchvision ResNet-50 state dict, but {len(wrong)} of {len(expected)} "
            f"entries are missing or of another shape (first: '{wrong[0]}'). Give other weights."
        )
    network.load_state_dict({name: adapted.get(name, expected[name]) for name in expected})
    return network


def fetch_weights(
    weights: Literal["imagenet", "none"], weights_uri: str | None
) -> StateDict | None:
    """Load the initial weights of a run: a file's, else torchvision's, else None for random ones.

    The file is a local or remote .safetensors, .pth or .pt state dict; pickled code in it is not
    run. The hash of torchvision's IMAGENET1K_V2 is checked on download. There is no fallback.

    Raises
    ------
    WeightsError
        They cannot be downloaded or read; the message names the remedies.
    """
    if weights_uri is not None:
        return _read_weights(weights_uri)
    return _download_imagenet() if weights == "imagenet" else None


def _read_weights(uri: str) -> StateDict:
    try:
        content = storage.read_bytes(uri)
    except (FileNotFoundError, StorageError) as error:
        raise WeightsError(f"Cannot read the weights at '{uri}': {error}") from error
    try:
        if uri.endswith(".safetensors"):
            return safetensors.torch.load(content)
        loaded = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises several kinds for a file that is not its own
        raise WeightsError(
            f"'{uri}' is not a state dict that loads without running code "
            f"({_describe_error(error)}). Expected .safetensors, or .pth saved from "
            "model.state_dict()."
        ) from error
    state = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else loaded
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and torch.is_tensor(tensor) for name, tensor in state.items()
    ):
        raise WeightsError(f"'{uri}' is not a state dict of names and tensors.")
    return state


def _describe_error(error: Exception) -> str:
    """Return an error's first line, without torch's advice to load the pickle unsafely."""
    lines = str(error).splitlines()
    if isinstance(error, pickle.UnpicklingError) or not lines:
        return type(error).__name__
    return lines[0]


def imagenet_weights_path() -> Path:
    """Return the path of torchvision's ImageNet weights on this machine."""
    name: str = ResNet50_Weights.IMAGENET1K_V2.url.rpartition("/")[2]
    return Path(torch.hub.get_dir()) / "checkpoints" / name


def _download_imagenet() -> StateDict:
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT_S)
    try:
        state: StateDict = ResNet50_Weights.IMAGENET1K_V2.get_state_dict(
            progress=False, check_hash=True, weights_only=True, map_location="cpu"
        )
    except Exception as error:  # the network, the disk and a damaged file raise several kinds
        raise WeightsError(
            f"ImageNet weights are not available ({_describe_error(error)}). Put the file at "
            f"'{imagenet_weights_path()}', or pass --weights-uri FILE (.safetensors or .pth), "
            "or --weights none to start from random weights."
        ) from error
    finally:
        socket.setdefaulttimeout(before)
    return state


def stage_of(parameter_name: str) -> str:
    """Return the part of the network (one of :data:`STAGES`) that a parameter belongs to."""
    top = parameter_name.removeprefix("module.").split(".")[0]
    return top if top in STAGES else "stem"


def compute_features(network: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """Return the pooled features below the head, shape (N, 2048)."""
    trunk, head = split_head(network)
    features: torch.Tensor = head[:-1](trunk(images))
    return features


def split_head(network: nn.Module) -> tuple[nn.Sequential, nn.Sequential]:
    """Split into the part that computes the last features, (N, 2048, h, w), and the head.

    Both parts share the network's weights and hooks.
    """
    parts = dict(network.named_children())
    head = nn.Sequential(parts.pop("avgpool"), nn.Flatten(1), parts.pop("fc"))
    return nn.Sequential(*parts.values()), head


def round_weights(state: StateDict) -> StateDict:
    """Return weights as they are exported: those that are multiplied in bf16, the others in fp32.

    This halves the file. Inference in bf16 rounds the same numbers in the same way, so nothing is
    lost there.
    """
    return {
        name: tensor.bfloat16() if tensor.ndim > 1 else tensor for name, tensor in state.items()
    }


def pool_stages(
    trunk: nn.Sequential, images: torch.Tensor
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Run a network without its head, and average the output of each of the last stages.

    ``trunk`` is from :func:`split_head`; ``images`` have the shape (N, 1, H, W).

    Returns
    -------
    features : Tensor, shape (N, 2048, h, w)
    pooled : list of Tensor of float32
        Means over the cells, shapes (N, C) with C of :data:`STAGE_WIDTHS`; the last is the input
        of the head's linear layer.
    """
    pooled = []
    for number, part in enumerate(trunk, start=len(STAGE_WIDTHS) - len(trunk)):
        images = part(images)
        if number >= 0:
            pooled.append(images.mean((2, 3), dtype=torch.float32))
    return images, pooled


class _SumOverWorkers(torch.autograd.Function):
    """Differentiable all-reduce; torch 2.15 deprecates its own."""

    @staticmethod
    def forward(ctx: Any, sums: torch.Tensor) -> torch.Tensor:  # noqa: ANN401, ARG004 - torch's
        total = sums.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # noqa: ANN401, ARG004 - torch's
        total = grad.contiguous().clone()
        dist.all_reduce(total)
        return total


class WorkerSyncedBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation with statistics over all workers' images, on any device.

    ``torch.nn.SyncBatchNorm`` runs on GPUs only (torch 2.15); this is for CPU workers.
    Use torch's own once it takes CPU tensors.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalise a batch, shape (N, C, H, W)."""
        if not self.training or not dist.is_initialized() or dist.get_world_size() == 1:
            return super().forward(input)
        images = input.float()
        count = images.new_full((1,), images.numel() / images.shape[1])
        sums = torch.cat([images.sum((0, 2, 3)), images.square().sum((0, 2, 3)), count])
        reduced: torch.Tensor = _SumOverWorkers.apply(sums)
        total, squares, number = reduced.split([self.num_features, self.num_features, 1])
        mean = total / number
        variance = (squares / number - mean.square()).clamp_min(0)
        with torch.no_grad():
            assert self.running_mean is not None
            assert self.running_var is not None
            assert self.num_batches_tracked is not None
            self.num_batches_tracked += 1
            # As torch's own: without a momentum, the plain mean over batches.
            momentum = 1 / int(self.num_batches_tracked) if self.momentum is None else self.momentum
            total_count = float(number)
            unbiased = variance * (total_count / max(total_count - 1, 1))
            self.running_mean.lerp_(mean, momentum)
            self.running_var.lerp_(unbiased, momentum)
        scale = self.weight * torch.rsqrt(variance + self.eps)
        shift = self.bias - mean * scale
        normalised: torch.Tensor = images * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)
        return normalised.to(input.dtype)


class FrozenBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation whose statistics and affine parameters stay as loaded."""

    def __init__(self, num_features: int) -> None:
        super().__init__(num_features)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "FrozenBatchNorm2d":  # noqa: ARG002 - torch's signature
        """Stay in evaluation mode."""
        return super().train(False)


class ProductConv2d(nn.Conv2d):
    """A convolution that is computed as a matrix product during training.

    On feature maps of a few pixels, oneDNN's backward convolutions (torch 2.15, bf16) are slow: on
    a Zen core 13 ms against 7 for 1 × 1 from 512 to 2048 channels on 3 × 3 pixels, on a core with
    AMX 94 against 25 for 3 × 3 of 512 channels. A training step (32 images, bf16, one thread) takes
    0.475 instead of 0.529 s at 64 px, 1.665 instead of 1.871 s at 128 px. End condition: oneDNN is
    as fast. In evaluation it is a plain convolution, which other runtimes recognise.
    """

    MAX_POSITIONS_PER_CHANNEL = 4
    """Limit for kernels larger than 1 × 1; above it, copying the patches costs more than it
    saves."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map (N, C, H, W) to the output's channels."""
        (height, width), (rows, columns) = self.kernel_size, self.stride
        above, left = (int(pixels) for pixels in self.padding)
        positions_per_channel = input[:, 0, ::rows, ::columns].numel() / self.out_channels
        is_small = positions_per_channel <= self.MAX_POSITIONS_PER_CHANNEL
        if not self.training or (height * width > 1 and not is_small):
            return super().forward(input)
        pixels = F.pad(input, (left, left, above, above)).permute(0, 2, 3, 1)
        last_row, last_column = pixels.shape[1] - height, pixels.shape[2] - width
        taps = [
            pixels[:, i : last_row + i + 1 : rows, j : last_column + j + 1 : columns]
            for i in range(height)
            for j in range(width)
        ]
        positions = taps[0] if len(taps) == 1 else torch.cat(taps, dim=-1)
        # Permuted before it is flattened, so that the gradient has the weight's memory layout.
        weight = self.weight.permute(0, 2, 3, 1).flatten(1)
        return F.linear(positions, weight, self.bias).permute(0, 3, 1, 2)


def use_matrix_products(network: nn.Module) -> nn.Module:
    """Replace the last two stages' convolutions by :class:`ProductConv2d`, in place.

    Their feature maps are small. It pays off on CPUs with the channels-last layout, in which
    pixels are the rows of the matrix product.
    """
    for stage in ("layer3", "layer4"):
        for module in list(network.get_submodule(stage).modules()):
            for name, conv in module.named_children():
                if type(conv) is nn.Conv2d:
                    sizes = ("in_channels", "out_channels", "kernel_size", "stride", "padding")
                    given: dict[str, Any] = {size: getattr(conv, size) for size in sizes}
                    product = ProductConv2d(**given, bias=False)
                    product.weight = conv.weight
                    setattr(module, name, product)
    return network


def choose_norm_layer(mode: BatchNormMode, *, on_gpu: bool) -> type[nn.Module]:
    """Choose the batch-norm class; ``on_gpu`` says whether the workers use GPUs."""
    if mode == "sync":
        return nn.SyncBatchNorm if on_gpu else WorkerSyncedBatchNorm2d
    return FrozenBatchNorm2d if mode == "frozen" else nn.BatchNorm2d

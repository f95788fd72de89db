"""The network, its initial weights, and batch normalisation."""

import copy
import io
import pickle
import socket
import time
import urllib.error
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.optim.swa_utils import update_bn
from torchvision.models import resnet50

from brainray.errors import WeightsError
from brainray.model import network as network_module
from brainray.model.network import (
    NUM_FEATURES,
    STAGES,
    BatchNormMode,
    FrozenBatchNorm2d,
    ProductConv2d,
    StateDict,
    WorkerSyncedBatchNorm2d,
    build_network,
    choose_norm_layer,
    compute_features,
    fetch_weights,
    imagenet_weights_path,
    round_weights,
    stage_of,
    use_matrix_products,
)

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def rgb_network() -> nn.Module:
    """Build torchvision's own network with a 4-way head and statistics that are not 0 and 1."""
    torch.manual_seed(0)
    network = resnet50(num_classes=4)
    for name, buffer in network.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(0, 0.2)
        elif name.endswith("running_var"):
            buffer.uniform_(0.5, 2)
    return network.eval()


@pytest.fixture(scope="module")
def rgb_weights(rgb_network: nn.Module) -> StateDict:
    return dict(rgb_network.state_dict())


@pytest.fixture(scope="module")
def fresh_network() -> nn.Module:
    torch.manual_seed(1)
    return build_network(3)


# --- building -----------------------------------------------------------------------------


def test_network_gives_a_logit_for_each_class(fresh_network: nn.Module) -> None:
    assert fresh_network.training
    fresh_network.eval()
    assert fresh_network(torch.randn(2, 1, 32, 32)).shape == (2, 3)
    assert fresh_network(torch.randn(1, 1, 64, 48)).shape == (1, 3)
    fresh_network.train()


def test_last_scale_of_each_residual_branch_starts_at_zero(fresh_network: nn.Module) -> None:
    scales = [p for name, p in fresh_network.named_parameters() if name.endswith("bn3.weight")]
    assert len(scales) == 16
    assert all((scale == 0).all() for scale in scales)


def test_rgb_weights_give_the_logits_of_a_grey_image_repeated_three_times(
    rgb_network: nn.Module, rgb_weights: StateDict
) -> None:
    grey_network = build_network(4, weights=rgb_weights).double().eval()
    grey = torch.randn(2, 1, 48, 48, dtype=torch.float64)
    with torch.no_grad():
        expected = rgb_network.double()(grey.repeat(1, 3, 1, 1))
        found = grey_network(grey)
    rgb_network.float()
    assert expected.std() > 1e-3
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_head_of_another_width_is_ignored_and_other_weights_are_loaded(
    rgb_weights: StateDict,
) -> None:
    wide = {
        **rgb_weights,
        "fc.weight": torch.full((1000, NUM_FEATURES), 7.0),
        "fc.bias": torch.full((1000,), 7.0),
    }
    state = build_network(4, weights=wide).state_dict()
    assert state["fc.weight"].shape == (4, NUM_FEATURES)
    assert not (state["fc.weight"] == 7).any()
    assert not (state["fc.bias"] == 7).any()
    for name in rgb_weights:
        if not name.startswith(("fc.", "conv1.")):
            assert torch.equal(state[name], rgb_weights[name]), name


def test_data_parallel_prefix_and_missing_counters_are_accepted(rgb_weights: StateDict) -> None:
    prefixed = {
        f"module.{name}": tensor
        for name, tensor in rgb_weights.items()
        if not name.endswith("num_batches_tracked")
    }
    state = build_network(4, weights=prefixed).state_dict()
    assert torch.equal(state["conv1.weight"], rgb_weights["conv1.weight"].sum(1, keepdim=True))
    assert torch.equal(state["layer3.5.bn2.running_var"], rgb_weights["layer3.5.bn2.running_var"])
    assert torch.equal(state["fc.weight"], rgb_weights["fc.weight"])


def test_one_channel_weights_are_loaded_unchanged(rgb_weights: StateDict) -> None:
    stem = torch.randn(64, 1, 7, 7)
    state = build_network(4, weights={**rgb_weights, "conv1.weight": stem}).state_dict()
    assert torch.equal(state["conv1.weight"], stem)


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("layer3.2.conv1.weight", None),
        ("layer1.0.bn2.running_mean", None),
        ("layer2.1.conv2.weight", torch.zeros(128, 64, 3, 3)),
        ("conv1.weight", torch.zeros(64, 3, 3, 3)),
    ],
)
def test_the_error_for_weights_that_do_not_fit_names_them(
    rgb_weights: StateDict, name: str, tensor: torch.Tensor | None
) -> None:
    damaged = {key: value for key, value in rgb_weights.items() if key != name}
    if tensor is not None:
        damaged[name] = tensor
    with pytest.raises(WeightsError, match=f"1 of 320 .*'{name}'"):
        build_network(4, weights=damaged)


def test_weights_of_another_network_are_rejected() -> None:
    with pytest.raises(WeightsError, match="ResNet-50 state dict"):
        build_network(4, weights={"features.0.weight": torch.zeros(3)})
    with pytest.raises(WeightsError, match="ResNet-50 state dict"):
        build_network(4, weights={})


# --- weights from a file ------------------------------------------------------------------

SMALL: StateDict = {"a.weight": torch.arange(6.0).view(2, 3), "a.bias": torch.tensor([1.0, -2.0])}


def write_safetensors(path: Path) -> None:
    safetensors.torch.save_file(SMALL, path)


def write_bare(path: Path) -> None:
    torch.save(SMALL, path)


def write_nested(path: Path) -> None:
    torch.save({"epoch": 3, "state_dict": SMALL}, path)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("w.safetensors", write_safetensors),
        ("w.pth", write_bare),
        ("w.pt", write_bare),
        ("nested.pth", write_nested),
    ],
)
def test_weights_are_read_from_a_file(
    tmp_path: Path, name: str, write: Callable[[Path], None]
) -> None:
    write(tmp_path / name)
    for uri in (str(tmp_path / name), f"file://{tmp_path / name}"):
        state = fetch_weights("imagenet", uri)
        assert state is not None
        assert state.keys() == SMALL.keys()
        assert all(torch.equal(state[key], SMALL[key]) for key in SMALL)


def test_weights_none_gives_no_state_dict() -> None:
    assert fetch_weights("none", None) is None


class Malicious:
    """Unpickling it writes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
@pytest.mark.parametrize("nested", [False, True])
def test_code_in_a_weights_file_is_not_run(tmp_path: Path, form: str, nested: bool) -> None:
    marker, path = tmp_path / "ran", tmp_path / "evil.pth"
    content: dict[str, Any] = {**SMALL, "evil": Malicious(marker)}
    content = {"state_dict": content} if nested else content
    if form == "pickle":
        path.write_bytes(pickle.dumps(content, protocol=2))  # as torch.save
        pickle.loads(path.read_bytes())
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
        torch.load(io.BytesIO(path.read_bytes()), weights_only=False)
    assert marker.exists(), "unpickling the file does not run its code"
    marker.unlink()

    with pytest.raises(WeightsError, match="without running code") as caught:
        fetch_weights("none", str(path))
    assert not marker.exists()
    assert "evil.pth" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert "weights_only" not in str(caught.value), "the message advises weights_only=False"


@pytest.mark.parametrize("content", [b"", b"<html>404</html>", b"PK\x03\x04 cut short"])
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_damaged_weights_are_rejected_in_one_line(
    tmp_path: Path, content: bytes, suffix: str
) -> None:
    path = tmp_path / f"w.{suffix}"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=f"w.{suffix}") as caught:
        fetch_weights("none", str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [[1, 2], torch.zeros(3), {"a": torch.zeros(1), "epoch": 3}, {0: torch.zeros(1)}],
    ids=["list", "tensor", "mixed", "numbered"],
)
def test_a_file_without_a_state_dict_is_rejected(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(WeightsError, match=r"w\.pth' is not a state dict"):
        fetch_weights("none", str(tmp_path / "w.pth"))


def test_the_error_for_missing_weights_names_them(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"absent\.pth"):
        fetch_weights("imagenet", str(tmp_path / "absent.pth"))
    with pytest.raises(WeightsError, match="ftp://"):
        fetch_weights("imagenet", "ftp://host/w.pth")


# --- ImageNet -----------------------------------------------------------------------------


class FakeUrlopen:
    """Replaces ``urlopen``; records the timeout of each attempt."""

    def __init__(self, content: bytes | None) -> None:
        self.content = content
        self.timeouts: list[float | None] = []

    def __call__(self, *_: object, **__: object) -> "_Response":
        self.timeouts.append(socket.getdefaulttimeout())
        if self.content is None:
            raise urllib.error.URLError("Temporary failure in name resolution")
        return _Response(self.content)


class _Response(io.BytesIO):
    def info(self) -> "_Response":
        return self

    def getheaders(self, _: str) -> list[str]:
        return [str(len(self.getvalue()))]


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Move the cache of the ImageNet weights into an empty folder."""
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    path = imagenet_weights_path()
    assert path.is_relative_to(tmp_path)
    return path


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> FakeUrlopen:
    urlopen = FakeUrlopen(None)
    monkeypatch.setattr(torch.hub, "urlopen", urlopen)
    return urlopen


def assert_names_the_remedies(message: str, cache: Path) -> None:
    assert "\n" not in message
    for remedy in (str(cache), "--weights-uri", "--weights none"):
        assert remedy in message


def test_without_network_the_error_names_the_remedies_at_once(
    cache: Path, offline: FakeUrlopen
) -> None:
    before = socket.getdefaulttimeout()
    started = time.monotonic()
    with pytest.raises(WeightsError, match="name resolution") as caught:
        fetch_weights("imagenet", None)
    assert time.monotonic() - started < 2
    assert_names_the_remedies(str(caught.value), cache)
    assert offline.timeouts == [network_module.DOWNLOAD_TIMEOUT_S]
    assert socket.getdefaulttimeout() == before
    assert not cache.exists()


def test_download_with_another_hash_is_rejected_and_deleted(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.hub, "urlopen", FakeUrlopen(b"a portal's login page"))
    with pytest.raises(WeightsError, match="hash") as caught:
        fetch_weights("imagenet", None)
    assert_names_the_remedies(str(caught.value), cache)
    assert not list(cache.parent.iterdir())


def test_cached_weights_are_used_without_network(cache: Path, offline: FakeUrlopen) -> None:
    cache.parent.mkdir(parents=True)
    torch.save(SMALL, cache)
    state = fetch_weights("imagenet", None)
    assert state is not None
    assert torch.equal(state["a.weight"], SMALL["a.weight"])
    assert offline.timeouts == []


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("content", [b"", b"<html>404</html>", b"PK\x03\x04 cut short"])
def test_the_error_for_a_damaged_cache_names_it(cache: Path, content: bytes) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_bytes(content)
    with pytest.raises(WeightsError) as caught:
        fetch_weights("imagenet", None)
    assert_names_the_remedies(str(caught.value), cache)


@pytest.mark.usefixtures("offline")
def test_code_in_the_cache_is_not_run(cache: Path, tmp_path: Path) -> None:
    cache.parent.mkdir(parents=True)
    torch.save({"evil": Malicious(tmp_path / "ran")}, cache)
    with pytest.raises(WeightsError) as caught:
        fetch_weights("imagenet", None)
    assert not (tmp_path / "ran").exists()
    assert "weights_only" not in str(caught.value)


# --- stages and features ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "stage"),
    [
        ("conv1.weight", "stem"),
        ("bn1.bias", "stem"),
        ("layer1.0.conv1.weight", "layer1"),
        ("layer4.2.bn3.weight", "layer4"),
        ("fc.bias", "fc"),
        ("module.layer2.0.downsample.1.weight", "layer2"),
        ("module.conv1.weight", "stem"),
    ],
)
def test_stage_of(name: str, stage: str) -> None:
    assert stage_of(name) == stage


def test_stages_are_ordered_from_input_to_head(fresh_network: nn.Module) -> None:
    found = [stage_of(name) for name, _ in fresh_network.named_parameters()]
    assert list(dict.fromkeys(found)) == list(STAGES)


def test_features_are_the_input_of_the_head(fresh_network: nn.Module) -> None:
    images = torch.randn(3, 1, 32, 32)
    fresh_network.eval()
    with torch.no_grad():
        features = compute_features(fresh_network, images)
        logits = fresh_network.get_submodule("fc")(features)
        assert features.shape == (3, NUM_FEATURES)
        torch.testing.assert_close(logits, fresh_network(images))
    assert features.std() > 0
    assert not fresh_network.get_submodule("fc")._forward_pre_hooks
    fresh_network.train()


# --- batch normalisation ------------------------------------------------------------------


def build_small(mode: BatchNormMode = "local", *, on_gpu: bool = False) -> nn.Sequential:
    """Build two convolutions with normalisation that does not start as the identity."""
    torch.manual_seed(0)
    norm_layer = choose_norm_layer(mode, on_gpu=on_gpu)
    network = nn.Sequential(
        nn.Conv2d(2, 5, 3, bias=False),
        norm_layer(5),
        nn.ReLU(),
        nn.Conv2d(5, 3, 3, bias=False),
        norm_layer(3),
    )
    for module in network:
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias)
    return network


@pytest.mark.heavy
def test_rounded_weights_can_be_loaded_and_rounded_again_without_change(
    fresh_network: nn.Module,
) -> None:
    state = fresh_network.state_dict()
    rounded = round_weights(state)
    opened = build_network(len(state["fc.bias"]), weights=rounded).state_dict()
    assert rounded.keys() == opened.keys()
    for name, tensor in state.items():
        is_multiplied = tensor.ndim > 1
        assert (rounded[name].dtype == torch.bfloat16) == is_multiplied, name
        torch.testing.assert_close(
            opened[name], tensor, rtol=2**-8 if is_multiplied else 0, atol=0, msg=name
        )
        assert torch.equal(round_weights(opened)[name], rounded[name]), name


def test_frozen_statistics_do_not_change_in_training() -> None:
    network, plain = build_small("frozen"), build_small()
    images = 3 + 2 * torch.randn(4, 2, 9, 9)
    assert list(network.state_dict()) == list(plain.state_dict())
    expected = plain.eval()(images)
    for _ in range(2):  # as built, and after train()
        torch.testing.assert_close(network(images), expected)
        network.train()
    network(images).sum().backward()
    for module in network:
        if isinstance(module, FrozenBatchNorm2d):
            assert (module.running_mean == 0).all()
            assert (module.running_var == 1).all()
            assert all(p.grad is None and not p.requires_grad for p in module.parameters())
        elif isinstance(module, nn.Conv2d):
            assert module.training
            assert module.weight.grad is not None
    assert sum(isinstance(module, FrozenBatchNorm2d) for module in network) == 2


def test_the_norm_layer_is_used_in_the_whole_network() -> None:
    names = list(build_network(2).state_dict())
    network = build_network(2, norm_layer=choose_norm_layer("frozen", on_gpu=True))
    kinds = [type(m) for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    assert kinds == [FrozenBatchNorm2d] * 53
    assert list(network.state_dict()) == names


def test_batch_norm_mode_chooses_the_layer_class() -> None:
    names = list(build_small().state_dict())
    for mode, on_gpu, kind in (
        ("local", False, nn.BatchNorm2d),
        ("local", True, nn.BatchNorm2d),
        ("sync", False, WorkerSyncedBatchNorm2d),
        ("sync", True, nn.SyncBatchNorm),
    ):
        network = build_small(mode, on_gpu=on_gpu)  # type: ignore[arg-type]
        assert type(network.get_submodule("1")) is kind
        assert type(network.get_submodule("4")) is kind
        assert list(network.state_dict()) == names
        assert all(parameter.requires_grad for parameter in network.parameters())


def test_synced_batch_norm_of_a_single_worker_equals_batch_norm() -> None:
    images = torch.randn(4, 2, 9, 9)
    plain, synced = build_small(), build_small("sync")
    torch.testing.assert_close(synced(images), plain(images))
    for name, value in plain.state_dict().items():
        torch.testing.assert_close(synced.state_dict()[name], value)


@pytest.mark.heavy
def test_matrix_products_train_like_convolutions() -> None:
    torch.manual_seed(5)
    images = torch.randn(2, 1, 96, 96, dtype=torch.float64).to(memory_format=torch.channels_last)
    plain = build_network(3).double().to(memory_format=torch.channels_last)
    product = use_matrix_products(copy.deepcopy(plain))
    kinds = [name for name, m in product.named_modules() if isinstance(m, ProductConv2d)]
    # Three per block and one in the shortcut; layer3 has six blocks, layer4 three.
    assert [sum(name.startswith(stage) for name in kinds) for stage in STAGES[1:5]] == [
        0,
        0,
        19,
        10,
    ]
    results = []
    for network in (plain, product):
        for norm in network.modules():
            if isinstance(norm, nn.BatchNorm2d):
                nn.init.constant_(norm.weight, 0.5)  # otherwise each branch starts at zero
                norm.momentum = 0.0
        logits = network.train()(images)
        logits.square().sum().backward()
        results.append((logits, {n: p.grad for n, p in network.named_parameters()}))
    torch.testing.assert_close(results[1], results[0], rtol=1e-7, atol=1e-9)
    weights = [product.get_submodule(name).weight for name in kinds]
    for gradient, weight in zip(
        torch.autograd.grad(product(images).sum(), weights), weights, strict=True
    ):
        assert gradient.stride() == weight.stride()  # otherwise DDP copies it once more, and warns
    torch.testing.assert_close(product.eval()(images), plain.eval()(images), rtol=0, atol=0)
    assert list(product.state_dict()) == list(plain.state_dict())


@pytest.mark.parametrize(
    ("kernel_size", "side", "is_product"), [(3, 2, True), (3, 9, False), (1, 9, True)]
)
@pytest.mark.parametrize("stride", [1, 2])
def test_large_kernels_on_large_maps_remain_convolutions(
    kernel_size: int, side: int, is_product: bool, stride: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(5)
    layer = ProductConv2d(4, 8, kernel_size, stride=stride, padding=kernel_size // 2)
    images = torch.randn(8, 4, side * stride, side * stride)  # 4 or 81 positions per channel
    plain = nn.functional.conv2d(
        images, layer.weight, layer.bias, stride=stride, padding=kernel_size // 2
    )
    products, multiply = [], network_module.F.linear

    def count(*args: torch.Tensor) -> torch.Tensor:
        products.append(args)
        return multiply(*args)

    monkeypatch.setattr(network_module.F, "linear", count)
    torch.testing.assert_close(layer(images), plain, rtol=1e-5, atol=1e-5)
    assert len(products) == is_product


BATCH = 6
SHARES = {"halves": (3, 3), "unequal": (4, 2), "one": (5, 1), "none left": (6, 0)}
STEPS = 2


def make_batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    images = 1 + 2 * torch.randn(BATCH, 2, 8, 8, generator=generator)
    targets = torch.randn(BATCH, 3, 4, 4, generator=generator)
    return images.requires_grad_(), targets


def take_steps(network: nn.Module, part: slice, scale: float) -> dict[str, Any]:
    """Run steps on a part of each batch; return what must not depend on the number of workers."""
    outputs, image_grads = [], []
    for step in range(STEPS):
        images, targets = make_batch(step)
        logits = network(images[part])
        loss = (logits - targets[part]).square().sum() * scale
        loss.backward()  # type: ignore[no-untyped-call]
        assert images.grad is not None
        outputs.append(logits.detach())
        image_grads.append(images.grad[part])
    grads = {name: p.grad for name, p in network.named_parameters()}
    network.eval()
    images, _ = make_batch(STEPS)
    found = {
        "outputs": outputs,
        "image_grads": image_grads,
        "grads": grads,
        "statistics": copy_statistics(network),
        "evaluated": network(images).detach(),
    }
    update_bn((make_batch(step)[0][part] for step in range(3)), network)
    return {**found, "measured": copy_statistics(network)}


def copy_statistics(network: nn.Module) -> StateDict:
    return {name: b.clone() for name, b in network.named_buffers() if "running" in name}


def assert_near(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Assert agreement to 1e-5 of the largest value, because float32 sums depend on the order."""
    assert found.shape == expected.shape
    atol = 1e-5 * max(1.0, float(expected.abs().max()))
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def run_synced_worker(rank: int, folder: str) -> None:
    """Run one of two gloo workers in its own process."""
    warnings.filterwarnings("error", module="brainray")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    found = {}
    for name, shares in SHARES.items():
        start = sum(shares[:rank])
        network = build_small("sync")
        # As in the training loop, the averaged gradient is the mean over the whole batch.
        result = take_steps(network, slice(start, start + shares[rank]), 2 / BATCH)
        for grad in result["grads"].values():
            dist.all_reduce(grad)
            grad /= 2
        found[name] = result
    torch.save(found, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def synced_results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("synced")
    mp.spawn(run_synced_worker, (str(folder),), nprocs=2)  # type: ignore[no-untyped-call]
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


@pytest.mark.heavy
@pytest.mark.parametrize("shares", SHARES)
def test_two_synced_workers_equal_one_worker(
    synced_results: list[dict[str, Any]], shares: str
) -> None:
    expected = take_steps(build_small(), slice(0, BATCH), 1 / BATCH)
    parts = [result[shares] for result in synced_results]
    for step in range(STEPS):
        outputs = torch.cat([part["outputs"][step] for part in parts])
        assert_near(outputs, expected["outputs"][step])
        # Each worker's loss was scaled by the number of workers.
        image_grads = torch.cat([part["image_grads"][step] for part in parts]) / 2
        assert_near(image_grads, expected["image_grads"][step])
    for part in parts:
        for kind, count in (("grads", 6), ("statistics", 4), ("measured", 4)):
            assert len(expected[kind]) == count
            for name, value in expected[kind].items():
                assert_near(part[kind][name], value)
        assert_near(part["evaluated"], expected["evaluated"])
    assert min(grad.abs().max() for grad in expected["image_grads"]) > 0.1
    assert min(grad.abs().max() for grad in expected["grads"].values()) > 0.1

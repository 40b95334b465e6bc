"""Backbones against torchvision and timm, sizes, feature maps; BatchNorm recalibration."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import load_file
from small import config_of, losses
from torch import nn

from fastssl.evaluate.base import load_backbone
from fastssl.evaluate.features import centre_crops, spread
from fastssl.evaluate.recalibrate import recalibrated
from fastssl.export import load_weights, save_weights
from fastssl.networks.backbones import backbone, check_size, feature_map
from fastssl.networks.batch_norm import GroupedBatchNorm, group_batch_norm
from fastssl.networks.vit import resized_positions
from fastssl.train import main
from fastssl.training import log as logs
from fastssl.training.build import make_method
from loaders import UserError
from loaders.beton import Reader

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "width", "millions"),
    [("resnet18", 512, 11.177), ("resnet34", 512, 21.285), ("resnet50", 2048, 23.508), ("mobilenet_v2", 1280, 2.224)],
)
def test_convolutional_networks_have_torchvisions_names(name: str, width: int, millions: float) -> None:
    net, found = backbone(name, size=64)
    assert found == width == check_size(name, net, 48)
    reference = getattr(torchvision.models, name)()
    setattr(reference, "classifier" if name == "mobilenet_v2" else "fc", nn.Identity())
    reference.load_state_dict(net.state_dict(), strict=True)
    assert round(sum(p.numel() for p in net.parameters()) / 1e6, 3) == millions
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(net.eval()(x), reference.eval()(x))


@pytest.mark.parametrize(
    ("name", "width", "heads", "patch", "millions"),  # counts at 224 px: timm's, which are DeiT's
    [("vit-t32", 192, 3, 32, 5.939), ("vit-t16", 192, 3, 16, 5.524), ("vit-s16", 384, 6, 16, 21.666)],
)
def test_vits_are_dinos(name: str, width: int, heads: int, patch: int, millions: float) -> None:
    net, found = backbone(name)
    assert found == width and round(sum(p.numel() for p in net.parameters()) / 1e6, 3) == millions
    assert len(net.blocks) == 12 and net.patch_embed.patch_size == (patch, patch)
    assert {m.eps for m in net.modules() if isinstance(m, nn.LayerNorm)} == {1e-6}
    for block in net.blocks:
        assert block.attn.num_heads == heads and block.attn.qkv.bias is not None
        assert block.mlp.fc1.out_features == 4 * width
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(net.eval()(x), net.forward_features(x)[:, 0])  # the class token, behind the last norm


def test_vits_resize_positions_and_start_as_dinos_do() -> None:
    """Every position read by the cubic kernel where DINO's code reads it, and a class token that is not nearly zero."""
    net, _ = backbone("vit-t16", size=224)
    positions = resized_positions(net.pos_embed, (14, 14), (6, 6))[0, 1:].unflatten(0, (6, 6))
    grid, factor = net.pos_embed[0, 1:].unflatten(0, (14, 14)).double(), 6.1 / 14

    def weight(t: float) -> float:  # Keys' cubic, a = -0.75
        t = abs(t)
        return 1.25 * t**3 - 2.25 * t**2 + 1 if t <= 1 else -0.75 * (t**3 - 5 * t**2 + 8 * t - 4) if t < 2 else 0.0

    at = [(i + 0.5) / factor - 0.5 for i in range(6)]
    near = [[(min(max(k, 0), 13), weight(x - k)) for k in range(math.floor(x) - 1, math.floor(x) + 3)] for x in at]
    for i, j in ((0, 0), (2, 5), (4, 1)):
        expected = sum(a * b * grid[m, n] for m, a in near[i] for n, b in near[j])
        torch.testing.assert_close(positions[i, j].double(), expected, rtol=1e-4, atol=1e-6)
    assert torch.equal(resized_positions(net.pos_embed, (14, 14), (14, 14)), net.pos_embed)
    assert 0.015 < net.cls_token.std() < 0.025


def test_a_vit_takes_views_of_several_sizes() -> None:
    net, width = backbone("vit-t16", size=64)
    assert net.pos_embed.shape == (1, 1 + 4 * 4, width)
    assert check_size("vit-t16", net, 96) == check_size("vit-t16", net, 32) == width
    sizes = {}
    net.blocks[0].register_forward_pre_hook(lambda _m, x: sizes.update({x[0].shape[1]: True}))
    for size in (32, 64, 96):
        assert net(torch.randn(2, 3, size, size)).shape == (2, width)
    assert list(sizes) == [1 + 4, 1 + 16, 1 + 36]
    # Positions that say where they are, resized, still say it: no token sees its neighbours' order changed.
    with torch.no_grad():
        net.pos_embed.zero_()[0, 1:, 0] = torch.arange(4.0).repeat(4)
        net.patch_embed.proj.weight.zero_(), net.patch_embed.proj.bias.zero_()
        tokens = net._pos_embed(net.patch_embed(torch.zeros(1, 3, 128, 128)))[0, 1:, 0].view(8, 8)
    assert (tokens.diff(dim=1) > 0).all() and torch.allclose(tokens[0], tokens[7], atol=1e-5)


def test_drop_path_rises_linearly_and_acts_in_training_only() -> None:
    net, _ = backbone("vit-t32", size=64, drop_path=0.1)
    for place in ("drop_path1", "drop_path2"):
        rates = [getattr(getattr(block, place), "drop_prob", 0.0) for block in net.blocks]
        assert rates == pytest.approx([0.1 * i / 11 for i in range(12)])
    torch.manual_seed(0)
    net, _ = backbone("vit-t32", size=64, drop_path=0.9)
    torch.manual_seed(0)
    plain, _ = backbone("vit-t32", size=64)
    x = torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(net.eval()(x), plain.eval()(x))  # the same weights from the same seed
        assert not torch.allclose(net.train()(x), net(x))
    assert any(getattr(m, "drop_prob", 0) for m in backbone("timm/resnet18", size=32, drop_path=0.1)[0].modules())


@pytest.mark.parametrize("name", ["resnet50", "mobilenet_v2", "timm/vgg11"])
def test_drop_path_where_there_is_none(name: str) -> None:
    with pytest.raises(UserError, match=f"--drop-path 0.1: {name} has none"):
        backbone(name, size=32, drop_path=0.1)
    with pytest.raises(UserError, match="a probability"):
        backbone("vit-t16", drop_path=1.0)


def test_zero_init_residual() -> None:
    for name in ("resnet18", "timm/resnet18"):
        net, _ = backbone(name, size=32, zero_init_residual=True)
        assert all((block.bn2.weight == 0).all() for block in net.layer3)
        net, _ = backbone(name, size=32, zero_init_residual=False)
        assert all((block.bn2.weight == 1).all() for block in net.layer3)


@pytest.mark.parametrize(
    ("name", "width"), [("resnet18-cifar", 512), ("resnet34-cifar", 512), ("resnet50-cifar", 2048)]
)
def test_cifar_stem_keeps_resolution(name: str, width: int) -> None:
    net, found = backbone(name, size=32)
    sizes = {}
    net.layer1.register_forward_hook(lambda _m, _i, out: sizes.update(layer1=out.shape[-1]))
    net.layer4.register_forward_hook(lambda _m, _i, out: sizes.update(layer4=out.shape[-1]))
    assert net.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, width) and found == width
    assert sizes == {"layer1": 32, "layer4": 4}
    assert net(torch.zeros(1, 3, 16, 16)).shape == (1, width)  # adaptive pooling takes tiles


@pytest.mark.parametrize(
    ("name", "size", "width", "other_size"),
    [
        ("timm/resnet18", 32, 512, 48),
        ("timm/vit_tiny_patch16_224", 96, 192, 64),
        ("timm/mobilenetv3_small_100", 64, 1024, 96),
        ("timm/mixer_s32_224", 96, 512, None),  # knows one size only, the run's
    ],
)
def test_timm_models_by_name(name: str, size: int, width: int, other_size: int | None) -> None:
    net, found = backbone(name, size=size)
    assert found == width and net.eval()(torch.zeros(2, 3, size, size)).shape == (2, width)
    if other_size:
        assert check_size(name, net, other_size) == width
    else:
        with pytest.raises(UserError, match=r"does not take images of 64 px \(small views\)"):
            check_size(name, net, 64, "small views")


def test_unknown_backbones_name_the_nearest() -> None:
    with pytest.raises(UserError, match="did you mean 'resnet50'"):
        backbone("resnet_50")
    with pytest.raises(UserError, match="did you mean 'vit-s16'"):
        backbone("vit_s16")
    with pytest.raises(UserError, match="timm/resnet50"):
        backbone("timm/resnet5")


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("resnet18", 31, "at least 32 px"),
        ("mobilenet_v2", 24, "at least 32 px"),
        ("resnet50-cifar", 7, "at least 8 px"),
        ("vit-s16", 100, "does not take images of 100 px.*multiple of its patches' 16 px, such as 96 or 112"),
        ("vit-t32", 8, "such as 32"),
        ("timm/vit_tiny_patch16_224", 100, "such as 96 or 112"),
    ],
)
def test_sizes_that_do_not_fit(name: str, size: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        backbone(name, size=size)


def test_the_run_checks_every_size_that_the_network_sees() -> None:
    options = {"backbone": "vit-t16", "size": 64, "num_local": 2}
    with pytest.raises(UserError, match=r"40 px.*small views.*such as 32 or 48"):
        make_method(config_of("dino", local_size=40, **options))
    assert make_method(config_of("dino", local_size=48, **options)).backbone.pos_embed.shape[1] == 1 + 4 * 4


@pytest.mark.parametrize(
    "name", ["resnet18", "resnet50-cifar", "mobilenet_v2", "timm/resnet18", "timm/efficientnet_b0", "timm/regnety_002"]
)
def test_feature_maps_are_what_is_pooled(name: str) -> None:
    net, width = backbone(name, size=64, zero_init_residual=False)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        features = feature_map(net.eval(), x)
        assert features.ndim == 4 and features.shape[:2] == (2, width) and features.shape[2] > 1
        torch.testing.assert_close(features.mean((2, 3)), net(x))


@pytest.mark.parametrize(
    "name", ["vit-t16", "timm/swin_tiny_patch4_window7_224", "timm/convnext_atto", "timm/mobilenetv3_small_100"]
)
def test_networks_whose_output_is_no_mean_of_a_map(name: str) -> None:
    net, _ = backbone(name, size=224 if "swin" in name else 64)
    with pytest.raises(UserError, match="has no feature map"):
        feature_map(net, torch.randn(1, 3, 224, 224))


# ------------------------------------------------------------------ weights of every kind


@pytest.mark.parametrize("name", ["resnet34-cifar", "mobilenet_v2", "vit-t32"])
def test_weights_of_other_backbones_evaluate_at_other_sizes(name: str, tmp_path: Path) -> None:
    net, width = backbone(name, size=64)
    save_weights(tmp_path / "w.safetensors", net, {"backbone": name, "size": 64})
    loaded, random_net, size = load_backbone(tmp_path / "w.safetensors", None, 96, seed=3)
    x = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        assert size == 96 and torch.equal(loaded.eval()(x), net.eval()(x))
        assert random_net.eval()(x).shape == (2, width)
    if name == "vit-t32":
        with pytest.raises(UserError, match="such as 96 or 128"):
            load_backbone(tmp_path / "w.safetensors", None, 100, seed=3)


# ------------------------------------------------------------------ BatchNorm recalibration


class Tiny(nn.Module):
    """One convolution, BatchNorm, ReLU, mean."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(x)).relu().mean((2, 3))


@pytest.mark.parametrize("images", [48, 12, 1000])
def test_statistics_become_those_of_the_evaluation_images(beton: Path, images: int) -> None:
    reader, net = Reader(beton), Tiny()
    net.norm.running_mean.fill_(7)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    net.train()
    rng = torch.get_rng_state()
    made = recalibrated(net, reader, size=32, device=CPU, images=images, batch_size=24)
    # The network itself, its mode and the random numbers are as before; the copy differs in its statistics only.
    assert net.training and torch.equal(torch.get_rng_state(), rng) and net.norm.momentum == made.norm.momentum == 0.1
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert not made.training and made is not net and torch.equal(made.conv.weight, net.conv.weight)
    ids = spread(48, images)
    (batch,) = centre_crops(reader, size=32, device=CPU, ids=ids, batch_size=48)
    with torch.no_grad():
        x = net.conv(batch.views[0]).transpose(0, 1).flatten(1)
    assert len(ids) == min(images, 48) and x.shape[1] == len(ids) * 30 * 30
    torch.testing.assert_close(made.norm.running_mean, x.mean(1), atol=1e-5, rtol=1e-4)
    # The variance is within batches; two of them, each from the whole file, have almost that of all.
    tolerance = 1e-4 if images == 12 else 0.05
    torch.testing.assert_close(made.norm.running_var, x.var(1), atol=0, rtol=tolerance)


def test_batches_are_equal_and_spread_over_the_file(beton: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def spy(reader, *, ids, batch_size, **options):
        seen.append([ids[i : i + batch_size].tolist() for i in range(0, len(ids), batch_size)])
        return centre_crops(reader, ids=ids, batch_size=batch_size, **options)

    monkeypatch.setattr("fastssl.evaluate.recalibrate.centre_crops", spy)
    recalibrated(Tiny(), Reader(beton), size=16, device=CPU, images=47, batch_size=20)
    (batches,) = seen
    assert [len(b) for b in batches] == [15, 15, 15]
    assert all(max(b) - min(b) > 40 for b in batches)


def test_only_batch_norm_is_in_train_mode_and_alone(beton: Path) -> None:
    """Dropout stays off, synchronised BatchNorm waits for no other process, compiled networks can be copied."""
    net = group_batch_norm(nn.Sequential(nn.Dropout(0.9), Tiny()), sync=True).train()
    net.compile(backend="eager")
    net(torch.randn(2, 3, 16, 16))
    options = {"size": 16, "device": CPU, "images": 48}
    made = recalibrated(net, Reader(beton), **options)
    assert not any(isinstance(m, GroupedBatchNorm) for m in made.modules())
    assert any(isinstance(m, GroupedBatchNorm) for m in net.modules())
    plain = recalibrated(net[1], Reader(beton), **options)
    assert torch.equal(made[1].norm.running_var, plain.norm.running_var)
    assert made.state_dict().keys() == net.state_dict().keys()


def test_networks_without_batch_norm_come_back_as_they_are(beton: Path, tmp_path: Path, capsys) -> None:
    net, _ = backbone("vit-t32", size=32)
    assert recalibrated(net, Reader(beton), size=32, device=CPU, images=4) is net
    with pytest.raises(UserError, match="raise --recalibrate-bn"):
        recalibrated(Tiny(), Reader(beton), size=32, device=CPU, images=1)
    out = tmp_path / "run"
    flags = ["--backbone", "vit-t32", "--size", "32", "--recalibrate-bn", "8"]
    assert main(["--data", str(beton), "--out", str(out), *flags]) == 2
    assert "vit-t32 has no BatchNorm" in capsys.readouterr().err and not out.exists()


def test_a_run_reports_and_exports_both(beton: Path, val_beton: Path, tmp_path: Path, capsys) -> None:
    common = ["--backbone", "resnet18", "--size", "32", "--batch-size", "8", "--epochs", "2", "--log-every", "1"]
    common += ["--method", "simsiam", "--dim", "32", "--data", str(beton), "--max-steps", "8"]
    monitor = ["--val", str(val_beton), "--knn-k", "5", "--knn-every", "1"]
    folder = tmp_path / "recalibrated"
    assert main([*common, *monitor, "--out", str(tmp_path / "plain")]) == 0
    assert main([*common, *monitor, "--out", str(folder), "--recalibrate-bn", "16"]) == 0
    assert losses(tmp_path / "plain") == losses(folder) and len(losses(folder)) == 8  # to the last bit
    out = capsys.readouterr().out
    assert out.count("; BatchNorm recalibrated: ") == 3 and out.count("  BatchNorm recalibrated") == 2
    monitored = [e for e in logs.read_metrics(folder / logs.METRICS) if "knn" in e]
    assert [e["epoch"] for e in monitored] == [0, 1, 8 / 6]
    assert all(0 <= e["knn_recalibrated"] <= e["knn_recalibrated_top5"] <= 100 for e in monitored)

    plain, other = (load_file(folder / f"weights{x}.safetensors") for x in ("", "-recalibrated"))
    assert not (tmp_path / "plain" / "weights-recalibrated.safetensors").exists()
    reference = load_file(tmp_path / "plain" / "weights.safetensors")
    assert all(torch.equal(plain[k], v) for k, v in reference.items())
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    for name, value in plain.items():
        assert torch.equal(value, other[name]) is not name.endswith(statistics), name
    model = torchvision.models.resnet18()
    model.fc = nn.Identity()
    model.load_state_dict(other, strict=True)
    assert load_weights(folder / "weights-recalibrated.safetensors")[1]["recalibrate_bn"] == "16"

    # A finished run can have it done afterwards; a new run there leaves nothing of it.
    assert main(["--out", str(tmp_path / "plain"), "--resume", "--recalibrate-bn", "16"]) == 0
    again = load_file(tmp_path / "plain" / "weights-recalibrated.safetensors")
    assert all(torch.equal(again[k], v) for k, v in other.items())
    assert main([*common, "--out", str(folder), "--overwrite", "--max-steps", "1"]) == 0
    assert not (folder / "weights-recalibrated.safetensors").exists()


def test_split_batch_norm_is_recalibrated_as_a_plain_one(beton: Path) -> None:
    """MoCo v2's parts of a batch are of training only: any number of images gives the statistics of all of them."""
    torch.manual_seed(0)
    net, _ = backbone("resnet18", size=32)
    options = {"size": 32, "device": torch.device("cpu"), "images": 45}
    plain = recalibrated(net, Reader(beton), **options).state_dict()
    split = recalibrated(group_batch_norm(net, splits=4), Reader(beton), **options).state_dict()
    assert all(torch.equal(plain[name], split[name]) for name in plain)

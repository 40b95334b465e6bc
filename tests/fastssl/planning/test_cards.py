"""What a step is counted to cost, and what follows for known cards."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
import torchvision
from small import config_of
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from fastssl import methods
from fastssl.config import schema as configs
from fastssl.config.presets import load
from fastssl.planning.cards import CARDS, EFFICIENCY, LAUNCH, PUBLISHED, RESNET50, card, seconds_per_image
from fastssl.planning.cost import ASSUMED_VIEWS_PER_S, Meter, StepCost, cost, step_cost

# ------------------------------------------------------------------ Meter


def test_meter_counts_a_linear_layer_by_hand() -> None:
    x, w = torch.randn(8, 16, requires_grad=True), torch.randn(32, 16, requires_grad=True)
    with Meter((x, w)) as meter:
        y = x @ w.T
    assert meter.flops == 2 * 8 * 16 * 32
    assert meter.bytes == 4 * (8 * 16 + 32 * 16 + 8 * 32)  # the transpose costs nothing
    assert meter.peak == meter.bytes
    with Meter((x, w)) as meter:
        y.backward(torch.ones_like(y))
    assert meter.flops == 2 * 2 * 8 * 16 * 32


def test_meter_takes_freed_memory_off_again() -> None:
    with Meter() as meter:
        for _ in range(10):
            x = torch.zeros(1000)
            x.view(10, 100)[0].add_(1)
            del x
        kept = [torch.zeros(500) for _ in range(3)]
    assert meter.peak == 4 * 3 * 500 and len(kept) == 3


def test_meter_knows_that_grouped_convolutions_are_not_dense() -> None:
    """torch's own count of their backward pass takes them for dense ones."""
    x = torch.randn(2, 16, 8, 8, requires_grad=True)
    conv = nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False)
    with Meter() as meter:
        conv(x).sum().backward()
    forward = 2 * 2 * 16 * 8 * 8 * 9
    assert meter.flops == 3 * forward
    with Meter() as meter:
        conv(x.detach()).sum().backward()  # no gradient for the input
    assert meter.flops == 2 * forward


def test_meter_lets_batch_norm_read_twice() -> None:
    x = torch.randn(4, 8, 5, 5)
    norm = nn.BatchNorm2d(8, affine=False, track_running_stats=False)
    with torch.no_grad(), Meter() as meter:
        norm(x)
    assert meter.bytes == 4 * (3 * x.numel() + 2 * 8)  # x twice, the result, mean and deviation


# ------------------------------------------------------------------ work of a step


def small(method: str, **values: object) -> configs.RunConfig:
    config = config_of(method, size=64)
    return configs.replace(config, batch_size=8, **values)


@pytest.mark.parametrize("method", methods.available())
def test_work_of_every_method_is_what_the_quick_count_says(method: str) -> None:
    config = small(method, epochs=1)
    counted = step_cost(config)
    # The quick count takes three times the forward pass; the first convolution needs no gradient of its input.
    assert counted.flops == pytest.approx(cost(config, 1).flops, rel=0.12)
    assert counted.flops < cost(config, 1).flops
    assert counted.bytes > 0 and counted.peak > 0


def test_work_grows_with_views_and_sizes() -> None:
    one = step_cost(small("fastsiam", num_views=2))
    two = step_cost(small("fastsiam", num_views=4))
    large = step_cost(small("fastsiam", num_views=2, size=128))
    assert two.flops == pytest.approx(2 * one.flops, rel=1e-3)
    assert 1.2 * one.bytes < two.bytes < 1.99 * one.bytes  # weights and optimiser once
    assert one.peak < two.peak < 2 * one.peak
    assert large.flops > 3 * one.flops and large.bytes > one.bytes


def test_work_is_counted_in_half_precision_and_leaves_the_configuration_alone() -> None:
    config = small("simsiam")
    before = configs.to_dict(config)
    counted = step_cost(config)
    assert configs.to_dict(config) == before
    assert counted == step_cost(configs.replace(config, precision="fp32"))


def test_peak_of_fastsiam_holds_weights_optimiser_and_activations() -> None:
    config = load("fastsiam-imagenet-25ep")
    images = [step_cost(configs.replace(config, batch_size=num)).peak for num in (8, 16)]
    fixed = 2 * images[0] - images[1]
    weights = 23.5e6 + 3 * 2048**2 + 2 * 2048 * 512  # ResNet-50 without fc, projector, predictor
    assert fixed == pytest.approx(3 * 4 * weights, rel=0.2)  # weights, gradients, momentum in fp32
    # A view of 224 px keeps what convolutions and BatchNorm make, 11 M numbers each, in two bytes.
    assert (images[1] - images[0]) / 8 / 4 == pytest.approx(2 * 2 * 11e6, rel=0.1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "images"),
    [
        ("fastmoco-imagenet-100ep", 512),
        ("mocov3-imagenet-100ep", 4096),
        ("swav-imagenet-100ep", 4096),
        ("dino-imagenet-100ep", 512),
        ("dino-sslight-vit-s16-imagenet-200ep", 1024),
    ],
)
def test_large_batches_fit_a_card_of_11_gb_in_micro_batches(preset: str, images: int) -> None:
    config = configs.replace(load(preset), micro_batch=32)
    assert config.data.batch_size == images
    assert step_cost(config).peak < 0.9 * card("RTX 2080 Ti").memory


# ------------------------------------------------------------------ cards


def supervised(name: str, num: int = 64) -> StepCost:
    """A step of classification with torchvision's network `name`, 224 px, SGD: what the published rates are of."""
    with FakeTensorMode():
        net = getattr(torchvision.models, name)()
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, fused=True)
        for p in net.parameters():
            optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
        x = torch.empty(num, 224, 224, 3).permute(0, 3, 1, 2).bfloat16()
        label = torch.zeros(num, dtype=torch.int64)
        with Meter((net.state_dict(), optimizer.state_dict(), x)) as meter:
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(net(x).float(), label)
            loss.backward()
            optimizer.step()
    return StepCost(meter.flops / num, meter.bytes / num, meter.peak, meter.operations / num)


def test_the_resnet_50_of_the_calibration_is_counted() -> None:
    counted = supervised("resnet50")
    for name in ("flops", "bytes", "peak", "operations"):
        assert getattr(RESNET50, name) == pytest.approx(getattr(counted, name), rel=0.01), name


def test_derived_rates_are_the_published_ones_within_six_percent() -> None:
    assert {p.card.name: p.images_per_s for p in PUBLISHED} == {"RTX 3090": 1218, "A100 80 GB": 2470, "V100": 1200}
    for published in PUBLISHED:
        derived = 1 / seconds_per_image(published.card, RESNET50)[0]
        assert derived == pytest.approx(published.images_per_s, rel=0.06), published.card.name


@pytest.mark.parametrize(("name", "rate"), [("resnet34", 2036), ("mobilenet_v2", 2313), ("resnet18", 3482)])
def test_networks_that_were_not_calibrated_with_come_out_within_sixteen_percent(name: str, rate: float) -> None:
    """timm's results on an RTX 3090, mixed precision, channels last, PyTorch 1.12."""
    assert 1 / seconds_per_image(card("RTX 3090"), supervised(name))[0] == pytest.approx(rate, rel=0.16)


def test_the_longer_of_traffic_and_computing_counts() -> None:
    any_card = card("RTX 3090")
    moving = StepCost(flops=any_card.rate, bytes=2 * any_card.bandwidth, peak=0, operations=1)
    computing = StepCost(flops=3 * any_card.rate, bytes=2 * any_card.bandwidth, peak=0, operations=1)
    launching = StepCost(flops=3 * any_card.rate, bytes=2 * any_card.bandwidth, peak=0, operations=9 / LAUNCH)
    assert seconds_per_image(any_card, moving) == (pytest.approx(2 / EFFICIENCY), "bandwidth")
    assert seconds_per_image(any_card, computing) == (pytest.approx(3 / EFFICIENCY), "tensor cores")
    assert seconds_per_image(any_card, launching) == (pytest.approx(9), "launches")
    assert 0.5 < EFFICIENCY < 0.7


def test_small_images_in_small_batches_wait_for_launches() -> None:
    at_batch = {num: step_cost(configs.replace(config_of("simsiam", size=32), batch_size=num)) for num in (8, 16)}
    assert at_batch[8].operations == 2 * at_batch[16].operations > 100 / 8
    fast = card("H200")
    seconds, limit = seconds_per_image(fast, at_batch[8])
    assert limit == "launches" and seconds == 2 * seconds_per_image(fast, at_batch[16])[0]


def test_cards_say_where_their_figures_are_from() -> None:
    assert [c.name for c in CARDS] == [
        *("RTX 2080 Ti", "RTX 3090", "RTX 4090", "A100 40 GB", "A100 80 GB", "H100", "H200"),
    ]
    for c in CARDS:
        assert c.source.startswith("NVIDIA ") and c.rate / c.bandwidth > 50 and c.memory > 10e9


def test_fastsiam_on_a_2080_ti_is_what_two_publications_make_likely() -> None:
    """And what `--list` assumes."""
    counted = step_cost(load("fastsiam-imagenet-25ep"))
    assert 4 / seconds_per_image(card("RTX 2080 Ti"), counted)[0] == pytest.approx(ASSUMED_VIEWS_PER_S, rel=0.01)

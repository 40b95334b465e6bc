"""Both forms of the augmentation are torchvision's, op by op and in every order, and they are each other's."""

import dataclasses
import itertools
import math
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

import loaders.augment.rows
from loaders.augment import DeviceAugment, augment, augment_rows, divide, operations, to_tensors
from loaders.draw import BRIGHTNESS, CONTRAST, HUE, ORDERS, SATURATION, Draws, draw
from loaders.views import IMAGENET_MEAN, IMAGENET_STD, View, ViewSpec, byol, evaluation, multicrop, simsiam

ADJUST = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)  # by operation id
PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
EVERYTHING = View(
    32, brightness=1, contrast=1, saturation=1, hue=0.5, jitter_p=1, gray_p=1, blur_p=1, solarize_p=1, flip_p=1
)
EXACT = 0.01 / 255  # float32 rounding of a few operations on [0, 1]
TRUNCATED = 0.5 / 255  # a Gaussian cut at 3 sigma or later, on the sharpest edges there are


def images(size):
    """uint8 [B, 3, S, S], channels last: the flat, the saturated, the sharp, the smooth."""
    rng = np.random.default_rng(size)
    flat = [np.full((size, size, 3), c) for c in (0, 255, 128, (255, 0, 0), (0, 0, 255), (10, 200, 200), (127, 128, 0))]
    ramp = np.linspace(0, 255, size)
    ramps = np.stack((np.tile(ramp, (size, 1)), np.tile(ramp[::-1, None], (1, size)), np.full((size, size), 60.0)), -1)
    noise = rng.integers(0, 256, (size, size, 3))
    binary = 255 * rng.integers(0, 2, (size, size, 3))
    gray = np.repeat(rng.integers(0, 256, (size, size, 1)), 3, axis=2)
    stack = np.stack([*flat, ramps, noise, binary, gray, *photos(2, size)]).astype(np.uint8)
    return torch.from_numpy(stack).permute(0, 3, 1, 2)


def photos(num, size, seed=0):
    """Fields with the 1/f spectrum and the correlated channels of photographs, [num, S, S, 3] in 0..255."""
    rng = np.random.default_rng(seed)
    frequency = np.hypot(*np.meshgrid(np.fft.fftfreq(size), np.fft.fftfreq(size)))
    spectrum = np.fft.fft2(rng.normal(size=(num, 3, size, size))) / np.maximum(frequency, 1 / size)
    field = np.fft.ifft2(spectrum).real
    field = (field - field.mean((2, 3), keepdims=True)) / field.std((2, 3), keepdims=True)
    mixed = np.einsum("ij,njhw->nhwi", [[1, 0.5, 0], [1, 0, 0], [1, -0.5, 0.2]], field)
    return np.clip(rng.uniform(60, 190, (num, 1, 1, 3)) + 45 * mixed, 0, 255)


def draws_for(num, **changes):
    """Draws that do nothing, but for `changes`: one value for all images, or one each."""
    draws = Draws(
        box_B4=np.zeros((num, 4), np.int32),
        flip_B=np.zeros(num, bool),
        jitter_B=np.zeros(num, bool),
        order_B4=np.tile(ORDERS[0], (num, 1)),
        factor_B4=np.tile(np.float32([1, 1, 1, 0]), (num, 1)),
        gray_B=np.zeros(num, bool),
        sigma_B=np.zeros(num, np.float32),
        solarize_B=np.zeros(num, bool),
    )
    for name, value in changes.items():
        getattr(draws, name)[:] = value
    return draws


def in_batch(crops, draws, view, mean, std, dtype=torch.float32):
    views, tiles = augment(crops, to_tensors(draws, view, crops.device), view, mean, std, dtype=dtype)
    assert tiles is None
    return views


def in_rows(crops, draws, view, mean, std, dtype=torch.float32):
    out = torch.full_like(crops, math.nan, dtype=dtype, memory_format=torch.channels_last)
    augment_rows(crops, operations(draws, view), view, mean, std, range(len(crops)), out)
    return out


def torchvisions(crops, draws):
    """The same draws by torchvision.transforms.v2.functional on float images."""
    kernel_px = 2 * min(crops.shape[-1] - 1, 15) + 1  # 7 sigma and more, or the widest that reflection allows
    out = []
    for b, image in enumerate(crops):
        x = F.to_dtype(image, torch.float32, scale=True)
        if draws.jitter_B[b]:
            for op in draws.order_B4[b]:
                x = ADJUST[op](x, float(draws.factor_B4[b, op]))
        if draws.gray_B[b]:
            x = F.rgb_to_grayscale(x, num_output_channels=3)
        if draws.sigma_B[b] > 0:
            for kernel in ([kernel_px, 1], [1, kernel_px]):  # separable; together it takes torchvision 30 times as long
                x = F.gaussian_blur(x, kernel, [float(draws.sigma_B[b])] * 2)
        if draws.solarize_B[b]:
            x = F.solarize(x, 128 / 255)
        out.append(F.horizontal_flip(x) if draws.flip_B[b] else x)
    return torch.stack(out)


@pytest.fixture(autouse=True)
def _one_torch_thread():
    """As in the loader's workers. With more, small images cost their threads' wake-up many times over."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=[in_batch, in_rows])
def form(request):
    return request.param


def check(form, crops, draws, tolerance=EXACT, view=None):
    view = view or dataclasses.replace(EVERYTHING, size=crops.shape[-1])
    ours = form(crops, draws, view, **PLAIN)
    worst = (ours - torchvisions(crops, draws)).abs().amax((1, 2, 3))
    assert worst.max() <= tolerance, f"worst per image, in 1/255: {(worst * 255).tolist()}"


# --- op by op ---------------------------------------------------------------------------------------------------------


def one_factor(op, factor):
    factors = np.float32([1, 1, 1, 0])
    factors[op] = factor
    return {"jitter_B": True, "factor_B4": factors}


FACTORS = [0.0, 1e-4, 0.2, 0.6, 1.0, 1.4, 2.0, 5.0]
HUES = [0, 0.01, -0.01, 0.1, -0.1, 1 / 6, -1 / 6, 0.2, -0.2, 0.25, 1 / 3, -0.4, 0.5, -0.5]
OPERATIONS = {
    **{f"{name}-{f}": one_factor(op, f) for op, name in enumerate(("bright", "contrast", "sat")) for f in FACTORS},
    **{f"hue{hue:.2f}": one_factor(HUE, hue) for hue in HUES},
    "gray": {"gray_B": True},
    "solarize": {"solarize_B": True},
    "flip": {"flip_B": np.arange(len(images(32))) % 2 == 0},
    "factors without jitter": {"factor_B4": [0.5, 2, 2, 0.3]},
}


@pytest.mark.parametrize("changes", OPERATIONS.values(), ids=OPERATIONS)
def test_one_operation(form, changes):
    crops = images(32)
    check(form, crops, draws_for(len(crops), **changes))


def test_hue_on_every_corner_and_edge_of_the_colour_cube(form):
    """All colours with channels in five steps, where the piecewise linear form changes its pieces."""
    colours = np.array(list(itertools.product((0, 64, 128, 192, 255), repeat=3)))
    crop = torch.from_numpy(np.resize(colours, (12, 12, 3)).astype(np.uint8)).permute(2, 0, 1)
    crops = crop.expand(41, -1, -1, -1).contiguous(memory_format=torch.channels_last)
    draws = draws_for(41, jitter_B=True)
    draws.factor_B4[:, HUE] = np.linspace(-0.5, 0.5, 41)
    check(form, crops, draws)


@pytest.mark.parametrize("sigma", [0.1, 0.3, 0.7, 1.0, 1.5, 2.0])
@pytest.mark.parametrize("size", [7, 16, 18, 32, 33, 64, 100])
def test_blur(form, size, sigma):
    """Sizes below the kernel of 13, and sizes that do not divide into the blocks of the CPU form."""
    crops = images(size)
    check(form, crops, draws_for(len(crops), sigma_B=sigma), TRUNCATED)


def test_blur_keeps_the_mean_of_a_flat_image(form):
    crops = torch.full((1, 20, 20, 3), 200, dtype=torch.uint8).permute(0, 3, 1, 2)
    out = form(crops, draws_for(1, sigma_B=2.0), dataclasses.replace(EVERYTHING, size=20), **PLAIN)
    assert (out - 200 / 255).abs().max() < 1e-6


def test_solarize_starts_at_128(form):
    ramp = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).expand(1, 16, 16, 3).permute(0, 3, 1, 2)
    out = form(ramp, draws_for(1, solarize_B=True), dataclasses.replace(EVERYTHING, size=16), **PLAIN)
    expected = torch.arange(256).reshape(16, 16)
    expected = torch.where(expected >= 128, 255 - expected, expected)
    assert torch.equal((out[0, 0] * 255).round().long(), expected)


def test_nothing_drawn_is_normalisation_alone(form):
    crops = images(32)
    out = form(crops, draws_for(len(crops)), EVERYTHING, IMAGENET_MEAN, IMAGENET_STD)
    expected = F.normalize(crops.float() / 255, IMAGENET_MEAN, IMAGENET_STD)
    assert (out - expected).abs().max() < 1e-5


# --- together ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "factors", [(1.4, 1.4, 1.4, 0.1), (0.6, 0.6, 0.6, -0.1), (1.8, 0.2, 1.8, 0.2), (0.3, 1.7, 0.4, -0.5)]
)
@pytest.mark.parametrize("order", ORDERS.tolist(), ids=lambda order: "".join("bcsh"[op] for op in order))
def test_jitter_in_every_order(form, order, factors):
    crops = images(24)
    check(form, crops, draws_for(len(crops), jitter_B=True, order_B4=order, factor_B4=factors))


@pytest.mark.parametrize("zero", [BRIGHTNESS, CONTRAST, SATURATION])
@pytest.mark.parametrize("order", ORDERS.tolist(), ids=lambda order: "".join("bcsh"[op] for op in order))
def test_a_factor_of_zero_in_every_order(form, order, zero):
    factors = np.float32([1.5, 1.5, 1.5, 0.2])
    factors[zero] = 0
    crops = images(16)
    check(form, crops, draws_for(len(crops), jitter_B=True, order_B4=order, factor_B4=factors))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), size=st.sampled_from([18, 32, 41]))
def test_any_draws(seed, size):
    """Solarize is left out: where blur puts a pixel on its threshold, truncation decides which side it falls on."""
    crops = images(size)
    view = dataclasses.replace(EVERYTHING, size=size, gray_p=0.3, blur_p=0.5, flip_p=0.5, solarize_p=0)
    num = np.arange(len(crops))
    (draws,) = draw(ViewSpec((view,)), seed=seed, epoch=0, index_B=num, height_B=num + 9, width_B=num + 9)
    for form in (in_batch, in_rows):
        check(form, crops, draws, TRUNCATED, view)


@pytest.mark.parametrize("spec", [byol(48), multicrop(40, 24, photometry="swav", num_local=2)], ids=["byol", "swav"])
def test_the_forms_agree(spec):
    size = np.full(90, 300)
    all_draws = draw(spec, seed=1, epoch=2, index_B=np.arange(90), height_B=size, width_B=size)
    for view, draws in zip(spec.views, all_draws, strict=True):
        crops = torch.from_numpy(photos(90, view.size).astype(np.uint8)).permute(0, 3, 1, 2)
        a, b = (f(crops, draws, view, spec.mean, spec.std) for f in (in_batch, in_rows))
        off = (a - b).abs() > 1e-4
        # A pixel within rounding of solarize's threshold may fall on either side; nothing else may differ.
        assert off.float().mean() < 1e-5 and not off[~torch.from_numpy(draws.solarize_B)].any()


def test_pixels_are_distributed_as_torchvisions():
    """Mean, contrast, colour and sharpness of 2000 augmented photographs against torchvision's own random recipe."""
    num, size = 2000, 24
    crops = torch.from_numpy(photos(num, size, seed=3).astype(np.uint8)).permute(0, 3, 1, 2)
    spec = simsiam(1, size)
    side = np.full(num, 300)
    (draws,) = draw(spec, seed=0, epoch=0, index_B=np.arange(num), height_B=side, width_B=side)
    ours = in_rows(crops, draws, spec.views[0], **PLAIN)
    torch.manual_seed(0)
    recipe = v2.Compose(
        [
            v2.ToDtype(torch.float32, scale=True),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8),
            v2.RandomGrayscale(0.2),
            v2.RandomApply([v2.GaussianBlur(23, (0.1, 2.0))], p=0.5),
            v2.RandomHorizontalFlip(),
        ]
    )
    theirs = torch.stack([recipe(crop) for crop in crops])
    for name, statistic in {
        "mean of red": lambda x: x[:, 0].mean((1, 2)),
        "mean of green": lambda x: x[:, 1].mean((1, 2)),
        "mean of blue": lambda x: x[:, 2].mean((1, 2)),
        "contrast": lambda x: x.mean(1).std((1, 2)),
        "colourfulness": lambda x: (x.amax(1) - x.amin(1)).mean((1, 2)),
        "sharpness": lambda x: x.diff(dim=3).abs().mean((1, 2, 3)),
        "left against right": lambda x: x[..., : size // 2].mean((1, 2, 3)) - x[..., size // 2 :].mean((1, 2, 3)),
    }.items():
        a, b = statistic(ours).double(), statistic(theirs).double()
        error = (a.var() / num + b.var() / num).sqrt()
        assert (a.mean() - b.mean()).abs() < 4.5 * error, name
        assert abs(math.log(a.std() / b.std())) < 4.5 / math.sqrt(num), name


# --- output -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_output_is_channels_last_in_its_dtype(form, dtype):
    crops = images(32)
    draws = draws_for(
        len(crops), jitter_B=True, factor_B4=[1.2, 0.8, 1.3, 0.05], sigma_B=1.0, gray_B=np.arange(len(crops)) % 2
    )
    out = form(crops, draws, EVERYTHING, IMAGENET_MEAN, IMAGENET_STD, dtype)
    assert out.dtype == dtype and out.shape == crops.shape and out.is_contiguous(memory_format=torch.channels_last)
    expected = form(crops, draws, EVERYTHING, IMAGENET_MEAN, IMAGENET_STD)
    assert torch.equal(out, expected.to(dtype))


def test_rows_may_be_written_anywhere_and_no_others_are_written():
    crops, view = images(20), dataclasses.replace(EVERYTHING, size=20)
    draws = draws_for(len(crops), sigma_B=1.0)
    planar = torch.full(crops.shape, 7.0)
    augment_rows(crops.contiguous(), operations(draws, view), view, *PLAIN.values(), [1, 3], planar)
    assert (planar != 7).flatten(1).any(1).nonzero().flatten().tolist() == [1, 3]
    assert torch.equal(planar[[1, 3]], in_rows(crops, draws, view, **PLAIN)[[1, 3]])


# --- tiles ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_divide_cuts_tile_by_tile_down_the_columns(n, layout):
    x = torch.arange(2 * 3 * 12 * 6.0).reshape(2, 3, 12, 6).contiguous(memory_format=layout)
    tiles, (height, width) = divide(x, n), (12 // n, 6 // n)
    assert tiles.shape == (2 * n * n, 3, height, width) and tiles.is_contiguous(memory_format=torch.channels_last)
    for number, (column, row) in enumerate(itertools.product(range(n), range(n))):
        expected = x[:, :, height * row : height * (row + 1), width * column : width * (column + 1)]
        assert torch.equal(tiles[2 * number : 2 * number + 2], expected)


def test_divide_refuses_what_does_not_divide():
    for n in (0, 5):
        with pytest.raises(ValueError, match=f"12 x 10 px cannot be divided {n} x {n}"):
            divide(torch.zeros(1, 3, 12, 10), n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("n", [2, 3])
def test_rows_write_their_tiles(n, dtype):
    """Those of the rows asked for, in a batch that is shorter than the memory was made for."""
    view, num = dataclasses.replace(EVERYTHING, size=12), 5
    crops = images(12)[-num:]
    draws = draws_for(num, jitter_B=True, factor_B4=[1.2, 0.8, 1.3, 0.05], sigma_B=1.0)
    out = torch.full_like(crops, 7, dtype=dtype, memory_format=torch.channels_last)
    memory = torch.full((n * n * 8, 12 // n, 12 // n, 3), 7, dtype=dtype).permute(0, 3, 1, 2)
    tiles = memory[: n * n * num]
    augment_rows(crops, operations(draws, view), view, *PLAIN.values(), [1, 2, 4], out, tiles)
    assert torch.equal(out[[1, 2, 4]], in_rows(crops, draws, view, *PLAIN.values(), dtype)[[1, 2, 4]])
    assert torch.equal(tiles, divide(out, n))  # rows 0 and 3 are 7 in both
    assert (memory[n * n * num :] == 7).all()


# --- reproducible -----------------------------------------------------------------------------------------------------


@pytest.fixture
def many():
    """150 crops with SimSiam's draws."""
    spec, num = simsiam(1, 40), 150
    side = np.full(num, 300)
    (draws,) = draw(spec, seed=0, epoch=0, index_B=np.arange(num), height_B=side, width_B=side)
    crops = torch.from_numpy(photos(num, 40).astype(np.uint8)).permute(0, 3, 1, 2)
    return crops, draws, spec.views[0]


@pytest.mark.parametrize(("threads", "alone_below"), [(1, 128), (4, 0), (4, 128)])
def test_rows_and_threads_do_not_disturb_each_other(many, threads, alone_below, monkeypatch):
    """Bit for bit: scratch memory is reused, and nothing of one image may reach the next. Threads work all at once, as
    for large views, or in turn."""
    monkeypatch.setattr(loaders.augment.rows, "_ALONE_BELOW", alone_below)
    crops, draws, view = many
    expected = in_rows(crops, draws, view, **PLAIN)
    out = torch.full_like(expected, math.nan)

    def work(rows):
        augment_rows(crops, operations(draws, view), view, *PLAIN.values(), rows, out)

    parts = np.array_split(np.random.default_rng(0).permutation(len(crops)), 30)
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        list(pool.map(work, parts))
    assert torch.equal(out, expected)


def test_the_number_of_torch_threads_does_not_matter():
    """At a size at which torch would share one image among its threads."""
    crops = torch.from_numpy(photos(4, 224).astype(np.uint8)).permute(0, 3, 1, 2)
    draws = draws_for(4, jitter_B=True, factor_B4=[1.2, 1.3, 1.2, 0.1], sigma_B=1.5)
    view = dataclasses.replace(EVERYTHING, size=224)
    outs = []
    for num in (1, 2, 4):
        torch.set_num_threads(num)
        outs.append(in_rows(crops, draws, view, **PLAIN))
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


# --- on devices -------------------------------------------------------------------------------------------------------


def test_the_batch_form_never_looks_at_values():
    """On the meta device there are none: control flow that depends on data, or a transfer to the host, would raise."""
    spec = byol(32)
    side = np.full(4, 50)
    all_draws = draw(spec, seed=0, epoch=0, index_B=np.arange(4), height_B=side, width_B=side)
    crops = torch.empty(4, 3, 32, 32, dtype=torch.uint8, device="meta")
    for view, draws in zip(spec.views, all_draws, strict=True):
        out, tiles = augment(
            crops, to_tensors(draws, view, "meta"), view, spec.mean, spec.std, dtype=torch.float16, n=2
        )
        assert out.shape == crops.shape and out.is_contiguous(memory_format=torch.channels_last)
        assert tiles.shape == (16, 3, 16, 16) and tiles.is_contiguous(memory_format=torch.channels_last)


def device_case(device, batch_size=6, spec=None):
    spec = spec or multicrop(40, 24, num_local=1)
    side = np.full(batch_size, 300)
    draws = draw(spec, seed=0, epoch=0, index_B=np.arange(batch_size), height_B=side, width_B=side)
    crops = [torch.from_numpy(photos(batch_size, s).astype(np.uint8)).permute(0, 3, 1, 2) for s in spec.sizes]
    expected = [in_batch(c, d, v, spec.mean, spec.std) for c, d, v in zip(crops, draws, spec.views, strict=True)]
    return spec, [c.to(device) for c in crops], draws, expected


def test_device_augment_makes_all_views():
    spec, crops, draws, expected = device_case("cpu")
    views, tiles = DeviceAugment(spec, "cpu")(crops, draws)
    assert all(torch.equal(a, b) for a, b in zip(views, expected, strict=True)) and tiles is None
    views, tiles = DeviceAugment(dataclasses.replace(spec, divide=4), "cpu")(crops, draws)
    assert all(torch.equal(a, b) for a, b in zip(views, expected, strict=True))
    assert all(torch.equal(a, divide(b, 4)) for a, b in zip(tiles, expected, strict=True))


@pytest.mark.parametrize("batch_size", [6, 8, 9])
def test_device_augment_makes_large_batches_in_parts(batch_size):
    spec, crops, draws, expected = device_case("cpu", batch_size, dataclasses.replace(multicrop(40, 24), divide=2))
    device_augment, sizes = DeviceAugment(spec, "cpu", torch.bfloat16, at_once=4), []
    for view, function in list(device_augment._eager.items()):
        device_augment._eager[view] = lambda c, p, f=function: sizes.append(len(c)) or f(c, p)
    device_augment._fast = device_augment._eager
    views, tiles = device_augment(crops, draws)
    assert max(sizes) == 4
    for view, tile, all_crops, e in zip(views, tiles, crops, expected, strict=True):
        assert len(view) == len(all_crops) == batch_size and view.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(view, e.bfloat16()) and torch.equal(tile, divide(view, 2))


def test_device_augment_takes_a_short_last_batch():
    device_augment = DeviceAugment(evaluation(32), "cpu", torch.bfloat16)
    for batch_size in (6, 2):
        _, crops, draws, expected = device_case("cpu", batch_size, evaluation(32))
        (made,), _ = device_augment(crops, draws)
        assert torch.equal(made, expected[0].bfloat16())


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a compiler")
@pytest.mark.parametrize("spec", [simsiam(1, 40), byol(40), multicrop(24, 24)], ids=["simsiam", "byol", "multicrop"])
def test_compiled_whole_it_is_the_same(spec):
    spec, crops, draws, expected = device_case("cpu", spec=spec)
    compiled = torch.compile(augment, fullgraph=True, dynamic=False)
    distinct = {view: case for view, *case in zip(spec.views, crops, draws, expected, strict=True)}
    for view, (c, d, e) in distinct.items():
        out, tiles = compiled(c, to_tensors(d, view, "cpu"), view, spec.mean, spec.std, n=2)
        # Fused arithmetic rounds otherwise; a pixel on solarize's threshold may then fall on its other side.
        off = (out - e).abs() > 1e-4
        assert off.float().mean() < 1e-4 and not off[~torch.from_numpy(d.solarize_B)].any()
        assert out.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(tiles, divide(out, 2)) and tiles.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_agrees_and_never_waits():
    spec, crops, draws, expected = device_case("cuda", spec=dataclasses.replace(multicrop(40, 24), divide=2))
    device_augment = DeviceAugment(spec, "cuda")
    device_augment(crops, draws)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        views, tiles = device_augment(crops, draws)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for v, t, e, d in zip(views, tiles, expected, draws, strict=True):
        off = (v.cpu() - e).abs() > 1e-3
        assert off.float().mean() < 1e-4 and not off[~torch.from_numpy(d.solarize_B)].any()
        assert torch.equal(t, divide(v, 2)) and t.is_contiguous(memory_format=torch.channels_last)

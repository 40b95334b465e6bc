"""View specifications: the size, the crop and the photometry of every view that a method asks the loader for.

Pure description: no tensor and no random number here. `draw` turns it into parameters per sample, the
backends and `augment` apply those. The strengths mean what the arguments of torchvision's transforms mean."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from loaders.checks import need

# Channel statistics of ImageNet's training set in [0, 1]; every recipe here uses them, GSG's for CIFAR too.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

INTERPOLATIONS = ("bilinear", "bicubic")
PHOTOMETRIES = ("dino", "swav")


@dataclass(frozen=True)
class View:
    """One view: a random resized crop, then jitter, gray, blur, solarize and flip, each with its probability.

    `size` is the side in pixels; `scale` the crop's share of the image's area, `ratio` its width / height.
    `brightness`, `contrast`, `saturation` and `hue` are ColorJitter's strengths; `blur_sigma` is in pixels of
    the view. With `center` set, the view is for evaluation: the centred square with that fraction of the
    short side, and no random number is used."""

    size: int
    scale: tuple[float, float] = (0.2, 1.0)  # MoCo v2 and SimSiam
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # torchvision's default
    interpolation: str = "bilinear"
    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    jitter_p: float = 0.0
    gray_p: float = 0.0
    blur_p: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)  # SimCLR, Appendix A
    solarize_p: float = 0.0
    flip_p: float = 0.0
    center: float | None = None

    @property
    def blur_radius(self) -> int:
        """Radius in pixels of the widest kernel, truncated at 3 sigma; 0 without blur."""
        return math.ceil(3 * self.blur_sigma[1]) if self.blur_p > 0 else 0

    def validate(self) -> None:
        """Raise `UserError`, naming field and remedy, if this view cannot be made."""
        sigma = self.blur_sigma
        need(self.size >= 1, f"view size is {self.size} px: give a positive number of pixels")
        need(
            self.interpolation in INTERPOLATIONS,
            f"view interpolation is {self.interpolation!r}: choose one of {', '.join(INTERPOLATIONS)}",
        )
        need(
            0 < self.scale[0] <= self.scale[1] <= 1,
            f"view scale is {self.scale}: give shares of the area, 0 < low <= high <= 1",
        )
        need(0 < self.ratio[0] <= self.ratio[1], f"view ratio is {self.ratio}: give width / height, 0 < low <= high")
        for name in ("brightness", "contrast", "saturation"):
            value = getattr(self, name)
            need(0 <= value < math.inf, f"view {name} is {value}: give a strength of 0 or more")
        need(0 <= self.hue <= 0.5, f"view hue is {self.hue}: give a share of the colour circle, 0 to 0.5")
        for name in ("jitter_p", "gray_p", "blur_p", "solarize_p", "flip_p"):
            value = getattr(self, name)
            need(0 <= value <= 1, f"view {name} is {value}: give a probability, 0 to 1")
        need(0 < sigma[0] <= sigma[1] < math.inf, f"view blur_sigma is {sigma}: give pixels, 0 < low <= high")
        need(
            self.blur_radius < self.size,
            f"view blur_sigma {sigma} reaches {self.blur_radius} px, too far to reflect in a view of {self.size} px: "
            "lower blur_sigma or set blur_p to 0",
        )
        need(
            self.center is None or 0 < self.center <= 1,
            f"view center is {self.center}: give a fraction of the short side, 0 < center <= 1",
        )


# The photometry of MoCo v2 without its blur; the other recipes are changes to it.
_MOCO = View(224, brightness=0.4, contrast=0.4, saturation=0.4, hue=0.1, jitter_p=0.8, gray_p=0.2, flip_p=0.5)


@dataclass(frozen=True)
class ViewSpec:
    """K views of every image, `divide` x `divide` tiles of each of them, and the normalisation.

    `mean` and `std` are per channel, for pixels in [0, 1].
    """

    views: tuple[View, ...]
    divide: int = 1  # Fast-MoCo cuts 2 x 2 tiles
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __post_init__(self) -> None:
        object.__setattr__(self, "views", tuple(self.views))
        need(bool(self.views), "view specification has no views: give at least one")
        for view in self.views:
            view.validate()
        need(self.divide >= 1, f"divide is {self.divide}: give the tiles per side, 1 or more")
        for size in self.sizes:
            need(
                size % self.divide == 0, f"a view of {size} px does not divide into {self.divide} tiles: use a multiple"
            )
        need(
            len(self.mean) == len(self.std) == 3 and min(self.std) > 0,
            f"mean {self.mean}, std {self.std}: give one of each per channel (3), std above 0",
        )

    @property
    def K(self) -> int:
        """Number of views."""
        return len(self.views)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Side of each view in pixels."""
        return tuple(view.size for view in self.views)


def simsiam(K: int = 2, size: int = 224, *, interpolation: str = "bilinear", divide: int = 1) -> ViewSpec:
    """K equal views: the augmentation of MoCo v2 (Sec. 3), used unchanged by SimSiam and FastSiam.

    Fast-MoCo's is the same with `interpolation="bicubic"` and `divide=2`.
    """
    view = replace(_MOCO, size=size, scale=(0.2, 1.0), interpolation=interpolation, blur_p=0.5)
    return ViewSpec((view,) * K, divide=divide)


def byol(
    size: int = 224,
    *,
    K: int = 2,
    scale: tuple[float, float] = (0.08, 1.0),
    interpolation: str = "bicubic",
    blur: bool = True,
) -> ViewSpec:
    """Two kinds of views in turn (BYOL App. B): one always blurred, the other rarely, and solarized at times.

    MoCo v3's (its Sec. 3 and code) is the same with `interpolation="bilinear"`, for ResNet-50 with
    `scale=(0.2, 1)`. `blur=False` is the usual form for CIFAR.
    """
    view = replace(_MOCO, size=size, scale=scale, interpolation=interpolation, saturation=0.2)
    first = replace(view, blur_p=1.0 if blur else 0.0)
    second = replace(view, blur_p=0.1 if blur else 0.0, solarize_p=0.2)
    return ViewSpec(tuple((first, second)[i % 2] for i in range(K)))


def swav(
    K: int = 2, size: int = 224, *, scale: tuple[float, float] = (0.14, 1.0), interpolation: str = "bicubic"
) -> ViewSpec:
    """K equal views with strong jitter and without solarize (SwAV's code)."""
    strong = replace(_MOCO, brightness=0.8, contrast=0.8, saturation=0.8, hue=0.2)
    return ViewSpec((replace(strong, size=size, scale=scale, interpolation=interpolation, blur_p=0.5),) * K)


def multicrop(
    global_size: int = 224,
    local_size: int = 96,
    *,
    num_global: int = 2,
    num_local: int = 6,
    global_scale: tuple[float, float] = (0.14, 1.0),
    local_scale: tuple[float, float] = (0.05, 0.14),
    photometry: str = "dino",
    interpolation: str = "bicubic",
    blur: bool = True,
) -> ViewSpec:
    """A few large views and many small ones, large first (SwAV Sec. 3.3; sizes and scales are its defaults).

    `photometry="dino"`: BYOL's two for the large views in turn, blur with probability 0.5 for the small ones
    (DINO Appendix A). `photometry="swav"`: strong jitter and blur 0.5 everywhere, no solarize (SwAV's
    code).
    """
    need(
        photometry in PHOTOMETRIES,
        f"multicrop photometry is {photometry!r}: choose one of {', '.join(PHOTOMETRIES)}",
    )
    need(
        num_global >= 1 and num_local >= 0,
        f"multicrop has {num_global} global and {num_local} local views: give at least 1 and 0",
    )
    if photometry == "swav":
        spec = swav(num_global, global_size, scale=global_scale, interpolation=interpolation)
        if not blur:
            spec = replace(spec, views=tuple(replace(v, blur_p=0.0) for v in spec.views))
    else:
        spec = byol(global_size, K=num_global, scale=global_scale, interpolation=interpolation, blur=blur)
    return with_local(spec, num_local, local_size, local_scale)


def with_local(spec: ViewSpec, num: int, size: int, scale: tuple[float, float]) -> ViewSpec:
    """Add `num` small views to `spec`, as DINO (Appendix A) and SwAV make their local crops.

    They have the first view's photometry, but are never solarized; half of them are blurred, if that view ever is.
    """
    first = spec.views[0]
    local = replace(first, size=size, scale=scale, blur_p=0.5 if first.blur_p > 0 else 0.0, solarize_p=0.0)
    return replace(spec, views=spec.views + (local,) * num)


def cifar(K: int = 2, size: int = 32) -> ViewSpec:
    """K equal views for CIFAR, as in GSG's code: wider crops than SimSiam's, no blur, ImageNet statistics."""
    return ViewSpec((replace(_MOCO, size=size, scale=(0.08, 1.0)),) * K)


def evaluation(size: int, fraction: float = 0.875) -> ViewSpec:
    """The centred square of `fraction` of the short side; 0.875 is the usual resize to 256, crop of 224."""
    return ViewSpec((View(size, center=fraction),))


Recipe = Callable[[int], ViewSpec]  # the views that a method asks for, by their number; sizes and changes are set

# What a configuration's `recipe` names: K large views of `size` px.
RECIPES: dict[str, Callable[[int, int], ViewSpec]] = {
    "imagenet": simsiam,
    "fastmoco": lambda K, size: simsiam(K, size, interpolation="bicubic"),
    "byol": lambda K, size: byol(size, K=K),
    "mocov3": lambda K, size: byol(size, K=K, scale=(0.2, 1.0), interpolation="bilinear"),
    "swav": swav,
    "cifar": cifar,
    "cifar-byol": lambda K, size: byol(size, K=K, blur=False),
}

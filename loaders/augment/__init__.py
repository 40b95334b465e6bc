"""uint8 crops and draws -> normalised views, and their tiles for methods that want tiles.

Two forms of the same function. `batch.augment` works on a whole batch on any device, without data-dependent control
flow or host synchronisation, so that torch.compile fuses it. `rows.augment_rows` works on the CPU image by image, in
cache, and does only what was drawn. Both mean what torchvision.transforms.v2.functional means on float images in
[0, 1]: jitter in drawn order, gray, blur, solarize, flip, normalise. (Flipping first, as done here, gives the same
pixels.) `shared` holds what both need.

Legend: B images, 3 channels, S x S pixels, n x n tiles of s x s, P = n n B of them, R radius of the blur, N parameters
per image.
"""

from loaders.augment.batch import DeviceAugment, augment, to_tensors
from loaders.augment.rows import Operations, augment_rows, operations
from loaders.augment.shared import divide

__all__ = ["DeviceAugment", "Operations", "augment", "augment_rows", "divide", "operations", "to_tensors"]

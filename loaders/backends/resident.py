"""Everything decoded beforehand: the data set lies in memory as uint8 pixels, and a step only cuts.

On the host the pixels are one flat buffer, and crops are made as the CPU backend makes them, to the last bit. On a GPU
they lie in its memory, and all crops of a view are two batched matrix products. A resized crop is linear in the pixels
and separable,

    crop = R image C^T        R [S, H]: S output rows from H input rows, C [S, W] likewise for columns

with the weights of an antialiasing filter (Pillow's: the interpolation kernel, stretched by the scale where that is
above 1) in R and C, zero outside the box. Images of different sizes meet in one product because only the boxes'
pixels are gathered, with room for the largest box of the batch.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import numpy as np
import torch
from rich.progress import track

from loaders.backends import base, cpu
from loaders.beton import MODE_RAW, Sample
from loaders.dataset import Dataset
from loaders.errors import UserError
from loaders.job import Job
from loaders.machine import bytes_free

SHARE = 0.25  # of the free memory may be taken
_CHUNK = 256  # images per round of filling: what a progress bar and a staging buffer need
_ROUND = 32  # gathered boxes have sides that are multiples of this: few distinct shapes, little waste


def bytes_needed(reader: Dataset) -> int:
    """Bytes of all images as uint8 RGB."""
    return int((reader.height.astype(np.int64) * reader.width).sum()) * 3


class Backend(cpu.Backend):
    """The CPU backend without its decoder; on a GPU, products of matrices."""

    name = "resident"
    in_memory = True

    def setup(self) -> None:
        device, reader = self.device, self.reader
        super().setup()
        self.device = device
        need, free = bytes_needed(reader), bytes_free(device)
        if free and need > 0.9 * free:
            raise UserError(
                f"--backend resident: {len(reader)} images decoded are {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are "
                f"free on {device}: use --backend cpu, or convert with --max-side"
            )
        pixels = reader.height.astype(np.int64) * reader.width
        self.start_N = np.concatenate(([0], np.cumsum(pixels)))  # of each image, in pixels
        self.bad: dict[int, str] = {}
        self.pixels_P3 = torch.empty(int(self.start_N[-1]), 3, dtype=torch.uint8, device=device)
        self._fill()
        if device.type == "cuda":
            self.start_on_device = torch.from_numpy(self.start_N).to(device)
            self.width_on_device = torch.from_numpy(reader.width.astype(np.int64)).to(device)

    def _fill(self) -> None:
        """Decode every image once."""
        num = len(self.reader)
        chunks = range(0, num, _CHUNK)
        show = sys.stderr.isatty() and num > 10 * _CHUNK
        for first in track(chunks, "decoding into memory", transient=True) if show else chunks:
            ids = range(first, min(first + _CHUNK, num))
            self.reader.will_need(np.arange(ids.stop, min(ids.stop + _CHUNK, num)))
            begin, end = int(self.start_N[ids.start]), int(self.start_N[ids.stop])
            target = self.pixels_P3[begin:end]
            if self.device.type == "cuda":
                target = torch.empty(end - begin, 3, dtype=torch.uint8)
            list(self.pool.map(lambda i, t=target, b=begin: self._decode_into(i, t, b), ids))
            if self.device.type == "cuda":
                self.pixels_P3[begin:end].copy_(target)

    def _decode_into(self, index: int, target_P3: torch.Tensor, begin: int) -> None:
        try:
            image_HW3 = cpu.decode(self.reader[index])
        except ValueError as error:
            self.bad[index] = str(error)
            return
        start, end = int(self.start_N[index]) - begin, int(self.start_N[index + 1]) - begin
        target_P3[start:end].numpy()[:] = image_HW3.reshape(-1, 3)

    def decoded_bytes(self) -> int:
        return self.pixels_P3.numel()

    def sample(self, index: int) -> Sample:
        """The decoded image as raw pixels. Raises ValueError, with the decoder's reason, for a broken one."""
        if index in self.bad:
            raise ValueError(self.bad[index])
        pixels = self.pixels_P3[int(self.start_N[index]) : int(self.start_N[index + 1])].numpy().reshape(-1)
        return Sample(pixels, int(self.reader.height[index]), int(self.reader.width[index]), 0, MODE_RAW)

    def start(self, job: Job) -> base.Pending:
        if self.device.type == "cpu":
            return super().start(job)
        for row in range(len(job.index_B)):
            while (index := int(job.index_B[row])) in self.bad:
                job.replace(row, self.bad[index])
        packed = np.stack([job.index_B, *(side for draws in job.draws for side in draws.box_B4.T)])
        index_B, *sides = torch.from_numpy(packed).pin_memory().to(self.device, non_blocking=True)
        start_B, width_B = self.start_on_device[index_B], self.width_on_device[index_B]
        for k, (view, draws, crops) in enumerate(zip(self.spec.views, job.draws, job.crops, strict=True)):
            height, width = (-(-int(side) // _ROUND) * _ROUND for side in draws.box_B4[:, 2:].max(0))
            box = sides[4 * k : 4 * k + 4]
            resampled_crops(self.pixels_P3, start_B, width_B, box, (height, width), view.interpolation, out=crops)
        self.stats.add(images=len(job.index_B))
        return base.Pending()


def resampled_crops(
    pixels_P3: torch.Tensor,
    start_B: torch.Tensor,
    width_B: torch.Tensor,
    box: Sequence[torch.Tensor],
    room: tuple[int, int],
    interpolation: str,
    *,
    out: torch.Tensor,
) -> None:
    """Fill `out` [B, 3, S, S], uint8, with the boxes of B images that lie in `pixels_P3`; no host sync.

    start_B: first pixel of each image; width_B: pixels per row; box: top, left, height, width [B] each; room: height
    and width that hold the largest box.
    """
    top_B, left_B, height_B, width_of_box_B = box
    size, device = out.shape[-1], out.device
    rows_BH = top_B[:, None] + torch.minimum(torch.arange(room[0], device=device), height_B[:, None] - 1)
    columns_BW = left_B[:, None] + torch.minimum(torch.arange(room[1], device=device), width_of_box_B[:, None] - 1)
    at_BHW = (start_B[:, None] + rows_BH * width_B[:, None])[:, :, None] + columns_BW[:, None, :]
    # Whole numbers up to 255 are exact in half precision; what the products round is below 0.1/255.
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    image_B3HW = pixels_P3[at_BHW].permute(0, 3, 1, 2).to(dtype)
    r_BSH = resample_weights(height_B, size, room[0], interpolation).to(dtype)
    c_BSW = resample_weights(width_of_box_B, size, room[1], interpolation).to(dtype)
    crops = r_BSH[:, None] @ image_B3HW @ c_BSW[:, None].mT
    out.copy_(crops.round_().clamp_(0, 255))


def resample_weights(side_B: torch.Tensor, size: int, room: int, interpolation: str) -> torch.Tensor:
    """Weights [B, S, room] that resample the first `side_B` of `room` pixels to S, antialiased as Pillow does it."""
    scale_B11 = (side_B.float() / size)[:, None, None]
    stretch = scale_B11.clamp(min=1)
    x = torch.arange(room, device=side_B.device) + 0.5
    centre = (torch.arange(size, device=side_B.device)[:, None] + 0.5) * scale_B11
    distance = (x - centre).abs() / stretch
    if interpolation == "bilinear":
        weights = (1 - distance).clamp(min=0)
    else:  # Keys' cubic with a = -0.5
        near = (1.5 * distance - 2.5) * distance * distance + 1
        far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
        weights = torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))
    weights = torch.where(x < side_B[:, None, None], weights, 0.0)
    return weights / weights.sum(2, keepdim=True)

"""FFCV's JPEG decoder in the threads of the CPU backend: the very pixels that FFCV's own Loader decodes from this file.

What is taken from FFCV 1.0.2 is libffcv's `imdecode` (TurboJPEG with its fast DCT), called directly: ctypes lets go of
the interpreter lock, so nothing has to be compiled first, and what it returns, which FFCV itself drops, is looked at.
Crops are those of the CPU backend. FFCV's resizer (OpenCV's INTER_AREA) cannot stand in: against Pillow it is up to
4/255 off where ImageNet crops shrink to 224 px and 7/255 where they are enlarged, next to nearest neighbours.

FFCV's Loader stays out. It wants the ids of a whole epoch in advance and hands out buffers it reuses; with an operation
that decodes once and crops four times by our boxes it takes 1.9 x this backend's CPU time per view. Its memory manager
takes 3.6 s and 0.6 GB to open a file of ImageNet's size. Importing ffcv (numba, mostly) takes 3 s here, too.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from loaders.backends import cpu
from loaders.beton import MODE_JPEG, Sample
from loaders.jpeg import jpeg_head


def _imdecode() -> Callable[..., int]:
    """Import libffcv's decoder. Raises whatever importing ffcv raises."""
    threads = torch.get_num_threads()
    try:
        from ffcv.libffcv import imdecode
    finally:
        torch.set_num_threads(threads)  # importing ffcv sets torch to one thread
    return imdecode


class Backend(cpu.Backend):
    """The CPU backend with FFCV's decoder."""

    name = "ffcv"

    @classmethod
    def missing(cls, device: torch.device) -> str | None:
        """The reason why ffcv, or the system's OpenCV and TurboJPEG that it needs, cannot be used."""
        del device
        try:
            _imdecode()
        except Exception as error:  # no ffcv or numba, libraries that are not there, versions that do not go together
            reason = str(error).split("\n", 1)[0]
            return (
                f"importing ffcv fails ({type(error).__name__}: {reason}); run tools/install_ffcv.sh, which installs "
                "ffcv 1.0.2 and the system's OpenCV and TurboJPEG that it needs, or use --backend cpu"
            )
        return None

    def setup(self) -> None:
        self.imdecode = _imdecode()
        super().setup()

    def decode(self, sample: Sample) -> np.ndarray:
        """The pixels as FFCV decodes them; raises ValueError where `cpu.decode` does."""
        data, height, width = sample.jpeg, sample.height, sample.width
        head = jpeg_head(data.tobytes()) if sample.mode == MODE_JPEG else None
        # FFCV would scale a picture of another size than the record's, without a word.
        if head is not None and (head.height, head.width) == (height, width):
            image_HW3 = np.empty((height, width, 3), np.uint8)
            if self.imdecode(data, image_HW3, height, width, height, width) == 0:
                return image_HW3
        # Raw pixels, or TurboJPEG objects. It does so for less than the CPU backend (bytes between segments, CMYK),
        # whose word counts, so that a sample is broken for both or for neither.
        return cpu.decode(sample)

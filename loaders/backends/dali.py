"""NVIDIA DALI: on a GPU, nvJPEG (and the JPEG engine of data-centre cards) decodes, and crops never leave the device.

One decode per image, then for each view a cut of its box and an antialiased resize. The cut is a copy, 0.2 ms per view
on a CPU, but DALI's `resize(roi_start=, roi_end=)` blends in pixels from outside the box along its edges.

The pipeline takes any number of batches at once and makes them in order, in threads of its own: `start` feeds it, and
`wait` takes what it has made. Output memory is counted by reference (the dynamic executor, asked for by name below): a
batch is given to torch without a copy, and stays until nobody holds it. An error stays with its batch; those after it
are whole.

On the host this is for tests: it decodes with libjpeg-turbo, bit for bit, but decoding and 4 crops of 224 px take 3.4
times the CPU backend's time, most of it in the resize. `use_fast_idct` gains nothing and is 1.1/255 off.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from loaders.backends import base
from loaders.backends.cpu import decode
from loaders.beton import MODE_RAW, Sample
from loaders.errors import UserError
from loaders.job import Job

_PACKAGES = "pip install nvidia-dali-cuda130 (nvidia-dali-cuda120 for drivers before 580)"
_OLDEST = (2, 2)  # `decoders.image` has `adjust_orientation`, which 1.42 had not


def encoded(sample: Sample, *, as_pixels: bool = False) -> np.ndarray:
    """The bytes that DALI's decoder gets, uint8: the JPEG as it lies in the file's map, or pixels after a PPM header.

    `as_pixels`: decoded here; raises ValueError for what does not decode.
    """
    if sample.mode == MODE_RAW:
        pixels = sample.jpeg
    elif as_pixels:
        pixels = decode(sample).reshape(-1)
    else:
        return sample.jpeg
    header = f"P6 {sample.width} {sample.height} 255\n".encode()
    return np.concatenate((np.frombuffer(header, np.uint8), pixels))


class Scheduled(base.Pending):
    """A batch in DALI's queue."""

    def __init__(self, backend: Backend, job: Job):
        self.backend, self.job = backend, job
        self.blobs: list[np.ndarray] = []  # what DALI reads, without a copy
        self.as_pixels = False
        self.outputs: Sequence[Any] = ()  # K TensorLists of crops and one of image sizes
        self.error: RuntimeError | None = None
        self.finished = False

    def done(self) -> bool:
        """Say if it was waited for: DALI cannot be asked if it would answer at once."""
        return self.finished

    def wait(self) -> None:
        """Block until the crops are there; on a GPU, until the current stream may use them, which waits for no kernel.

        They are safe on that stream, and may be dropped once the work on them has run.
        """
        start = time.perf_counter()
        while not self.finished:
            while not self.outputs and self.error is None:
                self.backend.collect()
            if len(suspects := self._suspects()):
                self._mend(suspects)
                continue
            self.job.crops = [torch.from_dlpack(o.as_tensor()).permute(0, 3, 1, 2) for o in self.outputs[:-1]]
            self.outputs, self.finished = (), True
            # What DALI's threads spend is not to be had; while it is waited for, they are what limits.
            waited = (time.perf_counter() - start) * self.backend.workers
            self.backend.stats.add(images=len(self.job.index_B), decode=waited)

    def _suspects(self) -> Sequence[int]:
        """Rows that may be broken: all where DALI raised, as it seldom says which; else those of an unexpected size."""
        index_B, reader = self.job.index_B, self.job.reader
        if self.error is not None:
            return range(len(index_B))
        size_B2 = np.array(self.outputs[-1].as_tensor())[:, :2]
        expected_B2 = np.stack((reader.height[index_B], reader.width[index_B]), axis=1)
        return np.flatnonzero((size_B2 != expected_B2).any(axis=1)).tolist()

    def _mend(self, rows: Sequence[int]) -> None:
        """Put other samples in the place of broken ones and have the batch made again.

        What DALI refuses is broken if the CPU backend's decoder refuses it, too, with that one's reason. If it finds
        nothing wrong, DALI is given the pixels that it decodes.
        """
        if self.as_pixels and self.error is not None:
            raise self.error
        job, replaced = self.job, False
        for row in rows:
            while True:
                try:
                    decode(job.reader[int(job.index_B[row])])
                    break
                except ValueError as error:
                    job.replace(row, str(error))
                    replaced = True
        self.as_pixels = not replaced
        self.backend.schedule(self)


class Backend(base.Backend):
    """A DALI pipeline that decodes, cuts and resizes."""

    name = "dali"
    owns_crops = True

    @classmethod
    def missing(cls, device: torch.device) -> str | None:
        """The reason why DALI, or the GPU that it is wanted for, cannot be used."""
        try:
            import nvidia.dali.fn
        except ImportError as error:
            return f"importing NVIDIA DALI fails ({error}): {_PACKAGES}"
        version = nvidia.dali.__version__
        if tuple(map(int, version.split(".")[:2])) < _OLDEST:
            return f"DALI {version} is too old, {'.'.join(map(str, _OLDEST))} is needed: {_PACKAGES}"
        if device.type == "cuda" and not torch.cuda.is_available():
            return "PyTorch finds no CUDA device: use --device cpu"
        return None

    def setup(self) -> None:
        if self.device.type == "cuda" and self.device.index is None:
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.scheduled: deque[Scheduled] = deque()
        try:
            self.pipeline = self._build(self.batch_size)
        except RuntimeError as error:  # an old driver, no room on the device, a library that is not there
            reason = " ".join(str(error).split())
            raise UserError(f"DALI does not start on {self.device}, use --backend cpu: {reason}") from error

    def _build(self, batch_size: int) -> Any:
        from nvidia.dali import Pipeline, fn, types

        on_gpu = self.device.type == "cuda"
        kinds = {"bilinear": types.DALIInterpType.INTERP_LINEAR, "bicubic": types.DALIInterpType.INTERP_CUBIC}
        options: dict[str, Any] = {"device": "mixed" if on_gpu else "cpu", "adjust_orientation": False}
        if on_gpu:
            options |= {
                # As libjpeg-turbo and Pillow do it. The default repeats pixels of subsampled colour.
                "jpeg_fancy_upsampling": True,
                # The JPEG engine, where there is one, takes all it can: it is idle otherwise, while host threads and
                # multiprocessors have other work. At 0.9 DALI's authors measured 256 images in 17.7 ms, at their
                # default of 0.65 in 15.6, yet the training beside it ran 2 % faster (NVIDIA/DALI#6366).
                "hw_decoder_load": 1.0,
                # Threads tied to cores 0, 1, ... would meet those of the other processes of a node there.
                "affine": False,
            }
        pipeline = Pipeline(
            batch_size=batch_size,
            num_threads=self.workers,
            device_id=self.device.index if on_gpu else None,
            prefetch_queue_depth=1,  # batches that the first call starts; how many run at once is up to the caller
            exec_dynamic=True,
        )
        with pipeline:
            jpeg = fn.external_source(name="jpeg", dtype=types.DALIDataType.UINT8, ndim=1, no_copy=True)
            image = fn.decoders.image(jpeg, **options)
            crops = []
            for k, view in enumerate(self.spec.views):
                corner, extent = (
                    fn.external_source(name=f"{name}{k}", dtype=types.DALIDataType.INT32, ndim=1)
                    for name in ("corner", "extent")
                )
                region = fn.slice(image, start=corner, shape=extent, axes=(0, 1))
                size = (view.size, view.size)
                crops.append(fn.resize(region, size=size, interp_type=kinds[view.interpolation], antialias=True))
            pipeline.set_outputs(*crops, image.shape())
        pipeline.build()
        return pipeline

    def start(self, job: Job) -> base.Pending:
        work = Scheduled(self, job)
        self.schedule(work)
        return work

    def schedule(self, work: Scheduled) -> None:
        """Feed a batch to DALI, to be made after those that are under way."""
        start = time.perf_counter()
        job = work.job
        work.outputs, work.error = (), None
        work.blobs = [encoded(self.reader[i], as_pixels=work.as_pixels) for i in job.index_B.tolist()]
        self.pipeline.feed_input("jpeg", work.blobs)
        for k, draws in enumerate(job.draws):
            self.pipeline.feed_input(f"corner{k}", np.ascontiguousarray(draws.box_B4[:, :2]))
            self.pipeline.feed_input(f"extent{k}", np.ascontiguousarray(draws.box_B4[:, 2:]))
        self.pipeline.schedule_run()
        self.scheduled.append(work)
        self.stats.add(read=time.perf_counter() - start)

    def collect(self) -> None:
        """Take what DALI has made of the oldest batch. Blocks until the host's part of it is done."""
        work = self.scheduled.popleft()
        stream = torch.cuda.current_stream(self.device) if self.device.type == "cuda" else None
        try:
            work.outputs = self.pipeline.outputs(cuda_stream=stream)
        except RuntimeError as error:
            work.error = error
        work.blobs = []

    def close(self) -> None:
        """End DALI's threads and give its memory back."""
        while self.scheduled:
            self.collect()
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # somebody may still read crops whose memory is about to go
        self.pipeline = None
        if self.device.type == "cuda":
            from nvidia.dali import backend

            with contextlib.suppress(RuntimeError):
                backend.ReleaseUnusedMemory()  # type: ignore[attr-defined]  # its stubs lack it

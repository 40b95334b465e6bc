"""What only the FFCV backend does; what all backends have in common is in test_backends.py."""

from __future__ import annotations

import gc
import io
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import jpeg_bytes, photo, write_beton

from loaders import UserError, backends
from loaders.backends import cpu
from loaders.backends.ffcv import Backend
from loaders.beton import MODE_RAW, Reader, Sample, Writer
from loaders.job import Job
from loaders.stats import Stats
from loaders.views import evaluation

CPU = torch.device("cpu")


@pytest.fixture
def real_ffcv() -> Iterator[None]:
    missing = Backend.missing(CPU)
    if missing:
        pytest.skip(missing)
    yield
    gc.collect()  # numba's finalizers run now, not while some module is being parsed; see test_ffcv_interop.py


def open_backend(path: Path, size: int, batch_size: int) -> Backend:
    spec = evaluation(size, fraction=1.0)  # the centred square, whole
    return Backend(Reader(path), spec, batch_size=batch_size, device=CPU, workers=2, stats=Stats())


@pytest.mark.ffcv
@pytest.mark.usefixtures("real_ffcv")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_pixels_are_those_of_ffcvs_own_loader(tmp_path: Path) -> None:
    """To the last bit, JPEG and raw: squares are cropped whole at their own size."""
    from test_ffcv_interop import load_ffcv

    num, size, path = 12, 48, tmp_path / "squares.beton"
    rng = np.random.default_rng(0)
    with Writer(path, num) as writer:
        for i in range(num):
            image = photo(rng, size, size)
            raw, subsampling = i % 4 == 3, i % 3
            blob = image.tobytes() if raw else jpeg_bytes(image, subsampling=subsampling, quality=60)
            writer.add(blob, size, size, i, mode=MODE_RAW if raw else 0)
    theirs, _ = load_ffcv(path)
    backend, index = open_backend(path, size, num), np.arange(num)
    crops = [torch.empty(num, size, size, 3, dtype=torch.uint8).permute(0, 3, 1, 2)]
    job = Job(backend.reader, backend.spec, index, crops, backend.stats)
    backend.start(job).wait()
    backend.close()
    np.testing.assert_array_equal(job.crops[0].permute(0, 2, 3, 1), theirs)
    jpeg = cpu.decode(backend.reader[0])
    assert (theirs[0] != jpeg).any()  # the other decoder's pixels are others


def outcome(decode: Callable, blob: bytes, height: int, width: int) -> np.ndarray | str:
    """Pixels, or the reason there are none."""
    data = np.frombuffer(bytearray(blob), np.uint8)
    try:
        return decode(Sample(data, height, width, 0))
    except ValueError as error:
        return str(error)


@pytest.mark.ffcv
@pytest.mark.usefixtures("real_ffcv")
def test_the_cpu_backend_judges_what_turbojpeg_objects_to(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    image = photo(rng, 60, 90)
    whole, cmyk = jpeg_bytes(image), io.BytesIO()
    image.convert("CMYK").save(cmyk, "JPEG")
    half = whole[: len(whole) // 2]
    decodable = {
        "CMYK": (cmyk.getvalue(), 60, 90),
        "ends too early": (half + b"\xff\xd9", 60, 90),  # gray below; libjpeg warns and goes on
    }
    broken = {
        "cut short": (half, 60, 90),
        "without an end": (whole[:-2], 60, 90),
        "no JPEG": (bytes(500), 60, 90),
        "turned": (whole, 90, 60),
        "half the size recorded": (whole, 120, 180),
        "twice the size recorded": (whole, 30, 45),
    }
    backend = open_backend(write_beton(tmp_path / "any.beton", 1), 8, 1)
    for name, case in (decodable | broken).items():
        ours, expected = outcome(backend.decode, *case), outcome(cpu.decode, *case)
        assert isinstance(expected, str) == (name in broken), name
        np.testing.assert_array_equal(ours, expected, err_msg=name)
    ours, expected = outcome(backend.decode, whole, 60, 90), outcome(cpu.decode, whole, 60, 90)
    assert 0 < np.abs(ours.astype(int) - expected).mean() < 2.5  # FFCV's own, where all is well
    backend.close()


@pytest.fixture
def fake_ffcv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Put a package called ffcv in front of the real one, if there is one."""

    def install(init: str) -> None:
        package = tmp_path / "ffcv"
        package.mkdir()
        (package / "__init__.py").write_text(init)
        (package / "libffcv.py").write_text("def imdecode(*_): return 0")
        for name in [n for n in sys.modules if n.split(".")[0] == "ffcv"] + ["ffcv", "ffcv.libffcv"]:
            monkeypatch.setitem(sys.modules, name, None)  # so that what is there now comes back
            del sys.modules[name]
        monkeypatch.syspath_prepend(tmp_path)

    return install


@pytest.mark.parametrize(
    ("init", "reason"),
    [
        ("raise ModuleNotFoundError(\"No module named 'ffcv'\")", "No module named 'ffcv'"),
        ("import numba_that_is_not_there", "numba_that_is_not_there"),
        ("raise ImportError('libturbojpeg.so.0: cannot open shared object file\\nmore')", "libturbojpeg"),
        ("raise OSError('libopencv_core.so.406: cannot open shared object file')", "libopencv_core"),
    ],
)
def test_a_missing_ffcv_is_said_in_one_line(fake_ffcv: Callable[[str], None], init: str, reason: str) -> None:
    fake_ffcv(init)
    missing = Backend.missing(CPU)
    assert reason in missing and "tools/install_ffcv.sh" in missing and "\n" not in missing
    with pytest.raises(UserError, match=r"tools/install_ffcv\.sh"):
        backends.load("ffcv", CPU)


@pytest.mark.parametrize("end", ["", "\nraise ImportError"])
def test_torch_keeps_its_threads(fake_ffcv: Callable[[str], None], end: str) -> None:
    """Importing ffcv sets torch to one thread, also when it fails later on."""
    fake_ffcv(f"import torch\ntorch.set_num_threads(1){end}")
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert (Backend.missing(CPU) is None) == (end == "")
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)

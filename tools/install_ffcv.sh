#!/bin/sh
# Install FFCV 1.0.2 into the Python environment given as PYTHON (default: python3), for the `ffcv` backend and tests.
# Usage: PYTHON=.venv/bin/python tools/install_ffcv.sh      (Debian or Ubuntu; needs root for apt-get, and a C++ compiler)
set -eu

python=${PYTHON:-python3}
[ "$(id -u)" = 0 ] && sudo= || sudo=sudo

# FFCV compiles against the system's OpenCV and libjpeg-turbo.
if ! pkg-config --exists opencv4 libturbojpeg 2>/dev/null; then
    $sudo apt-get update
    $sudo apt-get install -y --no-install-recommends g++ libturbojpeg0-dev libopencv-dev pkg-config
fi

# Its declared requirements name packages it does not use (and would move torch), so: those it imports, then itself alone.
"$python" -m pip install numba opencv-python-headless tqdm setuptools
"$python" -m pip install --no-deps --no-build-isolation ffcv==1.0.2
"$python" -c 'import ffcv, torch; print("ffcv", ffcv.__version__, "with torch", torch.__version__)'

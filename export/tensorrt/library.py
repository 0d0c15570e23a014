"""The door of `tensorrt` and `tensorrt_rtx`: their bindings share every name that is used here.

It owns importing them and what this machine gives them (a CUDA driver, a GPU); it knows nothing of builds or of plans.
"""

import ctypes
import importlib
from functools import cache
from typing import Any, Literal, cast

Library = Literal["tensorrt", "tensorrt_rtx"]
PACKAGES: dict[Library, str] = {"tensorrt": "tensorrt", "tensorrt_rtx": "tensorrt-rtx"}
"""What to give pip."""
RTX: Library = "tensorrt_rtx"
# CUdevice_attribute of the driver's API.
COMPUTE_CAPABILITY_MAJOR, COMPUTE_CAPABILITY_MINOR = 75, 76


def load(library: Library) -> Any:
    """The bindings' module, which has no types."""
    try:
        return cast(Any, importlib.import_module(library))
    except (ImportError, OSError) as error:  # the module, or a shared library that it opens
        raise ValueError(f"{library} cannot be imported ({error}); pip install {PACKAGES[library]}") from None


def version(library: Library) -> str:
    return str(load(library).__version__)


@cache
def has_driver() -> bool:
    """Whether this machine has a CUDA driver that finds a GPU; asked of the driver, so that no CUDA torch is needed."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    count = ctypes.c_int(0)
    return driver.cuInit(0) == 0 and driver.cuDeviceGetCount(ctypes.byref(count)) == 0 and count.value > 0


def architecture(device: int = 0) -> str:
    """Compute capability of a GPU of this machine, as `sm90`."""
    driver, handle = _gpu(device)
    major, minor = ctypes.c_int(), ctypes.c_int()
    driver.cuDeviceGetAttribute(ctypes.byref(major), COMPUTE_CAPABILITY_MAJOR, handle)
    driver.cuDeviceGetAttribute(ctypes.byref(minor), COMPUTE_CAPABILITY_MINOR, handle)
    return f"sm{major.value}{minor.value}"


def gpu_name(device: int = 0) -> str | None:
    """As NVIDIA names it, None where this machine has no GPU."""
    if not has_driver():
        return None
    driver, handle = _gpu(device)
    name = ctypes.create_string_buffer(256)
    driver.cuDeviceGetName(name, len(name), handle)
    return name.value.decode()


def _gpu(device: int) -> tuple[Any, ctypes.c_int]:
    if not has_driver():
        raise ValueError("this machine has no CUDA driver that finds a GPU; run this on one that has")
    driver, handle = cast(Any, ctypes.CDLL("libcuda.so.1")), ctypes.c_int()
    if driver.cuDeviceGet(ctypes.byref(handle), device):
        raise ValueError(f"GPU {device} is not there; name one that nvidia-smi lists")
    return driver, handle

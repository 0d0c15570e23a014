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
    if not has_driver():
        raise ValueError("this machine has no CUDA driver that finds a GPU, so it has no architecture; run it on one")
    driver = ctypes.CDLL("libcuda.so.1")
    handle, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    results = (
        driver.cuDeviceGet(ctypes.byref(handle), device),
        driver.cuDeviceGetAttribute(ctypes.byref(major), 75, handle),  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
        driver.cuDeviceGetAttribute(ctypes.byref(minor), 76, handle),
    )
    if any(results):
        raise ValueError(f"GPU {device} is not there (CUDA errors {results}); name one that nvidia-smi lists")
    return f"sm{major.value}{minor.value}"

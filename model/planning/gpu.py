"""The accelerators that a plan, or a run's utilisation, is reckoned against: one table for the whole project.

It owns their figures and where those come from; it knows nothing of networks or of what runs on them.
"""

from dataclasses import dataclass
from typing import Literal

GIB = 1 << 30


@dataclass(slots=True, frozen=True, kw_only=True)
class Gpu:
    """One accelerator and its place in a usual machine."""

    name: str
    card: str
    """What the driver's name for it contains."""
    memory: int
    """Bytes that PyTorch reports as its total: what the data sheet says, less what the driver holds."""
    bf16: float
    """Dense bfloat16 operations a second, by the maker's data sheet: the peak of MFU."""
    fp32: float
    """The same of float32 outside the tensor cores, as PyTorch multiplies float32 unless told otherwise."""
    matmul: float
    """Share of the bfloat16 peak that the best matrix product reaches (mamf-finder, ml-engineering by S. Bekman)."""
    bandwidth: float
    """Bytes a second of its memory."""
    link: float
    """Bytes a second to the others of its machine, each way: NVLink, or PCIe without it."""
    network: float
    """Bytes a second to other machines, each way and for one card: its own 400 Gb/s port unless it has less."""
    node: int = 8
    """Cards in a machine."""

    def peak(self, precision: Literal["fp32", "bf16"]) -> float:
        return self.bf16 if precision == "bf16" else self.fp32


_TABLE = (
    Gpu(
        name="b200",
        card="B200",
        memory=int(178.35 * GIB),
        bf16=2250e12,
        fp32=75e12,
        matmul=0.776,
        bandwidth=7.7e12,
        link=900e9,
        network=50e9,
    ),
    Gpu(
        name="h200",
        card="H200",
        memory=int(139.80 * GIB),
        bf16=989.4e12,
        fp32=67e12,
        matmul=0.803,
        bandwidth=4.8e12,
        link=450e9,
        network=50e9,
    ),
    Gpu(
        name="h100_pcie",
        card="H100 PCIe",
        memory=int(79.19 * GIB),
        bf16=756e12,
        fp32=51e12,
        matmul=0.803,
        bandwidth=2.0e12,
        link=64e9,
        network=25e9,
    ),
    Gpu(
        name="h100",
        card="H100",
        memory=int(79.18 * GIB),
        bf16=989.4e12,
        fp32=67e12,
        matmul=0.803,
        bandwidth=3.35e12,
        link=450e9,
        network=50e9,
    ),
    Gpu(
        name="a100",
        card="A100",
        memory=int(79.15 * GIB),
        bf16=312e12,
        fp32=19.5e12,
        matmul=0.869,
        bandwidth=2.0e12,
        link=300e9,
        network=25e9,
    ),
    Gpu(
        name="l40s",
        card="L40S",
        memory=int(44.39 * GIB),
        bf16=362e12,
        fp32=91.6e12,
        matmul=0.80,
        bandwidth=0.864e12,
        link=32e9,
        network=12.5e9,
    ),
    Gpu(
        name="l4",
        card="L4",
        memory=int(22.03 * GIB),
        bf16=121e12,
        fp32=30.3e12,
        matmul=0.80,
        bandwidth=0.3e12,
        link=32e9,
        network=12.5e9,
    ),
)
GPUS = {gpu.name: gpu for gpu in _TABLE}


def gpu_named(name: str) -> Gpu:
    """By its name in a command: `h200`."""
    found = GPUS.get(name.lower())
    if found is None:
        raise ValueError(f"unknown gpu '{name}'; known are {', '.join(GPUS)}: add others to model/planning/gpu.py")
    return found


def gpu_of(card: str) -> Gpu | None:
    """By the driver's name for it (`NVIDIA H200`); None for a card that has no figures here."""
    return next((gpu for gpu in _TABLE if gpu.card in card), None)

"""How a plan is built: the builder's settings, and which of them a library or a machine cannot do.

It owns names, ranges and the refusals, all before a build begins; it knows nothing of graphs or of the builder's calls.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from export.tensorrt.library import RTX, Library
from model.config import Config, Positive

Architecture = Annotated[str, Field(pattern=r"^sm[0-9]{2,3}$")]


class BuildOptions(Config):
    """Settings that shape the plan; two builds of one graph with equal options and versions can stand for each other.

    Precision is none of them: it is in the graph, for both builders take strongly typed networks only.
    """

    architectures: tuple[Architecture, ...] = ()
    """GPUs to build for, as `sm89`, where they are not this machine's (`tensorrt_rtx` only); empty: the GPU here, or
    what the library takes by default where there is none."""
    optimization_level: Annotated[int, Field(ge=0, le=5)] = 3
    """More is a longer build and a faster plan."""
    workspace_bytes: Positive | None = None
    """Scratch memory a layer may take; all of the GPU's unless said."""
    weights: Literal["fixed", "refit", "refit_stripped"] = "fixed"
    """`refit`: other weights can be put into a live engine. `refit_stripped`: the plan carries none, and takes them
    from the exported graph when it is loaded."""
    weight_streaming: bool = False
    """Weights may stay in host memory and be brought over layer by layer."""
    version_compatible: bool = False
    """Later versions of the same major load it, a little slower."""
    hardware_compatible: Literal["none", "same_compute_capability", "ampere_plus"] = "none"
    """Which other GPUs run it (`tensorrt` only; `tensorrt_rtx` has `architectures`)."""

    @model_validator(mode="after")
    def _versions_or_weights(self) -> Self:
        if self.version_compatible and self.weights == "refit_stripped":
            raise ValueError("a stripped plan is loaded by the version that built it; leave version_compatible out")
        return self


def measures(library: Library) -> bool:
    """Whether the builder times kernels on this GPU; `tensorrt_rtx` leaves that to the machine that runs the plan."""
    return library != RTX


def refuse(options: BuildOptions, library: Library, trt: Any, *, driver: bool) -> None:
    """Raise a ValueError for what `library` cannot build here; the builder would run first and then fail obscurely."""
    named = f"{library} {trt.__version__}"
    if library == RTX:
        _refuse_for_rtx(options, named)
    elif not driver:
        raise ValueError(
            f"{named} times kernels on a GPU and this machine shows none; build there, or with tensorrt_rtx, which"
            " needs none"
        )
    if options.weights != "fixed" and not driver:
        raise ValueError(
            f"{named} makes a plan with weights = '{options.weights}' on a machine with a CUDA driver only; build"
            " there, or set weights = 'fixed'"
        )
    if options.architectures:
        _refuse_architectures(options.architectures, named, trt)


def _refuse_for_rtx(options: BuildOptions, named: str) -> None:
    if options.version_compatible:
        raise ValueError(f"{named} comes without the lean runtime of version_compatible plans; set it to false")
    if options.hardware_compatible != "none":
        raise ValueError(
            f"{named} has no hardware_compatible '{options.hardware_compatible}'; list the GPUs in architectures"
        )


def _refuse_architectures(wanted: tuple[str, ...], named: str, trt: Any) -> None:
    if not hasattr(trt, "ComputeCapability"):
        raise ValueError(
            f"{named} builds for the GPU it runs on, not for {list(wanted)}; leave architectures out, or build with"
            " tensorrt_rtx"
        )
    known = buildable(trt)
    unknown = [name for name in wanted if name not in known]
    if unknown:
        raise ValueError(f"{named} does not build for {unknown}; it builds for {sorted(known)}")


def buildable(trt: Any) -> dict[str, Any]:
    """Architectures that the library can be told to build for, as `sm89`, with its own name of each."""
    members: dict[str, Any] = trt.ComputeCapability.__members__
    return {name.lower(): value for name, value in members.items() if name.startswith("SM")}

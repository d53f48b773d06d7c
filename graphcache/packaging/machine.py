"""What compiled code depends on besides the model: the processor, the GPU, and PyTorch."""

import platform

import msgspec
import torch

from graphcache.ir.errors import GraphCacheError


class Machine(msgspec.Struct, frozen=True):
    """`instructions` are those that the processor has; `arch` is a GPU's, None on a CPU."""

    system: str
    processor: str
    instructions: list[str]
    arch: str | None

    @staticmethod
    def here(device: str) -> "Machine":
        """This one, for code on this kind of device."""
        return Machine(platform.system(), platform.machine(), _instructions(), _arch(device))


def _instructions() -> list[str]:
    listed = getattr(torch.cpu, "get_capabilities", None)
    if listed is None:  # PyTorch is older than that
        return [torch.backends.cpu.get_cpu_capability()]
    return sorted(name for name, has in listed().items() if has is True)


def _arch(device: str) -> str | None:
    if device != "cuda":
        return None
    if not torch.cuda.is_available():
        raise GraphCacheError("the package was compiled for a CUDA device, and PyTorch finds none here")
    return "sm_{}{}".format(*torch.cuda.get_device_capability())


def refuse_other(made: Machine, torch_version: str, device: str) -> None:
    """Raise GraphCacheError where code that was compiled there cannot run.

    Args:
        made: where the package was written.
        torch_version: of PyTorch there.
        device: the kind that the code is for.
    """
    if torch_version != torch.__version__:
        raise _other(f"PyTorch {torch_version}", f"this is PyTorch {torch.__version__}")
    here = Machine.here(device)
    if (made.system, made.processor) != (here.system, here.processor):
        raise _other(f"{made.system} on {made.processor}", f"this is {here.system} on {here.processor}")
    if missing := set(made.instructions) - set(here.instructions):
        raise _other(f"a processor with {', '.join(sorted(missing))}", "this one lacks that")
    if made.arch != here.arch:
        raise _other(f"a GPU of {made.arch}", f"this one is {here.arch}")


def _other(wanted: str, here: str) -> GraphCacheError:
    return GraphCacheError(f"the package was compiled for {wanted}, and {here}; package the model here")

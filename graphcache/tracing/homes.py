"""Where a model's weights are kept that are not where it computes, and what stands for them in graphs."""

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from graphcache.ir.errors import CaptureError
from graphcache.ir.home import Home
from graphcache.libraries.carriers import Kept, Slot, carriers_stilled, has_carriers, kept_elsewhere, tables
from graphcache.libraries.torch_private import FakeTensorMode
from graphcache.passes.transfer import ARRIVE, fetched

Layouts = Mapping[Slot, tuple[torch.Size, torch.dtype, torch.device]]

_ORDINARY = (torch.Tensor, nn.Parameter, nn.Buffer)


class Homes:
    """The weights of a model that are kept elsewhere: by hooks around modules, or to be streamed.

    A weight has one `Home` as long as the model lives, whatever hooks come and go.

    Args:
        model: the original.
        streams: whether all its weights stay in host memory, and are fetched for the device that computes.
    """

    def __init__(self, model: nn.Module, streams: bool = False) -> None:
        self._model = model
        self._streams = streams
        self._homes: dict[Slot, tuple[Kept, Home]] = {}
        self._now: list[Kept] = []

    def look(self) -> None:
        """Find out where weights are kept from now on.

        Raises:
            CaptureError: weights are packed, or such that are to be streamed are not in host memory, or are
                moved by hooks.
        """
        self._now = [*self._kept()]
        for kept in self._now:
            _refuse_packed(kept)
        if self._streams:
            self._pin()
        for kept in self._now:
            known = self._homes.get(kept.slot)
            home = Home(kept.device, kept.unit, kept.read) if known is None else known[1]
            home.device, home.unit, home.read = kept.device, kept.unit, kept.read
            self._homes[kept.slot] = kept, home  # the table lives on, so that no identity is used again

    def _kept(self, modules: Iterable[nn.Module] | None = None) -> Iterable[Kept]:
        if self._streams:
            return _streamed(self._model)
        return kept_elsewhere(self._model.modules() if modules is None else modules)

    def _pin(self) -> None:
        """Keep all weights in memory that a device can copy from while it computes."""
        if has_carriers(self._model.modules()):
            raise CaptureError(
                "stream_weights=True, and hooks around the model move its weights too; leave out one of both"
            )
        for kept in self._now:
            tensor = kept.table[kept.name]
            if tensor.device.type != "cpu":
                raise CaptureError(
                    f"stream_weights=True, and '{kept.name}' is on {tensor.device}: leave the model in host "
                    "memory, model.to('cpu')"
                )
            if kept.device.type == "cuda" and not tensor.is_pinned():
                tensor.data = tensor.data.pin_memory()

    @property
    def device(self) -> torch.device | None:
        """What computes with these weights; None where there are none."""
        return self._now[0].device if self._now else None

    @property
    def streams(self) -> bool:
        """Whether all weights stay in host memory."""
        return self._streams

    def layouts(self, modules: Iterable[nn.Module]) -> Layouts:
        """What a capture takes for granted of the weights of modules; which tensors they are it does not."""
        found = {}
        for kept in self._kept(modules):
            tensor = kept.table[kept.name]
            found[kept.slot] = tensor.shape, tensor.dtype, kept.device
        return found

    @contextlib.contextmanager
    def standing_in(self) -> Iterator[dict[int, Home]]:
        """Within, nothing is moved, and fake tensors on the device stand in for the weights.

        Yields:
            The homes by the identity of what stands in.
        """
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        made: dict[int, Any] = {}
        found: dict[int, Home] = {}
        with contextlib.ExitStack() as stack:
            stack.enter_context(carriers_stilled(self._model.modules()))
            for kept in self._now:
                tensor = kept.table[kept.name]
                stack.callback(kept.table.__setitem__, kept.name, tensor)
                fake = made.get(id(tensor))
                if fake is None:
                    fake = made[id(tensor)] = _stand_in(mode, tensor, kept)
                found[id(fake)] = self._homes[kept.slot][1]
                kept.table[kept.name] = fake
            yield found

    @contextlib.contextmanager
    def at_hand(self) -> Iterator[None]:
        """Within, the model itself can be called: each module fetches its own weights that are streamed."""
        with contextlib.ExitStack() as stack:
            for module in self._model.modules() if self._streams else ():
                if any(map(len, tables(module))):
                    brings = _Brings(self._homes)
                    stack.callback(module.register_forward_pre_hook(brings.bring).remove)
                    stack.callback(module.register_forward_hook(brings.leave, always_call=True).remove)
            yield


class _Brings:
    """Puts a module's weights where it computes, for one call at a time."""

    def __init__(self, homes: Mapping[Slot, tuple[Kept, Home]]) -> None:
        self._homes = homes
        self._undo: list[Callable[[], None]] = []

    def bring(self, module: nn.Module, _: Any) -> None:
        for table in tables(module):
            for name, tensor in [*table.items()]:
                known = self._homes.get((id(table), name))
                if known is not None and tensor is not None:
                    made = fetched(known[1], tensor)
                    ARRIVE([made])
                    self._undo.append(partial(table.__setitem__, name, tensor))
                    table[name] = nn.Parameter(made, False) if isinstance(tensor, nn.Parameter) else made

    def leave(self, *_: Any) -> None:
        for undo in self._undo:
            undo()
        self._undo.clear()


def _streamed(model: nn.Module) -> Iterator[Kept]:
    """All weights of a model; those of one item of a list of modules come together."""
    accelerator = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    device = torch.empty(0, device=accelerator).device
    for path, module in model.named_modules():
        listed = re.match(r"(.*?\.)?\d+(?=\.|$)", path)
        for table in tables(module):
            for name, tensor in table.items():
                if tensor is not None:
                    unit = listed.group() if listed else path
                    yield Kept(table, name, device, unit, partial(table.__getitem__, name))


def _refuse_packed(kept: Kept) -> None:
    kind = type(kept.table[kept.name])
    if kind not in _ORDINARY:
        raise CaptureError(
            f"'{kept.name}' is offloaded and a {kind.__name__}, which holds more than numbers; keep packed "
            "weights on the device that computes, or offload the whole model (enable_model_cpu_offload)"
        )


def _stand_in(mode: FakeTensorMode, tensor: torch.Tensor, kept: Kept) -> torch.Tensor:
    with torch.inference_mode(False), mode:
        made = torch.empty_strided(tensor.shape, _strides(tensor), dtype=tensor.dtype, device=kept.device)
        return nn.Parameter(made, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else made


def _strides(tensor: torch.Tensor) -> tuple[int, ...]:
    """Those that a copy has."""
    return torch.empty_like(tensor, device="meta").stride()

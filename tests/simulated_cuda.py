"""simulated_cuda.py - a CUDA device that is not there: it checks devices, and counts.

The idea.  A tensor "on cuda" is a wrapper: it tells torch that it is on cuda:0, and its numbers are
in an ordinary CPU tensor behind it. Every operation passes through `Device.__torch_dispatch__`,
which looks at the devices as CUDA would, counts, and runs the operation on the CPU tensors.

    with simulated_cuda() as device:
        model = to_device(model)
        ...
        device.kernels, device.waits          so far; set them to 0 where counting begins

Refused:   an operation on cuda and cpu tensors together, except on a cpu tensor without dimensions.
kernels    operations that make or write numbers; a view is none. In inference mode a composite
           operation such as linear or scaled_dot_product_attention is one, whatever is inside.
waits      times the host waits for the device: .item(), .tolist(), bool(), .cpu(), nonzero, a mask
           as an index, and a copy to the device that is not non_blocking.
Not seen: numerics and choices of real kernels, memory, streams, speed.
"""
from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
WAITS = {"_local_scalar_dense", "item", "nonzero", "masked_select", "is_nonzero", "equal"}
EMPTY = {"empty", "empty_like", "empty_strided", "new_empty"}


class Simulated(torch.Tensor):
    """Says it is on cuda:0; `numbers` is the CPU tensor behind it.

    To torch's C++, which has no CUDA here, it is on the meta device. So what C++ makes "on the same
    device" is asked for on meta.
    """
    device, is_cuda = property(lambda self: CUDA), property(lambda self: True)
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, numbers):
        with torch.inference_mode(False):      # a view of a wrapper must be able to count versions
            out = torch.Tensor._make_wrapper_subclass(
                cls, numbers.shape, strides=numbers.stride(), dtype=numbers.dtype, device="meta",
                storage_offset=numbers.storage_offset())
        out.numbers = numbers
        return out

    def tolist(self):
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError("a simulated tensor outside of simulated_cuda()")


class Device(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.kernels = self.waits = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = func._schema.name.split("::")[1], kwargs or {}
        values = tree_flatten((args, kwargs))[0]
        tensors = [x for x in values if isinstance(x, torch.Tensor)]
        ours = [x for x in tensors if isinstance(x, Simulated)]
        target = next((x for x in values if isinstance(x, torch.device)), None)
        copying = name in ("to", "_to_copy", "copy_")
        there = target.type != "cpu" if target is not None else (
            isinstance(args[0], Simulated) if copying else bool(ours))
        mixed = [x for x in tensors if x.dim() and not isinstance(x, Simulated)]
        if ours and mixed and not copying:
            raise RuntimeError(f"aten.{name}: tensors on cuda:0 and cpu, shapes "
                               f"{[(tuple(x.shape), x.device.type) for x in tensors]}")
        self.waits += self.waits_for(name, args, kwargs, ours, there, copying)
        out = func(*tree_map(inside, args), **tree_map(inside, kwargs))
        if not there or not ours and target is None:
            return out
        if func._schema.is_mutable and name.endswith("_"):
            self.kernels += 1
            return args[0]
        kept = {id(x.numbers): x for x in ours}             # returned as it came: the same wrapper
        memory = {x.numbers.untyped_storage()._cdata for x in ours}
        made = [x for x in tree_flatten(out)[0] if isinstance(x, torch.Tensor)]
        self.kernels += name not in EMPTY and any(
            x.untyped_storage()._cdata not in memory for x in made)
        return tree_map(lambda x: x if not isinstance(x, torch.Tensor) else
                        kept[id(x)] if id(x) in kept else Simulated(x), out)

    @staticmethod
    def waits_for(name, args, kwargs, ours, there, copying) -> bool:
        if copying:
            source = args[1] if name == "copy_" else args[0]
            crosses = there != isinstance(source, Simulated)
            return crosses and not (there and (kwargs.get("non_blocking") or args[2:] == (True,)))
        if name in ("index", "index_put_", "index_put"):
            return any(isinstance(x, Simulated) and x.dtype == torch.bool for x in args[1])
        return bool(ours) and name in WAITS


def inside(x):
    return x.numbers if isinstance(x, Simulated) else CPU if isinstance(x, torch.device) else x


@contextmanager
def simulated_cuda():
    """The device for the time of a test. Name it CUDA, with its index."""
    tensor = torch.tensor

    def tensor_of(data, *, device=None, **kwargs):      # C++ would not show the mode its copy
        out = tensor(data, **kwargs)
        return out if device is None else out.to(device)

    with pytest.MonkeyPatch.context() as patch, Device() as device:
        patch.setattr(torch.cuda, "_lazy_init", lambda: None)
        patch.setattr(torch, "tensor", tensor_of)
        yield device


def to_device(model):
    """The model with every parameter and buffer on the simulated device. In simulated_cuda()."""
    moved = {}
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                moved.setdefault(p, torch.nn.Parameter(p.data.to(CUDA), requires_grad=False))
                module._parameters[name] = moved[p]
        for name, b in module._buffers.items():
            module._buffers[name] = None if b is None else b.to(CUDA)
    return model

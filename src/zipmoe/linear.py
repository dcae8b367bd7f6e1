"""Dense weights that stay packed: stand-ins for parameters that torch's functions accept.

A `PackedWeight` stands where a two-dimensional weight stood. `F.linear` and `F.embedding` of it
run on the core's engine, straight from the packed planes, through torch's own protocol for foreign
tensors (`__torch_function__`): modules stay as transformers made them. Whatever else is done with
it is done with the decoded weight, and counted: exact, only slow.

Products of FP32 weights, as some routers have, stay torch's, but row by row: torch's own choice of
kernel depends on the number of rows, and a row's bits must not.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from zipmoe._uncopied import Uncopied

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["AloneWeight", "PackedWeight"]

_LINEAR = torch.nn.functional.linear
_EMBEDDING = torch.nn.functional.embedding
_COPIES = {Tensor.detach, Tensor.to, Tensor.type, Tensor.float, Tensor.double, Tensor.bfloat16}
_COPYING = {copy.__name__ for copy in _COPIES}


class PackedWeight(Uncopied):
    """A weight [rows, columns] in BF16, packed in memory once `matrix` is set.

    One object may stand in several places (tied embeddings).
    """

    dtype, layout = torch.bfloat16, torch.strided
    requires_grad, is_meta, is_cuda, grad = False, False, False, None

    def __init__(self, shape: Iterable[int]) -> None:
        self.shape = torch.Size(shape)
        self.device = torch.device("cpu")
        self.engine: Any = None
        self.matrix: Any = None
        self.rows: Any = None  # `zipmoe.rows.DriveRows`, where it stays on the drive: no matrix
        self.decoded = 0  # how often it had to be decoded whole
        self._is_hf_initialized = True  # or _init_weights would try to fill it

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run a function of torch that was given a packed weight."""
        del types
        kwargs = kwargs or {}
        if func is _LINEAR and isinstance(args[1], cls):
            return args[1].linear(args[0], args[2] if len(args) > 2 else kwargs.get("bias"))
        if func is _EMBEDDING and isinstance(args[1], cls):
            return args[1].embedding(args[0])
        plain = [_plain(argument) for argument in args]
        return func(*plain, **{name: _plain(value) for name, value in kwargs.items()})

    def linear(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Multiply x [..., columns] with it: [..., rows], each row of x by itself."""
        if x.device.type == "meta":
            return x.new_empty(*x.shape[:-1], self.shape[0])
        if x.dtype is not torch.bfloat16 or not (bias is None or _is_plain_bias(bias)):
            return _LINEAR(x, self.to_dense().to(x.dtype), bias)
        if x.shape[-1] != self.shape[1]:
            raise ValueError(f"{tuple(x.shape)} cannot be multiplied with {tuple(self.shape)}")
        rows, columns = self.shape
        x = x.contiguous()
        self._check_open()
        out = torch.empty(*x.shape[:-1], rows, dtype=torch.bfloat16)
        count = math.prod(x.shape[:-1])
        address = 0 if bias is None else bias.data_ptr()
        self.engine.multiply(
            self.matrix, x.data_ptr(), columns, count, address, out.data_ptr(), rows
        )
        return out

    def linear_wide(self, x: Tensor) -> Tensor:
        """Multiply BF16 x [..., columns] with it: [..., rows] in FP32, not rounded."""
        self._check_open()
        rows, columns = self.shape
        x = x.contiguous()
        out = torch.empty(*x.shape[:-1], rows, dtype=torch.float32)
        self.engine.multiply_wide(
            self.matrix, x.data_ptr(), columns, math.prod(x.shape[:-1]), out.data_ptr(), rows
        )
        return out

    def embedding(self, ids: Tensor) -> Tensor:
        """Decode the rows of these ids."""
        columns = self.shape[1]
        if ids.device.type == "meta":
            return torch.empty(*ids.shape, columns, dtype=self.dtype, device="meta")
        self._check_open()
        ids = ids.long().contiguous()
        if self.rows is not None:
            bits = torch.from_numpy(self.rows.read(ids.reshape(-1).tolist()))
            return bits.view(self.dtype).view(*ids.shape, columns)
        out = torch.empty(*ids.shape, columns, dtype=self.dtype)
        self.engine.decode_rows(self.matrix, ids.data_ptr(), ids.numel(), out.data_ptr(), columns)
        return out

    def _check_open(self) -> None:
        if self.engine is None:
            raise ValueError("the model is closed, or still loading")

    def to_dense(self) -> Tensor:
        """Decode it whole."""
        self.decoded += 1
        if self.rows is not None:
            return self.embedding(torch.arange(self.shape[0]))
        if self.matrix is None:  # a skeleton is run for its shapes
            return torch.empty(self.shape, dtype=self.dtype, device="meta")
        out = torch.empty(self.shape, dtype=self.dtype)
        self.matrix.decode(out.data_ptr())
        return out

    def dim(self) -> int:
        """Count the dimensions."""
        return 2

    ndim = property(dim)

    def size(self, dim: int | None = None) -> Any:
        """Shape, or one length of it."""
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> int:
        """Count the weights."""
        return self.shape.numel()

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def data(self) -> PackedWeight:
        """Itself: there is nothing that could be changed."""
        return self

    def __getitem__(self, index: Any) -> Tensor:
        if isinstance(index, int) and (self.matrix or self.rows) is not None:
            return self.embedding(torch.tensor(index % self.shape[0]))
        return self.to_dense()[index]

    def __getattr__(self, name: str) -> Any:
        """Do with the decoded weight what is a tensor's to do."""
        if name.startswith("__") or not hasattr(Tensor, name):
            raise AttributeError(name)
        is_method = callable(getattr(Tensor, name))
        return _Deferred(self, name) if is_method else getattr(self.to_dense(), name)


class _Deferred:
    """A tensor's method, called on the decoded weight; FP32 copies multiply row by row."""

    def __init__(self, weight: PackedWeight, name: str) -> None:
        self._weight, self._name = weight, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        wide = (self._name == "float" and not args) or args == (torch.float32,)
        if wide and not kwargs and self._name in _COPYING:
            return WideWeight(self._weight)
        result = getattr(self._weight.to_dense(), self._name)(*args, **kwargs)
        return result.as_subclass(AloneWeight) if self._name in _COPYING else result


class WideWeight:
    """A packed weight in FP32, as some routers multiply theirs: with states that were BF16.

    Products with such states are FP32 sums of the engine; others, and all else, are done with the
    decoded weight.
    """

    dtype = torch.float32

    def __init__(self, weight: PackedWeight) -> None:
        self._weight = weight
        self.shape, self.device = weight.shape, weight.device

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run a function of torch that was given one."""
        del types
        kwargs = kwargs or {}
        if func is _LINEAR and isinstance(args[1], cls) and len(args) == 2 and not kwargs:
            return args[1].linear(args[0])
        plain = [arg.to_dense() if isinstance(arg, cls) else arg for arg in args]
        return func(*plain, **kwargs)

    def linear(self, x: Tensor) -> Tensor:
        """Multiply x [..., columns] with it: [..., rows] in FP32, each row of x by itself."""
        if x.device.type == "meta":
            return x.new_empty(*x.shape[:-1], self.shape[0])
        narrow = x.bfloat16()
        if x.dtype is not torch.float32 or not torch.equal(narrow.float(), x):
            return _row_by_row(x, self.to_dense(), None)
        return self._weight.linear_wide(narrow)

    def to_dense(self) -> Tensor:
        """Decode it whole."""
        return self._weight.to_dense().float()

    def __getitem__(self, index: Any) -> Tensor:
        return self.to_dense()[index]

    def __getattr__(self, name: str) -> Any:
        """Do with the decoded weight what is a tensor's to do."""
        if name.startswith("__") or not hasattr(Tensor, name):
            raise AttributeError(name)
        return getattr(self.to_dense(), name)


class AloneWeight(Tensor):
    """A plain weight whose products are computed row by row of what it is multiplied with."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run a function of torch: `F.linear` row by row, any other as it is."""
        with torch._C.DisableTorchFunctionSubclass():
            if func is _LINEAR and isinstance(args[1], cls):
                bias = args[2] if len(args) > 2 else (kwargs or {}).get("bias")
                return _row_by_row(args[0], args[1], bias)
            result = func(*args, **(kwargs or {}))
            # Copies of the weight, in another dtype say, multiply as it does.
            if func in _COPIES and isinstance(args[0], cls):
                return result.as_subclass(cls)
            return result


def _row_by_row(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    if len(rows) <= 1 or x.device.type == "meta":
        return _LINEAR(x, weight, bias)
    out = torch.cat([_LINEAR(row, weight, bias) for row in torch.split(rows, 1)])
    return out.view(*x.shape[:-1], -1)


def _plain(value: Any) -> Any:
    if isinstance(value, PackedWeight):
        return value.to_dense()
    if isinstance(value, list | tuple):
        return type(value)(_plain(item) for item in value)
    return value


def _is_plain_bias(bias: Tensor) -> bool:
    return bias.dtype is torch.bfloat16 and bias.is_contiguous()

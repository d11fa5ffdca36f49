"""The weight of a matrix product between loading and packing, whose rows may come plain, be coded here, or come coded.

A part is coded as soon as it is read, so that a quantised model never exists whole in another format: what a layer
holds in full precision is the one tensor that the file gave last.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Protocol

import torch
from torch import Tensor

from inferfleet.engine.layers.slots import Slot, Storage
from inferfleet.engine.place import Place
from inferfleet.engine.share import Dim, Share, cut, held, is_split, whole
from inferfleet.kernels.linear import PackedLinear
from inferfleet.kernels.quantized import Quantized, joined, quantise, quantised_bytes
from inferfleet.kernels.quantized_linear import QuantizedLinear

#: x [..., inputs] -> [..., outputs].
Product = Callable[[Tensor], Tensor]
Part = Tensor | Quantized


class Plain(Protocol):
    """Where plain parts are put."""

    @property
    def tensor(self) -> Tensor: ...

    def take(self) -> Tensor: ...


def num_bytes(outputs: int, inputs: int, place: Place) -> int:
    """What a matrix of plain weights takes once it is here."""
    if place.quantization is not None:
        return quantised_bytes(outputs, inputs, place.quantization)
    return outputs * inputs * place.dtype.itemsize


class Matrix:
    """[outputs, inputs], filled by slots over slices of its rows and given away once, by one of the last methods.

    A rank's share of a split weight is cut before it is coded, so its scales are those of what is here.
    """

    def __init__(self, outputs: Dim, inputs: Dim, *, place: Place, plain: Plain | None = None) -> None:
        """plain: where plain parts are kept, if not in a storage of its own."""
        self.dims, self._place = (outputs, inputs), place
        self.shape = held(outputs), held(inputs)
        self._plain: Plain = Storage(*self.shape, place=place) if plain is None else plain
        #: First row -> the coded part that begins there.
        self._coded: dict[int, Quantized] = {}

    def slot(self, rows: slice | None = None, *, dims: Sequence[Dim] = ()) -> Slot:
        """A slot for some rows; without an argument for all.

        dims: the sizes that the checkpoint's tensor is to have, where they differ from the part's: the rank keeps
        its shares of them.
        """
        begin, end, _ = (rows or slice(None)).indices(self.shape[0])
        sizes = dims or (self.dims if rows is None else (end - begin, self.dims[1]))

        def put(part: Part) -> None:
            self.put(begin, cut(part, sizes) if isinstance(part, Tensor) else _share_of(part, *sizes))

        shape, size = tuple(map(whole, sizes)), num_bytes(held(sizes[0]), held(sizes[1]), self._place)
        return Slot(put, shape, takes_codes=True, quantization=self._place.quantization, num_bytes=size)

    def put(self, begin: int, part: Tensor | Quantized) -> None:
        """Takes the rows from `begin` on; a plain part is coded if this model is to be quantised."""
        kind = self._place.quantization
        if isinstance(part, Tensor) and kind is not None:
            part = quantise(part.to(self._place.device), kind)
        if isinstance(part, Tensor):
            self._plain.tensor[begin : begin + len(part)] = part
        else:
            self._coded[begin] = part.to(self._place.device)

    @property
    def is_coded(self) -> bool:
        """Whether any of it is to be multiplied by its codes."""
        return bool(self._coded) or self._place.quantization is not None

    def take(self) -> Tensor:
        """All of it as a plain tensor; coded parts are decoded."""
        whole = self._plain.take()
        for begin, part in self._coded.items():
            whole[begin : begin + part.shape[0]] = part.dequantised(whole.dtype)
        self._coded.clear()
        return whole

    def take_parts(self) -> list[Part]:
        """All of it from the first row to the last; neighbours of one format are one part."""
        coded, kind = sorted(self._coded.items()), self._place.quantization
        self._coded.clear()
        if not coded:
            whole = self._plain.take()
            return [whole if kind is None else quantise(whole, kind)]
        parts: list[Part] = []
        end = 0
        for begin, part in coded:
            if begin > end:
                parts.append(self._plain.tensor[end:begin].clone())
            parts.append(part)
            end = begin + part.shape[0]
        if end < self.shape[0]:
            parts.append(self._plain.tensor[end:].clone())
        return _merged(parts)

    def product(self, bias: Tensor | None = None) -> Product:
        """What multiplies with it from now on; this matrix is of no use afterwards."""
        return product_of(self.take_parts(), bias, self._place.dtype)


class MatrixStack:
    """[count, outputs, inputs]: matrices of one shape, such as the experts of a layer."""

    def __init__(self, count: int, outputs: Dim, inputs: Dim, *, place: Place) -> None:
        self.dims, self._place = (count, outputs, inputs), place
        self.shape = count, held(outputs), held(inputs)
        self._plain = Storage(*self.shape, place=place)
        self.matrices = [
            Matrix(outputs, inputs, place=place, plain=PartOf(self._plain, index)) for index in range(count)
        ]

    def slot(self, index: int, rows: slice | None = None, *, dims: Sequence[Dim] = ()) -> Slot:
        """A slot for some rows of one matrix."""
        return self.matrices[index].slot(rows, dims=dims)

    def whole_slot(self) -> Slot:
        """A slot for all in one tensor."""

        def put(stack: Tensor) -> None:
            for matrix, part in zip(self.matrices, stack, strict=True):
                matrix.put(0, cut(part, self.dims[1:]))

        shape, size = tuple(map(whole, self.dims)), self.shape[0] * num_bytes(*self.shape[1:], self._place)
        return Slot(put, shape, quantization=self._place.quantization, num_bytes=size)

    @property
    def is_coded(self) -> bool:
        return any(matrix.is_coded for matrix in self.matrices)

    def take(self) -> Tensor:
        """All of it as a plain tensor, if nothing is coded."""
        return self._plain.take()


class PartOf:
    """One matrix of a stack's plain storage."""

    def __init__(self, whole: Storage, index: int) -> None:
        self._whole, self._index = whole, index

    @property
    def tensor(self) -> Tensor:
        return self._whole.tensor[self._index]

    def take(self) -> Tensor:
        return self.tensor


class SideBySide:
    """Products over the same rows whose weights are of unlike formats, one result."""

    def __init__(self, products: Sequence[Product]) -> None:
        self.products = products

    def __call__(self, x: Tensor) -> Tensor:
        return torch.cat([product(x) for product in self.products], dim=-1)


def product_of(parts: Sequence[Part], bias: Tensor | None, dtype: torch.dtype) -> Product:
    """x -> x @ W.T + bias for a weight W that lies in these parts."""
    if len(parts) == 1:
        return _product(parts[0], bias, dtype)
    ends = list(accumulate((part.shape[0] for part in parts), initial=0))
    biases = [None if bias is None else bias[begin:end] for begin, end in pairwise(ends)]
    return SideBySide([_product(part, some, dtype) for part, some in zip(parts, biases, strict=True)])


def _product(weight: Part, bias: Tensor | None, dtype: torch.dtype) -> Product:
    return PackedLinear(weight, bias) if isinstance(weight, Tensor) else QuantizedLinear(weight, bias, dtype=dtype)


def _share_of(part: Quantized, outputs: Dim, inputs: Dim) -> Part:
    """What is held here of a weight that came coded: its codes, or numbers where they do not come apart."""
    if not is_split(outputs) and not is_split(inputs):
        return part
    rows, columns = _stretches(outputs), _stretches(inputs)
    if len(columns) == 1:
        found = [part.rows(slice(*some)).columns(*columns[0]) for some in rows]
        shares = [share for share in found if share is not None]
        coded = joined(shares) if len(shares) == len(found) else None
        if coded is not None:
            return coded
    return cut(part.dequantised(), (outputs, inputs))


def _stretches(dim: Dim) -> tuple[tuple[int, int], ...]:
    return dim.stretches if isinstance(dim, Share) else ((0, dim),)


def _merged(parts: Sequence[Part]) -> list[Part]:
    done: list[Part] = []
    for part in parts:
        last = done[-1] if done else None
        if isinstance(last, Quantized) and isinstance(part, Quantized) and (both := joined([last, part])) is not None:
            done[-1] = both
        else:
            done.append(part)
    return done

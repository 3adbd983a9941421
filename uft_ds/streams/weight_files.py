"""Read and write a model's weight files tensor by tensor, without holding the whole model in memory."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from uft_ds.errors import UserError
from uft_ds.streams.identity import weight_files
from uft_ds.streams.pickled import unpickled

_CODES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
"""Names of dtypes in the safetensors format (github.com/huggingface/safetensors, README)."""
_TYPES = {code: dtype for dtype, code in _CODES.items()}
_POINTER = b"version https://git-lfs"
"""First bytes of the pointer that git-lfs leaves in place of a file that was not fetched."""


@dataclass(frozen=True)
class TensorInfo:
    """Name, shape and dtype of a tensor, from a file's header."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        numel = 1
        for size in self.shape:
            numel *= size
        return numel * self.dtype.itemsize

    def empty(self) -> Tensor:
        """A meta tensor of the same shape and dtype."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


class WeightFiles:
    """The tensors of a model folder. Only headers are read; `read` loads one tensor.

    Raises:
        UserError: there are no weights, or a file cannot be read; the message names it.
    """

    def __init__(self, folder: Path, read_as: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType({})) -> None:
        """
        Args:
            read_as: by the name of a tensor, a function of what is stored whose value `read` returns instead.
        """
        self.folder = folder
        self._read_as = read_as
        self.infos: dict[str, TensorInfo] = {}
        self._file_of: dict[str, Path] = {}
        for path in weight_files(folder):
            for info in _header(path):
                self.infos[info.name] = info
                self._file_of[info.name] = path

    def read(self, name: str) -> Tensor:
        """One tensor, as it is stored unless `read_as` names it; it may be a view of the mapped file."""
        tensor = self._stored(name)
        return self._read_as[name](tensor) if name in self._read_as else tensor

    def _stored(self, name: str) -> Tensor:
        path = self._file_of[name]
        try:
            if path.suffix == ".safetensors":
                with safe_open(path, framework="pt") as file:
                    tensor: Tensor = file.get_tensor(name)
                    return tensor
            return _pickled(path)[name]
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: {name} cannot be read ({error})") from None


def _header(path: Path) -> list[TensorInfo]:
    try:
        return [TensorInfo(tensor.name, tensor.shape, _TYPES[tensor.code]) for tensor in stored_tensors(path)]
    except KeyError as error:
        raise UserError(f"{path}: holds tensors of type {error}, which cannot be merged into") from None


@dataclass(frozen=True)
class StoredTensor:
    """Name, shape and dtype of a stored tensor; `code` is the dtype's name in the safetensors format."""

    name: str
    shape: tuple[int, ...]
    code: str

    def empty(self) -> Tensor:
        """A meta tensor of the same shape and dtype; float32 if the dtype is not in the table of codes."""
        return torch.empty(self.shape, dtype=_TYPES.get(self.code, torch.float32), device="meta")


def stored_tensors(path: Path) -> list[StoredTensor]:
    """Names, shapes and dtypes of a weight file's tensors; no tensor is read.

    Raises:
        UserError: the file does not exist, is cut or empty, has another format, or is a pointer of git-lfs. The message
            names it.
    """
    _check_is_weights(path)
    if path.suffix != ".safetensors":
        named = unpickled(path, torch.device("meta"))
        return [
            StoredTensor(name, tuple(tensor.shape), _CODES.get(tensor.dtype, str(tensor.dtype)))
            for name, tensor in named.items()
        ]
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            return [StoredTensor(name, tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()]
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"model.base: {path}: cannot be read, it is cut or damaged ({error}); fetch or copy it again"
        ) from None


def _check_is_weights(path: Path) -> None:
    try:
        with path.open("rb") as file:
            start = file.read(len(_POINTER))
    except OSError as error:
        raise UserError(f"model.base: {path}: cannot be read ({error.strerror})") from None
    if not start:
        raise UserError(f"model.base: {path}: cannot be read, it is empty; fetch or copy it again")
    if start == _POINTER:
        raise UserError(
            f"model.base: {path}: cannot be read, it is a pointer of git-lfs in place of the weights; "
            "run `git lfs pull` in its folder"
        )


@lru_cache(maxsize=1)
def _pickled(path: Path) -> Mapping[str, Tensor]:
    """The tensors of a .bin file, mapped if its format allows it. Code in the file is never run."""
    return unpickled(path, torch.device("cpu"))


def shards_of(infos: Iterable[TensorInfo], max_bytes: int) -> list[list[TensorInfo]]:
    """Divide tensors, in their order, into files of at most `max_bytes`; a larger tensor gets its own file."""
    shards: list[list[TensorInfo]] = []
    size = 0
    for info in infos:
        if not shards or size + info.num_bytes > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(info)
        size += info.num_bytes
    return shards


def write_tensors(path: Path, infos: Iterable[TensorInfo], produce: Callable[[TensorInfo], Tensor]) -> None:
    """Write a safetensors file with only one tensor in memory at a time.

    The library's own writer needs all tensors at once. The tests read the file back with the library.
    """
    ordered = sorted(infos, key=lambda info: -info.dtype.itemsize)  # so that each tensor is aligned to its item size
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for info in ordered:
        begin, end = end, end + info.num_bytes
        header[info.name] = {"dtype": _CODES[info.dtype], "shape": list(info.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for info in ordered:
            tensor = produce(info)
            assert tuple(tensor.shape) == info.shape
            assert tensor.dtype == info.dtype
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def write_model(
    folder: Path, infos: Iterable[TensorInfo], produce: Callable[[TensorInfo], Tensor], *, max_shard_bytes: int
) -> None:
    """Write a model's weights in Hugging Face's layout: one file, or several files and their index."""
    shards = shards_of(infos, max_shard_bytes)
    if len(shards) == 1:
        write_tensors(folder / "model.safetensors", shards[0], produce)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_tensors(folder / name, shard, produce)
        weight_map |= {info.name: name for info in shard}
    total = sum(info.num_bytes for shard in shards for info in shard)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def bytes_of(text: str) -> int:
    """The number of bytes of a size such as 5GB, 500MB or 2GiB.

    Raises:
        UserError: the text is not such a size.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(K|M|G|T)(i?)B", text.strip(), re.IGNORECASE)
    size = 0.0
    if match is not None:
        step = 1024 if match[3] else 1000
        size = float(match[1]) * step ** (1 + "KMGT".index(match[2].upper()))
    if size < 1:
        raise UserError(f"--max-shard-size: {text!r} given, expected a size such as 5GB or 500MB")
    return int(size)

"""Reference log-probs on disk, shared between runs: one folder for each reference, with files that are never changed.

A file is named by the SHA-256 of its content, so writers need no lock and a damaged file is recognised. Its metadata
names the reference that it belongs to.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save_file

from uft_ds.data.example import KEY_BYTES
from uft_ds.host.files import sha256, sync
from uft_ds.host.formats import KEY, UnknownFormat, check_format

LogpTable = dict[bytes, float]
"""From a response's key to its log-prob under the reference: nats, summed over tokens, float64."""


class OtherReference(ValueError):
    """A table belongs to another reference. identity: that reference's."""

    def __init__(self, message: str, identity: str) -> None:
        super().__init__(message)
        self.identity = identity


SECONDS_OF_A_DAY = 86_400
_SUFFIX = ".safetensors"
FORMAT = 1


@dataclass(frozen=True)
class Stored:
    """The content of a store at one moment.

    table: all entries. files: the files that the entries come from. problems: one sentence for each file that was not
    read.
    """

    table: LogpTable
    files: tuple[Path, ...]
    problems: tuple[str, ...]


@dataclass(frozen=True)
class ReferenceStore:
    """The store of the log-probs that all runs with the same reference have computed.

    folder: holds only this reference's files.
    identity: 64 hex digits, from `streams.identity.reference_identity`.
    """

    folder: Path
    identity: str

    @classmethod
    def below(cls, root: Path, identity: str) -> ReferenceStore:
        """The store in the reference's own folder below a shared root."""
        return cls(root / identity[:32], identity)

    def read(self) -> Stored:
        """Read everything in the store. Files that are damaged or belong to another reference are renamed.

        Files of another format are left as they are, for the versions that can read them.
        """
        table: LogpTable = {}
        files, problems = [], []
        for path in sorted(self.folder.glob(f"[0-9a-f]*{_SUFFIX}"), reverse=True):
            try:
                content = path.read_bytes()
            except FileNotFoundError:  # another run has just renamed it
                continue
            except OSError as error:
                problems.append(f"{path}: cannot be read ({error.strerror})")
                continue
            try:
                if hashlib.sha256(content).hexdigest() != path.stem:
                    raise ValueError("its content is not what was written")
                table |= _parse(path, content, self.identity)
                files.append(path)
            except UnknownFormat as error:
                problems.append(f"{error}; it is not used")
            except ValueError as error:
                renamed = f"; renamed to {path.name}.rejected" if set_aside((path,)) else ""
                problems.append(f"{path}: {error}{renamed}")
        return Stored(table, tuple(files), tuple(problems))

    def write(self, table: Mapping[bytes, float]) -> None:
        """Add one file atomically. Other runs may write at the same time; nothing is lost.

        Raises:
            OSError: the folder cannot be written.
        """
        if not table:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        self._clear_away()
        descriptor, name = tempfile.mkstemp(prefix=".", suffix=".tmp", dir=self.folder)
        os.close(descriptor)
        temporary = Path(name)
        try:
            write_table(temporary, table, self.identity)
            temporary.rename(self.folder / f"{sha256(temporary)}{_SUFFIX}")
            sync(self.folder)
        finally:
            temporary.unlink(missing_ok=True)

    def _clear_away(self) -> None:
        """Delete what writers that were killed have left. A younger file may be that of a writer on any machine."""
        for left in self.folder.glob(".*.tmp"):
            with suppress(OSError):  # another run has just done the same
                if time.time() - left.stat().st_mtime > SECONDS_OF_A_DAY:
                    left.unlink()


def write_table(path: Path, table: Mapping[bytes, float], identity: str) -> None:
    """Write one file of keys and log-probs, sorted by key, and sync it to the disk.

    Raises:
        OSError: the file cannot be written.
    """
    table = dict(sorted(table.items()))
    keys = np.frombuffer(b"".join(table), dtype=np.uint8).reshape(len(table), KEY_BYTES)
    logps = np.fromiter(table.values(), dtype=np.float64, count=len(table))
    try:
        # Only one metadata key, because safetensors 0.8 writes several keys in varying order. A table's name is the
        # hash of its bytes, so the same content must give the same bytes.
        owner = json.dumps({KEY: FORMAT, "identity": identity})
        save_file({"keys": keys, "logps": logps}, path, metadata={"reference": owner})
    except SafetensorError as error:  # safetensors wraps the system's errors
        raise OSError(f"{path}: {error}") from None
    path.chmod(0o644)  # safetensors writes mode 0600 for any umask, but other users share this folder
    sync(path)


def read_table(path: Path, identity: str) -> LogpTable:
    """Read a file that `write_table` wrote.

    Raises:
        OtherReference: it belongs to another reference.
        ValueError: the file cannot be read, is not a table, or holds non-finite values.
        UserError: the table has another format.
    """
    try:
        return _parse(path, path.read_bytes(), identity)
    except OtherReference as error:
        raise OtherReference(f"{path}: {error}", error.identity) from None
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: {error}") from None


def set_aside(files: Iterable[Path]) -> int:
    """Rename files so that no run reads them again; returns the number of renamed files."""
    renamed = 0
    for path in files:
        with suppress(OSError):  # another run has renamed it already, or the folder is read-only
            path.rename(path.with_name(f"{path.name}.rejected"))
            renamed += 1
    return renamed


def _parse(path: Path, content: bytes, identity: str) -> LogpTable:
    try:
        tensors = load(content)
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        said = header["__metadata__"]["reference"]
        about = json.loads(said) if said.startswith("{") else {"identity": said}  # an older format: only the identity
        check_format(path, about.get(KEY), FORMAT, "delete it, and its log-probs are computed anew")
        owner, keys, logps = about["identity"], tensors["keys"], tensors["logps"]
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"not a table of reference log-probs ({error})") from None
    if owner != identity:
        message = f"belongs to another reference ({str(owner)[:16]}, expected {identity[:16]})"
        raise OtherReference(message, str(owner))
    if keys.dtype != np.uint8 or keys.shape != (len(logps), KEY_BYTES) or logps.dtype != np.float64:
        raise ValueError(f"found {keys.dtype}{list(keys.shape)} and {logps.dtype}{list(logps.shape)}")
    if not np.isfinite(logps).all():
        raise ValueError("holds a log-prob that is not finite")
    return dict(zip((key.tobytes() for key in keys), logps.tolist(), strict=True))

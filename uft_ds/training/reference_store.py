"""Reference log-probs on disk, shared between runs: one folder for each reference, files that are never changed.

A file is named by the SHA-256 of its content, so writers need no lock and a damaged file shows itself. Its metadata
names the reference it belongs to.
"""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from uft_ds.data.example import KEY_BYTES

LogpTable = dict[bytes, float]
"""From a response's key to its log-prob under the reference: nats, summed over tokens, float64."""

_SUFFIX = ".safetensors"


@dataclass(frozen=True)
class ReferenceStore:
    """What all runs with the same reference have computed.

    folder: holds this reference's files and no other's.
    identity: 64 hex digits, of `model.identity.reference_identity`.
    """

    folder: Path
    identity: str

    @classmethod
    def below(cls, root: Path, identity: str) -> ReferenceStore:
        """The reference's own folder below a root that many share."""
        return cls(root / identity[:32], identity)

    def read(self) -> tuple[LogpTable, list[str]]:
        """Everything stored, and what was wrong with files that were set aside: their responses are computed again."""
        table: LogpTable = {}
        problems = []
        for path in sorted(self.folder.glob(f"[0-9a-f]*{_SUFFIX}"), reverse=True):
            try:
                content = path.read_bytes()
            except FileNotFoundError:  # set aside by another run, this moment
                continue
            except OSError as error:
                problems.append(f"{path}: cannot be read ({error.strerror})")
                continue
            if hashlib.sha256(content).hexdigest() != path.stem:
                problems.append(f"{path}: its content is not what was written")
            else:
                try:
                    table |= read_table(path, self.identity)
                    continue
                except ValueError as error:
                    problems.append(str(error))
            _set_aside(path)
        return table, problems

    def write(self, table: Mapping[bytes, float]) -> None:
        """Add a file, whole or not at all. Others may write at the same time: nothing is lost.

        Raises:
            OSError: the folder cannot be written.
        """
        if not table:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(prefix=".", suffix=".tmp", dir=self.folder)
        os.close(descriptor)
        temporary = Path(name)
        try:
            write_table(temporary, table, self.identity)
            digest = hashlib.sha256(temporary.read_bytes()).hexdigest()
            temporary.rename(self.folder / f"{digest}{_SUFFIX}")
        finally:
            temporary.unlink(missing_ok=True)

    def set_all_aside(self) -> None:
        """After a check against a live reference has failed: none of these numbers may be read again."""
        for path in self.folder.glob(f"[0-9a-f]*{_SUFFIX}"):
            _set_aside(path)


def write_table(path: Path, table: Mapping[bytes, float], identity: str) -> None:
    """One file of keys and log-probs, synced."""
    keys = np.frombuffer(b"".join(table), dtype=np.uint8).reshape(len(table), KEY_BYTES)
    logps = np.fromiter(table.values(), dtype=np.float64, count=len(table))
    try:
        save_file({"keys": keys, "logps": logps}, path, metadata={"reference": identity})
    except SafetensorError as error:  # it wraps the system's errors
        raise OSError(f"{path}: {error}") from None
    path.chmod(0o644)  # safetensors writes 0600 whatever the umask: others share this folder
    with path.open("rb") as file:
        os.fsync(file.fileno())


def read_table(path: Path, identity: str) -> LogpTable:
    """What `write_table` wrote.

    Raises:
        ValueError: not such a file, another reference's, or not finite.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            owner = (file.metadata() or {}).get("reference")
            keys, logps = file.get_tensor("keys"), file.get_tensor("logps")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: not a table of reference log-probs ({error})") from None
    if owner != identity:
        raise ValueError(f"{path}: belongs to another reference ({str(owner)[:16]}, expected {identity[:16]})")
    if keys.dtype != np.uint8 or keys.shape != (len(logps), KEY_BYTES) or logps.dtype != np.float64:
        raise ValueError(f"{path}: found {keys.dtype}{list(keys.shape)} and {logps.dtype}{list(logps.shape)}")
    if not np.isfinite(logps).all():
        raise ValueError(f"{path}: holds a log-prob that is not finite")
    return dict(zip((key.tobytes() for key in keys), logps.tolist(), strict=True))


def _set_aside(path: Path) -> None:
    with suppress(OSError):  # another run was first, or the folder is read-only
        path.rename(path.with_name(f"{path.name}.rejected"))

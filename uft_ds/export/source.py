"""Find what a path holds: a run, one of its checkpoints, an adapter in PEFT's format, or a DeepSpeed checkpoint.

`convert.py` receives all four in one form, `Convertible`.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from uft_ds.checkpoint.folder import ADAPTER, latest_checkpoint, step_of
from uft_ds.checkpoint.manifest import MANIFEST
from uft_ds.errors import UserError
from uft_ds.export.deepspeed_files import is_deepspeed, read_trainable
from uft_ds.export.low_rank import read_adapter_config, read_low_rank
from uft_ds.export.quantised import nf4_of, nf4_of_adapter
from uft_ds.host.callbacks import Say
from uft_ds.recipe.settings import Settings
from uft_ds.recipe.to_settings import load_settings
from uft_ds.record.run_folder import RunFolder, is_owned, reading_identity
from uft_ds.streams.adapter_files import as_peft_saves, is_adapter, written_as_peft_saves
from uft_ds.streams.identity import base_identity
from uft_ds.streams.load import check_base
from uft_ds.streams.nf4 import Nf4Base

NO_ADAPTER = (
    "all parameters were trained, so there is no adapter; write the model by `uft convert RUN FOLDER`, and give that "
    "folder"
)
_EXPECTED = "expected a run, one of its checkpoints, an adapter in PEFT's format, or a checkpoint of DeepSpeed's"


@dataclass(frozen=True)
class Convertible:
    """A source of a conversion.

    adapter: a folder in PEFT's format; it does not exist where the run trains all parameters. base: a name or a folder.
    settings, run: None unless the source is a run's. nf4: the base in NF4 that was trained on; None: in 16 bits.
    """

    path: Path
    adapter: Path
    base: str
    revision: str | None
    chat_template: str | None
    settings: Settings | None = None
    run: RunFolder | None = None
    nf4: Nf4Base | None = None

    @property
    def trains_all(self) -> bool:
        """Whether the run trains all parameters, so that there is no adapter."""
        return self.settings is not None and self.settings.trains_all

    @property
    def is_reward_model(self) -> bool:
        """Whether the adapter is of a run that trains a reward model, with its head beside it."""
        return self.settings is not None and self.settings.trains_head


@contextmanager
def opened(
    path: Path,
    base: str | None,
    adapter_config: Path | None,
    say: Say = lambda text: None,
    *,
    reads_weights: bool = True,
    takes_whole: bool = False,
) -> Iterator[Convertible]:
    """The source at `path`. Within the block its adapter is in PEFT's format.

    The adapter of a DeepSpeed checkpoint, and one whose files or names are not PEFT's own, exist only within the block.

    Args:
        reads_weights: see `of_run`.
        takes_whole: whether a run that trains all parameters, which has no adapter, may be the source.
    Raises:
        UserError: the path holds nothing that can be converted, or an option is missing or has no effect.
    """
    if not path.is_dir():
        raise UserError(f"{path}: no such folder; {_EXPECTED}")
    is_own = (path / MANIFEST).exists() or (path / "checkpoints").is_dir()
    # A folder of transformers' Trainer holds both kinds; --adapter-config selects the DeepSpeed checkpoint.
    if is_deepspeed(path) and not is_own and (adapter_config is not None or not is_adapter(path)):
        with tempfile.TemporaryDirectory() as folder:
            yield _from_deepspeed(path, Path(folder), base, adapter_config)
        return
    if adapter_config is not None:
        raise UserError("--adapter-config: only a DeepSpeed checkpoint needs it; this folder has its own")
    if (path / "adapter_config.json").is_file():
        said = read_adapter_config(path / "adapter_config.json").get("base_model_name_or_path")
        if base is None and not said:
            raise UserError(f"{path}: its adapter_config.json names no base model; give --base")
        if base is not None and said and not _is_same_path(base, said):
            say(f"warning: {path} says that its base is {said}; {base} is used")
        with tempfile.TemporaryDirectory() as folder:
            adapter, nf4 = written_as_peft_saves(path, Path(folder)), nf4_of_adapter(path)
            yield Convertible(path, adapter, _base_at(base or str(said)), None, None, nf4=nf4)
        return
    if not is_own:
        what = "a whole model" if (path / "config.json").is_file() else "nothing of the kind"
        raise UserError(f"{path}: holds {what}; {_EXPECTED}")
    source = of_run(path, base, say, reads_weights=reads_weights)
    if source.trains_all and not takes_whole:
        raise UserError(f"{path}: {NO_ADAPTER}")
    yield source


def _is_same_path(base: str, said: str) -> bool:
    return base == said or (Path(base).exists() and Path(base).resolve() == Path(said).resolve())


def _base_at(base: str) -> str:
    """The base, after a check that it exists.

    Raises:
        UserError: it does not exist.
    """
    try:
        check_base(base, None)
    except UserError as error:
        raise UserError(str(error).replace("model.base:", "base:", 1) + "; give --base") from None
    return base


def of_run(
    path: Path, base: str | None = None, say: Say = lambda text: None, *, reads_weights: bool = True
) -> Convertible:
    """A run, or one of its checkpoints, with the base that it was trained on.

    Args:
        base: where that base is now; None: where the run's recipe says.
        reads_weights: whether the conversion needs the base's weights. Otherwise a hub model is not downloaded: the
            commit in the run's recipe names its content.
    Raises:
        UserError: there is no whole checkpoint with its run, or the base is gone or has another content.
    """
    checkpoint = latest_checkpoint(path)
    folder = RunFolder(checkpoint.parent.parent)
    if not folder.recipe.exists() or not folder.sample_data().exists():
        raise UserError(f"{folder.path}: no recipe.yaml or data/ beside {checkpoint.name}; a checkpoint needs its run")
    settings = load_settings(str(folder.recipe))
    if not (path / MANIFEST).exists() and not folder.done.exists():
        say(_not_done(folder, checkpoint, settings.train.steps))
    model = settings.model
    if base is None and Path(model.base).is_absolute() and not Path(model.base).exists():
        raise UserError(f"{model.base}: no such folder; if the run's base has moved, give --base")
    used, revision = (model.base, model.revision) if base is None else (_base_at(base), None)
    if base is not None or reads_weights or Path(used).exists():
        check_base(used, revision)
        if base_identity(used, revision, quantization=model.quantization) != recorded_identity(folder)[0]:
            if base is not None:
                raise UserError(
                    f"--base: {base} is not the base that the run was trained on ({model.base}), by its content"
                )
            raise UserError(
                f"{model.base}: its content has changed since the run began, so the adapter is not of this model; "
                "bring the former files back, or give --base a copy of them"
            )
    return Convertible(
        checkpoint, checkpoint / ADAPTER, used, revision, model.chat_template, settings, folder, nf4_of(model)
    )


def recorded_identity(folder: RunFolder) -> tuple[dict[str, Any], str]:
    """The identity of a run's base (as `base_identity` returns it) and the hash of its tokenizer and chat template.

    Raises:
        UserError: the run's identity.json cannot be read.
    """
    with reading_identity(folder) as identity:
        first_source, *_ = identity["data"].values()
        return dict(identity["base"]), str(first_source["tokenizer"])


def _not_done(folder: RunFolder, checkpoint: Path, steps: int | None) -> str:
    """A note on the run whose newest checkpoint is converted. steps: of the whole run; None: not known."""
    state = " and still going" if is_owned(folder) else ""
    of_all = "" if steps is None else f" of {steps}"
    at = f"step {step_of(checkpoint)}{of_all}"
    return f"note: {folder.path} is not done{state}: its newest checkpoint is converted, {at}"


def _from_deepspeed(path: Path, folder: Path, base: str | None, adapter_config: Path | None) -> Convertible:
    if base is None or adapter_config is None:
        missing = " and ".join(
            option for option, given in (("--base", base), ("--adapter-config", adapter_config)) if given is None
        )
        raise UserError(f"{path}: a DeepSpeed checkpoint holds weights alone; give {missing}")
    config = adapter_config / "adapter_config.json" if adapter_config.is_dir() else adapter_config
    if not config.is_file():
        raise UserError(f"--adapter-config: {config}: no such file")
    read_adapter_config(config)
    tensors = {as_peft_saves(name): tensor.contiguous() for name, tensor in read_trainable(path).items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    shutil.copyfile(config, folder / "adapter_config.json")
    read_low_rank(folder)  # raises if the config does not fit the tensors
    return Convertible(path, folder, _base_at(base), None, None)

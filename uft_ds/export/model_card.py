"""The README of a converted model: its base, its data and recipe, and the accuracy of the merge."""

from __future__ import annotations

import yaml

from uft_ds import __version__
from uft_ds.export.agreement import Agreement
from uft_ds.export.whole import Written
from uft_ds.recipe.file import dump_recipe
from uft_ds.recipe.settings import Settings
from uft_ds.streams.nf4 import MARK, Nf4Base

FOR_REWARDS = "AutoModelForSequenceClassification"
"""The class of transformers that loads the base of a reward model's adapter."""


def model_card(
    base: str,
    settings: Settings | None,
    found: Agreement | Written | None,
    *,
    title: str,
    nf4: Nf4Base | None = None,
    loaded_as: str | None = None,
) -> str:
    """Markdown with the hub's front matter; the owner of the model must still fill in the licence.

    Args:
        nf4: the base in NF4 that was trained on.
        loaded_as: the class of transformers that loads the base of an adapter on NF4; None: the card is of a model.
    """
    is_reward_model = settings is not None and settings.trains_head
    trains_all = settings is not None and settings.trains_all
    fields = {
        "base_model": base,
        "library_name": "transformers",
        "pipeline_tag": "text-classification" if is_reward_model else "text-generation",
        "tags": ["uft", *([] if trains_all else ["lora"]), "uft_ds", *(["reward-model"] if is_reward_model else [])],
        "datasets": sorted({source.path for source in settings.data.sources}) if settings else None,
        "license": "other",
        "license_name": "see-base-model-and-data",
    }
    front = yaml.safe_dump({k: v for k, v in fields.items() if v is not None}, sort_keys=False).strip()
    parts = [
        f"---\n{front}\n---",
        f"# {title}",
        f"{'Full' if trains_all else 'LoRA'} fine-tuning of `{base}`, made with uft_ds {__version__}.",
    ]
    parts.append(
        "**License**: not chosen yet. It must agree with those of the base model and of the data; replace the two "
        "fields above."
    )
    if nf4 is not None:
        what = _MERGED_INTO_NF4 if loaded_as is None else _on_nf4(base, str(nf4.dtype), loaded_as)
        parts += ["## The base in NF4", what]
    if settings is not None:
        rows = "\n".join(f"- `{source.path}` ({source.rules.format})" for source in settings.data.sources)
        parts += ["## Data", rows]
    if isinstance(found, Written):
        parts += ["## The weights", f"Checked after writing: {found.summary}."]
    elif found is not None:
        parts += [
            "## The merge",
            f"{'What the adapters change of a reward' if is_reward_model else 'Log-ratios to the base'}, of base + "
            f"adapter by PEFT and of this model, both in float32: {found.summary}; the largest is "
            f"{found.largest_nats:.3g}{found.unit}.",
        ]
    if settings is not None:
        parts += ["## Recipe", f"```yaml\n{dump_recipe(settings.stored)}```"]
    return "\n\n".join(parts) + "\n"


_MERGED_INTO_NF4 = (
    "The adapter was trained on the linear layers of the base rounded to NF4 (4 bits, blocks of 64, double "
    "quantisation), and is merged into these rounded weights: this model is the one that was trained, in 16 bits again."
)


def _on_nf4(base: str, dtype: str, loaded_as: str) -> str:
    """How to load an adapter that was trained on a base in NF4. dtype: as torch writes it."""
    is_reward_model = loaded_as == FOR_REWARDS
    classes = f"AutoTokenizer, {loaded_as}" if is_reward_model else loaded_as
    of_reward = "num_labels=1, " if is_reward_model else ""
    # The base may pad with the token that ends an answer: the classifier would read the reward one token before it.
    padding = (
        '\nbase.config.get_text_config().pad_token_id = AutoTokenizer.from_pretrained(".").pad_token_id'
        if is_reward_model
        else ""
    )
    return f"""\
The adapter belongs on the linear layers of its base in NF4 (4 bits, blocks of 64, double quantisation), on which it was
trained. On the same base in 16 bits it is another model. With transformers, PEFT and bitsandbytes:

```python
import torch
from peft import PeftModel
from transformers import {classes}, BitsAndBytesConfig

nf4 = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype={dtype},
)
base = {loaded_as}.from_pretrained("{base}", {of_reward}quantization_config=nf4, dtype={dtype}){padding}
model = PeftModel.from_pretrained(base, ".")
```

`uft eval`, `uft generate` and `uft convert` read `{MARK}` beside it and do the same."""

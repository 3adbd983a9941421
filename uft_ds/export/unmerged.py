"""A run's checkpoint, an adapter or a whole model as one model in memory: the base with its adapter on top, not merged.

The base keeps its whole vocabulary. Loaders that cut it to the tokenizer's length (lm-evaluation-harness's, where an
adapter is given) make the base and the result models of other sizes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

from uft_ds.architectures.facts import most_positions
from uft_ds.checkpoint.folder import step_of
from uft_ds.data.tokens.chat_tokenizer import read_tokenizer, vocabulary_of
from uft_ds.errors import UserError
from uft_ds.export.convert import tokenizer_of
from uft_ds.export.low_rank import read_low_rank
from uft_ds.export.source import opened
from uft_ds.host.callbacks import Say
from uft_ds.streams.adapters import lora_form
from uft_ds.streams.identity import adapter_identity, base_identity
from uft_ds.streams.load import check_base, embedding_rows, load_weights


@dataclass(frozen=True)
class Unmerged:
    """What a path or a hub name stands for.

    base: a folder or a hub name. adapter: a folder in PEFT's format; None for a whole model. run: its folder, and step:
    of its checkpoint, where the source is a run's.
    """

    name: str
    base: str
    revision: str | None
    adapter: Path | None
    tokenizer: Any
    run: Path | None = None
    step: int | None = None

    def identity(self) -> dict[str, Any]:
        """What the answers depend on, by content: hashes of weights, config, adapter, tokenizer and template."""
        template = json.dumps(self.tokenizer.chat_template, sort_keys=True)
        of_base = base_identity(self.base, self.revision)
        return {
            "base": self.base,
            "revision": self.revision,
            "step": self.step,
            "base_weights": of_base["weights"],
            "base_config": of_base["config"],
            "adapter": None if self.adapter is None else adapter_identity(self.adapter, "adapter"),
            "tokenizer": hashlib.sha256(vocabulary_of(self.tokenizer).encode("utf-8", "surrogatepass")).hexdigest(),
            "chat_template": hashlib.sha256(template.encode("utf-8", "surrogatepass")).hexdigest(),
        }

    def positions(self) -> int | None:
        """How many tokens a sequence may have; None: any number."""
        return most_positions(check_base(self.base, self.revision))

    def load(self, dtype: torch.dtype, device: torch.device) -> Any:
        """The model on a device, in evaluation mode. An adapter keeps the type that it is stored in.

        Raises:
            UserError: it cannot be loaded, or the tokenizer has tokens that the model has no rows for.
        """
        model = load_weights(self.base, revision=self.revision, dtype=dtype)
        rows = embedding_rows(model.config)
        if len(self.tokenizer) > rows:
            raise UserError(
                f"{self.name}: the tokenizer has {len(self.tokenizer)} tokens and the model's embedding {rows} rows; "
                "take the tokenizer of this model"
            )
        torch.nn.Module.to(model, device)  # in place; transformers' own `to` is untyped for a device
        if self.adapter is not None:
            try:
                model = PeftModel.from_pretrained(model, str(self.adapter), autocast_adapter_dtype=False)
            except (ValueError, TypeError, KeyError, RuntimeError) as error:
                reason = " ".join(str(error).split())[:300]
                raise UserError(f"{self.adapter}: PEFT cannot load this adapter ({reason})") from None
        return model.eval()


@contextmanager
def opened_unmerged(source: str, base: str | None, say: Say = lambda text: None) -> Iterator[Unmerged]:
    """What `source` stands for: a run, a checkpoint, an adapter, a model's folder, or a hub model.

    Args:
        base: the base where the source does not say it or it has moved; refused for a whole model.
    Raises:
        UserError: it is nothing of the kind, or a reward model, which answers nothing.
    """
    path = Path(source)
    if (path / "config.json").is_file() or not path.exists():
        if base is not None:
            raise UserError(f"--base: {source} is a whole model, which has no other base; leave --base out")
        check_base(source, None)
        yield Unmerged(path.name, source, None, None, read_tokenizer(source))
        return
    with opened(path, base, None, say) as found:
        if found.is_reward_model:
            raise UserError(f"{source}: a reward model, which gives rewards and no answers; it cannot be asked")
        if found.run is None:
            read_low_rank(found.adapter)  # an adapter that PEFT would load as none is refused
            has_own = (path / "tokenizer_config.json").is_file()
            tokenizer = read_tokenizer(str(path) if has_own else found.base)
            yield Unmerged(path.resolve().name, found.base, found.revision, found.adapter, tokenizer)
            return
        lora_form(found.adapter, "adapter")
        run, step = found.run.path, step_of(found.path)
        yield Unmerged(
            f"{run.resolve().name} step {step}",
            found.base,
            found.revision,
            found.adapter,
            tokenizer_of(found).tokenizer,
            run,
            step,
        )

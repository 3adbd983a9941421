"""Scores by a reward model: a folder that transformers opens as AutoModelForSequenceClassification with one output.

The conversation is written by the chat template of the model's own tokenizer. The score is that of transformers for the
conversation alone, without padding. In a batch the pooled token is found by its position in the conversation, because
transformers takes the last token of the padded row that is not `pad_token_id`, and refuses rows without such an id.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uft_ds.architectures.facts import declared_positions
from uft_ds.errors import CheckFailed, UserError
from uft_ds.host.remembered_hashes import remembered_sha256
from uft_ds.host.terminal import in_one_line
from uft_ds.scoring.item import Item, Judgement, failed, found
from uft_ds.scoring.rows import written

if TYPE_CHECKING:
    from torch import Tensor

_TOKENS_PER_BATCH = 8192
_FILES = ("*.json", "*.safetensors", "*.bin", "*.model", "*.jinja")
_AGREEMENT = {"float32": 1e-3, "float16": 2e-2, "bfloat16": 2e-1}
"""How far a score of ours may be from transformers' own, relative to 1 + its size: rounding of the type."""


class RewardScorer:
    """Scores conversations, longest first, in batches of about equal lengths."""

    batch_items = 512

    def __init__(self, folder: Path, *, dtype: str | None = None, max_length: int | None = None) -> None:
        """
        Args:
            dtype: float32, float16 or bfloat16; None: the stored one on a GPU, float32 on a CPU.
            max_length: longest conversation in tokens; None: what config.json allows.
        Raises:
            UserError: the folder holds no such model, or no chat template.
        """
        import torch

        self._tokenizer = checked_tokenizer(folder)
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        stored = "auto" if self._device.type == "cuda" else "float32"
        self._model = _loaded(folder, dtype or stored).to(self._device).eval()
        config = self._model.config
        self._dtype = str(self._model.dtype).removeprefix("torch.")
        longest = _longest(self._model)
        if max_length is not None and max_length > longest:
            raise UserError(f"--max-length {max_length:,}: the model reads {longest:,} tokens at most (config.json)")
        self._max_length = max_length or longest
        self._num_embeddings = self._model.get_input_embeddings().num_embeddings
        self._pad_id = getattr(config.get_text_config(), "pad_token_id", None)
        # A decoder's class for classification: hidden states, and a linear head at one position.
        self._pools = hasattr(self._model, "score") and hasattr(self._model, self._model.base_model_prefix)
        self._is_compared = False
        self._identity = {
            "scorer": f"reward:{folder.name}",
            "files": {path.name: remembered_sha256(path.resolve()) for path in _files(folder)},
            "dtype": self._dtype,
            "max_length": self._max_length,
        }

    def identity(self) -> Mapping[str, Any]:
        return self._identity

    def score(self, items: Sequence[Item]) -> list[Judgement]:
        judgements: dict[int, Judgement] = {}
        ids: dict[int, list[int]] = {}
        for index, item in enumerate(items):
            try:
                tokens = self._tokens(item)
            except ValueError as error:
                judgements[index] = failed(str(error))
                continue
            if len(tokens) > self._max_length:
                judgements[index] = failed(f"{len(tokens):,} tokens, at most {self._max_length:,} can be read")
            else:
                ids[index] = tokens
        for batch in _batches(ids):
            scores = self._scores([ids[index] for index in batch])
            judgements |= {index: found(score) for index, score in zip(batch, scores, strict=True)}
        return [judgements[index] for index in range(len(items))]

    def close(self) -> None:
        """Nothing to end."""

    def _tokens(self, item: Item) -> list[int]:
        turns = [*written(item.messages), {"role": "assistant", "content": item.response}]
        try:
            text = self._tokenizer.apply_chat_template(turns, tools=list(item.tools) or None, tokenize=False)
        except Exception as error:  # noqa: BLE001 - templates of models raise what they like
            raise ValueError(f"the chat template refuses it ({in_one_line(str(error), 200)})") from None
        # The template has written every special token; adding them again would double the BOS token.
        ids: list[int] = self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        if not ids:
            raise ValueError("the chat template writes no token")
        if max(ids) >= self._num_embeddings:  # on a GPU the lookup would break the process for all that follow
            raise ValueError(f"its tokenizer gives token {max(ids):,}, the model knows {self._num_embeddings:,} tokens")
        return ids

    def _scores(self, rows: Sequence[list[int]]) -> list[float]:
        import torch

        with torch.inference_mode():
            scores = self._forward(rows)
            if not self._is_compared:
                self._compare(rows[0], float(scores[0]))
        return [float(score) for score in scores]

    def _forward(self, rows: Sequence[list[int]]) -> Tensor:
        """[rows]: scores of conversations, padded on the right."""
        import torch

        longest = max(map(len, rows))
        pad = 0 if self._pad_id is None else self._pad_id
        ids = torch.tensor([row + [pad] * (longest - len(row)) for row in rows], device=self._device)
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=self._device)
        if not self._pools:
            logits: Tensor = self._model(input_ids=ids, attention_mask=mask).logits
            return logits[:, 0].float()
        inner = getattr(self._model, self._model.base_model_prefix)
        hidden = inner(input_ids=ids, attention_mask=mask)[0]
        at = torch.tensor([pooled_position(row, self._pad_id) for row in rows], device=self._device)
        pooled = hidden[torch.arange(len(rows), device=self._device), at]
        scored: Tensor = self._model.score(pooled)
        return scored[:, 0].float()

    def _compare(self, row: list[int], ours: float) -> None:
        """Compare our score of a conversation with the one that transformers gives to it alone."""
        import torch

        theirs = float(self._model(input_ids=torch.tensor([row], device=self._device)).logits[0, 0])
        if abs(ours - theirs) > _AGREEMENT.get(self._dtype, 1e-3) * (1 + abs(theirs)):
            raise CheckFailed(
                f"--by {self._identity['scorer']}: a score of {ours:g} in a batch, and {theirs:g} by transformers for "
                "the same conversation alone; this architecture pools in a way that is not known here"
            )
        self._is_compared = True


def pooled_position(row: Sequence[int], pad_id: int | None) -> int:
    """The token of an unpadded conversation at which transformers takes the score: the last one that is not padding."""
    if pad_id is None:
        return len(row) - 1
    return max((index for index, token in enumerate(row) if token != pad_id), default=0)


def _longest(model: Any) -> int:
    """How many tokens the model reads. Learnt positions of RoBERTa's kind begin behind the padding's own."""
    longest = declared_positions(model.config) or 2**31
    for name, module in model.named_modules():
        padding = getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and padding is not None:
            return longest - int(padding) - 1
    return longest


def _batches(ids: Mapping[int, list[int]]) -> list[list[int]]:
    """Indices of conversations by length, the longest first: if memory is short, it is at once."""
    batches: list[list[int]] = []
    for index in sorted(ids, key=lambda index: (-len(ids[index]), index)):
        width = len(ids[batches[-1][0]]) if batches else 0
        if not batches or width * (len(batches[-1]) + 1) > _TOKENS_PER_BATCH:
            batches.append([])
        batches[-1].append(index)
    return batches


def _files(folder: Path) -> list[Path]:
    return sorted({path for pattern in _FILES for path in folder.glob(pattern) if path.is_file()})


def checked_tokenizer(folder: Path) -> Any:
    """The tokenizer of a reward model's folder; the weights are not read.

    Raises:
        UserError: the folder holds no such model, or no chat template.
    """
    _check_folder(folder)
    from uft_ds.data.tokens.chat_tokenizer import read_tokenizer

    tokenizer = read_tokenizer(str(folder), local_files_only=True)
    if not tokenizer.chat_template:
        raise UserError(f"--by reward:{folder}: its tokenizer has no chat template, which says how it reads a turn")
    return tokenizer


def _check_folder(folder: Path) -> None:
    name = f"--by reward:{folder}"
    if not folder.is_dir():
        raise UserError(f"{name}: no such folder; expected the folder of a sequence classification model")
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise UserError(
            f"{name}: holds an adapter, which only an online run of a policy on the same base reads (score_by); here "
            "give a whole model: merge it into its base by PEFT's merge_and_unload, or give what `uft convert RUN "
            "FOLDER --to reward-model` writes"
        )
    if (folder / "recipe.yaml").is_file() and not (folder / "config.json").is_file():
        raise UserError(
            f"{name}: is a run of uft; give the folder that `uft convert RUN FOLDER --to reward-model` writes of it"
        )
    if not (folder / "config.json").is_file():
        raise UserError(f"{name}: has no config.json; expected the folder of a sequence classification model")


def _loaded(folder: Path, dtype: str) -> Any:
    from transformers import AutoModelForSequenceClassification

    name = f"--by reward:{folder}"
    try:
        model, info = AutoModelForSequenceClassification.from_pretrained(
            folder, dtype=dtype, output_loading_info=True, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # noqa: BLE001 - transformers raises many types here
        raise UserError(f"{name}: cannot be loaded ({in_one_line(str(error), 300)})") from None
    missing = sorted(info["missing_keys"])
    if missing:
        raise UserError(
            f"{name}: its files lack {', '.join(missing[:3])}, which transformers would draw at random; expected a "
            "reward model with its head"
        )
    if model.config.num_labels != 1:
        raise UserError(f"{name}: it has {model.config.num_labels} outputs (num_labels), expected one, the reward")
    return model

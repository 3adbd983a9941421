"""Generate answers of a model: in batches for evaluation, or streamed for a chat in the terminal."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase, TextStreamer

from uft_ds.architectures.facts import declared_positions
from uft_ds.data.tokens.chat_template import end_of_turn_id, render
from uft_ds.data.tokens.chat_tokenizer import read_tokenizer
from uft_ds.errors import UserError
from uft_ds.streams.load import check_base_files, config_of_folder, embedding_rows, found_instead, load_weights

Messages = list[dict[str, str]]


def load_for_generation(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a Hugging Face model folder for generation: bfloat16 on a GPU, float32 on the CPU if there is none.

    float32 because bfloat16 is many times slower on CPUs without native support for it.

    Raises:
        UserError: the folder holds no complete model with a chat template.
    """
    check_model_folder(path)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    try:
        config_of_folder(path)  # before the tokenizer, whose loading reads it too
        tokenizer = read_tokenizer(str(path), local_files_only=True)
        end_of_turn_id(tokenizer)  # before the weights, so that a missing template is reported at once
        check_base_files(path)
        model = load_weights(str(path), dtype=dtype, local_files_only=True)
    except UserError as error:
        reason = str(error).removeprefix("model.base: ")
        raise UserError(f"`{path}` cannot be loaded as a model: {reason}") from None
    except (OSError, ValueError) as error:
        raise UserError(f"`{path}` cannot be loaded as a model: {error}") from error
    torch.nn.Module.to(model, device)  # in place; transformers' own `to` is untyped for a device
    return model.eval(), tokenizer


def check_model_folder(path: Path) -> None:
    """Raise a UserError that says what `path` is instead, if it isn't a model's folder."""
    if not path.is_dir():
        found = found_instead(path) if path.exists() else "is not a folder"
        raise UserError(f"`{path}` {found}; give the folder of a Hugging Face model.")
    if (path / "config.json").is_file():
        return
    if (path / "adapter_config.json").is_file():
        raise UserError(f"`{path}` holds an adapter, not a whole model; merge it first with `uft convert`.")
    raise UserError(f"`{path}` is not a model folder: it has no config.json. A run's checkpoint needs `uft convert`.")


def generate_responses(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Messages],
    *,
    max_new_tokens: int,
    batch_size: int = 16,
    temperature: float = 0.0,
    on_batch: Callable[[int], None] | None = None,
) -> list[str]:
    """The answers to `prompts`, in their order, without special tokens.

    Batches are formed by length, the longest first: this needs little padding, and a lack of memory shows at once.

    Args:
        prompts: conversations that end before the assistant's turn.
        max_new_tokens: per answer; an answer that doesn't end by itself is cut there.
        temperature: 0 takes the likeliest token; above 0 samples from the whole distribution (torch's seed).
        on_batch: called after each batch with its number of prompts.
    """
    rows = [prompt_ids(tokenizer, messages) for messages in prompts]
    for index, row in enumerate(rows):
        check_length(model, row, max_new_tokens, name=f"Prompt {index}")
    stop_ids = stop_token_ids(model, tokenizer)
    pad_id = stop_ids[0] if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    config = generation_config(stop_ids, pad_id, max_new_tokens=max_new_tokens, temperature=temperature)

    order = sorted(range(len(rows)), key=lambda index: len(rows[index]), reverse=True)
    responses = [""] * len(rows)
    with generating(model, config):
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            new_rows = continuations(model, [rows[index] for index in batch], pad_id)
            for index, new_ids in zip(batch, new_rows, strict=True):
                responses[index] = decode(tokenizer, until_stop(new_ids, stop_ids))
            if on_batch is not None:
                on_batch(len(batch))
    return responses


def prompt_ids(tokenizer: PreTrainedTokenizerBase, messages: Messages) -> list[int]:
    """The token ids of a conversation, up to where the assistant's text begins."""
    text = render(tokenizer, messages, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def check_length(model: PreTrainedModel, ids: list[int], max_new_tokens: int, *, name: str) -> None:
    """Refuse prompts that leave too few positions, or hold tokens that the embedding has no rows for.

    Beyond the model's limit of positions answers degrade silently.
    """
    rows = embedding_rows(model.config)
    if max(ids, default=0) >= rows:
        raise UserError(
            f"{name} holds the token id {max(ids)}, and the model's embedding has only {rows} rows: the folder's "
            "tokenizer has tokens that the model was not given; take the tokenizer of this model."
        )
    limit = declared_positions(model.config)
    if limit is not None and len(ids) + max_new_tokens > limit:
        raise UserError(
            f"{name} has {len(ids)} tokens; with max_new_tokens={max_new_tokens} that is beyond the {limit} "
            "positions of the model. Shorten it, or lower max_new_tokens."
        )


def stop_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that end an answer: the template's end of turn first, then the end tokens of tokenizer and model."""
    of_model = model.generation_config.eos_token_id if model.generation_config is not None else None
    declared = of_model if isinstance(of_model, list) else [of_model]
    candidates = [end_of_turn_id(tokenizer), tokenizer.eos_token_id, *declared]
    return list(dict.fromkeys(token for token in candidates if token is not None))


LEAST_TEMPERATURE = 1e-4
"""Below it a logit divided by the temperature is larger than some types hold; the likeliest token is what it means."""


def generation_config(stop_ids: list[int], pad_id: int, *, max_new_tokens: int, temperature: float) -> GenerationConfig:
    """Greedy at temperature 0, or below `LEAST_TEMPERATURE`; otherwise plain sampling, without top-k or top-p."""
    samples = temperature >= LEAST_TEMPERATURE
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if samples else {}
    return GenerationConfig(
        max_new_tokens=max_new_tokens, eos_token_id=stop_ids, pad_token_id=pad_id, use_cache=True, **sampling
    )


@contextmanager
def generating(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Evaluation mode, no gradients, and `config` in place of the checkpoint's own; restored afterwards."""
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode(), configured(model, config):
            yield
    finally:
        model.train(was_training)


@contextmanager
def configured(model: PreTrainedModel, config: GenerationConfig) -> Iterator[None]:
    """Within the block, `config` in place of the checkpoint's own.

    `generate(generation_config=...)` would take unset values from the checkpoint's file: for Qwen2.5 a repetition
    penalty of 1.05 and sampling flags, with a warning.
    """
    own_config = model.generation_config
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = own_config


def continuations(
    model: PreTrainedModel,
    rows: Sequence[list[int]],
    pad_id: int,
    streamer: TextStreamer | None = None,
    *,
    device: torch.device | None = None,
) -> list[list[int]]:
    """The ids that the model appends to each row. Must be called inside `generating` or `configured`.

    Args:
        device: of the computation; None: that of the model's weights, which may lie elsewhere if they are offloaded.
    """
    prompt_BT, mask_BT = left_pad(rows, pad_id)
    place = device or model.device
    return appended(model, prompt_BT.to(place), mask_BT.to(place), streamer=streamer).tolist()


def appended(model: PreTrainedModel, ids_BT: Tensor, mask_BT: Tensor, **options: Any) -> Tensor:
    """The ids that Hugging Face's `generate` appends, with any of its options: [batch, new tokens].

    Must be called inside `generating` or `configured`.
    """
    generate = cast(Callable[..., Tensor], model.generate)
    return generate(ids_BT, attention_mask=mask_BT, **options)[:, ids_BT.shape[1] :]


def left_pad(rows: Sequence[list[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Rows aligned at their ends, and the attention mask: [batch, tokens] each.

    The mask comes from the lengths, never from `ids == pad_id`: if eos is also pad, that would mask the ends of
    earlier turns.
    """
    width = max(len(row) for row in rows)
    ids_BT = torch.tensor([[pad_id] * (width - len(row)) + row for row in rows])
    mask_BT = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return ids_BT, mask_BT


def until_stop(ids: list[int], stop_ids: list[int]) -> list[int]:
    """The ids before the first stop token; all of them if there is none."""
    end = next((position for position, token in enumerate(ids) if token in stop_ids), len(ids))
    return ids[:end]


def decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


class Printer(TextStreamer):
    """Prints an answer as it grows and keeps its text: an interrupted answer stays in the history."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        self.text = ""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text += text
        super().on_finalized_text(text, stream_end)


def stream_answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    messages: Messages,
    printer: Printer,
    *,
    max_new_tokens: int,
    temperature: float,
) -> None:
    """Generate one answer into `printer`."""
    row = prompt_ids(tokenizer, messages)
    check_length(model, row, max_new_tokens, name="The conversation")
    stop_ids = stop_token_ids(model, tokenizer)
    config = generation_config(stop_ids, stop_ids[0], max_new_tokens=max_new_tokens, temperature=temperature)
    with generating(model, config):
        continuations(model, [row], stop_ids[0], streamer=printer)


def chat(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    prompt: str | None,
    max_new_tokens: int,
    temperature: float,
    system: str | None,
) -> None:
    """Answer `prompt` on standard output, or hold a conversation if `prompt` is None.

    Raises:
        UserError: a text is not UTF-8, or the prompt leaves too few positions.
    """
    for option, text in (("--prompt", prompt), ("--system", system)):
        if text is not None:
            _check_is_unicode(text, option)
    opening = [] if system is None else [{"role": "system", "content": system}]

    def reply(messages: Messages, printer: Printer) -> None:
        stream_answer(model, tokenizer, messages, printer, max_new_tokens=max_new_tokens, temperature=temperature)

    if prompt is not None:
        reply([*opening, {"role": "user", "content": prompt}], Printer(tokenizer))
        return
    print("/reset forgets the conversation; /exit or Ctrl-D leaves; Ctrl-C stops an answer.")
    messages = opening
    while (line := read_line()) not in (None, "/exit"):
        if line == "/reset":
            messages = opening
        elif line:
            messages = converse(messages, line, Printer(tokenizer), reply)


def _check_is_unicode(text: str, name: str) -> None:
    """Refuse bytes of the command line or of the terminal that are no characters; tokenizers fail on them."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{name}: {text[error.start]!a} is no character: it is not UTF-8; convert the text.") from None


def read_line() -> str | None:
    """The user's next line; None at the end of input. Ctrl-C discards the line."""
    try:
        return input("> ").strip()
    except EOFError:
        print()
        return None
    except KeyboardInterrupt:
        print()
        return ""


def converse(messages: Messages, line: str, printer: Printer, reply: Callable[[Messages, Printer], None]) -> Messages:
    """The conversation with the user's line and its answer appended; unchanged if there is no answer."""
    asked = [*messages, {"role": "user", "content": line}]
    try:
        _check_is_unicode(line, "the line")
        reply(asked, printer)
    except KeyboardInterrupt:
        printer.end()
    except UserError as error:
        print(f"{error} /reset starts anew.")
        return messages
    return [*asked, {"role": "assistant", "content": printer.text}] if printer.text else messages

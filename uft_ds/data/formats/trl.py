"""The format `trl`: TRL's data set types, recognised by their columns."""

from __future__ import annotations

from uft_ds.data.formats.columns import reads
from uft_ds.data.formats.feedback import kto
from uft_ds.data.formats.fields import Row, checked_text, default_score, present, shown
from uft_ds.data.formats.turns import (
    Item,
    Tools,
    all_supervised,
    answer_turns,
    check_prompt_is_said,
    check_turns,
    conversation,
    dialogue_pair,
    one_answer,
    pair,
    prompt_turns,
    row_messages,
    row_tools,
)


@reads("messages", "prompt", "completion", "label", "chosen", "rejected", "tools")
def trl(row: Row, *, score: float | None) -> list[Item]:
    """The types of TRL that hold supervised turns, recognised by their columns; null means absent.

        `messages`                              instruction, every assistant turn supervised
        `prompt`, `completion`                  instruction, the assistant turns of the completion
        `prompt`, `completion`, `label`         binary
        `prompt`, `chosen`, `rejected`          pair
        `chosen`, `rejected` as turns           pair, the prompt is the common beginning of both

    `prompt`, `completion`, `chosen` and `rejected` are text or turns. Text becomes a user or an assistant turn, while
    TRL would join it without a chat template. Two texts without `prompt` are refused: TRL cuts them where they first
    differ, which is often in the middle of a word. A text `prompt` beside whole conversations must be one of their
    turns. `tools` may list JSON schemas, as a list or as JSON text.
    """
    given = present(row)
    tools = row_tools(row)
    kinds = given & {"messages", "completion"} | ({"chosen"} if given & {"chosen", "rejected"} else set())
    if len(kinds) > 1:
        raise ValueError(f"expected one of 'messages', 'completion' and 'chosen', found {' and '.join(sorted(kinds))}")
    if "chosen" in kinds:
        if "label" in given:
            raise ValueError("'label' with 'chosen' and 'rejected' is not a type of TRL; leave one of them out")
        return [_preference(row, tools)]
    if "completion" in kinds:
        return kto(row, score=score) if "label" in given else [_completion(row, score, tools)]
    if "messages" in kinds:
        if "label" in given:
            raise ValueError("'label' with 'messages' is not a type of TRL; use the format 'kto'")
        turns = row_messages(row)
        check_prompt_is_said(row, turns)
        return [all_supervised(turns, default_score(score), tools)]
    if "text" in given:
        raise ValueError("'text' does not say what is prompt and what is response; expected 'prompt' and 'completion'")
    raise ValueError(
        "expected 'messages', 'prompt' and 'completion', or 'chosen' and 'rejected'; "
        f"found {', '.join(sorted(given))[:80] or 'nothing'}"
    )


def _completion(row: Row, score: float | None, tools: Tools) -> Item:
    prompt = prompt_turns(row.get("prompt"), "prompt")
    turns = (*prompt, *answer_turns(row["completion"], "completion"))
    check_turns(turns)
    return all_supervised(turns, default_score(score), tools, context=len(prompt))


def _preference(row: Row, tools: Tools) -> Item:
    chosen, rejected, prompt = row.get("chosen"), row.get("rejected"), row.get("prompt")
    if isinstance(chosen, list) != isinstance(rejected, list):
        raise ValueError("'chosen' and 'rejected': expected both as text or both as turns, found one of each")
    if isinstance(chosen, list) and not isinstance(prompt, list):
        dialogues = conversation(chosen, "chosen"), conversation(rejected, "rejected")
        check_prompt_is_said(row, dialogues[0][:-1])
        return dialogue_pair(*dialogues, tools=tools)
    if prompt is None:
        raise ValueError(_without_prompt(checked_text(chosen, "chosen"), checked_text(rejected, "rejected")))
    better = one_answer(answer_turns(chosen, "chosen"), "chosen")
    worse = one_answer(answer_turns(rejected, "rejected"), "rejected")
    return pair(prompt_turns(prompt, "prompt"), better, worse, tools=tools)


def _without_prompt(chosen: str, rejected: str) -> str:
    """Why two texts without a prompt are refused, and what to do.

    TRL's `extract_prompt` cuts them where they first differ: "Assistant: Hello" and "Assistant: Help" become the prompt
    "Assistant: Hel" and the answers "lo" and "p".
    """
    if all("\n\nHuman:" in text and "\n\nAssistant:" in text for text in (chosen, rejected)):
        return "expected 'prompt' beside 'chosen' and 'rejected'; these are dialogues of the format 'hh_rlhf'"
    return (
        f"expected 'prompt' beside 'chosen' and 'rejected', found only two texts ({shown(chosen)}); where the prompt "
        "ends cannot be seen from them: add 'prompt', or give both as turns [{role, content}, ...]"
    )

"""The tasks of a recipe before a launch: prompts that cannot be read or answered, and scorers that cannot be made."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from runs import write_recipe, write_rows

from uft_ds.data.tokens.tokenize import load_tokenizer
from uft_ds.errors import UserError
from uft_ds.recipe.settings import Settings
from uft_ds.recipe.to_settings import load_settings
from uft_ds.run.tasks import check_tasks, task_prompts


def settings_with(folder: Path, base: Path, rows: list[dict[str, Any]], **task: Any) -> Settings:
    path = write_rows(folder / "prompts.jsonl", rows)
    given = {"name": "sums", "path": str(path), "score_by": "regex:a"} | task
    return load_settings(str(write_recipe(folder, base, evaluate={"tasks": [given]})))


@pytest.mark.parametrize(
    ("rows", "task", "words"),
    [
        ([{"prompt": "a"}, {"promt": "b"}], {}, r"prompts\.jsonl:2: .*expected either 'prompt' or 'messages'"),
        ([{"prompt": "a"}, {"prompt": "b <|im_end|>"}], {}, r"prompts\.jsonl:2: the text holds a special token"),
        ([{"prompt": "a"}], {"examples": 2}, r"evaluate\.tasks\.0: .*prompts\.jsonl has 1 prompts, expected 2"),
        (
            [{"prompt": "a " * 600}],
            {},
            r"prompts\.jsonl:1: the prompt has \d+ tokens; with evaluate\.tasks\.0\.max_new",
        ),
        ([{"prompt": "a"}], {"score_by": "code:no_such_module:f"}, r"evaluate\.tasks\.0\.score_by"),
        ([{"prompt": "a"}], {"score_by": "regex:("}, r"evaluate\.tasks\.0\.score_by"),
    ],
)
def test_what_would_fail_later_is_refused(
    tiny_qwen2: Path, tmp_path: Path, rows: list[dict[str, Any]], task: dict[str, Any], words: str
) -> None:
    """A bad row, by file and line, and a scorer by its key."""
    settings = settings_with(tmp_path, tiny_qwen2, rows, **task)
    with pytest.raises(UserError, match=words):
        check_tasks(settings, load_tokenizer(str(tiny_qwen2)))


def test_prompts_are_rendered_as_for_generation(tiny_qwen2: Path, tmp_path: Path) -> None:
    """The ids of Hugging Face's template with a generation prompt; renamed columns; the rest goes to the scorer."""
    rows = [{"question": "How many?", "answer": 3}, {"question": "Why?", "answer": 4}, {"question": "no", "answer": 5}]
    settings = settings_with(tmp_path, tiny_qwen2, rows, columns={"prompt": "question"}, examples=2)
    chat = load_tokenizer(str(tiny_qwen2))
    check_tasks(settings, chat)
    found = task_prompts(settings.tasks[0], chat, "evaluate.tasks.0")
    texts = [[{"role": "user", "content": row["question"]}] for row in rows[:2]]
    expected = [
        chat.tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False) for turns in texts
    ]
    assert [list(prompt.token_ids) for prompt in found] == expected
    assert [prompt.text.meta for prompt in found] == [{"answer": 3}, {"answer": 4}]
    assert [Path(prompt.origin).name for prompt in found] == ["prompts.jsonl:1", "prompts.jsonl:2"]


def test_prompts_that_are_not_there_are_named_by_their_key(tiny_qwen2: Path, tmp_path: Path) -> None:
    """Before the launch, and on a rank whose machine lacks them."""
    settings = settings_with(tmp_path, tiny_qwen2, [{"prompt": "a"}])
    chat = load_tokenizer(str(tiny_qwen2))
    (task,) = settings.tasks
    Path(task.path).unlink()
    for ask in (lambda: check_tasks(settings, chat), lambda: task_prompts(task, chat, "evaluate.tasks.0")):
        with pytest.raises(UserError, match=rf"^evaluate\.tasks\.0\.path: {task.path}: no such file or folder"):
            ask()


def test_a_copy_of_a_training_source_is_refused(tiny_qwen2: Path, tmp_path: Path) -> None:
    """By its content, under any name."""
    settings = settings_with(tmp_path, tiny_qwen2, [{"prompt": "a"}])
    trained = Path(settings.data.sources[0].path)
    Path(settings.tasks[0].path).write_bytes(trained.read_bytes())
    with pytest.raises(
        UserError, match=rf"^evaluate\.tasks\.0\.path: .*holds the rows of the training source {trained};"
    ):
        check_tasks(settings, load_tokenizer(str(tiny_qwen2)))

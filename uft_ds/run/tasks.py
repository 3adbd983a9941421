"""The tasks of a recipe's `evaluate`: what is checked before the launch, and what each rank builds of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from uft_ds.architectures.facts import most_positions
from uft_ds.data.rows.reading import content_hash, find_data
from uft_ds.data.tokens.chat_tokenizer import ChatTokenizer
from uft_ds.data.tokens.tokenize import load_tokenizer
from uft_ds.engine.engine import Engine
from uft_ds.errors import UserError
from uft_ds.evaluation.generate import decode, stop_token_ids
from uft_ds.host.signals import Stop, StopRequest
from uft_ds.recipe.settings import Settings, TaskSettings
from uft_ds.rollouts.answers import Sampling
from uft_ds.rollouts.builtin import BuiltinGenerator
from uft_ds.rollouts.prompts import PromptText
from uft_ds.rollouts.room import fits_whole, tokens_that_fit
from uft_ds.rollouts.scorers import SourceScorer, check_scorer
from uft_ds.rollouts.tasks import Task, TaskEvaluation, TaskPrompt
from uft_ds.scoring.rows import Reading, Rows
from uft_ds.streams.load import check_base
from uft_ds.streams.model import UFTModel
from uft_ds.streams.policy import base_of


def check_tasks(settings: Settings, chat: ChatTokenizer) -> None:
    """Refuse what would fail after the launch: prompts that cannot be read or answered, a scorer that cannot be made.

    And prompts that are trained on, whose scores would say nothing.

    Raises:
        UserError: names the recipe's key, or the file and line.
    """
    if not settings.tasks:
        return
    _check_never_trained_on(settings)
    limit = most_positions(check_base(settings.model.base, settings.model.revision))
    for number, task in enumerate(settings.tasks):
        key = f"evaluate.tasks.{number}"
        for prompt in task_prompts(task, chat, key):
            tokens = len(prompt.token_ids)
            if limit is not None and tokens + task.max_new_tokens > limit:
                raise UserError(
                    f"{prompt.origin}: the prompt has {tokens} tokens; with {key}.max_new_tokens "
                    f"{task.max_new_tokens} that is beyond the {limit} positions of the model; lower it, or leave the "
                    "row out"
                )
        check_scorer(task.scorer, f"{key}.score_by")


def _check_never_trained_on(settings: Settings) -> None:
    """Refuse prompts that are a training source by their content; `recipe/tasks.py` knows only where they are."""
    trained = {
        content_hash(find_data(source.path, source.split, source.path_key)): source.label
        for source in settings.data.sources
    }
    for number, task in enumerate(settings.tasks):
        key = f"evaluate.tasks.{number}.path"
        label = trained.get(content_hash(find_data(task.path, task.split, key)))
        if label is not None:
            raise UserError(
                f"{key}: {task.path} holds the rows of the training source {label}; a task's "
                "prompts must not be trained on"
            )


def task_rows(task: TaskSettings, key: str) -> Rows:
    """The rows of a task's prompts. key: of the task in the recipe, such as evaluate.tasks.0.

    Raises:
        UserError: the data is not there or cannot be read; names the key and the path.
    """
    return Rows(Reading(task.path, "prompts", task.split, task.columns, path_key=f"{key}.path"))


def task_prompts(task: TaskSettings, chat: ChatTokenizer, key: str) -> tuple[TaskPrompt, ...]:
    """The prompts of a task, in the order of the data.

    Raises:
        UserError: a row cannot be read, by its file and line; or there are fewer than `examples`.
    """
    found = []
    for row in task_rows(task, key).rows(task.examples):
        for item in row.items:
            if chat.holds_control_token(item.messages, item.tools):
                raise UserError(
                    f"{row.place}: the text holds a special token of the model, which only the template may"
                )
            ids = chat.encode(chat.render(item.messages, tools=item.tools, for_generation=True))
            found.append(TaskPrompt(row.place, tuple(ids), PromptText(item.messages, item.tools, item.meta)))
    if len(found) < (task.examples or 1):
        raise UserError(f"{key}: {task.path} has {len(found)} prompts, expected {task.examples or 'at least one'}")
    return tuple(found)


@contextmanager
def built_tasks(
    settings: Settings, engine: Engine, model: UFTModel, request: StopRequest
) -> Iterator[TaskEvaluation | None]:
    """The tasks of a run, which end with the block; None if it has none. Every rank must enter it."""
    if not settings.tasks:
        yield None
        return
    chat = load_tokenizer(
        settings.model.base, revision=settings.model.revision, chat_template=settings.model.chat_template
    )
    asked_alone = Stop(request, lambda number: number).check  # rank 0 alone asks; what it raises is raised on all
    base = base_of(model.policy)
    stop_ids = tuple(stop_token_ids(base, chat.tokenizer))
    # The scorers first: what they hold in memory, no generator of the run can have.
    keys = [f"evaluate.tasks.{number}" for number in range(len(settings.tasks))]
    scorers = [
        SourceScorer(task.scorer, f"{key}.score_by", asked_alone) if engine.rank == 0 else None
        for key, task in zip(keys, settings.tasks, strict=True)
    ]
    tasks = [
        Task(task.name, task_prompts(task, chat, key), task.max_new_tokens, scorer)
        for key, task, scorer in zip(keys, settings.tasks, scorers, strict=True)
    ]
    longest = max(len(prompt.token_ids) + task.max_new_tokens for task in tasks for prompt in task.prompts)

    def generator_of(max_new_tokens: int) -> BuiltinGenerator:
        most = settings.generator.tokens_at_once
        whole = fits_whole(engine, tokens=max(most, longest))
        return BuiltinGenerator(
            engine,
            Sampling(0.0, 1.0, max_new_tokens, stop_ids),
            pad_id=stop_ids[0],
            tokens_per_batch=most if whole else tokens_that_fit(engine, most),
            stop=Stop(request, engine.agree).check,
            whole=whole,
        )

    evaluation = TaskEvaluation(engine, tasks, generator_of, lambda ids: decode(chat.tokenizer, list(ids)).strip())
    try:
        yield evaluation
    finally:
        evaluation.close()

"""The generator of an online run, made from its recipe, and the check of a server before anything is launched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from uft_ds.data.tokens.chat_tokenizer import ChatTokenizer
from uft_ds.data.tokens.tokenize import load_tokenizer
from uft_ds.engine.engine import Engine
from uft_ds.errors import UserError
from uft_ds.evaluation.generate import stop_token_ids
from uft_ds.host.signals import Stop, StopRequest
from uft_ds.host.web import key_in
from uft_ds.recipe.settings import GeneratorSettings, Settings
from uft_ds.record.report import Reporter
from uft_ds.record.run_folder import RunFolder
from uft_ds.rollouts.adapter_versions import Adapters
from uft_ds.rollouts.answers import Generator, Sampling
from uft_ds.rollouts.builtin import BuiltinGenerator
from uft_ds.rollouts.examine import Needed, examine_server, refuse_problems
from uft_ds.rollouts.room import fits_whole, tokens_that_fit
from uft_ds.rollouts.served import Limits, ServedGenerator
from uft_ds.rollouts.server import Server, start_arguments
from uft_ds.streams.accept import accepted_policy
from uft_ds.streams.adapters import adapter_config_of, adapter_tensors
from uft_ds.streams.load import check_base, embedding_rows, empty_base
from uft_ds.streams.model import UFTModel
from uft_ds.streams.policy import OF_POLICY, adapted, base_of


def generator_of(
    settings: Settings,
    folder: RunFolder,
    engine: Engine,
    model: UFTModel,
    chat: ChatTokenizer,
    reporter: Reporter,
    request: StopRequest,
) -> Generator:
    """What answers the prompts of a run that generates. Every rank must call it; only rank 0's asks a server."""
    given = settings.generator
    base = base_of(model.policy)
    sampling = _sampling(given, base, chat)
    if given.by == "builtin":
        whole = fits_whole(engine, tokens=max(given.tokens_at_once, settings.data.max_length))
        return BuiltinGenerator(
            engine,
            sampling,
            pad_id=sampling.stop_token_ids[0],
            tokens_per_batch=given.tokens_at_once if whole else tokens_that_fit(engine, given.tokens_at_once),
            stop=Stop(request, engine.agree).check,
            whole=whole,
        )
    return ServedGenerator(
        server_of(given),
        sampling,
        Adapters(folder.adapters, adapter_config_of(adapted(model.policy)), settings.name),
        Limits(given.concurrency, given.timeout_seconds, given.patience_minutes * 60),
        vocab_size=embedding_rows(base.config),
        stop=Stop(request, lambda number: number).check,
        on_event=reporter.warn,
    )


def check_server(settings: Settings) -> None:
    """Refuse a server that does not do what the run needs of it, shown by asking it once.

    The two small adapters that it is given lie beside the run's folder, on the same disk, because the run's folder must
    not be touched before every check has passed.

    Raises:
        UserError: names the problem and its remedy.
    """
    given, lora, model = settings.generator, settings.adapters, settings.model
    config = check_base(model.base, model.revision)
    base = empty_base(config)
    chat = load_tokenizer(model.base, revision=model.revision, chat_template=model.chat_template)
    policy = accepted_policy(base, rank=lora.rank, alpha=lora.alpha, targets=lora.targets, dtype=torch.float32)
    trained = {OF_POLICY + name: tensor for name, tensor in policy.named_parameters() if tensor.requires_grad}
    output = settings.output.absolute()
    beside = output.with_name(f".{output.name}.server-check")
    needed = Needed(
        _sampling(given, base, chat),
        Adapters(beside, adapter_config_of(policy), settings.name),
        {name: tuple(tensor.shape) for name, tensor in adapter_tensors(policy, trained).items()},
        vocab_size=embedding_rows(config),
        tokens=settings.data.max_length,
        dtype=getattr(torch, model.dtype),
    )
    try:
        refuse_problems(examine_server(server_of(given), needed))
    finally:
        _remove_if_empty(beside)


def server_of(given: GeneratorSettings) -> Server:
    """The server of a recipe with `by: vllm`.

    Raises:
        UserError: the environment lacks the key.
    """
    assert given.url is not None, "a recipe without it has been refused"
    return Server(given.url, given.served_model, key_in(given.key_env, "generator.key_env"))


def arguments_of_server(settings: Settings) -> list[str]:
    """What `vllm serve` is given for a recipe with `by: vllm`; the base by its absolute path, if it is a folder.

    Raises:
        UserError: the recipe asks no server.
    """
    given, model = settings.generator, settings.model
    if given.by != "vllm":
        raise UserError(f"generator.by: {given.by} given; a recipe with generator.by=vllm has a server to start")
    return start_arguments(
        str(Path(model.base).absolute()) if Path(model.base).exists() else model.base,
        rank=settings.adapters.rank,
        dtype=model.dtype,
        revision=model.revision,
        served_model=given.served_model,
        max_length=settings.data.max_length,
    )


def _sampling(given: GeneratorSettings, base: Any, chat: ChatTokenizer) -> Sampling:
    stop_ids = stop_token_ids(base, chat.tokenizer)
    return Sampling(given.temperature, given.top_p, given.max_new_tokens, tuple(stop_ids))


def _remove_if_empty(folder: Path) -> None:
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()

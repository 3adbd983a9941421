"""One rank of a run: parse the arguments, prepare or open the run, train, and return the exit code."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import TextIO

import torch
from rich.console import Console

from uft_ds.checkpoint.generators import seed_generators
from uft_ds.checkpoint.load import restore_engine
from uft_ds.checkpoint.writer import CheckpointWriter
from uft_ds.data.mixture import Step, Steps, in_order
from uft_ds.data.source import StepSource
from uft_ds.data.sources import PreparedData
from uft_ds.engine.deepspeed_file import with_deepspeed_file
from uft_ds.engine.engine import Engine
from uft_ds.engine.ranks import current_ranks, init_distributed
from uft_ds.engine.waiting import while_others_wait
from uft_ds.errors import EXIT_BAD_INPUT, EXIT_CRASHED, EXIT_DONE, CheckFailed, Stopped, UserError
from uft_ds.host.faults import foreseen, lasting
from uft_ds.host.library_warnings import each_once
from uft_ds.host.locks import Lock
from uft_ds.host.signals import Stop, StopRequest
from uft_ds.host.standard_streams import LastingOutput
from uft_ds.host.terminal import SafeConsole, as_typed, duration, in_one_line, visible
from uft_ds.host.world import LauncherEnvironment, launcher_environment
from uft_ds.known.cache import Known, fill
from uft_ds.recipe.settings import Settings
from uft_ds.recipe.to_settings import load_settings
from uft_ds.record.html_report import write_report
from uft_ds.record.metrics_file import MetricsWriter
from uft_ds.record.report import Announcer, ConsoleReporter, FillReporter, Reporter, SilentReporter
from uft_ds.record.run_folder import RunFolder, Status, write_first
from uft_ds.rollouts.record import RecordFolder
from uft_ds.rollouts.shown import shown
from uft_ds.run.build import build_engine, build_reference_cache, build_sampler
from uft_ds.run.checks import check_sharding
from uft_ds.run.facts import facts_of
from uft_ds.run.online import build_rollouts
from uft_ds.run.prepare import ensure_data, open_data, prepare_run
from uft_ds.run.recompute import with_chosen_recompute
from uft_ds.run.resume import nothing_to_do, prepare_resume, resumed_from, resumed_position
from uft_ds.run.settings import located
from uft_ds.run.start_adapter import read_start, sample_of
from uft_ds.run.tasks import built_tasks
from uft_ds.streams.model import UFTModel
from uft_ds.training.determinism import make_deterministic
from uft_ds.training.evaluate import check_log_ratios_are_zero
from uft_ds.training.forwarding import Method
from uft_ds.training.loop import START, Session, train
from uft_ds.training.model_check import check_model
from uft_ds.training.start_check import check_starts_as_adapter
from uft_ds.training.steps import steps_of

GROUPS_BETWEEN_FLUSHES = 20
"""Groups (of `examples_per_step` responses) between two writes of the reference cache; a kill loses at most these."""

logger = logging.getLogger("uft_ds")

OUTCOME = "UFT_OUTCOME"
"""Environment variable: path of a file for this process's outcome, written even if there is no run's folder yet."""


def main(request: StopRequest, arguments: list[str] | None = None) -> int:
    """Run one rank; returns the exit code.

    Args:
        request: records the signals that asked to stop, also those received before this call.
    """
    status = Status(EXIT_CRASHED, "it was ended")
    try:
        request.heed()
        status = _main(request, arguments)
        return status.exit_code
    except Stopped as stopped:
        status = Status(stopped.exit_code, str(stopped))
        raise
    except Exception as error:
        status = _crash(error)
        raise
    finally:
        if path := os.environ.get(OUTCOME):
            write_first(Path(path), status)


def _main(request: StopRequest, arguments: list[str] | None) -> Status:
    parser = argparse.ArgumentParser(prog="uft_ds.train", description="One rank of a training run.")
    parser.add_argument("recipe", help="name of a shipped recipe, or a YAML file")
    parser.add_argument("overrides", nargs="*", help="key.path=value")
    parser.add_argument("--overwrite", action="store_true", help="delete the run that the output folder holds")
    parser.add_argument("--resume", action="store_true", help="resume from the run's newest intact checkpoint")
    parser.add_argument("--only-reference", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--prepared", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--local_rank", "--local-rank", help=argparse.SUPPRESS)  # added by the deepspeed launcher
    options = parser.parse_args(arguments)
    launched = LauncherEnvironment()
    folder: RunFolder | None = None
    try:
        launched = launcher_environment()
        settings = load_settings(options.recipe, tuple(options.overrides))
        if not options.prepared:
            settings = located(settings)
        # Each rank decides this alone, without a collective: nothing changes a run that is done.
        if options.resume and (done := nothing_to_do(settings)) is not None:
            if launched.rank == 0:
                print(f"{done.path} is done: there is nothing to resume")
            return Status(EXIT_DONE, "done")
        init_distributed(settings.launch.collective_timeout_minutes)
        lock: Lock | None = None
        if not options.prepared:
            lock = while_others_wait(
                "prepare", lambda: _prepared(settings, options.resume, options.overwrite), works=launched.rank == 0
            )
        folder = RunFolder(settings.output)  # claimed by this run only from here on: errors may be written there now
        settings = load_settings(str(folder.recipe))  # as prepared: paths, adapter and revision are fixed there
        settings = with_deepspeed_file(settings)
        # The first rank of each machine works. All ranks of all machines wait, because the next thing they do is a
        # collective, which would time out.
        here = partial(ensure_data, settings, folder, has_prepared=launched.rank == 0)
        while_others_wait("data", here, works=launched.local_rank == 0)
        with _own_streams(folder, launched.rank) as terminal:
            work = _fill_reference if options.only_reference else _run
            work(settings, folder, SafeConsole(file=terminal), request)
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
        del lock
        return Status(EXIT_DONE, "done")
    except Stopped as stopped:
        status = Status(stopped.exit_code, str(stopped))
        if folder is not None:
            folder.write_first_status(status)
        if launched.rank == 0 and stopped.by_all and not options.prepared:
            print(stopped)  # a rank that stops alone was often ended by its launcher after another rank's error
        return status
    except (UserError, CheckFailed) as error:
        status = Status(error.exit_code, str(error))
        if folder is not None:
            folder.write_first_status(status)
        if launched.rank == 0 and (folder is None or not options.prepared):
            print(f"error: {visible(as_typed(str(error)))}", file=sys.stderr)
        return status
    except Exception as error:
        where = "" if folder is None else f" (traceback in {folder.log(launched.rank)})"
        problem = lasting(error)
        status = _crash(error, where) if problem is None else Status(EXIT_BAD_INPUT, f"{problem}{where}")
        if folder is not None:
            folder.write_first_status(status)
        if problem is None:
            raise
        if folder is None or not options.prepared:  # each rank may be the only one of its machine that lacks the file
            print(f"error: rank {launched.rank}: {visible(problem)}", file=sys.stderr)
        return status


_CONNECTION_LOST = (
    "reset by peer", "closed by peer", "likely closed", "Broken pipe", "Connection refused", "remote process exited",
)  # fmt: skip
"""Parts of the messages of gloo, NCCL and torch's store where another rank is gone."""


def _crash(error: Exception, where: str = "") -> Status:
    message = f"{type(error).__name__}: {in_one_line(str(error), 300)}"
    rank = launcher_environment().rank
    if any(part in str(error) for part in _CONNECTION_LOST):
        why = "lost its connection to another rank, which was killed or crashed: see the launcher's output and the logs"
        return Status(EXIT_CRASHED, f"rank {rank} {why} ({message}){where}")
    return Status(EXIT_CRASHED, f"rank {rank} crashed: {message}{where}")


def _prepared(settings: Settings, resume: bool, overwrite: bool) -> Lock:
    settings, launched = with_deepspeed_file(settings), launcher_environment()
    check_sharding(settings, ranks=launched.world_size, ranks_per_node=launched.ranks_per_node)
    if resume:
        return prepare_resume(settings, say=print)[2]
    return prepare_run(settings, overwrite=overwrite)[2]


def _run(settings: Settings, folder: RunFolder, console: Console, request: StopRequest) -> None:
    if settings.train.deterministic:
        make_deterministic()
    seed_generators(settings.train.seed)
    data = open_data(settings, folder)
    held_out = in_order([source.selection for source in data.held_out], settings.train.examples_per_step)
    checkpoint = resumed_from(folder)
    state = START if checkpoint is None else resumed_position(folder, checkpoint).state
    plan = steps_of(settings, data, state.source)
    after_step = None if checkpoint is None else state.step
    with _together(), _reporter(settings, folder, console, len(plan), after_step) as reporter:
        engine, model = build_engine(with_chosen_recompute(settings, reporter), reporter)
        # Before the checkpoint is restored: only with fresh adapters must policy and reference be equal.
        _check_start(engine, settings, folder, plan.step(0), reporter)
        stop = Stop(request, engine.agree)
        pools = [source.selection for source in data.all]
        reference = build_reference_cache(settings, folder, engine, model, pools, reporter, checkpoint)
        if settings.trains_all and settings.reference.is_needed and not settings.copies_reference:
            request.only_note()
            _learn_reference(settings, engine, reference, plan, held_out, reporter, stop)
        model.leave_base()
        if checkpoint is not None:
            with reporter.phase(f"restoring {checkpoint.name}"):
                restore_engine(engine, checkpoint, state, reporter)
        writer = CheckpointWriter(
            engine, model.policy, folder, reporter, keep=settings.train.keep_checkpoints, best=settings.train.keep_best
        )
        method = Method(engine, settings.objective, reference, settings.train.tokens_per_micro_batch)
        request.only_note()
        session = Session(
            method,
            model.policy,
            settings.train,
            folder,
            reporter,
            writer,
            stop,
            build_sampler(settings, data, model),
            starts_as_reference=settings.start_adapter is None,
        )
        with (
            built_tasks(settings, engine, model, request) as tasks,
            _steps(settings, data, folder, plan, engine, model, reporter, request) as steps,
        ):
            steps.restore(state.source)
            train(replace(session, tasks=tasks), steps, held_out, state)
    if engine.rank == 0:
        try:
            num_trained = sum(getattr(p, "ds_numel", p.numel()) for p in model.parameters() if p.requires_grad)
            now = datetime.now().astimezone()
            facts = facts_of(settings, folder, trained=num_trained, ranks=engine.world_size, ended=now)
            answered = shown(RecordFolder(folder.rollouts)) if settings.is_online else []
            write_report(folder, settings.name, facts, answered)
        except Exception as error:  # all is trained and saved: a report that fails must not turn it into a failure
            logger.exception("report.html could not be written")
            console.print(f"warning: report.html could not be written ({foreseen(error) or error})", markup=False)
        folder.done.touch()  # last: a run that was killed while it wrote its report is resumed, and writes it again
        folder.write_status(Status(EXIT_DONE, "done"))


@contextmanager
def _steps(
    settings: Settings,
    data: PreparedData,
    folder: RunFolder,
    plan: Steps,
    engine: Engine,
    model: UFTModel,
    reporter: Reporter,
    request: StopRequest,
) -> Iterator[StepSource]:
    """The steps that the run trains on: the plan's, or those that the policy's answers make of it."""
    if not settings.is_online:
        yield plan
        return
    rollouts = build_rollouts(settings, data, folder, plan, engine, model, reporter, request)
    try:
        yield rollouts
    finally:
        rollouts.close()


def _learn_reference(
    settings: Settings,
    engine: Engine,
    reference: Known,
    plan: Steps,
    held_out: Seq[Step],
    reporter: Reporter,
    stop: Stop,
) -> None:
    """Compute the reference of all that the run will need, while the weights are still the base's.

    Every rank must call it.

    Raises:
        Stopped: what was computed is stored.
        CheckFailed: a response's is not finite.
    """
    groups = chain((plan.step(number) for number in range(len(plan))), held_out)
    what, done = "computing the reference before the first step", count(1)
    with reporter.working(what, len(plan) + len(held_out)) as on_done:
        fill(
            engine,
            reference,
            groups,
            settings.train.tokens_per_micro_batch,
            flush_every=GROUPS_BETWEEN_FLUSHES,
            on_group=lambda visited, computed: on_done(next(done)),
            stop=stop,
            needs_all=True,
        )


@contextmanager
def _together() -> Iterator[None]:
    """At a stop, all ranks wait for each other here: a launcher kills the remaining ranks once one has ended."""
    try:
        yield
    except Stopped as stopped:
        if stopped.by_all:
            torch.distributed.barrier()
        raise


def _check_start(engine: Engine, settings: Settings, folder: RunFolder, step: Step, reporter: Announcer) -> None:
    dtype = getattr(torch, settings.model.dtype)
    started = time.monotonic()
    with reporter.phase("checking packed sequences against the model's own forward"):
        packed = check_model(engine, step, dtype=dtype).packed
    reporter.say(
        f"before the first step: packed sequences differ by {packed:.2g} nats a token from each alone, "
        f"checked in {duration(time.monotonic() - started)}"
    )
    if settings.start_adapter is not None:
        with reporter.phase("checking the log-ratios of start.adapter"):
            found = check_starts_as_adapter(
                engine,
                sample_of(folder),
                read_start(folder).log_ratios,
                tokens_per_micro_batch=settings.train.tokens_per_micro_batch,
                dtype=dtype,
            )
        reporter.say(f"before the first step: {found.summary}")
        if found.is_below_rounding:
            reporter.warn(
                f"start.adapter: {settings.start_adapter} changes log-probs by no more than rounding: whether it is "
                "loaded rightly cannot be told"
            )
        return
    if not settings.reference.is_needed:
        return
    with reporter.phase(f"checking the log-ratios of the first step's {len(step.responses)} responses"):
        largest = check_log_ratios_are_zero(
            engine,
            step,
            tokens_per_micro_batch=settings.train.tokens_per_micro_batch,
            tolerance=settings.reference.step_zero_tolerance,
        )
    reporter.say(f"before the first step: every log-ratio is {largest} nats, {len(step.responses)} responses")


def _fill_reference(settings: Settings, folder: RunFolder, console: Console, request: StopRequest) -> None:
    """Compute the reference log-probs of all data, held-out data included, and store them for later runs."""
    if settings.train.deterministic:
        make_deterministic()
    pools = [source.selection for source in open_data(settings, folder).all]
    groups = in_order(pools, settings.train.examples_per_step)
    num_responses = sum(pool.num_responses for pool in pools)
    with _together(), _fill_reporter(console, num_responses) as reporter:
        engine, model = build_engine(with_chosen_recompute(settings, reporter), reporter)
        _check_start(engine, settings, folder, groups[0], reporter)
        cache = build_reference_cache(settings, folder, engine, model, pools, reporter)
        known_before = cache.num_known
        request.only_note()
        fill(
            engine,
            cache,
            groups,
            settings.train.tokens_per_micro_batch,
            flush_every=GROUPS_BETWEEN_FLUSHES,
            on_group=reporter.group,
            stop=Stop(request, engine.agree),
        )
    if engine.rank == 0:
        found = f"{cache.num_known} distinct responses of {num_responses}: {known_before} were known"
        computed = f"{cache.num_known - known_before} computed and stored below {settings.reference.cache_dir}"
        folder.write_status(Status(EXIT_DONE, f"{found}, {computed}"))


def _reporter(
    settings: Settings, folder: RunFolder, console: Console, num_steps: int, after_step: int | None
) -> Reporter:
    if not current_ranks().is_first:
        return SilentReporter()
    writer = MetricsWriter(
        folder.path,
        settings.tracking,
        run_name=settings.name,
        config=dict(settings.stored),
        after_step=after_step,
    )
    return ConsoleReporter(console, writer, num_steps)


def _fill_reporter(console: Console, num_responses: int) -> FillReporter:
    return FillReporter(console if current_ranks().is_first else None, num_responses)


@contextmanager
def _own_streams(folder: RunFolder, rank: int) -> Iterator[TextIO]:
    """Send all output of libraries to the rank's log; yield the terminal for our own messages."""
    terminal = LastingOutput(os.fdopen(os.dup(1), "wb"), encoding="utf-8", line_buffering=True)
    saved = {descriptor: os.dup(descriptor) for descriptor in (1, 2)}
    # Redirected at the level of file descriptors, because NCCL and other C++ code do not write to sys.stdout.
    with each_once(), folder.log(rank).open("a", buffering=1, encoding="utf-8") as log:
        logging.basicConfig(stream=log, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        try:
            for descriptor in saved:
                os.dup2(log.fileno(), descriptor)
            yield terminal
        except Exception as error:
            if not isinstance(error, UserError | CheckFailed):
                logger.exception("unexpected error")
            raise
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for descriptor, original in saved.items():
                os.dup2(original, descriptor)

"""From a resolved configuration to a trainer: how the parts of a run are put together."""

from collections.abc import Callable

from fastrl.base.log import RunLog
from fastrl.base.spans import Spans
from fastrl.memory.watch import MemoryWatch
from fastrl.models.loading import load_tokenizer, save_model
from fastrl.models.shapes import NoPlan
from fastrl.rewards import RewardSet
from fastrl.run.identity import identity_of
from fastrl.run.models import Models, load_models
from fastrl.run.problems import check_fit, load_work
from fastrl.run.resolve import Resolved, memory_lines
from fastrl.run.sampling import leave_if_stopped, make_profiler, make_rollout, wanted_profile
from fastrl.settings.parse import as_dict
from fastrl.step.learner import Learner
from fastrl.step.microbatches import Fitting
from fastrl.step.rollout import EvalSet
from fastrl.step.trainer import Trainer
from fastrl.watch.card_watch import CardWatch
from fastrl.watch.signal import Signal
from fastrl.weights.guard import MismatchWatch


def build(
    resolved: Resolved,
    log: RunLog,
    rewards: RewardSet,
    stop_requested: Callable[[], bool] = lambda: False,
    spans: Spans | None = None,
    card: CardWatch | None = None,
) -> Trainer:
    """Load the data, then the models, and put the parts together."""
    config, spans, card = resolved.config, spans or Spans(), card or CardWatch()
    work = load_work(config, load_tokenizer(config.model), rewards)
    weights = ", ".join(f"{n} x {w:g}" for n, w in rewards.weights.items())
    for line in [*work.report, *memory_lines(resolved), f"rewards: {weights}"]:
        log.say(line)
    check_fit(config, work.problems, log)
    wanted = wanted_profile(config, work.task.problems)
    models = load_models(resolved, log)
    models.rest()
    rollout = make_rollout(resolved, models, work, rewards, spans, log)
    profiler = make_profiler(config, wanted, rollout, work, models, log) if wanted else None
    if profiler:
        profiler.begin(lambda: leave_if_stopped(stop_requested))
    steps, allocation = config.run.steps, config.allocation
    try:
        allocation.start(work.task.problems, config.seed, min(steps, config.sampling.reprofile_every or steps))
    except ValueError as error:
        raise ValueError(f"{error}; {profiler.profile.at_limit()}" if profiler else str(error)) from error
    if allocation.needs_profile:
        log.say(f"allocation: {allocation.outlook()}")
    models.wake()
    memory = memory_watch(resolved, log)
    if isinstance(memory, MemoryWatch):

        def make_room() -> None:
            models.rest()
            memory.begin()

        rollout.make_room = make_room
    return Trainer(
        learner=make_learner(resolved, models, spans, log, card),
        rollout=rollout,
        allocator=allocation,
        completions_per_step=allocation.budget(config.problems_per_step),
        schedule=config.run,
        evaluation=config.evaluation,
        stopping=config.stopping,
        eval_sets=[
            EvalSet(name=e.name, problems=e.problems, k=config.evaluation.eval_k, sampling=config.sampling.drawn())
            for e in work.evals
        ],
        log=log,
        folder=config.run.folder,
        write_model=lambda path: save_model(models.loaded, path),
        config=as_dict(config),
        identity=identity_of(models.policy, models.reference, work.task.problems),
        mismatch_watch=MismatchWatch(dtype=resolved.dtype),
        signal=Signal(limit=config.sampling.max_new_tokens, compares=config.objective.min_group_size > 1),
        memory=memory,
        card=card,
        profiler=profiler,
        stop_requested=stop_requested,
    )


def make_learner(resolved: Resolved, models: Models, spans: Spans, log: RunLog, card: CardWatch) -> Learner:
    config = resolved.config
    return Learner(
        policy=models.policy,
        reference=models.reference,
        critic=models.critic,
        objective=config.objective,
        update=config.update,
        num_minibatches=config.minibatches,
        fitting=Fitting(tokens=resolved.tokens, say=log.say, beat=spans.beat, release=models.policy.workspace.release),
        after_backward=card.backward,
        old_from_engine=config.sampling.old_logprobs == "engine",
    )


def memory_watch(resolved: Resolved, log: RunLog) -> Callable[[str], dict[str, float]]:
    """What a GPU run has allocated against its plan, for `Trainer.memory`."""
    if not resolved.cuda or isinstance(resolved.plan, NoPlan):
        return lambda phase: {}
    return MemoryWatch(resolved.plan, resolved.device, log.say, others=resolved.held.size if resolved.held else 0)

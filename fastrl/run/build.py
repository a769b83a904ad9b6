"""From a configuration to a trainer: what a run is made of, and how the parts are put together."""

import importlib.util
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from fastrl.base import ranks
from fastrl.base.log import RunLog
from fastrl.base.spans import Spans
from fastrl.base.types import Problem
from fastrl.data.task import default_rewards, load_task
from fastrl.engine.base import Engine
from fastrl.engine.opening import EngineSize, open_engine, pick_engine
from fastrl.engine.vllm import VllmEngine
from fastrl.kernels.parity import head_fault
from fastrl.memory.advice import advice, table
from fastrl.memory.plan import MemoryPlan
from fastrl.memory.watch import MemoryWatch
from fastrl.models.critic import Critic
from fastrl.models.loading import (
    LoadedModel,
    load_model,
    load_tokenizer,
    model_config,
    save_model,
)
from fastrl.models.policy import Policy
from fastrl.models.reference import Reference
from fastrl.models.shapes import NoPlan
from fastrl.passrates.file import ProfileKey, find_profile
from fastrl.passrates.sampling import Profiler
from fastrl.rewards import RewardSet
from fastrl.run.identity import identity_of
from fastrl.settings.flags import all_flags
from fastrl.settings.memory import plan_of
from fastrl.settings.parse import as_dict
from fastrl.settings.run import TrainConfig, needs_profile, needs_values, resolve
from fastrl.step.canary import PROMPT_TOKENS, TOKENS, Canary
from fastrl.step.learner import Learner
from fastrl.step.microbatches import Fitting
from fastrl.step.rollout import EvalSet, Rollout
from fastrl.step.trainer import Stopped, Trainer
from fastrl.weights.backends import backend_on
from fastrl.weights.guard import Guard


def open_rewards(config: TrainConfig) -> RewardSet:
    """The verifiers and reward functions of a run. Raises ValueError on a spec that cannot be used."""
    return RewardSet(list(config.reward) or default_rewards(config.data), workers=config.reward_workers)


def build(
    config: TrainConfig, log: RunLog, rewards: RewardSet, stop_requested: Callable[[], bool] = lambda: False,
    spans: Spans | None = None,
) -> Trainer:  # fmt: skip
    """Load the data, then the model, and put the parts together."""
    device, dtype, tokens = resolve(config)
    tokenizer = load_tokenizer(config.model)
    task = load_task(config.data, config.split, config.task, tokenizer, rewards, config.limit)
    wanted = config.evaluation
    evals = [load_task(e, "test", config.task, tokenizer, rewards, wanted.eval_limit) for e in wanted.eval]
    for line in [*task.report, *(line for e in evals for line in e.report)]:
        log.say(line)
    for line in memory_lines(config, dtype, tokens):
        log.say(line)
    log.say(f"rewards: {', '.join(f'{n} x {w:g}' for n, w in rewards.weights.items())}")

    check_fit(config, [*task.problems, *(p for e in evals for p in e.problems)], log)
    key, profile_path, _ = profile_of(config, task.problems) if needs_profile(config) else (None, None, "")
    load = partial(
        load_model, config.model, dtype=dtype, device=device, attention=config.attention,
        checkpoint=config.memory.checkpoint_activations, liger=config.memory.liger,
    )  # fmt: skip
    loaded, grad_dtype = load(), getattr(torch, config.memory.grad_dtype)
    triton = head_kernels(loaded, device, log)
    memory = dict(grad_dtype=grad_dtype, master=config.memory.master, offload=config.memory.offload)
    guard = Guard(spike_sigma=config.stopping.spike_sigma)
    policy = Policy(loaded, config.optim, guard, temperature=config.sampling.temperature, triton=triton, **memory)
    needs_reference = "ref_logprobs" in config.objective.needs(num_minibatches=2)
    reference = Reference(
        config.model, dtype=dtype, device=device, attention=config.attention, temperature=config.sampling.temperature,
        triton=triton, on_host=config.memory.reference_on_host, liger=config.memory.liger,
    ) if needs_reference else None  # fmt: skip
    spikes = dict(spike_sigma=config.stopping.spike_sigma)
    critic = Critic(load(), config.critic, **memory, **spikes) if needs_values(config) else None
    trained = [policy, critic] if critic else [policy]

    def make_room() -> None:
        for model in trained:
            model.rest()

    make_room()
    sampling = config.sampling.drawn()
    longest = longest_sequence([*task.problems, *(p for e in evals for p in e.problems)], config, loaded)
    engine = make_engine(config, loaded, policy, longest, log)
    watched = config.engine.canary and isinstance(engine, VllmEngine)  # the other engine has no weights of its own
    canary = Canary.of(engine, policy, config.sampling.temperature, task.problems, longest) if watched else None
    spans = spans or Spans()
    rollout = Rollout(
        spans=spans, engine=engine, rewards=rewards, tokenizer=tokenizer, sampling=sampling, seed=config.seed,
        grade_truncated=config.sampling.grade_truncated, canary=canary and canary.check,
        make_room=make_room,
    )  # fmt: skip
    profiler = None
    if key:
        profiler = Profiler(
            rollout=rollout, problems=task.problems, allocation=config.allocation, key=key, path=profile_path,
            folder=config.run.folder, every=config.sampling.reprofile_every, weights=lambda: policy.flat.weights,
            say=log.say,
        )  # fmt: skip
        profiler.begin(partial(leave_if_stopped, stop_requested))
    steps = config.run.steps
    config.allocation.start(task.problems, config.seed, min(steps, config.sampling.reprofile_every or steps))
    if config.allocation.needs_profile:
        log.say(f"allocation: {config.allocation.outlook()}")
    for model in trained:
        model.wake()
    learner = Learner(
        policy=policy, reference=reference, critic=critic, objective=config.objective, update=config.update,
        num_minibatches=config.minibatches, fitting=Fitting(tokens=tokens, say=log.say, beat=spans.beat),
        old_from_engine=config.sampling.old_logprobs == "engine",
    )  # fmt: skip
    return Trainer(
        learner=learner, rollout=rollout, allocator=config.allocation, memory=memory_watch(config, log),
        completions_per_step=config.allocation.budget(config.problems_per_step),
        schedule=config.run, evaluation=config.evaluation, stopping=config.stopping,
        eval_sets=[EvalSet(name=e.name, problems=e.problems, k=wanted.eval_k, sampling=sampling) for e in evals],
        log=log, folder=config.run.folder, write_model=lambda path: save_model(loaded, path), config=as_dict(config),
        identity=identity_of(policy, reference, task.problems), profiler=profiler, stop_requested=stop_requested,
    )  # fmt: skip


def longest_sequence(problems: list[Problem], config: TrainConfig, loaded: LoadedModel) -> int:
    """Tokens the engine must hold: of a prompt and its completion, or of the canary where the model is made for it."""
    longest = max(len(p.prompt_ids) for p in problems) + config.sampling.max_new_tokens
    limit = getattr(loaded.model.config.get_text_config(), "max_position_embeddings", None) or longest
    return max(longest, min(limit, PROMPT_TOKENS + TOKENS))


def make_engine(config: TrainConfig, loaded: LoadedModel, policy: Policy, max_model_len: int, log: RunLog) -> Engine:
    device, dtype, tokens = resolve(config)
    name = pick_engine(config.engine.engine, device)
    kv_bytes = int(config.engine.vllm.kv_gib * 2**30)
    if name == "vllm" and not kv_bytes and device.startswith("cuda"):
        try:
            kv_bytes = memory_plan(config, dtype, tokens).kv_bytes
        except NoPlan as error:
            raise ValueError(
                f"--vllm.kv-gib must be given, for the memory of this model has no plan: {error}"
            ) from None
    sized = EngineSize(max_model_len=max_model_len, kv_bytes=kv_bytes, seed=config.seed + ranks.rank())
    engine = open_engine(name, loaded, policy.flat, config.engine, sized)
    size = f" with {kv_bytes / 2**30:.1f} GiB of KV cache" if kv_bytes else ""
    log.say(f"engine: {name}" + (f" {engine.version}, over the trainer's weights{size}" if name == "vllm" else ""))
    return engine


def head_kernels(loaded: LoadedModel, device: str, log: RunLog) -> bool:
    """Whether the head runs on its Triton kernels: on a GPU, if they give what torch gives. Says which."""
    head = loaded.model.get_output_embeddings().weight
    if not device.startswith("cuda") or head.dtype == torch.float64:
        return False
    if importlib.util.find_spec("triton") is None:
        log.say("kernels: Triton is not installed; the head runs in torch, slower and with more memory")
        return False
    log.say(f"kernels: flat updates run on {backend_on(torch.device(device))}")
    fault = head_fault(head)
    log.say(
        f"kernels: WARNING: the head runs in torch, slower and with more memory, for its Triton kernels failed: {fault}"
        if fault else "kernels: the head runs on Triton"
    )  # fmt: skip
    return not fault


def profile_of(config: TrainConfig, problems: list[Problem]) -> tuple[ProfileKey, Path, str]:
    """What the run's profile depends on, its file, and a line that says what is in it."""
    key = ProfileKey.of(
        model=config.model, problems=problems, rewards=config.reward or default_rewards(config.data),
        sampling=config.sampling.drawn(), grade_truncated=config.sampling.grade_truncated, seed=config.seed,
        num_completions=config.sampling.num_profile_completions,
    )  # fmt: skip
    return key, *find_profile(key, config.sampling.profile, config.run.folder.parent)


def profile_plan(config: TrainConfig, rewards: RewardSet) -> list[str]:
    """For a dry run: which profile would be read or made, if any. Reads the problems and loads no model."""
    if not needs_profile(config):
        return []
    task = load_task(config.data, config.split, config.task, load_tokenizer(config.model), rewards, config.limit)
    return [profile_of(config, task.problems)[2]]


def leave_if_stopped(stop_requested: Callable[[], bool]) -> None:
    if ranks.all_max(float(stop_requested())):
        raise Stopped("stopped while the profile was being sampled; the same command goes on from there")


def check_fit(config: TrainConfig, problems: list[Problem], log: RunLog) -> None:
    """Raise ValueError when the tokenizer writes ids that the model has not; warn of texts longer than its context."""
    architecture = model_config(config.model).get_text_config()
    highest = max(max(p.prompt_ids) for p in problems)
    if highest >= architecture.vocab_size:
        raise ValueError(
            f"--model {config.model}: its tokenizer writes id {highest}, but the model has {architecture.vocab_size} "
            "tokens; use the tokenizer that belongs to it, or resize its embeddings"
        )
    limit = getattr(architecture, "max_position_embeddings", None)
    longest = max(len(p.prompt_ids) for p in problems) + config.sampling.max_new_tokens
    if limit and longest > limit:
        log.say(
            f"warning: prompts and completions reach {longest} tokens, but the model was made for {limit}; "
            "lower --max-new-tokens or --max-prompt-tokens"
        )


def memory_plan(config: TrainConfig, dtype: torch.dtype, tokens_per_microbatch: int) -> MemoryPlan:
    """Raises NoPlan, a ValueError, for a model whose memory cannot be planned; it may be trained all the same."""
    device, *_ = resolve(config)
    return plan_of(
        config, device=device, dtype=dtype, tokens_per_microbatch=tokens_per_microbatch, ranks=ranks.world_size(),
        capacity=torch.cuda.mem_get_info(device)[1] if device.startswith("cuda") else 0,
    )  # fmt: skip


def memory_watch(config: TrainConfig, log: RunLog) -> Callable[[str], dict[str, float]]:
    """What a GPU run has allocated against its plan, for `Trainer.memory`."""
    device, dtype, tokens = resolve(config)
    if not device.startswith("cuda"):
        return lambda phase: {}
    try:
        return MemoryWatch(memory_plan(config, dtype, tokens), device, log.say)
    except NoPlan:
        return lambda phase: {}


def memory_lines(config: TrainConfig, dtype: torch.dtype, tokens_per_microbatch: int) -> list[str]:
    """The plan in one line and as a table, and what to change where it does not fit."""
    try:
        plan = memory_plan(config, dtype, tokens_per_microbatch)
    except NoPlan as error:
        return [f"memory: {error}"]
    return [f"memory: {plan}", *table(plan), *advice(plan, set(all_flags(config)))]

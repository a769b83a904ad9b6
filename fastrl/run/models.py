"""The models of a run: the policy, and what its objective compares it with."""

import importlib.util
from dataclasses import dataclass

import torch

from fastrl.base.log import RunLog
from fastrl.kernels.parity import head_fault
from fastrl.models.check import check_model
from fastrl.models.critic import Critic
from fastrl.models.head import head_weight, logit_map
from fastrl.models.loading import LoadedModel, load_model
from fastrl.models.policy import Policy
from fastrl.models.reference import Reference
from fastrl.run.resolve import Resolved
from fastrl.weights.backends import backend_on
from fastrl.weights.guard import Guard


@dataclass(frozen=True, kw_only=True)
class Models:
    loaded: LoadedModel  # the policy's, as it is written
    policy: Policy
    reference: Reference | None
    critic: Critic | None

    @property
    def trained(self) -> list[Policy | Critic]:
        return [self.policy, self.critic] if self.critic else [self.policy]

    def rest(self) -> None:
        """Make room for what samples."""
        for model in self.trained:
            model.rest()

    def wake(self) -> None:
        for model in self.trained:
            model.wake()


def load_models(resolved: Resolved, log: RunLog) -> Models:
    config, memory = resolved.config, resolved.config.memory

    def load() -> LoadedModel:
        return load_model(
            config.model,
            dtype=resolved.dtype,
            device=resolved.device,
            attention=config.attention,
            checkpoint=memory.checkpoint_activations,
            ragged=memory.ragged,
            liger=memory.liger,
        )

    loaded = load()
    for line in loaded.said:
        log.say(line)
    check_model(loaded, sampled=resolved.engine == "hf")
    triton = head_kernels(loaded, resolved.device, log)
    kept = dict(grad_dtype=getattr(torch, memory.grad_dtype), master=memory.master, offload=memory.offload)
    temperature, sigma = config.sampling.temperature, config.stopping.spike_sigma
    guard = Guard(spike_sigma=sigma)
    policy = Policy(loaded, config.optim, guard, temperature=temperature, triton=triton, **kept)
    reference = critic = None
    if "ref_logprobs" in resolved.needs:
        reference = Reference(
            config.model,
            dtype=resolved.dtype,
            device=resolved.device,
            attention=config.attention,
            temperature=temperature,
            triton=triton,
            on_host=memory.reference_on_host,
            ragged=memory.ragged,
            liger=memory.liger,
        )
    if "values" in resolved.needs:
        critic = Critic(load(), config.critic, spike_sigma=sigma, **kept)
        critic.slabs = policy.slabs  # one learns at a time
    return Models(loaded=loaded, policy=policy, reference=reference, critic=critic)


def head_kernels(loaded: LoadedModel, device: str, log: RunLog) -> bool:
    """Whether the head runs on its Triton kernels: on a GPU, if they give what torch gives. Says which."""
    head = head_weight(loaded.model)
    if not device.startswith("cuda") or head.dtype == torch.float64:
        return False
    if importlib.util.find_spec("triton") is None:
        log.say("kernels: Triton is not installed; the head runs in torch, slower and with more memory")
        return False
    log.say(f"kernels: flat updates run on {backend_on(torch.device(device))}")
    fault = head_fault(head, logit_map(loaded.model))
    slower = "the head runs in torch, slower and with more memory, for its Triton kernels failed"
    log.say(f"kernels: WARNING: {slower}: {fault}" if fault else "kernels: the head runs on Triton")
    return not fault

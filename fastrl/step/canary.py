"""Whether the engine samples from the trainer's weights: 64 tokens of a fixed prompt, scored by both.

Run before the first rollout, after a resume and after every update. The prompt is long enough that the engine keeps
blocks of it: a prefix cache that outlived an update shows, as do a lost alias, layers in another order, a temperature
that was not applied, and log-probabilities of another distribution than the sampled one.
"""

from dataclasses import dataclass, field

import torch

from fastrl.base.types import EngineError, Problem, RolloutGroup
from fastrl.engine.base import Engine, Request, Sampling, sampling_seed
from fastrl.engine.checked import sample_checked
from fastrl.models.policy import Policy
from fastrl.step.batching import make_batch
from fastrl.step.metrics import sampling_mismatch

COMPLETIONS, TOKENS = 8, 8
PROMPT_TOKENS = 200  # several blocks of the engine's cache
# mean |difference| in nats. Right weights: 4e-6 in float32, 0.015 in bfloat16 on the embedded model, where both sides
# round; larger models are reported at 0.05
LIMIT = {torch.float64: 1e-3, torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.05}
GROWTH = 4.0  # times the first measurement, where that is more than a tenth of the limit


@dataclass(kw_only=True)
class Canary:
    engine: Engine
    policy: Policy
    temperature: float
    prompt_ids: list[int]
    first: float | None = field(default=None, init=False)  # mean |difference| of the first check

    @classmethod
    def of(cls, engine: Engine, policy: Policy, temperature: float, problems: list[Problem], longest: int) -> "Canary":
        """Its prompt is made of the run's own problems, at most `longest` tokens with the completion."""
        ids = [i for problem in problems[:PROMPT_TOKENS] for i in problem.prompt_ids]
        wanted = min(PROMPT_TOKENS, longest - TOKENS)
        repeated = ids * (wanted // len(ids) + 1)
        return cls(engine=engine, policy=policy, temperature=temperature, prompt_ids=repeated[:wanted])

    def check(self) -> dict[str, float]:
        """The difference, as metrics. Raises EngineError when it is more than rounding makes."""
        request = Request(prompt_ids=self.prompt_ids, seeds=[sampling_seed("canary", i) for i in range(COMPLETIONS)])
        sampling = Sampling(temperature=self.temperature, max_new_tokens=TOKENS)
        (completions,) = sample_checked(self.engine, [request], sampling, len(self.policy.tokenizer))
        problem = Problem(id="canary", prompt="", answer="", prompt_ids=self.prompt_ids)
        group = RolloutGroup(problem=problem, completions=completions, policy_version=self.engine.policy_version)
        batch = make_batch(
            [group], lambda rewards, _: torch.zeros_like(rewards), pad_id=self.policy.pad_id, max_new_tokens=TOKENS
        )
        with torch.no_grad():
            logprobs = self.policy.score(batch)
        difference = (logprobs.cpu() - batch.rollout_logprobs)[batch.response_mask]
        found = sampling_mismatch(difference)
        mean, most = (found[f"sampling/sampling_logp_difference/{name}"] for name in ("mean", "max"))
        limit = LIMIT[self.policy.flat.weights.dtype]
        if self.first is None:
            self.first = mean
        elif self.first > limit / 10:
            limit = max(limit, GROWTH * self.first)
        if not mean <= limit:
            raise EngineError(
                f"the engine does not sample from the trainer's weights: over {len(difference)} tokens of a fixed "
                f"prompt their log-probabilities differ by {mean:.3g} nats on average and {most:.3g} at most, where "
                f"{limit:.3g} is rounding (update {self.engine.policy_version})"
            )
        return {"sampling/canary_logp_difference/mean": mean, "sampling/canary_logp_difference/max": most}

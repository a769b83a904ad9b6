"""An engine that breaks as a test says."""

import math
from contextlib import nullcontext


class Broken:
    """The real engine, but for what `breaks` does to the completions it has sampled."""

    def __init__(self, engine, breaks):
        self.engine, self.breaks, self.policy_version = engine, breaks, engine.policy_version

    def generate_phase(self):
        return nullcontext()

    def weights_changed(self):
        self.engine.weights_changed()

    def close(self):
        self.engine.close()

    def sample(self, requests, sampling):
        sampled = self.engine.sample(requests, sampling)
        return self.breaks(sampled) or sampled


def spoil(sampled, value, count):
    """The first log-probability of so many completions becomes `value`."""
    for completion in [c for completions in sampled for c in completions][:count]:
        completion.rollout_logprobs[0] = value


def nan(sampled):
    spoil(sampled, math.nan, 16)

"""What the policy is pushed towards. One file per objective; a new one is that file and one line here."""

from fastrl.objectives.grpo import GRPO
from fastrl.objectives.ppo import PPO

OBJECTIVES = {"grpo": GRPO, "ppo": PPO}

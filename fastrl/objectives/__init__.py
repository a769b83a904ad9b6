"""What the policy is pushed towards. One file per objective; a new one is that file and one line here."""

from fastrl.objectives.apo import APO
from fastrl.objectives.grpo import GRPO
from fastrl.objectives.ppo import PPO
from fastrl.objectives.rebel import REBEL

OBJECTIVES = {"grpo": GRPO, "ppo": PPO, "rebel": REBEL, "apo": APO}

"""Every recipe is a run that would start: its keys exist, its parts go together, and it says what was published."""

from pathlib import Path

import pytest

from fastrl.settings.run import configure

FOLDER = Path(__file__).parents[2] / "fastrl" / "recipes"
PAPERS = {
    "apo_math": ("APO", "Single", "Uniform"),
    "grpo_math": ("GRPO", "Single", "Uniform"),
    "ppo_math": ("PPO", "Single", "Uniform"),
    "rebel_math": ("REBEL", "Single", "Uniform"),
    "sfpo_math": ("GRPO", "SFPO", "Uniform"),
    "gxpo_math": ("GRPO", "GXPO", "Uniform"),
    "sgpo_math": ("GRPO", "Single", "SGPO"),
}


@pytest.mark.parametrize("name", PAPERS)
def test_recipe_of_a_paper(name):
    path = FOLDER / f"{name}.toml"
    config = configure([str(path)])
    members = (config.objective, config.update, config.allocation)
    assert tuple(type(member).__name__ for member in members) == PAPERS[name]
    assert path.read_text().startswith("#") and "arXiv:" in path.read_text().split("model =")[0]
    assert config.model.startswith("Qwen/") and config.data == "math" and config.sampling.max_new_tokens >= 1024


def test_settings_that_the_papers_state():
    apo = configure([str(FOLDER / "apo_math.toml")])
    assert (apo.problems_per_step, apo.minibatches, apo.allocation.group_size) == (256, 2, 1)
    assert (apo.objective.beta1, apo.objective.beta2, apo.optim.lr) == (0.5, 1e-3, 1e-6)
    assert apo.sampling.num_profile_completions == 8
    sfpo = configure([str(FOLDER / "sfpo_math.toml")])
    assert sfpo.problems_per_step // sfpo.minibatches == 64 and sfpo.update.backward_passes == 4
    gxpo = configure([str(FOLDER / "gxpo_math.toml")])
    assert (gxpo.problems_per_step, gxpo.allocation.group_size, gxpo.optim.lr) == (128, 5, 1e-7)
    assert (gxpo.update.lookahead, gxpo.update.alpha, gxpo.objective.kl) == (10, 0.5, 0.001)

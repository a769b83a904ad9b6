"""Presets: a paper's settings under its name, what wins over them, and that they are printed."""

import pytest

from fastrl.objectives.grpo import GRPO, PRESETS
from fastrl.run.resolve import describe, resolve
from fastrl.settings.run import configure


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_its_flags(name):
    objective = configure(["--preset", name]).objective
    assert objective == GRPO(preset=name, **PRESETS[name]) and PRESETS[name]
    for field, value in PRESETS[name].items():
        assert getattr(objective, field) == value


def test_by_hand():
    dapo = configure(["--objective.preset=dapo"]).objective
    assert (dapo.clip_low, dapo.clip_high, dapo.loss_agg, dapo.kl) == (0.2, 0.28, "token", 0.0)
    gspo = configure(["--preset", "gspo"]).objective
    assert (gspo.token_loss.ratio_level, gspo.token_loss.clip_low, gspo.normalizer) == ("sequence", 3e-4, "completion")
    assert configure(["--preset", "cispo"]).objective.token_loss.surrogate == "cispo"
    assert configure(["--preset", "dr-grpo"]).objective.adv_norm == "none"


def test_single_settings_win_wherever_they_stand(tmp_path):
    assert configure(["--clip-high", "0.3", "--preset", "dapo"]).objective.clip_high == 0.3
    recipe = tmp_path / "r.toml"
    recipe.write_text('model = "embedded"\ndata = "arithmetic"\n[objective]\npreset = "dapo"\nclip_low = 0.1\n')
    one = configure([str(recipe)]).objective
    assert (one.preset, one.clip_low, one.clip_high) == ("dapo", 0.1, 0.28)
    other = configure([str(recipe), "--preset", "gspo"]).objective  # the command line names another
    assert (other.preset, other.clip_low, other.clip_high) == ("gspo", 0.1, 4e-4)


def test_what_it_sets_is_printed():
    lines = describe(resolve(configure(["--preset", "dapo", "--device", "cpu"])))
    assert any(line.startswith("preset: dapo sets clip_high=0.28 dual_clip=None") for line in lines)
    assert not any(line.startswith("preset") for line in describe(resolve(configure(["--device", "cpu"]))))


def test_an_unknown_one_is_refused():
    with pytest.raises(ValueError, match="dapo.*dr-grpo.*gspo.*cispo"):
        configure(["--preset", "drgrpo"])
    with pytest.raises(ValueError, match="there is no option --preset"):
        configure(["--objective", "ppo", "--group-size", "1", "--preset", "dapo"])

"""Settings are held by sections, and typed with or without them; a run that was written without them goes on."""

import dataclasses
import re

import pytest

from fastrl.base.setting import Section, check_bounds, setting, settings_of
from fastrl.base.types import CheckpointError
from fastrl.run.identity import check_same
from fastrl.settings.flags import all_flags, find, shortest
from fastrl.settings.parse import as_dict
from fastrl.settings.run import AXES, SECTIONS, TrainConfig, by_path, configure, may_change

# every word that is a setting of a section, as it was typed before there were sections, and where it is now
TYPED = {
    "max_new_tokens": "sampling",
    "temperature": "sampling",
    "old_logprobs": "sampling",
    "profile": "sampling",
    "grade_truncated": "sampling",
    "num_profile_completions": "sampling",
    "reprofile_every": "sampling",
    "eval": "evaluation",
    "eval_k": "evaluation",
    "eval_every": "evaluation",
    "eval_limit": "evaluation",
    "stop_at_accuracy": "stopping",
    "stop_below_accuracy": "stopping",
    "stop_on_collapse": "stopping",
    "spike_sigma": "stopping",
    "hang_timeout": "stopping",
    "tokens_per_microbatch": "memory",
    "grad_dtype": "memory",
    "checkpoint_activations": "memory",
    "master": "memory",
    "offload": "memory",
    "reference_on_host": "memory",
    "ragged": "memory",
    "liger": "memory",
    "engine": "engine",
    "vllm.kv_gib": "engine",
    "vllm.kv": "engine",
    "vllm.cuda_graphs": "engine",
    "vllm.max_num_batched_tokens": "engine",
    "vllm.compile": "engine",
    "vllm.seeds": "engine",
    "max_num_seqs": "engine",
    "canary": "engine",
    "steps": "run",
    "max_minutes": "run",
    "save_every": "run",
    "save_at_end": "run",
    "keep": "run",
    "sample_every": "run",
    "log": "run",
    "rollouts_every": "run",
    "name": "run",
    "out": "run",
    "resume": "run",
    "allow_change": "run",
    "dry_run": "run",
}


def test_every_setting_of_a_section_is_typed_with_and_without_it():
    config = TrainConfig()
    assert SECTIONS == set(TYPED.values())
    held = {path: name for name in SECTIONS for path, *_ in settings_of(getattr(config, name))}
    assert held.items() >= TYPED.items()
    for path, section in TYPED.items():
        assert find(path, config) == find(f"{section}.{path}".replace("_", "-"), config) == path
        for other in SECTIONS - {section}:
            assert not find(f"{other}.{path}", config)


@pytest.mark.parametrize("members", range(max(map(len, AXES.values()))))
def test_the_shortest_spelling_of_every_flag_stands_for_it(members):
    chosen = {axis: list(choices.values())[members % len(choices)]() for axis, choices in AXES.items()}
    config = TrainConfig(**chosen)
    paths = [path for path, *_ in settings_of(config)]
    assert len(paths) == len(set(paths)) == len(all_flags(config))
    for path in paths:
        assert find(shortest(path, paths).removeprefix("--"), config) == path


@pytest.mark.parametrize(
    "args",
    [
        ["--steps", "7", "--kv-gib", "2", "--no-canary"],
        ["--run.steps", "7", "--vllm.kv-gib", "2", "--engine.no-canary"],
        ["--run.steps=7", "--engine.vllm.kv_gib=2", "--no_canary"],
    ],
)
def test_flags(args):
    config = configure([*args, "--engine", "hf", "--name", "mine", "--eval", "a", "--evaluation.eval", "b"])
    assert (config.run.steps, config.engine.vllm.kv_gib, config.engine.canary) == (7, 2.0, False)
    assert (config.engine.engine, config.run.name, config.optim.name) == ("hf", "mine", "adamw")
    assert config.evaluation.eval == ("a", "b")


@pytest.mark.parametrize(
    "text",
    [
        'steps = 7\nengine = "hf"\nlr = 2e-5\n[vllm]\nkv_gib = 2.0\n',
        '[run]\nsteps = 7\n[engine]\nengine = "hf"\nvllm.kv_gib = 2.0\n[optim]\nlr = 2e-5\n',
        'run.steps = 7\n"optim.lr" = 2e-5\n[engine]\nengine = "hf"\n[engine.vllm]\nkv-gib = 2.0\n',
    ],
)
def test_recipes(text, tmp_path):
    (tmp_path / "r.toml").write_text(text)
    config = configure([str(tmp_path / "r.toml")])
    assert (config.run.steps, config.engine.engine, config.engine.vllm.kv_gib) == (7, "hf", 2.0)
    assert config.optim.lr == 2e-5 and config.critic.optim.lr == 1e-5


@pytest.mark.parametrize(
    "text, said",
    [
        ("steps = 7\n[run]\nsteps = 8\n", "run.steps is given a second time; leave one of them out"),
        ("[run]\nlr = 1e-3\n", "there is no key 'run.lr'"),
        ("[run]\nstps = 7\n", "there is no key 'run.stps'; did you mean steps?"),
        ("[run]\nmax_steps = 7\n", "there is no key 'run.max_steps'; here it is called --steps"),
        ("run = 7\n", "run is a section: write [run] and keys under it"),
        ("[steps]\nx = 7\n", "steps is a single value, not a section"),
        ("[sampling]\nsteps = 7\n", "there is no key 'sampling.steps'"),
        ("[run]\nsteps = 0\n", "--steps must be at least 1, got 0"),
        ("[engine.vllm]\nkv_gib = -1.0\n", "--vllm.kv-gib must be at least 0, got -1.0"),
        ("[run]\nsteps = 'x'\n", "--steps must be a whole number, got 'x'"),
    ],
)
def test_mistakes_in_a_section_name_the_flag_that_is_typed(text, said, tmp_path):
    (tmp_path / "r.toml").write_text(text)
    with pytest.raises(ValueError, match=f"^{re.escape(f'{tmp_path}/r.toml: {said}')}"):
        configure([str(tmp_path / "r.toml")])


def test_help_shows_sections_and_short_flags(capsys):
    with pytest.raises(SystemExit):
        configure(["--help"])
    shown = capsys.readouterr().out
    for title in ("run options", "memory options", "vllm options", "stopping options"):
        assert title in shown
    assert "--steps INT" in shown and "--vllm.kv-gib FLOAT" in shown and "--run." not in shown


def test_a_run_written_without_sections_is_the_same_run(tmp_path):
    now = as_dict(configure([]))
    flat = {
        key: value
        for name, value in now.items()
        for key, value in (value.items() if name in SECTIONS else {name: value}.items())
    }
    assert flat["engine"] == "auto" and flat["vllm"]["kv_gib"] == 0.0 and by_path(flat) == by_path(now)
    check_same(flat, now, set(), tmp_path)
    with pytest.raises(CheckpointError, match="temperature was 0.5 and is now 1.0; .* --allow-change temperature$"):
        check_same({**flat, "temperature": 0.5}, now, set(), tmp_path)


def test_what_may_change_is_typed_as_flags_are():
    free = may_change(TrainConfig())
    assert {"steps", "max_num_seqs", "offload", "profile"} <= free and not {"temperature", "optim.lr", "seed"} & free
    for typed, path in {
        "temperature": "temperature",
        "sampling.temperature": "temperature",
        "lr": "optim.lr",
        "optim": "optim",
        "kv-gib": "vllm.kv_gib",
        "tokenizer": "tokenizer",
        "memory": "grad_dtype",
        "engine": "engine",
    }.items():
        config = configure(["--allow-change", typed])
        assert path in may_change(config) - free, typed
    with pytest.raises(ValueError, match="--allow-change temprature: there is no such setting; did you mean temper"):
        configure(["--allow-change", "temprature"])


def test_a_section_made_in_code_is_checked():
    @dataclasses.dataclass(kw_only=True)
    class Mine(Section):
        share: float = setting(0.5, "(0, 1]", hint="it is a fraction")  # of something
        most: tuple[int, ...] = setting((1,), "[1, inf]")  # of something

    for wrong, said in (
        (dict(share=0.0), "--share must be above 0 and at most 1, got 0.0; it is a fraction"),
        (dict(most=(3, 0)), "--most must be at least 1, got (3, 0)"),
        (dict(share=float("nan")), "--share must be above 0 and at most 1, got nan"),
    ):
        with pytest.raises(ValueError, match=re.escape(said)):
            Mine(**wrong)
    made = Mine()
    made.share = 2.0
    with pytest.raises(ValueError, match="--mine.share must be above 0 and at most 1, got 2.0"):
        check_bounds(made, "mine.")

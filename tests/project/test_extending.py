"""The recipes of docs/extending.md, to the letter, in a copy of the tree; docs/architecture.md lists their files."""

import re
from pathlib import Path

import pytest

from support.copied_tree import apply, copy, edits, python, sections

DOCS = Path(__file__).parents[2] / "docs"
PAGE = sections((DOCS / "extending.md").read_text())
ROW = re.compile(r"^\| (an? [a-z ]+) \|(.*)\|$", re.MULTILINE)
LISTED = {
    what: set(re.findall(r"`([^`]+)`", files))
    for what, files in ROW.findall(sections((DOCS / "architecture.md").read_text())["Recipes"])
}
RECIPES = [heading for heading in PAGE if heading.lower() in LISTED]
BY_COMMAND = {"tests/golden/kernels_sm90.json"}
# what shows that a recipe worked, beside the test that it brings
SHOWN = {
    "An objective": [
        "tests/step/test_learner.py::test_gradient_does_not_depend_on_cut_or_padding[reinforce-packed]",
        "tests/run/test_combinations.py::test_five_steps_the_last_two_again_from_a_checkpoint[reinforce-single-uniform]",
    ],
    "An update rule": [
        "tests/run/test_combinations.py::test_five_steps_the_last_two_again_from_a_checkpoint[grpo-averaged-uniform]",
        "tests/run/test_rules_on_ranks.py::test_a_rule_goes_on_with_what_it_keeps[averaged]",
    ],
    "An allocation": [
        "tests/run/test_combinations.py::test_five_steps_the_last_two_again_from_a_checkpoint[grpo-single-short_first]"
    ],
    "A kernel": ["tests/project/test_bench.py::test_without_a_gpu_there_are_only_figures_of_a_model[row_mean]"],
}

# tests that list the members of an axis, their settings or their names: a new member leaves them green
LISTS = [
    "tests/settings/test_sections.py",
    "tests/settings/test_config_fuzz.py",
    "tests/data/test_data_files.py",
    "tests/data/test_data_rows.py",
    "tests/rewards/test_user_functions.py",
    "tests/programs/test_profile_program.py::test_a_run_finds_what_the_program_made",
]


def wanted_by(heading: str) -> list[str]:
    own = [path for path in edits(PAGE[heading]) if Path(path).name.startswith("test_")]
    return [path for path in own if path != "tests/step/test_learner.py"] + SHOWN.get(heading, [])


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the tree with all recipes."""
    tree = copy(tmp_path_factory.mktemp("copied"))
    for heading in RECIPES:
        for path, (kind, text) in edits(PAGE[heading]).items():
            apply(tree, path, kind, text)
    return tree


@pytest.fixture(scope="module")
def outcomes(tree) -> dict[str, str]:
    """What became of each test, by its name; all in one process, for one takes seconds to start."""
    wanted = [test for heading in RECIPES for test in wanted_by(heading)]
    done = python(tree, "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider", *wanted)
    found = re.findall(r"^(PASSED|FAILED|ERROR|SKIPPED) (\S+?(?:\[.*?\])?)(?: - .*)?$", done.stdout, re.MULTILINE)
    assert found, done.stdout[-3000:] + done.stderr[-3000:]
    return {name: word if word == "PASSED" else done.stdout[-5000:] for word, name in found}


def test_every_recipe_is_in_both_documents():
    assert {heading.lower() for heading in RECIPES} == LISTED.keys()


@pytest.mark.parametrize("heading", RECIPES)
def test_a_recipe_touches_the_files_that_are_listed(heading):
    assert edits(PAGE[heading]).keys() == LISTED[heading.lower()] - BY_COMMAND


@pytest.mark.slow
@pytest.mark.parametrize("heading", RECIPES)
def test_a_recipe_works_to_the_letter(heading, outcomes):
    for test in wanted_by(heading):
        own = {word for name, word in outcomes.items() if name.startswith(test)}
        assert own == {"PASSED"}, own


@pytest.mark.slow
def test_the_lists_of_members_stay_green(tree):
    done = python(tree, "-m", "pytest", "-q", "-p", "no:cacheprovider", *LISTS)
    assert done.returncode == 0, done.stdout[-5000:]


@pytest.mark.slow
def test_the_kernel_of_the_recipe_compiles_and_has_its_row(tree):
    (command,) = re.findall(r"^TRITON_INTERPRET=0 python (\S+) (.*?) +#", PAGE["A kernel"], re.MULTILINE)
    done = python(tree, command[0], *command[1].split(), TRITON_INTERPRET="0")
    assert done.returncode == 0, done.stderr[-2000:]
    table = (tree / "tests" / "golden" / "kernels_sm90.json").read_text()
    assert '"row_mean": {"registers": ' in table and '"policy_loss-clip": {"registers": ' in table
    done = python(tree, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/kernels/test_kernels_aot.py")
    assert done.returncode == 0, done.stdout[-5000:]

"""Data sets by name from a hub on this machine: which commit, which files, from the cache, and what is said without."""

import pytest

from fastrl.base.exits import exit_code
from fastrl.base.types import DataError
from fastrl.data import DATASETS, load_problems, pinned_data
from fastrl.data.base import convert_row
from fastrl.data.hub import choose, matches, split_of
from fastrl.data.math import list_of_answers, power_of_ten
from support.hub_server import commit_of, jsonl, parquet

GSM8K = [{"question": f"{n} and 1?", "answer": f"It is so.\n#### {n + 1}"} for n in range(6)]
PIN = DATASETS["gsm8k"].revision


def gsm8k(hub, commit=PIN, rows=GSM8K):
    card = b"---\nconfigs:\n- config_name: main\n  data_files:\n  - split: train\n    path: main/train-*\n"
    card += b"  - split: test\n    path: main/test-*\n- config_name: socratic\n  data_files:\n  - split: train\n"
    card += b"    path: socratic/train-*\n---\nA card.\n"
    files = {
        "README.md": card,
        "main/train-00000-of-00002.parquet": parquet(rows[:4]),
        "main/train-00001-of-00002.parquet": parquet(rows[4:]),
        "main/test-00000-of-00001.parquet": parquet(rows[:1]),
        "socratic/train-00000-of-00001.parquet": parquet(rows[:2]),
        "gsm8k.py": b"raise SystemExit('never run')\n",
        "weights.pkl": b"never read",
    }
    return hub.push("datasets", "openai/gsm8k", files, commit=commit)


def test_a_named_set_is_read_at_its_commit_and_then_from_the_cache(hub, offline):
    gsm8k(hub)
    gsm8k(hub, commit=commit_of(7), rows=[{"question": "moved?", "answer": "#### 0"}] * 5)  # the branch goes on
    train = load_problems("gsm8k", split="train")
    assert [p.id for p in train.problems] == [f"gsm8k/train/{n}" for n in range(6)]
    assert [(p.prompt, p.answer) for p in train.problems] == [(f"{n} and 1?", str(n + 1)) for n in range(6)]
    assert train.source == f"openai/gsm8k@{PIN} main/train-00000-of-00002.parquet and 1 more"
    assert len(load_problems("gsm8k", split="test").problems) == 1
    fetched = {path.split("/")[-1] for path in hub.asked if path.startswith("GET /datasets")}
    assert "gsm8k.py" not in fetched and "weights.pkl" not in fetched and not any("socratic" in f for f in hub.asked)
    asked = len(hub.asked)
    assert load_problems("gsm8k", split="train").problems == train.problems
    assert len(hub.asked) == asked  # nothing is asked of a commit that is in the cache
    hub.status = 500
    assert load_problems("gsm8k", split="train").problems == train.problems
    offline()
    assert load_problems("gsm8k", split="train").problems == train.problems
    assert pinned_data("gsm8k", "") == "gsm8k"


def test_without_an_answer_one_line_says_what_to_do_and_at_once(hub, offline):
    gsm8k(hub)
    cache = r"openai/gsm8k@\w+ is not in the cache \(.*cache\)"
    what = "run once with a network, or give the path of local files as --data"
    for status in (500, 502, 503, 504, 429):
        hub.status = status
        with pytest.raises(DataError, match=rf"^data set 'gsm8k': {cache}, and .* \(answers {status}\); {what}$"):
            load_problems("gsm8k", split="train")
    hub.status, hub.delay = 0, 3.0
    with pytest.raises(DataError, match=rf"{cache}, and .* \(ReadTimeout.*\); {what}"):
        load_problems("gsm8k", split="train")
    hub.delay = 0.0
    assert len(hub.asked) == 6  # one each, and no second tries
    offline()
    with pytest.raises(DataError, match=rf"{cache} and HF_HUB_OFFLINE is set; {what}") as caught:
        load_problems("gsm8k", split="train")
    assert exit_code(caught.value) == 3 and "\n" not in str(caught.value) and len(hub.asked) == 6


def test_a_hub_that_is_not_there(hub, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(
        DataError, match="http://127.0.0.1:9 cannot be reached .*ConnectError.*; run once with a network"
    ):
        load_problems("gsm8k", split="train")


def test_a_file_of_two_that_was_not_fetched_is_not_taken_for_all(hub, offline):
    gsm8k(hub)
    load_problems("gsm8k", split="test")
    offline()
    with pytest.raises(DataError, match="is not in the cache"):
        load_problems("gsm8k", split="train")


def test_what_the_hub_refuses(hub):
    gsm8k(hub)
    hub.push("datasets", "some/secret", {"train.jsonl": jsonl(GSM8K)})
    hub.gated.add("some/secret")
    with pytest.raises(
        DataError, match=r"'some/none': there is no data set http.*/datasets/some/none, or it is private"
    ):
        load_problems("some/none", split="train")
    with pytest.raises(DataError, match=r"access to http.*/datasets/some/secret is restricted.*set HF_TOKEN"):
        load_problems("some/secret", split="train")
    with pytest.raises(DataError, match="openai/gsm8k has no revision 'v9'; name a branch, a tag or a commit"):
        load_problems("openai/gsm8k:main@v9", split="train")
    for status, said in ((401, "no data set|refuses access"), (403, r"refuses access \(403\); set HF_TOKEN")):
        hub.status = status
        with pytest.raises(DataError, match=said) as caught:
            load_problems("openai/gsm8k:main", split="train")
        assert "\n" not in str(caught.value)


def test_owner_and_name_with_configuration_and_revision(hub):
    first = gsm8k(hub, commit=commit_of(1))
    second = gsm8k(hub, commit=commit_of(2), rows=GSM8K[::-1])
    newest = load_problems("openai/gsm8k:main", split="train")
    assert newest.problems[0].prompt == "5 and 1?" and newest.problems[0].id == "openai/gsm8k:main/train/0"
    assert f"@{second} " in newest.source
    assert load_problems(f"openai/gsm8k:main@{first}", split="train").problems[0].prompt == "0 and 1?"
    assert len(load_problems("openai/gsm8k:socratic", split="train").problems) == 2
    assert pinned_data("openai/gsm8k:main", "") == f"openai/gsm8k:main@{second}"
    assert pinned_data(f"openai/gsm8k:main@{first}", "") == f"openai/gsm8k:main@{first}"
    assert load_problems(f"gsm8k@{first}", split="train").problems[0].id == "gsm8k/train/0"
    with pytest.raises(
        DataError, match="has the configurations main, socratic; name one of them, as in openai/gsm8k:main"
    ):
        load_problems("openai/gsm8k", split="train")
    with pytest.raises(DataError, match="has the splits train, test, got 'validation'; use --split"):
        load_problems("openai/gsm8k:main", split="validation")


def test_a_branch_that_has_moved_is_another_commit_and_without_a_network_the_last(hub, offline, capsys):
    files = {"train.jsonl": jsonl(GSM8K)}
    first = hub.push("datasets", "me/sums", files)
    assert pinned_data("me/sums", "") == f"me/sums@{first}"
    load_problems("me/sums", split="train")
    second = hub.push("datasets", "me/sums", {"train.jsonl": jsonl(GSM8K[:3])})
    assert pinned_data("me/sums", "") == f"me/sums@{second}" != f"me/sums@{first}"
    offline()  # of what is in the cache, the branch was the first commit
    capsys.readouterr()
    assert (
        pinned_data("me/sums", "") == f"me/sums@{first}" and len(load_problems("me/sums", split="train").problems) == 6
    )
    assert f"main is taken for {first}, as when it was last asked" in capsys.readouterr().out


def test_a_mirror_with_another_commit_is_said_aloud(hub, offline, capsys):
    own = gsm8k(hub, commit=commit_of(5))
    hub.branches["datasets", "openai/gsm8k"][PIN] = own  # asked for the commit, it names its own
    hub.lists_siblings = False
    for _ in range(2):
        assert len(load_problems("gsm8k", split="train").problems) == 6
        said = capsys.readouterr().out
        assert f"gives commit {own} where {PIN} was asked for" in said or f"{PIN} is taken for {own}" in said
        offline()


def test_a_commit_that_is_not_known_is_resolved_once_and_written_down(hub):
    assert DATASETS["hmmt"].revision == "main"  # no commit of it could be looked up
    rows = [{"problem": "2+2?", "answer": "4", "problem_idx": 1}, {"problem": "2+3?", "answer": "5", "problem_idx": 2}]
    commit = hub.push("datasets", "MathArena/hmmt_feb_2024", {"data/train-00000-of-00001.parquet": parquet(rows)})
    assert pinned_data("hmmt", "") == f"hmmt@{commit}"
    assert [p.answer for p in load_problems(f"hmmt@{commit}", split="test").problems] == ["4", "5"]
    assert pinned_data("hmmt", "/some/folder") == "hmmt"
    assert all(len(d.revision) == 40 for name, d in DATASETS.items() if name not in ("arithmetic", "hmmt"))


def test_every_named_set_is_read_in_its_published_columns(hub):
    rows = {
        "math": {"problem": "1+1?", "solution": "so \\boxed{2}", "level": "Level 1", "type": "Algebra"},
        "math500": {"problem": "1+1?", "solution": "so", "answer": "2", "unique_id": "test/1"},
        "aime24": {"id": 60, "problem": "1+1?", "solution": "so", "answer": "002"},
        "amc23": {"id": 0, "question": "1+1?", "answer": 2.0, "url": ""},
        "minerva": {"question": "1+1?", "answer": "2e0"},
        "olympiadbench": {"question": "1+1?", "final_answer": ["$2$"], "id": 7},
        "hmmt": {"problem_idx": 1, "problem": "1+1?", "answer": "2"},
    }
    for name, row in rows.items():
        dataset = DATASETS[name]
        split = "test" if "test" in dataset.splits.values() else "train"
        file = {f"data/{split}-00000-of-00001.parquet": parquet([row])}
        hub.push("datasets", dataset.repo, file, commit=dataset.revision if len(dataset.revision) == 40 else "")
        [problem] = load_problems(name, split="test").problems
        assert (problem.prompt, problem.answer.lstrip("0")) == (
            "1+1?",
            "2" if name != "minerva" else "2 \\times 10^{0}",
        )


def test_golds_that_are_written_otherwise():
    assert power_of_ten({"answer": "4.5e33"}) == {"answer": "4.5 \\times 10^{33}"}
    assert power_of_ten({"answer": "-1E-08"}) == {"answer": "-1 \\times 10^{-8}"}
    for gold in ("2e", "e^{2}", "45", 4.5, None):
        assert power_of_ten({"answer": gold}) == {"answer": gold}
    assert list_of_answers({"final_answer": ["$1$", "2"]})["answer"] == "1, 2"
    assert list_of_answers({"final_answer": "['\\\\frac{1}{2}']"})["answer"] == "\\frac{1}{2}"
    assert "answer" not in list_of_answers({"final_answer": None})


def test_a_set_with_one_split_is_read_like_a_file(hub):
    hub.push("datasets", "me/one", {"data/train-0.parquet": parquet(GSM8K)})
    assert load_problems("me/one", split="test").problems == load_problems("me/one", split="train").problems


def test_lists_and_lines_of_json_and_rows_with_ids(hub):
    rows = [row | {"id": f"own-{i}"} for i, row in enumerate(GSM8K)]
    hub.push("datasets", "me/list", {"train.json": b" " + str(rows).replace("'", '"').encode()})
    hub.push("datasets", "me/lines", {"train.json": jsonl(rows)})
    one, other = load_problems("me/list", split="train"), load_problems("me/lines", split="train")
    assert [p.id for p in one.problems] == [p.id for p in other.problems] == [f"own-{i}" for i in range(6)]


CARD = {
    "configs": [
        {"config_name": "a", "data_files": [{"split": "train", "path": ["x/*.jsonl", "y/**/*.jsonl"]}]},
        {"config_name": "b", "data_files": {"train": "x/1.jsonl", "test": "z/*"}, "default": True},
        {"config_name": "c", "data_files": "z/*"},
        {"config_name": "d", "data_dir": "z"},
    ]
}
FILES = ["README.md", "x/1.jsonl", "x/2.jsonl", "y/q/3.jsonl", "z/test.jsonl", "z/deep/4.jsonl", "run.py", "_z/5.jsonl"]


@pytest.mark.parametrize(
    "files, card, config, split, expected",
    [
        (FILES, CARD, "a", "train", ["x/1.jsonl", "x/2.jsonl", "y/q/3.jsonl"]),
        (FILES, CARD, "", "test", ["z/test.jsonl"]),
        (FILES, CARD, "c", "test", ["z/test.jsonl"]),
        (FILES, CARD, "d", "test", ["z/test.jsonl"]),
        (["train.jsonl", "test.jsonl", "x.py"], {}, "", "test", ["test.jsonl"]),
        (["train.jsonl", "train.parquet"], {}, "", "train", ["train.parquet"]),
        (["data/train-0.parquet", "data/val-0.parquet"], {}, "", "validation", ["data/val-0.parquet"]),
        (["main/train.jsonl", "other/train.jsonl"], {}, "other", "train", ["other/train.jsonl"]),
        (["train/1.json", "train/0.json", "test/0.json"], {}, "", "train", ["train/0.json", "train/1.json"]),
        (["contest.jsonl", "more.jsonl"], {}, "", "train", ["contest.jsonl", "more.jsonl"]),
        (["all.jsonl", "../train.jsonl", ".train.jsonl"], {}, "", "train", ["all.jsonl"]),
    ],
)
def test_files_of_a_split(files, card, config, split, expected):
    assert choose(files, card, config, split, "o/n")[0] == expected


@pytest.mark.parametrize(
    "files, card, config, said",
    [
        (FILES, CARD, "q", "has the configurations a, b, c, d; name one of them, as in o/n:a"),
        (
            ["main/train.jsonl", "other/train.jsonl"],
            {},
            "",
            "configurations main, other; name one of them, as in o/n:main",
        ),
        (["main/train.jsonl"], {}, "other", "no configuration 'other'; its folders are main"),
        (["load.py", "data.csv"], {}, "", "no file of it can be read .it has .csv, .py; known are .jsonl"),
        (["train.jsonl", "train.json"], {}, "", "exists as train.json, train.jsonl; fetch one of them"),
    ],
)
def test_files_that_cannot_be_told(files, card, config, said):
    with pytest.raises(DataError, match=said):
        choose(files, card, config, "train", "o/n")


def test_patterns_and_names():
    assert matches("a/b/c.jsonl", "a/**/c.jsonl") and matches("a/c.jsonl", "a/**/c.jsonl")
    assert (
        not matches("a/b/c.jsonl", "a/*.jsonl") and matches("t-1.x", "t-[0-9].?") and not matches("t-1xx", "t-[0-9].?")
    )
    assert split_of("data/gsm8k_test-0.parquet") == "test" and split_of("latest/contest.json") == "all"
    assert convert_row({"question": "q", "answer": "1"}, "i")[0].answer == "1"

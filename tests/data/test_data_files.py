"""Every kind of file and folder gives the same rows; what cannot be found or read says where it looked."""

import gzip
import json
from pathlib import Path

import pytest

from fastrl.base.types import DataError
from fastrl.data import DATASETS, load_problems
from fastrl.data.base import BOXED_INSTRUCTION
from fastrl.data.files import PathDataset

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

ROWS = [{"prompt": f"What is {i}+1?", "answer": str(i + 1), "level": i} for i in range(5)]
VERL = [
    {
        "data_source": "x",
        "prompt": [{"role": "user", "content": f"{i}?"}],
        "reward_model": {"style": "rule", "ground_truth": str(i)},
        "extra_info": {"index": i},
    }
    for i in range(5)
]


def write_jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_arrow(path, rows):
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


def write_saved(folder, *shards):
    """The layout of save_to_disk; the shards are not in the order of their names."""
    folder.mkdir(parents=True)
    names = [f"data-{len(shards) - i}.arrow" for i in range(len(shards))]
    for name, rows in zip(names, shards, strict=True):
        write_arrow(folder / name, rows)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text("{}")


def answers(path, split="train"):
    loaded = load_problems(str(path), split=split)
    assert loaded.bad_rows == []
    return [problem.answer for problem in loaded.problems]


def refusal(path, split="train"):
    with pytest.raises(DataError) as caught:
        load_problems(str(path), split=split)
    return str(caught.value)


def write_gz(path, rows):
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))


def write_ipc_file(path, rows):
    table = pa.Table.from_pylist(rows)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=2)


WRITERS = {
    "rows.jsonl": write_jsonl,
    "rows.jsonl.gz": write_gz,
    "rows.json": lambda path, rows: path.write_text(json.dumps(rows)),
    "rows.parquet": lambda path, rows: pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2),
    "stream.arrow": write_arrow,
    "file.arrow": write_ipc_file,
}


@pytest.mark.parametrize("name", WRITERS)
def test_each_kind_of_file_gives_the_same_problems(tmp_path, name):
    WRITERS[name](tmp_path / name, ROWS)
    loaded = load_problems(str(tmp_path / name), split="whatever")
    assert [(p.id, p.prompt, p.answer, p.columns) for p in loaded.problems] == [
        (f"{name}:{i + 1}", f"What is {i}+1?", str(i + 1), {"level": i}) for i in range(5)
    ]


def test_verl_parquet_keeps_what_a_compute_score_needs(tmp_path):
    pq.write_table(pa.Table.from_pylist(VERL), tmp_path / "train.parquet")
    loaded = load_problems(str(tmp_path / "train.parquet"), split="train")
    problem = loaded.problems[3]
    assert loaded.mapping.startswith("verl") and problem.prompt == [{"role": "user", "content": "3?"}]
    wanted = {"data_source": "x", "ground_truth": "3", "extra_info": {"index": 3}}
    assert {key: problem.columns[key] for key in wanted} == wanted


def test_blank_lines_byte_order_mark_and_crlf_keep_the_line_numbers(tmp_path):
    lines = [json.dumps(row).encode() for row in ROWS[:2]]
    (tmp_path / "rows.jsonl").write_bytes(b"\xef\xbb\xbf" + lines[0] + b"\r\n\r\n\n" + lines[1] + b"\r\n")
    assert [p.id for p in load_problems(str(tmp_path / "rows.jsonl"), split="").problems] == [
        "rows.jsonl:1",
        "rows.jsonl:4",
    ]


def test_a_line_at_the_limit_is_read_and_the_one_after_a_longer_one_too(tmp_path):
    lines = [json.dumps(row).encode() for row in ROWS * 5]
    lines[3] = lines[3] + b" " * (999_999 - len(lines[3]))
    lines[7] = b'"' + b"x" * 3_000_000 + b'"'
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join(lines))
    loaded = load_problems(str(tmp_path / "rows.jsonl"), split="")
    assert [row.line for row in loaded.bad_rows] == [8] and len(loaded.problems) == 24


def test_text_in_a_parquet_file_that_is_not_utf8_is_one_bad_row(tmp_path):
    prompts = pa.array([b"a"] * 24 + [b"\xff"]).view(pa.string())
    pq.write_table(pa.table({"prompt": prompts, "answer": list(range(25))}), tmp_path / "rows.parquet")
    loaded = load_problems(str(tmp_path / "rows.parquet"), split="")
    assert [(row.line, row.reason[:9]) for row in loaded.bad_rows] == [(25, "not UTF-8")] and len(loaded.problems) == 24


@pytest.mark.parametrize(
    "splits",
    [
        {"train": ["train.jsonl"], "test": ["test.jsonl"]},
        {"train": ["train-00000-of-00002.jsonl", "train-00001-of-00002.jsonl"], "test": ["test-00000-of-00001.jsonl"]},
        {"train": ["data/train_a.jsonl", "data/train_b.jsonl"], "test": ["data/test.jsonl"]},
        {"train": ["train/x.jsonl", "train/y.jsonl"], "test": ["test/x.jsonl"]},
        {"train": ["train.jsonl"], "test": ["test.jsonl"], "train_small": ["train_small.jsonl"]},
    ],
)
def test_the_split_chooses_among_the_files_of_a_folder(tmp_path, splits):
    expected = {}
    for split, names in splits.items():
        for i, name in enumerate(names):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            write_jsonl(tmp_path / name, [{"prompt": "a", "answer": f"{split} {i}"}])
        expected[split] = [f"{split} {i}" for i in range(len(names))]
    (tmp_path / "README.md").write_text("train")
    assert {split: answers(tmp_path, split) for split in splits} == expected


def test_a_saved_data_set_is_read_in_the_order_of_its_state(tmp_path):
    write_saved(tmp_path / "saved", ROWS[:2], ROWS[2:])
    assert answers(tmp_path / "saved", "any") == ["1", "2", "3", "4", "5"]


def test_a_saved_data_set_with_splits(tmp_path):
    write_saved(tmp_path / "train", ROWS[:2])
    write_saved(tmp_path / "test", ROWS[2:])
    assert answers(tmp_path, "test") == ["3", "4", "5"]  # a folder per split says enough
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert answers(tmp_path, "train") == ["1", "2"] and answers(tmp_path, "test") == ["3", "4", "5"]
    assert "has the splits train, test, got 'dev'; use --split" in refusal(tmp_path, "dev")


def test_a_state_file_cannot_name_files_outside_its_folder(tmp_path):
    write_arrow(tmp_path / "secret.arrow", ROWS)
    write_saved(tmp_path / "saved", ROWS)
    (tmp_path / "saved" / "state.json").write_text('{"_data_files": [{"filename": "../secret.arrow"}]}')
    assert "secret.arrow does not exist" in refusal(tmp_path / "saved")


def test_ambiguous_and_absent_splits_say_what_is_there(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    (tmp_path / "train.json").write_text(json.dumps(ROWS))
    assert "split 'train' exists as train.json, train.jsonl; pass the path of one" in refusal(tmp_path)
    assert "no file of split 'test'; expected names such as test.jsonl" in refusal(tmp_path, "test")
    assert "found train.json, train.jsonl" in refusal(tmp_path, "test")
    (tmp_path / "empty").mkdir()
    assert "found no data files" in refusal(tmp_path / "empty")


def test_a_missing_file_names_the_nearest(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", ROWS)
    with pytest.raises(DataError) as caught:
        load_problems(str(tmp_path / "test.jsonl"), split="train")
    assert caught.value.exit_code == 3
    near = f"the folder {tmp_path} does, and the nearest name there is 'train.jsonl'"
    assert str(caught.value) == f"{tmp_path}/test.jsonl does not exist; {near}"
    assert f"the folder {tmp_path} does, and nothing there is called like 'qqq'" in refusal(
        tmp_path / "qqq" / "a.jsonl"
    )


def test_an_unknown_kind_of_file_lists_the_known(tmp_path):
    (tmp_path / "rows.csv").write_text("prompt,answer\n")
    message = refusal(tmp_path / "rows.csv")
    assert "rows.csv: cannot read this kind" in message and ".jsonl, .jsonl.gz, .json, .parquet, .arrow" in message


def test_unknown_names_get_the_nearest_data_set():
    assert "there is no data set and no file called 'gsm8'; did you mean 'gsm8k'?" in refusal("gsm8")
    assert f"Known data sets: {', '.join(DATASETS)}; or pass" in refusal("zzz")
    assert "no file called ''" in refusal("")
    assert "pass the path of a file" in refusal("zzz") and "or owner/name of the hub" in refusal("zzz")
    assert "a/b/c does not exist" in refusal("a/b/c")


@pytest.mark.parametrize(
    "content", [b'{"prompt": "a", "answer": "2"}\n{"prompt": "b", "answer": "2"}\n', b"{}", b"\xff"]
)
def test_a_json_file_must_be_one_list(tmp_path, content):
    (tmp_path / "rows.json").write_bytes(content)
    assert "rows.json: expected one JSON list of objects, " in refusal(tmp_path / "rows.json")


def test_damaged_files_are_refused_with_their_name(tmp_path):
    for name, write in WRITERS.items():
        if name not in ("rows.jsonl", "rows.json"):
            write(tmp_path / name, ROWS * 100)
            (tmp_path / name).write_bytes((tmp_path / name).read_bytes()[:-40])
            assert f"{name}: reading stopped after" in refusal(tmp_path / name)
            (tmp_path / name).write_bytes(b"")
            assert name in refusal(tmp_path / name)


def test_a_path_has_the_defaults_of_mathematics():
    dataset = PathDataset(path=Path("x.jsonl"))
    assert (dataset.default_reward, dataset.default_instruction) == ("math", BOXED_INSTRUCTION)


def data_folder(tmp_path):
    for name, rows in {"gsm8k": ROWS, "math": ROWS}.items():
        (tmp_path / name).mkdir()
        named = [row | {"id": f"{name}/train/{i}"} for i, row in enumerate(rows)]
        write_jsonl(tmp_path / name / "train.jsonl", named)
        write_jsonl(tmp_path / name / "test.jsonl", named)
    (tmp_path / "exclude_ids.json").write_text('{"gsm8k/train/2": ["spurious"]}')
    return str(tmp_path)


def test_excluded_ids_are_left_out_of_training_only(tmp_path):
    folder = data_folder(tmp_path)
    train = load_problems("gsm8k", split="train", data_dir=folder)
    assert [p.answer for p in train.problems] == ["1", "2", "4", "5"]
    assert train.excluded == {"gsm8k/train/2": ["spurious"]}
    test = load_problems("gsm8k", split="test", data_dir=folder)
    assert (len(test.problems), test.excluded) == (5, {})


def test_a_named_data_set_says_what_is_missing_and_which_flag(tmp_path):
    folder = data_folder(tmp_path)
    with pytest.raises(DataError, match=r"no data folder '/no/where' \(looked in /no/where\).*--data-dir"):
        load_problems("gsm8k", split="train", data_dir="/no/where")
    with pytest.raises(DataError, match="'math' has train but no split 'test'; use --split"):
        load_problems("math", split="test", data_dir=folder)
    with pytest.raises(DataError, match="aime24/test.jsonl does not exist.*Is --data-dir .* the right folder"):
        load_problems("aime24", split="test", data_dir=folder)
    (tmp_path / "exclude_ids.json").unlink()
    with pytest.raises(DataError, match="exclude_ids.json does not exist.*Write {} into it"):
        load_problems("gsm8k", split="train", data_dir=folder)


# file of the README table: rows, of which bad (an empty answer)
TABLE = {
    "gsm8k/train.jsonl": (7473, 0),
    "gsm8k/test.jsonl": (1319, 0),
    "math/train.jsonl": (7500, 2),
    "math500/test.jsonl": (500, 0),
    "aime24/test.jsonl": (30, 0),
    "amc23/test.jsonl": (40, 0),
    "minerva/test.jsonl": (272, 0),
    "olympiadbench/test.jsonl": (675, 0),
    "hmmt_feb_2024/test.jsonl": (30, 0),
    "arith/svamp.jsonl": (1000, 0),
    "arith/asdiv.jsonl": (2215, 0),
    "arith/mawps.jsonl": (2065, 0),
    "countdown/tinyzero_train.jsonl": (8001, 0),
    "countdown/tinyzero_test.jsonl": (2001, 0),
    "dsr_sub/train.jsonl": (1209, 1),
}
NAMED = {
    ("gsm8k", "train"): 7473,
    ("gsm8k", "test"): 1319,
    ("math", "train"): 7500 - 38,
    ("math500", "test"): 500,
    ("aime24", "test"): 30,
    ("amc23", "test"): 40,
    ("minerva", "test"): 272,
    ("olympiadbench", "test"): 675,
    ("hmmt", "test"): 30,
}


@pytest.mark.realdata
@pytest.mark.parametrize("name", TABLE)
def test_real_files_have_the_rows_of_the_table(data_dir, name):
    loaded = load_problems(str(data_dir / name), split="")
    rows, bad = TABLE[name]
    assert (len(loaded.problems), len(loaded.bad_rows)) == (rows - bad, bad)
    assert all(row.reason == "the answer is empty" for row in loaded.bad_rows)
    assert loaded.mapping == "fastrl: prompt + answer"


@pytest.mark.realdata
@pytest.mark.parametrize("name, split", NAMED)
def test_real_data_sets_load_by_name(data_dir, name, split):
    loaded = load_problems(name, split=split, data_dir=str(data_dir))
    assert (len(loaded.problems), loaded.bad_rows) == (NAMED[name, split], [])
    assert len(loaded.excluded) == (38 if name == "math" else 0)

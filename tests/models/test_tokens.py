"""Ids of tokenizers with holes, ends that cannot be sampled, and the text of completions that rewards see."""

import json

import pytest
import torch

from fastrl.base.types import CheckpointError, TrainBatch
from fastrl.engine.base import Request, Sampling
from fastrl.engine.hf import HFEngine
from fastrl.models.loading import load_model
from fastrl.models.policy import Policy
from fastrl.models.tokens import completion_texts, num_ids
from fastrl.run.resume import resume
from fastrl.settings.parse import parse
from fastrl.settings.run import AXES, EMBEDDED_RECIPE, TrainConfig
from fastrl.weights.guard import Guard
from fastrl.weights.optim import OptimConfig
from support.folders import word_model, word_tokenizer
from support.trainers import make_trainer

HOLES = {"what": 0, "is": 1, "2": 3, "+": 4, "<end>": 7, "3": 9}  # six tokens, ten ids


def opened(folder):
    return load_model(str(folder), dtype=torch.float32, device="cpu")


def test_ids_run_to_the_highest_not_to_the_number_of_tokens(tmp_path):
    tokenizer = word_tokenizer(HOLES)
    assert (len(tokenizer), num_ids(tokenizer)) == (6, 10)
    loaded = opened(word_model(tmp_path, tokenizer, rows=12, favourite=9))
    assert loaded.num_tokens == 10
    engine = HFEngine.of(loaded, 8)
    [[completion]] = engine.sample([Request(prompt_ids=[0, 1, 3], seeds=[1])], Sampling(max_new_tokens=4))
    assert completion.token_ids == [9] * 4  # an id that len(tokenizer) would leave out
    assert completion.rollout_logprobs == pytest.approx([0.0] * 4, abs=1e-6)
    policy = Policy(loaded, OptimConfig(), Guard(spike_sigma=0.0))
    assert policy.num_tokens == 10
    ids = torch.tensor([[0, 1, 3, 9, 9, 9, 9]])
    response = torch.tensor([[False] * 3 + [True] * 4])
    one = torch.ones(1)
    batch = TrainBatch(
        input_ids=ids,
        attention_mask=torch.ones_like(ids, dtype=torch.bool),
        response_mask=response,
        rollout_logprobs=torch.zeros(1, 7),
        group=torch.zeros(1, dtype=torch.int64),
        group_size=torch.ones(1, dtype=torch.int64),
        reward=one,
        credit=one,
        truncated=torch.tensor([True]),
        prompt_lengths=torch.tensor([3]),
        max_new_tokens=4,
    )
    assert policy.score(batch)[0, 3:].tolist() == pytest.approx([0.0] * 4, abs=1e-6)


def test_a_head_with_fewer_rows_than_ids_is_sampled_as_far_as_it_goes(tmp_path):
    tokenizer = word_tokenizer(HOLES)
    assert opened(word_model(tmp_path, tokenizer, rows=9)).num_tokens == 9


@pytest.mark.parametrize("rows, ends, beyond", [(6, None, 7), (12, [7, 11], 11), (12, [7, 10], 10)])
def test_an_end_that_cannot_be_sampled_is_refused(rows, ends, beyond, tmp_path):
    folder = word_model(tmp_path, word_tokenizer(HOLES), rows=rows, ends=ends)
    common = min(rows, 10) - 1
    with pytest.raises(ValueError) as caught:
        opened(folder)
    assert str(caught.value).startswith(f"--model {folder}: the end-of-text id {beyond} cannot be sampled")
    assert f"the ids 0 to {common} in common" in str(caught.value) and "\n" not in str(caught.value)


THINKS = {"what": 0, "is": 1, "<end>": 2, "<think>": 3, "</think>": 4, "<pad>": 5, "<stop>": 6, "4": 7}
SPECIAL = ("<think>", "</think>", "<stop>")


def test_texts_keep_special_tokens_that_are_no_end_and_no_padding():
    tokenizer = word_tokenizer(THINKS, SPECIAL, pad_token="<pad>")  # noqa: S106
    ids = [[3, 0, 4, 7, 2], [3, 3, 6], [5, 7, 5, 2, 2], []]
    assert completion_texts(tokenizer, ids, ends={2, 6}) == ["<think> what </think> 4", "<think> <think>", "4", ""]
    assert completion_texts(tokenizer, ids[1:2], ends={2}) == ["<think> <think> <stop>"]
    assert completion_texts(tokenizer, [], ends={2}) == []


def write(folder, rows):
    (folder / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "p.jsonl"


SMALL = ["--problems-per-step", 2, "--group-size", 8, "--eval-limit", 2, "--instruction", "", "--template", "auto"]


def test_reward_functions_see_the_marks_of_thoughts(tmp_path):
    tokenizer = word_tokenizer(THINKS, SPECIAL, pad_token="<pad>")  # noqa: S106
    folder = word_model(tmp_path / "model", tokenizer, rows=8, ends=[2, 6])
    (tmp_path / "seen.py").write_text(
        "import json\n"
        "def seen(completions, completion_ids, **columns):\n"
        f"    json.dump([completions, completion_ids], open({str(tmp_path / 'seen.json')!r}, 'w'))\n"
        "    return [float(text.count('<think>')) for text in completions]\n"
    )
    data = write(tmp_path, [{"prompt": "what is", "answer": "4"}, {"prompt": "is what", "answer": "4"}])
    flags = ["--reward", f"{tmp_path / 'seen.py'}:seen", "--grade-truncated", "--max-new-tokens", 6]
    trainer = make_trainer(tmp_path / "run", *SMALL, *flags, "--model", folder, "--data", data, "--eval", data)
    trainer.rollout.run(trainer.allocator.take(16), 0)
    texts, ids = json.loads((tmp_path / "seen.json").read_text())
    words = {id: word for word, id in THINKS.items()}
    assert texts == [" ".join(words[id] for id in row if id not in (2, 5, 6)) for row in ids]
    assert sum(text.count("<think>") for text in texts) > 3 and any(6 in row for row in ids)


DATED = (
    "{{- 'Today ' + (date if date is defined else strftime_now('%d')) + ' ' }}"
    "{%- for m in messages %}{{- m.content }}{%- endfor %}"
)


@pytest.mark.promise("A11")
def test_a_template_with_todays_date_is_noticed_on_resume(tmp_path, monkeypatch):
    import transformers.utils.chat_template_utils as chat

    class Clock:
        day = "01"

        @classmethod
        def now(cls):
            return cls

        @classmethod
        def strftime(cls, form):
            return cls.day

    monkeypatch.setattr(chat, "datetime", Clock)
    ids = {word: i for i, word in enumerate(["<unk>", "<end>", "Today", "01", "02", "what", "is", "4"])}
    folder = word_model(tmp_path / "model", word_tokenizer(ids, template=DATED), rows=8)
    data = write(tmp_path, [{"prompt": "what is", "answer": "4"}, {"prompt": "is what", "answer": "4"}])
    flags = [*SMALL, "--reward", "exact", "--model", folder, "--data", data, "--eval", data, "--max-new-tokens", 4]

    def on_day(day, name, *more):
        Clock.day = day
        argv = [*map(str, [*flags, *more])]
        config = parse(TrainConfig, [str(EMBEDDED_RECIPE), "--out", str(tmp_path / name), *argv], AXES)
        return make_trainer(tmp_path / name, *argv), config

    for name, more in (("open", []), ("fixed", ["--template-args", "date=02"])):
        trainer, _ = on_day("01", name, *more)
        trainer.step()
        trainer.save()
    trainer, config = on_day("02", "open")
    said = (
        r"prompts was \w+ and is now \w+ \(.*a chat template with today's date.*--template-args.*--allow-change prompts"
    )
    with pytest.raises(CheckpointError, match=said):
        resume(trainer, "auto", config)
    trainer, config = on_day("02", "open", "--allow-change", "prompts")
    resume(trainer, "auto", config)
    assert trainer.completed == 1
    trainer, config = on_day("02", "fixed", "--template-args", "date=02")
    resume(trainer, "auto", config)
    assert trainer.completed == 1
    trainer, config = on_day("01", "fixed", "--template-args", "date=01")
    with pytest.raises(CheckpointError, match=r"task.template_args was \['date=02'\] and is now \['date=01'\]"):
        resume(trainer, "auto", config)
    trainer, config = on_day("01", "fixed", "--template-args", "date=01", "--allow-change", "task.template_args")
    resume(trainer, "auto", config)  # other prompts follow from what was allowed
    assert trainer.completed == 1

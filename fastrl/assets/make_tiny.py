"""Make the embedded model: a small Qwen2 decoder warm-started on imperfect demonstrations of the arithmetic task.

    python -m fastrl.assets.make_tiny [OUT]

Each operation of a demonstration is wrong with probability 0.2, so the model learns the format and most of the table
and leaves the rest to reinforcement learning.
"""

import random
import sys
from pathlib import Path

import torch

from fastrl.data.arithmetic import Arithmetic, demonstration
from fastrl.models.head import token_logprobs
from fastrl.models.inputs import Inputs

ERROR_RATE, STEPS, BATCH, LR = 0.2, 1600, 256, 2e-3
END = "<|endoftext|>"
BLANK = "\u0120"  # how byte-level tokenizers write a blank


def make_tokenizer():
    """Qwen2's byte-level tokenizer over single characters, without merges."""
    from transformers import Qwen2Tokenizer

    tokens = [END, *"0123456789+-*=", BLANK]
    return Qwen2Tokenizer(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=[],
        unk_token=None,  # pyright: ignore[reportArgumentType] its str may be None, for no such token
    )


def make_model(num_tokens: int, end_id: int):
    from transformers import Qwen2Config, Qwen2ForCausalLM

    config = Qwen2Config(
        vocab_size=num_tokens,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        eos_token_id=end_id,
        bos_token_id=None,
        pad_token_id=end_id,
    )
    return Qwen2ForCausalLM(config)


def warm_start(model, tokenizer, *, steps: int = STEPS) -> None:
    """Supervised training on fresh demonstrations; the loss is the mean over completion tokens."""
    task, rng, end = Arithmetic(), random.Random(0), tokenizer.eos_token_id  # noqa: S311
    held_out = {p.prompt for p in task.load("test") if isinstance(p.prompt, str)}
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, total_steps=steps, pct_start=0.05)
    for step in range(steps):
        prompts = [p for p in (task.prompt(rng) for _ in range(BATCH)) if p not in held_out]
        rows = [(tokenizer.encode(p), tokenizer.encode(demonstration(p, ERROR_RATE, rng)) + [end]) for p in prompts]
        width = max(len(p) + len(c) for p, c in rows)
        ids = torch.tensor([[*p, *c] + [end] * (width - len(p) - len(c)) for p, c in rows])
        column = torch.arange(width)
        mask = torch.stack([(column >= len(p)) & (column < len(p) + len(c)) for p, c in rows])
        logprobs, _ = token_logprobs(model, Inputs.of(ids, mask), num_tokens=len(tokenizer))
        loss = -logprobs.sum() / mask.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step:5}  loss {loss.item():.4f} nats per token", flush=True)


def main() -> None:
    out = Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parent / "tiny")
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    model = make_model(len(tokenizer), tokenizer.get_vocab()[END])
    print(f"{sum(p.numel() for p in model.parameters())} parameters")
    warm_start(model, tokenizer)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()

"""Small model folders as save_pretrained writes them, with tokenizers of whole words and of bytes."""

from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2Tokenizer,
)

END = "<end>"


def word_tokenizer(ids: dict[str, int], special: tuple[str, ...] = (), template: str | None = None, **names: str):
    """Words, told apart by blanks, with these ids; `<end>` ends a text."""
    base = Tokenizer(models.WordLevel(ids, unk_token=next(iter(ids))))
    base.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=base, eos_token=END, extra_special_tokens=list(special), chat_template=template, **names
    )
    assert tokenizer.get_vocab() == ids
    return tokenizer


def word_model(
    folder: Path, tokenizer, rows: int, *, ends: int | list[int] | None = None, favourite: int | None = None
) -> Path:
    """A random Llama with `rows` ids beside the tokenizer. favourite: the id that it always writes."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=rows,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=256,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    if favourite is not None:  # all hidden states are ones, and only that row of the head answers: by 32 nats
        with torch.no_grad():
            for layer in model.model.layers:
                layer.self_attn.o_proj.weight.zero_()
                layer.mlp.down_proj.weight.zero_()
            model.model.embed_tokens.weight.fill_(1.0)
            model.lm_head.weight.zero_()
            model.lm_head.weight[favourite].fill_(1.0)
    model.generation_config = GenerationConfig(eos_token_id=ends if ends is not None else tokenizer.eos_token_id)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def byte_model(folder: Path) -> Path:
    """A tiny random Qwen2 with a tokenizer of single bytes and a chat template."""
    end = "<|endoftext|>"
    vocabulary = {token: i for i, token in enumerate([end, *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    tokenizer = Qwen2Tokenizer(vocab=vocabulary, merges=[])
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=320,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        eos_token_id=0,
        tie_word_embeddings=True,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder

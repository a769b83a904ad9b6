"""Shapes of models for the memory plan: from a Hugging Face config.json, or by name for well-known ones. No weights."""

import math
from functools import cache
from pathlib import Path
from typing import Any

from fastrl.memory.parts import ModelShape
from fastrl.models.loading import first_line, model_config, parameter_shapes
from fastrl.weights.buffer import layout

QWEN2 = dict(model_type="qwen2", max_position_embeddings=32768)
QWEN3 = dict(model_type="qwen3", max_position_embeddings=40960, head_dim=128, vocab_size=151936)
LLAMA3 = dict(model_type="llama", max_position_embeddings=131072, vocab_size=128256)


def sizes(hidden: int, inner: int, layers: int, heads: int, kv_heads: int, tied: bool, **others: int) -> dict:
    return dict(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=tied,
        **others,
    )


KNOWN: dict[str, dict[str, Any]] = {
    "qwen2.5-0.5b": QWEN2 | sizes(896, 4864, 24, 14, 2, True, vocab_size=151936),
    "qwen3-0.6b": QWEN3 | sizes(1024, 3072, 28, 16, 8, True),
    "llama-3.2-1b": LLAMA3 | sizes(2048, 8192, 16, 32, 8, True, head_dim=64),
    "qwen2.5-1.5b": QWEN2 | sizes(1536, 8960, 28, 12, 2, True, vocab_size=151936),
    "qwen3-1.7b": QWEN3 | sizes(2048, 6144, 28, 16, 8, True),
    "qwen2.5-3b": QWEN2 | sizes(2048, 11008, 36, 16, 2, True, vocab_size=151936),
    "llama-3.2-3b": LLAMA3 | sizes(3072, 8192, 28, 24, 8, True, head_dim=128),
    "qwen3-4b": QWEN3 | sizes(2560, 9728, 36, 32, 8, True),
    "qwen2.5-7b": QWEN2 | sizes(3584, 18944, 28, 28, 4, False, vocab_size=152064),
    "llama-3.1-8b": LLAMA3 | sizes(4096, 14336, 32, 32, 8, False, head_dim=128),
    "qwen3-8b": QWEN3 | sizes(4096, 12288, 36, 32, 8, False),
    "qwen2.5-14b": QWEN2 | sizes(5120, 13824, 48, 40, 8, False, vocab_size=152064),
    "qwen3-14b": QWEN3 | sizes(5120, 17408, 40, 40, 8, False),
    "qwen2.5-32b": QWEN2 | sizes(5120, 27648, 64, 40, 8, False, vocab_size=152064),
    "qwen3-32b": QWEN3 | sizes(5120, 25600, 64, 64, 8, False),
}  # by parameters


class NoPlan(ValueError):
    """A model whose memory cannot be planned."""


REFUSED = {
    "quantization_config": "it is quantised, and fastrl trains plain float32 or bfloat16 weights",
    "num_experts": "it has experts, and fastrl trains dense decoders",
    "num_local_experts": "it has experts, and fastrl trains dense decoders",
    "n_routed_experts": "it has experts, and fastrl trains dense decoders",
    "kv_lora_rank": "it has latent attention, and fastrl trains plain or grouped attention",
    "is_encoder_decoder": "it has an encoder, and fastrl trains decoders",
}
NEEDED = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")


def find_config(name: str):
    """A known name, a config.json, a model folder, 'embedded' or a hub name -> a transformers configuration.

    Raises ValueError when there is none.
    """
    from transformers import AutoConfig

    if name.lower() in KNOWN:
        return AutoConfig.for_model(**KNOWN[name.lower()])
    path = Path(name).expanduser()
    if not path.is_file():
        try:
            return model_config(name)
        except ValueError as error:
            raise ValueError(f"{error}; known by name: {', '.join(KNOWN)}") from error
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"--model {name}: {first_line(error)}") from error


def model_shape(name: str, config) -> ModelShape:
    """Raises NoPlan, with what was got and what is supported, for a model that has no plan."""
    text = config.get_text_config()
    for field, reason in REFUSED.items():
        value = getattr(config, field, None) or getattr(text, field, None)
        if value:
            shown = f"{field} {value}" if isinstance(value, int) else field
            raise NoPlan(f"--model {name} ({text.model_type}, {shown}) has no memory plan: {reason}")
    lacking = [field for field in NEEDED if not getattr(text, field, None)]
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * (text.num_hidden_layers if not lacking else 0)
    strange = set(kinds) - {"full_attention", "sliding_attention"}
    if lacking or strange:
        what = f"no {lacking[0]}" if lacking else f"layers of {strange.pop()}"
        raise NoPlan(
            f"--model {name} ({text.model_type}) has no memory plan: {what}; supported are decoders whose layers all "
            "have full or sliding attention, such as qwen2, qwen3 and llama"
        )
    try:
        shapes = parameter_shapes(text)
    except ValueError as error:
        raise NoPlan(f"--model {name}: {first_line(error)}; supported are causal language models") from error
    heads, window = text.num_attention_heads, getattr(text, "sliding_window", None) or 0
    critic = {n: shape for n, shape in shapes.items() if n != "lm_head.weight"}
    critic |= {"value_head.weight": (1, text.hidden_size), "value_head.bias": (1,)}
    return ModelShape(
        name=name,
        parameters=sum(map(math.prod, shapes.values())),
        elements=end(shapes),
        critic_elements=end(critic),
        hidden=text.hidden_size,
        inner=getattr(text, "intermediate_size", None) or 4 * text.hidden_size,
        heads=heads,
        kv_heads=getattr(text, "num_key_value_heads", None) or heads,
        head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
        vocab=text.vocab_size,
        windows=tuple(window if kind == "sliding_attention" else 0 for kind in kinds),
        qk_norm=any(n.endswith("q_norm.weight") for n in shapes),
        limit=getattr(text, "max_position_embeddings", None) or 0,
    )


def end(shapes: dict[str, tuple[int, ...]]) -> int:
    last = list(layout(shapes).values())[-1]
    return last.offset + last.numel


@cache
def known_shapes() -> dict[str, ModelShape]:
    """The known models by name, smallest first."""
    return {name: model_shape(name, find_config(name)) for name in KNOWN}

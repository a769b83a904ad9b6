"""Every decoder family of transformers as a folder with a tiny random model, and the table of what fastrl makes of it.

python tests/support/families.py [FAMILY ...]    the rows of docs/models.md, computed; without names, written there
"""

import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

DOC = Path(__file__).parents[2] / "docs" / "models.md"
TABLE = re.compile(r"(?<=<!-- families -->\n).*?(?=<!-- end -->)", re.DOTALL)
WORDS = 64  # rows of the vocabulary; the tokenizer has fewer

# what a configuration may call its sizes; a family takes those that it knows
SIZES = {
    32: "hidden_size n_embd d_model dim moe_intermediate_size shared_expert_intermediate_size",
    64: "intermediate_size n_inner ffn_dim d_ff ffn_hidden_size vocab_size",
    3: "num_hidden_layers n_layer num_layers n_layers decoder_layers",
    4: "num_attention_heads n_head n_heads decoder_attention_heads num_heads attention_heads num_experts "
    "num_local_experts n_routed_experts sliding_window",
    2: "num_key_value_heads num_experts_per_tok moe_topk",
    8: "head_dim qk_nope_head_dim qk_rope_head_dim v_head_dim",
    1: "n_group topk_group first_k_dense_replace n_shared_experts",
    16: "kv_lora_rank q_lora_rank",
    128: "max_position_embeddings n_positions max_seq_len",
}
LATENT = dict(qk_head_dim=16, num_key_value_heads=4)
SPARSE = LATENT | dict(index_n_heads=2, index_head_dim=16, index_topk=64)
MAMBA = dict(mamba_n_heads=4, mamba_d_head=16, mamba_d_state=8, mamba_n_groups=1, mamba_expand=2)
LINEAR = dict(
    num_hidden_layers=4,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    layer_types=["linear_attention", "full_attention"] * 2,
)
SHARED_KV = dict(
    num_hidden_layers=4,
    layer_types=["sliding_attention", "full_attention"] * 2,
    num_kv_shared_layers=2,
    hidden_size_per_layer_input=8,
    vocab_size_per_layer_input=WORDS,
)
OWN = {
    "bamba": dict(attn_layer_indices=[1]) | MAMBA,
    "codegen": dict(rotary_dim=4),
    "dbrx": dict(
        attn_config=dict(kv_n_heads=2, rope_theta=1e4, clip_qkv=8.0),
        ffn_config=dict(ffn_hidden_size=32, moe_num_experts=4, moe_top_k=2),
    ),
    "deepseek_v2": LATENT,
    "deepseek_v3": LATENT,
    "deepseek_v32": SPARSE,
    "falcon_h1": dict(mamba_d_ssm=64) | MAMBA,
    "gemma3n_text": SHARED_KV | dict(laurel_rank=4, activation_sparsity_pattern=[0.0] * 4, altup_num_inputs=2),
    "gemma4_text": SHARED_KV | dict(global_head_dim=8),
    "glm4_moe_lite": LATENT,
    "glm_moe_dsa": SPARSE,
    "gpt_neo": dict(attention_types=[[["global", "local"], 1], [["global"], 1]], window_size=4),
    "gptj": dict(rotary_dim=4),
    "granitemoehybrid": dict(layer_types=["mamba", "attention", "mamba"], shared_intermediate_size=64) | MAMBA,
    "jamba": dict(
        attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1, mamba_d_state=8
    )
    | dict(mamba_dt_rank=4, use_mamba_kernels=False),
    "lfm2": dict(layer_types=["conv", "full_attention", "conv"]),
    "lfm2_moe": dict(layer_types=["conv", "full_attention", "conv"], num_dense_layers=1),
    "longcat_flash": LATENT | dict(num_layers=2),
    "mamba2": dict(num_heads=8, head_dim=8, state_size=8, n_groups=1, expand=2),
    "minicpm3": LATENT,
    "nemotron_h": dict(layers_block_type=["mamba", "attention", "mlp"]),
    "olmo_hybrid": LINEAR,
    "qwen3_5_moe_text": LINEAR,
    "qwen3_5_text": LINEAR,
    "qwen3_next": LINEAR,
    "youtu": LATENT,
}
# switched on together in the second variant of a family, where it knows them
OPTIONS = {
    "scale": dict(logits_scaling=8.0, logit_scale=0.25, lm_head_multiplier=0.5),
    "cap": dict(final_logit_softcapping=5.0, logits_soft_cap=5.0),
    "cap of scores": dict(attn_logit_softcapping=5.0),
    "window": dict(sliding_window=4, use_sliding_window=True, max_window_layers=1),
}
NEVER_TIED, NO_DROPOUT = ("dbrx",), ("diffllama",)  # which refuse it themselves
RATE = re.compile(r"drop(out)?(_rate|_prob)?$|pdrop$|layerdrop$|jitter_noise$")

VARIANTS = ("plain", "options")
FAMILIES = """
afmoe apertus arcee aria_text bamba biogpt bitnet bloom codegen cohere cohere2 cohere2_moe ctrl cwm dbrx deepseek_v2
deepseek_v3 deepseek_v32 diffllama doge dots1 ernie4_5 ernie4_5_moe exaone4 exaone_moe falcon falcon_h1 falcon_mamba
flex_olmo gemma gemma2 gemma3_text gemma3n_text gemma4_text glm glm4 glm4_moe glm4_moe_lite glm_moe_dsa gpt2
gpt_bigcode gpt_neo gpt_neox gpt_neox_japanese gpt_oss gptj granite granite_swa granitemoe granitemoe_swa
granitemoehybrid granitemoeshared helium hunyuan_v1_dense hunyuan_v1_moe hyperclovax inkling_text jais2 jamba jetmoe
lfm2 lfm2_moe llama llama4_text longcat_flash mamba mamba2 mellum mimo_v2_flash minicpm3 minimax minimax_m2 ministral
ministral3 mistral mixtral modernbert-decoder moshi mpt nanochat nemotron nemotron_h olmo olmo2 olmo3 olmo_hybrid
olmoe openai-gpt opt persimmon phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_5_moe_text qwen3_5_text qwen3_moe
qwen3_next recurrent_gemma rwkv seed_oss smollm3 solar_open stablelm starcoder2 vaultgemma xglm youtu
""".split()


@dataclass(frozen=True)
class Row:
    """A family in the table."""

    family: str
    result: str  # "equal", or "refused"
    attention: str = ""  # what --attention must be
    rows: str = ""  # packed or padded
    options: list[str] = field(default_factory=list)  # that its configuration knows; all of them were switched on
    reason: str = ""

    def __str__(self) -> str:
        return f"| {self.family} | {self.result} | {self.attention} | {self.rows} | {', '.join(self.options)} |" + (
            f" {self.reason} |"
        )


def config(family: str, *, options: bool):
    """-> a tiny configuration, and the names of the options that are on in it."""
    from transformers import CONFIG_MAPPING

    cls = CONFIG_MAPPING[family]
    plain = cls()
    known = {**vars(plain), **dict.fromkeys(getattr(cls, "attribute_map", {}))}
    values = {name: n for n, names in SIZES.items() for name in names.split() if name in known}
    if known.get("sliding_window") is None:
        values.pop("sliding_window", None)
    values |= dict(pad_token_id=0, bos_token_id=1, eos_token_id=2) | OWN.get(family, {})
    on = []
    if options:
        for name, some in OPTIONS.items():
            if chosen := {key: value for key, value in some.items() if key in known}:
                on.append(name)
                values |= chosen
        if family not in NO_DROPOUT and (
            rates := [key for key in known if RATE.search(key) and isinstance(known[key], (int, float))]
        ):
            on.append("dropout")
            values |= dict.fromkeys(rates, 0.1)
        if "tie_word_embeddings" in known and family not in NEVER_TIED:
            on.append("untied" if plain.tie_word_embeddings else "tied")
            values["tie_word_embeddings"] = not plain.tie_word_embeddings
    return cls(**values), on


def make_folder(folder: Path, family: str, *, options: bool) -> list[str]:
    """Write a model folder of a family, with the tokenizer of the embedded model -> the options that are on."""
    from transformers import AutoModelForCausalLM

    from fastrl.models.loading import EMBEDDED, model_path

    made, on = config(family, options=options)
    model = AutoModelForCausalLM.from_config(made, attn_implementation="eager", dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:  # far from uniform, so that what is left out shows
            vocabulary = any(word in name for word in ("embed", "lm_head", "wte"))
            nn.init.normal_(parameter, 0.0, 0.3 if vocabulary else 0.15, generator=generator)
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(model_path(EMBEDDED)) / file, folder / file)
    return on


def measured(family: str, folder: Path) -> Row:
    """What fastrl makes of a family, plain and with all its options on; its models are left in two folders there."""
    from fastrl.models.check import compare_with_own_forward
    from fastrl.models.loading import load_model

    attentions, on = ["sdpa", "eager"], []
    for variant in VARIANTS:
        path = str(folder / variant)
        on = make_folder(folder / variant, family, options=variant == "options")
        while True:
            try:
                compare_with_own_forward(path, attention=attentions[0])
                break
            except ValueError as error:
                attentions.pop(0)
                if not attentions:
                    reason = str(error).partition(f"{path}: ")[2].removesuffix(". See docs/models.md")
                    return Row(family, "refused", reason=without_figures(reason))
    packs = load_model(path, dtype=torch.float32, device="cpu", attention=attentions[0]).packs
    return Row(family, "equal", attentions[0], "packed" if packs else "padded", on)


def without_figures(reason: str) -> str:
    """A reason without what differs from machine to machine and from version to version."""
    reason = re.sub(r"( fails with \w+): .*", r"\1", reason)
    return re.sub(r" \([\d.]+ nats.*?\)", "", reason).replace("|", "\\|")


def rows_of(text: str) -> Iterator[Row]:
    """The rows of a document's table."""
    for line in text.splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if len(cells) == 6 and cells[0] in FAMILIES:
            yield Row(*cells[:4], [name for name in cells[4].split(", ") if name], cells[5])


if __name__ == "__main__":
    import transformers

    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    made = []
    for family in sys.argv[1:] or FAMILIES:
        with tempfile.TemporaryDirectory() as folder:
            made.append(str(measured(family, Path(folder))))
        print(made[-1], flush=True)
    if not sys.argv[1:]:
        head = f"With transformers {transformers.__version__}:\n\n"
        head += "| family | | `--attention` | rows | options tried | refused because |\n|---|---|---|---|---|---|\n"
        DOC.write_text(TABLE.sub(lambda _: head + "\n".join(made) + "\n", DOC.read_text()))

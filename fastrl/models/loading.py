"""Loading a Hugging Face causal language model, and the one place where logits are shifted against labels."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from fastrl.checkpoint.reading import verify_model
from fastrl.models import liger as ligers
from fastrl.models.attention import packed_layers, register, without_cudnn
from fastrl.models.fetching import fetched
from fastrl.models.liger import Liger, LigerKernels
from fastrl.models.modes import make_quiet
from fastrl.models.ragged import Ragged, choose
from fastrl.models.refusals import refuse_auto_map, refuse_code, refuse_ends, refuse_gguf, refuse_pickles
from fastrl.models.tokens import num_sampled
from fastrl.weights.activations import CheckpointMode, checkpoint_layers

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

EMBEDDED = "embedded"  # the model that ships with the package
# those of transformers itself: a name with a slash would be code from the hub
Attention = Literal["sdpa", "eager", "flash_attention_2", "flash_attention_3", "flex_attention"]


@dataclass(slots=True)
class LoadedModel:
    model: "PreTrainedModel"
    tokenizer: "PreTrainedTokenizerBase"
    eos_ids: tuple[int, ...]  # every id that ends a completion
    path: str
    packs: bool  # whether `token_logprobs` may be given a packing
    liger: LigerKernels | None = None  # those that are in the model
    said: tuple[str, ...] = ()  # lines on the kernels that were chosen, and why others were not

    @property
    def num_tokens(self) -> int:
        """How many ids can be sampled, from 0 on."""
        return num_sampled(self.model, self.tokenizer)

    @property
    def pad_id(self) -> int:
        """What fills rows up; it is never read, so any id will do."""
        own = self.tokenizer.pad_token_id
        return own if isinstance(own, int) else self.eos_ids[0]


def pick_device(device: str, dtype: str) -> tuple[str, torch.dtype]:
    """`auto` decided: the rank's GPU with bfloat16 weights, or the CPU with float32. `cuda` is the rank's GPU too.

    Raises ValueError for a GPU that is not there.
    """
    if not re.fullmatch(r"auto|cpu|cuda(:\d{1,3})?", device):
        raise ValueError(f"--device must be auto, cpu, cuda or cuda:N, got {device!r}")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: torch sees no CUDA device; use --device cpu")
    if device == "cuda" or (device == "auto" and torch.cuda.is_available()):
        device = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    device = "cpu" if device == "auto" else device
    on_gpu = device.startswith("cuda")
    if on_gpu and torch.device(device).index and torch.device(device).index >= torch.cuda.device_count():
        raise ValueError(f"--device {device}: torch sees {torch.cuda.device_count()} CUDA devices, counted from 0")
    return device, getattr(torch, dtype if dtype != "auto" else "bfloat16" if on_gpu else "float32")


def model_path(name: str, *, weights: bool = False) -> str:
    """'embedded', a folder, or owner/name[@revision] of the hub -> the folder of a model.

    Of the hub only configuration and tokenizer are fetched, unless the weights are asked for. Raises ValueError for
    what is no model.
    """
    if name == EMBEDDED:
        return str(Path(__file__).parent.parent / "assets" / "tiny")
    folder = Path(name).expanduser()
    refuse_gguf(name, folder)
    if not folder.is_dir():
        folder = fetched(name, weights=weights)
    if not (folder / "config.json").exists():
        raise ValueError(f"--model {name}: the folder has no config.json, so it is not a Hugging Face model folder")
    refuse_code(name, folder)
    return str(folder)


def model_config(name: str):
    """The transformers configuration of a model; no weights are read."""
    from transformers import AutoConfig, PretrainedConfig

    path = model_path(name)
    try:
        refuse_auto_map(name, "config.json", PretrainedConfig.get_config_dict(path)[0])
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(named(name, error)) from error


def parameter_shapes(config) -> dict[str, tuple[int, ...]]:
    """A transformers configuration -> names and shapes of the parameters, tied ones once. Allocates nothing."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


def save_model(loaded: "LoadedModel", folder: Path) -> None:
    """Write weights, configuration and tokenizer as a Hugging Face model folder. Raises OSError, SafetensorError."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    # Parameters are views of one buffer, which safetensors would take for shared weights: each gets memory of its own.
    # Names of one parameter go on sharing it, and transformers writes it once, as the source has it.
    copies: dict[int, torch.Tensor] = {}
    state = {}
    for key, tensor in loaded.model.state_dict(keep_vars=True).items():
        if id(tensor) not in copies:
            copies[id(tensor)] = tensor.detach().clone(memory_format=torch.contiguous_format)
        state[key] = copies[id(tensor)]
    loaded.model.save_pretrained(folder, state_dict=state)
    try:
        loaded.tokenizer.save_pretrained(folder)
    except Exception as error:
        if type(error) is not Exception:
            raise
        raise OSError(str(error)) from error  # what tokenizers says of a disk that is full has no class of its own


def load_tokenizer(name: str):
    """The tokenizer of a model. Raises ValueError, naming the files that are looked for, when there is none."""
    from transformers import AutoTokenizer
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    path = model_path(name)
    wanted = ("tokenizer.json", "tokenizer.model", "vocab.json")
    if not any((Path(path) / file).exists() for file in wanted):
        raise ValueError(f"--model {name}: the folder has no tokenizer (none of {', '.join(wanted)}); copy one into it")
    try:
        refuse_auto_map(name, "tokenizer_config.json", get_tokenizer_config(path))
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(named(name, error, "no tokenizer could be loaded: ")) from error


def load_model(
    name: str,
    *,
    dtype: torch.dtype,
    device: str,
    attention: str = "sdpa",
    ragged: Ragged = "auto",
    checkpoint: CheckpointMode = "none",
    liger: Liger = "off",
) -> LoadedModel:
    """Weights of a model in `dtype` on `device`, without dropout, with its tokenizer and stop ids.

    Raises ValueError when the model or its tokenizer cannot be loaded, the model has no LM head or weights that are not
    finite, and CheckpointError for a checkpoint whose files have changed since it was written.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = load_tokenizer(name)
    path = model_path(name, weights=True)
    refuse_pickles(name, Path(path))
    verify_model(Path(path))
    model_config(name)  # refuses what comes with code, before any weights are fetched
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=dtype,
            attn_implementation=attention,
            use_safetensors=True,
            trust_remote_code=False,
            device_map=None,
        )
    except (OSError, ValueError) as error:
        if "scaled_dot_product_attention" in str(error):
            raise ValueError(f"--model {name}: this family has no SDPA attention; use --attention eager") from error
        raise ValueError(named(name, error)) from error
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or head.bias is not None:
        raise ValueError(f"--model {name}: {type(model).__name__} has no plain LM head")
    if attention == "sdpa" and model._supports_attention_backend:
        model.set_attn_implementation(register())
    checkpoint_layers(model, checkpoint)
    make_quiet(model)
    stop = model.generation_config.eos_token_id if isinstance(model.generation_config, GenerationConfig) else None
    eos = {tokenizer.eos_token_id, *([stop] if isinstance(stop, int) else stop or [])} - {None}
    if not eos:
        raise ValueError(f"--model {name}: neither the tokenizer nor generation_config.json names an end-of-text token")
    refuse_infinite(name, model)
    eos_ids = tuple(sorted(eos))
    refuse_ends(name, eos_ids, num_sampled(model, tokenizer))
    model.to(device)  # pyright: ignore[reportArgumentType] transformers' wrapper hides that it is a method
    without_cudnn(device)
    kernels, said = ligers.choose(model, liger)
    layers = packed_layers(model)
    kernel, more = choose(set(layers), ragged) if layers else (None, [])
    if kernel is not None:
        model.set_attn_implementation(register(kernel))
    return LoadedModel(model, tokenizer, eos_ids, path, packs=bool(layers), liger=kernels, said=(*said, *more))


def refuse_infinite(name: str, model: nn.Module) -> None:
    """Raise ValueError where a weight is NaN or infinite: nothing can be learnt from there."""
    for key, parameter in model.named_parameters():
        if parameter.numel() and not torch.stack(parameter.aminmax()).isfinite().all():
            raise ValueError(
                f"--model {name}: {key} has weights that are not finite; the file is damaged, or what it was trained "
                "with diverged. Use another checkpoint"
            )


def named(name: str, error: Exception, before: str = "") -> str:
    """The message of an error with the flag in front, if it has none yet."""
    line = first_line(error)
    return line if line.startswith("--model ") else f"--model {name}: {before}{line}"


def first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__

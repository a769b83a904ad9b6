"""vLLM in this process, sampling from the trainer's own weights: nothing is ever copied to it.

Its parameters are views of the flat buffer, so a published update is there at once; only prefixes cached from the old
weights must go, which happens before the next token. On a GPU the KV cache gives its pages back between `generate`
phases. Log-probabilities are those of the distribution that was sampled from, at the sampling temperature.
"""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch

from fastrl.base import ranks
from fastrl.base.setting import check_bounds, setting
from fastrl.base.types import Completion, EngineError
from fastrl.engine.base import Request, Sampling, sampling_seed
from fastrl.engine.kv_cache import KvPages
from fastrl.engine.vllm_random import Seeds, ask_for_second_runner, generators_kept, seeds_for
from fastrl.engine.vllm_weights import outside, prepare_cpu, register
from fastrl.weights.buffer import FlatParams

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CPU_BLOCK = 32  # tokens of a cached block, the fewest there; prompts of a group share theirs
SUPPORTED = ((0, 26), (0, 33))  # first and last minor version
UNSUPPORTED_CONFIG = {
    "quantization_config": "a quantised model has no plain weights to share",
    "num_experts": "experts are laid out anew by vLLM",
    "num_local_experts": "experts are laid out anew by vLLM",
    "kv_lora_rank": "latent attention keeps products of weights",
}


@dataclass(kw_only=True)
class VllmConfig:
    """The vLLM engine. `max_num_seqs` is the run's."""

    kv_gib: float = setting(0.0, "[0, 1e5]")  # of KV cache; 0 = what the memory plan leaves
    kv: Literal["release", "keep"] = "release"  # whether its pages are free while training
    max_num_batched_tokens: int = setting(8192, "[1, 1e8]")  # per forward of the engine
    cuda_graphs: bool = True  # of decoding
    compile: bool = False  # torch.compile in the engine: slower to start, a little faster
    seeds: Seeds = "auto"  # one per request, or one per step for all of them; auto: per request where that is free

    def __post_init__(self):
        check_bounds(self, "vllm.")


class VllmEngine:
    """Samples with vLLM over the parameters of a transformers model, which are views of `flat`."""

    def __init__(
        self,
        model: "PreTrainedModel",
        flat: FlatParams,
        settings: VllmConfig,
        *,
        eos_ids: tuple[int, ...],
        num_tokens: int,
        max_model_len: int,
        max_num_seqs: int,
        kv_bytes: int,
        seed: int = 0,
    ):
        """num_tokens: of the tokenizer; rows of the vocabulary beyond it are not given to vLLM.

        Of several ranks each has an engine of its own, and all make theirs at the same time.

        Raises ValueError for a model or a version of vLLM that cannot share weights, EngineError if they do not fit.
        """
        refuse(model.config)
        self.version = installed_version()
        self.flat, self.eos_ids, self.num_tokens = flat, eos_ids, num_tokens
        self.policy_version = self.cached_version = 0
        cuda = flat.weights.is_cuda
        os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # the engine core lives in this process
        os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
        os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        if not cuda:
            os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(max(1, kv_bytes >> 30)))  # GiB
        options: dict = {"block_size": CPU_BLOCK}
        if cuda:
            options = dict(
                kv_cache_memory_bytes=kv_bytes,
                gpu_memory_utilization=0.05,  # checked at the start, sizes nothing
                enable_sleep_mode=settings.kv == "release",
            )
        several = ranks.size() > 1
        if several:  # each on the GPU of its LOCAL_RANK, over the process group that is there
            options["distributed_executor_backend"] = "external_launcher"
        with process_state_kept():
            if not cuda:
                prepare_cpu()
            if several:
                keep_process_group()
            else:  # vLLM to 0.27 opens a store of its own, which under torchrun it would wait for torchrun to open
                os.environ.pop("TORCHELASTIC_USE_AGENT_STORE", None)
            from vllm import LLM  # pyright: ignore[reportAttributeAccessIssue] where vllm is absent, taken for this file

            ask_for_second_runner()
            with tempfile.TemporaryDirectory() as folder:
                model.config.save_pretrained(folder)  # all that vLLM reads of a model
                self.llm = LLM(
                    model=folder,
                    runner="generate",
                    load_format=register(flat),
                    skip_tokenizer_init=True,
                    hf_overrides={"vocab_size": num_tokens, "architectures": [type(model).__name__]},
                    dtype=str(flat.weights.dtype).removeprefix("torch."),
                    max_model_len=max_model_len,
                    max_num_seqs=max_num_seqs,
                    max_num_batched_tokens=max(settings.max_num_batched_tokens, max_model_len),
                    seed=seed,
                    logprobs_mode="processed_logprobs",
                    enable_prefix_caching=True,
                    disable_log_stats=True,
                    enforce_eager=not (settings.cuda_graphs or settings.compile),
                    compilation_config=compilation(settings),
                    **options,
                )
        self.core = self.llm.llm_engine.engine_core
        worker = self.llm.llm_engine.model_executor.driver_worker.worker
        self.runner, self.second_runner = worker.model_runner, bool(worker.use_v2_model_runner)
        self.seeds = seeds_for(settings.seeds, second_runner=self.second_runner, cuda=cuda)
        self.progress: Callable[[], None] = lambda: None
        self.llm.llm_engine.step = self.observed(self.llm.llm_engine.step)
        self.pages = KvPages(self.runner.kv_caches if settings.kv == "release" else [])
        self.check_alias()

    @property
    def how(self) -> str:
        return f"{'second' if self.second_runner else 'first'} model runner, a seed per {self.seeds}"

    def check_alias(self) -> None:
        """Raise EngineError if a parameter of vLLM is not where the trainer writes."""
        lost = outside(self.runner.get_model(), self.flat)
        if lost:
            raise EngineError(f"vLLM's parameters are not the trainer's, and would not follow an update: {lost[:3]}")

    def weights_changed(self) -> None:
        self.policy_version += 1

    @contextmanager
    def generate_phase(self) -> Iterator[None]:
        """Inside, the engine has its KV cache; outside, its pages are the trainer's."""
        self.check_alias()
        self.pages.restore()
        try:
            yield
        finally:
            self.quiesce()
            if self.pages.on_device:
                self.drop_prefixes()  # they go with their pages
            self.pages.release()

    def sample(self, requests: list[Request], sampling: Sampling) -> list[list[Completion]]:
        """As `Engine.sample`. With a seed per step it is made of all seeds in their order."""
        from vllm import SamplingParams  # pyright: ignore[reportAttributeAccessIssue] as above

        if sampling.temperature > 2:
            raise ValueError(
                f"--engine vllm samples at temperatures up to 2, got {sampling.temperature}; use --engine hf"
            )
        if self.cached_version != self.policy_version:
            self.drop_prefixes()
        prompts = [{"prompt_token_ids": r.prompt_ids} for r in requests for _ in r.seeds]
        params = [
            SamplingParams(
                n=1,
                seed=seed if self.seeds == "request" else None,
                max_tokens=sampling.max_new_tokens,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                top_k=0,
                logprobs=0,
                detokenize=False,
                stop_token_ids=list(self.eos_ids),
                ignore_eos=True,
                flat_logprobs=True,
            )
            for r in requests
            for seed in r.seeds
        ]
        seed = None if self.seeds == "request" else sampling_seed(*(seed for r in requests for seed in r.seeds))
        try:
            with generators_kept([self.flat.weights.device], seed):
                outputs = iter(self.llm.generate(prompts, params, use_tqdm=False))
            return [[self.completion(next(outputs)) for _ in r.seeds] for r in requests]
        except EngineError:
            raise
        except Exception as error:
            raise EngineError(f"vLLM failed while it sampled: {type(error).__name__}: {error}") from error

    def observed(self, step: Callable[[], list]) -> Callable[[], list]:
        """A step of the engine, which gives the completions that have ended; only those are progress."""

        def observed_step() -> list:
            ended = step()
            if ended:
                self.progress()
            return ended

        return observed_step

    def completion(self, output) -> Completion:
        (one,) = output.outputs
        ids = list(one.token_ids)
        if one.finish_reason not in ("stop", "length") or (ids and max(ids) >= self.num_tokens):
            raise EngineError(f"vLLM ended a completion by {one.finish_reason!r} with ids up to {max(ids, default=0)}")
        return Completion(token_ids=ids, rollout_logprobs=list(one.logprobs.logprobs), finish_reason=one.finish_reason)

    def drop_prefixes(self) -> None:
        """Forget what was computed with older weights. Raises EngineError in the middle of a generation."""
        if self.llm.llm_engine.has_unfinished_requests():
            raise EngineError("the weights changed under requests that are not finished")
        if not self.llm.reset_prefix_cache():
            raise EngineError("vLLM kept its prefix cache: blocks are still in use, and hold keys of older weights")
        self.cached_version = self.policy_version

    def quiesce(self) -> None:
        """Finish what asynchronous scheduling may have left behind after the last completion ended."""
        core = getattr(self.core, "engine_core", None)
        while getattr(core, "batch_queue", None):
            self.core.get_output()

    def close(self) -> None:
        self.pages.restore()  # a segment that is freed without its pages would be unmapped twice
        self.core.shutdown()


def compilation(settings: VllmConfig) -> dict:
    if settings.compile:
        return {}
    return {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY" if settings.cuda_graphs else "NONE"}


def refuse(config) -> None:
    """Raise ValueError for a model whose weights vLLM does not keep as they are."""
    text = config.get_text_config()
    for name, reason in UNSUPPORTED_CONFIG.items():
        if getattr(config, name, None) or getattr(text, name, None):
            raise ValueError(
                f"--engine vllm cannot share the weights of this model ({name}): {reason}; use --engine hf"
            )


def installed_version() -> str:
    """Raises ValueError where vLLM is missing, or of a version that this was not written for."""
    from importlib.metadata import PackageNotFoundError, version

    for package in ("vllm", "vllm-cpu"):
        try:
            found = version(package)
        except PackageNotFoundError:
            continue
        minor = tuple(int(part) for part in found.split(".")[:2])
        if not SUPPORTED[0] <= minor <= SUPPORTED[1]:
            low, high = (".".join(map(str, v)) for v in SUPPORTED)
            raise ValueError(
                f"--engine vllm works with vLLM {low} to {high}, but {found} is installed; use --engine hf"
            )
        return found
    raise ValueError("--engine vllm needs vLLM, which is not installed: pip install vllm, or use --engine hf")


@contextmanager
def process_state_kept() -> Iterator[None]:
    """vLLM reseeds every generator of the process and sets its threads and matmul precision; here they stay."""
    threads, set_threads = torch.get_num_threads(), torch.set_num_threads
    precision = torch.get_float32_matmul_precision()
    cudnn = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        with generators_kept():
            yield
    finally:
        torch.set_num_threads = set_threads  # on a CPU vLLM leaves a function that does nothing
        torch.set_num_threads(threads)
        torch.set_float32_matmul_precision(precision)
        torch.backends.cuda.enable_cudnn_sdp(cudnn)


def keep_process_group() -> None:
    """An engine that is closed or collected ends the default process group: it shall not where that is the trainer's.

    vLLM's own groups within it then stay for the next engine, and end with it.
    """
    from vllm.distributed import parallel_state

    parallel_state.destroy_distributed_environment = lambda: None

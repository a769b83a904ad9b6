"""What training, evaluation and profiling have in common: a model, problems, and what samples."""

from dataclasses import dataclass, field, replace
from typing import Literal, Self

from fastrl.base.setting import check_bounds, setting
from fastrl.data import pinned_data
from fastrl.data.task import TaskConfig
from fastrl.models.fetching import pinned_model
from fastrl.models.loading import EMBEDDED, Attention
from fastrl.settings.sections import EngineSection, SamplingSection


@dataclass(kw_only=True)
class JobConfig:
    """A model on problems."""

    # a model folder, owner/name[@revision], or `embedded`
    model: str = setting(EMBEDDED, known_as="model_name_or_path")
    # a data-set name, a file or folder of problems, or owner/name[:config][@revision] of the hub
    data: str = setting("gsm8k", known_as=("dataset", "dataset_name"))
    split: str = "train"  # of the data set: train or test
    limit: int = setting(0, "[0, 1e9]")  # use only the first problems; 0 = all
    # exact, math or file.py:function, each with an optional :weight; the data set's if none
    reward: tuple[str, ...] = setting((), known_as="reward_funcs")
    reward_workers: int = setting(2, "[1, 1024]", free=True)  # processes that grade
    # seconds that a call of a reward function of your own may take; 0 = no limit
    reward_timeout: float = setting(600.0, "[0, 1e6]", free=True)
    task: TaskConfig = field(default_factory=TaskConfig)

    device: str = "auto"  # auto, cpu, cuda or cuda:N
    dtype: Literal["auto", "float32", "bfloat16", "float64"] = "auto"  # of weights; auto: bfloat16 on a GPU
    attention: Attention = "sdpa"  # transformers' attn_implementation
    seed: int = setting(0, "[0, 4e9]")  # of sampling, of the order of problems and of the generators
    sampling: SamplingSection = field(default_factory=SamplingSection)
    engine: EngineSection = field(default_factory=EngineSection)

    def __post_init__(self):
        check_bounds(self)

    def pinned(self) -> Self:
        """With commits in place of branches of the hub, so that all that reads them reads the same, later as well.

        Asks the hub where it has to. Raises ValueError for a model and DataError for a data set that cannot be had.
        """
        data = pinned_data(self.data, self.task.data_dir)
        return replace(self, model=pinned_model(self.model), data=data)

"""Going on from a checkpoint: which one, whether it is this run's, and what is said of those that are passed over."""

from pathlib import Path

from fastrl import checkpoint
from fastrl.base import ranks
from fastrl.base.types import CheckpointError
from fastrl.run.identity import check_same
from fastrl.settings.run import TrainConfig, may_change
from fastrl.step.trainer import Trainer


def resume(trainer: Trainer, wanted: str, config: TrainConfig) -> None:
    """Continue from a checkpoint. `auto` takes the newest whole one and says which it had to pass over.

    Raises CheckpointError when there are some and none can be used, or the one that was named.
    """
    folder = config.run.folder / "checkpoints"
    if ranks.rank() == 0:
        checkpoint.tidy(folder, trainer.log.say)
    ranks.barrier()
    candidates = checkpoint.newest(folder) if wanted == "auto" else [Path(wanted)]
    if not candidates:
        trainer.log.say(f"resume: no checkpoint in {folder} yet, starting at step 0")
        trainer.log.rewind(-1)
        return
    rejected = 0
    for path in candidates:
        try:
            state, tensors = checkpoint.load(path, trainer.learner.shard_sizes())
        except CheckpointError as error:
            if wanted != "auto" or path == candidates[-1]:
                raise
            trainer.log.say(f"resume: WARNING: passing over {error}")
            rejected += 1
            continue
        go_on(trainer, config, path, state, tensors)
        if ranks.rank() == 0:
            checkpoint.set_aside(folder, trainer.completed)
        if rejected:
            trainer.log.metrics(trainer.completed, {"ckpt/rejected": float(rejected)})
        return


def go_on(trainer: Trainer, config: TrainConfig, path: Path, state: dict, tensors: dict) -> None:
    """Make the trainer what it was when that was written. Raises CheckpointError where it is another run's."""
    stored, identity = state.get("config"), state.get("identity")
    if not isinstance(stored, dict) or not isinstance(identity, dict):
        raise CheckpointError(f"{path}: state.json has no config or no identity; use one that is complete")
    allowed = may_change(config)
    check_same(stored, trainer.config, allowed, path)
    # what may change them has been asked about
    reencoded = {"prompts"} if prompts_follow(stored, identity, trainer) else set()
    check_same(identity, trainer.identity, allowed | reencoded, path)
    trainer.load_state_dict(state, tensors)
    trainer.last_checkpoint = path
    trainer.log.say(f"resume: step {trainer.completed} from {path}")
    then, now = len(list(path.glob("optim-rank*.safetensors"))), ranks.size()
    if then != now:
        trainer.log.say(f"resume: written by {then} ranks, and this run has {now}: sums are rounded in another order")


def prompts_follow(stored: dict, identity: dict, trainer: Trainer) -> bool:
    """Whether something else that has changed explains prompts that are encoded otherwise now."""
    causes = ("problems", "tokenizer")
    return stored.get("task") != trainer.config.get("task") or any(
        identity.get(name) != trainer.identity.get(name) for name in causes
    )

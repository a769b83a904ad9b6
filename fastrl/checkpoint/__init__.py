"""Checkpoints: directories of safetensors and JSON that are complete or not there.

    step-40/  config.json model.safetensors tokenizer...    a Hugging Face model folder
              optim-rank0.safetensors                       float32 master and optimizer state of one rank's shard
              rng-rank0.safetensors, .json                  generators of torch and the device; of Python and numpy
              state.json                                    step, positions, counters, identity, configuration
              MANIFEST.json                                 size and crc32 of every file, and of itself

Written to .tmp-step-40, synced to disk, renamed, and only then are old ones removed. A checkpoint is used when every
file of its manifest is there with the right size and checksum, and no other file; nothing is ever unpickled.
"""

from fastrl.checkpoint.files import VERSION, checksum, manifest_text, newest, step_of
from fastrl.checkpoint.generators import generators, generators_kept, restore_generators, seed_generators
from fastrl.checkpoint.reading import load
from fastrl.checkpoint.state_form import check_form
from fastrl.checkpoint.writing import remove_leftovers, save, set_aside, tidy

__all__ = [
    "VERSION",
    "check_form",
    "checksum",
    "generators",
    "generators_kept",
    "load",
    "manifest_text",
    "newest",
    "remove_leftovers",
    "restore_generators",
    "save",
    "seed_generators",
    "set_aside",
    "step_of",
    "tidy",
]

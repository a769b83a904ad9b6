"""Which segments torch's allocator has, and that it is told before it asks."""

import pytest

from fastrl.engine import opening
from fastrl.engine.opening import EngineSection
from fastrl.engine.segments import GROWING, set_segments
from fastrl.engine.vllm import VllmConfig
from support.programs import together


def section(engine="hf", kv="release"):
    return EngineSection(engine=engine, vllm=VllmConfig(kv=kv))


@pytest.fixture
def vllm(monkeypatch):
    monkeypatch.setattr(opening, "installed_version", lambda: "0.32.0")


@pytest.mark.parametrize(
    "engine, kv, grows",
    [
        ("hf", "release", True),
        ("vllm", "keep", True),
        ("vllm", "release", False),
        ("auto", "release", False),
        ("auto", "keep", True),
    ],
)
def test_they_grow_unless_vllm_sleeps(engine, kv, grows, vllm):
    environment: dict[str, str] = {}
    said = set_segments(section(engine, kv), "cuda:0", environment)
    assert environment == ({"PYTORCH_ALLOC_CONF": GROWING} if grows else {})
    assert said == f"allocator: {GROWING}" if grows else "vLLM's sleep mode" in said and "--vllm.kv keep" in said


def test_auto_without_vllm_does_not_sleep(monkeypatch):
    def missing():
        raise ValueError("vLLM is not installed")

    monkeypatch.setattr(opening, "installed_version", missing)
    environment: dict[str, str] = {}
    assert set_segments(section("auto"), "cuda:1", environment) and environment == {"PYTORCH_ALLOC_CONF": GROWING}


@pytest.mark.parametrize("name", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_what_the_user_has_set_stays(name):
    environment = {name: "max_split_size_mb:128"}
    assert set_segments(section(), "cuda:0", environment) == (
        f"allocator: {name}=max_split_size_mb:128, from the environment"
    )
    assert environment == {name: "max_split_size_mb:128"}


def test_a_cpu_has_no_such_allocator():
    environment: dict[str, str] = {}
    assert set_segments(section(), "cpu", environment) == "" and not environment


TOLD = """
import torch
from fastrl.engine.opening import EngineSection
from fastrl.engine.segments import GROWING, set_segments
set_segments(EngineSection(engine="hf"), "cuda:0")
assert torch._C._accelerator_getAllocatorSettings() == GROWING
"""


def test_torch_reads_it_after_its_import(tmp_path):
    together(tmp_path, TOLD, count=1)

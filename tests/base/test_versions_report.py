"""A report of versions leaves out what is missing, and raises nothing: a result is worth more than its report."""

import importlib.metadata
import stat

from fastrl.base.log import versions


def test_packages_and_the_commit_are_named():
    found = versions()
    assert {"python", "torch", "transformers", "tokenizers", "safetensors"} <= found.keys()
    assert found["python"].startswith("3.") and len(found.get("commit", "0" * 40)) == 40


def test_without_packages_and_without_git(monkeypatch, tmp_path):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", missing)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert versions().keys() == {"python", "torch"}


def test_a_git_that_fails_or_cannot_be_started(monkeypatch, tmp_path):
    git = tmp_path / "git"
    git.write_text("#!/bin/sh\necho nothing\nexit 128\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "commit" not in versions()  # it may not be executed
    git.chmod(git.stat().st_mode | stat.S_IXUSR)
    assert "commit" not in versions()

"""superfine.env: a complete description, null where something cannot be read, never a crash."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from superfine import env


def test_describes_python_packages_cpu_memory_and_native_modules():
    description = env.environment()
    assert description["python"]["version"] == ".".join(map(str, sys.version_info[:3]))
    assert description["packages"]["torch"] == torch.__version__ or torch.__version__.startswith(
        description["packages"]["torch"]
    )
    assert description["cpu"]["threads"] == torch.get_num_threads()
    assert description["cpu"]["isa"] in ("baseline", "avx2", "avx512")
    assert description["memory"]["total"] > 2**20
    assert description["native"]["_cpu"] == {"built": True, "usable": True}
    assert len(description["cuda"]["devices"]) == torch.cuda.device_count()


def test_is_json():
    description = env.environment()
    assert json.loads(json.dumps(description)) == description


def test_says_why_the_cuda_module_is_not_usable_without_a_gpu():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    module = env.environment()["native"]["_cuda"]
    assert module["usable"] is False
    assert module["reason"]


def test_what_cannot_be_read_is_none_and_does_not_raise(monkeypatch):
    def refuse(*args, **kwargs):
        raise PermissionError("not here")

    for name in ("read_text", "glob"):
        monkeypatch.setattr(Path, name, refuse)
    monkeypatch.setattr(subprocess, "run", refuse)
    monkeypatch.setattr(env.os, "cpu_count", lambda: None)
    monkeypatch.setattr(env.importlib.metadata, "version", refuse)
    monkeypatch.setattr(torch, "get_num_threads", refuse)
    monkeypatch.setattr(torch.cuda, "device_count", refuse)
    description = env.environment()
    assert description["packages"]["torch"] is None
    assert description["cpu"]["caches"] is None
    assert description["cpu"]["threads"] is None
    assert description["cuda"]["driver"] is None
    assert description["cuda"]["devices"] is None
    assert description["git"] is None
    assert description["memory"]["available"] is None
    json.dumps(description)


def test_a_native_module_that_does_not_load_is_reported_with_the_loaders_words(monkeypatch):
    def broken(name):
        raise ImportError("libstdc++.so.6: version not found")

    monkeypatch.setattr(env.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(env.importlib, "import_module", broken)
    module = env.environment()["native"]["_cuda"]
    assert module["usable"] is False
    assert "version not found" in module["reason"]


def test_a_copy_inside_another_projects_checkout_has_no_commit(tmp_path, monkeypatch):
    run = ["git", "-c", "user.name=a", "-c", "user.email=a@example.org"]
    try:
        subprocess.run([*run, "init", "-q"], cwd=tmp_path, check=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("git is not installed")
    (tmp_path / "other.txt").write_text("another project")
    subprocess.run([*run, "add", "."], cwd=tmp_path, check=True)
    subprocess.run([*run, "commit", "-qm", "first"], cwd=tmp_path, check=True)
    installed = tmp_path / "site-packages" / "env.py"
    installed.parent.mkdir()
    installed.write_text("")
    monkeypatch.setattr(env, "__file__", str(installed))
    assert env.environment()["git"] is None
    monkeypatch.setattr(env, "__file__", str(tmp_path / "other.txt"))
    git = env.environment()["git"]
    assert len(git["commit"]) == 40
    assert git["modified"] is False


def test_prints_every_section_and_readable_sizes():
    output = io.StringIO()
    env.print_environment(Console(file=output, width=120))
    text = output.getvalue()
    assert all(section in text for section in ("python", "packages", "cpu", "memory", "cuda", "native"))
    assert "GiB" in text
    assert torch.__version__.split("+")[0] in text


def test_flat_environment_shows_lists_of_devices_item_by_item():
    flat = env.flat_environment({"cuda": {"driver": None, "devices": [{"name": "A", "memory": 2**33}]}})
    assert flat == {"cuda": [("driver", "unknown"), ("devices[0].name", "A"), ("devices[0].memory", "8 GiB")]}

"""What the project says about itself is true: README, CI, environment, docs, known models, public names."""

from __future__ import annotations

import doctest
import hashlib
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import aprlab
from aprlab import paths
from aprlab.errors import UsageError
from aprlab.formats import open_model
from aprlab.model import names
from aprlab.published import known_model, known_models

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def name_of(requirement: str) -> str:
    found = re.match(r"[A-Za-z0-9_.-]+", requirement)
    assert found
    return found.group().lower()


# -- README, CI, environment -----------------------------------------------------------------------------------------


def test_ci_runs_the_readmes_test_line_word_for_word() -> None:
    lines = [line for line in README.splitlines() if line.startswith("python3 -m venv")]
    assert len(lines) == 2, "one line for the main job, one for the tests"
    assert lines[0].endswith("aprlab investigate")
    ci = (ROOT / ".ci/run").read_text()
    assert lines[1] in ci.splitlines()
    assert (ROOT / ".ci/run").stat().st_mode & 0o111
    subprocess.run(["bash", "-n", ROOT / ".ci/run"], check=True)


def test_the_readme_knows_every_verb_and_links_lead_somewhere() -> None:
    from aprlab.cli.verbs import GROUPS, VERBS

    section = README.split("## Commands\n")[1].split("\n## ")[0]
    assert "](docs/commands.md)" in section
    lines = [line for line in section.splitlines() if line.startswith("aprlab ")]
    assert len(lines) == 5, "five lines and a link"
    for verb in VERBS:
        if not verb.within and verb.panel != "machine room":
            assert re.search(rf"\b{verb.name}\b", "\n".join(lines)), verb.name
    commands = (ROOT / "docs/commands.md").read_text()
    for name in [*(verb.path for verb in VERBS), *(group.name for group in GROUPS)]:
        assert f"`aprlab {name}" in commands, name
    for page in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            assert target.startswith("http") or (page.parent / target).exists(), f"{page.name}: {target}"


def test_command_lines_in_the_readme_exist() -> None:
    import typer

    from aprlab.cli.app import app_of

    commands = typer.main.get_command(app_of()).commands  # type: ignore[attr-defined]
    blocks = "".join(re.findall(r"```sh\n(.*?)```", README, re.DOTALL))
    lines = [line for line in blocks.splitlines() if line.startswith("aprlab ")]
    lines += [part for part in re.findall(r"`(?:\.venv/bin/)?(aprlab [^`]+)`", README) if part.split()[1] != "VERB"]
    assert len(lines) >= 8
    for line in lines:
        words = line.split("#")[0].split("aprlab ")[1].split(" -- ")[0].split()
        if words[0].startswith("-"):
            words = ["", *words]
        parameters = commands[words[0]].params if words[0] else typer.main.get_command(app_of()).params
        known = {option for parameter in parameters for option in parameter.opts} | {"--help"}
        assert {word for word in words if word.startswith("--")} <= known, line


def test_the_environment_is_thin_and_reaches_the_eight_packages() -> None:
    text = (ROOT / "environment.yml").read_text()
    lines = [line.strip("- ") for line in text.split("dependencies:")[1].splitlines() if line.strip()]
    assert lines[:3] == ["python >=3.11", "pip", "pip:"]
    (project,) = lines[3:]
    extras = re.fullmatch(r"-?e? ?\.\[([\w,]+)\]", project.removeprefix("-e "))
    assert extras, project
    assert PROJECT["requires-python"] == ">=3.11"
    reached = {name_of(requirement) for requirement in PROJECT["dependencies"]}
    for extra in extras.group(1).split(","):
        reached |= {name_of(requirement) for requirement in PROJECT["optional-dependencies"][extra]}
    eight = {"jupyterlab", "numpy", "cupy-cuda12x", "gguf", "matplotlib", "ipywidgets", "papermill", "nbval"}
    assert eight <= reached


def test_the_docs_examples_run() -> None:
    result = doctest.testfile(str(ROOT / "docs/python.md"), module_relative=False, optionflags=doctest.ELLIPSIS)
    assert result.failed == 0
    assert result.attempted >= 25


# -- the public surface ----------------------------------------------------------------------------------------------


def test_import_is_light_and_every_public_name_is_there() -> None:
    code = "import sys, aprlab; print([m for m in ('numpy', 'gguf', 'matplotlib', 'typer') if m in sys.modules], dir(aprlab))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("[] ")
    for name in aprlab.__all__:
        assert getattr(aprlab, name) is not None
        assert f"'{name}'" in done.stdout
    assert set(aprlab.__all__) == set(aprlab._PUBLIC)
    with pytest.raises(AttributeError, match="convertt"):
        aprlab.convertt  # noqa: B018


def test_public_verbs_are_functions_and_no_module_can_be_called() -> None:
    lines = ["import sys, types, aprlab", "verbs = {name: getattr(aprlab, name) for name in aprlab.__all__}"]
    lines += ["assert not any(isinstance(verb, types.ModuleType) for verb in verbs.values())"]
    lines += ["assert not any(callable(m) for n, m in sys.modules.items() if n.split('.')[0] == 'aprlab')"]
    subprocess.run([sys.executable, "-c", "\n".join(lines)], check=True)


# -- known models ----------------------------------------------------------------------------------------------------


def test_known_models_obey_the_arithmetic_of_the_inventory() -> None:
    models = known_models()
    assert [name.removeprefix("qwen2.5-coder-") for name in models] == ["0.5b", "1.5b", "3b", "7b", "14b"]
    for model in models.values():
        config, tensors = model.config, model.tensors
        assert config["embedding_length"] % config["head_count"] == 0
        assert config["head_count"] % config["head_count_kv"] == 0
        whole = list(names.inventory(config["block_count"], separate_output=tensors.get("output", True)))
        floats = [name for name in whole if name.endswith(("norm.weight", ".bias"))]
        assert tensors["float"] == len(floats)
        if "quantised" in tensors:
            assert tensors["quantised"] == len(whole) - len(floats)
        if "by_type" in tensors:
            assert sum(tensors["by_type"].values()) == len(whole)
            assert tensors["by_type"]["F32"] == len(floats)
    with pytest.raises(UsageError, match=r"unknown model 'gpt'; known: qwen2\.5-coder-0\.5b"):
        known_model("gpt")


@pytest.mark.real
@pytest.mark.parametrize("name", ["qwen2.5-coder-0.5b", "qwen2.5-coder-1.5b"])
def test_known_models_are_as_the_table_says(name: str) -> None:
    known = known_model(name)
    path = paths.models_dir() / known.file
    if not path.is_file():
        pytest.skip(f"{known.file} is not in {paths.models_dir()}")
    assert path.stat().st_size == known.bytes
    with open(path, "rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == known.sha256
    with open_model(path) as model:
        assert model.by_type() == known.tensors["by_type"]
        assert model.quantised == known.tensors["quantised"]
        assert ("output.weight" in model.tensors) == known.tensors["output"]
        for key, value in known.config.items():
            if key != "tied_embeddings":  # the published config ties them, the file has an output.weight of its own
                assert getattr(model.config, key) == pytest.approx(value), key

"""The registry: every verb is made the same way, and what it forbids is refused."""

from __future__ import annotations

import ast
import os
import shlex
import shutil
from pathlib import Path
from typing import Annotated, Any

import pytest
import typer
from pages import page_script

import aprlab
from aprlab import paths
from aprlab.cli import options, registry
from aprlab.cli.app import app_of, run_cli
from aprlab.cli.registry import PANELS, Debugging, OptionGroup, Verb, build, command_of, group, reset
from aprlab.cli.verbs import GROUPS, VERBS
from aprlab.errors import UsageError
from aprlab.faults import convert_with
from aprlab.kernels.cuda.compile import shipped_ptx

ROOT = Path(__file__).resolve().parents[2]
CLI = ROOT / "aprlab/cli"
BY_PATH = {verb.path: verb for verb in VERBS}


def command(path: str) -> Any:
    found: Any = typer.main.get_command(app_of())
    for name in path.split():
        found = found.commands[name]
    return found


# -- one table, one way -------------------------------------------------------------------------------------------------


def test_the_command_is_the_table_and_nothing_else() -> None:
    root: Any = typer.main.get_command(app_of())
    found = {
        path
        for name, each in root.commands.items()
        for path in ([f"{name} {inner}" for inner in each.commands] if hasattr(each, "commands") else [name])
    }
    aliases = {verb.alias for verb in VERBS if verb.alias}
    assert found == set(BY_PATH) | aliases
    assert len(BY_PATH) == len(VERBS)
    assert {each.name for each in GROUPS} == {verb.within for verb in VERBS if verb.within}
    assert all(root.commands[alias].hidden for alias in aliases)


def test_the_help_has_all_panels_in_order(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(["--help"]) == 0
    text = capsys.readouterr().out
    places = [text.index(f"─ {panel} ─") for panel in PANELS]
    assert places == sorted(places)
    for verb in VERBS:
        if not verb.within:
            assert f"\n│ {verb.name} " in text, verb.name
    assert "voices" not in text


@pytest.mark.parametrize("path", sorted(BY_PATH))
def test_debug_works_before_and_after_every_verb(path: str) -> None:
    root: Any = typer.main.get_command(app_of())
    example = shlex.split(BY_PATH[path].example)[len(path.split()) :]
    for args in (["--debug", *path.split(), *example], [*path.split(), *example, "--debug"]):
        reset()
        assert not Debugging.on
        context: Any = root.make_context("aprlab", list(args))
        rest = [*context._protected_args, *context.args]
        inner = root
        for name in path.split():
            inner = inner.commands[name]
            context = inner.make_context(name, rest[1:], parent=context)
            rest = [*getattr(context, "_protected_args", []), *context.args]
        assert Debugging.on, args
    reset()


def test_debug_works_between_a_group_and_its_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for line in ("--debug ptx entries x.ptx", "ptx --debug entries x.ptx", "ptx entries x.ptx --debug"):
        assert run_cli(line.split()) == 2
        assert capsys.readouterr().err.startswith("Traceback")
    assert run_cli(["ptx", "entries", "x.ptx"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1, "one command line's --debug is not the next one's"


WITH_ENGINE = [verb.path for verb in VERBS if any("engine" in name for each in verb.groups for name in each.gives)]


def test_every_verb_that_runs_a_model_is_known() -> None:
    assert WITH_ENGINE == [
        "run", "chat", "peel", "repair", "forensics", "signatures", "gates", "verify", "check", "qualify", "investigate",
        "case new",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["--engine", "-e", "--backend", "-b"])
@pytest.mark.parametrize("path", WITH_ENGINE)
def test_an_engine_by_any_of_its_names(path: str, name: str, tiny: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = [word if not word.endswith((".gguf", ".apr")) else str(tiny) for word in shlex.split(BY_PATH[path].example)]
    args = [word for word in args if word != "jit"] if "--engine" not in args else args[: args.index("--engine")]
    assert run_cli([*args, name, "abacus"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("aprlab: unknown engine 'abacus'; known: reference")


@pytest.mark.parametrize("path", WITH_ENGINE)
def test_the_old_name_is_not_shown_and_goes_with_no_other(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli([*path.split(), "--help"]) == 0
    text = capsys.readouterr().out
    assert "--engine" in text
    assert "backend" not in text
    with pytest.raises(UsageError) as error:
        options.ENGINE.collect(engine="jit", backend="jit")
    assert error.value.code == "cli.engine-twice"


# -- what the registry refuses ------------------------------------------------------------------------------------------


@group("left", "right")
def SIDES(
    left: Annotated[str | None, typer.Option("--left")] = None, right: Annotated[str | None, typer.Option("--right")] = None
) -> dict[str, Any]:
    return {"left": left, "right": right}


def verb(run: Any, *groups: OptionGroup, panel: str = "look", within: str = "") -> Verb:
    return Verb("sample", panel, run, "sample", groups, within=within)


def test_a_verb_gets_its_own_options_and_its_groups(capsys: pytest.CaptureFixture[str]) -> None:
    got: list[Any] = []

    def sample(file: Annotated[str, typer.Argument()], left: str = "west", right: str | None = None) -> int:
        got.append((file, left, right))
        return 7

    sample.__annotations__ = {"file": Annotated[str, typer.Argument()], "left": str, "right": str}
    small = typer.Typer()
    build(small, (), (verb(sample, SIDES),))
    assert small(["x"], standalone_mode=False) == 7
    assert small(["x", "--left", "l", "--right", "r"], standalone_mode=False) == 7
    assert got == [("x", "west", None), ("x", "l", "r")]
    small(["--help"], standalone_mode=False)
    assert "west" in capsys.readouterr().out, "the verb's own default is shown"


@pytest.mark.parametrize(
    ("groups", "panel", "message"),
    [((), "look", "left is an option"), ((SIDES,), "look", "right would be shown"), ((SIDES,), "attic", "attic")],
)
def test_what_is_not_declared_or_would_be_ignored_is_refused(groups: tuple[OptionGroup, ...], panel: str, message: str) -> None:
    def one_side(left: str = "") -> None: ...

    def both_sides(left: str = "", right: str = "") -> None: ...

    with pytest.raises(AssertionError, match=message):
        command_of(verb(both_sides if panel == "attic" else one_side, *groups, panel=panel))


@pytest.mark.parametrize(
    "words",
    [
        ["a.gguf"], ["a.gguf", "--text", "naïve", "--number", "3"], ["a.gguf", "--more", "1", "--more", "2", "--flag"], [],
        ["bad\udcff.gguf"], ["closed.gguf"], ["a.gguf", "--number", "x"], ["a.gguf", "--scale", "2.5"], ["."],
        ["a.gguf", "--text", ""],
    ],
)  # fmt: skip
def test_plain_words_are_what_typer_would_make_of_them(
    words: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "closed.gguf").touch()
    access = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != "closed.gguf" and access(path, mode))  # root reads all
    got: list[Any] = []

    def sample(
        file: Annotated[Path, typer.Argument()],
        text: Annotated[str, typer.Option()] = "usual",
        number: Annotated[int | None, typer.Option(min=1)] = None,
        scale: Annotated[float, typer.Option(min=0.0)] = 1.0,
        more: Annotated[list[str] | None, typer.Option()] = None,
        flag: Annotated[bool, typer.Option("--flag")] = False,
    ) -> None:
        got.append([file, text, number, scale, more, flag])

    ends = []
    for cls in (registry.PlainCommand, typer.core.TyperCommand):
        small = typer.Typer()
        small.command(cls=cls)(sample)
        try:
            ends.append(small(list(words), standalone_mode=False))
        except Exception as error:
            ends.append((type(error), str(error)))
    assert ends[0] == ends[1]
    assert got == [] if ends[0] else got[0] == got[1]
    assert [type(value) for values in got for value in values[:4]] == 2 * [type(value) for value in (got or [[]])[0][:4]]


def prints(source: str) -> list[int]:
    """Lines that write to a stream by themselves."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    words = {call.lineno: ast.unparse(call.func) for call in calls}
    ways = ("print", "typer.echo", "typer.secho", "sys.stdout.write", "sys.stderr.write", "console.print", "json.dumps")
    return [line for line, name in words.items() if name in ways]


def test_only_the_output_module_prints() -> None:
    for path in sorted(CLI.glob("*.py")):
        found = prints(path.read_text(encoding="utf-8"))
        assert bool(found) == (path.name == "output.py"), f"{path.name}: {found}"
    assert prints("x = 1\nif x:\n    typer.echo(x)\n    print(x)") == [3, 4]


def test_every_error_of_the_command_line_has_a_code() -> None:
    for path in sorted(CLI.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call) and ast.unparse(node.exc.func).endswith("Error"):
                codes = [word.value.value for word in node.exc.keywords if word.arg == "code"]  # type: ignore[attr-defined]
                assert codes, f"{path.name}:{node.lineno}"
                assert codes[0].startswith("cli.")


def test_the_files_of_the_command_line_are_short() -> None:
    for path in CLI.glob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) < 600
    assert registry.__doc__


# -- the generated pages ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("generator", "page"), [("commands", "commands.md"), ("python_page", "python.md")])
def test_the_generated_pages_are_current(generator: str, page: str) -> None:
    written = (ROOT / "docs" / page).read_text(encoding="utf-8")
    assert written == page_script(generator).markdown(), f"run: python docs/make/{generator}.py"


def test_the_page_of_commands_has_every_verb_and_every_option() -> None:
    text = (ROOT / "docs/commands.md").read_text(encoding="utf-8")
    for verb in VERBS:
        part = text.split(f"\n### aprlab {verb.path}\n")[1].split("\n### ")[0]
        assert f"aprlab {verb.example}" in part
        for parameter in command(verb.path).params:
            shown = not getattr(parameter, "hidden", False) and parameter.name != "debug"
            for name in [n for n in parameter.opts if n.startswith("--")]:
                assert (f"`{name}" in part) == shown, (verb.path, name)
        for status in verb.exits:
            assert f"{status}: " in part


# -- the examples -------------------------------------------------------------------------------------------------------

# They need the network, a GPU, a browser's server, a terminal, another machine's minutes or notebooks: tests of their rooms
# run these verbs. Their words are still parsed, above.
ELSEWHERE = {"fetch", "lab", "gpu verify", "gpu compile", "qualify", "investigate", "sweep", "signatures", "synth", "chat"}
ELSEWHERE |= {"verify"}  # reads two thousand tokens: tests/qualification/test_certificate.py
STATUS = {"selftest": 1, "peel": 3, "check": 0}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the files that the examples name."""
    folder = tmp_path_factory.mktemp("examples")
    shutil.copy(paths.embedded_model(), folder / "model.gguf")
    convert_with(folder / "model.gguf", folder / "model.apr", [])
    convert_with(folder / "model.gguf", folder / "broken.apr", ["GH-190"])
    for name in ("ours", "jit"):
        aprlab.trace(aprlab.open_model(folder / "model.gguf"), [9, 5], "logits").save(folder / f"{name}.npz")
    (folder / "kernels.ptx").write_text(shipped_ptx("dequantise"))
    return folder


@pytest.mark.parametrize("path", sorted(set(BY_PATH) - ELSEWHERE))
def test_the_example_of_each_verb_works(path: str, bench: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(bench)
    assert run_cli(shlex.split(BY_PATH[path].example)) == STATUS.get(path, 0), capsys.readouterr()
    assert capsys.readouterr().out

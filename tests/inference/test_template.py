"""Chat templates: honest ones render as Hugging Face renders them, hostile ones end in an error, soon."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from builders import TEMPLATE

from aprlab.errors import FormatError, UsageError
from aprlab.inference import template as module
from aprlab.inference.template import render

USER = [{"role": "user", "content": "Hi <&> ü"}]


def test_chatml() -> None:
    assert render(TEMPLATE, USER) == "<|im_start|>user\nHi <&> ü<|im_end|>\n<|im_start|>assistant\n"
    assert render(TEMPLATE, USER, add_generation_prompt=False) == "<|im_start|>user\nHi <&> ü<|im_end|>\n"


def test_what_hugging_face_lends_to_templates() -> None:
    """Blocks take their line with them, loops can be left, tojson leaves HTML and Unicode alone."""
    assert (
        render("{% for m in messages %}\n  {% if m.role == 'user' %}\n{{ m.content }}\n  {% endif %}\n{% endfor %}", USER)
        == "Hi <&> ü\n"
    )
    assert render("{% for i in range(9) %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}", USER) == "012"
    assert render("{{ messages | tojson }}", USER) == '[{"role": "user", "content": "Hi <&> ü"}]'
    assert render("{{ tools | tojson(indent=1) }}", USER, tools=[1]) == "[\n 1\n]"
    assert len(render("{{ strftime_now('%Y') }}", USER)) == 4
    assert render("{{ bos_token }}{{ nothing }}", USER, bos_token="<s>") == "<s>"


def test_the_templates_own_refusal_is_the_users_error() -> None:
    with pytest.raises(UsageError, match="roles must alternate"):
        render("{{ raise_exception('roles must alternate') }}", USER)
    with pytest.raises(UsageError, match="JSON"):
        render(TEMPLATE, [{"role": "user", "content": object()}])


ATTRIBUTES = {
    "class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ cycler.__init__.__globals__.os.popen('touch ' ~ mark).read() }}",
    "lipsum": "{{ lipsum.__globals__['os'].system('touch ' ~ mark) }}",
    "function": "{{ raise_exception.__globals__.os.listdir() }}",
    "format": "{{ '{0.__class__.__init__.__globals__}'.format(messages) }}",
    "format_map": "{{ '{x.__class__.__init__.__globals__}'.format_map({'x': messages}) }}",
    "attr filter": "{{ (''|attr('__class__'))[0] }}",
    "environment": "{{ self._TemplateReference__context.environment }}",
    "mutate": "{{ messages.append(1) }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}",
    "syntax": "{% for %}",
    "undefined": "{{ no.such.thing }}",
    "tojson": "{{ raise_exception | tojson }}",
}
GREED = {
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "range": "{{ range(10**9) }}",
    "repeat": "{{ 'a' * 10**10 }}",
    "list": "{{ [[0]] * 10**9 }}",
    "pad": "{{ 'a'.ljust(9 * 10**8) }}",
    "percent": "{{ '%1000000000d' % 1 }}",
    "doubling text": "{% set n = namespace(x='aa') %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}",
    "doubling list": "{% set n = namespace(x=[1]) %}{% for i in range(99) %}{% set n.x = n.x + n.x %}{% endfor %}",
    "output": "{% for a in range(99999) %}{% for b in range(99999) %}aaaaaaaa{% endfor %}{% endfor %}",
    "nested macro calls": "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(40) }}",
}
ENDLESS = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in 'abc' %}{% endfor %}{% endfor %}{% endfor %}",
    "power": "{{ (7 ** (10 ** 9)) % 3 }}",  # one C call that nothing in Python could interrupt
}


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_no_way_out_of_the_sandbox(name: str, tmp_path: Path) -> None:
    mark = tmp_path / "pwned"
    with pytest.raises(FormatError, match="chat template fails"):
        render(ATTRIBUTES[name], USER, mark=str(mark))
    assert not mark.exists()


@pytest.mark.parametrize("name", [*GREED, *ENDLESS])
def test_greed_ends_in_an_error(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds of CPU, megabytes of memory, characters of output: whichever runs out first."""
    monkeypatch.setattr(module, "SECONDS", 1)
    monkeypatch.setattr(module, "MEMORY", 256 << 20)
    started = time.process_time()
    with pytest.raises(FormatError, match="chat template"):
        render({**GREED, **ENDLESS}[name], USER)
    assert time.process_time() - started < 1  # none of it was this process's work


def test_a_template_that_sleeps_is_cut_off(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """CPU time is the kernel's to count; a renderer that only waits is ended by the clock."""
    sleeper = tmp_path / "sleeper.py"
    sleeper.write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setattr(module, "_CHILD", sleeper)
    monkeypatch.setattr(module, "SECONDS", 0.1)
    with pytest.raises(FormatError, match="does not come to an end"):
        render("sleep", USER)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("raise SystemExit(3)", "exit status 3"),
        ("print('not json')", "breaks its renderer"),
        ("print('{}')", "breaks its renderer"),
        ("import os; os.kill(os.getpid(), 11)", "exit status -11"),
    ],
)
def test_a_renderer_that_breaks(code: str, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    child = tmp_path / "child.py"
    child.write_text(code)
    monkeypatch.setattr(module, "_CHILD", child)
    with pytest.raises(FormatError, match=message):
        render(f"broken {code}", USER)


def test_equal_requests_start_one_child(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    ask = module._ask
    monkeypatch.setattr(module, "_ask", lambda request: calls.append(1) or ask(request))
    text = "{{ messages[0].content }} once"
    assert [render(text, USER), render(text, USER), render(text, [{"role": "user", "content": "B"}])] == [
        "Hi <&> ü once",
        "Hi <&> ü once",
        "B once",
    ]
    assert len(calls) == 2
    for _ in range(2):
        with pytest.raises(FormatError, match="chat template fails"):
            render("{% if once %}", USER)
    assert len(calls) == 3, "a template that fails has failed"


def test_the_child_sees_no_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SECRET_OF_THE_PARENT", "x")
    spy = tmp_path / "spy.py"
    spy.write_text("import json, os\nprint(json.dumps({'text': str(sorted(os.environ))}))\n")
    monkeypatch.setattr(module, "_CHILD", spy)
    assert "SECRET" not in render("environment", USER)

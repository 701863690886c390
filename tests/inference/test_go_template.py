"""Go's templates: the language by small examples, Ollama's way with messages, and what a hostile one meets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from aprlab.errors import FormatError
from aprlab.formats import open_model
from aprlab.inference.go_template import execute, fields_of, parse
from aprlab.inference.ollama import ollama_prompt
from aprlab.inference.template import render

DATA: dict[str, Any] = {"A": "x", "N": 3, "L": [{"R": "u", "C": "1"}, {"R": "a", "C": "2"}], "E": [], "T": True}

# What Go's text/template writes for these, by its documentation.
RIGHT = {
    "a{{ .A }}b": "axb",
    "a {{- .A -}} b": "axb",
    "a {{ .A }} b": "a x b",
    "{{/* {{ nothing }} */}}y": "y",
    '{{ "{{" }}': "{{",
    '{{ "}}" }}{{ `\\n` }}{{ "\\n" }}': "}}\\n\n",
    "{{ if .A }}1{{ else }}2{{ end }}": "1",
    "{{ if .Z }}1{{ else if .T }}2{{ else }}3{{ end }}": "2",
    "{{ if not .E }}empty{{ end }}": "empty",
    "{{ range .L }}{{ .R }}{{ .C }} {{ end }}": "u1 a2 ",
    "{{ range $i, $m := .L }}{{ $i }}{{ $m.R }}{{ $.A }}{{ end }}": "0ux1ax",
    "{{ range $m := .L }}{{ $m.C }}{{ end }}": "12",
    "{{ range .E }}x{{ else }}none{{ end }}": "none",
    "{{ range $i, $_ := .L }}{{ if eq $i 1 }}{{ break }}{{ end }}{{ $i }}{{ end }}": "0",
    "{{ range $i, $_ := .L }}{{ if eq $i 0 }}{{ continue }}{{ end }}{{ $i }}{{ end }}": "1",
    "{{ with .A }}{{ . }}{{ end }}": "x",
    "{{ with .Z }}{{ . }}{{ else }}no{{ end }}": "no",
    "{{ len .L }}{{ len .A }}": "21",
    "{{ (index .L 1).C }}{{ index .L 0 | len }}": "22",
    "{{ len (slice .L 1) }}{{ eq (len (slice $.L 1)) 1 }}": "1true",
    '{{ and .A .T }}{{ or .Z "d" }}': "trued",
    '{{ eq .A "y" "x" }}{{ ne .N 3 }}{{ lt .N 4 }}{{ ge .N 4 }}': "truefalsetruefalse",
    '{{ $v := 1 }}{{ range .L }}{{ $v = 2 }}{{ end }}{{ $v }}': "2",
    '{{ $v := 1 }}{{ if .T }}{{ $v := 2 }}{{ end }}{{ $v }}': "1",
    '{{ printf "%s-%d-%q" .A .N .A }}{{ print .A .N }}': 'x-3-"x"x3',
    "{{ json .L }}": '[{"R":"u","C":"1"},{"R":"a","C":"2"}]',
    "{{ .A | len | printf \"%d\" }}": "1",
}  # fmt: skip


@pytest.mark.parametrize("template", RIGHT)
def test_the_language(template: str) -> None:
    assert execute(parse(template), DATA) == RIGHT[template]


@pytest.mark.parametrize("template", [
    "{{ if .A }}", "{{ end }}", "{{ .A", "{{ nothing .A }}", "{{ define \"x\" }}{{ end }}", "{{ template \"x\" }}",
    "{{ .A.B.C | }}", "{{ ( .A }}", "{{ }}", "{{ $v }}", "{{ $v = 1 }}", "{{ index .L 9 }}", "{{ slice .L 5 }}", "{{ len .T }}",
    "{{ lt .A 1 }}", "{{ range .T }}{{ end }}", "{{ .N.X }}", "{{ break }}", "{{ if .A }}{{ else for }}{{ end }}", "{{ \x00 }}",
    "{{ printf \"%x\" .A }}", "{{ eq }}", "{{ .A .N }}",
    "{{ range 1000000 }}{{ range 1000000 }}x{{ end }}{{ end }}", "{{ if .A }}" * 500 + "{{ end }}" * 500,
    "{{ " + "(" * 500 + ")" * 500 + " }}",
])  # fmt: skip
def test_what_is_broken_or_hostile_is_refused_in_one_line(template: str) -> None:
    with pytest.raises(FormatError) as found:
        execute(parse(template), DATA)
    assert found.value.code == "template.go" and "\n" not in found.value.message


def test_a_flood_is_cut_off() -> None:
    with pytest.raises(FormatError, match="characters"):
        execute(parse("{{ range 100 }}" + "x" * 20_000 + "{{ end }}"), {})


def test_fields_are_found_wherever_they_stand() -> None:
    assert fields_of(parse("{{ if and .A (eq $m.B 1) }}{{ range .C }}{{ else }}{{ (index .D 0).E }}{{ end }}{{ end }}")) == {
        "A", "m", "B", "C", "D", "E"
    }  # fmt: skip


BEGIN, END = "<|im_start|>", "<|im_end|>"
PLAIN = (
    "{{ if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n{{ end }}"
    '{{ range .Messages }}{{ if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n<|im_start|>assistant\n'
    '{{ else if eq .Role "assistant" }}{{ .Content }}<|im_end|>\n{{ end }}{{ end }}'
)
OLD = (
    "{{ if .System }}<|im_start|>system\n{{ .System }}<|im_end|>\n{{ end }}{{ if .Prompt }}<|im_start|>user\n{{ .Prompt }}"
    "<|im_end|>\n{{ end }}<|im_start|>assistant\n{{ .Response }}<|im_end|>\n"
)
CALL = [
    {"role": "system", "content": "S"}, {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
]  # fmt: skip


@pytest.mark.parametrize("template", [PLAIN, OLD], ids=["messages", "prompt and response"])
@pytest.mark.parametrize("turns", [2, 4])
def test_a_right_template_makes_the_prompt_of_the_files_own(tiny: Path, template: str, turns: int) -> None:
    with open_model(tiny) as model:
        right = render(model.tokenizer.chat_template or "", CALL[:turns])
    assert ollama_prompt(template, CALL[:turns]) == right


def test_neighbours_of_one_role_are_joined_and_a_response_is_added_where_none_is_asked_for() -> None:
    twice = [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]
    assert ollama_prompt("[{{ .Prompt }}]", twice) == "[a\n\nb]"
    more = [*twice, {"role": "assistant", "content": "r"}, {"role": "user", "content": "c"}]
    assert ollama_prompt("[{{ .Prompt }}]", more) == "[a\n\nb]r[c]"

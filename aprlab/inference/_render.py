"""Renders one chat template; run as a script in a process of its own, see `template.py`.

Imports nothing of aprlab. stdin: JSON ``{"path": [...], "template": str, "variables": {...}, "seconds", "memory",
"characters"}``; stdout: JSON ``{"text": str}`` or ``{"error": kind, "message": str}``.
"""

import json
import os
import resource
import sys


def main() -> None:
    if sys.platform == "linux":  # to end with the parent, even when that is killed (`aprlab.paths.leave_with_parent`)
        import ctypes

        ctypes.CDLL(None).prctl(1, 9, 0, 0, 0)
    request = json.load(sys.stdin)
    if os.getppid() != request["parent"]:
        return
    sys.path[:] = request["path"]
    from datetime import datetime

    from jinja2 import TemplateError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Refusal(Exception):
        """The template's own `raise_exception`."""

    def raise_exception(message: object) -> None:
        raise Refusal(str(message))

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):  # type: ignore[no-untyped-def]
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    # as Hugging Face sets it up for chat templates
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda format: datetime.now().strftime(format)

    # The sandbox guards attributes, not time and memory: from here on the kernel does.
    resource.setrlimit(resource.RLIMIT_CPU, (request["seconds"], request["seconds"]))
    if sys.platform != "darwin":  # which knows no such limit; time and output are bounded there anyway
        resource.setrlimit(resource.RLIMIT_AS, (request["memory"], request["memory"]))
    resource.setrlimit(resource.RLIMIT_FSIZE, (4 * request["characters"] + 4096,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))

    pieces, size = [], 0
    try:
        for piece in environment.from_string(request["template"]).generate(**request["variables"]):
            pieces.append(piece)
            size += len(piece)
            if size > request["characters"]:
                answer = {"error": "size", "message": f"more than {request['characters']} characters"}
                break
        else:
            answer = {"text": "".join(pieces)}
    except Refusal as refusal:
        answer = {"error": "refusal", "message": str(refusal)[:1000]}
    except MemoryError:
        pieces.clear()
        answer = {"error": "memory", "message": f"more than {request['memory'] >> 20} MiB of memory"}
    except RecursionError:
        answer = {"error": "recursion", "message": "endless recursion"}
    except TemplateError as error:
        answer = {"error": "template", "message": f"{type(error).__name__}: {error}"[:1000]}
    except Exception as error:  # a template can raise whatever Python can; all of it is the template's fault
        answer = {"error": "template", "message": f"{type(error).__name__}: {error}"[:1000]}
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()

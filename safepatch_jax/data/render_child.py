"""The process in which chat templates are rendered: a program of others, within bounds.

A template may loop for ever, or double a text until memory is full; jinja's sandbox bounds neither.
`rendering` starts this file, which answers one line of JSON with another: a request has `limits`
and the arguments of transformers' own `render_jinja_template`, an answer `text`, or `error`;
one that has `read`, a template, is answered with the `names` that it reads. One
that takes too much processor time is ended by the kernel.
"""

import contextlib
import datetime
import functools
import json
import re
import resource
import signal
import sys

sys.path.pop(0)  # this folder, whose modules have names that other packages may look for


_FUNCTIONS = ("raise_exception", "strftime_now")  # that transformers gives a template


def main():
    answers = sys.stdout
    sys.stdout = sys.stderr  # what libraries print is no answer
    from transformers.utils import chat_template_utils as templates

    bounded = False
    for line in sys.stdin:
        request = json.loads(line)
        limits = request["limits"]
        if not bounded:
            with contextlib.suppress(ValueError, OSError):  # not every system knows the bound
                most = _address_space() + limits["megabytes"] * 2**20
                resource.setrlimit(resource.RLIMIT_AS, (most, most))
            bounded = True
        templates.datetime = _clock(request["date"])
        signal.setitimer(signal.ITIMER_PROF, limits["seconds"])
        if "read" in request:
            answer = _names(request["read"])
        else:
            answer = _render(templates, request["arguments"], limits["characters"])
        signal.setitimer(signal.ITIMER_PROF, 0)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _names(template):
    import jinja2.meta
    import jinja2.sandbox

    # What transformers adds to jinja; it marks answers and reads nothing.
    text = re.sub(r"\{%(-?)\s*generation\s*(-?)%\}", r"{%\1 if true \2%}", template)
    text = re.sub(r"\{%(-?)\s*endgeneration\s*(-?)%\}", r"{%\1 endif \2%}", text)
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        extensions=["jinja2.ext.loopcontrols"]
    )
    try:
        names = jinja2.meta.find_undeclared_variables(environment.parse(text))
        return {"names": sorted(names - environment.globals.keys() - set(_FUNCTIONS))}
    except MemoryError:
        return {"limit": "MEGABYTES"}
    except Exception as error:  # a template breaks as it likes
        return {"error": f"{type(error).__name__}: {str(error)[:1000]}"}


def _render(templates, arguments, most):
    try:
        text = templates.render_jinja_template(**arguments)[0][0]
    except MemoryError:
        return {"limit": "MEGABYTES"}
    except Exception as error:  # a template raises what it likes
        return {"error": f"{type(error).__name__}: {str(error)[:1000]}"}
    return {"text": text} if len(text) <= most else {"limit": "CHARACTERS"}


@functools.cache
def _clock(date):
    """Return a datetime class for which it is always noon of one day."""
    noon = datetime.datetime.fromisoformat(f"{date}T12:00")

    class Clock(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return noon

    return Clock


def _address_space():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * resource.getpagesize()


if __name__ == "__main__":
    main()

"""The program `mlcdn`: its commands, and how every error becomes one line and an exit code.

Exit codes: 0 done · 1 what was asked for did not come true · 2 wrong usage · 3 a part cannot be reached.
Laws: stdout carries the answer and, under ``--json``, one JSON document and nothing else; progress and logs go to stderr;
no error that a user can cause shows a traceback.
"""

from __future__ import annotations

import sys

import typer

from mlcdn.cli import audit, invalidate, keys, network, publish, release, replay, rollout, route, status, topics
from mlcdn.local_stack.errors import StackError
from processes.supervisor import SupervisorError
from schemas.errors import BadInput, MlcdnError, SettingsInvalid, Unreachable

app = typer.Typer(
    name="mlcdn",
    help="A CDN for machine-learning models: one signed release event deploys a model to every edge.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
network.register(app)
publish.register(app)
release.register(app)
status.register(app)
invalidate.register(app)
replay.register(app)
route.register(app)
app.add_typer(rollout.rollout, name="rollout")
app.add_typer(rollout.gate, name="gate")
app.add_typer(audit.app, name="audit")
app.add_typer(topics.app, name="topics")
app.add_typer(keys.app, name="keys")


def main() -> None:
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Runs one command and returns its exit code."""
    try:
        typer.main.get_command(app).main(arguments, prog_name="mlcdn")
        return 0
    except SystemExit as leaving:
        # Usage errors too: they were shown, with the usage, where they were found.
        return leaving.code if isinstance(leaving.code, int) else 1
    except (BadInput, SettingsInvalid) as wrong:
        return _say(str(wrong), 2)
    except Unreachable as away:
        return _say(str(away), 3)
    except StackError as broken:
        return _say(f"{broken.what}. {broken.hint}", 3)
    except (MlcdnError, SupervisorError) as failed:
        return _say(str(failed), 1)
    except KeyboardInterrupt:
        return _say("interrupted", 1)
    except BrokenPipeError:
        return 1


def _say(line: str, code: int) -> int:
    print(f"mlcdn: {line}", file=sys.stderr)  # noqa: T201 - the one line that says what went wrong
    return code

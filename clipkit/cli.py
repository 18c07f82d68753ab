"""The ``clipkit`` command: it lists the jobs beside it and runs the one that is named.

A verb is a file in ``train/``, ``index/`` or ``eval/``; its first docstring line is its help. Finding and listing
reads source text only, so ``clipkit --help`` imports nothing heavy. A job is an ordinary script: it may be copied,
changed and run by itself with ``python``; `Job` below gives it the same errors and exit status there.

Exit status: 0 all done; 1 done, with failures that were listed; 2 could not be done; 75 training that was told to stop
and goes on with --resume; 130 interrupted.
"""

import ast
import os
import runpy
import sys
import traceback
from pathlib import Path
from typing import Any

import click

from clipkit.core import PREEMPTED, ClipkitError, __version__, did_you_mean

__all__ = ["Job", "find_recipe", "jobs", "main", "recipes", "run_job"]

FOLDERS = ("train", "index", "eval")

_running: str | None = None  # the verb that `run_job` runs, as the user typed it


def _job_folder(name: str) -> Path:
    """The jobs' folder: inside the package when installed from a wheel, one level up in a checkout."""
    here = Path(__file__).resolve().parent
    return here / name if (here / name).is_dir() else here.parent / name


def jobs() -> dict[str, Path]:
    """Every verb and the file that does it, in the order of the folders."""
    return {path.stem: path for name in FOLDERS for path in sorted(_job_folder(name).glob("[a-z]*.py"))}


def recipes() -> dict[str, Path]:
    """The training recipes that ship with the project, by name."""
    return {path.stem: path for path in sorted(_job_folder("train").glob("*.yaml"))}


def find_recipe(name: str) -> Path:
    """The file of a recipe that ships with the project, or of one's own.

    Raises:
        ClipkitError: where there is neither.
    """
    known = recipes()
    path = known.get(name, Path(name))
    if not path.is_file():
        hint = did_you_mean(name, known)
        raise ClipkitError(f"no recipe {name!r}{hint}; there are {', '.join(known)}, or name a YAML file")
    return path


def first_line(path: Path) -> str:
    """The first docstring line of a Python file, read without importing it."""
    return (ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "").partition("\n")[0].rstrip(".")


class _ReaderLeft(Exception):
    """Nobody reads our results any more."""


class Job(click.Command):
    """A click command that prints an error as one line and turns a returned number into the exit status."""

    def __init__(self, *args: Any, **kwargs: Any):
        kwargs.setdefault("context_settings", {"help_option_names": ["-h", "--help"], "max_content_width": 100})
        super().__init__(*args, **kwargs)
        debug = click.Option(["--debug"], is_flag=True, expose_value=False, help="Show the traceback of an error.")
        self.params.append(debug)

    def main(self, args: list[str] | None = None, prog_name: str | None = None, **extra: Any) -> None:  # type: ignore[override]
        """Run and exit, as `click.Command.main` does in its standalone mode."""
        args = list(sys.argv[1:] if args is None else args)
        verb = prog_name or _running or Path(sys.argv[0]).stem
        sys.exit(
            _report_errors(lambda: super(Job, self).main(args, verb, standalone_mode=False), verb, "--debug" in args)
        )

    def invoke(self, ctx: click.Context) -> Any:
        """Run; a reader that left is told by an error of ours, as click itself would end such a run as failed."""
        try:
            return super().invoke(ctx)
        except BrokenPipeError as error:
            raise _ReaderLeft from error


def _report_errors(action: Any, name: str, debug: bool) -> int:
    try:
        status = action()
        sys.stdout.flush()
    except (BrokenPipeError, _ReaderLeft):
        # Whoever read our results has seen enough (`| head`); the interpreter must not trip over it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (KeyboardInterrupt, click.Abort):
        print(f"{name}: interrupted; the same command goes on (train with --resume)", file=sys.stderr)  # noqa: T201
        return 130
    except Exception as error:
        if debug:
            traceback.print_exc()
            return 2
        print(f"{name}: error: {_one_line(error)}", file=sys.stderr)  # noqa: T201
        return 2
    return status if isinstance(status, int) else 0


def _one_line(error: Exception) -> str:
    if isinstance(error, click.ClickException):
        return " ".join(error.format_message().split())
    said = " ".join(str(error).split())
    if isinstance(error, ClipkitError):
        return said
    # A defect of ours, or a disk that failed where nobody expected it.
    return f"{type(error).__name__}: {said[:300]} (--debug shows the traceback)"


def run_job(verb: str, args: list[str]) -> int:
    """Run one verb in this process, as the command line would. Returns its exit status."""
    global _running
    before, outer = sys.argv, _running
    # Handed over by name: run_path puts the file's path into sys.argv[0].
    sys.argv, _running = [verb, *args], f"clipkit {verb}"
    try:
        # run_path on a plain file leaves sys.path as it is, so a job's name can hide no library.
        runpy.run_path(str(jobs()[verb]), run_name="__main__")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    finally:
        sys.argv, _running = before, outer
    return 0


def _overview() -> str:
    verbs = jobs()
    lines = [f"clipkit {__version__}: {first_line(Path(__file__).with_name('__init__.py'))}.", ""]
    lines += ["usage: clipkit VERB [OPTIONS] ...      clipkit VERB --help tells more", ""]
    for name in FOLDERS:
        lines.append(f"{name}/")
        lines += [
            f"  {verb:<10} {first_line(path)}" for verb, path in verbs.items() if path.parent == _job_folder(name)
        ]
    lines += [
        "the command itself",
        f"  {'recipes':<10} {(_recipes.help or '').partition(chr(10))[0].rstrip('.')}",
    ]
    lines += [
        "",
        f"exit status: 0 done, 1 done with failures that are listed, 2 could not be done, {PREEMPTED} to be resumed",
    ]
    return "\n".join(lines)


@click.command("recipes", cls=Job)
@click.argument("name", required=False)
@click.argument("to", required=False, type=click.Path(path_type=Path))
def _recipes(name: str | None, to: Path | None) -> None:
    """List the training recipes, show one, or copy one to own: clipkit recipes [NAME [TO]]."""
    known = recipes()
    if name is None:
        for recipe, path in known.items():
            comment = path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
            click.echo(f"{recipe:<12} {comment}")
        return
    if name not in known:
        raise ClipkitError(f"no recipe {name!r}; there are {', '.join(known)}{did_you_mean(name, known)}")
    text = known[name].read_text(encoding="utf-8")
    if to is None:
        click.echo(text, nl=False)
        return
    if to.exists():
        raise ClipkitError(f"{to} exists; name another file")
    try:
        to.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ClipkitError(f"cannot write {to}: {error.strerror}") from error
    click.echo(f"wrote {to}; train with it: clipkit train {to} --set data.train=SHARDS --out RUN")


def main(args: list[str] | None = None) -> None:
    """Entry point of the ``clipkit`` command."""
    args = list(sys.argv[1:] if args is None else args)
    if not args or args[0] in ("-h", "--help", "help"):
        click.echo(_overview())
        sys.exit(0)
    if args[0] in ("-V", "--version"):
        click.echo(f"clipkit {__version__}")
        sys.exit(0)
    verb, rest = args[0], args[1:]
    if verb == "recipes":
        _recipes.main(rest, "clipkit recipes")
    if verb not in jobs():
        known = [*jobs(), "recipes"]
        hint = did_you_mean(verb, known)
        click.echo(f"clipkit: error: no verb {verb!r}{hint}; there are {', '.join(known)}", err=True)
        sys.exit(2)
    sys.exit(run_job(verb, rest))

"""The ``clipkit`` command: it lists the jobs beside it and runs the one that is named.

A verb is a file in ``train/``, ``index/`` or ``eval/``; its first docstring line is its help. Finding and listing
reads source text only, so ``clipkit --help`` imports nothing heavy. A job is an ordinary script: it may be copied,
changed and run by itself with ``python``; `Job` below gives it the same errors and exit status there.

Exit status: 0 all done; 1 done, with failures that were listed; 2 could not be done; 75 training that was told to stop
and goes on with --resume; 130 interrupted.
"""

import ast
import os
import re
import runpy
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from clipkit.core import FORMATS, ClipkitError, __version__, did_you_mean

__all__ = [
    "Job",
    "cache_options",
    "find_recipe",
    "format_option",
    "glob_options",
    "jobs",
    "list_options",
    "main",
    "model_option",
    "out_options",
    "probe_options",
    "recipes",
    "run_job",
    "sort_options",
]

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


def _together(*options: Callable[[Any], Any]) -> Callable[[Any], Any]:
    def decorate(function: Any) -> Any:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


class Bytes(click.ParamType):
    """A number of bytes: ``500MB``, ``2.5GB``, ``2GiB``, or bare."""

    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """The number."""
        found = re.fullmatch(r"([0-9]*\.?[0-9]+) *([kmgt]?)(i?)b?", str(value).strip().lower())
        if not found:
            self.fail(f"{value!r} is no size; write 500MB, 2GB or 2GiB", param, ctx)
        return int(float(found[1]) * (1024 if found[3] else 1000) ** " kmgt".index(found[2] or " "))


# Options that several verbs share, so that they read and mean the same everywhere.
model_option = click.option(
    "--model", metavar="MODEL", help="A run or model folder, RUN@step-N, open_clip:NAME/TAG, or hf:ORG/NAME."
)
format_option = click.option(
    "--format",
    "fmt",
    default="human",
    show_default=True,
    type=click.Choice(FORMATS),
    help="How results are printed.",
)
list_options = _together(
    click.option("--image-column", help="A list's column of image paths [default: by usual names, such as path]."),
    click.option("--caption-column", help="A list's column of captions [default: by usual names, such as caption]."),
    click.option(
        "--image-root",
        help="Folder or URL where a list's relative paths start [default: its folder].",
    ),
)


glob_options = _together(
    click.option(
        "--include",
        multiple=True,
        metavar="GLOB",
        help="Look at the files whose path in SOURCE fits, whatever they are; of lists, shards and vectors at the "
        "images. *.jpg is a name in any folder, cats/* what is straight in cats, cats/** what is anywhere below, "
        "/*.jpg what is at the top, cats/ all in any folder of that name. The case of an ending does not count; a "
        "hidden file fits a pattern that says the dot. Several may be given [default: of a folder what has the ending "
        "of an image].",
    ),
    click.option(
        "--exclude",
        multiple=True,
        metavar="GLOB",
        help="Pass over what fits; alone: look at every other file, except captions beside images.",
    ),
)
sort_options = _together(
    click.option(
        "--sort-into",
        type=click.Path(path_type=Path),
        metavar="DIR",
        help="Put each image into DIR/LABEL/, what is unsure into DIR/unsure, what shows none of the labels into "
        "DIR/background; unreadable files stay, and so does what lies beside images. Only says what it would do "
        "without --yes. Nothing is ever overwritten: a second a.jpg becomes a-2.jpg.",
    ),
    click.option(
        "--how",
        type=click.Choice(["copy", "link", "move"]),
        help="Whether files are sorted by copies, by symbolic links to their full paths, or are moved [default: copy].",
    ),
    click.option("--yes", is_flag=True, help="Do sort."),
    click.option(
        "--undo",
        type=click.Path(path_type=Path),
        metavar="DIR",
        help="Put back all that was sorted into DIR. What was changed since stays, is named, and the status is 1.",
    ),
)
cache_options = _together(
    click.option(
        "--cache",
        type=click.Path(path_type=Path),
        help="Where embeddings are kept for the next time [default: $CLIPKIT_CACHE, or ~/.cache/clipkit].",
    ),
    click.option("--no-cache", is_flag=True, help="Keep none, and look for none."),
    click.option("--cache-size", type=Bytes(), default="4GB", show_default=True, help="What that may take."),
)
memory_option = click.option(
    "--memory",
    type=Bytes(),
    help="Memory that may be used beyond what the program takes [default: half of what is free].",
)


probe_options = _together(
    click.option("--train", metavar="SOURCE", help="Of probe: what to train on [default: a part of the source]."),
    click.option("--train-split", help="Of probe on a dataset in CLIP_benchmark's layout [default: train]."),
    click.option(
        "--test-share",
        type=click.FloatRange(0, 1, min_open=True, max_open=True),
        help="Of probe: of the source, where it is divided, by a hash of each sample's group or key [default: 0.25].",
    ),
    click.option("--label-column", help="Of probe: the classes' names [default: the sub-folders]."),
    click.option("--text-column", help="Of probe: texts to fuse with the images, such as caption [default: none]."),
    click.option("--group-column", help="Of probe: samples of one value go together, into the training or the test."),
    click.option("--shots", type=click.IntRange(1), help="Of probe: so many training samples a class [default: all]."),
    click.option("--seed", type=click.IntRange(0), help="Of probe: of shots, folds and attention [default: 0]."),
)


def out_options(what: str) -> Callable[[Any], Any]:
    """``--out`` for what a stage makes, and ``--overwrite``."""
    return _together(
        click.option("--out", required=True, type=click.Path(path_type=Path), help=f"Folder for {what}."),
        click.option("--overwrite", is_flag=True, help="Replace another artifact that stands there."),
    )


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
        "exit status: 0 done, 1 done with failures that are listed, 2 could not be done, 75 to be resumed",
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

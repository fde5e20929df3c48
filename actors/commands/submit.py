"""Run Paceline as a job of a Ray cluster: submit it, follow it, stop it.

    paceline submit --address http://head:8265 --config my.yaml -- serve --host 0.0.0.0
    paceline submit --address http://head:8265 --status ID      (or --logs ID, --stop ID)

What is uploaded is a folder of links, which Ray follows: this package, the config file, and what is in
the working directory. So the cluster runs exactly what is here, and the same again is not sent twice.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import math
import os
import shlex
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import paceline
from paceline.runtime.config import make_config
from paceline.runtime.errors import ConfigError

if TYPE_CHECKING:
    from paceline.actors.jobs import Jobs

NAME = "submit"
ADDRESS = "http://127.0.0.1:8265"
RUNS = ("serve", "generate", "check-lossless")
"""Commands that a job can be."""
STOP_MARGIN_S = 15
"""What a stopped job gets beyond its `shutdown_timeout`, for engines and sockets to be closed."""
PACKAGE = Path(paceline.__file__).parent
NOT_UPLOADED = ["__pycache__/", "*.pyc"]
"""As in a .gitignore."""


class _Job(NamedTuple):
    argv: list[str]
    """The command line after `paceline`."""
    stop_wait_s: int
    """How long it may take to end when it is told to."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--address",
        metavar="URL",
        default=os.environ.get("RAY_API_SERVER_ADDRESS", ADDRESS),
        help=f"The cluster's job server (default: RAY_API_SERVER_ADDRESS, or {ADDRESS}).",
    )
    parser.add_argument(
        "--config", metavar="FILE.yaml", help="Sent along: all flags of the job, as a mapping."
    )
    parser.add_argument(
        "--working-dir",
        metavar="DIR",
        help="Sent along, and the job's current folder: prompts, templates, small models.",
    )
    parser.add_argument(
        "--upload",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="Send this Paceline along; without, the nodes' own is run (default: --upload).",
    )
    parser.add_argument(
        "--env",
        metavar="NAME[=VALUE]",
        action="append",
        default=[],
        help="Set this in the job's environment, to the value it has here if none is given. Whoever sees the "
        "cluster's dashboard sees it.",
    )
    parser.add_argument("--submission-id", metavar="ID", help="The job's id; made up if not given.")
    parser.add_argument(
        "--wait",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="Follow the job to its end, and end with its exit code (default: --wait).",
    )
    parser.add_argument(
        "--stop-on-interrupt",
        action="store_true",
        help="Ctrl-C stops the job; otherwise it goes on, and only following it ends.",
    )
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--status", metavar="ID", help="Print a job's status.")
    action.add_argument(
        "--logs", metavar="ID", help="Follow a job; with --no-wait print what it has said so far."
    )
    action.add_argument("--stop", metavar="ID", help="Stop a job, and return when it has ended.")
    parser.add_argument(
        "job",
        nargs="*",
        metavar="-- COMMAND FLAGS",
        help=f"What to run: {', '.join(RUNS)} (default: serve). Its files are those of the nodes and of "
        "--working-dir.",
    )


def run(args: argparse.Namespace) -> int:
    asked_for = args.status or args.logs or args.stop
    if asked_for and (args.job or args.config or args.working_dir):
        raise ConfigError("--status, --logs and --stop need a job's id and nothing to run")
    job = None if asked_for else _job(args)
    from paceline.actors.jobs import Jobs

    logging.disable(logging.WARNING)  # Ray tells what it uploads, file by file
    jobs = Jobs(args.address)
    if args.status:
        print(jobs.status(args.status))
        return 0
    if args.stop:
        print(jobs.stop(args.stop))
        return 0
    job_id = args.logs if job is None else _submit(jobs, args, job)
    submitted = "" if args.logs else f"paceline: submitted job {job_id}"
    if not args.wait:
        if submitted:
            print(submitted, file=sys.stderr)
        print(jobs.logs(job_id).rstrip() if args.logs else job_id)
        return 0
    return _follow(jobs, job_id, submitted, stop_on_interrupt=args.stop_on_interrupt)


def _follow(jobs: Jobs, job_id: str, submitted: str, *, stop_on_interrupt: bool) -> int:
    """Until it ends; its exit code. Whoever has been told that it is `submitted` can interrupt."""
    try:
        if submitted:
            print(submitted, file=sys.stderr, flush=True)
        return jobs.follow(job_id)
    except KeyboardInterrupt:
        again = f"paceline submit --address {jobs.address}"
        if stop_on_interrupt:
            print(f"paceline: stopping job {job_id}", file=sys.stderr)
            jobs.stop(job_id)
        else:
            print(
                f"paceline: job {job_id} goes on; {again} --stop {job_id} stops it, --logs {job_id} "
                "follows it again",
                file=sys.stderr,
            )
        raise


def _submit(jobs: Jobs, args: argparse.Namespace, job: _Job) -> str:
    """The new job's id."""
    from paceline.actors.jobs import STOP_WAIT

    with _folder(args) as folder:
        return jobs.submit(
            shlex.join(["python", "-m", "paceline", *job.argv]),
            runtime_env={
                "working_dir": str(folder),
                "excludes": NOT_UPLOADED,
                "env_vars": {STOP_WAIT: str(job.stop_wait_s), **_given_env(args.env)},
            },
            job_id=args.submission_id,
        )


def _job(args: argparse.Namespace) -> _Job:
    """What is asked for. Raises ConfigError for what the job itself would refuse."""
    from paceline.actors import cli
    from paceline.actors.commands.serve import server_config

    argv = list(args.job)
    if not argv or argv[0].startswith("-"):
        argv.insert(0, "serve")
    if argv[0] not in RUNS:
        raise ConfigError(f"a job is one of {', '.join(RUNS)}, found {argv[0]!r}")
    job_args = cli.parser().parse_args(argv)
    if job_args.config is not None:
        raise ConfigError("--config goes before the --, so that the file is sent along")
    job_args.config = args.config
    make_config(cli.engine_settings(job_args))
    grace_s = server_config(job_args).shutdown_timeout if argv[0] == "serve" else 0.0
    if args.config is not None:
        argv += ["--config", Path(args.config).name]
    return _Job(argv, math.ceil(grace_s) + STOP_MARGIN_S)


@contextlib.contextmanager
def _folder(args: argparse.Namespace) -> Iterator[Path]:
    """A folder of links to all that is sent along. Raises ConfigError for what is not there."""
    links = {PACKAGE.name: PACKAGE} if args.upload else {}
    if args.working_dir is not None:  # a checkout's `.src` brings its own package
        links |= {path.name: path for path in _entries(Path(args.working_dir))}
    if args.config is not None:
        links[Path(args.config).name] = Path(args.config)
    with tempfile.TemporaryDirectory(prefix="paceline-job-") as name:
        folder = Path(name)
        for link, path in links.items():
            (folder / link).symlink_to(path.resolve())
        yield folder


def _entries(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError as error:
        raise ConfigError(f"--working-dir {folder}: {error.strerror}") from None


def _given_env(given: Sequence[str]) -> dict[str, str]:
    """`NAME=VALUE`, or `NAME` for the value it has here. Raises ConfigError where it has none."""
    env = {}
    for text in given:
        name, found, value = text.partition("=")
        if not found:
            if name not in os.environ:
                raise ConfigError(f"--env {name}: there is no {name} in this environment")
            value = os.environ[name]
        env[name] = value
    return env

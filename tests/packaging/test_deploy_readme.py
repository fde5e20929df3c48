"""deploy/README.md: every command is run or read, and what was not run is said."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

import pytest
from tests.packaging.deploy_readme import README, ROOT, Block, blocks, commands

from paceline.actors import cli

USES = {"walked", "ray", "setup", "kustomize", "linted", "cluster"}
PAGE = README.read_text()
SHELL = [block for block in blocks() if block.language == "sh"]


def test_no_block_escapes_these_tests() -> None:
    fences = re.findall(r"^```(.+)$", PAGE, flags=re.MULTILINE)
    assert len(fences) == len(list(blocks()))
    assert {block.use for block in blocks()} == USES
    assert {block.language for block in blocks()} == {"sh", "python"}


@pytest.mark.parametrize("block", SHELL)
def test_shell_blocks_are_shell(block: Block) -> None:
    done = subprocess.run(
        ["bash", "-n"], input=block.text, text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("block", [each for each in blocks() if each.language == "python"])
def test_python_blocks_are_python(block: Block) -> None:
    ast.parse(block.text)


@pytest.mark.parametrize(
    "command", [each for block in SHELL for each in commands(block) if each.startswith("paceline ")]
)
def test_our_commands_and_their_flags_exist(command: str) -> None:
    argv = re.sub(r" &$", "", command).replace("'", "").split()[1:]
    cli.parser().parse_args(argv)


@pytest.mark.parametrize("block", SHELL)
def test_files_that_commands_name_are_there(block: Block) -> None:
    for path in re.findall(r"deploy/[\w./-]+", block.text):
        assert (ROOT / path).exists(), path
    for folder in re.findall(r"(?:-k|kustomize) (\S+)", block.text):
        assert (ROOT / folder / "kustomization.yaml").is_file(), folder
    for target in re.findall(r"--target (\w+)", block.text):
        assert f" AS {target}\n" in (ROOT / "deploy/Dockerfile").read_text()


def test_what_was_not_run_is_listed_to_the_last_command() -> None:
    listed = PAGE.partition("Not run,")[2]
    told = set(re.findall(r"`((?:docker|kubectl|openssl|paceline) [\w-]+)`", listed))
    unrun = [each for block in blocks() if block.use == "cluster" for each in commands(block)]
    needed = {
        found
        for command in unrun
        for found in re.findall(r"(?:^|\()((?:docker|kubectl|openssl|paceline) [a-z-]+)", command)
    }
    assert told == needed


def test_links_lead_somewhere() -> None:
    for page in (README, ROOT / "deploy/job/README.md", ROOT / "tests/data/schemas/README.md"):
        for target in re.findall(r"\]\(([^)#]+)(?:#[\w-]+)?\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_every_manifest_is_applied_by_some_command_or_part_of_one_that_is() -> None:
    folders = ("deploy/k8s", "deploy/kuberay")
    kustomizations = [
        path for folder in folders for path in (ROOT / folder).rglob("kustomization.yaml")
    ]
    known = PAGE + "".join(path.read_text() for path in kustomizations)
    manifests = [path for folder in folders for path in (ROOT / folder).rglob("*.yaml")]
    orphans = [
        str(Path(path).relative_to(ROOT))
        for path in manifests
        if path not in kustomizations and path.name not in known
    ]
    assert orphans == ["deploy/k8s/secrets.example.yaml"], "an example, and named as one"

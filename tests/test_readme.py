"""README.md: its commands, names of tests, tables and pictures."""

import re
import shlex

import torch

import bench
import detect
import figures
import flops
import segment
import train
from conftest import ROOT


def test_readme_commands_are_sound():
    """Every command line of this repository's scripts in the README has flags and values that its parser takes, and a
    model that can be built with them."""
    text = (ROOT / "README.md").read_text()
    commands = re.findall(r"^\s*((?:python|torchrun|srun) .*)$", text, re.MULTILINE)
    commands += re.findall(r"`((?:python|torchrun) [^`]*)`", text)
    scripts = (train, detect, segment)
    modules = {f"{module.__name__}.py": module for module in (*scripts, flops, bench, figures)}
    built, seen = set(), []
    for command in commands:
        words = shlex.split(command.split("&&")[-1], comments=True)
        for script in modules.keys() & set(words):
            module = modules[script]
            args = module.parser().parse_args(words[words.index(script) + 1 :])
            seen.append(script)
            if module in scripts:
                module.resolve(args)
                kind = (script, args.model, args.attention)
                if kind not in built and not args.model.startswith("timm:"):
                    with torch.device("meta"):
                        module.make_model(args, 10, args.image_size)
                built.add(kind)
    assert set(seen) == modules.keys() and len(seen) >= 25 and len(built) >= 8


def test_readme_names_tests_that_exist():
    """Every promise of the table of faults names the tests that hold it to it."""
    faults = (ROOT / "README.md").read_text().split("## Faults and input")[1].split("\n## ")[0]
    rows = re.findall(r"^\|(.*)\|$", faults, re.MULTILINE)[2:]
    files = [*ROOT.glob("test_*.py"), *ROOT.glob("tests/test_*.py")]
    tests = re.findall(r"^def (test_\w+)", "".join(path.read_text() for path in files), re.MULTILINE)
    for row in rows:
        names = re.findall("`([^`]*)`", row.replace("\\|", "").split("|")[-1])
        assert names and all(any(name in test for test in tests) for name in names), row


def test_readme_tables_are_those_of_the_runs():
    """The README's tables of results are what `figures.py table` makes of the committed logs: no seed of a row is left
    out, all are of one commit without changes, and nothing is typed."""
    text = (ROOT / "README.md").read_text()
    for path in figures.RUNS:
        runs = figures.read_runs(path)
        assert figures.results_table(runs) in text
        seeds = {}
        for one in runs:
            seeds.setdefault((one["config"]["model"], figures.row_of(one)), []).append(one["config"]["seed"])
        assert all(sorted(found) == [0, 1, 2] for found in seeds.values())
        assert re.fullmatch("[0-9a-f]{40}", *{one["config"]["environment"]["commit"] for one in runs})


def test_readme_pictures_exist():
    """Every picture that the README shows is a committed figure of figures.py."""
    pictures = re.findall(r"!\[[^]]*\]\(([^)]*)\)", (ROOT / "README.md").read_text())
    assert pictures and set(pictures) <= {f"figures/{name}.png" for name in figures.FIGURES}
    assert all((ROOT / picture).is_file() for picture in pictures)

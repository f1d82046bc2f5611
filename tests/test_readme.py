"""README.md, RESULTS.md and docs/: their commands, names of tests, tables, pictures and links."""

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
from models import build_model, list_models

PAGES = {path.name: path.read_text() for path in (ROOT / "README.md", ROOT / "RESULTS.md", *ROOT.glob("docs/*.md"))}


def test_readme_commands_are_sound():
    """Every command line of this repository's scripts in the pages has flags and values that its parser takes, and a
    model that can be built with them."""
    text = "\n".join(PAGES.values())
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
    faults = PAGES["training.md"].split("## Faults and input")[1]
    rows = re.findall(r"^\|(.*)\|$", faults, re.MULTILINE)[2:]
    files = [*ROOT.glob("test_*.py"), *ROOT.glob("tests/test_*.py")]
    tests = re.findall(r"^def (test_\w+)", "".join(path.read_text() for path in files), re.MULTILINE)
    for row in rows:
        names = re.findall("`([^`]*)`", row.replace("\\|", "").split("|")[-1])
        assert names and all(any(name in test for test in tests) for name in names), row


def test_readme_tables_are_those_of_the_runs():
    """The tables of results are what `figures.py table` makes of the committed logs: no seed of a row is left
    out, all are of one commit without changes, and nothing is typed."""
    text = PAGES["RESULTS.md"]
    for path in figures.RUNS:
        runs = figures.read_runs(path)
        assert figures.results_table(runs) in text
        seeds = {}
        for one in runs:
            seeds.setdefault((one["config"]["model"], figures.row_of(one)), []).append(one["config"]["seed"])
        assert all(sorted(found) == [0, 1, 2] for found in seeds.values())
        assert re.fullmatch("[0-9a-f]{40}", *{one["config"]["environment"]["commit"] for one in runs})


def test_readme_links_and_pictures_exist():
    """Every file that a page links to exists; every picture is a figure of figures.py."""
    for name, text in PAGES.items():
        folder = ROOT / "docs" if name == "training.md" else ROOT
        for link in re.findall(r"\]\(([^)#]*)\)", text):
            assert link.startswith("https://") or (folder / link).is_file(), (name, link)
    pictures = re.findall(r"!\[[^]]*\]\(([^)]*)\)", PAGES["README.md"])
    assert pictures and set(pictures) <= {f"figures/{name}.png" for name in figures.FIGURES}


def test_readme_repeats_numbers_of_the_results():
    """Every score in the README's small table stands in RESULTS.md, whose tables come from logs."""
    rows = PAGES["README.md"].split("## Results")[1].split("\n## ")[0]
    scores = re.findall(r"[\d.]+ ± [\d.]+", rows)
    assert len(scores) >= 6 and all(score in PAGES["RESULTS.md"] for score in scores)


def test_readme_is_short():
    """A newcomer reads it in a few minutes, on a screen of 100 columns."""
    assert len(PAGES["README.md"].split()) < 1700
    prose = re.sub(r"```.*?```", "", PAGES["README.md"], flags=re.DOTALL)
    assert max(len(line) for line in prose.splitlines() if not line.startswith("|")) <= 100


def test_every_model_comes_from_torch_hub():
    """torch.hub finds each model by its name, and the drop-in block."""
    for name in list_models():
        with torch.device("meta"):
            model = torch.hub.load(str(ROOT), name, source="local", num_classes=7)
            expected = build_model(name, num_classes=7)
        assert str(model) == str(expected)
    assert torch.hub.load(str(ROOT), "LinearAngularAttention", source="local", dim=8, num_heads=2).heads == 2

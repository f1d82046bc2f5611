"""README.md, RESULTS.md and docs/: their commands, code, names of tests, tables, pictures and links; hubconf.py."""

import contextlib
import importlib.util
import io
import json
import re
import shlex
import statistics
from types import SimpleNamespace

import pytest
import scipy.stats
import torch

import bench
import detect
import figures
import flops
import run
import segment
import train
from attention import LinearAngularAttention
from conftest import ROOT
from models import build_model, list_models

PAGES = [ROOT / "README.md", ROOT / "RESULTS.md", *ROOT.glob("docs/*.md")]
README, RESULTS = (path.read_text() for path in PAGES[:2])


def blocks(text, language):
    """The code blocks of a page in that language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def names_of_tests():
    """Names of all tests."""
    files = [*ROOT.glob("test_*.py"), *ROOT.glob("tests/test_*.py")]
    return re.findall(r"^def (test_\w+)", "".join(path.read_text() for path in files), re.MULTILINE)


def test_readme_commands_are_sound():
    """Every command line of this repository's scripts on a page has flags and values that its parser takes, and a
    model that can be built with them."""
    text = "\n".join(path.read_text() for path in PAGES)
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
    faults = (ROOT / "docs/training.md").read_text().split("## When something goes wrong")[1].split("\n## ")[0]
    rows = re.findall(r"^\|(.*)\|$", faults, re.MULTILINE)[2:]
    tests = names_of_tests()
    assert rows
    for row in rows:
        names = re.findall("`([^`]*)`", row.replace("\\|", "").split("|")[-1])
        assert names and all(any(name in test for test in tests) for name in names), row


def test_pages_select_tests_that_exist():
    """Whatever a page gives to `pytest -k` selects a test, and a file that it gives to pytest is there."""
    for path in PAGES:
        text = path.read_text()
        for chosen in re.findall(r'pytest[^`\n]* -k ("[^"]*"|\w+)', text):
            names = set(re.findall(r"\w+", chosen)) - {"or", "and", "not"}
            assert all(any(name in test for test in names_of_tests()) for name in names), chosen
        assert all((ROOT / name).is_file() for name in re.findall(r"pytest (\S+\.py)", text))


def test_readme_tables_are_those_of_the_runs():
    """The tables of results are what `figures.py table` makes of the committed logs: no seed of a row is left
    out, all are of one commit without changes, and nothing is typed. The README's means are in them."""
    tables = ""
    for path in figures.RUNS:
        runs = figures.read_runs(path)
        tables += figures.results_table(runs)
        assert figures.results_table(runs) in RESULTS
        seeds = {}
        for one in runs:
            seeds.setdefault((one["config"]["model"], figures.row_of(one)), []).append(one["config"]["seed"])
        assert all(sorted(found) == [0, 1, 2] for found in seeds.values())
        assert re.fullmatch("[0-9a-f]{40}", *{one["config"]["environment"]["commit"] for one in runs})
    # fewer seeds
    fewer = [("scratch", "softmax"), ("segmentation", "softmax")]
    fewer += [("conversion", "linear_angular, converted"), ("kernels", "softmax")]
    for name, against in fewer:
        table = figures.results_table(figures.read_runs(ROOT / f"results/{name}.jsonl"), against)
        assert table in RESULTS
        tables += table
    means = re.findall(r"\d+\.\d ± \d+\.\d", README)
    assert means and all(f"| {mean} |" in tables for mean in means)


def test_effects_of_one_change_are_those_of_the_logs():
    """The differences between runs of segmentation in RESULTS.md, by seed, are those of the committed logs. The
    interval holds the mean change with 95% confidence if the changes of seeds are normally distributed."""
    def scores(log, row):
        found = [one for one in figures.read_runs(ROOT / f"results/{log}.jsonl") if figures.row_of(one) == row]
        found = [one for one in found if one["config"]["model"] == "vit_mini"]
        return {one["config"]["seed"]: figures.outcome(one)["score"] for one in found}

    bare, normed = "linear_angular, no DWConv", "softmax_normed, no DWConv"
    some = "linear_angular, no DWConv in MLPs"
    log, unnormed = "segmentation", ("segmentation_unnormed", bare)
    pairs = [
        ((log, normed), (log, "softmax")), (unnormed, (log, "softmax")), ((log, bare), (log, normed)),
        ((log, bare), unnormed), ((log, bare), (log, "softmax")), ((log, "linear_angular"), (log, bare)),
        ((log, "linear_angular"), (log, "softmax")), ((log, some), (log, bare)), ((log, "linear_angular"), (log, some)),
        ((log, "softmax, DWConv in MLPs"), (log, "softmax")),
        ((log, "angular"), (log, "linear_angular")), (("scenes", "castling, ramp"), (log, "linear_angular")),
    ]  # fmt: skip
    rows = []
    for after, before in pairs:
        one, other = scores(*after), scores(*before)
        change = {seed: one[seed] - other[seed] for seed in one.keys() & other.keys()}
        cells = [f"{change[seed]:+.1f}" if seed in change else "–" for seed in range(5)]
        mean, spread, n = statistics.mean(change.values()), statistics.stdev(change.values()), len(change)
        half = scipy.stats.t.ppf(0.975, n - 1) * spread / n**0.5
        cells += [f"{mean:+.1f} ± {spread:.1f}", f"{mean - half:+.1f} to {mean + half:+.1f}"]
        rows.append(f"| {' | '.join(cells)} |")
    table = RESULTS.split("| change | seed 0")[1].split("\n\n")[0].splitlines()[2:]
    assert ["|" + line.split("|", 2)[2] for line in table] == rows


def speed_tables():
    """The Markdown rows of RESULTS.md's tables of speed, from the log of bench.py."""
    result = json.loads(figures.BENCH.read_text())
    cell = lambda one: "{:.2f} ({:.2f} to {:.2f})".format(one["ratio"], *one["quartiles"])  # noqa: E731
    for row in result["core"] + result["models"]:
        yield [row["shape"], cell(row["softmax"]), cell(row["released"])]
    forms = ("empty", "alive", "released off", "released on", "softmax")
    for row in result["training"]:
        yield [row["shape"], *(cell(row[form]) for form in forms)]
    for row in result["training"]:
        yield [row["shape"], *(f"{row[form]['mib']:.0f}" for form in ("off", *forms[1:]))]


def test_speed_tables_are_the_committed_log():
    """Every row that bench.py logged is in RESULTS.md, with its ratios, quartiles and memory."""
    rows = [f"| {' | '.join(row)} |\n" for row in speed_tables()]
    assert len(rows) == 33
    for row in rows:
        assert row in RESULTS


def test_readme_shows_the_report_of_a_run(capsys):
    """The report in the README is what `print_report` makes of the committed run of that command."""
    lines = (ROOT / "results/levit128_castling_shapes.jsonl").read_text().splitlines()
    args = SimpleNamespace(model="levit128", attention="castling", data="shapes", image_size=64, batch_size=128)
    run.print_report(args, json.loads(lines[-1])["castling_report"], train.METRICS)
    assert capsys.readouterr().out.strip() in README


@pytest.mark.parametrize("code", blocks(README, "python"))
def test_readme_code_runs(code, monkeypatch):
    """The README's Python runs as it stands, in the repository's folder, and prints its result."""
    if "timm" in code and not importlib.util.find_spec("timm"):
        pytest.skip("timm is not installed")
    monkeypatch.chdir(ROOT)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(code, {})
    assert printed.getvalue()


def test_pictures_and_links_exist():
    """A picture on a page is a committed figure of figures.py; a link leads to a file, or to a heading, that exists."""
    for path in PAGES:
        text = path.read_text()
        pictures = re.findall(r"!\[[^]]*\]\(([^)]*)\)", text)
        assert set(pictures) <= {f"figures/{name}.png" for name in figures.FIGURES}
        for link in re.findall(r"\]\((?!http)([^)]*)\)", text):
            name, _, heading = link.partition("#")
            target = path.parent / name if name else path
            assert target.is_file(), link
            titles = re.findall(r"^#+ (.*)$", target.read_text() if heading else "", re.MULTILINE)
            slugs = [re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles]
            assert not heading or heading in slugs, link
    assert "figures/idea.png" in README


def test_readme_is_short_and_lines_fit():
    """At most 1,650 words. On every page a line of prose has at most 100 columns; tables and code may be wider."""
    assert len(README.split()) <= 1650
    for path in PAGES:
        prose = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
        long = [line for line in prose.splitlines() if len(line) > 100 and not line.startswith("|")]
        assert not long, f"{path.name}: {long[0]}"


def test_hub_loads_everything():
    """torch.hub finds every model of `list_models`, and the block, with their arguments."""
    with torch.device("meta"):
        for name in list_models():
            model = torch.hub.load(str(ROOT), name, source="local", num_classes=7)
            assert repr(model) == repr(build_model(name, num_classes=7))
        softmax = torch.hub.load(str(ROOT), "deit_tiny", source="local", num_classes=7, attention="softmax")
        block = torch.hub.load(str(ROOT), "LinearAngularAttention", source="local", dim=12, num_heads=3)
    assert softmax.head.weight.shape == (7, 192)
    assert isinstance(block, LinearAngularAttention)

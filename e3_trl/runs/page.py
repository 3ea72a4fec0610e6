"""
A page of runs (`report.html`): what happened in them, figures, settings that differ, and every prompt with its
rollouts and completions. One file, which loads nothing: its table is DataTables, from the package itables.
"""

import base64
import hashlib
import io
import json
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import jinja2
import matplotlib
import numpy as np
import pandas as pd
from markupsafe import Markup
from matplotlib.figure import Figure

from ..scrub import without_secrets
from .figures import IDENTITY, Run, make_figures
from .report import read_benchmarks, read_report
from .rollout_log import read_rollout_columns
from .run_folder import COMPLETION_FILES, ROLLOUTS_FILE, files_of, step_of_completions, write_whole


if find_spec("itables") is None:
    raise ModuleNotFoundError(name="itables")

# What became of a prompt, in the order of the table: short, and when it is so. Solved = a rollout was right.
CHANGES = {
    "gained": ("newly solved", "in the last pass, not in the first"),
    "lost": ("lost", "solved in the first pass, not in the last"),
    "never": ("never solved", "in no pass"),
    "between": ("in between", "solved, but not in the first pass nor the last"),
    "kept": ("solved still", "in the first pass and in the last"),
    "once": ("solved once", "in the one pass that it was in"),
}
TITLES = {
    "entropy": "Entropy and its target",
    "temperature": "Temperature",
    "all_wrong": "Prompts with no right rollout",
    "reward": "Reward",
    "validation": "Validation",
    "all_wrong_difference": "Prompts with no right rollout, compared",
    "pass_at_k": "pass@k",
    "budgets": "Rollouts by difficulty",
}
# So that a page of any run can be opened and sent: of longer runs those prompts that changed most, and of longer texts
# the beginning and the end.
MAX_PROMPTS = 20_000
MAX_PASSES = 24
PROMPT_CHARACTERS = 1_000
# Of completions: prompts, passes of a prompt, completions of a pass, characters, and bytes of files that are read.
COMPLETION_LIMITS = {"prompts": 1_000, "passes": 4, "completions": 3, "characters": 1_500, "bytes": 2**31}
# Of what a cell of a table holds of the settings.
SETTING_CHARACTERS = 400
# The column of logged completions that says which prompt they are of, see `e3_trl.batch.prompt_ids`.
PROMPT_ID = "e3_prompt_id"


def write_page(paths: Sequence[str | Path], path: str | Path, prompts: Sequence | None = None) -> Path:
    """
    Write the page of runs.

    Args:
        paths (`list`): run folders, or reports of `e3-trl evaluate`.
        path (`str` or `Path`): the file to write.
        prompts (`Sequence`, *optional*):
            The prompts of the runs' dataset, by their ids, for runs that have logged no completions, in which they
            stand too.

    Returns:
        `Path`: the file.

    Raises:
        `ValueError`: if a path is no run, before anything is written.
    """
    runs = [Run.read(one) for one in paths]
    described = [_describe(run, prompts) for run in runs]
    script = _script()
    html = (
        _environment()
        .get_template("page.html")
        .render(
            title=", ".join(dict.fromkeys(run["name"] for run in described)),
            runs=described,
            figures=_as_images(make_figures([run.path for run in runs])),
            settings=_settings(runs),
            changes=CHANGES,
            limits=COMPLETION_LIMITS | {"all_prompts": MAX_PROMPTS, "all_passes": MAX_PASSES},
            style=Markup((_library() / "dt_bundle.css").read_text()) + Markup((_here() / "page.css").read_text()),
            script=Markup(script),
            script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        )
    )
    write_whole(path, html.encode(errors="replace"))  # a completion can end within a character
    return Path(path)


def prompt_table(columns: dict[str, np.ndarray]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """
    What became of each prompt.

    Args:
        columns (`dict` of arrays): as of [`~e3_trl.read_rollout_columns`].

    Returns:
        Two `pd.DataFrame`: by prompt id and pass `rollouts`, `correct`, `tokens`, `difficulty` and `temperature`; and
        by prompt id `change` (a name of `CHANGES`) and `difference` (of success rates, last pass minus first), those
        first that changed most.
    """
    frame = pd.DataFrame(columns)
    how = {"rollouts": "sum", "correct": "sum", "tokens": "sum", "difficulty": "last", "temperature": "mean"}
    by_pass = frame.groupby(["prompt_id", "pass"]).agg(how)
    of_prompt = by_pass.groupby("prompt_id")
    first, last = of_prompt.nth(0).droplevel("pass"), of_prompt.nth(-1).droplevel("pass")
    solved_first, solved_last = first["correct"] > 0, last["correct"] > 0
    conditions = {
        "once": (of_prompt.size() == 1) & solved_first,
        "kept": solved_first & solved_last,
        "gained": ~solved_first & solved_last,
        "lost": solved_first & ~solved_last,
        "between": of_prompt["correct"].sum() > 0,
    }
    difference = last["correct"] / last["rollouts"] - first["correct"] / first["rollouts"]
    change = np.select([condition.to_numpy() for condition in conditions.values()], [*conditions], default="never")
    table = pd.DataFrame({"change": change, "difference": difference})
    order = np.lexsort([-table["difference"].abs(), [[*CHANGES].index(one) for one in table["change"]]])
    return by_pass, table.iloc[order]


def _describe(run: Run, prompts: Sequence | None) -> dict:
    """What the page says of a run."""
    report = read_report(run.path)
    warnings = report.get("warnings")
    described = {"name": run.name, "warnings": warnings, "facts": [], "counts": None}
    described["model"] = without_secrets(str((run.settings or {}).get("model_name_or_path", "")))
    if run.log:
        described["facts"].append(("steps", f"{run.log[-1]['step']:,}", None))
    if (run.path / ROLLOUTS_FILE).is_file():
        columns = read_rollout_columns(run.path)
        # No rows, or those of an earlier version.
        if len(columns["pass"]) and not np.isnan(columns["pass"].astype(float)).any():
            described |= _describe_prompts(run, columns, prompts)
            described["facts"] += described.pop("prompt_facts")
    if described["counts"] is None and (curve := run.curve("reward")):
        described["facts"].append(
            ("mean reward", _number(curve[max(curve)]), f"{_number(curve[min(curve)])} at first")
        )
    for of_set, curve in run.curves(r"eval_(?:(.+)_)?pass@1").items():
        label = "pass@1" + ("" if of_set is None else f" on {of_set}")
        before = f"{_number(curve[min(curve)])} at step {min(curve):,}" if len(curve) > 1 else None
        described["facts"].append((label, _number(curve[max(curve)]), before))
    for name, curves in read_benchmarks(run.path).items():
        if all(1 in curve for curve in curves):
            mean = sum(curve[1] for curve in curves) / len(curves)
            of_runs = f"mean of {len(curves)} runs" if len(curves) > 1 else None
            described["facts"].append((f"pass@1 on {name}", _number(mean), of_runs))
    return described


def _describe_prompts(run: Run, columns: dict[str, np.ndarray], prompts: Sequence | None) -> dict:
    by_pass, table = prompt_table(columns)
    counts = table["change"].value_counts()
    of_first, of_last = (by_pass.xs(number, level="pass") for number in (columns["pass"].min(), columns["pass"].max()))
    rates = [(one["correct"] / one["rollouts"]).mean() for one in (of_first, of_last)]
    num_passes = int(columns["pass"].max()) + 1
    shown = table.iloc[:MAX_PROMPTS]
    # As many of each kind, as far as there are.
    in_turn = shown.groupby("change").cumcount().sort_values(kind="stable").index
    completions, texts, files = _read_completions(run, columns, set(in_turn[: COMPLETION_LIMITS["prompts"]]))
    if prompts is not None and len(prompts) > max(shown.index):
        texts = {number: _text(prompts[number]) for number in shown.index.tolist()} | texts
    steps = {number: [] for number in shown.index}
    for (number, of_pass), *values in by_pass.loc[shown.index.sort_values()].itertuples():
        steps[number].append([of_pass + 1, *(_for_json(value) for value in values)])
    kept = [_some(of_prompt, MAX_PASSES) for of_prompt in steps.values()]
    rows = {
        "id": shown.index.tolist(),
        "text": [_shortened(texts.get(number, ""), PROMPT_CHARACTERS) for number in shown.index.tolist()],
        "change": shown["change"].tolist(),
        "passes": kept,
    }
    facts = [
        ("prompts", f"{len(table):,}", f"in {num_passes:,} pass{'es' if num_passes > 1 else ''}"),
        (
            "right rollouts in training",
            f"{rates[1]:.0%}",
            f"{rates[0]:.0%} in the first pass" if num_passes > 1 else None,
        ),
    ]
    return {
        "prompt_facts": facts,
        "counts": {name: int(counts.get(name, 0)) for name in CHANGES},
        "num_prompts": len(table),
        "rows": rows,
        "completions": completions,
        "files": files,
    }


def _read_completions(run: Run, columns: dict, wanted: set[int]) -> tuple[dict, dict[int, str], tuple[int, int]]:
    """
    What `log_completions` kept: by prompt and pass, first and last passes first; all prompts' texts; and how many of
    how many files were read.
    """
    import pyarrow.parquet as parquet

    steps, first = np.unique(columns["step"], return_index=True)
    pass_of, files = columns["pass"][first], defaultdict(dict)
    for path in (run.path / name for name in files_of(run.path, COMPLETION_FILES)):
        place = int(np.searchsorted(steps, step_of_completions(path), side="right")) - 1
        if place >= 0:  # the first of those that show one batch
            files[int(pass_of[place])].setdefault(int(steps[place]), path)
    settings = run.settings or {}
    names = str(settings.get("reward_funcs", "")).split(", ")
    correctness = settings.get("difficulty_reward_func") or names[0]
    names = [correctness, *(name for name in names if name != correctness)]
    found: dict[int, dict[int, list]] = defaultdict(lambda: defaultdict(list))
    texts: dict[int, str] = {}
    num_read, bytes_left = 0, COMPLETION_LIMITS["bytes"]
    for number in _spread(sorted(files)):
        for file in files[number].values():
            bytes_left -= file.stat().st_size
            available = parquet.read_schema(file).names
            if bytes_left < 0 or PROMPT_ID not in available:
                continue
            num_read += 1
            rewards = [name for name in names if name in available]
            table = parquet.read_table(file, columns=[PROMPT_ID, "prompt", "completion", *rewards])
            ids = table[PROMPT_ID].to_pylist()
            for row, prompt_id in enumerate(ids):
                if prompt_id is None or math.isnan(prompt_id):  # of an evaluation
                    continue
                prompt_id = int(prompt_id)
                if prompt_id not in texts:
                    texts[prompt_id] = _text(table["prompt"][row].as_py())
                of_prompt = found[prompt_id]
                if prompt_id in wanted and (number in of_prompt or len(of_prompt) < COMPLETION_LIMITS["passes"]):
                    values = [_for_json(table[name][row].as_py()) for name in rewards]
                    of_prompt[number].append((values, table["completion"][row]))
    completions = {
        prompt_id: [
            [number + 1, len(rows), [[values, _completion(text)] for values, text in _right_and_wrong(rows)]]
            for number, rows in sorted(of_prompt.items())
        ]
        for prompt_id, of_prompt in found.items()
        if of_prompt
    }
    return {"rewards": names, "of": completions}, texts, (num_read, sum(map(len, files.values())))


def _right_and_wrong(rows: list[tuple]) -> list[tuple]:
    """Some of a prompt's completions in a pass: a right one and a wrong one, if there are, then more of them."""
    right = [row for row in rows if row[0] and row[0][0] is not None and row[0][0] > 0.5]
    wrong = [row for row in rows if row not in right]
    pairs = [row for place in range(len(rows)) for row in (*right[place : place + 1], *wrong[place : place + 1])]
    return pairs[: COMPLETION_LIMITS["completions"]]


def _completion(text) -> str:
    return _shortened(_text(text.as_py(), roles=False), COMPLETION_LIMITS["characters"])


def _text(value, roles: bool = True) -> str:
    """A text, or a conversation as one."""
    if isinstance(value, str) or value is None:
        return value or ""
    parts = []
    for message in value:
        content = message.get("content") or ""
        if not isinstance(content, str):  # images beside texts
            content = "".join(part.get("text") or f"[{part.get('type')}]" for part in content)
        if message.get("tool_calls"):
            content += json.dumps(message["tool_calls"], default=str)
        parts.append(f"{message.get('role')}: {content}" if roles or len(value) > 1 else content)
    return "\n".join(parts)


def _shortened(text: str, characters: int) -> str:
    if len(text) <= characters:
        return text
    half = characters // 2
    return f"{text[:half]}\n[{len(text) - 2 * half:,} characters are left out here]\n{text[-half:]}"


def _spread(items: list) -> list:
    """The same, the first and the last first, then those between, evenly."""
    parts = (2**power for power in range(len(items).bit_length() + 1))
    places = [round(place) for number in parts for place in np.linspace(0, len(items) - 1, number + 1)]
    return [items[place] for place in dict.fromkeys(places)] if items else []


def _some(items: list, number: int) -> list:
    """So many of them at most, with the first and the last, in their order."""
    if len(items) <= number:
        return items
    return [items[place] for place in np.linspace(0, len(items) - 1, number).round().astype(int)]


def _for_json(value):
    """A number as it may stand in JSON."""
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return None
    return round(float(value), 4) if isinstance(value, float) else int(value)


def _number(value: float | None) -> str:
    return "none" if value is None else f"{value:.3f}"


def _settings(runs: list[Run]) -> dict[str, list[str]]:
    """Of several runs the settings that differ, of one those that its report names: a value for each run."""
    if len(runs) == 1:
        return {name: [_setting(value)] for name, value in read_report(runs[0].path).get("settings", {}).items()}
    with_settings = [run.settings or {} for run in runs]
    names = sorted({name for settings in with_settings for name in settings} - (IDENTITY - {"seed", "data_seed"}))
    shown = {name: [_setting(settings.get(name)) for settings in with_settings] for name in names}
    return {name: values for name, values in shown.items() if len(set(values)) > 1}


def _setting(value) -> str:
    return _shortened(str(without_secrets(value)), SETTING_CHARACTERS)


def _as_images(figures: dict[str, Figure | None]) -> Iterator[tuple[str, str]]:
    """Title and address of each figure: an image of its own, in which no name of a run can do anything."""
    # The same file for the same runs.
    with matplotlib.rc_context({"svg.hashsalt": "e3", "svg.fonttype": "path"}):
        for name, figure in figures.items():
            if figure is not None:
                file = io.BytesIO()
                figure.savefig(file, format="svg", dpi=120, metadata={"Date": None}, transparent=True)
                yield TITLES[name], "data:image/svg+xml;base64," + base64.b64encode(file.getvalue()).decode()


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_here()),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # Its `tojson` writes < as \u003c, so that no text can end the script that holds it.
    environment.policies["json.dumps_kwargs"] = {"separators": (",", ":"), "ensure_ascii": False, "allow_nan": False}
    return environment


def _script() -> str:
    """The page's module: the library, what it exports as an object, and what uses it."""
    library = (_library() / "dt_bundle.js").read_text()
    start = library.rindex("export{")
    end = library.index("}", start)
    names = (pair.split(" as ") for pair in library[start + len("export{") : end].split(","))
    exports = ",".join(f"{json.dumps(name[-1])}:{name[0]}" for name in names)
    # What follows it is a comment.
    return f"{library[:start]}const library={{{exports}}};\n{(_here() / 'page.js').read_text()}"


def _here() -> Path:
    return Path(__file__).parent


def _library() -> Path:
    """Where itables has its files. The package itself takes a second to import."""
    return Path(find_spec("itables").submodule_search_locations[0]) / "html"

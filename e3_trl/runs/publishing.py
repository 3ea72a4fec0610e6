"""A run on the Hub: what its model card says about E3, and the upload."""

import contextlib
import glob
import json
import re
from pathlib import Path

from huggingface_hub import ModelCard, auth_check, constants, create_repo, upload_folder

# Its HTTPError is the one that its client raises: httpx's in huggingface_hub 1, httpx2's in 2.
from huggingface_hub.errors import HfHubHTTPError, HTTPError
from transformers.utils.hub import hf_api

from ..scrub import without_secrets
from .report import read_benchmarks, read_report, write_json
from .run_folder import (
    ACCOUNT_FILES,
    ARGS_FILE,
    COMPLETION_FILES,
    FIGURES,
    MODEL_FILES,
    REPORT_FILE,
    files_of,
    write_whole,
)


BEGIN, END = "<!-- e3 -->", "<!-- /e3 -->"


class HubError(RuntimeError):
    """The Hub cannot be used as asked; the message says what to do."""


def complete_model_card(folder: str | Path, repo_id: str | None = None) -> None:
    """
    Write what `report.json` and `figures/` say into TRL's model card: settings, results, figures. What an earlier
    call wrote is replaced. Secrets are removed from the whole card.

    Args:
        folder (`str` or `Path`): the run's output folder, with the `README.md` that TRL wrote.
        repo_id (`str`, *optional*):
            Where the model will be, for the card's code. If `None`, what TRL says, or the folder where it says none.
    """
    path = Path(folder) / "README.md"
    card = ModelCard.load(path, ignore_metadata_errors=True)
    text = re.sub(f"{BEGIN}.*?{END}\n\n", "", card.text, flags=re.DOTALL)
    text = text.replace("[None](https://huggingface.co/None)", "a local model")
    if repo_id is None:
        text = text.replace('model="None", device_map', f'model="{Path(folder).as_posix()}", device_map')
    else:
        text = re.sub(r'model="[^"]*", device_map', f'model="{repo_id}", device_map', text)
    section = f"{BEGIN}\n{_section(Path(folder))}\n{END}\n\n"
    heading = "### Framework versions"
    card.text = text.replace(heading, section + heading, 1) if heading in text else f"{text}\n\n{section}"
    write_whole(path, without_secrets(str(card)).encode())


def _section(folder: Path) -> str:
    """The card's own part, in Markdown."""
    report, curves = without_secrets(read_report(folder)), read_benchmarks(folder)
    parts = []
    if "step" in report:
        rows = [(f"`{name}`", f"`{value}`") for name, value in report["settings"].items() if value is not None]
        intro = f"Seed {report['seed']}, {report['step']} steps. All of them: `training_args.json`."
        parts += ["### Settings", intro, _table(("setting", "value"), rows)]
    if curves:
        # The mean over runs, of other seeds' models too, at the k that all benchmarks have.
        ks = sorted(set.intersection(*(set(runs[0]) for runs in curves.values())))
        means = {name: [sum(run[k] for run in runs) / len(runs) for k in ks] for name, runs in curves.items()}
        rows = [(name, *(f"{100 * mean:.2f}" for mean in means[name]), len(curves[name])) for name in means]
        parts += ["### Results", _table(("benchmark", *(f"pass@{k} (%)" for k in ks), "mean of runs"), rows)]
    if report.get("metrics"):
        shown = [name for name in report["metrics"] if name in _METRICS or name.startswith("eval_")]
        rows = [(f"`{name}`", f"{report['metrics'][name]:.4g}") for name in shown]
        parts += ["### Last metrics of the training", _table(("metric", "value"), rows)]
    figures = sorted((folder / FIGURES).glob("*.png"))
    if figures:
        parts += ["### Figures", *(f"![{figure.stem}]({FIGURES}/{figure.name})" for figure in figures)]
    return "\n\n".join(parts)


_METRICS = ("reward", "entropy", "target_entropy", "temperature", "rollouts/all_wrong", "rollouts/all_correct")


def _table(header: tuple, rows: list[tuple]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def check_hub_access(repo_id: str, token: str | None = None, private: bool | None = None) -> str:
    """
    Create the model repository if it is not there, and make sure that it may be written to.

    Args:
        repo_id (`str`): `"name"` or `"namespace/name"`.
        token (`str`, *optional*): of the Hub. If `None`, the one of `HF_TOKEN` or of `hf auth login`.
        private (`bool`, *optional*): whether a new repository is private.

    Returns:
        `str`: the repository's full name.

    Raises:
        [`HubError`]: no token, a wrong one, one that may not write there, or no connection; it says what to do.
    """
    with _explained(f"{repo_id} cannot be written to on {constants.ENDPOINT}"):
        repo_id = create_repo(repo_id, token=token, private=private, exist_ok=True).repo_id
        auth_check(repo_id, token=token, write=True)
    return repo_id


def publish(
    folder: str | Path,
    repo_id: str,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    completions: bool = False,
) -> str:
    """
    Upload what is listed of a run folder: model and tokenizer ([`~e3_trl.runs.run_folder.MODEL_FILES`]), and card,
    arguments, report, log, rollouts and figures ([`~e3_trl.runs.run_folder.ACCOUNT_FILES`]). Whatever else lies there
    stays, such as checkpoints, the files of dashboards and `training_args.bin`, in which transformers pickles the
    arguments. What an interrupted upload brought over is not sent again. Secrets in the arguments and in the report
    are removed before.

    Args:
        folder (`str` or `Path`): the run's output folder.
        repo_id (`str`): `"name"` or `"namespace/name"`.
        token, private: as in [`check_hub_access`].
        revision (`str`, *optional*): branch to commit to.
        completions (`bool`, *optional*, defaults to `False`):
            Whether the completions that `log_completions` has written are sent too.

    Returns:
        `str`: URL of the commit.

    Raises:
        `ValueError`: if the folder holds no trained model.
        [`HubError`]: the Hub refused or could not be reached; it says what to do. The folder is as it was.
    """
    folder = Path(folder)
    missing = [name for name in ("config.json", "README.md") if not (folder / name).is_file()]
    if (folder / "adapter_config.json").is_file():
        missing = [name for name in missing if name != "config.json"]
    if missing:
        raise ValueError(f"{folder} holds no {missing[0]}. Give the output_dir of a finished training.")
    repo_id = check_hub_access(repo_id, token, private)
    for path in (folder / ARGS_FILE, folder / REPORT_FILE):
        if path.is_file():  # of a run that did not look for secrets everywhere, or put together by hand
            write_json(path, without_secrets(json.loads(path.read_text())))
    complete_model_card(folder, repo_id)
    with _explained(f"{folder} was not uploaded to {repo_id}, and is complete on disk"):
        commit = upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            token=token,
            revision=revision,
            commit_message="End of training",
            allow_patterns=_exactly(folder, COMPLETION_FILES if completions else ()),
        )
    return commit.commit_url


def _exactly(folder: str | Path, more: tuple[str, ...] = ()) -> list[str]:
    """Patterns of the files that may be sent: on the Hub's side a `*` would match slashes too."""
    return [glob.escape(path) for path in files_of(folder, (*MODEL_FILES, *ACCOUNT_FILES, *more))]


@contextlib.contextmanager
def only_what_is_listed(output_dir: str | Path):
    """Inside, transformers uploads no more of the run's folder than [`publish`] does: it has exceptions only."""
    api = hf_api()

    def upload_folder(*, folder_path, **kwargs):
        if Path(folder_path) == Path(output_dir):
            kwargs["allow_patterns"] = _exactly(folder_path)
        return type(api).upload_folder(api, folder_path=folder_path, **kwargs)

    api.upload_folder = upload_folder
    try:
        yield
    finally:
        del api.upload_folder


@contextlib.contextmanager
def _explained(what: str):
    """Turn whatever goes wrong with the Hub into a [`HubError`] that begins with `what` and ends with a remedy."""
    try:
        yield
    # A failed upload of a large file is a RuntimeError, its cause what the Hub answered.
    except (HTTPError, OSError, RuntimeError) as error:
        cause = error if isinstance(error, HTTPError) else error.__cause__ or error
        status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else None
        refused = f"It was refused with status {status}, for the reason above."
        remedy = {
            400: f"{refused} Correct what it names, most often the metadata of README.md.",
            401: "Log in with `hf auth login`, or set HF_TOKEN, with a token that can write.",
            403: "Use a token that can write there, or another repository (hub_model_id, `e3-trl push`).",
            404: f"{refused} Check the names of the repository and the branch (hub_revision).",
        }.get(status, "Check the connection (HF_ENDPOINT, HF_HUB_OFFLINE).")
        raise HubError(
            f"{what}: {cause}\n{remedy} What is trained already goes up with `e3-trl push <output_dir> <name>`."
        ) from error

"""Whether a model that a command names is there, said before anything is loaded."""

from pathlib import Path

from huggingface_hub import HfApi, constants, try_to_load_from_cache

# Its HTTPError is the one that its client raises: httpx's in huggingface_hub 1, httpx2's in 2.
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError, RepositoryNotFoundError


def check_model(
    name: str,
    field: str = "model_name_or_path",
    revision: str | None = None,
    cache_dir: str | None = None,
    token: str | None = None,
) -> None:
    """
    Raise `ValueError` if a model is neither a folder nor on the Hub. transformers would ask the Hub for half a minute,
    for a mistyped folder too.

    Args:
        name (`str`): folder, or name on the Hub.
        field (`str`, *optional*, defaults to `"model_name_or_path"`): the setting that names it.
        revision, cache_dir, token (`str`, *optional*): as in `from_pretrained`.
    """
    if Path(name).exists():
        return
    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith("/") or "\\" in name
    try:
        files = ("config.json", "adapter_config.json")
        if not is_path and any(try_to_load_from_cache(name, file, cache_dir, revision) for file in files):
            return
    except HFValidationError:
        is_path = True
    if is_path:
        raise ValueError(
            f"{field} is {name!r}, and there is no such folder. Check the path, or name a model on the Hub."
        )
    try:
        HfApi().model_info(name, revision=revision, timeout=10, token=token)
    except RepositoryNotFoundError as error:
        raise ValueError(
            f"{field} is {name!r}, which is no folder here and no model on the Hub that is open to you. Check the "
            "name, or log in with `hf auth login`."
        ) from error
    except HfHubHTTPError:  # whatever else it answered: loading tries again, and says it
        pass
    except (HTTPError, OSError) as error:
        raise ValueError(
            f"{field} is {name!r}, which is no folder here, and the Hub cannot be reached ({constants.ENDPOINT}: "
            f"{error}). Give a folder, or check the connection (HF_ENDPOINT, HF_HUB_OFFLINE)."
        ) from error

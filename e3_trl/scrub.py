"""Secrets in settings: what a run writes down about itself goes to the Hub."""

import re


REMOVED = "[removed]"
# The last words of a name, in any of the usual spellings: not `max_tokens` or `pad_token_id`.
_SECRET_NAME = re.compile(
    r"(.*_)?(token|auth|authorization|cookie|credentials?|passphrase|passwd|passwords?|pwd|secrets?"
    r"|(api|access|account|private|secret|shared)_?keys?)"
)
_SECRET_TEXTS = (
    re.compile(r"(?<![A-Za-z0-9])(hf|api_org)_[A-Za-z0-9]{16,}"),  # tokens of the Hub
    re.compile(r"(?<![A-Za-z0-9])hf_(oauth|jwt)_[\w.-]+"),
    re.compile(r'(?<=://)[^\s/?#"<>]+(?=@)'),  # https://user:password@host
    re.compile(r'(?<=[?&])[\w-]*(token|key|password|secret|sig|signature)=[^\s&#"<>]+', re.IGNORECASE),
)


def without_secrets(value):
    """
    A copy of settings in which no secret stands, at any depth.

    What goes: entries of dicts whose name says that they are secret (`token`, `*_token`, `api_key`, `password`,
    `Authorization` and the like), and, within texts, tokens of the Hub (`hf_...`) and the credentials of URLs.

    Args:
        value (`Any`): dicts, lists and tuples are gone through, texts are searched, all else stays as it is.

    Returns:
        `Any`: the same without secrets.

    Example:

    ```python
    >>> without_secrets({"model_init_kwargs": {"token": "a", "proxies": ["http://me:b@proxy:80"]}, "max_tokens": 8})
    {'model_init_kwargs': {'proxies': ['http://[removed]@proxy:80']}, 'max_tokens': 8}

    ```
    """
    if isinstance(value, dict):
        return {name: without_secrets(entry) for name, entry in value.items() if not _names_secret(str(name))}
    if isinstance(value, list):
        return [without_secrets(entry) for entry in value]
    if type(value) is tuple:
        return tuple(without_secrets(entry) for entry in value)
    if type(value) is str:  # not the choices that transformers derives from it
        for pattern in _SECRET_TEXTS:
            value = pattern.sub(REMOVED, value)
    return value


def _names_secret(name: str) -> bool:
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|\W", "_", name)  # apiKey, X-Api-Key
    return _SECRET_NAME.fullmatch(words.lower()) is not None

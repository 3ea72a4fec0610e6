"""What a part measures, with what, and what it is held to."""

import math
from dataclasses import dataclass, field
from pathlib import Path

from e3_trl.runs.report import write_json


@dataclass
class Number:
    """
    Something that was measured.

    Args:
        what (`str`): in words.
        value (`float`): itself.
        unit (`str`, *optional*, defaults to `""`): of it.
        at_least, at_most (`float`, *optional*): what it is held to.
    """

    what: str
    value: float
    unit: str = ""
    at_least: float | None = None
    at_most: float | None = None

    @property
    def limit(self) -> str:
        """In words; empty if it is held to nothing."""
        bounds = {"at least": self.at_least, "at most": self.at_most}
        return ", ".join(f"{name} {bound:.4g}" for name, bound in bounds.items() if bound is not None)

    def __str__(self) -> str:
        return f"{self.what} is {f'{self.value:.4g} {self.unit}'.strip()}"

    @property
    def is_held(self) -> bool:
        bounds = (
            -math.inf if self.at_least is None else self.at_least,
            math.inf if self.at_most is None else self.at_most,
        )
        return not self.limit or bounds[0] <= self.value <= bounds[1]


@dataclass
class Case:
    """
    What a part is told in the process that it has to itself.

    Args:
        name (`str`): of the case, among the part's.
        folder (`str`): for models and runs, the same for all cases of the part.
        miniature (`bool`): whether it runs on a CPU, with tiny models.
        model, data, reward (`str`, *optional*): of the learning.
    """

    name: str
    folder: str
    miniature: bool
    model: str | None = None
    data: str | None = None
    reward: str | None = None
    numbers: list[Number] = field(default_factory=list)

    @property
    def device(self) -> str:
        return "cpu" if self.miniature else "cuda"

    @property
    def settings(self) -> dict:
        """Of every trainer: where it computes, and that it says nothing."""
        return {
            "use_cpu": self.miniature,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
        }

    def path(self, name: str) -> str:
        return str(Path(self.folder) / name)

    def add(self, what: str, value: float, unit: str = "", **limits) -> None:
        """Note a number. What there is by then stays if the part is stopped."""
        self.numbers.append(Number(what, float(value), unit, **limits))
        print(self.numbers[-1], flush=True)
        write_json(numbers_file(self.folder, self.name), [vars(number) for number in self.numbers])


def numbers_file(folder: str, case: str) -> Path:
    return Path(folder) / f"{case}.numbers.json"

"""
What `e3-trl replay` foretells of other budget rules from GRPO's runs of task (a), beside what real runs with them had.

    python -m benchmarks.study.foretell [--study_dir outputs/study]

Writes `benchmarks/results/foretell.json`: by rule, the change of the share of rollouts with a signal and of the share
of all-wrong prompts against GRPO on the same seed, means over seeds, and the standard deviation of what was measured.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from transformers import HfArgumentParser

from benchmarks.study.run import STUDY, read_study
from e3_trl import RolloutBudgetSchedule
from e3_trl.commands.replay import budgets_by_rule, measured, read_batches, replay
from e3_trl.runs.report import write_json


# A method of the study for each rule. Only the first has the temperature of GRPO's run.
METHODS = ["e3_without_temperature", "e3_variance", "e3_variance_prior", "e3_knapsack"]
NAMES = ("signal", "all_wrong")


@dataclass
class Arguments:
    """
    Args:
        study_dir (`str`): where the study has run.
        output (`str`): where to write the numbers.
    """

    study_dir: str = "outputs/study"
    output: str = str(Path(__file__).parents[1] / "results" / "foretell.json")


def changes(folder: Path, method: str, settings: dict) -> tuple[list[float], list[float]]:
    """Foretold and measured change of each of `NAMES`, of one seed."""
    batches, others = (read_batches(folder / name) for name in ("grpo", method))
    rule, prior = settings.get("rollout_allocation", "rank"), settings.get("success_prior", 0.0)
    schedule = RolloutBudgetSchedule(round(batches[0].rollouts.mean()))
    as_it_was = replay(batches, [batch.rollouts for batch in batches])
    foretold = replay(batches, list(budgets_by_rule(batches, rule, schedule, prior=prior)))
    before, after = measured(batches), measured(others)
    return [foretold[name] - as_it_was[name] for name in NAMES], [after[name] - before[name] for name in NAMES]


def main(args: Arguments) -> None:
    study, results = read_study(str(STUDY)), {}
    for method in METHODS:
        folders = [path for path in sorted(Path(args.study_dir, "rules").glob("seed*")) if (path / method).is_dir()]
        if not folders:
            continue
        foretold_SN, measured_SN = map(
            np.array, zip(*(changes(path, method, study["methods"][method]) for path in folders), strict=True)
        )
        results[method] = {
            name: {
                "foretold": float(foretold_SN[:, index].mean()),
                "measured": float(measured_SN[:, index].mean()),
                "deviation": float(measured_SN[:, index].std(ddof=1)),
            }
            for index, name in enumerate(NAMES)
        }
        print(method, len(folders), "seeds:", results[method])
    write_json(args.output, results)


if __name__ == "__main__":
    main(*HfArgumentParser(Arguments).parse_args_into_dataclasses())

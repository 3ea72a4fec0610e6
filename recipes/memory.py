"""GPU memory that a recipe needs, on paper: `e3-trl memory`. Without one, of those beside this file."""

from pathlib import Path

from e3_trl.commands.memory import run


# The other baselines need what GRPO needs.
RECIPES = sorted(
    path
    for name in ("config_e3*.yaml", "config_grpo.yaml")
    for path in Path(__file__).parent.glob(f"DeepSeek-*/{name}")
)

if __name__ == "__main__":
    run(default=RECIPES)

"""The paper, as TRL's model cards name it."""

import textwrap


PAPER = {
    "title": "Enhancing Efficiency and Exploration in Reinforcement Learning for LLMs",
    "id": "2505.18573",
    "citation": textwrap.dedent("""\
        @article{liao2025enhancing,
            title        = {{Enhancing Efficiency and Exploration in Reinforcement Learning for LLMs}},
            author       = {Mengqi Liao and others},
            year         = 2025,
            eprint       = {arXiv:2505.18573},
        }"""),
}

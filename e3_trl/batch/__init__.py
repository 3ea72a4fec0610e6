"""A generation batch of E3: its prompts, the rounds that it is sampled in, and what comes of its rewards."""

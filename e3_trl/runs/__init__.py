"""A run as a whole: what is checked before it, its checkpoints, its folder, its figures and its model card."""

"""A GRPOTrainer with the same gradients, quicker and safer. It knows nothing of E3, and can be used alone."""

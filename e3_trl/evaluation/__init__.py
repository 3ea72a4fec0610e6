"""Problems, completions sampled for them with any model, and pass@k."""

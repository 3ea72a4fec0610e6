"""What happens to one generation batch: its rows, its engine, its temperature, the optional methods, its telemetry."""

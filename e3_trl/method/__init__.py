"""The papers' mathematics: functions of arrays and numbers, which know nothing of TRL, of models or of processes."""

"""The PEFT method: its config, layers, spectrum, rearrangement and prior. Needs torch and peft alone."""

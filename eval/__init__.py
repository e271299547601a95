"""Evaluation: how like the subject, how true to the prompt, how diverse, and at what price. Run as `python -m eval`."""

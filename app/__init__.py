"""The Gradio app: browse adapters, generate, compare, train, look inside. Run as `python -m app`."""
